"""Documents to token sequences on disk, so that training has an integer cursor and resumes exactly.

A document goes to train, validation or test as a whole, before packing: no sequence of one split shares a document with
another. A corpus is a directory:

    corpus.json      CorpusFacts
    train.npy        [N, context] token ids, uint16 or uint32; validation.npy and test.npy alike

What is read, and in which order, follows from the recipe and its seed alone: a longer corpus begins with the shorter.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final, get_args

import numpy as np

from saerelay.data.sources import Source, check_ids, open_source
from saerelay.document import Document
from saerelay.errors import DataError
from saerelay.planning.facts import ModelFacts
from saerelay.planning.recipe import DataSpec, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

_PERIOD = 20  # consecutive documents of which one is for validation and one for test
_HELD_OUT = 2  # what a generator is for, mixed with the seed
_BATCH_DOCUMENTS, _BATCH_SIZE = 64, 1_000_000  # documents, and characters or ids, tokenised together
_CHUNK = 1 << 22  # ids of a finished split looked at together


class CorpusFacts(Document):
    """What a corpus holds and where it comes from: `corpus.json`."""

    SCHEMA: ClassVar = 2
    MADE_BY: ClassVar = "`saerelay train`"
    REMEDY: ClassVar = "remove its directory; it is made anew from the recipe"
    ERROR: ClassVar = DataError

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
    run: Recipe,
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
    source = open_source(run, facts)

    scratch = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed process left
    try:
        scratch.mkdir(parents=True)
        written = _write(run, facts, tokenizer, source, scratch, (train_sequences, eval_sequences), progress)
        written.save(scratch / "corpus.json")
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


def _read_facts(directory: Path) -> CorpusFacts:
    path = directory / "corpus.json"
    if not path.exists():
        raise DataError(f"{directory}: no corpus here (corpus.json is missing).")
    return CorpusFacts.load(path)


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


def _write(
    run: Recipe,
    facts: ModelFacts,
    tokenizer: "PreTrainedTokenizerBase | None",
    source: Source,
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
    check_ids(max(int(ids.max(initial=0)) for ids in arrays), facts, "the tokenizer")
    return arrays


@final
class _Packer:
    """Joins the documents of one split with EOS and cuts them into sequences, by way of a raw file of ids."""

    def __init__(self, path: Path, data: DataSpec, facts: ModelFacts, wanted: int) -> None:
        self.path = path
        self.wanted = wanted
        self.context = data.context
        self.bos = facts.tokens.bos_token_id if data.prepend_bos else None
        self.n_body = data.context - data.prepend_bos  # ids of documents in one sequence
        self.dtype = np.dtype("<u2" if facts.tokens.vocab_size <= 1 << 16 else "<u4")
        self.separator = np.array([] if facts.tokens.eos_token_id is None else [facts.tokens.eos_token_id], self.dtype)
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
    if data.prepend_bos and facts.tokens.bos_token_id is None:
        raise DataError(
            f"data.prepend_bos is true, but the model {facts.name} has no BOS token; set data.prepend_bos = false."
        )
    if tokenizer is None and not data.tokens:
        raise DataError(
            f"the model {facts.name} comes without a tokenizer, so that text cannot be read; "
            "tokenise it yourself and give data.tokens (a .npy file of token ids)."
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
