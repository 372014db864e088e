"""What a corpus promises: splits by document, exact packing, same seed same bytes, and nothing half done."""

import itertools
import json
import re
from collections import Counter
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
    documents = [f"def f{i}():\n    return {i}\n" * (1 + i % 7) for i in range(150)]  # in three batches
    write_jsonl(tmp_path / "data" / "train.jsonl", documents)
    facts = FACTS.changed(eos_token_id=eos)
    corpus = make_corpus(
        facts=facts, dataset=str(tmp_path / "data"), prepend_bos=prepend_bos
    )  # streamed: in its own order
    for split in SPLITS:
        rows, expected = getattr(corpus, split), []
        for i, document in enumerate(documents):
            if split_of(i, 0) == split:
                separator = [eos] if expected and eos is not None else []
                expected += separator + demo_tokenizer(document, add_special_tokens=False)["input_ids"]
        body = 16 - prepend_bos
        assert rows.shape == (len(expected) // body, 16) and rows.dtype == np.uint16
        assert ids_of(rows, prepend_bos) == expected[: body * len(rows)]
        assert not prepend_bos or (rows[:, 0] == BOS).all()
    assert corpus.facts.n_documents == 150 and corpus.facts.complete


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
    rows = np.arange(100, 200)[:, None].repeat(16, axis=1)
    rows[:, 1::2] = 5
    tokens = save_tokens(tmp_path / "a.npy", rows)
    orders = [
        [document[0] for document in documents_of(make_corpus(tokens=tokens, seed=seed).train)] for seed in (0, 1)
    ]
    both = set(orders[0]) & set(orders[1])
    first, second = ([i for i in order if i in both] for order in orders)
    assert len(orders[0]) == len(orders[1]) == 90 and first != second
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
