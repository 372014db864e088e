"""Where a leg starts on the axis of token positions, and how large blocks are; the second half of `compile`."""

import math
from collections.abc import Mapping, Sequence

from saerelay.errors import PlanError
from saerelay.planning.cost import peak_state_bytes, state_bytes
from saerelay.planning.facts import ModelFacts
from saerelay.planning.leg import Leg
from saerelay.planning.leg_spec import LegSpec, tokens_of
from saerelay.planning.legs import Setting, sites_of
from saerelay.planning.plan import LM_BATCH_TOKENS
from saerelay.planning.recipe import Recipe
from saerelay.spec import rounded_up

MAX_BLOCK_TOKENS = 65_536
BLOCK_BYTES = 2**30
"""Bound on the activations of one block, in float32, if the recipe does not set `data.block_tokens`."""
BLOCK_BYTES_ON_GPU = 4 * 2**30
"""The same bound on a GPU, in the model's dtype."""
LM_BATCH_TOKENS_ON_GPU = 32_768
"""Tokens per forward pass of the language model on a GPU, which fewer tokens would not keep busy."""


def placed_leg(leg: Leg, spec: LegSpec, setting: Setting, legs: Sequence[Leg]) -> Leg:
    """Return a leg with its start: as early as its parent, `after` and memory allow; `legs` were placed before it."""
    needed = state_bytes(leg, setting.facts, setting.block_tokens)
    if needed > setting.memory_bytes:
        raise PlanError(
            f"leg {leg.id} alone needs {needed / 2**30:.1f} GiB of training state, more than the "
            f"{setting.memory_bytes / 2**30:.1f} GiB allowed; lower n_latents or raise train.memory_gib"
        )
    by_id = {other.id: other for other in legs}
    earliest = _earliest_start(leg, spec, setting, by_id)
    placed = leg.changed(start=_first_start_with_room(leg, earliest, setting, legs))
    parent = by_id.get(leg.parent)
    if parent:
        age = parent.schedule.reuse * max(0, placed.fold_at - parent.fold_at)
        placed = placed.changed(fork_at_tokens=min(parent.budget_tokens, age))
    return placed


def _earliest_start(leg: Leg, spec: LegSpec, setting: Setting, by_id: Mapping[str, Leg]) -> int:
    """Return the start from which on a leg's parent is old enough at its fold, and the leg it waits for has ended."""
    block = setting.block_tokens
    earliest = setting.begin
    parent = by_id.get(leg.parent)
    if parent and spec.hop:
        age = min(tokens_of(spec.hop.fork_at, parent.budget_tokens), parent.budget_tokens)
        forked_at = parent.fold_at + math.ceil(age / parent.schedule.reuse)
        moments_start = rounded_up(forked_at, block) - leg.moment_tokens
        earliest = max(earliest, parent.start, moments_start)
    if spec.after:
        earliest = max(earliest, rounded_up(by_id[spec.after].end, block))
    return earliest


def _first_start_with_room(leg: Leg, earliest: int, setting: Setting, legs: Sequence[Leg]) -> int:
    """Return the first start at which the training state of a leg fits into memory beside that of the others.

    Memory becomes free only where another leg ends: after the earliest start, only these borders are worth trying.
    """
    ends = {rounded_up(other.end, setting.block_tokens) for other in legs}
    for start in [earliest, *sorted(end for end in ends if end > earliest)]:
        peak = peak_state_bytes([*legs, leg.changed(start=start)], setting.facts, setting.block_tokens)
        if peak <= setting.memory_bytes:
            return start
    raise AssertionError("after the last leg's end there is room for one")


def choose_block(
    recipe: Recipe, facts: ModelFacts, specs: Sequence[LegSpec], batch_tokens: int, *, multiple_of: int = 1
) -> int:
    """Return the number of tokens shuffled together, from shapes alone: a multiple of batch and context.

    If the recipe does not give it, it is a multiple of `multiple_of` as well.
    """
    step = math.lcm(batch_tokens, recipe.data.context)
    asked = recipe.data.block_tokens
    if asked != "auto":
        if asked % step:
            raise PlanError(
                f"data.block_tokens is {asked}; it must be a multiple of train.batch_tokens "
                f"({batch_tokens}) and data.context ({recipe.data.context}), that is, of {step}"
            )
        return asked
    step = math.lcm(step, multiple_of)

    # A block has at least 16 batches. If all legs are hops, it also has at least the tokens of their refit. Legs from
    # scratch without tokens of their own are controls of these hops.
    least = 16 * batch_tokens
    hops_only = all(spec.hop for spec in specs) or not any(spec.tokens for spec in specs)
    if hops_only and any(_is_refitted(spec, recipe) for spec in specs):
        least = max(least, recipe.plan.hop.refit_tokens)

    # It has at most a quarter of the shortest leg's tokens, so that no leg sees only a few sequences at a time. Legs
    # that hardly train, compared with the longest, do not count.
    longest = max(spec.tokens for spec in specs)
    if hops_only:
        longest = max(longest, least)
    shortest = min([spec.tokens for spec in specs if spec.tokens >= longest / 16], default=longest)
    most = max(shortest // 4, least)
    most = min(most, _most_tokens_in_memory(recipe, facts, specs), MAX_BLOCK_TOKENS)

    # The longest leg divides into equal blocks, so that no part of the last is wasted.
    n_blocks = max(1, math.ceil(longest / max(step, most)))
    return rounded_up(longest / n_blocks, step)


def _most_tokens_in_memory(recipe: Recipe, facts: ModelFacts, specs: Sequence[LegSpec]) -> int:
    """Return the number of tokens whose activations at all sites of a plan fit into the bound on a block."""
    sites = {site for spec in specs for site in sites_of(spec, recipe)}
    numbers_per_token = max(facts.d_model, facts.d_attn_z) * len(sites)
    if facts.on_gpu:
        return BLOCK_BYTES_ON_GPU // (facts.bytes_per_value * numbers_per_token)
    return BLOCK_BYTES // (4 * numbers_per_token)


def lm_batch(facts: ModelFacts) -> int:
    """Return the tokens per forward pass of the language model, which depend on the device alone."""
    return LM_BATCH_TOKENS_ON_GPU if facts.on_gpu else LM_BATCH_TOKENS


def _is_refitted(spec: LegSpec, recipe: Recipe) -> bool:
    refit = spec.hop.refit if spec.hop else None
    return recipe.plan.hop.refit if refit is None else refit
