"""What a plan takes, from shapes alone: tokens, operations, memory, disk."""

from collections import Counter
from collections.abc import Sequence

from saerelay.planning.facts import ModelFacts
from saerelay.planning.plan import Leg, Plan
from saerelay.sae.spec import DictionarySpec, takes_sparse_step
from saerelay.spec import Spec


class Cost(Spec):
    """What a plan takes; `flops` are operations executed, `flops_dense_equivalent` what dense steps would take."""

    lm_tokens: int
    """Token positions read by the language model."""
    sae_samples: int
    """Activations trained or refitted on, summed over legs."""
    flops: float
    lm_flops: float
    """Those of the language model among them: what a suite cannot go below."""
    flops_dense_equivalent: float
    flops_all_from_scratch: float
    """The same layers, each from scratch with root_tokens, all sharing one forward pass, executed the same way."""
    memory_bytes: float
    """Largest training state of all live legs, one block's activations at the sites then open, the language model."""
    disk_bytes: float
    """Published dictionaries, snapshots, the saved state twice over, and the tokens."""
    cache_bytes: float
    """What `data.cache` takes if nothing is in it yet and no sequence is read twice; 0 without one."""


def step_flops(dictionary: DictionarySpec, facts: ModelFacts, width: int) -> tuple[float, float]:
    """Operations of one training step for one token: (executed, dense equivalent 12·D·F)."""
    dense = 12.0 * width * dictionary.n_latents
    if takes_sparse_step(facts.device):
        return 2.0 * width * dictionary.n_latents + 8.0 * width * (dictionary.l0 or dictionary.k), dense
    return dense, dense


def fit_flops(leg: Leg, width: int) -> float:
    """Operations of a leg's closed forms: moments of both sites, the map, and the refit by Cholesky."""
    F, moments = leg.dictionary.n_latents, leg.moment_tokens * 8.0 * width**2
    if not leg.refit_tokens:
        return moments
    codes = leg.refit_tokens * (2.0 * width * F + 2.0 * leg.dictionary.k * (F + 2 * width))
    return moments + codes + F**3 / 3 + 2.0 * F**2 * width


def forward_flops(facts: ModelFacts, n_layers: int, context: int) -> float:
    """Operations of the language model's first `n_layers` layers for one token, attention included."""
    return n_layers * (2.0 * facts.layer_params + 4.0 * context * facts.d_attn_z)


def plan_cost(plan: Plan) -> Cost:
    """Predict a plan's cost from shapes alone."""
    facts, context, block = plan.facts, plan.recipe.data.context, plan.block_tokens
    lm_tokens, flops, read = 0, 0.0, Counter[int]()
    for start in range(0, plan.n_tokens, block):
        sites = plan.open_sites(start, start + block)
        if sites:
            lm_tokens += block
            read[sum(facts.width(site) for site in sites)] += block
            flops += block * forward_flops(facts, max(s.layer for s in sites) + 1, context)
    lm_flops = dense = flops
    for leg in plan.legs:
        width = facts.width(leg.site)
        executed, equivalent = step_flops(leg.dictionary, facts, width)
        fits = fit_flops(leg, width)
        flops += leg.budget_tokens * executed + fits
        dense += leg.budget_tokens * equivalent + fits
    weights = sum(4.0 * parameters(leg, facts) * (1 + len(leg.snapshots)) for leg in plan.legs)
    live = peak_state_bytes(plan.legs, facts)
    value_bytes = 4.0 if facts.dtype == "float32" else 2.0
    buffer_bytes = 2.0 if plan.recipe.data.cache else value_bytes
    return Cost(
        lm_tokens=lm_tokens,
        sae_samples=sum(leg.budget_tokens + leg.refit_tokens for leg in plan.legs),
        flops=flops,
        lm_flops=lm_flops,
        flops_dense_equivalent=dense,
        flops_all_from_scratch=_all_from_scratch(plan),
        memory_bytes=live + buffer_bytes * block * max(read) + value_bytes * facts.model_params,
        disk_bytes=weights + 2 * 0.75 * live + 4.0 * plan.n_tokens / plan.recipe.data.epochs,
        cache_bytes=2.0 * sum(width * n for width, n in read.items()) if plan.recipe.data.cache else 0.0,
    )


def _all_from_scratch(plan: Plan) -> float:
    facts, tokens = plan.facts, plan.recipe.plan.root_tokens
    own = {leg.site: leg for leg in plan.legs if leg.role != "control"}
    steps = sum(step_flops(leg.dictionary, facts, facts.width(site))[0] for site, leg in own.items())
    return tokens * (steps + forward_flops(facts, max(site.layer for site in own) + 1, plan.recipe.data.context))


def parameters(leg: Leg, facts: ModelFacts) -> int:
    """Parameters of a leg's dictionary."""
    return leg.dictionary.n_latents * (2 * facts.width(leg.site) + 1) + facts.width(leg.site)


def state_bytes(leg: Leg, facts: ModelFacts) -> float:
    """Weights, gradients and Adam's two moments, in float32."""
    return 16.0 * parameters(leg, facts)


def peak_state_bytes(legs: Sequence[Leg], facts: ModelFacts) -> float:
    return max(sum(state_bytes(o, facts) for o in legs if o.start <= leg.start < o.end) for leg in legs)
