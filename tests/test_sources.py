"""Documents of every source: what counts as one, in which order they are read, and what is refused."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from corpora import (
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

from saerelay import demo
from saerelay.data.corpus import prepare
from saerelay.data.sources import open_source
from saerelay.errors import DataError
from saerelay.planning.recipe import DataSpec, Recipe
from saerelay.workflows.settle import check_data


def test_directories_are_searched_and_each_file_is_read_once(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    root = tmp_path / "project"
    for i, text in enumerate(texts(60)):
        path = root / f"d{i % 3}" / f"{i}{['.txt', '.md', '.py'][i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    write_jsonl(root / "more.jsonl", texts(80)[60:], key="body")
    (root / "skipped.bin").write_bytes(b"\0")
    (root / "link.txt").symlink_to(root / "d0" / "0.txt")
    corpus = make_corpus(text=[str(root), str(root / "d0"), str(root / "d0" / "0.txt")], column="body")
    assert corpus.facts.n_documents == 80
    assert corpus.facts.source == f"text in {root}, {root}/d0, {root}/d0/0.txt (files: 61)"


def test_paths_start_in_the_working_directory_or_at_home(
    make_corpus: MakeCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "home" / "a.jsonl", texts(40))
    monkeypatch.setenv("HOME", str(path.parent))
    monkeypatch.chdir(path.parent)
    assert (
        contents(make_corpus(text=["~/a.jsonl"]))
        == contents(make_corpus(text=["a.jsonl"]))
        == contents(make_corpus(text=[str(path)]))
    )


def documents_in(path: Path) -> list[str]:
    """The documents of the text at a path, as they are read."""
    source = open_source(Recipe(data=DataSpec(text=[str(path)])), FACTS)
    return [document for document in source.documents if isinstance(document, str)]


@pytest.mark.parametrize("separator", ["\n\n", "\r\n \r\n", "\n", " ", "", "語" * 5])
def test_a_big_file_is_cut_into_documents_without_loss(tmp_path: Path, separator: str) -> None:
    end = " " if "\n" in separator else "-"
    text = separator.join(f"m{i}x{end}" * 5 for i in range(4000))
    (tmp_path / "big.txt").write_bytes(text.encode())
    documents = documents_in(tmp_path / "big.txt")
    assert 40 <= len(documents) <= 100  # of 2000 bytes or a little more each
    clean = text.replace("\r\n", "\n")
    for document in documents:
        assert document in clean and len(document.encode()) <= 2 * 2000
        if separator.isspace():
            assert document.endswith(separator.replace("\r\n", "\n")) or clean.endswith(document)
    assert "".join(sorted(documents, key=clean.index)) == clean


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_many_files_stay_whole_and_a_byte_order_mark_is_honoured(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "files").mkdir()
    for i in range(40):
        (tmp_path / "files" / f"{i}.txt").write_text("wörd\n\n" * 900, encoding=encoding)
    assert documents_in(tmp_path / "files") == ["wörd\n\n" * 900] * 40


@pytest.mark.parametrize(
    "content, told",
    [
        ("a café".encode()[:-1], r"notes.txt: ends in the middle of a character \(byte \d+\)"),
        ("wörd\n".encode("latin-1") * 900, r"notes.txt: not utf-8 text: byte 0xf6 at \d+\. Convert it"),
        ("word\n".encode("utf-16-le") * 900, "notes.txt: contains zero bytes, so it is either not text or UTF-16"),
        ("word\n".encode("utf-16") * 9000, "notes.txt: is utf-16 text, which cannot be cut into documents"),
    ],
)
def test_bytes_that_are_not_text_are_refused_with_the_file_named(
    make_corpus: MakeCorpus, tmp_path: Path, content: bytes, told: str
) -> None:
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(DataError, match=told):
        make_corpus(text=[str(tmp_path / "notes.txt")])


def test_half_a_surrogate_pair_becomes_a_question_mark(
    make_corpus: MakeCorpus, tmp_path: Path, demo_tokenizer: Any
) -> None:
    lines = [json.dumps({"text": "a word \ud83d " * 90}) + "\n" for _ in range(40)]
    (tmp_path / "notes.jsonl").write_text("".join(lines))
    corpus = make_corpus(text=[str(tmp_path / "notes.jsonl")], context=16)
    assert "a word ? a word" in demo_tokenizer.decode(corpus.train[0])


def test_text_that_spells_a_special_token_stays_text(
    make_corpus: MakeCorpus, tmp_path: Path, demo_tokenizer: Any
) -> None:
    (tmp_path / "files").mkdir()
    for i in range(40):
        (tmp_path / "files" / f"{i}.txt").write_text("a token <|endoftext|> ends it " * 90)
    corpus = make_corpus(text=[str(tmp_path / "files")], context=16)
    (note,) = corpus.facts.notes()
    assert corpus.facts.special_tokens == 0 and "from 36 documents only" in note
    inside = corpus.train[:, 1:]
    assert (inside == demo_tokenizer.eos_token_id).sum() <= corpus.facts.n_documents
    assert "<|endoftext|>" in demo_tokenizer.decode(inside.ravel())


def test_text_that_cannot_be_read_is_refused_with_file_and_remedy(
    make_corpus: MakeCorpus, tmp_path: Path, demo_tokenizer: Any
) -> None:
    said = message(lambda: make_corpus(text=["nowhere.txt"]))
    assert said == f'data.text: no such file or directory: "nowhere.txt" (relative paths start in {Path.cwd()}).'
    (tmp_path / "bare").mkdir()
    said = message(lambda: make_corpus(text=[str(tmp_path / "bare")]))
    assert (
        said
        == f'data.text: "{tmp_path}/bare" holds no .txt, .md, .py, .jsonl files; name files of other kinds one by one.'
    )
    assert (
        message(lambda: check_data(Recipe(data=DataSpec(text=[str(tmp_path / "bare")])))) == said
    )  # before a run, too
    path = write_jsonl(tmp_path / "a.jsonl", texts(30), key="body")
    said = message(lambda: make_corpus(text=[str(path)]))
    assert f"{path}, line " in said and 'no text under "text"; found id, body. Set data.column to the right key' in said
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts(30)) + "\n\n{oops\n")
    assert f"{path}, line 32: not valid JSON (" in message(lambda: make_corpus(text=[str(path)]))
    (tmp_path / "empty.txt").touch()
    said = message(lambda: make_corpus(text=[str(tmp_path / "empty.txt")]))
    assert "contains no documents (empty ones are skipped). Give a source with text." in said
    (tmp_path / "small.txt").write_text("a few words " * 20)
    said = message(lambda: make_corpus(text=[str(tmp_path / "small.txt")]))
    assert re.search(
        r"too little text for the .* split, which got no sequence. Documents: 1, of which \d+ tokens were read; ", said
    )
    assert said.endswith("or lower data.context.")
    assert list((tmp_path / "out").iterdir()) == []
    run = Recipe(data=DataSpec(text=[str(path)]))
    said = message(lambda: prepare(run, FACTS, None, tmp_path / "x", train_sequences=1, eval_sequences=1))
    assert "comes without a tokenizer" in said and "data.tokens" in said


def test_rows_one_array_with_separators_and_wider_ids_are_the_same_corpus(
    make_corpus: MakeCorpus, tmp_path: Path
) -> None:
    rows = np.random.default_rng(0).integers(3, 4096, (60, 30))
    with_bos = np.insert(rows, 0, BOS, axis=1)
    reference = make_corpus(tokens=save_tokens(tmp_path / "rows.npy", rows))
    assert reference.facts.n_documents == 60
    flat_eos = np.append(rows, np.full((60, 1), EOS), axis=1).ravel()
    no_eos = FACTS.changed(eos_token_id=None)
    for name, array, dtype in [
        ("wide", rows, np.uint32),
        ("bos", with_bos, np.uint16),
        ("closed", flat_eos.reshape(60, 31), np.uint16),
        ("opened", np.insert(rows, 0, EOS, axis=1), np.uint16),
        ("eos", flat_eos, np.uint16),
        ("both", np.insert(flat_eos.reshape(60, 31), 0, BOS, axis=1).ravel(), np.uint16),
        ("start", with_bos.ravel(), np.uint16),
        ("fortran", np.asfortranarray(rows), np.uint16),
    ]:
        assert contents(make_corpus(tokens=save_tokens(tmp_path / f"{name}.npy", array, dtype))) == contents(
            reference
        ), name
    joined = make_corpus(tokens=save_tokens(tmp_path / "plain.npy", rows), facts=no_eos)
    assert EOS not in joined.train and joined.train.size < reference.train.size


def test_only_one_bos_is_taken_from_a_row(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    rows = [[BOS, BOS, 7, 8]] * 200
    corpus = make_corpus(tokens=save_tokens(tmp_path / "a.npy", rows))
    assert documents_of(corpus.train)[0] == [BOS, 7, 8]


@pytest.mark.parametrize(("n", "length"), [(100_000, 64 * 16), (4000, 200)])
def test_an_array_without_separators_is_cut_into_stretches(
    make_corpus: MakeCorpus, tmp_path: Path, n: int, length: int
) -> None:
    array = 3 + np.arange(n) % 4000
    array[10:29] = EOS  # too few to be separators
    corpus = make_corpus(tokens=save_tokens(tmp_path / "a.npy", array))
    assert corpus.facts.n_documents == -(-n // length) >= 20


def test_ids_are_wide_where_the_vocabulary_is(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    for vocab_size, dtype in [(65536, np.uint16), (65537, np.uint32)]:
        facts = FACTS.changed(vocab_size=vocab_size)
        rows = np.tile([5, vocab_size - 1], (40, 8))
        corpus = make_corpus(tokens=save_tokens(tmp_path / f"{vocab_size}.npy", rows, np.uint32), facts=facts)
        assert corpus.train.dtype == dtype and corpus.train.max() == vocab_size - 1


def test_tokens_need_no_tokenizer(tmp_path: Path) -> None:
    run = Recipe(data=DataSpec(tokens=save_tokens(tmp_path / "a.npy", np.tile([5, 9], (40, 8))), context=16))
    corpus = prepare(run, FACTS, None, tmp_path / "c", train_sequences=3, eval_sequences=1)
    assert corpus.facts.source == f"tokens in {tmp_path}/a.npy" and len(corpus.train) == 3


def test_token_files_that_do_not_fit_are_refused(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"

    def said(array: Any, dtype: Any = np.uint16) -> str:
        return message(lambda: make_corpus(tokens=save_tokens(path, array, dtype)))

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
    assert f"{path}: not a .npy file of token ids (" in message(lambda: make_corpus(tokens=str(path)))
    for content in (b"", b"\x05\0" * 1000):
        path.write_bytes(content)
        assert f"{path}: not a .npy file of token ids (" in message(lambda: make_corpus(tokens=str(path)))
    path.unlink()
    assert f'data.tokens: no such file: "{path}"' in message(lambda: make_corpus(tokens=str(path)))
    assert not (tmp_path / "out").exists()


def test_a_saved_dataset_is_shuffled_and_a_streamed_one_is_not(
    make_corpus: MakeCorpus, tmp_path: Path, demo_tokenizer: Any
) -> None:
    saved = datasets.Dataset.from_dict({"body": texts(60), "n": list(range(60))})
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"check": saved.select(range(30)), "learn": saved}).save_to_disk(tmp_path / "dict")
    (tmp_path / "parquet").mkdir()
    saved.to_parquet(tmp_path / "parquet" / "train.parquet")
    one = make_corpus(dataset=str(tmp_path / "one"), column="body")
    assert one.facts.n_documents == 60
    assert contents(one) == contents(make_corpus(dataset=str(tmp_path / "dict"), column="body", split="learn"))
    assert contents(one) != contents(make_corpus(dataset=str(tmp_path / "one"), column="body", seed=1))
    streamed = make_corpus(dataset=str(tmp_path / "parquet"), column="body")
    assert streamed.facts.source == f"dataset {tmp_path}/parquet, split train"
    orders = [
        [int(m) for m in dict.fromkeys(re.findall(r"m(\d+)x", demo_tokenizer.decode(ids_of(c.train))))]
        for c in (one, streamed)
    ]
    assert orders[0] != sorted(orders[0]) and orders[1] == sorted(orders[1])


def test_no_more_is_read_of_a_stream_than_needed(make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    read, asked = [], []

    def rows() -> Iterator[dict[str, Any]]:
        for i in itertools.count():
            read.append(i)
            yield {"text": f"m{i}x " * 40, "n": i}

    def load_dataset(path: str, **options: Any) -> datasets.IterableDataset:
        asked.append((path, options))
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = make_corpus(dataset="someone/text", subset="en", revision="abc", train=40, held_out=2)
    options = {"name": "en", "split": "train", "revision": "abc", "streaming": True}
    assert asked == [("someone/text", options)]
    assert corpus.facts.source == "dataset someone/text, subset en, split train, revision abc"
    assert len(corpus.train) == 40 and not corpus.facts.complete
    assert corpus.facts.n_documents == 64 and max(read) <= 64  # one batch, of an endless stream


def test_datasets_without_what_was_asked_for_are_refused(
    make_corpus: MakeCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = datasets.Dataset.from_dict({"body": texts(30), "ids": [[1, 2]] * 30})
    datasets.DatasetDict({"learn": saved, "check": saved}).save_to_disk(tmp_path / "dict")
    name = str(tmp_path / "dict")
    said = message(lambda: make_corpus(dataset=name))
    assert said == f'data.dataset = "{name}" has no split "train"; set data.split to one of: learn, check.'
    said = message(lambda: make_corpus(dataset=name, split="learn"))
    expected = (
        f'data.dataset = "{name}" has no column "text"; set data.column to the one with the text, one of: body, ids.'
    )
    assert said == expected
    said = message(lambda: make_corpus(dataset=name, split="learn", column="ids"))
    assert f'data.dataset = "{name}": the column "ids" holds list, expected text.' in said and "data.tokens" in said

    write_jsonl(tmp_path / "lines" / "a.jsonl", texts(30), key="body")
    lines = str(tmp_path / "lines")
    assert 'no column "text"; set data.column to the one with the text, one of: id, body.' in message(
        lambda: make_corpus(dataset=lines)
    )
    said = message(lambda: make_corpus(dataset=lines, split="test"))
    assert "Bad split: test. Available splits: ['train']" in said
    assert "BuilderConfig 'de' not found" in message(lambda: make_corpus(dataset=lines, subset="de"))

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = message(lambda: make_corpus(dataset="nobody/nothing"))
    assert said.startswith('data.dataset = "nobody/nothing" (data.subset = "", data.split = "train") cannot be read: ')
    assert "`hf auth login`" in said and said.endswith("or give data.text instead.")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_a_stream_that_breaks_leaves_nothing(
    make_corpus: MakeCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"text": text} for text in texts(100))
        raise ConnectionError("Server Disconnected")

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: stream)
    assert "cannot be read: Server Disconnected. " in message(lambda: make_corpus(dataset="someone/text"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_the_built_in_corpus_needs_nothing(make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(train=100, held_out=5, context=256)
    assert corpus.train.shape == (100, 256) and len(corpus.test) == len(corpus.validation) == 5
    assert re.fullmatch(r"Python 3\.\d+\.\d+\S* standard library", corpus.facts.source)
    monkeypatch.setattr(demo, "documents", list)
    assert "this interpreter has no .py files to read" in message(make_corpus)


def test_the_demo_directory_holds_model_and_tokenizer() -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (demo.MODEL_DIR / name).is_file()


@pytest.mark.parametrize("pad", [5, 1, None])
def test_padding_in_a_token_file_is_left_out_and_counted(
    make_corpus: MakeCorpus, tmp_path: Path, pad: int | None
) -> None:
    """Wherever the model has a token for it, at both ends; without one, what fills the end of most of a row."""
    rows = np.full((80, 20), 5 if pad is None else pad)  # the last 20 rows are nothing but padding
    rows[:60, 4:9] = np.random.default_rng(0).integers(10, 100, (60, 5))
    if pad is None:
        rows[:60, :4] = 9
    facts = FACTS.changed(pad_token_id=pad, eos_token_id=1, bos_token_id=0)
    corpus = make_corpus(tokens=save_tokens(tmp_path / "a.npy", rows), facts=facts, prepend_bos=False, context=4)
    token = 5 if pad is None else pad
    inside = corpus.train[corpus.train != 1]
    assert token == 1 or not (inside == token).any()
    assert corpus.facts.n_documents == 60
    assert corpus.facts.padding == {token: 60 * (11 if pad is None else 15) + 20 * 20}
    assert f"padding tokens (id {token})" in corpus.facts.notes()[0]


def test_text_without_padding_stays_as_it_is(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(10, 100, (60, 16))
    corpus = make_corpus(tokens=save_tokens(tmp_path / "a.npy", rows), facts=FACTS.changed(pad_token_id=5))
    assert corpus.facts.padding == {} and corpus.facts.notes() == []
