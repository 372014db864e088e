"""Sources of documents: text files, token files, datasets, or the built-in corpus.

Each source gives documents, as text or as arrays of token ids, in an order that follows from the
seed; a streamed dataset keeps its own order.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saerelay.data.text import read_span, spans_of, text_files
from saerelay.errors import DataError
from saerelay.planning.facts import ModelFacts, TokenFacts
from saerelay.planning.recipe import DatasetSpec, DataSpec, Recipe

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_ORDER_STREAM = 1
"""Mixed with the seed, so that these random numbers serve this purpose only."""


@dataclass(frozen=True)
class Source:
    """Documents in reading order, and a description of where they come from."""

    description: str
    documents: Iterator[str] | Iterator[np.ndarray]
    padding: Counter[int] = field(default_factory=Counter)
    """Number of padding tokens removed from the documents read so far, by token id."""


def open_source(recipe: Recipe, facts: ModelFacts) -> Source:
    """Open the source that a recipe names; DataError if it names none, or one that cannot be read."""
    data = recipe.data
    seed = recipe.train.seed
    if data.hub.dataset:
        return _dataset_source(data.hub, seed)
    if data.text:
        return _text_source(data, seed)
    if data.tokens:
        return _token_source(data, facts, seed)
    if recipe.model.name == "demo":
        return _demo_source(seed)
    raise DataError(
        f'no data given for the model "{recipe.model.name}": set data.dataset, data.text or '
        'data.tokens (only model.name = "demo" has a built-in corpus).'
    )


def check_ids(largest: int, facts: ModelFacts, where: str) -> None:
    """Raise DataError if a token id found in `where` is outside the model's vocabulary."""
    if largest >= facts.tokens.vocab_size:
        raise DataError(
            f"{where} gives the token id {largest}, but the model {facts.name} has a vocabulary "
            f"of {facts.tokens.vocab_size} (ids up to {facts.tokens.vocab_size - 1}). Use the tokenizer that "
            "belongs to this model."
        )


def _shuffled(n: int, seed: int) -> np.ndarray:
    """The order in which `n` documents are read."""
    return np.random.default_rng([seed, _ORDER_STREAM]).permutation(n)


def _demo_source(seed: int) -> Source:
    from saerelay import demo

    texts = demo.documents()
    if not texts:
        raise DataError(
            f"{demo.source()}: this interpreter has no .py files to read (it may be zipped). "
            "Set data.text to a directory of text files, or use another Python."
        )
    return Source(demo.source(), (texts[i] for i in _shuffled(len(texts), seed)))


# --- text files --------------------------------------------------------------------------------


def _text_source(data: DataSpec, seed: int) -> Source:
    paths = text_files(data.text)
    spans = spans_of(paths)
    spans = spans[_shuffled(len(spans), seed)]
    documents = (read_span(paths[i], int(start), int(stop), data.hub.column) for i, start, stop in spans)
    return Source(f"text in {', '.join(data.text)} (files: {len(paths)})", documents)


# --- token files -------------------------------------------------------------------------------
#
# A document is a row of a 2-D array, or the stretch between two separators of a 1-D array.

_CHUNK_IDS = 1 << 22
"""Number of ids of a token file that are in memory at the same time."""

_MIN_SEPARATORS = 20
"""With fewer EOS (or BOS) tokens than this, a 1-D array is cut into pieces of equal length."""

_PIECE_CONTEXTS = 64
"""Length of such a piece in contexts; pieces are shorter if there would be fewer than
_MIN_SEPARATORS of them."""


def _token_source(data: DataSpec, facts: ModelFacts, seed: int) -> Source:
    tokens = _open_tokens(tokens_file(data.tokens), facts)
    if tokens.ndim == 2:
        rows = (tokens[i] for i in _shuffled(len(tokens), seed))
    else:
        spans = _token_spans(tokens, data.context, facts)
        rows = (tokens[start:stop] for start, stop in spans[_shuffled(len(spans), seed)])
    padding: Counter[int] = Counter()
    documents = (_without_ends(_unpadded(row, facts, padding), facts.tokens) for row in rows)
    return Source(f"tokens in {data.tokens}", documents, padding)


def tokens_file(name: str) -> Path:
    """The path of a token file; DataError unless it exists."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(f'data.tokens: no such file: "{path}" (relative paths start in {Path.cwd()}).')
    return path


def _open_tokens(path: Path, facts: ModelFacts) -> np.ndarray:
    """Map a token file and check every id in it."""
    dtype = "uint16" if facts.tokens.vocab_size <= 1 << 16 else "uint32"
    convert = f'np.save("tokens.npy", array.astype(np.{dtype}))'
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not a .npy file of token ids ({error}). Write one with {convert}; "
            'to read a raw file of ids, use array = np.fromfile("tokens.bin", dtype=...).'
        ) from None
    if tokens.dtype not in (np.uint16, np.uint32):
        raise DataError(f"{path}: expected uint16 or uint32, found {tokens.dtype}. Convert it with {convert}.")
    if tokens.ndim not in (1, 2) or not tokens.size:
        raise DataError(f"{path}: expected a 1-D or 2-D array of token ids, found the shape {tokens.shape}.")
    largest = max(int(chunk.max()) for _, chunk in _chunks(tokens))
    check_ids(largest, facts, str(path))
    return tokens


def _chunks(tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield an array in parts that fit in memory, each with the index of its first row."""
    row_size = tokens.size // len(tokens)
    step = max(1, _CHUNK_IDS // row_size)
    for start in range(0, len(tokens), step):
        yield start, tokens[start : start + step]


def _token_spans(tokens: np.ndarray, context: int, facts: ModelFacts) -> np.ndarray:
    """Starts and stops of the documents of a 1-D array, [N, 2].

    Documents lie between EOS tokens, or BOS tokens, or are pieces of equal length.
    """
    for separator in (facts.tokens.eos_token_id, facts.tokens.bos_token_id):
        if separator is None:
            continue
        found = [start + np.flatnonzero(chunk == separator) for start, chunk in _chunks(tokens)]
        separators = np.concatenate(found)
        if separators.size >= _MIN_SEPARATORS:
            starts = np.append(0, separators + 1)
            stops = np.append(separators, len(tokens))
            not_empty = starts < stops
            return np.stack([starts[not_empty], stops[not_empty]], axis=1)

    length = min(_PIECE_CONTEXTS * context, len(tokens) // _MIN_SEPARATORS)
    length = max(1, length)
    starts = np.arange(0, len(tokens), length)
    stops = np.minimum(starts + length, len(tokens))
    return np.stack([starts, stops], axis=1)


def _unpadded(ids: np.ndarray, facts: ModelFacts, padding: Counter[int]) -> np.ndarray:
    """Return a document without its padding, which is counted.

    The model's padding token is removed wherever it occurs, but if it is also the BOS or EOS, only
    where it is repeated at either end. A token that fills at least a quarter of a document, at its
    end, is padding whichever token it is. A document of nothing but padding is empty.
    """
    pad = facts.tokens.pad_token_id
    if pad is not None and pad not in (facts.tokens.bos_token_id, facts.tokens.eos_token_id):
        others = ids[ids != pad]
        padding[pad] += len(ids) - len(others)
        ids = others
    for token in (pad, ids[-1] if len(ids) else None):
        if token is None:
            continue
        n_first, n_last = _at_ends(ids, token)
        is_padding = token == pad or n_last >= max(8, len(ids) // 4)
        if is_padding and max(n_first, n_last) > 1:
            padding[int(token)] += n_first + n_last
            ids = ids[n_first : len(ids) - n_last]
    return ids


def _at_ends(ids: np.ndarray, token: int) -> tuple[int, int]:
    """How often a token is repeated at the beginning of a document, and at its end, where one of nothing else ends."""
    others = np.flatnonzero(ids != token)
    if not len(others):
        return 0, len(ids)
    return int(others[0]), len(ids) - 1 - int(others[-1])


def _without_ends(ids: np.ndarray, tokens: TokenFacts) -> np.ndarray:
    """Return a document without a leading BOS, and without an EOS at either end.

    The packer puts a BOS before every sequence, and an EOS between documents.
    """
    if len(ids) and ids[0] in (tokens.bos_token_id, tokens.eos_token_id):
        ids = ids[1:]
    if len(ids) and ids[-1] == tokens.eos_token_id:
        ids = ids[:-1]
    return ids


# --- Hugging Face datasets ---------------------------------------------------------------------


def _dataset_source(spec: DatasetSpec, seed: int) -> Source:
    import datasets  # takes a second to import

    dataset = _open_dataset(spec)
    if isinstance(dataset, datasets.Dataset):
        dataset = dataset.select_columns([spec.column])
        dataset = dataset.select(_shuffled(len(dataset), seed))

    description = f"dataset {spec.dataset}"
    for key in ("subset", "split", "revision"):
        value = getattr(spec, key)
        if value:
            description += f", {key} {value}"
    return Source(description, _dataset_texts(dataset, spec))


def _open_dataset(spec: DatasetSpec) -> "Dataset | IterableDataset":
    """Open a dataset; DataError if it lacks the split or the column."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        dataset = _load_dataset(spec)
        if isinstance(dataset, datasets.DatasetDict):
            if spec.split not in dataset:
                splits = ", ".join(str(name) for name in dataset)
                raise DataError(
                    f'data.dataset = "{spec.dataset}" has no split "{spec.split}"; set data.split to one of: {splits}.'
                )
            dataset = dataset[spec.split]
        assert isinstance(dataset, datasets.Dataset | datasets.IterableDataset), type(dataset)
        columns = dataset.column_names or list(next(iter(dataset), {}))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise _unreadable(spec, error) from None

    if columns and spec.column not in columns:
        raise DataError(
            f'data.dataset = "{spec.dataset}" has no column "{spec.column}"; '
            f"set data.column to the one with the text, one of: {', '.join(columns)}."
        )
    if isinstance(dataset, datasets.IterableDataset) and columns:
        return dataset.select_columns([spec.column])
    return dataset


def _load_dataset(spec: DatasetSpec) -> Any:
    """Open a directory that `datasets` has saved, or stream other files or a dataset on the hub."""
    import datasets

    path = Path(spec.dataset).expanduser()
    is_directory = path.is_dir()
    is_saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    if is_directory and is_saved:
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(
        str(path) if is_directory else spec.dataset,
        name=spec.subset or None,
        split=spec.split,
        revision=spec.revision or None,
        streaming=True,
    )


def _dataset_texts(rows: Iterable[Any], spec: DatasetSpec) -> Iterator[str]:
    """Yield the texts of a dataset's rows; DataError if they are not text, or if the stream breaks."""
    from datasets.exceptions import DatasetsError

    try:
        for row in rows:
            text = row[spec.column]
            if text is not None and not isinstance(text, str):
                raise DataError(
                    f'data.dataset = "{spec.dataset}": the column "{spec.column}" holds '
                    f"{type(text).__name__}, expected text. Set data.column to a column of text, "
                    "or save ids as .npy and give data.tokens."
                )
            yield text or ""
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise _unreadable(spec, error) from None


def _unreadable(spec: DatasetSpec, error: Exception) -> DataError:
    text = str(error).strip()
    reason = text.splitlines()[0] if text else type(error).__name__
    return DataError(
        f'data.dataset = "{spec.dataset}" (data.subset = "{spec.subset}", data.split = '
        f'"{spec.split}") cannot be read: {reason}. It must be a local directory or a dataset on '
        "the hub: check the spelling and the network, log in with `hf auth login` if access is "
        "restricted, or give data.text instead."
    )
