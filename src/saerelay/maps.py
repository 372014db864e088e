"""Affine maps between the sites of a run, fitted on its training split: what its layers are compared through.

The raw spaces of two layers are not comparable; a dictionary folded through the map between them is (`transfer.fold`).
"""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, combinations
from typing import final

import torch
from rich.console import Console

from saerelay.checkpoint import Suite
from saerelay.corpus import Corpus
from saerelay.model import LanguageModel
from saerelay.moments import Moments
from saerelay.plan import Plan
from saerelay.site import Site
from saerelay.stream import AbstractStream, LiveStream
from saerelay.transfer import AffineMap, identity, map_between

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

    Moments are gathered when a map is first asked for, of all the plan's sites in one pass if `MOMENT_BYTES` holds
    them, and kept: who asks next finds them.
    """

    def __init__(self, plan: Plan, stream: AbstractStream, tokens: int, console: Console | None = None) -> None:
        self.plan, self.stream, self.tokens, self.console = plan, stream, tokens, console
        self.joints: list[Joint] = []

    @classmethod
    def of(cls, suite: Suite, model: LanguageModel, console: Console | None = None) -> "SiteMaps":
        """Those of a run."""
        plan, train = suite.plan, Corpus.open(suite.directory.tokens).train
        return cls(plan, LiveStream(model, train, plan), enough_tokens(plan, train.size), console)

    def between(self, pairs: Iterable[Pair]) -> dict[Pair, AffineMap]:
        """The affine map of each pair; identity where both are the same. TransferError if the tokens are too few.

        The two directions of a pair share their moments.
        """
        wanted = list(dict.fromkeys(pairs))
        moments = self.moments({(min(pair), max(pair)) for pair in wanted if pair[0] != pair[1]})
        maps = {pair: map_between("affine", self.plan.facts.width(pair[0]), m) for pair, m in moments.items()}
        maps |= {(b, a): between.reversed() for (a, b), between in maps.items()}
        maps |= {pair: identity(self.plan.facts.width(pair[0])) for pair in wanted if pair[0] == pair[1]}
        return {pair: maps[pair] for pair in wanted}

    def moments(self, pairs: Iterable[Pair]) -> dict[Pair, Moments]:
        """The moments of each pair."""
        wanted = list(dict.fromkeys(pairs))
        missing = [pair for pair in wanted if self._joint(pair) is None]
        everything = passes(self.plan, combinations(self.plan.sites, 2))
        for part in everything if missing and len(everything) == 1 else passes(self.plan, missing):
            with self.console.status("fitting maps between layers") if self.console else nullcontext():
                self.joints.append(
                    gather(self.plan, self.stream, {site for pair in part for site in pair}, self.tokens)
                )
        found = dict[Pair, Moments]()
        for a, b in wanted:
            joint = self._joint((a, b))
            assert joint, f"moments of {a} and {b} were not gathered"
            found[a, b] = joint.moments.between(joint.place[a], joint.place[b])
        return found

    def _joint(self, pair: Pair) -> Joint | None:
        return next((joint for joint in self.joints if set(pair) <= set(joint.place)), None)


def gather(plan: Plan, stream: AbstractStream, sites: Iterable[Site], tokens: int) -> Joint:
    """Moments of all sites together, on at least `tokens` positions, whole blocks, from the start of a stream."""
    sites = sorted(sites)
    ends = list(accumulate((plan.facts.width(site) for site in sites), initial=0))
    joint = Moments.empty(ends[-1], 0)
    opened = sorted({*sites, plan.probe_site} if plan.probe_site else sites)
    for number in range(math.ceil(tokens / plan.block_tokens)):
        block = stream.block(number, opened)
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
