"""Affine maps between the sites of a run, fitted on its training split: what its layers are compared through.

The raw spaces of two layers are not comparable; a dictionary folded through the map between them is (`transfer.fold`).
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, combinations
from typing import final

import torch
from rich.console import Console

from saerelay.data.corpus import Corpus
from saerelay.data.stream import AbstractStream, LiveStream
from saerelay.lm.model import LanguageModel
from saerelay.planning.plan import Plan
from saerelay.runs.suite import PublishedSuite
from saerelay.sae.moments import Moments
from saerelay.sae.transfer import AffineMap, identity, map_between
from saerelay.site import Site

MAP_TOKENS = 65_536
"""Token positions that maps are fitted on at least, unless the corpus has fewer; see `enough_tokens`."""
MOMENT_BYTES = 2 * 2**30
"""Moments gathered in one pass over the tokens stay under this; more pairs of sites take more passes."""

Pair = tuple[Site, Site]
"""Source and target."""


def enough_tokens(plan: Plan, available: int) -> int:
    """Positions that maps between a plan's sites are fitted on: 64 times the width, in whole blocks, if there are."""
    wanted = max(MAP_TOKENS, 64 * max(plan.facts.width(site) for site in plan.sites))
    return max(1, min(math.ceil(wanted / plan.block_tokens), available // plan.block_tokens)) * plan.block_tokens


@dataclass(frozen=True)
class Joint:
    """Moments of the activations of several sites, side by side."""

    place: dict[Site, slice]
    moments: Moments


@final
class SiteMaps:
    """Maps between the sites of a run, fitted on (at least) the first `tokens` positions of its training split.

    Moments of all the plan's sites are gathered in one pass when a map is first asked for, and kept, if `MOMENT_BYTES`
    holds them; else those of a few sites at a time, for each who asks.
    """

    def __init__(self, plan: Plan, stream: AbstractStream, tokens: int, console: Console | None = None) -> None:
        self.plan, self.stream, self.tokens, self.console = plan, stream, tokens, console
        self.everything: Joint | None = None

    @classmethod
    def of(cls, suite: PublishedSuite, model: LanguageModel, console: Console | None = None) -> "SiteMaps":
        """Those of a run."""
        plan, train = suite.plan, Corpus.open(suite.directory.tokens).train
        return cls(plan, LiveStream(model, train, plan), enough_tokens(plan, train.size), console)

    def between(self, pairs: Iterable[Pair]) -> dict[Pair, AffineMap]:
        """The affine map of each pair; identity where both are the same. TransferError if the tokens are too few.

        The two directions of a pair share their moments.
        """
        wanted, width = list(dict.fromkeys(pairs)), self.plan.facts.width
        maps = {pair: identity(width(pair[0])) for pair in wanted if pair[0] == pair[1]}
        for (a, b), moments in self.moments((min(pair), max(pair)) for pair in wanted if pair[0] != pair[1]):
            maps[a, b] = map_between("affine", width(a), moments)
            maps[b, a] = maps[a, b].reversed()
        return {pair: maps[pair] for pair in wanted}

    def moments(self, pairs: Iterable[Pair]) -> Iterator[tuple[Pair, Moments]]:
        """The moments of each pair of the plan's sites, one pair after the other."""
        wanted = list(dict.fromkeys(pairs))
        at_once = passes(self.plan, combinations(self.plan.sites, 2))
        if wanted and self.everything is None and len(at_once) == 1:
            self.everything = self._gather(at_once[0])
        for part in [wanted] if self.everything else passes(self.plan, wanted):
            joint = self.everything or self._gather(part)
            for a, b in part:
                yield (a, b), joint.moments.between(joint.place[a], joint.place[b])

    def _gather(self, pairs: Iterable[Pair]) -> Joint:
        sites = {site for pair in pairs for site in pair}
        with self.console.status("fitting maps between layers") if self.console else nullcontext():
            return gather(self.plan, self.stream, sites, self.tokens)


def gather(plan: Plan, stream: AbstractStream, sites: Iterable[Site], tokens: int) -> Joint:
    """Moments of all sites together, on at least `tokens` positions, whole blocks, from the start of a stream."""
    sites = sorted(sites)
    ends = list(accumulate((plan.facts.width(site) for site in sites), initial=0))
    joint = Moments.empty(ends[-1], 0)
    for number in range(math.ceil(tokens / plan.block_tokens)):
        block = stream.block(number, plan.with_probe(sites))
        for rows in block.chunks(sites):
            x = torch.cat([rows[site] for site in sites], dim=1)
            joint.add(x, x[:, :0])
    return Joint({site: slice(*ends[i : i + 2]) for i, site in enumerate(sites)}, joint)


def passes(plan: Plan, pairs: Iterable[Pair]) -> list[list[Pair]]:
    """The pairs, cut where the products of all their sites' activations would take more than `MOMENT_BYTES`."""
    parts, sites = list[list[Pair]](), set[Site]()
    for pair in dict.fromkeys(pairs):
        wider = sites | set(pair)
        if not parts or 8 * sum(plan.facts.width(site) for site in wider) ** 2 > MOMENT_BYTES:
            parts.append([])
            wider = set(pair)
        parts[-1].append(pair)
        sites = wider
    return parts
