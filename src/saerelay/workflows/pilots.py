"""Measures the pilots of a survey: what they are worth, and what they are worth at other layers."""

import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from saerelay.analysis.suite import Suite, load
from saerelay.data.stream import LiveStream, gather_rows
from saerelay.planning.cost import forward_flops, plan_cost
from saerelay.planning.plan import Leg, Plan
from saerelay.planning.recipe import Recipe
from saerelay.planning.survey import LONG, Survey, SurveyCost, SurveyedHop, SurveyedLayer, before_decay
from saerelay.runs.dictionaries import read_dictionary
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.training import RunCost
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.moments import Moments
from saerelay.sae.quality import fvu
from saerelay.sae.threads import side_by_side
from saerelay.sae.maps import AffineMap, affine
from saerelay.sae.transfer import carry
from saerelay.sae.refit import refit
from saerelay.site import Site
from saerelay.training.train import hold_out

MAP_ROWS = 16_384
"""Rows that the maps of the survey are fitted on, at least."""


REACH = 2
"""Layers further apart than this exchange no dictionaries, unless one of them is the hub."""


@torch.no_grad()
def measure_survey(
    asked: Recipe, plan: Plan, paths: RunDirectory, stream: LiveStream, validation: LiveStream
) -> Survey:
    """Measure what the run of a survey's plan has trained, and the layers themselves."""
    began, suite = time.perf_counter(), load(paths.root)
    pilots = {leg.site: leg for leg in plan.legs if not leg.parent and not leg.id.startswith(LONG)}
    long = plan.leg(LONG)
    rows, n_read = gather_rows(plan, stream, max(MAP_ROWS, 4 * max(plan.facts.width(site) for site in pilots)))
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


def pairs(sites: Sequence[Site], hub: Site) -> Iterator[tuple[Site, Site]]:
    """Sites near each other, and the hub with all."""
    for i, a in enumerate(sites):
        for j, b in enumerate(sites[i + 1 :], i + 1):
            if j - i <= REACH or hub in (a, b):
                yield a, b


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
    cost, seconds = plan_cost(plan), RunCost.load(suite.directory.cost).seconds
    steps = sum(suite.info(leg).seconds for leg in suite.legs)
    forward = forward_flops(plan.facts, plan.sites[-1].layer + 1, plan.recipe.data.context)
    return SurveyCost(
        lm_tokens=cost.lm_tokens + measured_tokens,
        sae_samples=cost.sae_samples,
        flops=cost.flops + measured_tokens * forward,
        seconds=seconds.total + measured_seconds,
        seconds_per_sample=steps / cost.sae_samples,
        seconds_per_lm_flop=seconds.lm / cost.lm_flops,
    )
