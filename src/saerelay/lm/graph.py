"""The addends of a tensor, read from the graph that autograd records of a forward.

The graph exists on torch's meta device as well, so no weights are needed for any of this.

A `Place` is a node of the graph and the number of one of its outputs: it stands for a tensor's
value, whatever its shape.
"""

from collections.abc import Collection
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
"""Operations that change shape or dtype but no number."""


def place_of(x: Tensor) -> Place | None:
    """The place where a tensor's numbers were computed; None if they depend on no parameter."""
    if x.grad_fn is None:
        return None
    return made_at((x.grad_fn, x.output_nr))


def made_at(place: Place) -> Place:
    """Trace a place back, through views, copies and factors of 1, to where its numbers were computed."""
    node, number = place
    while node.name() in _SAME_NUMBERS or _multiplies_by_one(node):
        following = [before for before in node.next_functions if before[0] is not None]
        if len(following) != 1:
            break
        node, number = following[0]
    return node, number


def _multiplies_by_one(node: Any) -> bool:
    """Whether a node is a product with the number 1, such as an unused multiplier."""
    if node.name() != "MulBackward0":
        return False
    operands = [before for before, _ in node.next_functions]
    if None not in operands:
        return False
    factor = node._saved_other if operands[1] is None else node._saved_self
    return isinstance(factor, Tensor) and factor.numel() == 1 and not factor.is_meta and float(factor) == 1.0


def addends(place: Place) -> list[Place | None] | None:
    """The two places that add up to a place (None stands for a constant); None if it is not a plain sum."""
    node, _ = place
    if node.name() != "AddBackward0" or node._saved_alpha != 1:
        return None
    found: list[Place | None] = []
    for before, number in node.next_functions:
        found.append(None if before is None else made_at((before, number)))
    return found


def ancestors(place: Place, *, until: Collection[Place]) -> set[Any]:
    """The nodes that a place is computed from, itself included, stopping at the places in `until`."""
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
    """The decomposition of a residual stream: `end` as the sum of `start` and the terms added to it.

    The decomposition stops at the places in `parts`. A norm of the stream itself, after the addition (as in BERT), is
    passed through: `norms` maps the output place of a norm to its input place.

    How to see this: the places of a sum form a graph, from `end` down to what it is added up from. The stream consists
    of the places from which a way leads down to `start`; all other places right below the stream are terms.
    """

    def __init__(self, end: Place, start: Place, parts: Collection[Place], norms: dict[Place, Place]) -> None:
        self.start = start
        self.parts = set(parts)
        self.norms: dict[Place, Place] = {}
        self.stream = self._between(end)
        """Places of the residual stream: `end`, and all places between it and `start`; none if no sum leads there."""
        if not self.stream:
            # Plain sums do not lead from `end` to `start`; perhaps sums and norms do. A norm of `start` itself does not
            # count: a layer that norms its input before the addition does not add to the stream as it is.
            self.norms = {after: before for after, before in norms.items() if before != start}
            self.stream = self._between(end)
        self.terms: list[Place | None] = []
        """The terms that are added; None for constants."""
        self.n_starts = 0
        """How many times `start` occurs in the sum: 1, unless the layer scales its input; 0 without a stream."""
        if self.stream:
            self._collect(end)

    def _below(self, place: Place) -> list[Place | None]:
        """The places that add up to a place, or the input of a norm; [] where the decomposition ends."""
        if place == self.start:
            return []
        if place in self.norms:
            return [self.norms[place]]
        return addends(place) or []

    def _between(self, end: Place) -> set[Place]:
        """The places from which a way leads down to `start`, among `end` and all places below it."""
        above: dict[Place, list[Place]] = {end: []}
        waiting = [end]
        while waiting:
            place = waiting.pop()
            for below in self._below(place):
                if below is None:
                    continue
                if below not in above:
                    above[below] = []
                    waiting.append(below)
                above[below].append(place)
        if self.start not in above:
            return set()

        found = {self.start}
        waiting = [self.start]
        while waiting:
            for place in above[waiting.pop()]:
                if place not in found:
                    found.add(place)
                    waiting.append(place)
        return found

    def _collect(self, place: Place) -> None:
        """Add up what a place of the stream consists of, as often as it occurs in the sum."""
        if place == self.start:
            self.n_starts += 1
            return
        for below in self._below(place):
            if below in self.stream:
                self._collect(below)
            else:
                self.terms += self._split(below)

    def _split(self, term: Place | None) -> list[Place | None]:
        """The terms that a term consists of, if it is itself a sum (attention and MLP in parallel) and not a part."""
        if term is None or term in self.parts:
            return [term]
        summands = addends(term)
        if summands is None:
            return [term]
        split: list[Place | None] = []
        for summand in summands:
            split += self._split(summand)
        return split
