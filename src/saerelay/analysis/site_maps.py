"""Affine maps between the sites of a run, fitted on its training split, through which its layers are compared.

The raw spaces of two layers are not comparable, but a dictionary folded through the map between them can be compared
(`transfer.fold`).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, combinations
from typing import final

import numpy as np
import torch

from saerelay.analysis.progress import HIDDEN, Track
from saerelay.data.stream import AbstractStream, LiveStream
from saerelay.lm.model import LanguageModel
from saerelay.planning.leg import Leg
from saerelay.planning.plan import Plan
from saerelay.sae.maps import AffineMap, crossed, identity, map_between
from saerelay.sae.moments import Moments
from saerelay.site import Site

MAP_TOKENS = 65_536
"""Least number of token positions on which maps are fitted, unless the corpus has fewer; see `enough_tokens`."""
MOMENT_BYTES = 2 * 2**30
"""Most bytes of moments gathered in one pass over the tokens; more pairs of sites take more passes."""

SitePair = tuple[Site, Site]
"""Source and target."""


def sites_between(source: Leg, target: Leg) -> list[SitePair]:
    """Return the pairs of sites between which a dictionary is carried: those it reads, and those it reconstructs."""
    return list(dict.fromkeys([(source.site, target.site), (source.site_out, target.site_out)]))


def map_of_legs(maps: Mapping[SitePair, AffineMap], source: Leg, target: Leg) -> AffineMap:
    """Return the map through which the source's dictionary is folded for comparison with the target's."""
    inputs = maps[source.site, target.site]
    if not source.is_transcoder:
        return inputs
    return crossed(inputs, maps[source.site_out, target.site_out])


def enough_tokens(plan: Plan, available: int) -> int:
    """Return the number of positions for maps between a plan's sites: 64 per dimension if available, whole blocks."""
    widest = max(plan.facts.width(site) for site in plan.sites)
    wanted = max(MAP_TOKENS, 64 * widest)
    n_blocks = min(math.ceil(wanted / plan.block_tokens), available // plan.block_tokens)
    return max(1, n_blocks) * plan.block_tokens


@dataclass(frozen=True)
class JointMoments:
    """Moments of the activations of several sites, side by side."""

    columns: dict[Site, slice]
    """Columns of the joint vector that hold each site's activations."""
    moments: Moments

    def between(self, pair: SitePair) -> Moments:
        """Return the moments of a pair of sites."""
        source, target = pair
        return self.moments.between(self.columns[source], self.columns[target])


@final
class SiteMaps:
    """Maps between the sites of a run, fitted on the first `tokens` positions of its training split, or a few more.

    If the moments of all sites fit into `MOMENT_BYTES`, they are gathered in one pass when a map is first asked for,
    and kept; else each request gathers the moments of a few sites at a time.
    """

    def __init__(self, plan: Plan, stream: AbstractStream, tokens: int, track: Track = HIDDEN.track) -> None:
        self.plan = plan
        self.stream = stream
        self.tokens = tokens
        self.track = track
        self.everything: JointMoments | None = None

    @classmethod
    def of(cls, plan: Plan, model: LanguageModel, train: np.ndarray, track: Track = HIDDEN.track) -> "SiteMaps":
        """Make the maps of a run, from its training sequences (N, context)."""
        return cls(plan, LiveStream(model, train, plan), enough_tokens(plan, train.size), track)

    def between(self, pairs: Iterable[SitePair]) -> dict[SitePair, AffineMap]:
        """Return the affine map of each pair; the identity if both sites are the same.

        The two directions of a pair share their moments. Raises TransferError if there are too few tokens.
        """
        wanted = list(dict.fromkeys(pairs))
        maps = {}
        for source, target in wanted:
            if source == target:
                maps[source, target] = identity(self.plan.facts.width(source))
        one_way = [(min(pair), max(pair)) for pair in wanted if pair[0] != pair[1]]
        for (lower, higher), moments in self.moments(one_way):
            balance = self.plan.recipe.train.optimizer.balance
            upwards = map_between("affine", self.plan.facts.width(lower), moments, balance)
            maps[lower, higher] = upwards
            maps[higher, lower] = upwards.reversed()
        return {pair: maps[pair] for pair in wanted}

    def moments(self, pairs: Iterable[SitePair]) -> Iterator[tuple[SitePair, Moments]]:
        """Yield the moments of each of the given pairs of the plan's sites."""
        wanted = sorted(dict.fromkeys(pairs), key=lambda pair: (pair[0].module, pair[1].module))
        at_once = passes(self.plan, combinations(self.plan.sites, 2))
        if wanted and self.everything is None and len(at_once) == 1:
            self.everything = self._gather(at_once[0])
        for part in [wanted] if self.everything else passes(self.plan, wanted):
            joint = self.everything or self._gather(part)
            for pair in part:
                yield pair, joint.between(pair)

    def _gather(self, pairs: Iterable[SitePair]) -> JointMoments:
        sites = {site for pair in pairs for site in pair}
        return gather(self.plan, self.stream, sites, self.tokens, track=self.track)


def gather(
    plan: Plan, stream: AbstractStream, sites: Iterable[Site], tokens: int, *, track: Track = HIDDEN.track
) -> JointMoments:
    """Gather the joint moments of all sites on at least `tokens` positions, in whole blocks, from a stream's start."""
    sites = sorted(sites)
    open_sites = plan.with_probe(sites)
    ends = list(accumulate((plan.facts.width(site) for site in sites), initial=0))
    moments: Moments | None = None
    for number in track(range(math.ceil(tokens / plan.block_tokens)), "fitting maps between layers on blocks"):
        block = stream.block(number, open_sites)
        if moments is None:
            moments = Moments.empty(ends[-1], 0, block.keep.device)
        for rows in block.chunks(sites):
            x = torch.cat([rows[site] for site in sites], dim=1)
            moments.add(x, x[:, :0])
    assert moments is not None
    columns = {site: slice(ends[i], ends[i + 1]) for i, site in enumerate(sites)}
    return JointMoments(columns, moments)


def passes(plan: Plan, pairs: Iterable[SitePair]) -> list[list[SitePair]]:
    """Divide pairs into parts for which the products of all sites' activations take at most `MOMENT_BYTES`."""
    parts: list[list[SitePair]] = []
    sites: set[Site] = set()
    for pair in dict.fromkeys(pairs):
        wider = sites | set(pair)
        width = sum(plan.facts.width(site) for site in wider)
        if not parts or 8 * width**2 > MOMENT_BYTES:
            parts.append([])
            wider = set(pair)
        parts[-1].append(pair)
        sites = wider
    return parts
