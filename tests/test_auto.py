"""The choice behind preset auto: laws recovered from what they give, the cheapest tree, budgets; on paper."""

import itertools
import json
import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from saerelay.errors import PlanError, RecipeError
from saerelay.planning.choose import Charges, Choice, Question, charges_of, cheapest, choose, with_legs, written_out
from saerelay.planning.compile import compile_plan
from saerelay.planning.curves import DECLINE, GAP_GROWTH, HALF_PER_LATENT, Curves, fit_curves
from saerelay.planning.facts import ModelFacts
from saerelay.planning.recipe import Recipe
from saerelay.planning.survey import (
    LongPilots,
    Survey,
    SurveyCost,
    SurveyedHop,
    SurveyedLayer,
    before_decay,
    survey_plan,
)
from saerelay.runs.directory import RunDirectory
from saerelay.workflows import survey as workflow

LAYERS, HUB, SHORT, LONG, LATENTS = range(6), 3, 4096, 16384, 64


def laws(seed: int = 0) -> Curves:
    """Laws of a model with six layers, the farther apart the dearer the hop."""
    rng = random.Random(seed)
    pairs = [(p, t) for p, t in itertools.permutations(LAYERS, 2) if abs(p - t) <= 2 or HUB in (p, t)]
    return Curves(
        floor=0.05,
        slope=12.0,
        pilot_tokens=SHORT,
        pilot={layer: rng.uniform(0.1, 0.3) if layer != HUB else 0.05 + 12 * SHORT**-DECLINE for layer in LAYERS},
        power={layer: 0.9 ** (layer - HUB) for layer in LAYERS},
        gap={(p, t): 0.004 * abs(p - t) * rng.uniform(0.5, 2) for p, t in pairs},
        half=HALF_PER_LATENT * LATENTS,
    )


def surveyed(c: Curves, **plan: Any) -> Survey:
    """What a survey would find if the laws were exact."""
    return Survey(
        asked=recipe(**plan),
        hub=HUB,
        n_latents=LATENTS,
        pilot_tokens=SHORT,
        block_tokens=1024,
        layers=[
            SurveyedLayer(layer=i, rms_norm=1, fvu=c.pilot[i], refitted=0.9 * c.pilot[i], decay_gain=0.9 ** c.power[i])
            for i in LAYERS
        ],
        hops=[
            SurveyedHop(source=p, target=t, r2=1 - 3 * gap, angle=0.1, fvu=c.pilot[t] + gap,
                        refitted=0.9 * c.pilot[t] + gap / GAP_GROWTH)
            for (p, t), gap in c.gap.items()
        ],
        long=LongPilots(
            long_tokens=LONG,
            long_fvu=c.hub(LONG),
            long_refitted=0.9 * c.hub(LONG),
            long_decay_gain=0.85,
            ends={t: c.scratch(t, LONG) for t in (LAYERS[0], LAYERS[-1])},
            long_hops={t: 0.9 * c.scratch(t, LONG) + gap / GAP_GROWTH for (p, t), gap in c.gap.items() if p == HUB},
        ),
        cost=SurveyCost(
            lm_tokens=20_000, sae_samples=50_000, flops=1e9, seconds=1.0, seconds_per_sample=1e-5,
            seconds_per_lm_flop=1e-12,
        ),
    )  # fmt: skip


def recipe(**plan: Any) -> Recipe:
    sections = {
        "data": {"context": 16},
        "dictionary": {"n_latents": 64, "k": 4},
        "plan": {"preset": "auto", "root_tokens": 131_072, "moment_tokens": 1024} | plan,
        "train": {"batch_tokens": 64},
    }
    return Recipe.parse(sections, source="test")


def test_the_laws_are_recovered_from_what_they_give() -> None:
    truth = laws()
    found = fit_curves(surveyed(truth))
    assert (found.floor, found.slope) == pytest.approx((truth.floor, truth.slope))
    assert found.gap == pytest.approx(truth.gap) and found.half == truth.half
    for layer in LAYERS:
        assert found.scratch(layer, 131_072) == pytest.approx(truth.scratch(layer, 131_072))


def test_tokens_and_fvu_are_inverses() -> None:
    c = laws()
    for layer in LAYERS:
        assert c.tokens_from_scratch(layer, c.scratch(layer, 50_000)) == pytest.approx(50_000)
        assert c.tokens_from_scratch(layer, 1e-3) == math.inf
    needed = c.child_tokens(3, 2, 40_000, c.child(3, 2, 40_000, 9_000))
    assert needed == pytest.approx(9_000, abs=256)
    assert c.child_tokens(3, 2, 40_000, 1.0) == 0 and c.child_tokens(3, 2, 10.0, 1e-3) == math.inf


@pytest.mark.parametrize("seed", range(20))
def test_no_tree_is_cheaper(seed: int) -> None:
    """Against all assignments of parents to five layers that are trees."""
    rng, layers = random.Random(seed), range(5)
    c = laws(seed)
    goals = {layer: c.scratch(layer, 60_000) * rng.uniform(1, 1.2) for layer in layers}
    prices = {layer: rng.uniform(0, 2) for layer in layers}
    price = Charges(1.0, prices, moment_tokens=rng.randrange(8000), root_price=dict.fromkeys(layers, 1.0))

    @cache
    def child_tokens(parent: int, layer: int) -> float:
        return c.child_tokens(parent, layer, c.tokens_from_scratch(parent, goals[parent]), goals[layer])

    def cost(parents: tuple[int | None, ...]) -> float:
        total = 0.0
        for layer, parent in enumerate(parents):
            if parent is None:
                total += c.tokens_from_scratch(layer, goals[layer]) * (1 + prices[layer])
            elif (parent, layer) in c.gap:
                total += child_tokens(parent, layer) * (1 + prices[layer]) + price.moment_tokens * prices[layer]
            else:
                return math.inf
        return total

    def is_tree(parents: tuple[int | None, ...]) -> bool:
        for layer in layers:
            seen, at = set[int](), layer
            while (up := parents[at]) is not None:
                if at in seen:
                    return False
                seen.add(at)
                at = up
        return True

    choices = [[None, *(p for p in layers if p != layer)] for layer in layers]
    least = min(cost(parents) for parents in itertools.product(*choices) if is_tree(parents))
    tree = cheapest(c, goals, price)
    assert tree and cost(tuple(tree.parents[layer] for layer in layers)) == pytest.approx(least)


def test_a_layer_whose_hops_are_dear_becomes_a_root(facts: ModelFacts) -> None:
    c = laws()
    c = Curves(**{**c.__dict__, "gap": {pair: 0.5 if 0 in pair else gap for pair, gap in c.gap.items()}})
    price = Charges(1.0, dict.fromkeys(LAYERS, 0.0), 0, dict.fromkeys(LAYERS, 1.0))
    goals = {layer: c.scratch(layer, 60_000) for layer in LAYERS}
    tree = cheapest(c, goals, price)
    assert tree and tree.parents[0] is None and sum(parent is None for parent in tree.parents.values()) < 6
    only = cheapest(c, goals, price, roots=[3])
    assert only is None or [layer for layer, parent in only.parents.items() if parent is None] == [3]


def test_what_is_trained_on_again_is_not_read_again(facts: ModelFacts) -> None:
    survey = surveyed(laws(), budget="1e12 FLOPs", root_reuse=2, reuse=4)
    price = charges_of(Question(survey.asked, facts, survey, laws(), math.inf), 1.0)
    root = 1000 * price.per_sample + 500 * price.per_read_token[HUB]
    hop = 1000 * price.per_sample + (250 + 1024) * price.per_read_token[0]
    assert (price.of_edge(None, HUB, 1000), price.of_edge(HUB, 0, 1000)) == pytest.approx((root, hop))


def chosen(facts: ModelFacts, **plan: Any) -> Choice:
    survey = surveyed(laws(), **plan)
    return choose(survey.asked, facts, survey)


def test_a_ratio_is_kept_by_every_leg(facts: ModelFacts) -> None:
    choice = chosen(facts, fvu_ratio=1.1)
    assert sorted(leg.layer for leg in choice.legs) == list(LAYERS)
    for leg in choice.legs:
        assert leg.goal.predicted_fvu and leg.goal.predicted_fvu <= 1.1 * choice.reference[leg.layer] * 1.001
    assert chosen(facts, fvu_ratio=1.02).cost.flops > choice.cost.flops > chosen(facts, fvu_ratio=1.5).cost.flops


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "amount", "unit"), [
    ("300k tokens", 3e5, "tokens"), ("6e9 FLOPs", 6e9, "FLOPs"), ("0.002 hours", 0.002, "hours")
])  # fmt: skip
def test_a_budget_is_used_and_kept(facts: ModelFacts, budget: str, amount: float, unit: str) -> None:
    survey = surveyed(laws(), budget=budget)
    choice = choose(survey.asked, facts, survey)
    question = Question(survey.asked, facts, survey, fit_curves(survey), math.inf)
    assert question.unit == unit
    assert question.survey_price == {"tokens": 50_000, "FLOPs": 1e9, "hours": 1 / 3600}[unit]
    assert 0.9 * amount < question.price(choice) + question.survey_price <= amount


def test_a_budget_too_small_is_refused(facts: ModelFacts) -> None:
    with pytest.raises(PlanError, match="plan.budget is 40k tokens, of which the survey takes 5e\\+04; at least"):
        chosen(facts, budget="40k tokens")
    with pytest.raises(PlanError, match="out of reach even for 10 x root_tokens from scratch"):
        chosen(facts, fvu_ratio=0.1)


@pytest.mark.parametrize(("plan", "message"), [
    ({"budget": "ten tokens"}, '"ten tokens" is not a valid budget; write "10M tokens", "5e14 FLOPs" or "1.5 hours"'),
    ({"budget": "10M"}, '"10M" is not a valid budget'),
    ({"budget": "-1 hours"}, "is not a valid budget"),
    ({"budget": "1 hours", "fvu_ratio": 1.1}, "keep one of them"),
    ({"preset": "hub", "fvu_ratio": 1.1}, 'belong to preset = "auto"'),
])  # fmt: skip
def test_wrong_aims_are_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**plan)


@pytest.mark.slow
def test_the_choice_is_a_plan_like_any_other(facts: ModelFacts) -> None:
    survey = surveyed(laws(), controls=[1])
    choice = choose(survey.asked, facts, survey)
    plan = compile_plan(written_out(survey.asked, survey, choice), facts)
    legs = {leg.id: leg for leg in plan.legs}
    assert sum(leg.role == "control" for leg in plan.legs) == 2
    root = next(spec for spec in choice.legs if spec.layer == HUB)
    assert root.goal.decay_gain == pytest.approx(0.85 ** (root.tokens / LONG) ** -0.15, abs=1e-3) and root.tokens > LONG
    for spec in choice.legs:
        leg = legs[spec.id]
        assert (leg.goal.model_dump(), leg.parent) == (spec.goal.model_dump(), spec.parent)
        most = min(1.5 * spec.tokens, max(spec.tokens, survey.asked.plan.root_tokens))
        assert leg.budget_tokens == pytest.approx(most, abs=64)
    bounded = surveyed(laws(), budget="300k tokens")
    exact = choose(bounded.asked, facts, bounded)
    assert compile_plan(written_out(bounded.asked, bounded, exact), facts).legs[0].budget_tokens == exact.legs[0].tokens
    assert with_legs(survey.asked, survey, choice.legs).data.block_tokens == 1024


@pytest.mark.parametrize("root_tokens", [3_000_000, 20_000_000])
def test_on_a_gpu_the_blocks_of_a_survey_suit_the_batches_of_the_plan(facts: ModelFacts, root_tokens: int) -> None:
    asked = recipe(root_tokens=root_tokens)
    asked = asked.changed(train=asked.train.changed(batch_tokens="auto"))
    gpu = facts.changed(device="cuda:0")
    block = survey_plan(asked, gpu).block_tokens
    survey = surveyed(laws()).changed(asked=asked, block_tokens=block)
    plan = compile_plan(written_out(asked, survey, choose(asked, gpu, survey)), gpu)
    assert plan.block_tokens == block and block % 4096 == 0
    assert plan.batch_tokens > 512


@pytest.mark.parametrize("share", [0.9999, 1.001])
@pytest.mark.parametrize("flat", ["hub", "end"])
def test_a_curve_that_does_not_seem_to_fall_is_noise(facts: ModelFacts, flat: str, share: float) -> None:
    survey = surveyed(laws())
    pilot = {layer.layer: layer.fvu for layer in survey.layers}
    long = survey.long.changed(ends=survey.long.ends | {0: share * pilot[0]})
    if flat == "hub":
        long = survey.long.changed(long_fvu=share * pilot[HUB])
    choice = choose(survey.asked, facts, survey.changed(long=long))
    from_scratch = [leg.tokens for leg in choice.legs if not leg.hop]
    assert min(from_scratch) > SHORT / 8  # tiny budgets would follow from a curve that is flat


def test_a_survey_is_a_small_plan(facts: ModelFacts) -> None:
    plan = survey_plan(recipe(survey_tokens=16_384), facts)
    tokens = {leg.id: leg.budget_tokens for leg in plan.legs}
    assert tokens == {f"L{i}": 4096 for i in LAYERS} | {
        "long": 16_384,
        "long-L0": 16_384,
        "long-L5": 16_384,
    }
    assert all(leg.schedule.snapshots == [before_decay(leg, plan.recipe)] for leg in plan.legs)
    assert plan.recipe.plan.preset != "auto"
    assert {leg.id for leg in survey_plan(recipe(roots=[0]), facts).legs if leg.layer == 0} == {"L0", "long"}


@pytest.mark.parametrize("decay", [0, 0.02, 1])
def test_pilots_have_a_snapshot_before_their_end_whatever_the_decay(facts: ModelFacts, decay: float) -> None:
    asked = recipe()
    optimizer = asked.train.optimizer.changed(decay=decay)
    plan = survey_plan(asked.changed(train=asked.train.changed(optimizer=optimizer)), facts)
    assert all(0 < age < leg.budget_tokens for leg in plan.legs for age in leg.schedule.snapshots)


def test_a_finished_survey_is_used_again_unless_it_has_another_schema(
    facts: ModelFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunDirectory(tmp_path)
    survey = surveyed(laws())
    survey.save(paths.survey)
    monkeypatch.setattr(workflow, "read_facts", lambda model: facts)
    monkeypatch.setattr(workflow, "tokenise", None)
    assert workflow.survey_run(survey.asked, paths, None)[0] == survey
    old = json.loads(paths.survey.read_text()) | {"schema": Survey.SCHEMA - 1}
    paths.survey.write_text(json.dumps(old))
    with pytest.raises(TypeError):  # it begins with the tokens
        workflow.survey_run(survey.asked, paths, None)
