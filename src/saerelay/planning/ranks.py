"""Which rank trains which leg, which sites it needs, and how much of the language model's work it does.

None of this is part of a plan: it is computed anew at every start, from the plan and the number of ranks, and no bit of
the results depends on it.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

from saerelay.errors import PlanError
from saerelay.planning.cost import model_bytes, peak_state_bytes, step_flops
from saerelay.planning.facts import ModelFacts
from saerelay.planning.leg import Leg
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import ModelSpec
from saerelay.site import Site
from saerelay.spec import Spec


def check_groups(model: ModelSpec, n_ranks: int) -> None:
    """Raise PlanError unless ranks form whole groups, each of which holds the language model (`tensor_parallel`)."""
    degree = model.tensor_parallel
    if n_ranks % degree:
        count = "one process" if n_ranks == 1 else f"{n_ranks} ranks"
        raise PlanError(
            f"model.tensor_parallel is {degree}, and {count} cannot form groups of {degree}; start a multiple of "
            f"{degree}, such as: torchrun --nproc-per-node {degree} -m saerelay train ..."
        )


def owners(plan: Plan, n_ranks: int) -> dict[str, int]:
    """Return the rank that trains each leg, by leg.

    Legs are placed in order of cost, the most expensive first, each on the rank that has the least to do while the leg
    is in training. Legs that are trained at different times may share a rank.
    """
    costs = {leg.id: leg_flops(leg, plan.facts) for leg in plan.legs}
    by_rank: list[list[Leg]] = [[] for _ in range(n_ranks)]
    for leg in sorted(plan.legs, key=lambda leg: -costs[leg.id]):  # legs of equal cost stay in the plan's order
        loads = [sum(costs[other.id] * _overlap(leg, other) for other in legs) for legs in by_rank]
        elsewhere = [all(other.site != leg.site for other in legs) for legs in by_rank]
        best = min(range(n_ranks), key=lambda rank: (loads[rank], elsewhere[rank], rank))
        by_rank[best].append(leg)
    return {leg.id: rank for rank, legs in enumerate(by_rank) for leg in legs}


def leg_flops(leg: Leg, facts: ModelFacts) -> float:
    """Return the operations of a leg's training steps over its whole budget."""
    executed, _ = step_flops(leg.dictionary, facts, facts.width(leg.site), facts.width(leg.site_out))
    return max(1, leg.budget_tokens) * executed


def _overlap(leg: Leg, other: Leg) -> float:
    """Return the share of `other`'s training that takes place during the training of `leg`."""
    common = min(leg.end, other.end) - max(leg.fold_at, other.fold_at)
    return max(0, common) / (other.end - other.fold_at)


def needed_sites(
    plan: Plan, owner: Mapping[str, int], n_ranks: int, number: int, open_sites: Sequence[Site]
) -> list[list[Site]]:
    """Return the sites that each rank needs in block `number`: those of its legs and the sources of its coming hops.

    The first rank that needs the probe site looks for outlier norms there, or rank 0 if no rank does (see `prober`).
    """
    first = number * plan.block_tokens
    stop = first + plan.block_tokens
    needed: list[set[Site]] = [set() for _ in range(n_ranks)]
    for leg in plan.legs:
        needed[owner[leg.id]] |= plan.sites_of(leg, first, stop)
    if plan.probe_site:
        needed[prober(needed, plan.probe_site)].add(plan.probe_site)
    return [sorted(sites & set(open_sites)) for sites in needed]


def prober(needed: Sequence[set[Site]] | Sequence[list[Site]], probe_site: Site) -> int:
    """Return the rank that looks for outlier norms in a block."""
    ranks = [rank for rank, sites in enumerate(needed) if probe_site in sites]
    return ranks[0] if ranks else 0


def deal(n_parts: int, busy: Sequence[float], seconds_per_part: float, degree: int = 1) -> list[range]:
    """Deal the `n_parts` micro-batches of a block to the ranks that forward them, so that all finish at the same time.

    `busy` are the seconds per block that each rank spends on its legs. The `degree` ranks of a group, which hold the
    language model together, forward the same micro-batches.

    >>> deal(8, [0.0, 0.0, 4.0], seconds_per_part=1.0)
    [range(0, 4), range(4, 8), range(8, 8)]
    >>> deal(3, [0.0, 1.0, 0.0, 0.0], seconds_per_part=1.0, degree=2)
    [range(0, 1), range(0, 1), range(1, 3), range(1, 3)]
    """
    busy_groups = _busy_groups(busy, degree)
    counts = [0] * len(busy_groups)
    for _ in range(n_parts):
        finished = [seconds + n * seconds_per_part for seconds, n in zip(busy_groups, counts, strict=True)]
        least = min(range(len(counts)), key=lambda group: (finished[group], counts[group], group))
        counts[least] += 1
    stops = list(accumulate(counts))
    shares = [range(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]
    return [shares[rank // degree] for rank in range(len(busy))]


def _busy_groups(busy: Sequence[float], degree: int) -> list[float]:
    """Return the seconds that the busiest rank of each group of `degree` ranks spends on its legs."""
    return [max(busy[first : first + degree]) for first in range(0, len(busy), degree)]


def peers(rank: int, n_ranks: int, degree: int) -> list[int]:
    """Return the ranks that a rank exchanges activations with: those with its place in the other groups.

    A group has `degree` ranks. The other ranks of its own group have forwarded the same micro-batches themselves.

    >>> peers(1, 6, degree=2), peers(1, 3, degree=1)
    ([3, 5], [0, 2])
    """
    return [other for other in range(n_ranks) if other != rank and other % degree == rank % degree]


# --- predictions for a number of ranks -----------------------------------------------------------------------------


class Speeds(Spec):
    """Speeds measured on one machine, in seconds per token."""

    lm: float
    """Of the language model, up to the deepest site of the plan."""
    steps: dict[str, float]
    """Of a training step, by leg."""


class RankShare(Spec):
    """The part of a plan that falls to one rank."""

    legs: list[str]
    memory_bytes: float
    """The model, training state of live legs, a block's activations at their sites, and buffers for the exchange."""


class Spread(Spec):
    """A plan on several ranks."""

    ranks: list[RankShare]
    exchange_bytes: float
    """Activations that ranks send to one another over the whole plan."""
    seconds: float | None
    """Time of the language model and the training steps, at given speeds, without the exchange."""
    seconds_of_one: float | None
    """The same for a single process."""


def spread(plan: Plan, n_ranks: int, speeds: Speeds | None = None) -> Spread:
    """Predict the work of each rank, and how long a plan takes on all of them.

    In each stretch of blocks with the same open sites, the language model's work goes to the ranks with the least to do
    (`deal`). So a block takes the time of all its work divided by the number of ranks, but at least that of the rank
    whose legs take longest. Activations that a rank does not compute itself are sent to it. Without `speeds`, all ranks
    are taken to forward equally much.
    """
    check_groups(plan.recipe.model, n_ranks)
    degree = plan.recipe.model.tensor_parallel
    owner = owners(plan, n_ranks)
    exchanged = 0.0
    seconds = 0.0
    seconds_of_one = 0.0
    most_per_token = [0.0] * n_ranks  # bytes of activations that each rank needs of a token, in its fullest block
    number = 0
    for n_blocks, sites in plan.stretches():
        first_block = number
        number += n_blocks
        if not sites:
            continue
        needed = needed_sites(plan, owner, n_ranks, first_block, sites)
        per_token = [float(_bytes_per_token(plan.facts, own)) for own in needed]
        most_per_token = [max(pair) for pair in zip(most_per_token, per_token, strict=True)]
        n_tokens = n_blocks * plan.block_tokens
        shares = [degree / n_ranks] * n_ranks
        if speeds:
            lm, busy = _work(plan, owner, n_ranks, speeds, first_block * plan.block_tokens, sites)
            all_work = lm + sum(busy)
            seconds += n_tokens * max(max(busy), all_work / n_ranks)
            seconds_of_one += n_tokens * all_work
            shares = forward_shares(busy, lm, degree)
        received = [own * (1 - share) for own, share in zip(per_token, shares, strict=True)]
        exchanged += n_tokens * sum(received)

    buffer_per_token = sum(most_per_token) / n_ranks if n_ranks > degree else 0.0
    ranks = []
    for rank in range(n_ranks):
        legs = [leg for leg in plan.legs if owner[leg.id] == rank]
        state = peak_state_bytes(legs, plan.facts, plan.block_tokens) if legs else 0.0
        activations = plan.block_tokens * (most_per_token[rank] + 2 * buffer_per_token)
        memory = state + activations + model_bytes(plan)
        ranks.append(RankShare(legs=[leg.id for leg in legs], memory_bytes=memory))
    return Spread(
        ranks=ranks,
        exchange_bytes=exchanged,
        seconds=seconds if speeds else None,
        seconds_of_one=seconds_of_one if speeds else None,
    )


def forward_shares(busy: Sequence[float], lm: float, degree: int = 1) -> list[float]:
    """Return the share of a block that each rank forwards, so that all finish at the same time.

    This is the limit of `deal` for very many parts.

    >>> forward_shares([0.0, 1.0, 9.0], lm=3.0)
    [0.6666666666666666, 0.3333333333333333, 0.0]
    """
    busy_groups = _busy_groups(busy, degree)
    seconds_of_all = lm / degree  # of a group that forwards the whole block
    finished_at = _common_end(busy_groups, seconds_of_all)
    shares = [max(0.0, finished_at - seconds) / seconds_of_all for seconds in busy_groups]
    return [shares[rank // degree] for rank in range(len(busy))]


def _common_end(busy: Sequence[float], work: float) -> float:
    """Return when groups finish that are busy for some time each, and divide further work among themselves.

    Groups that are busy until later take no part. This is water filling: the work is poured like water on the ground
    that `busy` describes, and the level that it reaches is returned.
    """
    lowest, *higher = sorted(busy)
    level = lowest + work
    for n_covered, seconds in enumerate(higher, start=1):
        if level <= seconds:
            break
        level = (level * n_covered + seconds) / (n_covered + 1)
    return level


def _bytes_per_token(facts: ModelFacts, sites: Sequence[Site]) -> int:
    return facts.bytes_per_value * sum(facts.width(site) for site in sites)


def _work(
    plan: Plan, owner: Mapping[str, int], n_ranks: int, speeds: Speeds, cursor: int, sites: Sequence[Site]
) -> tuple[float, list[float]]:
    """Return the seconds per token at a cursor: of the language model, and of each rank's legs."""
    lm = speeds.lm * plan.share_of_depth(sites)
    busy = [0.0] * n_ranks
    for leg in plan.legs:
        if leg.fold_at <= cursor < leg.end:
            busy[owner[leg.id]] += leg.schedule.reuse * speeds.steps[leg.id]
    return lm, busy
