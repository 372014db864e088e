"""Documents to token sequences on disk: training has an integer cursor, and resumes exactly.

A document goes to train, validation or test as a whole, before packing: no sequence of one split
shares a document with another. A corpus is a directory:

    corpus.json      CorpusFacts
    train.npy        [N, context] token ids, uint16 or uint32
    validation.npy   the same for documents that may steer training
    test.npy         the same for documents that are only ever reported on

The documents read, and their order, follow from the recipe and its seed alone: a longer corpus
begins with the shorter one.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final, get_args

import numpy as np

from saerelay.data.sources import Source, check_ids, open_source
from saerelay.document import Document
from saerelay.errors import DataError
from saerelay.lm.tokens import special_ids
from saerelay.planning.facts import ModelFacts
from saerelay.planning.recipe import DataSpec, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

_PERIOD = 20
"""Of this many consecutive documents, one is for validation and one for test."""

_HELD_OUT_STREAM = 2
"""Mixed with the seed, so that these random numbers serve this purpose only."""

_BATCH_DOCUMENTS = 64
_BATCH_SIZE = 1_000_000
"""Documents are tokenised in batches, which end at this many documents, or at this many characters
or ids."""

_CHUNK_IDS = 1 << 22
"""Number of token ids of a finished split that are in memory at the same time."""


class CorpusFacts(Document):
    """The content of a corpus and its source: `corpus.json`."""

    SCHEMA: ClassVar = 2
    MADE_BY: ClassVar = "`saerelay train`"
    REMEDY: ClassVar = "remove its directory; it is made again from the recipe"
    ERROR: ClassVar = DataError

    source: str
    """A description for people: "Python 3.11.7 standard library", "dataset wikitext, split train"."""
    context: int
    prepend_bos: bool
    n_documents: int
    """Documents read; empty ones do not count."""
    train_sequences: int
    validation_sequences: int
    test_sequences: int
    complete: bool
    """Whether the source ended before the train split was full, so that there is no more text to train on."""
    padding: dict[int, int] = {}
    """Number of tokens of a file that were taken for padding and left out, by id."""
    grown_from: list[int] = []
    """Numbers of training sequences that it had before its run was extended, if that took more text."""
    special_tokens: int = 0
    """Number of special tokens that the tokenizer made from text that spells them."""

    def notes(self) -> list[str]:
        """Facts about the source that are worth a line on the screen."""
        lines = []
        for token, n in self.padding.items():
            lines.append(f"left out {n:,} padding tokens (id {token}) of {self.source}")
        if self.special_tokens:
            lines.append(
                f"{self.special_tokens:,} special tokens are spelled out in the text of {self.source} and are read as "
                "special tokens, because the tokenizer cannot read them as text"
            )
        return lines


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
        return cls(
            facts=facts,
            train=_map_split(directory, facts, "train"),
            validation=_map_split(directory, facts, "validation"),
            test=_map_split(directory, facts, "test"),
        )


def prepare(
    recipe: Recipe,
    facts: ModelFacts,
    tokenizer: "PreTrainedTokenizerBase | None",
    directory: Path,
    *,
    train_sequences: int,
    eval_sequences: int,
    progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Tokenise just enough of `recipe.data` into a directory, or open the corpus that is already there.

    The train split may be shorter than requested; then `facts.complete` is true. `tokenizer` may be
    None if the recipe gives token ids. `progress` is called with the number of token positions in
    all splits so far, at most `context * (train_sequences + 2 * eval_sequences)`. Raises DataError
    if the source is missing, unsuitable, or leaves a split empty; then, and after an interruption,
    nothing is left in the directory or next to it.
    """
    assert train_sequences > 0 and eval_sequences > 0, (train_sequences, eval_sequences)
    if (directory / "corpus.json").exists():
        return Corpus.open(directory)
    _check_recipe(recipe.data, facts, tokenizer)
    is_taken = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    if is_taken:
        raise DataError(f"{directory}: exists but holds no corpus.json; remove it, or choose another directory.")
    source = open_source(recipe, facts)

    # All files are written next to the directory and renamed: a corpus is complete or absent.
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left over from a killed process
    sizes: dict[Split, int] = {"train": train_sequences, "validation": eval_sequences, "test": eval_sequences}
    try:
        partial.mkdir(parents=True)
        packers: dict[Split, _Packer] = {}
        for split, size in sizes.items():
            packers[split] = _Packer(partial / f"{split}.npy", recipe.data, facts, size)
        corpus_facts = _fill(packers, recipe, facts, tokenizer, source=source, progress=progress)
        corpus_facts.save(partial / "corpus.json")
        if directory.exists():
            directory.rmdir()
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Corpus.open(directory)


def split_of(index: int, seed: int) -> Split:
    """The split that a document belongs to: of every 20 documents, one is test and one validation.

    >>> from collections import Counter
    >>> sorted(Counter(split_of(i, seed=0) for i in range(2000)).items())
    [('test', 100), ('train', 1800), ('validation', 100)]
    """
    block, position = divmod(index, _PERIOD)
    validation, test = _held_out(block, seed)
    if position == validation:
        return "validation"
    if position == test:
        return "test"
    return "train"


@lru_cache(maxsize=4)
def _held_out(block: int, seed: int) -> tuple[int, int]:
    """The positions of the two documents of a block that are held out, for validation and for test."""
    generator = np.random.default_rng([seed, _HELD_OUT_STREAM, block])
    order = generator.permutation(_PERIOD)
    return int(order[0]), int(order[1])


# --- reading -----------------------------------------------------------------------------------


def _read_facts(directory: Path) -> CorpusFacts:
    path = directory / "corpus.json"
    if not path.exists():
        raise DataError(f"{directory}: no corpus here (corpus.json is missing).")
    return CorpusFacts.load(path)


def _map_split(directory: Path, facts: CorpusFacts, split: Split) -> np.ndarray:
    """Map the file of a split; DataError if it is not the array described by the facts."""
    path = directory / f"{split}.npy"
    expected = (getattr(facts, f"{split}_sequences"), facts.context)
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise _damaged(path, expected, error) from None
    if array.shape != expected:
        raise _damaged(path, expected, f"an array {array.shape}")
    return array


def _damaged(path: Path, expected: tuple[int, int], found: object) -> DataError:
    return DataError(
        f"{path}: damaged; expected an array {expected}, found {found}. "
        f"Remove {path.parent}; it is made again from the recipe."
    )


# --- packing -----------------------------------------------------------------------------------


def _fill(
    packers: "Mapping[Split, _Packer]",
    recipe: Recipe,
    facts: ModelFacts,
    tokenizer: "PreTrainedTokenizerBase | None",
    source: Source,
    progress: Callable[[int], None] | None,
) -> CorpusFacts:
    """Deal documents to the splits until all are full or the source ends; then write the splits."""
    n_documents = 0
    n_special = 0
    special = special_ids(tokenizer) if tokenizer else []
    for batch in _batches(source.documents):
        # Documents of a full split are counted, but neither tokenised nor kept.
        receivers = []
        documents = []
        for index, document in enumerate(batch, start=n_documents):
            packer = packers[split_of(index, recipe.train.seed)]
            if not packer.full:
                receivers.append(packer)
                documents.append(document)
        n_documents += len(batch)

        for packer, ids in zip(receivers, _encode(documents, tokenizer, facts), strict=True):
            packer.add(ids)
            n_special += int(np.isin(ids, special).sum())
        if progress:
            progress(recipe.data.context * sum(packer.n_sequences for packer in packers.values()))
        if all(packer.full for packer in packers.values()):
            break

    _check_splits(packers, source.description, n_documents)
    for packer in packers.values():
        packer.finish()
    return CorpusFacts(
        source=source.description,
        context=recipe.data.context,
        prepend_bos=recipe.data.prepend_bos,
        n_documents=n_documents,
        train_sequences=packers["train"].n_sequences,
        validation_sequences=packers["validation"].n_sequences,
        test_sequences=packers["test"].n_sequences,
        complete=not packers["train"].full,
        padding=dict(+source.padding),
        special_tokens=n_special,
    )


def _batches(documents: Iterator[Any]) -> Iterator[list[Any]]:
    """Group documents into batches of limited length and size; skip empty documents."""
    batch = []
    size = 0
    for document in documents:
        content = document.strip() if isinstance(document, str) else document
        if not len(content):
            continue
        batch.append(document)
        size += len(document)
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_SIZE:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def _encode(
    documents: Sequence[Any], tokenizer: "PreTrainedTokenizerBase | None", facts: ModelFacts
) -> Sequence[np.ndarray]:
    """The token ids of some documents; documents of a token file are already ids."""
    if not documents or not isinstance(documents[0], str):
        return documents
    assert tokenizer is not None
    encoded = tokenizer(
        list(documents),
        add_special_tokens=False,
        split_special_tokens=True,  # text is text, even where it spells a special token
        return_attention_mask=False,
        verbose=False,
    )
    arrays = [np.asarray(ids, dtype=np.int64) for ids in encoded["input_ids"]]
    largest = max(int(ids.max(initial=0)) for ids in arrays)
    check_ids(largest, facts, "the tokenizer")
    return arrays


@final
class _Packer:
    """Joins the documents of one split with EOS and cuts them into sequences.

    Ids are first appended to a raw file, whose length gives the number of sequences; `finish` turns
    it into an array.
    """

    def __init__(self, path: Path, data: DataSpec, facts: ModelFacts, wanted: int) -> None:
        self.path = path
        self.wanted = wanted
        self.context = data.context
        self.bos = facts.tokens.bos_token_id if data.prepend_bos else None
        self.ids_per_sequence = data.context - data.prepend_bos
        fits_16_bits = facts.tokens.vocab_size <= 1 << 16
        self.dtype = np.dtype("<u2" if fits_16_bits else "<u4")
        separator = [] if facts.tokens.eos_token_id is None else [facts.tokens.eos_token_id]
        self.separator = np.array(separator, self.dtype)
        self.raw = path.with_suffix(".raw")
        self.raw.touch()
        self.n_ids = 0

    @property
    def n_sequences(self) -> int:
        """Number of whole sequences so far, at most as many as are wanted."""
        return min(self.n_ids // self.ids_per_sequence, self.wanted)

    @property
    def full(self) -> bool:
        """Whether there are as many sequences as are wanted."""
        return self.n_sequences == self.wanted

    def add(self, ids: np.ndarray) -> None:
        """Append a document, with a separator before it unless it is the first."""
        if not ids.size:
            return
        pieces = [ids.astype(self.dtype)]
        if self.n_ids:
            pieces.insert(0, self.separator)
        with self.raw.open("ab") as file:
            for piece in pieces:
                file.write(piece.tobytes())
                self.n_ids += piece.size

    def finish(self) -> None:
        """Write the sequences as .npy, with their BOS, and remove the raw file."""
        header = {
            "descr": self.dtype.str,
            "fortran_order": False,
            "shape": (self.n_sequences, self.context),
        }
        step = max(1, _CHUNK_IDS // self.context)
        with self.raw.open("rb") as raw, self.path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, self.n_sequences, step):
                n = min(step, self.n_sequences - start)
                content = raw.read(n * self.ids_per_sequence * self.dtype.itemsize)
                ids = np.frombuffer(content, self.dtype).reshape(n, self.ids_per_sequence)
                rows = np.empty((n, self.context), self.dtype)
                rows[:, self.context - self.ids_per_sequence :] = ids
                if self.bos is not None:
                    rows[:, 0] = self.bos
                file.write(rows.tobytes())
        self.raw.unlink()


# --- checks ------------------------------------------------------------------------------------


def _check_recipe(data: DataSpec, facts: ModelFacts, tokenizer: object) -> None:
    """Raise DataError for problems that are visible before anything is read."""
    if data.prepend_bos and facts.tokens.bos_token_id is None:
        raise DataError(
            f"data.prepend_bos is true, but the model {facts.name} has no BOS token; set data.prepend_bos = false."
        )
    if tokenizer is None and not data.tokens:
        raise DataError(
            f"the model {facts.name} comes without a tokenizer, so text cannot be read; "
            "tokenise the text yourself and set data.tokens to a .npy file of token ids."
        )


def _check_splits(packers: "Mapping[Split, _Packer]", description: str, n_documents: int) -> None:
    """Raise DataError if the source leaves a split without a sequence."""
    if not n_documents:
        raise DataError(f"{description}: contains no documents (empty ones are skipped). Give a source with text.")
    empty = [split for split, packer in packers.items() if not packer.n_sequences]
    if empty:
        n_tokens = sum(packer.n_ids for packer in packers.values())
        raise DataError(
            f"{description}: too little text for the {' and the '.join(empty)} split, which got "
            f"no sequence. Documents: {n_documents}, with {n_tokens} tokens; a sequence "
            f"needs {packers['train'].ids_per_sequence} tokens, and one document in {_PERIOD} "
            "goes to validation, another to test. Give more documents, or lower data.context."
        )
