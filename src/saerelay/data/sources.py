"""Where documents come from: text files, token files, Hugging Face datasets, or the built-in corpus.

Each source gives documents, as text or as arrays of token ids, in an order that follows from the seed (streams keep
their own).
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saerelay.errors import DataError
from saerelay.planning.facts import ModelFacts
from saerelay.planning.recipe import DataSpec, Recipe

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_ORDER = 1  # what a generator is for, mixed with the seed
_CHUNK = 1 << 22  # ids of a token file looked at together
_TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")


@dataclass(frozen=True)
class Source:
    """Documents in reading order, and where they come from."""

    description: str
    documents: Iterator[str] | Iterator[np.ndarray]


def _shuffled(n: int, seed: int) -> np.ndarray:
    """The order in which `n` documents at hand are visited."""
    return np.random.default_rng([seed, _ORDER]).permutation(n)


# --- opening ---


def check_ids(largest: int, facts: ModelFacts, where: str) -> None:
    if largest >= facts.tokens.vocab_size:
        raise DataError(
            f"{where} gives the token id {largest}, but the model {facts.name} has a vocabulary of {facts.tokens.vocab_size} "
            f"(ids up to {facts.tokens.vocab_size - 1}). Tokenise with the tokenizer that belongs to this model."
        )


def open_source(run: Recipe, facts: ModelFacts) -> Source:
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


def _demo_source(seed: int) -> Source:
    from saerelay import demo  # it reads a thousand files, at use only

    texts = demo.documents()
    if not texts:
        raise DataError(
            f"{demo.source()}: this interpreter has no .py files to read (it may be zipped). "
            "Set data.text to a directory of text files, or use another Python."
        )
    return Source(demo.source(), (texts[i] for i in _shuffled(len(texts), seed)))


# Text files: a document is a stretch of bytes of a file, so that a large file is never held in memory.

_MIN_FILES = 40  # with fewer, large files are cut
_MIN_PIECE = 2000  # bytes
_CUTS = tuple(re.compile(pattern) for pattern in (rb"\n[ \t\r]*\n", rb"\n", rb" "))


def _text_source(data: DataSpec, seed: int) -> Source:
    paths = _text_files(data.text)
    total = sum(path.stat().st_size for path in paths)
    cut_at = max(_MIN_PIECE, total // 200) if len(paths) < _MIN_FILES else total
    spans = np.concatenate([_file_spans(path, number, cut_at) for number, path in enumerate(paths)])
    description = f"text in {', '.join(data.text)} (files: {len(paths)})"
    return Source(description, (_read_span(paths, span, data.column) for span in spans[_shuffled(len(spans), seed)]))


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


def _token_source(data: DataSpec, facts: ModelFacts, seed: int) -> Source:
    tokens = _open_tokens(Path(data.tokens).expanduser(), facts)
    if tokens.ndim == 2:
        rows = (tokens[i] for i in _shuffled(len(tokens), seed))
    else:
        spans = _token_spans(tokens, data.context, facts)
        rows = (tokens[start:stop] for start, stop in spans[_shuffled(len(spans), seed)])
    return Source(f"tokens in {data.tokens}", (_without_bos(row, facts.tokens.bos_token_id) for row in rows))


def _open_tokens(path: Path, facts: ModelFacts) -> np.ndarray:
    """Map a token file and check every id in it."""
    dtype = "uint16" if facts.tokens.vocab_size <= 1 << 16 else "uint32"
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
    check_ids(max(int(chunk.max()) for _, chunk in _chunks(tokens)), facts, str(path))
    return tokens


def _chunks(tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    step = max(1, _CHUNK // (tokens.size // len(tokens)))
    for start in range(0, len(tokens), step):
        yield start, tokens[start : start + step]


def _token_spans(tokens: np.ndarray, context: int, facts: ModelFacts) -> np.ndarray:
    """[N, 2]: where the documents of a 1-D array start and stop."""
    for separator in (facts.tokens.eos_token_id, facts.tokens.bos_token_id):
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


def _dataset_source(data: DataSpec, seed: int) -> Source:
    import datasets  # takes a second

    dataset = _open_dataset(data)
    described = [f"dataset {data.dataset}", data.subset and f"subset {data.subset}", f"split {data.split}"]
    described.append(data.revision and f"revision {data.revision}")
    if isinstance(dataset, datasets.Dataset):
        dataset = dataset.select_columns([data.column]).select(_shuffled(len(dataset), seed))
    return Source(", ".join(filter(None, described)), _dataset_texts(dataset, data))


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
