"""The survey behind `preset = "auto"`: a short pass over the training split that measures what a plan is chosen by.

It is a small run of its own (`survey/` in the run directory): pilots from scratch at every layer, and long pilots at a
middle layer, the hub, and at the first and the last. Every point of a curve is a run with its own decay. What they are
worth is measured on rows of the validation split, as is the worth of every hop without training, refitted or not.
"""

import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from saerelay.checkpoint import RunDirectory, read_dictionary, read_json
from saerelay.cost import forward_flops, plan_cost
from saerelay.dictionaries import Dictionary, match_l0
from saerelay.engine import fvu
from saerelay.moments import Moments
from saerelay.plan import Leg, ModelFacts, Plan, choose_block, compile_plan, hub_of
from saerelay.recipe import LegSpec, Run
from saerelay.site import Site
from saerelay.spec import Spec
from saerelay.stream import AbstractStream, LiveStream
from saerelay.suite import Suite, load
from saerelay.threads import side_by_side
from saerelay.train import hold_out
from saerelay.transfer import AffineMap, affine, fold, refit

SCHEMA_VERSION = 2
LONG = "long"
"""Id of the long pilot."""
MAP_ROWS = 16_384
"""Rows that the maps of the survey are fitted on, at least."""
TOKENS_PER_LATENT = 64
"""Of the long pilot, at least; the curves have no floor to be seen when the short ones get less than a quarter."""
REACH = 2
"""Layers further apart than this exchange no dictionaries, unless one of them is the hub."""


class SurveyedLayer(Spec):
    """A layer, and its pilot from scratch."""

    layer: int
    rms_norm: float
    """√ E‖x − E x‖²."""
    fvu: float
    """Of the pilot, with `pilot_tokens`."""
    refitted: float
    """Of the pilot with its decoder refitted, as after a hop."""
    decay_gain: float
    """Its FVU over that before the learning rate's decay."""


class SurveyedHop(Spec):
    """An affine hop between two layers, without training after it."""

    source: int
    target: int
    r2: float
    """Share of the target's variance that the affine map explains."""
    angle: float
    """Mean angle between the activations of a token at the two layers, over π."""
    fvu: float
    """Of the source's pilot, carried to the target."""
    refitted: float
    """Of that with its decoder refitted."""


class SurveyCost(Spec):
    """What the survey took, and the rates from which hours are predicted."""

    lm_tokens: int
    sae_samples: int
    flops: float
    seconds: float
    seconds_per_sample: float
    """Of an SAE's training step, for one token."""
    seconds_per_lm_flop: float


class Survey(Spec):
    """What was measured: `survey.json`. All FVUs are on the same rows of the validation split."""

    schema_version: int = SCHEMA_VERSION
    asked: Run
    hub: int
    n_latents: int
    pilot_tokens: int
    long_tokens: int
    layers: list[SurveyedLayer]
    hops: list[SurveyedHop]
    block_tokens: int
    """Of the pilots; the plan has the same, since what is learned from few tokens depends on how they are shuffled."""
    long_fvu: float
    """Of the hub's long pilot, with `long_tokens`."""
    long_refitted: float
    """Of that with its decoder refitted."""
    long_decay_gain: float
    ends: dict[int, float]
    """FVU of as long pilots at the first and the last layer, where curves are least like the hub's."""
    long_hops: dict[int, float]
    """Of the long pilot carried to each other layer and refitted there."""
    cost: SurveyCost


def survey_plan(run: Run, facts: ModelFacts, memory_bytes: float = math.inf) -> Plan:
    """The pilots, as a plan like any other."""
    p, batch = run.plan, run.train.batch_tokens
    plain = p.model_copy(update={"preset": "hub", "budget": "", "fvu_ratio": 0.0, "stop": True, "controls": []})
    usual = compile_plan(run.model_copy(update={"plan": plain}), facts)  # refuses what no plan can have
    layers = sorted({leg.layer for leg in usual.legs})
    hub = p.roots[0] if p.roots else hub_of(layers)
    long = batch * max(8, (p.survey_tokens or pilot_tokens(run, facts)) // batch)
    pilot = batch * (long // 4 // batch)
    legs = [LegSpec(id=f"L{layer}", layer=layer, tokens=pilot) for layer in layers]
    legs.append(LegSpec(id=LONG, layer=hub, tokens=long))
    for layer in sorted({layers[0], layers[-1]} - {hub}):
        legs.append(LegSpec(id=f"{LONG}-L{layer}", layer=layer, tokens=long))
    plan = plain.model_copy(update={"legs": legs, "roots": []})
    train = run.train.model_copy(update={"snapshots": [], "loggers": []})
    block = choose_block(run, facts, [LegSpec(id=f"L{layer}", layer=layer, tokens=long) for layer in layers])
    data = run.data.model_copy(update={"cache": "", "block_tokens": block})
    update = {"plan": plan, "train": train, "data": data, "sites": run.sites.model_copy(update={"layers": layers})}
    compiled = compile_plan(run.model_copy(update=update), facts, memory_bytes=memory_bytes)
    return compiled.model_copy(
        update={"legs": [leg.model_copy(update={"snapshots": [before_decay(leg, run)]}) for leg in compiled.legs]}
    )


def pilot_tokens(run: Run, facts: ModelFacts) -> int:
    """Tokens of the long pilot: a tenth of a root's, more where that is too short for a curve to have settled."""
    root, n_latents = run.plan.root_tokens, run.dictionary.latents(facts.width(Site(0, run.sites.module)))
    return max(root // 10, min(root // 4, TOKENS_PER_LATENT * n_latents))


def before_decay(leg: Leg, run: Run) -> int:
    """Age at which a leg's decay begins."""
    return run.train.batch_tokens * max(1, round((1 - run.train.decay) * leg.budget_tokens / run.train.batch_tokens))


@torch.no_grad()
def measure_survey(asked: Run, plan: Plan, paths: RunDirectory, stream: LiveStream, validation: LiveStream) -> Survey:
    """Measure what the run of a survey's plan has trained, and the layers themselves."""
    began, suite = time.perf_counter(), load(paths.root)
    pilots = {leg.site: leg for leg in plan.legs if not leg.parent and not leg.id.startswith(LONG)}
    long = plan.leg(LONG)
    rows, n_read = gather(plan, stream, max(MAP_ROWS, 4 * max(plan.facts.width(site) for site in pilots)))
    held_out, n_held_out = hold_out(plan, validation)
    maps = dict[tuple[Site, Site], AffineMap]()
    for a, b in pairs(sorted(pilots), long.site):
        moments = Moments.empty(plan.facts.width(a), plan.facts.width(b))
        moments.add(rows[a], rows[b])
        maps[a, b] = affine(moments)
        maps[b, a] = maps[a, b].reversed()

    def there(leg: Leg, site: Site) -> tuple[float, float]:
        """FVU of a leg's dictionary at a site, as it is and refitted."""
        dictionary = suite[leg.id].to(stream.device)
        if leg.site != site:
            dictionary = carry(dictionary, maps[leg.site, site], rows[site], asked.dictionary.l0)
        return worth(dictionary, rows[site], held_out[site])

    wanted = [(pilots[source], target) for source, target in maps]
    wanted += [(long, target) for source, target in maps if source == long.site]
    wanted += [(leg, leg.site) for leg in plan.legs]
    measured = side_by_side(lambda one: there(*one), wanted, stream.device)
    fvu_of = {(leg.id, site): fvus for (leg, site), fvus in zip(wanted, measured, strict=True)}
    final = {leg.id: fvu_of[leg.id, leg.site][0] for leg in plan.legs}
    gain = {}
    for leg in plan.legs:
        before = read_dictionary(paths.snapshot(leg.id, before_decay(leg, asked)))[0].to(stream.device)
        gain[leg.id] = min(1.0, final[leg.id] / fvu(before, held_out[leg.site]))
    layers = list[SurveyedLayer]()
    for site, leg in sorted(pilots.items()):
        as_it_is, refitted = fvu_of[leg.id, site]
        found = {"fvu": as_it_is, "refitted": refitted, "decay_gain": gain[leg.id]}
        layers.append(SurveyedLayer(layer=site.layer, rms_norm=rms_norm(held_out[site]), **found))
    hops = list[SurveyedHop]()
    for (source, target), between in sorted(maps.items(), key=lambda item: item[0]):
        as_it_is, refitted = fvu_of[pilots[source].id, target]
        alike = {
            "r2": r2(between, held_out[source], held_out[target]),
            "angle": angle(held_out[source], held_out[target]),
        }
        hops.append(SurveyedHop(source=source.layer, target=target.layer, fvu=as_it_is, refitted=refitted, **alike))
    return Survey(
        asked=asked,
        hub=long.layer,
        n_latents=suite[LONG].n_latents,
        pilot_tokens=min(leg.budget_tokens for leg in pilots.values()),
        long_tokens=long.budget_tokens,
        block_tokens=plan.block_tokens,
        layers=layers,
        hops=hops,
        long_fvu=final[LONG],
        long_refitted=fvu_of[LONG, long.site][1],
        long_decay_gain=gain[LONG],
        ends={leg.layer: final[leg.id] for leg in plan.legs if leg.id.startswith(f"{LONG}-")},
        long_hops={site.layer: fvu_of[LONG, site][1] for source, site in maps if source == long.site},
        cost=survey_cost(plan, suite, n_read + n_held_out, time.perf_counter() - began),
    )


def gather(plan: Plan, stream: AbstractStream, n: int) -> tuple[dict[Site, Tensor], int]:
    """At least n rows (n, D) of every site, from the first blocks; and how many positions were read for them."""
    found = {site: list[Tensor]() for site in plan.sites}
    n_blocks = math.ceil(n / plan.block_tokens)
    for number in range(n_blocks):
        block = stream.block(number, plan.sites)
        for site, parts in found.items():
            parts.append(block.rows(site, n))
    return {site: torch.cat(parts)[:n] for site, parts in found.items()}, n_blocks * plan.block_tokens


def pairs(sites: Sequence[Site], hub: Site) -> Iterator[tuple[Site, Site]]:
    """Sites near each other, and the hub with all."""
    for i, a in enumerate(sites):
        for j, b in enumerate(sites[i + 1 :], i + 1):
            if j - i <= REACH or hub in (a, b):
                yield a, b


def carry(dictionary: Dictionary, between: AffineMap, rows: Tensor, l0: float | None) -> Dictionary:
    """A dictionary folded through a map, at an L0 (None: as it comes) on rows (B, D) of the target."""
    folded = fold(dictionary.to(rows.device), between)
    return match_l0(folded, rows[:8192], l0) if l0 else folded


def worth(dictionary: Dictionary, rows: Tensor, held_out: Tensor) -> tuple[float, float]:
    """FVU on held-out rows (B, D), as the dictionary is and with its decoder refitted on other rows."""
    return fvu(dictionary, held_out), fvu(refit(dictionary, rows.split(4096)), held_out)


def r2(between: AffineMap, source: Tensor, target: Tensor) -> float:
    """Share of the variance of `target` (B, T) that the map of `source` (B, S) explains."""
    residual = target - source @ between.A.T.to(source) - between.c.to(source)
    return 1 - float(residual.square().sum() / (target - target.mean(dim=0)).square().sum())


def angle(a: Tensor, b: Tensor) -> float:
    """Mean angle between rows (B, D) of the same tokens, over π."""
    return float(torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1).arccos().mean() / math.pi)


def rms_norm(x: Tensor) -> float:
    """√ E‖x − E x‖² of rows (B, D)."""
    return float((x - x.mean(dim=0)).square().sum(dim=1).mean().sqrt())


def survey_cost(plan: Plan, suite: Suite, measured_tokens: int, measured_seconds: float) -> SurveyCost:
    """What the survey took, its measuring included."""
    cost, seconds = plan_cost(plan), read_json(suite.directory.cost)["seconds"]
    steps = sum(read_dictionary(suite.directory.leg(leg.id))[1]["seconds"] for leg in suite.legs)
    forward = forward_flops(plan.facts, plan.sites[-1].layer + 1, plan.run.data.context)
    return SurveyCost(
        lm_tokens=cost.lm_tokens + measured_tokens,
        sae_samples=cost.sae_samples,
        flops=cost.flops + measured_tokens * forward,
        seconds=seconds["total"] + measured_seconds,
        seconds_per_sample=steps / cost.sae_samples,
        seconds_per_lm_flop=seconds["lm"] / cost.lm_flops,
    )
