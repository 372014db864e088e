"""From a survey to a plan: the cheapest tree of hops that reaches a quality, or the best quality that a budget buys.

`choose` predicts tokens by the `curves` of the survey and prices by compiling each candidate; `workflows.survey` calls
it, and `written_out` makes a recipe of what it chose.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import networkx as nx

from saerelay.errors import PlanError
from saerelay.planning.batches import usual_batch
from saerelay.planning.compile import compile_plan
from saerelay.planning.cost import Cost, forward_flops, plan_cost, step_flops
from saerelay.planning.curves import Curves, fit_curves
from saerelay.planning.facts import ModelFacts
from saerelay.planning.leg_spec import LegGoal, LegHop, LegSpec
from saerelay.planning.presets import control_legs
from saerelay.planning.recipe import Recipe, parse_budget
from saerelay.planning.survey import MAX_ROOT_MULTIPLE, Survey
from saerelay.site import Site
from saerelay.spec import rounded_up

DEFAULT_RATIO = 1.05
SLACK = 1.5
"""A leg that may stop early gets this multiple of the tokens it is predicted to need, unless there is a budget."""
ROOT_MULTIPLES = (1.0, 1.5, 2.0, 3.0)
"""Multiples of the tokens that a root's own goal needs that are tried: a better root makes all hops from it cheaper."""
DOUBT = 1.25
"""Factor by which a root other than the hub must be cheaper, since its curve is less certain."""
CHILD_DECAY_GAIN = 0.97
"""FVU after the learning rate's decay over FVU before it, for a leg that began with a hop."""
FORWARD_SHARES = (0.0, 0.5, 1.0)
"""Shares of a forward pass that a leg is charged while the tree is chosen, since legs in training at once share it."""
RATIO_TOLERANCE = 2e-3
"""Tolerance, in the logarithm, of the search for the ratio that a budget buys."""


class Choice(NamedTuple):
    """The legs chosen, and their predicted cost."""

    ratio: float
    """Upper bound on every layer's FVU, over the FVU predicted from scratch on root_tokens."""
    reference: dict[int, float]
    """This FVU from scratch, by layer."""
    legs: list[LegSpec]
    """The legs as predicted, without slack and controls."""
    cost: Cost
    """Cost of these legs, without the survey."""
    seconds: float
    seconds_lm: float

    def time(self) -> dict[str, float]:
        """Return the seconds predicted from the survey's speeds, in the form of `saerelay plan --timing`."""
        return {"lm": self.seconds_lm, "steps": self.seconds - self.seconds_lm, "total": self.seconds}


@dataclass(frozen=True)
class Question:
    """What a plan is chosen for, and the data it is chosen from."""

    recipe: Recipe
    facts: ModelFacts
    survey: Survey
    curves: Curves
    memory_bytes: float

    @property
    def unit(self) -> str:
        """The unit of a plan's price: that of the budget, or hours."""
        budget = self.recipe.plan.auto.budget
        return parse_budget(budget)[1] if budget else "hours"

    def price(self, choice: Choice) -> float:
        """Return the price of a plan in this unit."""
        return self._in_unit(choice.cost.sae_samples, choice.cost.flops, choice.seconds)

    @property
    def survey_price(self) -> float:
        """The price of the survey in this unit."""
        cost = self.survey.cost
        return self._in_unit(cost.sae_samples, cost.flops, cost.seconds)

    def _in_unit(self, samples: int, flops: float, seconds: float) -> float:
        prices = {"tokens": samples, "FLOPs": flops, "hours": seconds / 3600}
        return prices[self.unit]


def choose(recipe: Recipe, facts: ModelFacts, survey: Survey, memory_bytes: float = math.inf) -> Choice:
    """Return the cheapest tree of the quality asked for, or the best that the budget buys, survey included.

    Raises PlanError if the quality is out of reach, or the budget too small for any tree.
    """
    question = Question(recipe, facts, survey, fit_curves(survey), memory_bytes)
    if recipe.plan.auto.budget:
        return _best_within_budget(question, parse_budget(recipe.plan.auto.budget)[0])
    ratio = recipe.plan.auto.fvu_ratio
    if ratio == "auto":
        ratio = DEFAULT_RATIO
    choice = choose_at(ratio, question)
    if choice is None:
        raise PlanError(
            f"plan.fvu_ratio is {ratio}, which is out of reach even for {MAX_ROOT_MULTIPLE} x root_tokens from "
            "scratch, as the survey predicts; raise plan.fvu_ratio or plan.root_tokens"
        )
    return choice


def _best_within_budget(question: Question, amount: float) -> Choice:
    """Return the choice with the lowest ratio that a budget buys, by bisection."""
    surveyed = question.survey_price
    best = choose_at(10, question)
    if best is None or question.price(best) + surveyed > amount:
        least = f"{question.price(best) + surveyed:.3g}" if best else "more"
        raise PlanError(
            f"plan.budget is {question.recipe.plan.auto.budget}, of which the survey takes {surveyed:.3g}; at least "
            f"{least} {question.unit} are needed to bring every layer to even ten times the FVU of an SAE trained from "
            "scratch on root_tokens. Raise the budget, or lower plan.survey_tokens"
        )
    low = math.log(0.5)
    high = math.log(10)
    while high - low > RATIO_TOLERANCE:
        middle = (low + high) / 2
        choice = choose_at(math.exp(middle), question)
        if choice and question.price(choice) + surveyed <= amount:
            high = middle
            best = choice
        else:
            low = middle
    return best


def choose_at(ratio: float, question: Question) -> Choice | None:
    """Return the cheapest plan in which every layer meets its goal, or None; a few trees are compared as plans."""
    curves = question.curves
    root_tokens = question.recipe.plan.root_tokens
    reference = {layer: curves.scratch(layer, root_tokens) for layer in curves.pilot}
    goals = {layer: ratio * fvu for layer, fvu in reference.items()}
    for layer, goal in goals.items():
        if curves.tokens_from_scratch(layer, goal) > MAX_ROOT_MULTIPLE * root_tokens:
            return None
    choices = [_as_choice(tree, ratio, reference, question) for tree in _candidates(goals, question)]
    return min(choices, key=question.price, default=None)


def _as_choice(tree: "Tree", ratio: float, reference: dict[int, float], question: Question) -> Choice:
    """Return a tree's legs with the cost of the plan that they compile to."""
    legs = tree_legs(tree, question.recipe, question.survey)
    recipe = with_legs(question.recipe, question.survey, legs)
    cost = plan_cost(compile_plan(recipe, question.facts, memory_bytes=question.memory_bytes))
    rates = question.survey.cost
    seconds_lm = cost.lm_flops * rates.seconds_per_lm_flop
    seconds = seconds_lm + cost.sae_samples * rates.seconds_per_sample
    return Choice(ratio, reference, legs, cost, seconds, seconds_lm)


# --- trees --------------------------------------------------------------------------------------------------------


class Tree(NamedTuple):
    """The layer that each layer is trained from (None: from scratch), and on how many tokens."""

    parents: dict[int, int | None]
    tokens: dict[int, float]
    fvu: dict[int, float]
    """Predicted FVU of each layer."""


class Charges(NamedTuple):
    """What the edges of a tree cost, in a budget's unit."""

    per_sample: float
    """Cost of training on one token."""
    per_read_token: dict[int, float]
    """Cost of reading one token with the language model up to a layer, by layer."""
    moment_tokens: int
    root_price: dict[int, float]
    """Price of a root as a multiple of its cost, by layer."""
    root_reuse: int = 1
    """How many times a root is trained on each token that is read for it."""
    hop_reuse: int = 1

    def of_edge(self, parent: int | None, layer: int, tokens: float) -> float:
        """Return the cost of training a layer from a parent, or from scratch, on some tokens."""
        if parent is None:
            tokens_read = tokens / self.root_reuse
        else:
            tokens_read = tokens / self.hop_reuse + self.moment_tokens
        cost = tokens * self.per_sample + tokens_read * self.per_read_token[layer]
        return cost * self.root_price[layer] if parent is None else cost


class Overtraining(NamedTuple):
    """Layers that are trained beyond their goal, for the sake of their children."""

    layers: Sequence[int] = ()
    multiple: float = 1.0
    """Multiple of the tokens that their goal takes."""
    only_parents: bool = False
    """Whether only these layers may have children."""


def _candidates(goals: dict[int, float], question: Question) -> list[Tree]:
    """Return the trees worth comparing.

    They are the cheapest trees at several prices of a forward pass, with their roots overtrained or not, and all layers
    from scratch in one pass. An algorithm for spanning trees needs a price for each edge, but two costs depend on the
    whole tree: legs that train at the same time share their forward passes, so that each pays only a share of them, and
    better roots make all their children cheaper. So a few shares and a few budgets of the roots are tried, and
    `choose_at` compares the true costs of the resulting trees.
    """
    roots = question.recipe.plan.roots
    without_hops = replace(question.curves, gap={})
    trees: list[Tree | None] = []
    for share in FORWARD_SHARES:
        charges = charges_of(question, share)
        tree = cheapest(question.curves, goals, charges, roots)
        chosen = roots or [question.survey.hub]
        if tree:
            chosen = [layer for layer, parent in tree.parents.items() if parent is None]
        for multiple, only_parents in product(ROOT_MULTIPLES, (False, True)):
            overtraining = Overtraining(chosen, multiple, only_parents)
            trees.append(cheapest(question.curves, goals, charges, roots, overtraining))
        trees.append(cheapest(without_hops, goals, charges, roots))
    return [tree for tree in trees if tree]


def cheapest(
    curves: Curves,
    goals: dict[int, float],
    charges: Charges,
    roots: Sequence[int] = (),
    overtraining: Overtraining | None = None,
) -> Tree | None:
    """Return the arborescence of least cost in which every layer meets its goal, or None.

    If `roots` are given, only they are trained from scratch. The tokens a child needs follow from its parent's goal,
    not from how the parent reached it, so that each edge has a fixed price and the best tree is a minimum spanning
    arborescence.
    """
    overtraining = overtraining or Overtraining()
    from_scratch = {}
    for layer, goal in goals.items():
        multiple = overtraining.multiple if layer in overtraining.layers else 1
        from_scratch[layer] = curves.tokens_from_scratch(layer, goal) * multiple
    needed = _tokens_needed(curves, goals, from_scratch, roots, overtraining)

    # The root of the graph is a node that stands for training from scratch.
    graph = nx.DiGraph()
    graph.add_nodes_from(["scratch", *goals])
    for (parent, layer), tokens in needed.items():
        if tokens < math.inf:
            source = "scratch" if parent is None else parent
            graph.add_edge(source, layer, cost=charges.of_edge(parent, layer, tokens))
    try:
        tree = nx.minimum_spanning_arborescence(graph, attr="cost")
    except nx.NetworkXException:
        return None

    parents = {layer: None if parent == "scratch" else parent for parent, layer in tree.edges}
    tokens = {layer: needed[parents[layer], layer] for layer in goals}
    fvu = {}
    for layer, goal in goals.items():
        parent = parents[layer]
        if parent is None:
            fvu[layer] = curves.scratch(layer, tokens[layer])
        elif not tokens[layer]:  # the hop alone reaches the goal
            fvu[layer] = curves.child(parent, layer, from_scratch[parent], 0)
        else:
            fvu[layer] = goal
    return Tree(parents, tokens, fvu)


def _tokens_needed(
    curves: Curves,
    goals: dict[int, float],
    from_scratch: dict[int, float],
    roots: Sequence[int],
    overtraining: Overtraining,
) -> dict[tuple[int | None, int], float]:
    """Return the tokens after which a layer meets its goal, by (parent, layer), for all edges allowed.

    The parent of a layer trained from scratch is None.
    """
    needed: dict[tuple[int | None, int], float] = {}
    for layer, goal in goals.items():
        if not roots or layer in roots:
            needed[None, layer] = from_scratch[layer]
        for parent in overtraining.layers if overtraining.only_parents else goals:
            if (parent, layer) in curves.gap and layer not in overtraining.layers:
                needed[parent, layer] = curves.child_tokens(parent, layer, from_scratch[parent], goal)
    return needed


def charges_of(question: Question, share: float) -> Charges:
    """Return the costs of a tree's edges if a leg pays `share` of the forward passes that it reads."""
    recipe = question.recipe
    facts = question.facts
    survey = question.survey
    width = facts.width(Site(0, recipe.sites.first_kind.module))
    flops_per_step, _ = step_flops(recipe.dictionary.sized(width), facts, width, width)
    prices = {  # unit: (of a training sample, of an operation of the language model)
        "tokens": (1.0, 0.0),
        "FLOPs": (flops_per_step, 1.0),
        "hours": (survey.cost.seconds_per_sample, survey.cost.seconds_per_lm_flop),
    }
    per_sample, per_lm_flop = prices[question.unit]
    per_read_token = {}
    root_price = {}
    for surveyed in survey.layers:
        layer = surveyed.layer
        per_read_token[layer] = share * per_lm_flop * forward_flops(facts, layer + 1, recipe.data.context)
        root_price[layer] = 1.0 if layer == survey.hub else DOUBT
    plan = recipe.plan
    return Charges(
        per_sample=per_sample,
        per_read_token=per_read_token,
        moment_tokens=plan.hop.moment_tokens,
        root_price=root_price,
        root_reuse=plan.root_reuse,
        hop_reuse=plan.hop.reuse,
    )


# --- legs ---------------------------------------------------------------------------------------------------------


def tree_legs(tree: Tree, recipe: Recipe, survey: Survey) -> list[LegSpec]:
    """Return the legs of a tree."""
    batch = usual_batch(recipe)
    ids = {}
    for layer, parent in tree.parents.items():
        name = recipe.sites.first_kind.leg_name(layer)
        ids[layer] = name if parent is None else f"{name}-from-L{parent}"
    legs = []
    for layer, parent in sorted(tree.parents.items()):
        gain = CHILD_DECAY_GAIN if parent is not None else decay_gain(layer, tree.tokens[layer], survey)
        fvu = round(tree.fvu[layer], 5)
        legs.append(
            LegSpec(
                id=ids[layer],
                layer=layer,
                tokens=rounded_up(tree.tokens[layer], batch),
                hop=None if parent is None else LegHop(parent=ids[parent]),
                goal=LegGoal(goal_fvu=fvu, predicted_fvu=fvu, decay_gain=round(gain, 3)),
            )
        )
    return legs


def decay_gain(layer: int, tokens: float, survey: Survey) -> float:
    """Return the FVU after the learning rate's decay over the FVU before it, for a leg from scratch.

    It is the gain of the layer's pilot, times the ratio of the hub's long pilot's gain to its short pilot's; and closer
    to 1 for a longer leg, which has a lower rate.
    """
    pilots = {pilot.layer: pilot.decay_gain for pilot in survey.layers}
    gain = min(1.0, pilots[layer] * survey.long.long_decay_gain / pilots[survey.hub])
    return gain ** max(1.0, tokens / survey.long.long_tokens) ** -0.15


def with_legs(recipe: Recipe, survey: Survey, legs: list[LegSpec]) -> Recipe:
    """Return the recipe with an explicit plan and the block size of the survey."""
    plan = recipe.plan.changed(legs=legs, controls=[])
    data = recipe.data.changed(block_tokens=survey.block_tokens)
    return recipe.changed(plan=plan, data=data)


def written_out(recipe: Recipe, survey: Survey, choice: Choice) -> Recipe:
    """Return the recipe with the legs chosen, with slack if they may stop early and there is no budget.

    Slack does not go beyond root_tokens, after which training from scratch has the FVU that goals are relative to.
    Only layers that a transfer reaches get controls; the recipe could not know which layers these would be.
    """
    slack = SLACK if recipe.plan.stop and not recipe.plan.auto.budget else 1.0
    batch = usual_batch(recipe)
    legs: list[LegSpec] = []
    for leg in choice.legs:
        most = min(slack * leg.tokens, max(leg.tokens, recipe.plan.root_tokens))
        legs.append(leg.changed(tokens=rounded_up(most, batch)))
    for layer in recipe.plan.controls:
        transfers = [leg for leg in legs if leg.layer == layer and leg.hop]
        if transfers:
            legs += control_legs(recipe, recipe.sites.first_kind.leg_name(layer), transfers)
    return with_legs(recipe, survey, legs)
