"""Rows of activations as people have them: tensors, arrays, iterables, streams. Checked, shuffled, cut into batches.

For `sr.train`, `sr.hop` and `sr.evaluate` (`tensors`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saerelay.data.stream import AbstractStream
from saerelay.errors import DataError, RecipeError
from saerelay.site import Site
from saerelay.training.train import FIRST_ROWS, why_not

BUFFER_ROWS = 65_536
"""Number of rows of an iterator that are shuffled together."""

Rows = Tensor | np.ndarray
Batches = Iterable[Rows] | Iterable[tuple[Rows, Rows]]
Activations = Rows | Batches | AbstractStream


@dataclass(frozen=True, eq=False)
class Pair:
    """Rows of activations to read and, for a transcoder, the rows to reconstruct; on one device."""

    x: Tensor
    target: Tensor | None = None

    @classmethod
    def of(cls, x: Any, target: Any = None, *, caller: str) -> "Pair":
        """Make a pair of tensors or arrays, on the device of x.

        Raises DataError unless they are rows (tokens, width) of the same tokens.
        """
        rows = _rows(x, caller)
        pair = cls(rows, None if target is None else _rows(target, caller).to(rows.device))
        if pair.target is not None and len(pair.target) != len(pair):
            raise DataError(
                f"{caller}: {len(pair)} rows of x and {len(pair.target)} of the target; give the same tokens"
            )
        return pair

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of the rows to read, and that of the rows to reconstruct, if there are any."""
        return tuple(part.shape[1] for part in (self.x, self.target) if part is not None)

    def __len__(self) -> int:
        return len(self.x)

    def first(self, n: int) -> "Pair":
        """The first rows, at most n."""
        return self.at(slice(0, n))

    def at(self, rows: slice | Tensor) -> "Pair":
        """Some of the rows."""
        return Pair(self.x[rows], None if self.target is None else self.target[rows])

    def split(self, size: int) -> "list[Pair]":
        """All rows, at most `size` at a time."""
        return [self.at(slice(start, start + size)) for start in range(0, len(self), size)]

    @classmethod
    def joined(cls, parts: "Sequence[Pair]") -> "Pair":
        """Join the rows of parts that have the same widths, one part after another."""
        targets = [part.target for part in parts if part.target is not None]
        return cls(torch.cat([part.x for part in parts]), torch.cat(targets) if targets else None)

    def on(self, device: torch.device) -> "Pair":
        """The same rows on a device."""
        return Pair(self.x.to(device), None if self.target is None else self.target.to(device))

    def in_float32(self) -> "Pair":
        """The same rows in float32."""
        return Pair(self.x.float(), None if self.target is None else self.target.float())

    def check_learnable(self, where: str) -> None:
        """Raise DataError if nothing can be learned from the first rows, as in a run."""
        head = self.first(FIRST_ROWS).in_float32()
        reason = why_not(where, head.x)
        if head.target is not None:
            reason = reason or why_not(f"{where}, target", head.target)
        if reason:
            raise DataError(reason)


@dataclass(eq=False)
class Source:
    """Buffers of shuffled rows, one after another; the first is looked at before training begins."""

    buffers: Iterator[Pair]
    ahead: Pair

    @property
    def first(self) -> Pair:
        """The rows from which units and initialisation follow, in float32."""
        return self.ahead.first(FIRST_ROWS).in_float32()

    @classmethod
    def of(cls, x: Activations, target: Rows | None, site: Site | None, seed: int) -> "Source":
        """Make a source from a tensor, an iterable or a stream."""
        generator = torch.Generator().manual_seed(seed)
        parts = each_pair(_blocks(x, site) if isinstance(x, AbstractStream) else x, target, caller="train")
        buffers = _orders(next(parts), generator) if isinstance(x, Rows) else _shuffled(parts, generator)
        ahead = next(buffers, None)
        if ahead is None:
            raise DataError("train: there are no activations")
        return cls(buffers, ahead)

    def batches(self, size: int) -> Iterator[Pair]:
        """Yield batches of a size while there are rows; the last rows of a buffer come before those of the next."""
        rest = self.ahead
        while True:
            while len(rest) >= size:
                yield rest.first(size)
                rest = rest.at(slice(size, None))
            more = next(self.buffers, None)
            if more is None:
                return
            rest = Pair.joined([rest, more])


def each_pair(x: Rows | Batches, target: Rows | None, *, caller: str) -> Iterator[Pair]:
    """Yield a tensor with its target, or each batch of an iterable, which may be a pair itself.

    Raises DataError for what is no activations, and for batches that differ in width, or in whether they have a target.
    """
    if isinstance(x, Rows):
        yield Pair.of(x, target, caller=caller)
        return
    if target is not None:
        raise RecipeError(f"{caller}: a target belongs to a tensor; an iterable gives pairs (x, target)")
    if not isinstance(x, Iterable):
        raise DataError(f"{caller}: activations are tensors, arrays, or an iterable of these; found {_kind(x)}")
    widths = None
    for batch in x:
        parts = batch if isinstance(batch, tuple) and len(batch) == 2 else (batch,)
        pair = Pair.of(*parts, caller=caller)
        widths = widths or pair.widths
        if pair.widths != widths:
            raise DataError(f"{caller}: a batch of the widths {pair.widths} comes after one of the widths {widths}")
        yield pair


def n_rows(x: Activations) -> int:
    """Return the number of rows of a tensor, or of a list of tensors."""
    if isinstance(x, Rows):
        return len(x)
    if isinstance(x, list | tuple):
        return sum(len(part[0] if isinstance(part, tuple) else part) for part in x)
    raise RecipeError("train: an iterator does not say how many rows it has; give the budget: tokens=1_000_000")


def _rows(given: Any, caller: str) -> Tensor:
    """Return a tensor or array as a tensor (tokens, width)."""
    if not isinstance(given, Rows):
        raise DataError(f"{caller}: activations are tensors or arrays; found {_kind(given)}")
    x = torch.as_tensor(given).detach()
    if x.dim() != 2 or not len(x):
        raise DataError(
            f"{caller}: activations of the shape {tuple(x.shape)}; expected (tokens, width), at least one token"
        )
    return x


def _kind(given: Any) -> str:
    return f"an object of the type {type(given).__name__}"


def _orders(rows: Pair, generator: torch.Generator) -> Iterator[Pair]:
    """Yield a tensor's rows in one random order after another."""
    while True:
        for part in torch.randperm(len(rows), generator=generator).split(BUFFER_ROWS):
            yield rows.at(part.to(rows.x.device))


def _shuffled(parts: Iterable[Pair], generator: torch.Generator) -> Iterator[Pair]:
    """Yield an iterable's rows in buffers, each of them shuffled."""
    waiting: list[Pair] = []
    for part in parts:
        waiting.append(part)
        if sum(map(len, waiting)) >= BUFFER_ROWS:
            yield _mixed(waiting, generator)
            waiting = []
    if waiting:
        yield _mixed(waiting, generator)


def _mixed(parts: list[Pair], generator: torch.Generator) -> Pair:
    whole = Pair.joined(parts)
    return whole.at(torch.randperm(len(whole), generator=generator).to(whole.x.device))


def _blocks(stream: AbstractStream, site: Site | None) -> Iterator[Tensor]:
    """Yield the kept rows of a stream's blocks, as copies, since a block is overwritten when the next is asked for."""
    if site is None:
        raise RecipeError("train: a stream gives several sites; say which: site=Site(5)")
    for number in count():
        block = stream.block(number, [site])
        yield block.activations[site][block.keep].clone()
