"""What continues what, and what follows from it: a plan in which legs start from others at their place in every way."""

from pathlib import Path
from typing import Any

import pytest
from test_plan import compiled

from saerelay.errors import PlanError
from saerelay.planning.facts import ModelFacts
from saerelay.planning.leg import Stay
from saerelay.planning.legs import parts_of
from saerelay.planning.plan import Plan
from saerelay.runs.suite import PublishedSuite


def legs_of(n: int) -> list[dict[str, Any]]:
    """A plan written leg by leg; extensions raise `n`."""
    transcoder = {"module": "mlp_in", "module_out": "mlp_out"}
    at_random = {"tokens": 0, "method": "random", "parent": "L2", "control_kind": "random"}
    copy = {"tokens": 1024, "method": "identity"}
    return [
        {"id": "L2", "layer": 2, "tokens": n},
        {"id": "hop", "layer": 1, "tokens": n, "parent": "L2"},
        {"id": "hop-full", "layer": 1, "tokens": n, "control_of": "hop", "control_kind": "full"},
        {"id": "hop-equal", "layer": 1, "tokens": 0, "control_of": "hop"},
        {"id": "hop-random", "layer": 1, "control_of": "hop", **at_random},
        {"id": "L2-random", "layer": 2, "control_of": "L2", **at_random},
        {"id": "tier-random", "layer": 2, "control_of": "tier", **at_random},
        {"id": "tier", "layer": 2, "tokens": n, "parent": "L2", "method": "identity", "k": 8},
        {"id": "L2-seed1", "layer": 2, "tokens": n, "seed": 1},
        {"id": "hop-seed1", "layer": 1, "tokens": n, "parent": "L2-seed1", "seed": 1},
        {"id": "other", "layer": 5, "tokens": n},
        {"id": "other-seed1", "layer": 5, "parent": "other", "seed": 1, **copy},
        {"id": "other-k8", "layer": 5, "parent": "other", "k": 8, **copy},
        {"id": "copied", "layer": 2, "parent": "L2", **copy},
        {"id": "mapped", "layer": 1, "tokens": 1024, "parent": "hop", "method": "affine"},
        {"id": "untrained", "layer": 2, "parent": "L2", "tokens": 0, "method": "random"},
        {"id": "wide", "layer": 2, "parent": "L2", "n_latents": 96, **copy},
        {"id": "jumprelu", "layer": 1, "parent": "hop", "architecture": "jumprelu", **copy},
        {"id": "relu", "layer": 1, "parent": "hop", "architecture": "relu", **copy},
        {"id": "no-control", "layer": 1, "parent": "hop-full", **copy},
        {"id": "mlp", "layer": 2, "module": "mlp_out", "tokens": 1024, "parent": "L2"},
        {"id": "shared", "layer": 3, "tokens": 2048, "shared_layers": [4]},
        {"id": "own", "layer": 3, "parent": "shared", **copy},
        {"id": "shared-4", "layer": 4, "tokens": 1024, "parent": "shared"},
        {"id": "in", "layer": 0, "module": "mlp_in", "tokens": n},
        {"id": "in-to-out", "layer": 0, "tokens": n, **transcoder},
        {"id": "in-to-out-1", "layer": 1, "tokens": n, "parent": "in-to-out", **transcoder},
    ]


INPUTS = ["in", "in-to-out", "in-to-out-1"]
"""Legs that read an MLP's input: an SAE, and transcoders."""
STAYS: dict[str, tuple[Stay, str]] = {
    "tier": ("tier", "tier"),
    "other-k8": ("tier", "other-k8"),
    "copied": ("continuation", "L2"),
    "mapped": ("continuation", "hop"),
    "wide": ("replacement", "wide"),
    "jumprelu": ("replacement", "jumprelu"),
    "relu": ("replacement", "relu"),
    "own": ("replacement", "own"),
}
"""Legs that stay at their parent's place: as what, and their first. All of these were written, not added later."""
EXTENDED = ["L2", "hop", "hop-full", "hop-equal", "tier", "L2-seed1", "hop-seed1", "other", *INPUTS]
FINAL = ["hop+4.1k", "hop-seed1+4.1k", "L2+4.1k", "L2-seed1+4.1k", "tier+4.1k", "other+4.1k", "other-seed1", "other-k8"]
FINAL += ["copied", "mapped", "wide", "jumprelu", "relu", "untrained", "no-control", "own", "shared-4", "mlp"]
FINAL += [f"{leg_id}+4.1k" for leg_id in INPUTS]


@pytest.fixture(scope="module")
def plan(facts: ModelFacts) -> Plan:
    """A plan that was extended twice."""
    plan = compiled(facts, plan={"legs": legs_of(2048)})
    for n in (3072, 4096):
        plan = compiled(facts, finished=plan, plan={"legs": legs_of(n)})
    return plan


@pytest.fixture
def suite(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> PublishedSuite:
    monkeypatch.setattr(PublishedSuite, "_is_published", lambda suite, leg: True)
    monkeypatch.setattr(PublishedSuite, "method", lambda suite, leg: leg.method)
    return PublishedSuite(Path("nowhere"), plan)


@pytest.mark.parametrize("leg_id", [spec["id"] for spec in legs_of(0)])
def test_a_leg_continues_its_parent_if_it_is_the_same_sae_trained_further(plan: Plan, leg_id: str) -> None:
    leg = plan.leg(leg_id)
    assert (plan.stays_as(leg), plan.first_of(leg).id) == STAYS.get(leg_id, (None, leg_id))


@pytest.mark.parametrize("leg_id", EXTENDED)
def test_an_extension_continues_a_leg_of_the_recipe_whatever_it_is(plan: Plan, leg_id: str) -> None:
    first, *more = parts_of(plan.leg(leg_id), plan.legs)
    assert [leg.parent for leg in more] == [first.id, more[0].id]
    assert all(plan.continues(leg) and plan.first_of(leg) == first for leg in more)
    same = ("role", "seed", "control", "dictionary", "site", "kind")
    assert all(getattr(leg, name) == getattr(first, name) for leg in more for name in same)
    extra = plan.leg("hop").moment_tokens if leg_id == "hop-equal" else 0
    assert sum(leg.budget_tokens for leg in (first, *more)) == 4096 + extra


def test_no_leg_is_named_as_what_an_extension_adds_to_another(facts: ModelFacts) -> None:
    """A leg named so would be taken for a part of the other one, which would then lack tokens for an extension."""
    legs = [{"id": "L3", "layer": 3, "tokens": 2048}, {"id": "L3+more", "layer": 3, "tokens": 1024, "parent": "L3"}]
    with pytest.raises(PlanError, match=r'leg L3\+more: an id that begins with "L3\+" is for .* such as L3-more'):
        compiled(facts, plan={"legs": legs})


def test_nor_as_what_it_adds_to_a_repeat_with_another_seed(facts: ModelFacts) -> None:
    legs = [{"id": "L3", "layer": 3, "tokens": 2048}, {"id": "L3-seed1+a", "layer": 2, "tokens": 1024, "parent": "L3"}]
    assert [leg.id for leg in compiled(facts, plan={"legs": legs}).legs] == ["L3", "L3-seed1+a"]
    with pytest.raises(PlanError, match=r'leg L3-seed1\+a: an id that begins with "L3-seed1\+" is for '):
        compiled(facts, plan={"legs": legs}, train={"seeds": 2})


def test_ids_may_have_a_plus_sign_otherwise(facts: ModelFacts) -> None:
    legs = [{"id": "L3", "layer": 3, "tokens": 2048}, {"id": "map+refit", "layer": 2, "tokens": 1024, "parent": "L3"}]
    plan = compiled(facts, plan={"legs": legs}, train={"seeds": 2})
    legs[1]["tokens"] = 2048
    plan = compiled(facts, finished=plan, plan={"legs": legs}, train={"seeds": 2})
    assert {leg.id: plan.repeat_of(leg) for leg in plan.legs if plan.repeat_of(leg)} == {
        "L3-seed1": "L3",
        "map+refit-seed1": "map+refit",
        "map+refit-seed1+2.05k": "map+refit+2.05k",
    }
    assert [leg.id for leg in parts_of(plan.leg("map+refit"), plan.legs)] == ["map+refit", "map+refit+2.05k"]


def test_only_what_an_extension_added_is_a_part_of_a_leg(plan: Plan) -> None:
    assert {leg.id for leg in plan.legs if len(parts_of(leg, plan.legs)) > 1} == set(EXTENDED)
    assert all(len(parts_of(leg, plan.legs)) in (1, 3) for leg in plan.legs)


def test_an_equal_tokens_control_gets_the_tokens_of_the_whole_line(facts: ModelFacts) -> None:
    copy = {"layer": 1, "tokens": 1024, "method": "identity"}
    legs = [
        {"id": "L2", "layer": 2, "tokens": 4096},
        {"id": "hop", "layer": 1, "tokens": 2048, "parent": "L2", "method": "affine"},
        {"id": "more", "parent": "hop", "fork_at": 0.5, **copy},
        {"id": "most", "parent": "more", **copy},
        {"id": "wide", "parent": "hop", "n_latents": 96, **copy},
        *[{"id": f"{of}-equal", "layer": 1, "tokens": 0, "control_of": of} for of in ("hop", "more", "most", "wide")],
    ]
    plan = compiled(facts, plan={"legs": legs})
    moments = plan.leg("hop").moment_tokens
    tokens = {leg.control_of: leg.budget_tokens for leg in plan.legs if leg.control}
    assert moments == 512 and tokens == {
        "hop": 512 + 2048,
        "more": 512 + 1024 + 1024,
        "most": 512 + 1024 + 1024 + 1024,
        "wide": 1024,  # another SAE than hop, which is only its parent
    }
    twice = [leg | ({"tokens": 2048} if leg["id"] == "most" else {}) for leg in legs]
    assert compiled(facts, finished=plan, plan={"legs": twice}).leg("most-equal+4.61k").budget_tokens == 1024


def test_a_leg_is_final_until_another_takes_its_place(suite: PublishedSuite) -> None:
    assert sorted(leg.id for leg in suite.final_legs) == sorted(FINAL)
    controls = ["hop-full+4.1k", "hop-equal+4.61k", "hop-random", "L2-random", "tier-random"]
    assert sorted(leg.id for leg in suite.legs if not suite.successor(leg)) == sorted(FINAL + controls)


def test_a_repeat_is_of_the_same_part(plan: Plan) -> None:
    repeats = {leg.id: plan.repeat_of(leg) for leg in plan.legs if plan.repeat_of(leg)}
    assert repeats == {
        "L2-seed1": "L2", "L2-seed1+3.07k": "L2+3.07k", "L2-seed1+4.1k": "L2+4.1k",
        "hop-seed1": "hop", "hop-seed1+3.07k": "hop+3.07k", "hop-seed1+4.1k": "hop+4.1k",
        "other-seed1": "other",
    }  # fmt: skip


def test_controls_are_compared_with_what_continues_their_leg(suite: PublishedSuite) -> None:
    compared = {leg.id: suite.compared_with(leg) for leg in suite.legs if leg.control}
    assert compared == {
        "hop-full": "hop+4.1k", "hop-full+3.07k": "hop+4.1k", "hop-full+4.1k": "hop+4.1k",
        "hop-equal": "hop", "hop-equal+3.58k": "hop+4.1k", "hop-equal+4.61k": "hop+4.1k",
        "hop-random": "hop+4.1k", "L2-random": "L2+4.1k", "tier-random": "tier+4.1k",
    }  # fmt: skip
    assert [leg.id for leg in suite.scratch_counterparts(suite.leg("hop+4.1k"))] == ["hop-full+4.1k", "hop-equal+4.61k"]
    assert [leg.id for leg in suite.scratch_counterparts(suite.leg("wide"))] == ["copied", "L2+4.1k"]


@pytest.mark.parametrize(
    ("leg_id", "made", "transferred"),
    [
        ("copied", "from scratch, continued", False),
        ("L2+4.1k", "from scratch, continued", False),
        ("mapped", "best map + refit from L2, continued", True),
        ("hop-equal+4.61k", "from scratch, continued", False),
        ("wide", "identity + refit from L2", True),
        ("tier+4.1k", "copy with 8 active latents, continued", True),
        ("relu", "identity + refit from hop", True),
        ("own", "identity + refit from shared", True),
        ("tier-random", "random dictionary, refitted", False),
    ],
)
def test_how_a_leg_was_made_begins_with_its_first(
    suite: PublishedSuite, leg_id: str, made: str, transferred: bool
) -> None:
    leg = suite.leg(leg_id)
    assert (suite.made(leg), suite.is_transferred(leg)) == (made, transferred)
