"""What a corpus promises: splits by document, exact packing, same seed same bytes, and nothing half done."""

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import (
    ALL_THERE_IS,
    BOS,
    EOS,
    FACTS,
    MakeCorpus,
    contents,
    documents_of,
    ids_of,
    message,
    save_tokens,
    texts,
    write_jsonl,
)

from saerelay.data.corpus import SPLITS, Corpus, prepare, split_of
from saerelay.data.packing import new_stretches
from saerelay.planning.recipe import DataSpec, ModelSpec, Recipe


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_of_every_twenty_documents_one_is_test_and_one_validation(seed: int) -> None:
    for block in range(50):
        found = Counter(split_of(20 * block + i, seed) for i in range(20))
        assert found == {"train": 18, "validation": 1, "test": 1}


def test_the_seed_and_the_block_choose_which_documents_are_held_out() -> None:
    def held_out(seed: int, block: int) -> list[int]:
        return [i for i in range(20) if split_of(20 * block + i, seed) != "train"]

    assert len({tuple(held_out(seed, 0)) for seed in range(20)}) > 10
    assert len({tuple(held_out(0, block)) for block in range(20)}) > 10


def test_no_document_is_in_two_splits(make_corpus: MakeCorpus, tmp_path: Path, demo_tokenizer: Any) -> None:
    corpus = make_corpus(text=[str(write_jsonl(tmp_path / "a.jsonl", texts(100)))])
    markers = {
        split: set(
            re.findall(r"m\d+x", demo_tokenizer.decode(ids_of(getattr(corpus, split)), skip_special_tokens=True))
        )
        for split in SPLITS
    }
    assert {split: len(found) for split, found in markers.items()} == {"train": 90, "validation": 5, "test": 5}
    assert len(set.union(*markers.values())) == 100


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("eos", [EOS, None])
def test_the_sequences_are_the_documents_joined(
    make_corpus: MakeCorpus, tmp_path: Path, demo_tokenizer: Any, prepend_bos: bool, eos: int | None
) -> None:
    documents = [f"def f{i}():\n    return {i}\n" * (1 + i % 3) for i in range(150)]  # in three batches
    write_jsonl(tmp_path / "data" / "train.jsonl", documents)
    facts = FACTS.changed(eos_token_id=eos)
    corpus = make_corpus(
        facts=facts, dataset=str(tmp_path / "data"), prepend_bos=prepend_bos, context=64
    )  # streamed: in its own order; documents are shorter than a sequence, so none is cut
    for split in SPLITS:
        rows, expected = getattr(corpus, split), []
        for i, document in enumerate(documents):
            if split_of(i, 0) == split:
                separator = [eos] if expected and eos is not None else []
                expected += separator + demo_tokenizer(document, add_special_tokens=False)["input_ids"]
        body = 64 - prepend_bos
        assert rows.shape == (len(expected) // body, 64) and rows.dtype == np.uint16
        assert ids_of(rows, prepend_bos) == expected[: body * len(rows)]
        assert not prepend_bos or (rows[:, 0] == BOS).all()
    assert corpus.facts.n_documents == 150 and corpus.facts.complete


def numbered(tmp_path: Path, n: int, lengths: Iterable[int]) -> str:
    """A token file of documents in which every other token is the document's number, from 100 on."""
    rows = [np.tile([100 + i, 5], length // 2) for i, length in zip(range(n), lengths, strict=False)]
    separated = [part for row in rows for part in (row, [EOS])]
    return save_tokens(tmp_path / "numbered.npy", np.concatenate(separated))


def test_each_document_gives_one_sequence_before_any_gives_two(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    tokens = numbered(tmp_path, 200, itertools.cycle([500, 8, 80]))
    corpus = make_corpus(tokens=tokens, train=60, held_out=4)
    for split in SPLITS:
        found = Counter(i for i in ids_of(getattr(corpus, split)) if i >= 100)
        n_documents = getattr(corpus.facts, f"{split}_documents")
        assert max(found.values()) == 7  # half of a sequence less BOS and separator
        assert n_documents == len(found)
    assert corpus.facts.train_documents >= 60 and not corpus.facts.complete


def test_too_few_documents_give_more_of_each_and_none_twice(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    text = np.arange(3, 4003)  # every id once, so that what is there twice is seen
    tokens = save_tokens(tmp_path / "a.npy", text.reshape(40, 100))
    some, everything = make_corpus(tokens=tokens, train=60, held_out=4), make_corpus(tokens=tokens)
    used = [i for i in ids_of(some.train) if i != EOS]
    by_document = Counter((i - 3) // 100 for i in used)
    assert len(set(used)) == len(used) and len(by_document) == 36
    assert min(by_document.values()) >= 14 and max(by_document.values()) <= 4 * 14
    all_ids = sorted(i for split in SPLITS for i in ids_of(getattr(everything, split)) if i != EOS)
    assert len(set(all_ids)) == len(all_ids) > 4000 - 3 * 15 and everything.facts.complete
    assert np.array_equal(some.train, everything.train[:60])
    assert everything.facts.notes() == [
        f"the {len(everything.train)} training sequences are from 36 documents only; SAEs lose more on other documents "
        "if they learn from few"
    ]
    assert not everything.facts.changed(train_sequences=5000, train_documents=500).notes()
    assert everything.facts.changed(train_sequences=5000, train_documents=499).notes()
    assert not everything.facts.changed(train_sequences=998, train_documents=499).notes()


def test_stretches_begin_anywhere_and_grow_from_turn_to_turn() -> None:
    text = " ".join(f"{i:03}" for i in range(500))
    starts = []
    for index in range(1000):
        (first,), _ = new_stretches(text, index, 0, ids_per_sequence=50, seed=0)
        assert isinstance(first, str) and first in text and 190 < len(first) < 210
        more, has_more = new_stretches(text, index, 1, ids_per_sequence=50, seed=0)
        around = "".join([str(more[0]), first, *map(str, more[1:])])
        assert has_more and 790 < len(around) < 810 and (around in text or first + str(more[0]) in text)
        starts.append(text.index(first))
    assert min(starts) < 20 and max(starts) > 1780 and 850 < np.mean(starts) < 950
    (late,), _ = new_stretches(text, 5120, 0, ids_per_sequence=50, seed=0)
    assert 390 < len(late) < 410


@pytest.mark.parametrize("alphabet", ["ab c\n", "a", "語 "])
def test_all_turns_together_give_a_document_once(alphabet: str) -> None:
    generator = random.Random(0)
    for index in range(300):
        text = "".join(generator.choices(alphabet, k=generator.choice([1, 3, 50, 300, 3000])))
        ids = np.arange(len(text))
        for document in (text, ids):
            taken: list[Any] = []
            for turn in itertools.count():
                new, has_more = new_stretches(document, index, turn, ids_per_sequence=7, seed=0)
                taken += new
                if not has_more:
                    break
            if isinstance(document, str):
                assert Counter("".join(taken)) == Counter(document)
            else:
                assert sorted(np.concatenate(taken)) == ids.tolist()


def test_a_stretch_of_text_is_as_long_as_a_sequence_in_most_scripts() -> None:
    """Chinese has more tokens to a character than English, and as many to a byte."""
    for text, n_characters in (("word " * 1000, 200), ("語" * 1000, 66), ("слово " * 1000, 109)):
        (first,), _ = new_stretches(text, 0, 0, ids_per_sequence=50, seed=0)
        assert abs(len(first) - n_characters) <= 6


def test_no_scraps_are_left_over() -> None:
    assert new_stretches(np.arange(62), 0, 0, ids_per_sequence=50, seed=0)[1] is False
    (first,), has_more = new_stretches(np.arange(63), 0, 0, ids_per_sequence=50, seed=0)
    assert len(first) == 50 and has_more


def test_where_a_stretch_is_follows_from_the_seed() -> None:
    ids = np.arange(10_000)
    starts = {new_stretches(ids, 0, 0, ids_per_sequence=50, seed=seed)[0][0][0] for seed in range(10)}
    assert len(starts) == 10


def test_one_long_document_among_short_ones_gives_all_it_has(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    tokens = numbered(tmp_path, 200, itertools.cycle([8] * 19 + [500]))
    corpus = make_corpus(tokens=tokens)
    found = Counter(i for split in SPLITS for i in ids_of(getattr(corpus, split)) if i >= 100)
    complete = [i for i, n in found.items() if n == (250 if (i - 100) % 20 == 19 else 4)]
    assert len(complete) >= 200 - 6  # the last documents of each split may be cut
    assert corpus.facts.n_documents == 200


def test_documents_of_a_full_split_are_not_tokenised(tmp_path: Path, demo_tokenizer: Any) -> None:
    read = texts_tokenised(tmp_path, demo_tokenizer, texts(400), train=1, held_out=6)
    assert sum(split_of(int(text[1 : text.index("x")]), 0) == "train" for text in read) <= 64  # one batch


def test_only_what_is_used_of_a_text_is_tokenised(tmp_path: Path, demo_tokenizer: Any) -> None:
    """So that a corpus of many long documents takes no longer than one of a few."""
    read = texts_tokenised(tmp_path, demo_tokenizer, texts(200, words=1000), train=100, held_out=4)
    assert sum(map(len, read)) < 1.5 * 108 * 16 * 5


def texts_tokenised(tmp_path: Path, demo_tokenizer: Any, documents: list[str], train: int, held_out: int) -> list[str]:
    """What is tokenised to make a corpus of some documents."""
    read: list[str] = []

    class Tokenizer:
        all_special_ids = demo_tokenizer.all_special_ids

        def __call__(self, texts: list[str], **options: Any) -> Any:
            read.extend(texts)
            return demo_tokenizer(texts, **options)

    write_jsonl(tmp_path / "data" / "train.jsonl", documents)
    run = Recipe(data=DataSpec.model_validate({"dataset": str(tmp_path / "data"), "context": 16}))
    tokenizer: Any = Tokenizer()
    prepare(run, FACTS, tokenizer, tmp_path / "out", train_sequences=train, eval_sequences=held_out)
    return read


def test_a_split_is_cut_to_what_was_asked(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    corpus = make_corpus(text=[str(write_jsonl(tmp_path / "a.jsonl", texts(100)))], train=30, held_out=3)
    assert [len(getattr(corpus, split)) for split in SPLITS] == [30, 3, 3]
    facts = corpus.facts
    assert [facts.train_sequences, facts.validation_sequences, facts.test_sequences] == [30, 3, 3]
    assert not facts.complete and facts.n_documents < 100


def test_a_short_source_gives_what_it_has(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    corpus = make_corpus(text=[str(write_jsonl(tmp_path / "a.jsonl", texts(40)))], train=ALL_THERE_IS, held_out=2)
    assert 0 < len(corpus.train) < ALL_THERE_IS and len(corpus.test) == 2
    assert corpus.facts.complete and corpus.facts.n_documents == 40


def test_documents_that_say_nothing_are_skipped(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    some = [text for document in texts(40) for text in (document, "", " \n", None)]
    corpus = make_corpus(text=[str(write_jsonl(tmp_path / "a.jsonl", some))])
    assert corpus.facts.n_documents == 40
    assert contents(corpus) != b"" and [] not in documents_of(corpus.train)
    assert not any(a == b == EOS for a, b in itertools.pairwise(ids_of(corpus.train)))


def test_same_recipe_same_bytes_and_another_seed_other_bytes(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    data = {"text": [str(write_jsonl(tmp_path / "a.jsonl", texts(60)))]}
    first, again, other = make_corpus(**data), make_corpus(**data), make_corpus(**data, seed=1)
    assert contents(first) == contents(again) and first.facts == again.facts
    assert contents(first) != contents(other)
    names = ["corpus.json", "test.npy", "train.npy", "validation.npy"]
    for name in names:
        read = [(tmp_path / "out" / corpus / name).read_bytes() for corpus in ("c0", "c1")]
        assert read[0] == read[1]
    assert sorted(path.name for path in (tmp_path / "out" / "c0").iterdir()) == names


def test_the_seed_shuffles_local_documents(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    rows = np.arange(100, 200)[:, None].repeat(14, axis=1)
    rows[:, 1::2] = 5
    tokens = save_tokens(tmp_path / "a.npy", rows)
    orders = [
        [document[0] for document in documents_of(make_corpus(tokens=tokens, seed=seed).train)] for seed in (0, 1)
    ]
    both = set(orders[0]) & set(orders[1])
    first, second = ([i for i in order if i in both] for order in orders)
    assert len(orders[0]) == len(orders[1]) == 89 and first != second
    assert first != sorted(first) and second != sorted(second)


def test_a_longer_corpus_begins_with_the_shorter(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    data = {"text": [str(write_jsonl(tmp_path / "a.jsonl", texts(200)))]}
    short, long = make_corpus(**data, train=20, held_out=2), make_corpus(**data)
    for split in SPLITS:
        n = len(getattr(short, split))
        assert len(getattr(long, split)) > n
        assert np.array_equal(getattr(short, split), getattr(long, split)[:n])


def test_preparing_again_only_opens(tmp_path: Path, demo_tokenizer: Any) -> None:
    run = Recipe(data=DataSpec(text=[str(write_jsonl(tmp_path / "a.jsonl", texts(40)))], context=16))
    target = tmp_path / "corpus"
    first = prepare(run, FACTS, demo_tokenizer, target, train_sequences=5, eval_sequences=1)
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    (tmp_path / "a.jsonl").unlink()
    again = prepare(run, FACTS, demo_tokenizer, target, train_sequences=9, eval_sequences=1)
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    assert contents(first) == contents(again) == contents(Corpus.open(target))
    assert isinstance(again.train, np.memmap) and not again.train.flags.writeable


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_call_leaves_nothing(tmp_path: Path, demo_tokenizer: Any, error: type[BaseException]) -> None:
    run = Recipe(data=DataSpec(text=[str(write_jsonl(tmp_path / "a.jsonl", texts(200)))], context=16))
    asked: dict[str, Any] = {"train_sequences": ALL_THERE_IS, "eval_sequences": ALL_THERE_IS}
    target, told = tmp_path / "out" / "corpus", []

    def stop(n: int) -> None:
        told.append(n)
        if len(told) == 2:
            assert [path.name for path in target.parent.iterdir()] == [".corpus.partial"]
            raise error

    with pytest.raises(error):
        prepare(run, FACTS, demo_tokenizer, target, **asked, progress=stop)
    assert list(target.parent.iterdir()) == []
    assert 0 < told[0] < told[1]

    (target.parent / ".corpus.partial").mkdir()  # as a killed process leaves it
    (target.parent / ".corpus.partial" / "train.raw").write_bytes(b"garbage")
    corpus = prepare(run, FACTS, demo_tokenizer, target, **asked, progress=told.append)
    assert told[-1] == sum(getattr(corpus, split).size for split in SPLITS)
    assert list(target.parent.iterdir()) == [target]
    fresh = prepare(run, FACTS, demo_tokenizer, tmp_path / "fresh", **asked)
    assert contents(corpus) == contents(fresh)


def test_an_empty_directory_is_used_and_a_strange_one_is_not(tmp_path: Path, demo_tokenizer: Any) -> None:
    run = Recipe(data=DataSpec(text=[str(write_jsonl(tmp_path / "a.jsonl", texts(40)))], context=16))
    for name in ("empty", "strange"):
        (tmp_path / name).mkdir()
    (tmp_path / "strange" / "thesis.txt").touch()
    prepare(run, FACTS, demo_tokenizer, tmp_path / "empty", train_sequences=5, eval_sequences=1)
    said = message(
        lambda: prepare(run, FACTS, demo_tokenizer, tmp_path / "strange", train_sequences=5, eval_sequences=1)
    )
    assert said == f"{tmp_path}/strange: exists but holds no corpus.json; remove it, or choose another directory."


def test_damage_is_named(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    make_corpus(text=[str(write_jsonl(tmp_path / "a.jsonl", texts(40)))], train=5, held_out=1)
    target = tmp_path / "out" / "c0"
    remedy = f"Remove {target}; it is made again from the recipe."
    whole = (target / "train.npy").read_bytes()
    (target / "train.npy").write_bytes(whole[:-1])
    assert "train.npy: damaged; expected an array (5, 16), found mmap length" in message(lambda: Corpus.open(target))
    np.save(target / "train.npy", np.zeros((4, 16), np.uint16))
    said = message(lambda: Corpus.open(target))
    assert said == f"{target}/train.npy: damaged; expected an array (5, 16), found an array (4, 16). {remedy}"
    (target / "train.npy").write_bytes(whole)
    facts = json.loads((target / "corpus.json").read_text())
    (target / "corpus.json").write_text(json.dumps(facts | {"schema": 1}))
    assert "corpus.json: schema 1, but this version of saerelay reads schema 2; remove its directory" in message(
        lambda: Corpus.open(target)
    )
    (target / "corpus.json").write_text("{")
    assert message(lambda: Corpus.open(target)).endswith("remove its directory; it is made again from the recipe")
    assert message(lambda: Corpus.open(tmp_path)) == f"{tmp_path}: no corpus here (corpus.json is missing)."


def test_a_recipe_that_does_not_fit_the_model_is_refused(
    make_corpus: MakeCorpus, tmp_path: Path, demo_tokenizer: Any
) -> None:
    without = FACTS.changed(bos_token_id=None)
    said = message(lambda: make_corpus(facts=without))
    assert said == "data.prepend_bos is true, but the model demo has no BOS token; set data.prepend_bos = false."
    run = Recipe(model=ModelSpec(name="gpt2"))
    said = message(lambda: prepare(run, FACTS, demo_tokenizer, tmp_path / "x", train_sequences=1, eval_sequences=1))
    assert 'no data given for the model "gpt2": set data.dataset, data.text or data.tokens' in said
    small = FACTS.changed(vocab_size=300)
    path = write_jsonl(tmp_path / "a.jsonl", ["import collections"] * 30)
    said = message(lambda: make_corpus(facts=small, text=[str(path)]))
    assert re.match(r"the tokenizer gives the token id \d+, but the model demo has a vocabulary of 300 ", said)
