"""What a corpus promises: splits by document, exact packing, same seed same bytes, and nothing half done."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from saerelay import demo
from saerelay.data.corpus import SPLITS, Corpus, prepare, split_of
from saerelay.errors import DataError
from saerelay.planning.facts import ModelFacts
from saerelay.planning.recipe import DataSpec, ModelSpec, Recipe, TrainSpec

BOS, EOS = 1, 2
MANY = 10**6
FACTS = ModelFacts(
    name="demo",
    revision="",
    family="gpt_neox",
    dtype="float32",
    device="cpu",
    n_layers=8,
    d_model=192,
    d_attn_z=192,
    vocab_size=4096,
    max_context=512,
    bos_token_id=BOS,
    eos_token_id=EOS,
    has_lm_head=True,
    layer_params=1,
    model_params=8,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(demo.MODEL_DIR / "tokenizer.json"))


@pytest.fixture
def make(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Corpus]:
    """Prepare a corpus in a new directory, by default of all there is."""
    numbers = itertools.count()

    def make(
        *, train: int = MANY, held_out: int = MANY, facts: ModelFacts = FACTS, seed: int = 0, **data: Any
    ) -> Corpus:
        run = Recipe(data=DataSpec.model_validate({"context": 16} | data), train=TrainSpec(seed=seed))
        target = tmp_path / "out" / f"c{next(numbers)}"
        return prepare(run, facts, tokenizer, target, train_sequences=train, eval_sequences=held_out)

    return make


def texts(n: int, words: int = 40) -> list[str]:
    """Documents of which every piece tells the document."""
    return [f"m{i}x " * words for i in range(n)]


def write_jsonl(path: Path, documents: list[Any], key: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(documents)))
    return path


def save_tokens(path: Path, array: Any, dtype: Any = np.uint16) -> str:
    np.save(path, np.asarray(array, dtype))
    return str(path)


def ids_of(rows: np.ndarray, prepend_bos: bool = True) -> list[int]:
    """The documents' ids in a split, with the sequences joined again."""
    return rows[:, int(prepend_bos) :].ravel().tolist()


def documents_of(rows: np.ndarray) -> list[list[int]]:
    """The documents in a split; the last may be cut."""
    return [list(group) for is_eos, group in itertools.groupby(ids_of(rows), lambda i: i == EOS) if not is_eos]


def contents(corpus: Corpus) -> bytes:
    return b"".join(getattr(corpus, split).tobytes() for split in SPLITS)


def message(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as info:
        call()
    assert info.value.__cause__ is None and (info.value.__suppress_context__ or info.value.__context__ is None)
    return str(info.value)


# --- splits ---


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


def test_no_document_is_in_two_splits(make: Callable[..., Corpus], tmp_path: Path, tokenizer: Any) -> None:
    corpus = make(text=[str(write_jsonl(tmp_path / "a.jsonl", texts(100)))])
    markers = {
        split: set(re.findall(r"m\d+x", tokenizer.decode(ids_of(getattr(corpus, split)), skip_special_tokens=True)))
        for split in SPLITS
    }
    assert {split: len(found) for split, found in markers.items()} == {"train": 90, "validation": 5, "test": 5}
    assert len(set.union(*markers.values())) == 100


# --- packing ---


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("eos", [EOS, None])
def test_the_sequences_are_the_documents_joined(
    make: Callable[..., Corpus], tmp_path: Path, tokenizer: Any, prepend_bos: bool, eos: int | None
) -> None:
    documents = [f"def f{i}():\n    return {i}\n" * (1 + i % 7) for i in range(150)]  # in three batches
    write_jsonl(tmp_path / "data" / "train.jsonl", documents)
    facts = FACTS.changed(eos_token_id=eos)
    corpus = make(facts=facts, dataset=str(tmp_path / "data"), prepend_bos=prepend_bos)  # streamed: in its own order
    for split in SPLITS:
        rows, expected = getattr(corpus, split), []
        for i, document in enumerate(documents):
            if split_of(i, 0) == split:
                separator = [eos] if expected and eos is not None else []
                expected += separator + tokenizer(document, add_special_tokens=False)["input_ids"]
        body = 16 - prepend_bos
        assert rows.shape == (len(expected) // body, 16) and rows.dtype == np.uint16
        assert ids_of(rows, prepend_bos) == expected[: body * len(rows)]
        assert not prepend_bos or (rows[:, 0] == BOS).all()
    assert corpus.facts.n_documents == 150 and corpus.facts.complete


def test_a_split_is_cut_to_what_was_asked(make: Callable[..., Corpus], tmp_path: Path) -> None:
    corpus = make(text=[str(write_jsonl(tmp_path / "a.jsonl", texts(100)))], train=30, held_out=3)
    assert [len(getattr(corpus, split)) for split in SPLITS] == [30, 3, 3]
    facts = corpus.facts
    assert [facts.train_sequences, facts.validation_sequences, facts.test_sequences] == [30, 3, 3]
    assert not facts.complete and facts.n_documents < 100


def test_a_short_source_gives_what_it_has(make: Callable[..., Corpus], tmp_path: Path) -> None:
    corpus = make(text=[str(write_jsonl(tmp_path / "a.jsonl", texts(40)))], train=MANY, held_out=2)
    assert 0 < len(corpus.train) < MANY and len(corpus.test) == 2
    assert corpus.facts.complete and corpus.facts.n_documents == 40


def test_documents_that_say_nothing_are_skipped(make: Callable[..., Corpus], tmp_path: Path) -> None:
    some = [text for document in texts(40) for text in (document, "", " \n", None)]
    corpus = make(text=[str(write_jsonl(tmp_path / "a.jsonl", some))])
    assert corpus.facts.n_documents == 40
    assert contents(corpus) != b"" and [] not in documents_of(corpus.train)
    assert not any(a == b == EOS for a, b in itertools.pairwise(ids_of(corpus.train)))


# --- determinism and files ---


def test_same_recipe_same_bytes_and_another_seed_other_bytes(make: Callable[..., Corpus], tmp_path: Path) -> None:
    data = {"text": [str(write_jsonl(tmp_path / "a.jsonl", texts(60)))]}
    first, again, other = make(**data), make(**data), make(**data, seed=1)
    assert contents(first) == contents(again) and first.facts == again.facts
    assert contents(first) != contents(other)
    names = ["corpus.json", "test.npy", "train.npy", "validation.npy"]
    for name in names:
        read = [(tmp_path / "out" / corpus / name).read_bytes() for corpus in ("c0", "c1")]
        assert read[0] == read[1]
    assert sorted(path.name for path in (tmp_path / "out" / "c0").iterdir()) == names


def test_the_seed_shuffles_local_documents(make: Callable[..., Corpus], tmp_path: Path) -> None:
    tokens = save_tokens(tmp_path / "a.npy", np.arange(100, 200)[:, None].repeat(16, axis=1))
    orders = [[document[0] for document in documents_of(make(tokens=tokens, seed=seed).train)] for seed in (0, 1)]
    both = set(orders[0]) & set(orders[1])
    first, second = ([i for i in order if i in both] for order in orders)
    assert len(orders[0]) == len(orders[1]) == 90 and first != second
    assert first != sorted(first) and second != sorted(second)


def test_a_longer_corpus_begins_with_the_shorter(make: Callable[..., Corpus], tmp_path: Path) -> None:
    data = {"text": [str(write_jsonl(tmp_path / "a.jsonl", texts(200)))]}
    short, long = make(**data, train=20, held_out=2), make(**data)
    for split in SPLITS:
        n = len(getattr(short, split))
        assert len(getattr(long, split)) > n
        assert np.array_equal(getattr(short, split), getattr(long, split)[:n])


def test_preparing_again_only_opens(tmp_path: Path, tokenizer: Any) -> None:
    run = Recipe(data=DataSpec(text=[str(write_jsonl(tmp_path / "a.jsonl", texts(40)))], context=16))
    target = tmp_path / "corpus"
    first = prepare(run, FACTS, tokenizer, target, train_sequences=5, eval_sequences=1)
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    (tmp_path / "a.jsonl").unlink()
    again = prepare(run, FACTS, tokenizer, target, train_sequences=9, eval_sequences=1)
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    assert contents(first) == contents(again) == contents(Corpus.open(target))
    assert isinstance(again.train, np.memmap) and not again.train.flags.writeable


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_call_leaves_nothing(tmp_path: Path, tokenizer: Any, error: type[BaseException]) -> None:
    run = Recipe(data=DataSpec(text=[str(write_jsonl(tmp_path / "a.jsonl", texts(200)))], context=16))
    asked: dict[str, Any] = {"train_sequences": MANY, "eval_sequences": MANY}
    target, told = tmp_path / "out" / "corpus", []

    def stop(n: int) -> None:
        told.append(n)
        if len(told) == 2:
            assert [path.name for path in target.parent.iterdir()] == [".corpus.partial"]
            raise error

    with pytest.raises(error):
        prepare(run, FACTS, tokenizer, target, **asked, progress=stop)
    assert list(target.parent.iterdir()) == []
    assert 0 < told[0] < told[1]

    (target.parent / ".corpus.partial").mkdir()  # as a killed process leaves it
    (target.parent / ".corpus.partial" / "train.raw").write_bytes(b"garbage")
    corpus = prepare(run, FACTS, tokenizer, target, **asked, progress=told.append)
    assert told[-1] == sum(getattr(corpus, split).size for split in SPLITS)
    assert list(target.parent.iterdir()) == [target]
    fresh = prepare(run, FACTS, tokenizer, tmp_path / "fresh", **asked)
    assert contents(corpus) == contents(fresh)


def test_an_empty_directory_is_used_and_a_strange_one_is_not(tmp_path: Path, tokenizer: Any) -> None:
    run = Recipe(data=DataSpec(text=[str(write_jsonl(tmp_path / "a.jsonl", texts(40)))], context=16))
    for name in ("empty", "strange"):
        (tmp_path / name).mkdir()
    (tmp_path / "strange" / "thesis.txt").touch()
    prepare(run, FACTS, tokenizer, tmp_path / "empty", train_sequences=5, eval_sequences=1)
    said = message(lambda: prepare(run, FACTS, tokenizer, tmp_path / "strange", train_sequences=5, eval_sequences=1))
    assert said == f"{tmp_path}/strange: exists but holds no corpus.json; remove it, or choose another directory."


def test_damage_is_named(make: Callable[..., Corpus], tmp_path: Path) -> None:
    make(text=[str(write_jsonl(tmp_path / "a.jsonl", texts(40)))], train=5, held_out=1)
    target = tmp_path / "out" / "c0"
    remedy = f"Remove {target}; it is made anew from the recipe."
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
    assert message(lambda: Corpus.open(target)).endswith("remove its directory; it is made anew from the recipe")
    assert message(lambda: Corpus.open(tmp_path)) == f"{tmp_path}: no corpus here (corpus.json is missing)."


# --- text ---


def test_directories_are_searched_and_each_file_is_read_once(make: Callable[..., Corpus], tmp_path: Path) -> None:
    root = tmp_path / "project"
    for i, text in enumerate(texts(60)):
        path = root / f"d{i % 3}" / f"{i}{['.txt', '.md', '.py'][i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    write_jsonl(root / "more.jsonl", texts(80)[60:], key="body")
    (root / "skipped.bin").write_bytes(b"\0")
    corpus = make(text=[str(root), str(root / "d0"), str(root / "d0" / "0.txt")], column="body")
    assert corpus.facts.n_documents == 80
    assert corpus.facts.source == f"text in {root}, {root}/d0, {root}/d0/0.txt (files: 61)"


def test_paths_start_in_the_working_directory_or_at_home(
    make: Callable[..., Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "home" / "a.jsonl", texts(40))
    monkeypatch.setenv("HOME", str(path.parent))
    monkeypatch.chdir(path.parent)
    assert contents(make(text=["~/a.jsonl"])) == contents(make(text=["a.jsonl"])) == contents(make(text=[str(path)]))


@pytest.mark.parametrize("separator", ["\n\n", "\r\n \r\n", "\n", " ", "", "語" * 5])
def test_a_big_file_is_cut_into_documents_without_loss(
    make: Callable[..., Corpus], tmp_path: Path, tokenizer: Any, separator: str
) -> None:
    end = " " if "\n" in separator else "-"
    text = separator.join(f"m{i}x{end}" * 5 for i in range(4000))
    (tmp_path / "big.txt").write_bytes(text.encode())
    corpus = make(text=[str(tmp_path / "big.txt")], prepend_bos=False, context=4)
    assert 40 <= corpus.facts.n_documents <= 100  # of 2000 bytes or a little more each
    train = [tokenizer.decode(ids) for ids in documents_of(np.pad(corpus.train, ((0, 0), (1, 0))))][:-1]
    assert "�" not in "".join(train)
    clean = text.replace("\r\n", "\n")
    for document in train:
        assert document in clean and len(document.encode()) <= 2 * 2000
        if separator.isspace():
            assert document.endswith(separator.replace("\r\n", "\n")) or clean.endswith(document)
    assert sum(map(len, train)) > 0.8 * len(clean)


def test_many_files_stay_whole_and_bad_bytes_are_replaced(
    make: Callable[..., Corpus], tmp_path: Path, tokenizer: Any
) -> None:
    (tmp_path / "files").mkdir()
    for i in range(40):
        (tmp_path / "files" / f"{i}.txt").write_bytes(b"\xef\xbb\xbf" + b"\xff word\n\n" * 900)
    corpus = make(text=[str(tmp_path / "files")])
    assert corpus.facts.n_documents == 40
    assert "\ufeff" not in tokenizer.decode(corpus.train[0]) and "\ufffd word" in tokenizer.decode(corpus.train[0])


def test_errors_of_text(make: Callable[..., Corpus], tmp_path: Path, tokenizer: Any) -> None:
    said = message(lambda: make(text=["nowhere.txt"]))
    assert said == f'data.text: no such file or directory: "nowhere.txt" (relative paths start in {Path.cwd()}).'
    (tmp_path / "bare").mkdir()
    said = message(lambda: make(text=[str(tmp_path / "bare")]))
    assert said == f'data.text: "{tmp_path}/bare" holds no .txt, .md, .py, .jsonl files; name other files singly.'
    path = write_jsonl(tmp_path / "a.jsonl", texts(30), key="body")
    said = message(lambda: make(text=[str(path)]))
    assert f"{path}, line " in said and 'no text under "text"; found id, body. Name the right one in data.col' in said
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts(30)) + "\n\n{oops\n")
    assert f"{path}, line 32: not valid JSON (" in message(lambda: make(text=[str(path)]))
    (tmp_path / "empty.txt").touch()
    said = message(lambda: make(text=[str(tmp_path / "empty.txt")]))
    assert "no documents in it (empty ones are skipped). Give a source with text." in said
    (tmp_path / "small.txt").write_text("a few words " * 20)
    said = message(lambda: make(text=[str(tmp_path / "small.txt")]))
    assert re.search(
        r"too little for the .* split, which got no sequence. It holds 1 documents with \d+ tokens; ", said
    )
    assert said.endswith("Give more documents, or lower data.context.")
    assert list((tmp_path / "out").iterdir()) == []
    run = Recipe(data=DataSpec(text=[str(path)]))
    said = message(lambda: prepare(run, FACTS, None, tmp_path / "x", train_sequences=1, eval_sequences=1))
    assert "comes without a tokenizer" in said and "data.tokens" in said


def test_errors_of_the_recipe(make: Callable[..., Corpus], tmp_path: Path, tokenizer: Any) -> None:
    without = FACTS.changed(bos_token_id=None)
    said = message(lambda: make(facts=without))
    assert said == "data.prepend_bos is true, but the model demo has no BOS token; set data.prepend_bos = false."
    run = Recipe(model=ModelSpec(name="gpt2"))
    said = message(lambda: prepare(run, FACTS, tokenizer, tmp_path / "x", train_sequences=1, eval_sequences=1))
    assert 'no data given for the model "gpt2": set data.dataset, data.text or data.tokens' in said
    small = FACTS.changed(vocab_size=300)
    path = write_jsonl(tmp_path / "a.jsonl", ["import collections"] * 30)
    said = message(lambda: make(facts=small, text=[str(path)]))
    assert re.match(r"the tokenizer gives the token id \d+, but the model demo has a vocabulary of 300 ", said)


# --- tokens ---


def test_rows_one_array_with_separators_and_wider_ids_are_the_same_corpus(
    make: Callable[..., Corpus], tmp_path: Path
) -> None:
    rows = np.random.default_rng(0).integers(3, 4096, (60, 30))
    with_bos = np.insert(rows, 0, BOS, axis=1)
    reference = make(tokens=save_tokens(tmp_path / "rows.npy", rows))
    assert reference.facts.n_documents == 60
    flat_eos = np.append(rows, np.full((60, 1), EOS), axis=1).ravel()
    no_eos = FACTS.changed(eos_token_id=None)
    for name, array, dtype in [
        ("wide", rows, np.uint32),
        ("bos", with_bos, np.uint16),
        ("eos", flat_eos, np.uint16),
        ("both", np.insert(flat_eos.reshape(60, 31), 0, BOS, axis=1).ravel(), np.uint16),
        ("start", with_bos.ravel(), np.uint16),
        ("fortran", np.asfortranarray(rows), np.uint16),
    ]:
        assert contents(make(tokens=save_tokens(tmp_path / f"{name}.npy", array, dtype))) == contents(reference), name
    joined = make(tokens=save_tokens(tmp_path / "plain.npy", rows), facts=no_eos)
    assert EOS not in joined.train and joined.train.size < reference.train.size


def test_only_one_bos_is_taken_from_a_row(make: Callable[..., Corpus], tmp_path: Path) -> None:
    rows = [[BOS, BOS, 7, 8]] * 200
    corpus = make(tokens=save_tokens(tmp_path / "a.npy", rows))
    assert documents_of(corpus.train)[0] == [BOS, 7, 8]


@pytest.mark.parametrize(("n", "length"), [(100_000, 64 * 16), (4000, 200)])
def test_an_array_without_separators_is_cut_into_stretches(
    make: Callable[..., Corpus], tmp_path: Path, n: int, length: int
) -> None:
    array = 3 + np.arange(n) % 4000
    array[10:29] = EOS  # too few to be separators
    corpus = make(tokens=save_tokens(tmp_path / "a.npy", array))
    assert corpus.facts.n_documents == -(-n // length) >= 20


def test_ids_are_wide_where_the_vocabulary_is(make: Callable[..., Corpus], tmp_path: Path) -> None:
    for vocab_size, dtype in [(65536, np.uint16), (65537, np.uint32)]:
        facts = FACTS.changed(vocab_size=vocab_size)
        rows = np.full((40, 16), vocab_size - 1)
        corpus = make(tokens=save_tokens(tmp_path / f"{vocab_size}.npy", rows, np.uint32), facts=facts)
        assert corpus.train.dtype == dtype and corpus.train.max() == vocab_size - 1


def test_tokens_need_no_tokenizer(tmp_path: Path) -> None:
    run = Recipe(data=DataSpec(tokens=save_tokens(tmp_path / "a.npy", np.full((40, 16), 9)), context=16))
    corpus = prepare(run, FACTS, None, tmp_path / "c", train_sequences=3, eval_sequences=1)
    assert corpus.facts.source == f"tokens in {tmp_path}/a.npy" and len(corpus.train) == 3


def test_errors_of_tokens(make: Callable[..., Corpus], tmp_path: Path) -> None:
    path = tmp_path / "a.npy"

    def said(array: Any, dtype: Any = np.uint16) -> str:
        return message(lambda: make(tokens=save_tokens(path, array, dtype)))

    convert = 'np.save("tokens.npy", array.astype(np.uint16))'
    assert (
        said(np.full((40, 16), 5), np.int64)
        == f"{path}: expected uint16 or uint32, found int64. Convert it with {convert}."
    )
    assert "expected a 1-D or 2-D array of token ids, found the shape (2, 2, 2)" in said(np.ones((2, 2, 2)))
    assert "found the shape (0,)" in said([])
    array = np.full(5_000_000, 5)
    array[-1] = 4096  # beyond the first chunk
    assert f"{path} gives the token id 4096, but the model demo has a vocabulary of 4096 (ids up to 4095)." in said(
        array
    )
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    assert f"{path}: not a .npy file of token ids (" in message(lambda: make(tokens=str(path)))
    for content in (b"", b"\x05\0" * 1000):
        path.write_bytes(content)
        assert f"{path}: not a .npy file of token ids (" in message(lambda: make(tokens=str(path)))
    path.unlink()
    assert f'data.tokens: no such file: "{path}"' in message(lambda: make(tokens=str(path)))
    assert not (tmp_path / "out").exists()


# --- datasets ---


def test_a_saved_dataset_is_shuffled_and_a_streamed_one_is_not(
    make: Callable[..., Corpus], tmp_path: Path, tokenizer: Any
) -> None:
    saved = datasets.Dataset.from_dict({"body": texts(60), "n": list(range(60))})
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"check": saved.select(range(30)), "learn": saved}).save_to_disk(tmp_path / "dict")
    (tmp_path / "parquet").mkdir()
    saved.to_parquet(tmp_path / "parquet" / "train.parquet")
    one = make(dataset=str(tmp_path / "one"), column="body")
    assert one.facts.n_documents == 60
    assert contents(one) == contents(make(dataset=str(tmp_path / "dict"), column="body", split="learn"))
    assert contents(one) != contents(make(dataset=str(tmp_path / "one"), column="body", seed=1))
    streamed = make(dataset=str(tmp_path / "parquet"), column="body")
    assert streamed.facts.source == f"dataset {tmp_path}/parquet, split train"
    orders = [
        [int(m) for m in dict.fromkeys(re.findall(r"m(\d+)x", tokenizer.decode(ids_of(c.train))))]
        for c in (one, streamed)
    ]
    assert orders[0] != sorted(orders[0]) and orders[1] == sorted(orders[1])


def test_no_more_is_read_of_a_stream_than_needed(make: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    read, asked = [], []

    def rows() -> Iterator[dict[str, Any]]:
        for i in itertools.count():
            read.append(i)
            yield {"text": f"m{i}x " * 40, "n": i}

    def load_dataset(path: str, **options: Any) -> datasets.IterableDataset:
        asked.append((path, options))
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = make(dataset="someone/text", subset="en", revision="abc", train=40, held_out=2)
    options = {"name": "en", "split": "train", "revision": "abc", "streaming": True}
    assert asked == [("someone/text", options)]
    assert corpus.facts.source == "dataset someone/text, subset en, split train, revision abc"
    assert len(corpus.train) == 40 and not corpus.facts.complete
    assert corpus.facts.n_documents == 64 and max(read) <= 64  # one batch, of an endless stream


def test_errors_of_datasets(make: Callable[..., Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = datasets.Dataset.from_dict({"body": texts(30), "ids": [[1, 2]] * 30})
    datasets.DatasetDict({"learn": saved, "check": saved}).save_to_disk(tmp_path / "dict")
    name = str(tmp_path / "dict")
    said = message(lambda: make(dataset=name))
    assert said == f'data.dataset = "{name}" has no split "train"; set data.split to one of: learn, check.'
    said = message(lambda: make(dataset=name, split="learn"))
    expected = f'data.dataset = "{name}" has no column "text"; set data.column to the one with the text, of: body, ids.'
    assert said == expected
    said = message(lambda: make(dataset=name, split="learn", column="ids"))
    assert f'data.dataset = "{name}": the column "ids" holds list, expected text.' in said and "data.tokens" in said

    write_jsonl(tmp_path / "lines" / "a.jsonl", texts(30), key="body")
    lines = str(tmp_path / "lines")
    assert 'no column "text"; set data.column to the one with the text, of: id, body.' in message(
        lambda: make(dataset=lines)
    )
    said = message(lambda: make(dataset=lines, split="test"))
    assert "Bad split: test. Available splits: ['train']" in said
    assert "BuilderConfig 'de' not found" in message(lambda: make(dataset=lines, subset="de"))

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = message(lambda: make(dataset="nobody/nothing"))
    assert said.startswith('data.dataset = "nobody/nothing" (data.subset = "", data.split = "train") cannot be read: ')
    assert "`hf auth login`" in said and said.endswith("or give data.text.")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_a_stream_that_breaks_leaves_nothing(
    make: Callable[..., Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"text": text} for text in texts(100))
        raise ConnectionError("Server Disconnected")

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: stream)
    assert "cannot be read: Server Disconnected. " in message(lambda: make(dataset="someone/text"))
    assert list((tmp_path / "out").iterdir()) == []


# --- the built-in corpus ---


@pytest.mark.slow
def test_the_built_in_corpus_needs_nothing(make: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make(train=100, held_out=5, context=256)
    assert corpus.train.shape == (100, 256) and len(corpus.test) == len(corpus.validation) == 5
    assert re.fullmatch(r"Python 3\.\d+\.\d+\S* standard library", corpus.facts.source)
    monkeypatch.setattr(demo, "documents", lambda: [])
    assert "this interpreter has no .py files to read" in message(make)


def test_the_demo_directory_holds_model_and_tokenizer() -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (demo.MODEL_DIR / name).is_file()
