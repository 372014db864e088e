"""Affine maps between the sites of a run, fitted on its training split: what its layers are compared through.

The raw spaces of two layers are not comparable; a dictionary folded through the map between them is (`transfer.fold`).
"""

import math
from collections.abc import Iterable
from itertools import accumulate

import torch

from saerelay.moments import Moments
from saerelay.plan import Plan
from saerelay.site import Site
from saerelay.stream import AbstractStream
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


def gather_moments(plan: Plan, stream: AbstractStream, pairs: Iterable[Pair], tokens: int) -> dict[Pair, Moments]:
    """Moments of each pair of sites on at least `tokens` positions of the training split, whole blocks, from its start.

    One pass of the language model over them serves all pairs, if their sites fit into `MOMENT_BYTES` together.
    """
    found = dict[Pair, Moments]()
    for part in passes(plan, pairs):
        sites = sorted({site for pair in part for site in pair})
        ends = list(accumulate((plan.facts.width(site) for site in sites), initial=0))
        place = {site: slice(*ends[i : i + 2]) for i, site in enumerate(sites)}
        joint = Moments.empty(ends[-1], 0)
        probe = {plan.probe_site} if plan.probe_site else set()
        for number in range(math.ceil(tokens / plan.block_tokens)):
            block = stream.block(number, sorted({*sites, *probe}))
            for rows in block.chunks(sites):
                x = torch.cat([rows[site] for site in sites], dim=1)
                joint.add(x, x[:, :0])
        found |= {(a, b): joint.between(place[a], place[b]) for a, b in part}
    return found


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


def fit_maps(plan: Plan, stream: AbstractStream, pairs: Iterable[Pair], tokens: int) -> dict[Pair, AffineMap]:
    """The affine map of each pair (source, target), fitted on the first `tokens` positions of the training split.

    The two directions of a pair share their moments. Sites that are the same have the identity. Raises TransferError
    if the tokens are too few for the width.
    """
    wanted = list(dict.fromkeys(pairs))
    moments = gather_moments(plan, stream, ((min(p), max(p)) for p in wanted if p[0] != p[1]), tokens)
    there = {pair: map_between("affine", plan.facts.width(pair[0]), m) for pair, m in moments.items()}
    there |= {(b, a): between.reversed() for (a, b), between in there.items()}
    there |= {pair: identity(plan.facts.width(pair[0])) for pair in wanted if pair[0] == pair[1]}
    return {pair: there[pair] for pair in wanted}
