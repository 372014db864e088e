"""Documents to token sequences on disk: training has an integer cursor, and resumes exactly.

A document goes to train, validation or test as a whole, before packing: no sequence of one split
shares a document with another. A corpus is a directory:

    corpus.json      CorpusFacts
    train.npy        [N, context] token ids, uint16 or uint32
    validation.npy   the same for documents that may steer training
    test.npy         the same for documents that are only ever reported on

The next paragraph of a document says little that is new. So each document gives one stretch, about as long
as a sequence; only if there are too few documents does each give more (decision 036).

The documents read, their order, and the stretch that each gives follow from the recipe and its seed alone:
a longer corpus begins with the shorter one.
"""

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final, get_args

import numpy as np

from saerelay.data.packing import Packer, TextOrIds, new_stretches
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

_FEW_DOCUMENTS = 500
"""SAEs from fewer documents than this lose measurably more on others (docs/log.md, 2026-11-28)."""

_BATCH_DOCUMENTS = 64
_BATCH_SIZE = 1_000_000
"""Documents are tokenised in batches, which end at this many documents, or at this many characters
or ids."""


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
    train_documents: int = 0
    """Number of documents that the split has text of; 0 if an older version made the corpus."""
    validation_documents: int = 0
    test_documents: int = 0
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
        if 0 < self.train_documents < min(_FEW_DOCUMENTS, self.train_sequences / 2):
            lines.append(
                f"the {self.train_sequences:,} training sequences are from {self.train_documents:,} documents only; "
                "SAEs lose more on other documents if they learn from few"
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
        special = special_ids(tokenizer) if tokenizer else []
        packers: dict[Split, Packer] = {}
        for split, size in sizes.items():
            packers[split] = Packer(partial / f"{split}.npy", recipe.data, facts, size, special)
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
    packers: "Mapping[Split, Packer]",
    recipe: Recipe,
    facts: ModelFacts,
    tokenizer: "PreTrainedTokenizerBase | None",
    source: Source,
    progress: Callable[[int], None] | None,
) -> CorpusFacts:
    """Read documents, again and again, until the splits are full or have all the text; then write the splits."""
    documents = source.documents
    n_documents = 0
    for turn in itertools.count():
        n_read, has_more = _deal(documents, turn, packers, recipe, facts, tokenizer, progress)
        n_documents = max(n_documents, n_read)
        if not has_more:
            break
        documents = open_source(recipe, facts).documents

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
        train_documents=len(packers["train"].documents),
        validation_documents=len(packers["validation"].documents),
        test_documents=len(packers["test"].documents),
        complete=not packers["train"].full,
        padding=dict(+source.padding),
        special_tokens=sum(packer.n_special for packer in packers.values()),
    )


def _deal(
    documents: Iterator[Any],
    turn: int,
    packers: "Mapping[Split, Packer]",
    recipe: Recipe,
    facts: ModelFacts,
    tokenizer: "PreTrainedTokenizerBase | None",
    progress: Callable[[int], None] | None,
) -> tuple[int, bool]:
    """Give stretches of documents to the splits that these belong to, until all are full.

    Returns the number of documents read, and whether another turn would add to a split that is not full.
    """
    n_documents = 0
    with_more: set[Packer] = set()  # splits whose documents have more for them
    for batch in _batches(documents):
        # Documents of a full split are counted, but neither tokenised nor kept.
        receivers: list[tuple[Packer, int]] = []
        stretches: list[TextOrIds] = []
        for index, document in enumerate(batch, start=n_documents):
            packer = packers[split_of(index, recipe.train.seed)]
            if packer.full:
                continue
            new, has_more = new_stretches(document, index, turn, packer.ids_per_stretch, recipe.train.seed)
            receivers += [(packer, index)] * len(new)
            stretches += new
            if has_more:
                with_more.add(packer)
        n_documents += len(batch)

        for (packer, index), ids in zip(receivers, _encode(stretches, tokenizer, facts), strict=True):
            packer.add(ids, index)
        if progress:
            progress(recipe.data.context * sum(packer.n_sequences for packer in packers.values()))
        if all(packer.full for packer in packers.values()):
            break
    return n_documents, not all(packer.full for packer in with_more)


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
    stretches: Sequence[Any], tokenizer: "PreTrainedTokenizerBase | None", facts: ModelFacts
) -> Sequence[np.ndarray]:
    """The token ids of some stretches of documents; those of a token file are already ids."""
    if not stretches or not isinstance(stretches[0], str):
        return stretches
    assert tokenizer is not None
    encoded = tokenizer(
        list(stretches),
        add_special_tokens=False,
        split_special_tokens=True,  # text is text, even where it spells a special token
        return_attention_mask=False,
        verbose=False,
    )
    arrays = [np.asarray(ids, dtype=np.int64) for ids in encoded["input_ids"]]
    largest = max(int(ids.max(initial=0)) for ids in arrays)
    check_ids(largest, facts, "the tokenizer")
    return arrays


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


def _check_splits(packers: "Mapping[Split, Packer]", description: str, n_documents: int) -> None:
    """Raise DataError if the source leaves a split without a sequence."""
    if not n_documents:
        raise DataError(f"{description}: contains no documents (empty ones are skipped). Give a source with text.")
    empty = [split for split, packer in packers.items() if not packer.n_sequences]
    if empty:
        n_tokens = sum(packer.n_ids for packer in packers.values())
        raise DataError(
            f"{description}: too little text for the {' and the '.join(empty)} split, which got "
            f"no sequence. Documents: {n_documents}, of which {n_tokens} tokens were read; a sequence "
            f"needs {packers['train'].ids_per_sequence} tokens, and one document in {_PERIOD} "
            "goes to validation, another to test. Give more documents, or lower data.context."
        )
