"""The cost of a plan, predicted from shapes alone: tokens, operations, memory, disk.

`saerelay plan` shows it, `choose` compares plans by it, and `analysis.summary` counts with it what a run has taken.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import get_args

from saerelay.planning.facts import ModelFacts
from saerelay.planning.leg import Leg
from saerelay.planning.plan import Plan
from saerelay.sae.spec import (
    L0_ROWS,
    REFIT,
    TRIAL,
    TRIAL_ROWS,
    Method,
    SizedDictionarySpec,
    Solver,
    takes_sparse_step,
)
from saerelay.spec import Spec


class Cost(Spec):
    """The cost of a plan; `flops` are operations executed, `flops_dense_equivalent` those of dense steps."""

    lm_tokens: int
    """Token positions read by the language model."""
    sae_samples: int
    """Activations trained or refitted on, summed over legs."""
    flops: float
    lm_flops: float
    """The language model's part of `flops`, below which no suite can go."""
    flops_dense_equivalent: float
    memory_bytes: float
    """The largest training state of all legs live at the same time, the activations of one block at the most sites that
    are open at a time, and the language model (or one rank's part of it)."""
    disk_bytes: float
    """Published dictionaries, snapshots, two copies of the saved state, and the tokens."""
    cache_bytes: float
    """Size of `data.cache` if it is empty at first and no sequence is read twice; 0 without a cache."""


TYPICAL_L0 = 32.0
"""Active latents per token that are assumed for an architecture without a target L0."""


def step_flops(dictionary: SizedDictionarySpec, facts: ModelFacts, width: int, width_out: int) -> tuple[float, float]:
    """Return the operations of a training step per token: (executed, dense equivalent).

    `width_out` is the width of what is reconstructed. The dense equivalent is six operations per weight, 12·D·F for
    an SAE. A skip connection has no codes, so that it takes its product and its gradient in either case.
    """
    skip = 4.0 * width * width_out if dictionary.skip_connection else 0.0
    dense = 6.0 * dictionary.n_latents * (width + width_out) + skip
    if not takes_sparse_step(facts.device):
        return dense, dense
    encoder = 2.0 * width * dictionary.n_latents
    active = (2.0 * width + 6.0 * width_out) * (dictionary.l0 or TYPICAL_L0)
    return encoder + active + skip, dense


def moments_flops(width: int, tokens: int) -> float:
    """Return the operations of the moments of two sites of one width on some tokens: (2·width)² products."""
    return tokens * 8.0 * width**2


def refit_flops(
    dictionary: SizedDictionarySpec, width: int, width_out: int, tokens: int, solver: Solver = REFIT
) -> float:
    """Return the operations of a decoder refit on some tokens: codes, normal equations, and their solution.

    For a dictionary too wide to factor the equations, as many iterations are counted as there may be.
    """
    F = dictionary.n_latents
    active = tokens * (dictionary.l0 or TYPICAL_L0)
    codes = 2.0 * tokens * width * F + 4.0 * active * width_out
    if F > solver.direct_latents:
        return codes + solver.iterations * 4.0 * active * width_out
    return codes + 2.0 * active * F + F**3 / 3 + 2.0 * F**2 * width_out


def fit_flops(leg: Leg, facts: ModelFacts, block_tokens: int) -> float:
    """Return the operations of a leg's closed forms: moments of both sites, the trials of maps, and the refit.

    A transcoder has a second map, of what it reconstructs. A leg that several layers share has a map from each of the
    other layers, applied to their activations in training.
    """
    width = facts.width(leg.site)
    width_out = facts.width(leg.site_out)
    n_maps = len(leg.shared_layers) or 1
    flops = n_maps * moments_flops(width, leg.moment_tokens)
    if leg.is_transcoder:
        flops += moments_flops(width_out, leg.moment_tokens)
    if leg.shared_layers:
        flops += leg.budget_tokens * 2.0 * width**2
    if leg.method == "auto":
        # Every map is tried and, if the leg is to be trained, a random dictionary (decision 032).
        n_trials = len(get_args(Method)) + int(leg.budget_tokens > 0)
        rows = min(TRIAL_ROWS, max(leg.refit_tokens, min(L0_ROWS, block_tokens)))
        flops += n_trials * refit_flops(leg.dictionary, width, width_out, rows, TRIAL)
    if leg.refit_tokens:
        flops += refit_flops(leg.dictionary, width, width_out, leg.refit_tokens)
    return flops


def forward_flops(facts: ModelFacts, n_layers: int, context: int) -> float:
    """Return the operations per token of the language model's first `n_layers` layers, attention included."""
    used = facts.layer_params - facts.idle_layer_params
    return n_layers * (2.0 * used + 4.0 * context * facts.d_attn_z)


def parameters(leg: Leg, facts: ModelFacts) -> int:
    """Return the number of parameters of a leg's dictionary."""
    width = facts.width(leg.site)
    width_out = facts.width(leg.site_out)
    skip = width * width_out if leg.dictionary.skip_connection else 0
    return leg.dictionary.n_latents * (width + width_out + 1) + width_out + skip


def state_bytes(leg: Leg, facts: ModelFacts, block_tokens: int) -> float:
    """Return the size of a leg's weights, gradients and Adam's two moments, in float32, and of the blocks it keeps."""
    width = facts.width(leg.site)
    if leg.is_transcoder:
        width += facts.width(leg.site_out)
    kept_tokens = leg.n_kept_blocks(block_tokens) * block_tokens
    return 16.0 * parameters(leg, facts) + float(facts.bytes_per_value * kept_tokens * width)


def peak_state_bytes(legs: Sequence[Leg], facts: ModelFacts, block_tokens: int) -> float:
    """Return the largest training state of all legs that are live at the same time.

    Along the axis, a leg's state is added where it starts and subtracted where it ends; ends come before starts.
    """
    changes = []
    for leg in legs:
        size = state_bytes(leg, facts, block_tokens)
        changes += [(leg.start, size), (leg.end, -size)]
    return max(accumulate(size for _, size in sorted(changes)))


def model_bytes(plan: Plan) -> float:
    """Return the size of the language model's weights on one rank; with `tensor_parallel`, of its part of each layer.

    Weights outside the layers count in full, although ranks divide most models' embeddings among themselves as well.
    """
    facts = plan.facts
    in_layers = facts.n_layers * facts.layer_params
    on_rank = facts.model_params - in_layers + in_layers / plan.recipe.model.tensor_parallel
    return float(facts.bytes_per_value * on_rank)


def disk_bytes(plan: Plan, legs: Sequence[Leg]) -> float:
    """Return what training some legs of a plan writes: dictionaries, snapshots, two copies of the state, and tokens.

    As much text is kept as the plan reads, if there is that much: `data.epochs` is how often it may be read otherwise.
    """
    weights = sum(4.0 * parameters(leg, plan.facts) * (1 + len(leg.schedule.snapshots)) for leg in legs)
    states = 2 * 0.75 * peak_state_bytes(legs, plan.facts, plan.block_tokens)
    id_bytes = 2.0 if plan.facts.tokens.vocab_size <= 2**16 else 4.0
    n_ids = plan.n_tokens + 2 * plan.recipe.evaluate.tokens  # to train on, to validate, and to test
    return weights + states + id_bytes * n_ids


def plan_cost(plan: Plan) -> Cost:
    """Predict a plan's cost from shapes alone."""
    facts = plan.facts
    recipe = plan.recipe

    lm_tokens = 0
    lm_flops = 0.0
    tokens_by_width = Counter[int]()  # of all open sites together
    for n_blocks, sites in plan.stretches():
        if sites:
            deepest = max(site.layer for site in sites)
            n_tokens = n_blocks * plan.block_tokens
            lm_tokens += n_tokens
            lm_flops += n_tokens * forward_flops(facts, deepest + 1, recipe.data.context)
            tokens_by_width[sum(facts.width(site) for site in sites)] += n_tokens

    flops = lm_flops
    dense = lm_flops
    for leg in plan.legs:
        executed, equivalent = step_flops(leg.dictionary, facts, facts.width(leg.site), facts.width(leg.site_out))
        fits = fit_flops(leg, facts, plan.block_tokens)
        flops += leg.budget_tokens * executed + fits
        dense += leg.budget_tokens * equivalent + fits

    live = peak_state_bytes(plan.legs, facts, plan.block_tokens)
    value_bytes = float(facts.bytes_per_value)
    buffer_bytes = 2.0 if recipe.data.cache else value_bytes
    cached = sum(width * n for width, n in tokens_by_width.items()) if recipe.data.cache else 0
    return Cost(
        lm_tokens=lm_tokens,
        sae_samples=sum(leg.budget_tokens + leg.refit_tokens for leg in plan.legs),
        flops=flops,
        lm_flops=lm_flops,
        flops_dense_equivalent=dense,
        memory_bytes=live + buffer_bytes * plan.block_tokens * max(tokens_by_width) + model_bytes(plan),
        disk_bytes=disk_bytes(plan, plan.legs),
        cache_bytes=2.0 * cached,
    )
