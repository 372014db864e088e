"""Measure the pilots of a survey: their FVU at their own layers, and carried to other layers.

`workflows.survey` trains the pilots and calls `measure_survey`; `planning.choose` plans by what it returns.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saerelay.analysis.suite import Suite, load
from saerelay.data.stream import LiveStream, gather_rows
from saerelay.planning.cost import forward_flops, moments_flops, plan_cost, refit_flops
from saerelay.planning.leg import Leg
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import Recipe
from saerelay.planning.survey import LONG, LongPilots, Survey, SurveyCost, SurveyedHop, SurveyedLayer, before_decay
from saerelay.runs.dictionaries import read_dictionary
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.training import RunCost
from saerelay.sae.maps import AffineMap, map_between
from saerelay.sae.moments import Moments
from saerelay.sae.quality import fvu
from saerelay.sae.threads import side_by_side
from saerelay.sae.transfer import carry, refit_in
from saerelay.site import Site
from saerelay.training.state import balance_of, units_of
from saerelay.training.train import hold_out

MAP_ROWS = 16_384
"""Least number of rows on which the survey's maps are fitted."""
REACH = 2
"""Greatest distance of two layers between which hops are surveyed, unless one of them is the hub."""


class PilotFVU(NamedTuple):
    """FVU of a pilot at some site, on held-out rows."""

    as_it_is: float
    refitted: float
    """FVU with its decoder refitted."""


@dataclass(frozen=True, eq=False)
class Measured:
    """The measurements of a survey's pilots and layers."""

    plan: Plan
    rows: dict[Site, Tensor]
    """Training rows (B, D) of each site."""
    held_out: dict[Site, Tensor]
    """Validation rows (B, D) of each site."""
    maps: dict[tuple[Site, Site], AffineMap]
    fvu: dict[tuple[str, Site], PilotFVU]
    """FVU of each leg at each site where it was measured."""
    decay_gain: dict[str, float]
    """FVU over the FVU before the learning rate's decay, by leg."""

    @property
    def pilots(self) -> dict[Site, Leg]:
        """The short pilots, by site."""
        return short_pilots(self.plan)

    def layers(self) -> list[SurveyedLayer]:
        """Return the survey's record of each layer."""
        layers = []
        for site, leg in sorted(self.pilots.items()):
            at_home = self.fvu[leg.id, site]
            layers.append(
                SurveyedLayer(
                    layer=site.layer,
                    rms_norm=rms_norm(self.held_out[site]),
                    fvu=at_home.as_it_is,
                    refitted=at_home.refitted,
                    decay_gain=self.decay_gain[leg.id],
                )
            )
        return layers

    def hops(self) -> list[SurveyedHop]:
        """Return the survey's record of each hop between two layers."""
        hops = []
        for source, target in sorted(self.maps):
            carried = self.fvu[self.pilots[source].id, target]
            hops.append(
                SurveyedHop(
                    source=source.layer,
                    target=target.layer,
                    r2=r2(self.maps[source, target], self.held_out[source], self.held_out[target]),
                    angle=angle(self.held_out[source], self.held_out[target]),
                    fvu=carried.as_it_is,
                    refitted=carried.refitted,
                )
            )
        return hops

    def long(self) -> LongPilots:
        """Return the survey's record of the long pilots."""
        hub = self.plan.leg(LONG)
        at_home = self.fvu[LONG, hub.site]
        ends = [leg for leg in self.plan.legs if leg.id.startswith(f"{LONG}-")]
        targets = [target for source, target in self.maps if source == hub.site]
        return LongPilots(
            long_tokens=hub.budget_tokens,
            long_fvu=at_home.as_it_is,
            long_refitted=at_home.refitted,
            long_decay_gain=self.decay_gain[LONG],
            long_hops={target.layer: self.fvu[LONG, target].refitted for target in targets},
            ends={leg.layer: self.fvu[leg.id, leg.site].as_it_is for leg in ends},
        )


@torch.no_grad()
def measure_survey(
    asked: Recipe, plan: Plan, paths: RunDirectory, stream: LiveStream, validation: LiveStream
) -> Survey:
    """Measure the pilots that a survey's run has trained, and the layers themselves."""
    began = time.perf_counter()
    suite = load(paths.root)
    widest = max(plan.facts.width(site) for site in plan.sites)
    rows, n_read = gather_rows(plan, stream, max(MAP_ROWS, 4 * widest))
    held_out, n_held_out = hold_out(plan, validation)
    maps = fit_maps(plan, rows)
    fvus = pilot_fvus(asked, plan, suite, rows, held_out, maps)
    decay_gain = {}
    for leg in plan.legs:
        before, _ = read_dictionary(paths.snapshot(leg.id, before_decay(leg, asked)))
        fvu_before = fvu(before.to(stream.device), held_out[leg.site], balance_of(leg, plan.recipe.train))
        gain = fvus[leg.id, leg.site].as_it_is / fvu_before
        decay_gain[leg.id] = min(1.0, gain) if asked.train.optimizer.decay else 1.0
    measured = Measured(plan, rows, held_out, maps, fvus, decay_gain)
    return Survey(
        asked=asked,
        hub=plan.leg(LONG).layer,
        n_latents=suite[LONG].n_latents,
        block_tokens=plan.block_tokens,
        pilot_tokens=min(leg.budget_tokens for leg in measured.pilots.values()),
        layers=measured.layers(),
        hops=measured.hops(),
        long=measured.long(),
        cost=survey_cost(measured, suite, n_read + n_held_out, time.perf_counter() - began),
    )


def fit_maps(plan: Plan, rows: dict[Site, Tensor]) -> dict[tuple[Site, Site], AffineMap]:
    """Fit the affine maps, in both directions, of each pair of sites between which hops are surveyed."""
    maps = {}
    balance = balance_of(plan.leg(LONG), plan.recipe.train)
    for a, b in pairs(plan.sites, plan.leg(LONG).site):
        moments = Moments.empty(plan.facts.width(a), plan.facts.width(b))
        moments.add(rows[a], rows[b])
        maps[a, b] = map_between("affine", plan.facts.width(a), moments, balance)
        maps[b, a] = maps[a, b].reversed()
    return maps


def pilot_fvus(
    asked: Recipe,
    plan: Plan,
    suite: Suite,
    rows: dict[Site, Tensor],
    held_out: dict[Site, Tensor],
    maps: dict[tuple[Site, Site], AffineMap],
) -> dict[tuple[str, Site], PilotFVU]:
    """Measure all pilots at their own sites, and the short ones and the hub's long one wherever a map leads.

    FVU is that of a leg's training units, in which its goal is checked later.
    """
    hub = plan.leg(LONG)
    pilots = short_pilots(plan)
    jobs = [(pilots[source], target) for source, target in maps]
    jobs += [(hub, target) for source, target in maps if source == hub.site]
    jobs += [(leg, leg.site) for leg in plan.legs]
    train = plan.recipe.train

    def measure(job: tuple[Leg, Site]) -> PilotFVU:
        leg, site = job
        dictionary = suite[leg.id].to(rows[site].device)
        units = units_of(leg, train, rows[site])
        balance = balance_of(leg, train)
        if leg.site != site:
            between = maps[leg.site, site]
            dictionary = carry(dictionary, between, rows[site], units, l0=asked.dictionary.l0).dictionary
        refitted = refit_in(units, dictionary, rows[site])
        return PilotFVU(fvu(dictionary, held_out[site], balance), fvu(refitted, held_out[site], balance))

    fvus = side_by_side(measure, jobs, rows[hub.site].device)
    return {(leg.id, site): result for (leg, site), result in zip(jobs, fvus, strict=True)}


def short_pilots(plan: Plan) -> dict[Site, Leg]:
    """Return the short pilots, by site."""
    return {leg.site: leg for leg in plan.legs if not leg.id.startswith(LONG)}


def pairs(sites: Sequence[Site], hub: Site) -> Iterator[tuple[Site, Site]]:
    """Yield the pairs of sites near each other, and of the hub with every site."""
    for i, a in enumerate(sites):
        for j, b in enumerate(sites[i + 1 :], i + 1):
            if j - i <= REACH or hub in (a, b):
                yield a, b


def r2(between: AffineMap, source: Tensor, target: Tensor) -> float:
    """Return the share of the variance of `target` (B, T) that the map from `source` (B, S) explains."""
    residual = target - source @ between.A.T.to(source) - between.c.to(source)
    return 1 - float(residual.square().sum() / (target - target.mean(dim=0)).square().sum())


def angle(a: Tensor, b: Tensor) -> float:
    """Return the mean angle between rows (B, D) of the same tokens, divided by π."""
    return float(torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1).arccos().mean() / math.pi)


def rms_norm(x: Tensor) -> float:
    """Return √ E‖x − E x‖² of rows (B, D)."""
    return float((x - x.mean(dim=0)).square().sum(dim=1).mean().sqrt())


def survey_cost(measured: Measured, suite: Suite, measured_tokens: int, measured_seconds: float) -> SurveyCost:
    """Return the cost of the survey, its measurements included."""
    plan = measured.plan
    cost = plan_cost(plan)
    seconds = RunCost.load(suite.directory.cost).seconds
    steps = sum(suite.info(leg).seconds for leg in suite.legs)
    forward = forward_flops(plan.facts, plan.deepest.layer + 1, plan.recipe.data.context)
    measuring = measured_tokens * forward
    return SurveyCost(
        lm_tokens=cost.lm_tokens + measured_tokens,
        sae_samples=cost.sae_samples,
        flops=cost.flops + measuring + closed_form_flops(measured),
        lm_flops=cost.lm_flops + measuring,
        seconds=seconds.total + measured_seconds,
        seconds_per_sample=steps / cost.sae_samples,
        seconds_per_lm_flop=seconds.lm / cost.lm_flops,
    )


def closed_form_flops(measured: Measured) -> float:
    """Return the operations of the maps between layers, one for both directions, and of the refits of all pilots."""
    hub = measured.plan.leg(LONG)
    width = measured.plan.facts.width(hub.site)
    n_rows = len(measured.rows[hub.site])
    n_maps = len(measured.maps) // 2
    n_refits = len(measured.fvu)
    return n_maps * moments_flops(width, n_rows) + n_refits * refit_flops(hub.dictionary, width, width, n_rows)
