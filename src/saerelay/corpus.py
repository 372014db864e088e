"""Documents to token sequences on disk, so that training has an integer cursor and resumes exactly.

A document goes to train, validation or test as a whole, before packing: no sequence of one split shares a document with
another. A corpus is a directory:

    corpus.json      CorpusFacts
    train.npy        [N, context] token ids, uint16 or uint32; validation.npy and test.npy alike

What is read, and in which order, follows from the recipe and its seed alone: a longer corpus begins with the shorter.
"""

import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final, get_args

import numpy as np

from saerelay.errors import DataError, RecipeError
from saerelay.plan import ModelFacts
from saerelay.recipe import DataSpec, Run
from saerelay.spec import Spec

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

_SCHEMA = 1
_PERIOD = 20  # consecutive documents of which one is for validation and one for test
_ORDER, _HELD_OUT = 1, 2  # what a generator is for, mixed with the seed
_BATCH_DOCUMENTS, _BATCH_SIZE = 64, 1_000_000  # documents, and characters or ids, tokenised together
_CHUNK = 1 << 22  # ids of a token file or a finished split looked at together
_TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")


class CorpusFacts(Spec):
    """What a corpus holds and where it comes from: `corpus.json`."""

    schema_version: int = _SCHEMA
    source: str
    """For people: "Python 3.11.7 standard library", "dataset wikitext, split train"."""
    context: int
    prepend_bos: bool
    n_documents: int
    """Documents read; empty ones are not counted."""
    train_sequences: int
    validation_sequences: int
    test_sequences: int
    complete: bool
    """The source ended before every split had what was asked for: there is no more to have."""


@final
@dataclass(frozen=True, eq=False)
class Corpus:
    """An opened corpus: three memory-mapped arrays of token ids, [N, context] each."""

    facts: CorpusFacts
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @classmethod
    def open(cls, directory: Path) -> "Corpus":
        """Map the files of a prepared corpus; DataError if they are missing or damaged."""
        facts = _read_facts(directory)
        return cls(facts, *(_map_split(directory / f"{split}.npy", facts, split) for split in SPLITS))


def prepare(
    run: Run,
    facts: ModelFacts,
    tokenizer: "PreTrainedTokenizerBase | None",
    directory: Path,
    *,
    train_sequences: int,
    eval_sequences: int,
    progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Tokenise just enough of `run.data` into `directory`, or open what an earlier call for the same run left there.

    The train split may come out shorter than asked: `facts.complete` is true then. `tokenizer` may be None where the
    recipe gives tokens. `progress` is called with the token positions there are so far in all splits, at most
    `context * (train_sequences + 2 * eval_sequences)`. DataError if the source is missing, unfit, or leaves a split
    empty; then, or when interrupted, nothing is left in or beside `directory`.
    """
    assert train_sequences > 0 and eval_sequences > 0, (train_sequences, eval_sequences)
    if (directory / "corpus.json").exists():
        return Corpus.open(directory)
    _check_recipe(run.data, facts, tokenizer)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise DataError(f"{directory}: exists but holds no corpus.json; remove it, or choose another directory.")
    source = _open_source(run, facts)

    scratch = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed process left
    try:
        scratch.mkdir(parents=True)
        written = _write(run, facts, tokenizer, source, scratch, (train_sequences, eval_sequences), progress)
        (scratch / "corpus.json").write_text(written.to_json(), encoding="utf-8")
        if directory.exists():
            directory.rmdir()
        scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Corpus.open(directory)


def split_of(index: int, seed: int) -> Split:
    """Which split the `index`-th document in reading order belongs to: of every 20, one is test and one validation.

    >>> from collections import Counter
    >>> sorted(Counter(split_of(i, seed=0) for i in range(2000)).items())
    [('test', 100), ('train', 1800), ('validation', 100)]
    """
    block, position = divmod(index, _PERIOD)
    validation, test = _held_out(block, seed)
    return "validation" if position == validation else "test" if position == test else "train"


@lru_cache(maxsize=4)
def _held_out(block: int, seed: int) -> tuple[int, int]:
    first, second = np.random.default_rng([seed, _HELD_OUT, block]).permutation(_PERIOD)[:2]
    return int(first), int(second)


def _shuffled(n: int, seed: int) -> np.ndarray:
    """The order in which `n` documents at hand are visited."""
    return np.random.default_rng([seed, _ORDER]).permutation(n)


# --- opening ---


def _read_facts(directory: Path) -> CorpusFacts:
    path = directory / "corpus.json"
    if not path.exists():
        raise DataError(f"{directory}: no corpus here (corpus.json is missing).")
    try:
        facts = CorpusFacts.from_json(path)
    except RecipeError as error:
        raise DataError(f"{error}\nRemove {directory}; it is made anew from the recipe.") from None
    if facts.schema_version != _SCHEMA:
        raise DataError(
            f"{path}: schema_version is {facts.schema_version}, this version of saerelay reads {_SCHEMA}. "
            f"Remove {directory}; it is made anew from the recipe."
        )
    return facts


def _map_split(path: Path, facts: CorpusFacts, split: Split) -> np.ndarray:
    expected = (getattr(facts, f"{split}_sequences"), facts.context)
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        found = f"an array {array.shape}"
    except (OSError, ValueError) as error:
        array, found = None, str(error)
    if array is None or array.shape != expected:
        raise DataError(
            f"{path}: damaged; expected an array {expected}, found {found}. "
            f"Remove {path.parent}; it is made anew from the recipe."
        )
    return array


# --- packing ---


@dataclass(frozen=True)
class _Source:
    """Documents in reading order, and where they come from."""

    description: str
    documents: Iterator[str] | Iterator[np.ndarray]


def _write(
    run: Run,
    facts: ModelFacts,
    tokenizer: "PreTrainedTokenizerBase | None",
    source: _Source,
    directory: Path,
    wanted: tuple[int, int],
    progress: Callable[[int], None] | None,
) -> CorpusFacts:
    """Deal documents to the splits until each has what is wanted (of train and of the others), or the source ends."""
    packers: dict[Split, _Packer] = {
        split: _Packer(directory / f"{split}.npy", run.data, facts, wanted[split != "train"]) for split in SPLITS
    }
    n_documents, complete = 0, True
    for batch in _batches(source.documents):
        dealt = [(packers[split_of(index, run.train.seed)], text) for index, text in enumerate(batch, n_documents)]
        dealt = [(packer, text) for packer, text in dealt if not packer.full]
        n_documents += len(batch)
        for (packer, _), ids in zip(dealt, _encode([text for _, text in dealt], tokenizer, facts), strict=True):
            packer.add(ids)
        if progress:
            progress(run.data.context * sum(packer.n_sequences for packer in packers.values()))
        if all(packer.full for packer in packers.values()):
            complete = False
            break
    _check_splits(packers, source.description, n_documents)
    for packer in packers.values():
        packer.finish()
    return CorpusFacts(
        source=source.description,
        context=run.data.context,
        prepend_bos=run.data.prepend_bos,
        n_documents=n_documents,
        train_sequences=packers["train"].n_sequences,
        validation_sequences=packers["validation"].n_sequences,
        test_sequences=packers["test"].n_sequences,
        complete=complete,
    )


def _batches(documents: Iterator[Any]) -> Iterator[list[Any]]:
    """Group documents so that a batch is neither long nor large; empty documents are dropped."""
    batch, size = [], 0
    for document in documents:
        if not (document.strip() if isinstance(document, str) else len(document)):
            continue
        batch.append(document)
        size += len(document)
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(
    batch: Sequence[Any], tokenizer: "PreTrainedTokenizerBase | None", facts: ModelFacts
) -> Sequence[np.ndarray]:
    """The ids of a batch of documents, which may be ids (checked) already."""
    if not batch or not isinstance(batch[0], str):
        return batch
    assert tokenizer is not None
    encoded = tokenizer(list(batch), add_special_tokens=False, return_attention_mask=False, verbose=False)
    arrays = [np.asarray(ids, dtype=np.int64) for ids in encoded["input_ids"]]
    _check_ids(max(int(ids.max(initial=0)) for ids in arrays), facts, "the tokenizer")
    return arrays


@final
class _Packer:
    """Joins the documents of one split with EOS and cuts them into sequences, by way of a raw file of ids."""

    def __init__(self, path: Path, data: DataSpec, facts: ModelFacts, wanted: int) -> None:
        self.path = path
        self.wanted = wanted
        self.context = data.context
        self.bos = facts.bos_token_id if data.prepend_bos else None
        self.n_body = data.context - data.prepend_bos  # ids of documents in one sequence
        self.dtype = np.dtype("<u2" if facts.vocab_size <= 1 << 16 else "<u4")
        self.separator = np.array([] if facts.eos_token_id is None else [facts.eos_token_id], self.dtype)
        self.raw = path.with_suffix(".raw")
        self.raw.touch()
        self.n_ids = 0

    @property
    def n_sequences(self) -> int:
        return min(self.n_ids // self.n_body, self.wanted)

    @property
    def full(self) -> bool:
        return self.n_sequences == self.wanted

    def add(self, ids: np.ndarray) -> None:
        """Append a document."""
        if not ids.size:
            return
        pieces = [self.separator, ids.astype(self.dtype)] if self.n_ids else [ids.astype(self.dtype)]
        with self.raw.open("ab") as file:
            for piece in pieces:
                file.write(piece.tobytes())
                self.n_ids += piece.size

    def finish(self) -> None:
        """Write the sequences as .npy and remove the raw file."""
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.n_sequences, self.context)}
        step = max(1, _CHUNK // self.context)
        with self.raw.open("rb") as raw, self.path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, self.n_sequences, step):
                rows = np.empty((min(step, self.n_sequences - start), self.context), self.dtype)
                body = raw.read(len(rows) * self.n_body * self.dtype.itemsize)
                rows[:, self.context - self.n_body :] = np.frombuffer(body, self.dtype).reshape(-1, self.n_body)
                if self.bos is not None:
                    rows[:, 0] = self.bos
                file.write(rows.tobytes())
        self.raw.unlink()


def _check_recipe(data: DataSpec, facts: ModelFacts, tokenizer: object) -> None:
    """What can be known before anything is read."""
    if data.prepend_bos and facts.bos_token_id is None:
        raise DataError(
            f"data.prepend_bos is true, but the model {facts.name} has no BOS token; set data.prepend_bos = false."
        )
    if tokenizer is None and not data.tokens:
        raise DataError(
            f"the model {facts.name} comes without a tokenizer, so that text cannot be read; "
            "tokenise it yourself and give data.tokens (a .npy file of token ids)."
        )


def _check_ids(largest: int, facts: ModelFacts, where: str) -> None:
    if largest >= facts.vocab_size:
        raise DataError(
            f"{where} gives the token id {largest}, but the model {facts.name} has a vocabulary of {facts.vocab_size} "
            f"(ids up to {facts.vocab_size - 1}). Tokenise with the tokenizer that belongs to this model."
        )


def _check_splits(packers: "dict[Split, _Packer]", description: str, n_documents: int) -> None:
    """Each split must have got a sequence."""
    if not n_documents:
        raise DataError(f"{description}: no documents in it (empty ones are skipped). Give a source with text.")
    empty = [split for split, packer in packers.items() if not packer.n_sequences]
    if empty:
        n_tokens = sum(packer.n_ids for packer in packers.values())
        raise DataError(
            f"{description}: too little for the {' and the '.join(empty)} split, which got no sequence. It holds "
            f"{n_documents} documents with {n_tokens} tokens; a sequence needs {packers['train'].n_body} tokens, and "
            f"of {_PERIOD} documents one goes to validation, one to test. Give more documents, or lower data.context."
        )


# --- sources ---


def _open_source(run: Run, facts: ModelFacts) -> _Source:
    data, seed = run.data, run.train.seed
    if data.dataset:
        return _dataset_source(data, seed)
    if data.text:
        return _text_source(data, seed)
    if data.tokens:
        return _token_source(data, facts, seed)
    if run.model.name == "demo":
        return _demo_source(seed)
    raise DataError(
        f'no data given for the model "{run.model.name}": set data.dataset, data.text or data.tokens '
        '(only model.name = "demo" has a built-in corpus).'
    )


def _demo_source(seed: int) -> _Source:
    from saerelay import demo  # it reads a thousand files, at use only

    texts = demo.documents()
    if not texts:
        raise DataError(
            f"{demo.source()}: this interpreter has no .py files to read (it may be zipped). "
            "Set data.text to a directory of text files, or use another Python."
        )
    return _Source(demo.source(), (texts[i] for i in _shuffled(len(texts), seed)))


# Text files: a document is a stretch of bytes of a file, so that a large file is never held in memory.

_MIN_FILES = 40  # with fewer, large files are cut
_MIN_PIECE = 2000  # bytes
_CUTS = tuple(re.compile(pattern) for pattern in (rb"\n[ \t\r]*\n", rb"\n", rb" "))


def _text_source(data: DataSpec, seed: int) -> _Source:
    paths = _text_files(data.text)
    total = sum(path.stat().st_size for path in paths)
    cut_at = max(_MIN_PIECE, total // 200) if len(paths) < _MIN_FILES else total
    spans = np.concatenate([_file_spans(path, number, cut_at) for number, path in enumerate(paths)])
    description = f"text in {', '.join(data.text)} (files: {len(paths)})"
    return _Source(description, (_read_span(paths, span, data.column) for span in spans[_shuffled(len(spans), seed)]))


def _text_files(names: list[str]) -> list[Path]:
    """The files named, and those in the directories named, each once."""
    found: dict[Path, Path] = {}
    for name in names:
        path = Path(name).expanduser()
        if not path.exists():
            raise DataError(f'data.text: no such file or directory: "{name}" (relative paths start in {Path.cwd()}).')
        inside = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in _TEXT_SUFFIXES)
        inside = [p for p in inside if p.is_file()]
        if not inside:
            raise DataError(f'data.text: "{name}" holds no {", ".join(_TEXT_SUFFIXES)} files; name other files singly.')
        for p in inside:
            found.setdefault(p.resolve(), p)
    return list(found.values())


def _file_spans(path: Path, number: int, cut_at: int) -> np.ndarray:
    """[N, 3]: the file's number, and where each of its documents starts and stops."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if path.suffix == ".jsonl":
                stops = np.fromiter(itertools.accumulate(len(line) for line in file), np.int64)
            elif size > cut_at:
                with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
                    stops = np.array([*_cuts(content, cut_at), size], np.int64)
            else:
                stops = np.array([size], np.int64)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions.") from None
    starts = np.concatenate([[0], stops])[: len(stops)]
    return np.stack([np.full(len(stops), number), starts, stops], axis=1).astype(np.int64)


def _cuts(content: mmap, size: int) -> Iterator[int]:
    """Where to cut into stretches of about `size`: after a blank line, else a line end, else a space, else anywhere."""
    start = 0
    while len(content) - start > size:
        nearest = (cut.search(content, start + size, start + 2 * size) for cut in _CUTS)
        match = next((match for match in nearest if match), None)
        start += size
        if match:
            start = match.end()
        while start < len(content) and content[start] & 0xC0 == 0x80:  # inside a UTF-8 character
            start += 1
        if start < len(content):
            yield start


def _read_span(paths: list[Path], span: np.ndarray, column: str) -> str:
    path, start, stop = paths[span[0]], int(span[1]), int(span[2])
    with path.open("rb") as file:
        file.seek(start)
        content = file.read(stop - start)
    if path.suffix == ".jsonl":
        return _json_text(path, start, content, column)
    return content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n")


def _json_text(path: Path, start: int, line: bytes, column: str) -> str:
    if not line.strip():
        return ""
    try:
        row = json.loads(line.decode("utf-8-sig", errors="replace"))
    except ValueError as error:
        found = f"not valid JSON ({error})"
    else:
        if isinstance(row, dict) and isinstance(row.get(column, 0), str | None):
            return row[column] or ""
        keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        found = f'no text under "{column}"; found {keys}. Name the right one in data.column'
    with path.open("rb") as file:
        number = file.read(start).count(b"\n") + 1
    raise DataError(f"{path}, line {number}: {found}. A .jsonl file has one JSON object with text in each line.")


# Token files: a document is a row, or a stretch of a 1-D array.

_STRETCH = 64  # contexts in a stretch of an array without separators
_MIN_STRETCHES = 20  # and fewest separators that count as such


def _token_source(data: DataSpec, facts: ModelFacts, seed: int) -> _Source:
    tokens = _open_tokens(Path(data.tokens).expanduser(), facts)
    if tokens.ndim == 2:
        rows = (tokens[i] for i in _shuffled(len(tokens), seed))
    else:
        spans = _token_spans(tokens, data.context, facts)
        rows = (tokens[start:stop] for start, stop in spans[_shuffled(len(spans), seed)])
    return _Source(f"tokens in {data.tokens}", (_without_bos(row, facts.bos_token_id) for row in rows))


def _open_tokens(path: Path, facts: ModelFacts) -> np.ndarray:
    """Map a token file and check every id in it."""
    dtype = "uint16" if facts.vocab_size <= 1 << 16 else "uint32"
    convert = f'np.save("tokens.npy", array.astype(np.{dtype}))'
    if not path.is_file():
        raise DataError(f'data.tokens: no such file: "{path}" (relative paths start in {Path.cwd()}).')
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not a .npy file of token ids ({error}). Write one with {convert}; "
            'a raw file of ids is read with array = np.fromfile("tokens.bin", dtype=...).'
        ) from None
    if tokens.dtype not in (np.uint16, np.uint32):
        raise DataError(f"{path}: expected uint16 or uint32, found {tokens.dtype}. Convert it with {convert}.")
    if tokens.ndim not in (1, 2) or not tokens.size:
        raise DataError(f"{path}: expected a 1-D or 2-D array of token ids, found the shape {tokens.shape}.")
    _check_ids(max(int(chunk.max()) for _, chunk in _chunks(tokens)), facts, str(path))
    return tokens


def _chunks(tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    step = max(1, _CHUNK // (tokens.size // len(tokens)))
    for start in range(0, len(tokens), step):
        yield start, tokens[start : start + step]


def _token_spans(tokens: np.ndarray, context: int, facts: ModelFacts) -> np.ndarray:
    """[N, 2]: where the documents of a 1-D array start and stop."""
    for separator in (facts.eos_token_id, facts.bos_token_id):
        if separator is None:
            continue
        at = np.concatenate([start + np.flatnonzero(chunk == separator) for start, chunk in _chunks(tokens)])
        if at.size >= _MIN_STRETCHES:
            spans = np.stack([np.append(0, at + 1), np.append(at, len(tokens))], axis=1)
            return spans[spans[:, 0] < spans[:, 1]]
    length = max(1, min(_STRETCH * context, len(tokens) // _MIN_STRETCHES))
    starts = np.arange(0, len(tokens), length)
    return np.stack([starts, np.minimum(starts + length, len(tokens))], axis=1)


def _without_bos(ids: np.ndarray, bos: int | None) -> np.ndarray:
    """The packer puts BOS where it belongs."""
    return ids[1:] if bos is not None and len(ids) and ids[0] == bos else ids


# Hugging Face datasets


def _dataset_source(data: DataSpec, seed: int) -> _Source:
    import datasets  # takes a second

    dataset = _open_dataset(data)
    described = [f"dataset {data.dataset}", data.subset and f"subset {data.subset}", f"split {data.split}"]
    described.append(data.revision and f"revision {data.revision}")
    if isinstance(dataset, datasets.Dataset):
        dataset = dataset.select_columns([data.column]).select(_shuffled(len(dataset), seed))
    return _Source(", ".join(filter(None, described)), _dataset_texts(dataset, data))


def _open_dataset(data: DataSpec) -> "Dataset | IterableDataset":
    """A dataset with (at least) the column asked for."""
    import datasets
    from datasets.exceptions import DatasetsError

    path = Path(data.dataset).expanduser()
    local = path.is_dir()
    try:
        if local and any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
            opened = datasets.load_from_disk(str(path))
        else:
            opened = datasets.load_dataset(
                str(path) if local else data.dataset,
                name=data.subset or None,
                split=data.split,
                revision=data.revision or None,
                streaming=True,
            )
        if isinstance(opened, datasets.DatasetDict):
            if data.split not in opened:
                splits = ", ".join(map(str, opened))
                raise DataError(
                    f'data.dataset = "{data.dataset}" has no split "{data.split}"; set data.split to one of: {splits}.'
                )
            opened = opened[data.split]
        assert isinstance(opened, datasets.Dataset | datasets.IterableDataset), type(opened)
        columns = opened.column_names or list(next(iter(opened), {}))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(_dataset_message(data, error)) from None
    if columns and data.column not in columns:
        raise DataError(
            f'data.dataset = "{data.dataset}" has no column "{data.column}"; '
            f"set data.column to the one with the text, of: {', '.join(columns)}."
        )
    return opened if isinstance(opened, datasets.Dataset) or not columns else opened.select_columns([data.column])


def _dataset_texts(rows: Iterable[Any], data: DataSpec) -> Iterator[str]:
    from datasets.exceptions import DatasetsError

    try:
        for row in rows:
            text = row[data.column]
            if text is not None and not isinstance(text, str):
                raise DataError(
                    f'data.dataset = "{data.dataset}": the column "{data.column}" holds {type(text).__name__}, '
                    "expected text. Set data.column to a column of text, or save ids as .npy and give data.tokens."
                )
            yield text or ""
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(_dataset_message(data, error)) from None


def _dataset_message(data: DataSpec, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f'data.dataset = "{data.dataset}" (data.subset = "{data.subset}", data.split = "{data.split}") cannot be read: '
        f"{reason}. It must be a local directory or a dataset on the hub: check the spelling and the network, log in "
        "with `hf auth login` if access is restricted, or give data.text."
    )
