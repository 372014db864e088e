"""What a tensor is the sum of, read from the graph that autograd records of a forward.

The graph exists on torch's meta device as well, so that all of this can be told without weights.

A `Place` is a node of the graph and the number of one of its outputs: it stands for a tensor's
value, whatever its shape.
"""

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor

Place = tuple[Any, int]

_SAME_NUMBERS = {
    "AliasBackward0",
    "CloneBackward0",
    "PermuteBackward0",
    "ReshapeAliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "ToCopyBackward0",
    "TransposeBackward0",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
}
"""Operations that change shape or dtype and no number."""


def place_of(x: Tensor) -> Place | None:
    """Where a tensor's numbers were made; None for one that depends on no parameter."""
    if x.grad_fn is None:
        return None
    return made_at((x.grad_fn, x.output_nr))


def made_at(place: Place) -> Place:
    """The place at which the numbers at a place were made, behind views, copies and factors of 1."""
    node, number = place
    while node.name() in _SAME_NUMBERS or _multiplies_by_one(node):
        following = [before for before in node.next_functions if before[0] is not None]
        if len(following) != 1:
            break
        node, number = following[0]
    return node, number


def _multiplies_by_one(node: Any) -> bool:
    """Whether a node is a product with the number 1, such as a multiplier that is not used."""
    if node.name() != "MulBackward0":
        return False
    operands = [before for before, _ in node.next_functions]
    if None not in operands:
        return False
    factor = node._saved_other if operands[1] is None else node._saved_self
    return isinstance(factor, Tensor) and factor.numel() == 1 and not factor.is_meta and float(factor) == 1.0


def addends(place: Place) -> list[Place | None] | None:
    """The two places whose plain sum a place is (None for a constant), or None if it is no sum."""
    node, _ = place
    if node.name() != "AddBackward0" or node._saved_alpha != 1:
        return None
    found: list[Place | None] = []
    for before, number in node.next_functions:
        found.append(None if before is None else made_at((before, number)))
    return found


def ancestors(place: Place, *, until: Collection[Place]) -> set[Any]:
    """The nodes that a place is computed from, itself included, without those behind `until`."""
    behind = {node for node, _ in until}
    found = {place[0]}
    waiting = [place[0]]
    while waiting:
        for before, _ in waiting.pop().next_functions:
            if before is not None and before not in found and before not in behind:
                found.add(before)
                waiting.append(before)
    return found


class Sum:
    """A residual stream taken apart: `end` as the sum of `start` and of what is added to it on the way.

    `parts` are places at which the taking apart stops. A norm of the stream itself, behind the
    addition (as in BERT), is passed: `norms` gives the place before each place that is a norm's.
    """

    def __init__(self, end: Place, start: Place, parts: Collection[Place], norms: dict[Place, Place]) -> None:
        self.start = start
        self.parts = set(parts)
        self.norms: dict[Place, Place] = {}
        self._holds = self._stream_places(end)
        if end not in self._holds:
            # A layer that norms its input before it adds to it does not add to the stream as it is.
            self.norms = {place: before for place, before in norms.items() if before != start}
            self._holds = self._stream_places(end)
        self.stream = set(self._holds)
        """Places of the residual stream: `end`, and all between it and `start`."""
        self.terms: list[Place | None] = []
        """What is added; None for constants."""
        self.n_starts = 0
        """How many times `start` is in the sum: 1, unless the layer scales its input."""
        if end in self.stream:
            self._collect(end)

    def _below(self, place: Place) -> list[Place | None]:
        """What a place of the stream is the sum of, or the norm of."""
        if place == self.start:
            return []
        if place in self.norms:
            return [self.norms[place]]
        return addends(place) or []

    def _stream_places(self, end: Place) -> list[Place]:
        """The places from `end` down of which `start` is an addend, directly or not."""
        parents: dict[Place, list[Place]] = {end: []}
        order = [end]
        for place in order:
            for below in self._below(place):
                if below is None:
                    continue
                if below not in parents:
                    parents[below] = []
                    order.append(below)
                parents[below].append(place)
        found: list[Place] = []
        waiting = [self.start] if self.start in parents else []
        while waiting:
            place = waiting.pop()
            if place not in found:
                found.append(place)
                waiting += parents[place]
        return found

    def _collect(self, place: Place) -> None:
        if place == self.start:
            self.n_starts += 1
            return
        for below in self._below(place):
            if below in self.stream:
                self._collect(below)
            else:
                self.terms += self._split(below)

    def _split(self, place: Place | None) -> Iterator[Place | None]:
        """A term that is a sum itself (attention and MLP in parallel) is split, unless it is a part."""
        summands = None if place is None or place in self.parts else addends(place)
        if summands is None:
            yield place
            return
        for summand in summands:
            yield from self._split(summand)
