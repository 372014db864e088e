"""From a survey to a plan: learning curves, the cheapest tree at a quality, and the quality that a budget buys.

Four laws with few free parameters; docs/log.md has the data they were found on:

    hub        FVU(n) = floor + slope · n ^ −DECLINE                           after n tokens from scratch
    scratch    FVU(l, n) = FVU(l, n₀) · (FVU(hub, n) / FVU(hub, n₀)) ^ power(l)     at any layer
    hop        FVU(p → t) = FVU(t, n) + gap(p, t)            map and refit, from a parent worth n tokens
    child      FVU = FVU(t, n + m) + gap(p, t) / (1 + m / half)                after m tokens of its own

A gap does not depend on how well the parent is trained. A dictionary is worth the tokens from scratch that reach its
FVU, so a child's child starts from what the child is worth.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import geometric_mean
from typing import NamedTuple

import networkx as nx
import numpy as np

from saerelay.errors import PlanError
from saerelay.planning.compile import compile_plan
from saerelay.planning.cost import Cost, forward_flops, plan_cost, step_flops
from saerelay.planning.facts import ModelFacts
from saerelay.planning.presets import control_legs
from saerelay.planning.leg_spec import LegSpec
from saerelay.planning.recipe import Recipe, parse_budget
from saerelay.planning.survey import Survey
from saerelay.site import Site

DEFAULT_RATIO = 1.05
MOST = 10
"""Goals that are worth more than so many root_tokens from scratch are not extrapolated to."""
SLACK = 1.5
"""A leg that may stop early gets this multiple of the tokens it is predicted to need, unless there is a budget."""
ROOT_MULTIPLES = (1.0, 1.5, 2.0, 3.0)
"""Roots trained beyond what their own goal needs make all hops from them cheaper; these multiples are tried."""
DOUBT = 1.25
"""A root other than the hub must be that much cheaper: its curve is less known."""
DECLINE = 0.55
"""How fast a curve falls to its floor; between what two models have (docs/log.md)."""
GAP_GROWTH = 1.3
"""Gap after a finished parent over that after a pilot; a third of 1 − R² is the other estimate of it (docs/log.md)."""
HALF_PER_LATENT = 40
"""Tokens after which half of a gap is closed, for each latent."""
CHILD_DECAY_GAIN = 0.97
"""FVU after over before the decay of a leg that began with a hop."""
FORWARD_SHARES = (0.0, 0.5, 1.0)
"""Shares of a forward pass that a leg is charged while the tree is chosen: legs that run side by side share it."""


@dataclass(frozen=True)
class Curves:
    """The laws above, fitted to a survey."""

    floor: float
    slope: float
    pilot_tokens: int
    """n₀."""
    pilot: dict[int, float]
    """FVU(l, n₀)."""
    power: dict[int, float]
    gap: dict[tuple[int, int], float]
    """FVU that a hop from one layer to another adds, for the pairs surveyed."""
    half: float
    """Tokens that close half of a gap."""

    def hub(self, tokens: float) -> float:
        """FVU at the hub after some tokens from scratch."""
        return self.floor + self.slope * tokens**-DECLINE

    def scratch(self, layer: int, tokens: float) -> float:
        """FVU at a layer after some tokens from scratch."""
        return self.pilot[layer] * (self.hub(tokens) / self.hub(self.pilot_tokens)) ** self.power[layer]

    def worth(self, layer: int, fvu: float) -> float:
        """Tokens from scratch that reach an FVU at a layer; infinite if none do."""
        at_hub = self.hub(self.pilot_tokens) * (fvu / self.pilot[layer]) ** (1 / self.power[layer])
        return (self.slope / (at_hub - self.floor)) ** (1 / DECLINE) if at_hub > self.floor else math.inf

    def child(self, parent: int, layer: int, worth: float, tokens: float) -> float:
        """FVU of a child after some tokens, whose parent is worth `worth` tokens from scratch."""
        return self.scratch(layer, worth + tokens) + self.gap[parent, layer] / (1 + tokens / self.half)

    def child_tokens(self, parent: int, layer: int, worth: float, fvu: float) -> float:
        """Tokens after which a child has an FVU; infinite if scratch would need fewer."""
        low, high = 0.0, self.worth(layer, fvu)
        if not high < math.inf or self.child(parent, layer, worth, high) > fvu:
            return math.inf
        while high - low > 256:
            middle = (low + high) / 2
            low, high = (low, middle) if self.child(parent, layer, worth, middle) <= fvu else (middle, high)
        return 0.0 if self.child(parent, layer, worth, 0) <= fvu else high


def fit_curves(survey: Survey) -> Curves:
    """Fit the laws to what was measured.

    The hub's curve goes through its two pilots, and so do those of the first and the last layer. Another layer's power
    is the geometric mean of three estimates, each rough: what the long pilot carried to it gains over its own, less the
    gap; what the two layers gain in the decay; and between the powers of the layers that have a long pilot.

    A gap is the geometric mean of that of the pilots, grown, and of a third of what the map leaves unexplained.
    """
    short, long, hub = survey.pilot_tokens, survey.long_tokens, survey.hub
    pilot = {layer.layer: layer.fvu for layer in survey.layers}
    decay = {layer.layer: math.log(layer.decay_gain - 1e-9) for layer in survey.layers}
    slope = max(0.0, pilot[hub] - survey.long_fvu) / (short**-DECLINE - long**-DECLINE)
    slope = min(slope, pilot[hub] * short**DECLINE)
    home = {layer.layer: layer.refitted for layer in survey.layers}
    rise, refitted_rise = log_ratio(survey.long_fvu, pilot[hub]), log_ratio(survey.long_refitted, home[hub])
    power = {hub: 1.0} | {layer: log_ratio(fvu, pilot[layer]) / rise for layer, fvu in survey.ends.items()}
    known = sorted(power)
    for hop in survey.hops:
        if hop.source == hub and hop.target not in known:
            layer, gap = hop.target, hop.refitted - home[hop.target]
            carried = max(survey.long_hops[layer] - gap, 0.1 * home[layer])
            estimates = (
                log_ratio(carried, home[layer]) / refitted_rise,
                decay[layer] / decay[hub],
                math.exp(np.interp(layer, known, [math.log(power[end]) for end in known])),
            )
            power[layer] = geometric_mean(np.clip(estimates, 0.5, 3.0))
    gaps = dict[tuple[int, int], float]()
    for hop in survey.hops:
        measured = GAP_GROWTH * max(hop.refitted - home[hop.target], 1e-4)
        gaps[hop.source, hop.target] = math.sqrt(measured * max((1 - hop.r2) / 3, 1e-4))
    floor = pilot[hub] - slope * short**-DECLINE
    return Curves(floor, slope, short, pilot, power, gaps, HALF_PER_LATENT * survey.n_latents)


def log_ratio(fvu: float, of: float) -> float:
    """How far an FVU has fallen from another; below zero even where noise says otherwise."""
    return min(-1e-9, math.log(fvu / of))


class Tree(NamedTuple):
    """Who is trained from whom (None: from scratch), and on how many tokens."""

    parents: dict[int, int | None]
    tokens: dict[int, float]
    fvu: dict[int, float]
    """Predicted of each layer."""


class Charges(NamedTuple):
    """What the edges of a tree cost, in a budget's unit."""

    per_sample: float
    """A token in training."""
    per_read_token: dict[int, float]
    """A token read by the language model up to a layer."""
    moment_tokens: int
    root_price: dict[int, float]
    """What is charged for a root, as a multiple of its cost."""


def cheapest(
    curves: Curves,
    goals: dict[int, float],
    charges: Charges,
    *,
    roots: Sequence[int] = (),
    multiple: float = 1.0,
    overtrained: Sequence[int] = (),
    flat: bool = False,
) -> Tree | None:
    """The arborescence of least cost in which every layer meets its goal, or None.

    Only `roots` are trained from scratch if there are any; those `overtrained` get `multiple` times the tokens, and are
    the only parents if `flat`.
    """
    worth = {
        layer: curves.worth(layer, goal) * (multiple if layer in overtrained else 1) for layer, goal in goals.items()
    }
    needed = dict[tuple[int | None, int], float]()
    for layer, goal in goals.items():
        if not roots or layer in roots:
            needed[None, layer] = worth[layer]
        for parent in overtrained if flat else goals:
            if (parent, layer) in curves.gap and layer not in overtrained:
                needed[parent, layer] = curves.child_tokens(parent, layer, worth[parent], goal)
    graph = nx.DiGraph()
    graph.add_nodes_from(["scratch", *goals])
    for (parent, layer), tokens in needed.items():
        if tokens < math.inf:
            read = tokens + (0 if parent is None else charges.moment_tokens)
            cost = tokens * charges.per_sample + read * charges.per_read_token[layer]
            cost *= charges.root_price[layer] if parent is None else 1
            graph.add_edge("scratch" if parent is None else parent, layer, cost=cost)
    try:
        tree = nx.minimum_spanning_arborescence(graph, attr="cost")
    except nx.NetworkXException:
        return None
    parents = {layer: None if parent == "scratch" else parent for parent, layer in tree.edges}
    tokens = {layer: needed[parents[layer], layer] for layer in goals}
    fvu = {layer: curves.scratch(layer, tokens[layer]) if parents[layer] is None else goals[layer] for layer in goals}
    for layer, parent in parents.items():
        if parent is not None and not tokens[layer]:
            fvu[layer] = curves.child(parent, layer, worth[parent], 0)
    return Tree(parents, tokens, fvu)


class Choice(NamedTuple):
    """What was chosen, and what it is predicted to take."""

    ratio: float
    """FVU of every layer, at most, over what scratch with root_tokens is predicted to reach."""
    reference: dict[int, float]
    """That FVU from scratch."""
    legs: list[LegSpec]
    """As predicted: without slack and controls."""
    cost: Cost
    """Of these legs; the survey's is apart."""
    seconds: float
    seconds_lm: float

    def time(self) -> dict[str, float]:
        """Seconds predicted, from the survey's: as of `time_plan`."""
        return {"lm": self.seconds_lm, "steps": self.seconds - self.seconds_lm, "total": self.seconds}


def choose(run: Recipe, facts: ModelFacts, survey: Survey, memory_bytes: float = math.inf) -> Choice:
    """The cheapest tree at the quality asked for, or the best that the budget buys, the survey's cost included."""
    curves = fit_curves(survey)

    def at(ratio: float) -> Choice | None:
        return choose_at(ratio, curves, run, facts, survey, memory_bytes)

    if not run.plan.budget:
        ratio = run.plan.fvu_ratio or DEFAULT_RATIO
        if choice := at(ratio):
            return choice
        raise PlanError(
            f"plan.fvu_ratio is {ratio}, which {MOST} x root_tokens from scratch are not predicted to reach; raise one "
            "of them"
        )
    amount, unit = parse_budget(run.plan.budget)
    taken = {"tokens": survey.cost.sae_samples, "FLOPs": survey.cost.flops, "hours": survey.cost.seconds / 3600}[unit]
    low, high, best = math.log(0.5), math.log(10), at(10)
    if best is None or spent(best, unit) + taken > amount:
        least = f"{spent(best, unit) + taken:.3g}" if best else "more"
        raise PlanError(
            f"plan.budget is {run.plan.budget}, of which the survey takes {taken:.3g}; at least {least} {unit} bring "
            "every layer to ten times the FVU of scratch at root_tokens. Raise the budget, or lower plan.survey_tokens"
        )
    while high - low > 2e-3:
        middle = (low + high) / 2
        choice = at(math.exp(middle))
        if choice and spent(choice, unit) + taken <= amount:
            high, best = middle, choice
        else:
            low = middle
    return best


def choose_at(
    ratio: float, curves: Curves, run: Recipe, facts: ModelFacts, survey: Survey, memory_bytes: float
) -> Choice | None:
    """The cheapest plan in which every layer meets its goal; true plans decide between a few trees."""
    unit = parse_budget(run.plan.budget)[1] if run.plan.budget else "hours"
    reference = {layer: curves.scratch(layer, run.plan.root_tokens) for layer in curves.pilot}
    goals = {layer: ratio * fvu for layer, fvu in reference.items()}
    if any(curves.worth(layer, goal) > MOST * run.plan.root_tokens for layer, goal in goals.items()):
        return None
    only, trees = run.plan.roots, list[Tree | None]()
    for share in FORWARD_SHARES:
        price = charges(run, facts, survey, unit, share)
        tree = cheapest(curves, goals, price, roots=only)
        roots = [layer for layer, parent in tree.parents.items() if parent is None] if tree else only or [survey.hub]
        for multiple, flat in product(ROOT_MULTIPLES, (False, True)):
            trees.append(cheapest(curves, goals, price, roots=only, multiple=multiple, overtrained=roots, flat=flat))
        trees.append(cheapest(replace(curves, gap={}), goals, price, roots=only))  # all from scratch, in one pass
    found = list[Choice]()
    for tree in trees:
        if tree is None:
            continue
        legs = tree_legs(tree, run, survey)
        cost = plan_cost(compile_plan(with_legs(run, survey, legs), facts, memory_bytes=memory_bytes))
        lm = cost.lm_flops * survey.cost.seconds_per_lm_flop
        seconds = lm + cost.sae_samples * survey.cost.seconds_per_sample
        found.append(Choice(ratio, reference, legs, cost, seconds, lm))
    return min(found, key=lambda choice: spent(choice, unit), default=None)


def spent(choice: Choice, unit: str) -> float:
    """What a plan takes, in a budget's unit."""
    return {"tokens": choice.cost.sae_samples, "FLOPs": choice.cost.flops, "hours": choice.seconds / 3600}[unit]


def charges(run: Recipe, facts: ModelFacts, survey: Survey, unit: str, share: float) -> Charges:
    """What the edges of a tree cost, in a budget's unit; a leg pays `share` of the forward passes that it reads."""
    width = facts.width(Site(0, run.sites.module))
    layers, context = [layer.layer for layer in survey.layers], run.data.context
    dictionary = run.dictionary.changed(n_latents=run.dictionary.latents(width))
    step = step_flops(dictionary, facts, width)[0]
    per_sample, per_lm_flop = {
        "tokens": (1.0, 0.0),
        "FLOPs": (step, 1.0),
        "hours": (survey.cost.seconds_per_sample, survey.cost.seconds_per_lm_flop),
    }[unit]
    return Charges(
        per_sample=per_sample,
        per_read_token={layer: share * per_lm_flop * forward_flops(facts, layer + 1, context) for layer in layers},
        moment_tokens=run.plan.moment_tokens,
        root_price={layer: 1.0 if layer == survey.hub else DOUBT for layer in layers},
    )


def tree_legs(tree: Tree, run: Recipe, survey: Survey) -> list[LegSpec]:
    """A tree as legs."""
    name = {layer: str(Site(layer, run.sites.module)) for layer in tree.parents}
    ids = {layer: name[layer] if p is None else f"{name[layer]}-from-L{p}" for layer, p in tree.parents.items()}
    return [
        LegSpec(
            id=ids[layer],
            layer=layer,
            parent="" if parent is None else ids[parent],
            tokens=run.train.batch_tokens * math.ceil(tree.tokens[layer] / run.train.batch_tokens),
            goal_fvu=round(tree.fvu[layer], 5),
            predicted_fvu=round(tree.fvu[layer], 5),
            decay_gain=round(decay_gain(layer, tree.tokens[layer], survey) if parent is None else CHILD_DECAY_GAIN, 3),
        )
        for layer, parent in sorted(tree.parents.items())
    ]


def decay_gain(layer: int, tokens: float, survey: Survey) -> float:
    """What the decay of a leg from scratch is worth: FVU after over before.

    Its pilot's, times what the long pilot's has over the short one's; and less at the lower rate of a longer leg.
    """
    pilots = {pilot.layer: pilot.decay_gain for pilot in survey.layers}
    gain = min(1.0, pilots[layer] * survey.long_decay_gain / pilots[survey.hub])
    return gain ** max(1.0, tokens / survey.long_tokens) ** -0.15


def with_legs(run: Recipe, survey: Survey, legs: list[LegSpec]) -> Recipe:
    """The recipe with an explicit plan, and the survey's blocks."""
    plan = run.plan.changed(legs=legs, controls=[])
    data = run.data.changed(block_tokens=survey.block_tokens)
    return run.changed(plan=plan, data=data)


def written_out(run: Recipe, survey: Survey, choice: Choice) -> Recipe:
    """The recipe with the legs chosen: with slack where they may stop early and no budget forbids it.

    Slack does not go beyond root_tokens, with which scratch has the FVU that goals are measured by.
    Controls are those of the layers that a transfer reaches; which these are, the recipe could not know.
    """
    slack = SLACK if run.plan.stop and not run.plan.budget else 1.0
    batch = run.train.batch_tokens
    legs = list[LegSpec]()
    for leg in choice.legs:
        most = min(slack * leg.tokens, max(leg.tokens, run.plan.root_tokens))
        legs.append(leg.changed(tokens=batch * math.ceil(most / batch)))
    for layer in run.plan.controls:
        if transfers := [leg for leg in legs if leg.layer == layer and leg.parent]:
            legs += control_legs(run, layer, transfers)
    return with_legs(run, survey, legs)
