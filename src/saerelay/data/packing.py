"""One split of a corpus in the making: stretches of documents, joined and cut into sequences."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import final

import numpy as np

from saerelay.planning.facts import ModelFacts
from saerelay.planning.recipe import DataSpec

_STRETCH_STREAM = 3
"""Mixed with the seed, so that these random numbers serve this purpose only."""

_MORE_AFTER = 5120
"""After every so many documents, stretches become one sequence longer: a large corpus has documents enough, and should
not have to read many times the text that it keeps."""

_GROWTH = 4
"""If there are no more documents, stretches become so many times as long, again and again."""

_BYTES_PER_ID = 4
"""About as many bytes of UTF-8 make a token, in most languages and in code."""

_SCRAPS = 0.25
"""What would be left of a document, if it is shorter than this share of the stretch, is taken as well."""

_SPACE = re.compile(r"\s")
_LONGEST_WORD = 64
"""Text is cut after the next space, unless that is farther away than this."""

_CHUNK_IDS = 1 << 22
"""Number of token ids of a finished split that are in memory at the same time."""

TextOrIds = str | np.ndarray
"""A document, or a stretch of one."""


def new_stretches(
    document: TextOrIds, index: int, turn: int, ids_per_sequence: int, seed: int
) -> tuple[list[TextOrIds], bool]:
    """What a corpus takes of document number `index` in a turn, and whether the document has more.

    The first turn takes a stretch at a random place, about as long as a sequence. In later turns, this stretch grows in
    both directions.

    >>> text = "He had set out early, and it was noon when he came to the gate of the town."
    >>> for turn in range(2):
    ...     print(new_stretches(text, index=3, turn=turn, ids_per_sequence=4, seed=0))
    (['had set out early, '], True)
    (['He ', 'and it was noon when he came to the gate of the town.'], False)
    """
    now = _stretch(document, index, turn, ids_per_sequence, seed)
    parts = [document[now]]
    if turn > 0:
        before = _stretch(document, index, turn - 1, ids_per_sequence, seed)
        parts = [document[now.start : before.start], document[before.stop : now.stop]]
    has_more = now.stop - now.start < len(document)
    return [part for part in parts if len(part)], has_more


def _stretch(document: TextOrIds, index: int, turn: int, ids_per_sequence: int, seed: int) -> slice:
    """The stretch that a corpus has of a document after a turn; it contains the stretch after the turn before."""
    length = ids_per_sequence * (1 + index // _MORE_AFTER) * _GROWTH**turn
    if isinstance(document, str):
        n_bytes = len(document.encode("utf-8", "surrogatepass"))
        length = max(1, length * _BYTES_PER_ID * len(document) // n_bytes)
    if len(document) <= (1 + _SCRAPS) * length:
        return slice(0, len(document))
    position = np.random.default_rng([seed, _STRETCH_STREAM, index]).random()
    start = int(position * (len(document) - length))
    stop = start + length
    if isinstance(document, str):
        return slice(_next_word(document, start), _next_word(document, stop))
    return slice(start, stop)


def _next_word(text: str, position: int) -> int:
    """The beginning of the next word after a position, if it is near; the ends of the text stay ends."""
    if position == 0:
        return 0
    space = _SPACE.search(text, position, position + _LONGEST_WORD)
    if space:
        return space.end()
    is_last_word = len(text) - position <= _LONGEST_WORD
    return len(text) if is_last_word else position


@final
class Packer:
    """Joins stretches of the documents of one split with EOS and cuts them into sequences.

    Ids are first appended to a raw file, whose length gives the number of sequences; `finish` turns
    it into an array.
    """

    def __init__(self, path: Path, data: DataSpec, facts: ModelFacts, wanted: int, special: Sequence[int]) -> None:
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
        self.special = special
        self.n_special = 0
        """Number of special tokens in the documents; separators do not count."""
        self.documents: set[int] = set()
        """Numbers of the documents that the sequences are from."""

    @property
    def ids_per_stretch(self) -> int:
        """Length of a stretch that, with the separator before it, fills one sequence."""
        return max(1, self.ids_per_sequence - len(self.separator))

    @property
    def n_sequences(self) -> int:
        """Number of whole sequences so far, at most as many as are wanted."""
        return min(self.n_ids // self.ids_per_sequence, self.wanted)

    @property
    def full(self) -> bool:
        """Whether there are as many sequences as are wanted."""
        return self.n_sequences == self.wanted

    def add(self, ids: np.ndarray, document: int) -> None:
        """Append a stretch of a document after a separator, unless the split is full."""
        if self.full or not ids.size:
            return
        separator = self.separator if self.n_ids else self.separator[:0]
        joined = np.concatenate([separator, ids.astype(self.dtype)])
        with self.raw.open("ab") as file:
            file.write(joined.tobytes())
        if self.n_ids + separator.size < self.wanted * self.ids_per_sequence:  # or only its separator is left
            self.documents.add(document)
        self.n_ids += joined.size
        self.n_special += int(np.isin(ids, self.special).sum())

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
