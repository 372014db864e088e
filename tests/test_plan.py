"""Plans: presets, placing on the axis, costs, refusals."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from saerelay.errors import ModelError, PlanError, RecipeError, RunDirectoryError
from saerelay.planning.compile import compile_plan
from saerelay.planning.cost import forward_flops, model_bytes, plan_cost, refit_flops, state_bytes
from saerelay.planning.facts import ModelFacts
from saerelay.planning.leg import External
from saerelay.planning.legs import auto_lr, parts_of
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import Recipe
from saerelay.sae.spec import TRIAL
from saerelay.site import Site, SiteKind
from saerelay.views.tables.plan import inherited_note, plan_facts, plan_table, time_basis
from saerelay.workflows.settle import plan_run

BASE: dict[str, Any] = {
    "data": {"context": 16, "block_tokens": 256},
    "dictionary": {"n_latents": 64, "k": 4},
    "plan": {"root_tokens": 4096, "transfer_tokens": 1024, "moment_tokens": 512, "refit_tokens": 256, "refit": True},
    "train": {"batch_tokens": 64},
}


def compiled(
    facts: ModelFacts, memory_bytes=math.inf, externals=None, finished=None, parents=None, **sections: dict[str, Any]
) -> Plan:
    data = {key: BASE.get(key, {}) | sections.get(key, {}) for key in BASE | sections}
    run = Recipe.parse(data, source="test")
    return compile_plan(run, facts, memory_bytes=memory_bytes, externals=externals, finished=finished, parents=parents)


def shape(plan: Plan) -> dict[str, str]:
    return {leg.id: leg.parent for leg in plan.legs}


def test_a_plan_of_a_recipe_that_names_things_twice_is_read_as_if_it_named_them_once(facts: ModelFacts) -> None:
    once = compiled(facts, sites={"layers": [1, 2]}, plan={"controls": [1], "tiers": [2], "preset": "backward"})
    data = once.to_data()
    data["recipe"]["sites"]["layers"] = [1, 2, 2]
    data["recipe"]["plan"] |= {"controls": [1, 1], "tiers": [2, 2]}  # as recipes once could
    assert Plan.from_data(data, source="plan.json") == once
    with pytest.raises(RecipeError, match="2 is listed twice"):
        compiled(facts, sites={"layers": [1, 2, 2]})


def test_hub_takes_all_layers_straight_from_one_root(facts: ModelFacts) -> None:
    plan = compiled(facts, plan={"preset": "hub"})
    assert shape(plan) == {"L3": ""} | {f"L{i}-from-L3": "L3" for i in (0, 1, 2, 4, 5)}
    assert {leg.fold_at for leg in plan.legs if leg.parent} == {4096}
    assert all(leg.start == 4096 - 512 for leg in plan.legs if leg.parent)


def test_hub_with_two_roots_uses_the_nearer_and_prefers_backward(facts: ModelFacts) -> None:
    plan = compiled(facts, plan={"preset": "hub", "roots": [1, 5]})
    assert {leg.layer: leg.parent for leg in plan.legs} == {1: "", 5: "", 0: "L1", 2: "L1", 3: "L5", 4: "L5"}


def test_on_a_gpu_a_leg_takes_large_batches_where_it_still_takes_a_thousand_steps(facts: ModelFacts) -> None:
    keys = {"root_tokens": 5_000_000, "transfer_tokens": 100_000, "controls": [0]}
    open_recipe: dict[str, Any] = {"plan": keys, "data": {"block_tokens": 65_536}, "train": {"batch_tokens": "auto"}}
    plan = compiled(facts.changed(device="cuda:0"), **open_recipe)
    batches = {leg.id: leg.schedule.batch_tokens for leg in plan.legs}
    assert batches["L3"] == batches["L0-scratch-full"] == 4096 and plan.batch_tokens == 4096
    assert batches["L0-from-L3"] == batches["L0-scratch-equal"] == 512
    assert plan.leg("L3").schedule.lr == auto_lr(facts.d_model, plan.leg("L3").budget_tokens, 4096)
    assert [column.header for column in plan_table(plan).columns][-1] == "batch"
    slow_steps = "from the survey's pilots, whose steps take 512 tokens; with up to 4096 it may be less"
    assert time_basis(plan) == slow_steps  # the time of a GPU's small step is no measure of that of its large ones

    on_cpu = compiled(facts, **open_recipe)
    assert {leg.schedule.batch_tokens for leg in on_cpu.legs} == {on_cpu.batch_tokens} == {512}
    assert time_basis(on_cpu) == "from the survey's pilots"
    asked = compiled(facts.changed(device="cuda:0"), **(open_recipe | {"train": {"batch_tokens": 1024}}))
    assert {leg.schedule.batch_tokens for leg in asked.legs} == {1024}

    # Batches divide blocks whose size is given.
    odd = open_recipe | {"data": {"block_tokens": 5 * 1024}}
    assert compiled(facts.changed(device="cuda:0"), **odd).batch_tokens == 1024

    # More legs keep the step of the run that they extend.
    short = open_recipe | {"plan": keys | {"root_tokens": 100_000, "controls": []}}
    finished = compiled(facts.changed(device="cuda:0"), **short)
    longer = compiled(facts.changed(device="cuda:0"), finished=finished, **open_recipe)
    assert longer.batch_tokens == finished.batch_tokens == 512

    # A finished leg that gets more tokens keeps its batch, although a leg of so many tokens would get a larger one.
    plans = [open_recipe | {"plan": {"root_tokens": tokens, "transfer_tokens": 5_000_000}} for tokens in (10**5, 10**7)]
    finished = compiled(facts.changed(device="cuda:0"), **plans[0])
    longer = compiled(facts.changed(device="cuda:0"), finished=finished, **plans[1])
    assert finished.batch_tokens == 4096
    assert {leg.schedule.batch_tokens for leg in longer.legs if leg.layer == 3} == {512}


def test_chains_follow_each_other(facts: ModelFacts) -> None:
    plan = compiled(facts, plan={"preset": "forward"})
    assert shape(plan) == {"L0": "", "L1-from-L0": "L0"} | {
        f"L{i}-from-L{i - 1}": f"L{i - 1}-from-L{i - 2}" for i in range(2, 6)
    }
    folds = [leg.fold_at for leg in plan.legs]
    assert folds == [0] + [4096 + 1024 * i for i in range(5)]
    plan = compiled(facts, plan={"preset": "backward", "roots": [3]})
    assert {leg.layer: leg.parent for leg in plan.legs} == {
        3: "", 2: "L3", 1: "L2-from-L3", 0: "L1-from-L2", 4: "L3", 5: "L4-from-L3"
    }  # fmt: skip


def test_alternate_trains_every_other_layer(facts: ModelFacts) -> None:
    plan = compiled(facts, plan={"preset": "alternate"})
    assert {leg.layer: leg.parent for leg in plan.legs} == {0: "L1", 1: "", 2: "L3", 3: "", 4: "L5", 5: ""}
    plan = compiled(facts, plan={"preset": "alternate", "direction": "forward"}, sites={"layers": [0, 2, 4]})
    assert {leg.layer: leg.parent for leg in plan.legs} == {0: "", 2: "L0", 4: ""}


def test_paper_is_all_from_scratch_and_both_neighbours(facts: ModelFacts) -> None:
    plan = compiled(facts, plan={"preset": "paper"}, sites={"layers": [0, 1, 2]})
    assert shape(plan) == {
        "L0": "", "L1": "", "L2": "", "L0-from-L1": "L1", "L1-from-L0": "L0", "L1-from-L2": "L2", "L2-from-L1": "L1"
    }  # fmt: skip
    assert [len(leg.schedule.snapshots) for leg in plan.legs] == [9, 9, 9, 4, 4, 4, 4]


def test_scratch_has_no_parents(facts: ModelFacts) -> None:
    assert set(shape(compiled(facts, plan={"preset": "scratch"})).values()) == {""}


@pytest.mark.parametrize("preset", ["hub", "forward", "backward", "alternate", "scratch", "paper"])
def test_one_layer_is_a_root(facts: ModelFacts, preset: str) -> None:
    assert shape(compiled(facts, plan={"preset": preset}, sites={"layers": [2]})) == {"L2": ""}


def test_controls_have_equal_tokens_and_the_full_budget(facts: ModelFacts) -> None:
    plan = compiled(facts, plan={"controls": [1]})
    equal, full = plan.leg("L1-scratch-equal"), plan.leg("L1-scratch-full")
    transfer = plan.leg("L1-from-L3")
    assert equal.control_of == full.control_of == transfer.id and (equal.parent, full.parent) == ("", "")
    assert equal.budget_tokens == transfer.budget_tokens + transfer.moment_tokens
    assert full.budget_tokens == plan.leg("L3").budget_tokens and full.start == 0
    with pytest.raises(PlanError, match="L3, which no transfer in this plan reaches"):
        compiled(facts, plan={"controls": [3]})


def test_a_random_control_is_only_refitted(facts: ModelFacts) -> None:
    plan = compiled(facts, plan={"controls": [1], "control_kinds": ["random"], "refit": True})
    random = plan.leg("L1-random")
    assert (random.role, random.control_of, random.control_kind) == ("control", "L1-from-L3", "random")
    assert (random.budget_tokens, random.moment_tokens) == (0, 0)
    assert random.refit_tokens == plan.leg("L1-from-L3").refit_tokens > 0
    assert [leg.id for leg in plan.legs if leg.control] == ["L1-random"]


def test_children_may_fork_inside_the_roots_pass(facts: ModelFacts) -> None:
    plan = compiled(facts, plan={"fork_at": 0.5})
    child = plan.leg("L2-from-L3")
    assert (child.fold_at, child.hop.fork_at_tokens, plan.n_tokens) == (2048, 2048, 4096)
    plan = compiled(facts, plan={"fork_at": 1000})
    assert plan.leg("L2-from-L3").hop.fork_at_tokens == 1024


def test_newness_is_the_share_of_own_tokens_in_the_whole_lineage(facts: ModelFacts) -> None:
    legs = [
        {"id": "a", "layer": 3, "tokens": 4096},
        {"id": "b", "layer": 2, "tokens": 1024, "parent": "a", "fork_at": 0.5},
        {"id": "c", "layer": 1, "tokens": 1024, "parent": "b"},
    ]
    plan = compiled(facts, plan={"legs": legs})
    assert [plan.newness(plan.leg(name)) for name in "abc"] == [1.0, 1 / 3, 1 / 4]


def test_a_fork_at_more_tokens_than_the_parent_is_trained_on_is_at_its_end(facts: ModelFacts) -> None:
    plan = compiled(facts, plan={"preset": "forward", "fork_at": 2048})
    assert {leg.id: leg.start for leg in plan.legs if leg.layer < 3} == {
        "L0": 0,
        "L1-from-L0": 2048 - 512,  # half of the root's tokens
        "L2-from-L1": plan.leg("L1-from-L0").end - 512,  # and more than this leg has
    }
    assert plan.leg("L2-from-L1").hop.fork_at_tokens == 1024


def test_a_fork_before_the_moments_are_in_waits_for_them(facts: ModelFacts) -> None:
    plan = compiled(facts, plan={"fork_at": 100})
    assert plan.leg("L2-from-L3").start == 0 and plan.leg("L2-from-L3").hop.fork_at_tokens == 512


def test_identity_needs_no_moments(facts: ModelFacts) -> None:
    plan = compiled(facts, plan={"method": "identity", "refit": False})
    assert all(leg.moment_tokens == leg.refit_tokens == 0 for leg in plan.legs)


def test_sites_are_open_for_training_and_for_coming_hops(facts: ModelFacts) -> None:
    plan = compiled(facts, data={"outlier_norm": 0})
    assert plan.open_sites(0, 256) == [Site(3)]
    assert plan.open_sites(4096 - 512, 4096 - 256) == [Site(i) for i in range(6)]
    assert plan.open_sites(4096, 4352) == [Site(i) for i in (0, 1, 2, 4, 5)]
    assert plan.open_sites(plan.n_tokens, plan.n_tokens + 256) == []
    probed = compiled(facts)
    assert probed.probe_site == Site(3) and Site(3) in probed.open_sites(4096, 4352)


def test_outliers_are_looked_for_in_the_middle_of_the_model_whichever_layers_are_read(facts: ModelFacts) -> None:
    assert [compiled(facts, sites={"layers": layers}).probe for layers in ([0, 1], [5], "all")] == [3, 3, 3]
    assert compiled(facts, data={"outlier_norm": 0}).probe is None
    refusals = {f"L{layer}": "no reason" for layer in (1, 2, 3)}
    lacking = facts.changed(sites=facts.sites.changed(refusals=refusals))
    assert compiled(lacking, sites={"layers": [0]}).probe == 4


def test_cohorts_that_do_not_fit_are_split(facts: ModelFacts) -> None:
    whole = compiled(facts, plan={"preset": "scratch"})
    one = state_bytes(whole.legs[0], facts, whole.block_tokens)
    split = compiled(facts, memory_bytes=2.5 * one, plan={"preset": "scratch"})
    assert sorted(leg.start for leg in split.legs) == [0, 0, 4096, 4096, 8192, 8192]
    assert plan_cost(split).lm_tokens == 3 * plan_cost(whole).lm_tokens
    with pytest.raises(PlanError, match="alone needs .* lower n_latents or raise train.memory_gib"):
        compiled(facts, memory_bytes=0.5 * one)


def test_explicit_legs(facts: ModelFacts) -> None:
    legs = [
        {"id": "a", "layer": 1, "tokens": "2k"},
        {
            "id": "b",
            "layer": 2,
            "parent": "a",
            "tokens": 512,
            "fork_at": 0.5,
            "method": "rescale",
            "refit": False,
            "lr": 1e-3,
        },
        {"id": "c", "layer": 1, "tokens": 512, "n_latents": 32, "seed": 7, "batch_tokens": 32, "after": "b"},
        {"id": "d", "layer": 2, "tokens": 640, "control_of": "b", "control_kind": "full"},
    ]
    plan = compiled(facts, plan={"legs": legs})
    a, b, c, d = plan.legs
    assert (a.budget_tokens, b.parent, b.method, b.refit_tokens, b.schedule.lr) == (2048, "a", "rescale", 0, 1e-3)
    assert (c.dictionary.n_latents, c.seed, c.schedule.batch_tokens) == (32, 7, 32) and c.start >= b.end
    assert (d.role, d.control_of, d.control_kind) == ("control", "b", "full")


@pytest.mark.parametrize(
    ("leg", "message"),
    [
        ({"parent": "nobody"}, 'leg x names "nobody", which is not a leg of this plan'),
        ({"parent": "x"}, "legs wait for each other in a circle: x -> x"),
        ({"layer": 9}, "layer 9 is out of range: paper-model has layers 0 to 5"),
        ({"k": 100}, "dictionary.k is 100 but there are only 64 latents; lower k or raise n_latents"),
        ({"batch_tokens": 48}, "batch_tokens 48 does not divide train.batch_tokens 64"),
        ({"parent": "y", "module": "attn_z"}, "reads activations of width 16, but those of L1.attn_z have width 24"),
        ({"id": "y"}, "two legs have the id y"),
        ({"tokens": 0}, "is trained from scratch with 0 tokens"),
    ],
)
def test_refusals(facts: ModelFacts, leg: dict[str, Any], message: str) -> None:
    legs = [{"id": "y", "layer": 1, "tokens": 512}, {"id": "x", "layer": 1, "tokens": 512} | leg]
    with pytest.raises(PlanError, match=message.replace("(", r"\(")):
        compiled(facts, plan={"legs": legs})


def test_refusals_of_whole_recipes(facts: ModelFacts) -> None:
    with pytest.raises(PlanError, match="layer 6 is out of range"):
        compiled(facts, sites={"layers": [1, 6]})
    with pytest.raises(PlanError, match="takes at most 64 tokens"):
        compiled(facts, data={"context": 128})
    with pytest.raises(PlanError, match="plan.roots names layer 5, which is not among sites.layers"):
        compiled(facts, sites={"layers": [1, 2]}, plan={"roots": [5]})
    with pytest.raises(PlanError, match="write controls as legs with control_of"):
        compiled(facts, plan={"legs": [{"id": "a", "layer": 1, "tokens": 64}], "controls": [1]})
    with pytest.raises(PlanError, match="fits a 16-dimensional map on 16 tokens; raise plan.moment_tokens above 32"):
        compiled(
            facts, data={"context": 16, "block_tokens": 16}, train={"batch_tokens": 16}, plan={"moment_tokens": 16}
        )
    with pytest.raises(PlanError, match="must be a multiple of train.batch_tokens"):
        compiled(facts, data={"context": 16, "block_tokens": 100})


def test_a_parent_outside_the_plan(facts: ModelFacts) -> None:
    outside = External(layer=4, module="resid_post", architecture="batchtopk", n_latents=48, d_model=16, k=3, path="/a")
    leg = {"id": "x", "layer": 1, "parent": "runs/a/legs/L4", "tokens": 512}
    plan = compiled(facts, externals={"runs/a/legs/L4": outside}, plan={"legs": [leg]}, data={"outlier_norm": 0})
    assert plan.parent_site(plan.legs[0]) == Site(4)
    assert plan.legs[0].dictionary.architecture == "batchtopk" and plan.legs[0].dictionary.n_latents == 48
    assert plan.open_sites(0, 256) == [Site(1), Site(4)] and plan.open_sites(512, 768) == [Site(1)]


def test_a_parent_outside_the_plan_reads_what_the_model_has(facts: ModelFacts) -> None:
    """Where a map is fitted; a plain copy needs nothing of its parent's site."""
    outside = External(layer=4, module="resid_post", architecture="topk", n_latents=48, d_model=16, k=3, path="/a")
    lacking = facts.changed(sites=facts.sites.changed(refusals={"L4": "it has none"}))
    leg = {"id": "x", "layer": 1, "parent": "runs/a", "tokens": 512}
    with pytest.raises(ModelError, match='L4 of "paper-model" cannot be read: it has none'):
        compiled(lacking, externals={"runs/a": outside}, plan={"legs": [leg]})
    compiled(lacking, externals={"runs/a": outside}, plan={"legs": [leg | {"method": "identity"}]})


def test_a_parent_whose_files_do_not_say_its_l0_needs_k(facts: ModelFacts) -> None:
    """The recipe's k is that of the SAEs it trains from scratch; the parent would be cut to it."""
    outside = External(
        layer=1, module="resid_post", architecture="jumprelu", n_latents=48, d_model=16, k=None, path="/"
    )
    leg = {"id": "x", "layer": 1, "parent": "runs/a", "tokens": 0, "method": "identity"}
    externals = {"runs/a": outside}
    with pytest.raises(PlanError, match="leg x: the files of its parent runs/a do not say how many latents are active"):
        compiled(facts, externals=externals, plan={"legs": [leg]})
    plan = compiled(facts, externals=externals, plan={"legs": [leg | {"k": 3}]})
    assert plan.legs[0].dictionary.l0 == 3 and plan.reshapes(plan.legs[0])


def test_a_leg_that_continues_another_runs_sae_has_the_l0_that_was_asked_for(facts: ModelFacts) -> None:
    """A penalty holds L0 near its target only, so that the files of the other run's SAEs state another L0."""
    site = {"layer": 1, "module": "resid_post", "architecture": "jumprelu", "n_latents": 48, "d_model": 16, "k": None}
    externals = {f"./a/{l0}": External(**site, l0=1.04 * l0, path="/a") for l0 in (4, 2)}
    parents = {(SiteKind(), 1, float(l0)): f"./a/{l0}" for l0 in (4, 2)}
    sections: dict[str, Any] = {
        "sites": {"layers": [1]},
        "dictionary": {"architecture": "jumprelu", "target_l0": 4},
        "plan": {"parents": "./a", "tiers": [2], "controls": [1], "control_kinds": ["full", "random"]},
    }
    plan = compiled(facts, externals=externals, parents=parents, **sections)
    l0 = {leg.id: leg.dictionary.l0 for leg in plan.legs}
    assert l0 == {"L1": 4, "L1-k2": 2, "L1-scratch-full": 4, "L1-random": 4}
    assert not any(plan.reshapes(leg) for leg in plan.legs if leg.parent)
    assert {leg.dictionary.n_latents for leg in plan.legs} == {48}


def test_it_is_said_if_a_parent_outside_the_plan_overrules_the_recipes_dictionary(facts: ModelFacts) -> None:
    site = {"layer": 1, "module": "resid_post", "d_model": 16, "path": "/"}
    same = External(**site, architecture="topk", n_latents=64, k=4)
    other = External(**site, architecture="jumprelu", n_latents=48, k=None, l0=4.1)
    externals = {"./same": same, "./other": other}
    legs = [{"id": "a", "parent": "./same"}, {"id": "b", "parent": "./other"}, {"id": "c", "parent": "./other"}]
    legs += [
        {"id": "d", "parent": "./other", "architecture": "topk", "n_latents": 64},
        {"id": "e", "parent": "b"},
        {"id": "f", "parent": "./other", "method": "random", "control_of": "a"},
    ]
    written = [{"layer": 1, "tokens": 1024, "method": "identity"} | leg for leg in legs]
    plan = compiled(facts, externals=externals, plan={"legs": written})
    note = inherited_note(plan)
    assert note.endswith(" b, c: jumprelu, 48 latents, 4 active (in the recipe: topk, 64 latents, 4 active)")
    with (console := Console(width=300)).capture() as shown:
        console.print(plan_table(plan))
    assert note in " ".join(shown.get().split())
    assert not inherited_note(compiled(facts, externals=externals, plan={"legs": written[:1]}))
    assert not inherited_note(compiled(facts))


def test_parents_with_the_l0_of_a_tier_overrule_nothing(facts: ModelFacts) -> None:
    site = {"layer": 1, "module": "resid_post", "d_model": 16, "path": "/"}
    externals = {f"./a/{k}": External(**site, architecture="topk", n_latents=64, k=k) for k in (4, 8)}
    parents = {(SiteKind(), 1, float(k)): f"./a/{k}" for k in (4, 8)}
    sections: dict[str, Any] = {"sites": {"layers": [1]}, "plan": {"parents": "./a", "tiers": [8]}}
    plan = compiled(facts, externals=externals, parents=parents, **sections)
    assert [leg.parent for leg in plan.legs] == ["./a/4", "./a/8"] and not inherited_note(plan)
    wider = {name: external.changed(n_latents=96) for name, external in externals.items()}
    note = inherited_note(compiled(facts, externals=wider, parents=parents, **sections))
    assert "L1-k8: topk, 96 latents, 8 active (in the recipe: topk, 64 latents, 8 active)" in note


def test_a_control_has_the_dictionary_of_the_leg_that_it_is_compared_with(facts: ModelFacts) -> None:
    legs = [
        {"id": "root", "layer": 1, "tokens": 4096},
        {"id": "child", "layer": 2, "tokens": 1024, "parent": "root", "k": 8, "n_latents": 96},
        {"id": "equal", "layer": 2, "tokens": 0, "control_of": "child"},
        {"id": "random", "layer": 2, "tokens": 0, "parent": "root", "method": "random", "control_of": "child"},
        {"id": "smaller", "layer": 2, "tokens": 0, "control_of": "child", "n_latents": 48},
    ]
    plan = compiled(facts, plan={"legs": legs})
    sizes = {leg.id: (leg.dictionary.n_latents, leg.dictionary.l0) for leg in plan.legs}
    assert sizes == {"root": (64, 4), "child": (96, 8), "equal": (96, 8), "random": (96, 8), "smaller": (48, 8)}


def test_an_l0_that_nobody_asks_for_is_not_made_up(facts: ModelFacts) -> None:
    legs = [{"id": "a", "layer": 1, "tokens": 4096}, {"id": "b", "layer": 2, "tokens": 0, "parent": "a"}]
    keys: dict[str, Any] = {"dictionary": {"architecture": "relu"}}
    legs[1]["architecture"] = "topk"
    with pytest.raises(PlanError, match="leg b: the L0 of its parent a follows from a penalty; set k"):
        compiled(facts, plan={"legs": legs}, **keys)
    legs[1]["k"] = 3
    assert compiled(facts, plan={"legs": legs}, **keys).leg("b").dictionary.l0 == 3
    del legs[1]["architecture"]
    with pytest.raises(PlanError, match="leg b: k is 3, but the L0 of relu follows from a penalty; leave k out"):
        compiled(facts, plan={"legs": legs}, **keys)


def test_an_untrained_hop_has_a_control_on_the_tokens_of_its_map(facts: ModelFacts) -> None:
    outside = External(layer=4, module="resid_post", architecture="topk", n_latents=48, d_model=16, k=3, path="/a")
    hop = {"id": "a", "layer": 1, "parent": "runs/a", "tokens": 0, "method": "affine"}
    control = {"id": "b", "layer": 1, "tokens": 0, "control_of": "a"}
    sections: dict[str, Any] = {"plan": {"legs": [hop, control]}, "data": {"block_tokens": "auto"}}
    plan = compiled(facts, externals={"runs/a": outside}, **sections)
    alone = compiled(facts, externals={"runs/a": outside}, **(sections | {"plan": {"legs": [hop]}}))
    assert plan.block_tokens == alone.block_tokens and plan.leg("b").budget_tokens == plan.leg("a").moment_tokens
    sections["plan"]["legs"][0]["method"] = "identity"
    with pytest.raises(PlanError, match="leg b is to be trained on as many tokens as a, which is trained on none"):
        compiled(facts, externals={"runs/a": outside}, **sections)


def test_controls_have_the_tokens_that_their_kind_says(facts: ModelFacts) -> None:
    control = {"id": "control", "layer": 2, "tokens": 0, "control_of": "hop"}
    legs = [
        {"id": "root", "layer": 1, "tokens": 4096},
        {"id": "hop", "layer": 2, "tokens": 1024, "parent": "root", "method": "affine"},
        control,
    ]
    plan = compiled(facts, plan={"legs": legs})
    equal = plan.leg("hop").moment_tokens + 1024
    assert plan.leg("control").budget_tokens == equal
    control["tokens"] = equal
    assert compiled(facts, plan={"legs": legs}).leg("control").budget_tokens == equal
    control["tokens"] = 2048
    with pytest.raises(PlanError, match=f"has 2048 tokens, but a control with equal tokens has the {equal} that hop"):
        compiled(facts, plan={"legs": legs})
    control["control_kind"] = "full"
    assert compiled(facts, plan={"legs": legs}).leg("control").budget_tokens == 2048
    control["tokens"] = 0
    assert compiled(facts, plan={"legs": legs, "root_tokens": 8192}).leg("control").budget_tokens == 8192


def test_equal_tokens_count_repetitions(facts: ModelFacts) -> None:
    plan = compiled(facts, plan={"controls": [1], "reuse": 4})
    transfer = plan.leg("L1-from-L3")
    assert transfer.end - transfer.fold_at == 256
    assert plan.leg("L1-scratch-equal").budget_tokens == transfer.moment_tokens + 1024


def test_roots_and_controls_from_scratch_may_train_on_a_block_several_times(facts: ModelFacts) -> None:
    once = compiled(facts, plan={"controls": [1]})
    twice = compiled(facts, plan={"controls": [1], "root_reuse": 2})
    for leg in twice.legs:
        before = once.leg(leg.id)
        assert leg.budget_tokens == before.budget_tokens and leg.schedule.lr == before.schedule.lr
        repeats = not leg.hop and leg.control_kind != "equal_tokens"
        assert leg.schedule.reuse == (2 if repeats else 1)
    assert twice.leg("L3").end == once.leg("L3").end // 2
    ours = plan_cost(twice.all_from_scratch())
    theirs = plan_cost(once.all_from_scratch())
    assert ours.sae_samples == theirs.sae_samples and ours.lm_tokens == theirs.lm_tokens / 2


def test_layers_of_different_widths_cannot_share_a_leg(facts: ModelFacts) -> None:
    widths = facts.sites.changed(widths={"attn_z": [24, 24, 16, 24, 24, 24]})
    leg = {"id": "a", "layer": 1, "module": "attn_z", "tokens": 4096, "shared_layers": [0, 2]}
    with pytest.raises(PlanError, match=r"leg a: the activations of L2\.attn_z have width 16, but those of L1\.attn_z"):
        compiled(facts.changed(sites=widths), plan={"legs": [leg]})


def test_block_size_is_from_shapes_alone(facts: ModelFacts) -> None:
    plan = compiled(facts, data={"context": 16, "block_tokens": 0})
    assert plan.block_tokens % 64 == 0 and plan.block_tokens == compiled(facts, data={"block_tokens": 0}).block_tokens


def test_a_plan_survives_its_file(facts: ModelFacts) -> None:
    import json

    plan = compiled(facts, plan={"controls": [1]})
    assert Plan.from_data(json.loads(plan.to_json()), source="plan.json") == plan


def test_a_time_in_nanoseconds_is_a_seed(facts: ModelFacts) -> None:
    plan = compiled(facts, sites={"layers": [0]}, train={"seed": 1_790_000_000_123_456_789})
    assert Plan.from_data(plan.to_data(), source="plan.json") == plan


def test_legs_that_descend_from_one_another_are_a_damaged_plan(facts: ModelFacts) -> None:
    data = compiled(facts, plan={"preset": "forward"}, sites={"layers": [0, 1, 2]}).to_data()
    assert [leg["id"] for leg in data["legs"]] == ["L0", "L1-from-L0", "L2-from-L1"]
    data["legs"][1]["parent"] = "L2-from-L1"
    with pytest.raises(RunDirectoryError, match="leg L1-from-L0 descends from itself"):
        Plan.from_data(data, source="plan.json")


@pytest.mark.parametrize("other", [{"control_of": "a"}, {"id": "a-seed1", "seed": 1}])
def test_a_suite_costs_what_the_control_or_repeat_costs_that_it_descends_from(
    facts: ModelFacts, other: dict[str, Any]
) -> None:
    other = {"id": "x", "layer": 1, "tokens": 4096} | other
    legs = [
        {"id": "a", "layer": 1, "tokens": 4096},
        other,
        {"id": "b", "layer": 2, "tokens": 1024, "parent": other["id"]},
        {"id": "c", "layer": 2, "tokens": 4096, "control_of": "b", "control_kind": "full"},
    ]
    plan = compiled(facts, plan={"legs": legs})
    suite = plan.without_controls()
    assert [leg.id for leg in suite.legs] == ["a", other["id"], "b"]
    assert plan_cost(suite).sae_samples == plan_cost(plan).sae_samples - 4096


def test_cost_counts_what_runs(facts: ModelFacts) -> None:
    plan = compiled(facts, plan={"preset": "scratch"}, sites={"layers": [1, 2]}, data={"outlier_norm": 0})
    cost = plan_cost(plan)
    lm = 4096 * forward_flops(facts, 3, 16)
    assert cost.lm_tokens == 4096 and cost.sae_samples == 2 * 4096
    assert cost.flops == pytest.approx(lm + 2 * 4096 * (2 * 16 * 64 + 8 * 16 * 4))
    assert cost.flops_dense_equivalent == pytest.approx(lm + 2 * 4096 * 12 * 16 * 64)
    assert plan_cost(plan.all_from_scratch()) == cost


def test_what_is_only_tried_is_counted(facts: ModelFacts) -> None:
    """A hop by "auto" refits a dictionary for each map and, if it is trained, a random one."""
    rows = {"data": {"block_tokens": 32_768}, "plan": {"refit_tokens": 16_384, "moment_tokens": 32_768}}
    for tokens, n_trials in ((1024, 5), (0, 4)):
        flops = {}
        for method in ("auto", "affine"):
            sections: dict[str, Any] = rows | {"plan": rows["plan"] | {"transfer_tokens": tokens, "method": method}}
            plan = compiled(facts, sites={"layers": [1, 2]}, **sections)
            flops[method] = plan_cost(plan).flops
        trial = refit_flops(plan.legs[0].dictionary, 16, 16, 16_384, TRIAL)
        assert trial > 0 and flops["auto"] - flops["affine"] == pytest.approx(n_trials * trial)


def test_the_refit_of_a_wide_dictionary_is_counted_as_it_is_made(facts: ModelFacts) -> None:
    dictionary = compiled(facts).legs[0].dictionary
    narrow, wide = (refit_flops(dictionary.changed(n_latents=n), 768, 768, 65_536) for n in (16_384, 65_536))
    assert wide < 8 * narrow  # a factorisation would take 64 times as much


def test_the_disk_holds_as_much_text_as_is_read_in_all_splits(facts: ModelFacts) -> None:
    """Text is read twice only where there is no more of it, and how often it may be says nothing about that."""
    cost = {epochs: plan_cost(compiled(facts, data={"epochs": epochs})) for epochs in (1, 4)}
    assert cost[1] == cost[4]
    plan = compiled(facts)
    wide = facts.changed(tokens=facts.tokens.changed(vocab_size=2**16 + 1))
    n_ids = plan.n_tokens + 2 * plan.recipe.evaluate.tokens
    assert plan_cost(compiled(wide)).disk_bytes - plan_cost(plan).disk_bytes == 2 * n_ids  # of four bytes, not two


@pytest.mark.parametrize(("preset", "is_said"), [("hub", True), ("scratch", False)])
def test_a_predicted_time_says_that_hops_take_more(facts: ModelFacts, preset: str, is_said: bool) -> None:
    """It is that of steps and forward passes; maps and refits are not timed."""
    plan = compiled(facts, plan={"preset": preset})
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(plan_facts(plan, plan_cost(plan), {"lm": 1.0, "steps": 1.0, "total": 2.0}))
    assert ("maps between layers and refits" in console.export_text()) == is_said


def test_a_transcoder_costs_what_its_two_widths_and_its_skip_connection_do(facts: ModelFacts) -> None:
    wide = facts.changed(d_attn_z=48)
    sites: dict[str, Any] = {"module": "attn_z", "module_out": "attn_out", "layers": [1]}
    sections: dict[str, Any] = {"plan": {"preset": "scratch"}, "sites": sites, "data": {"outlier_norm": 0}}
    for skip in (False, True):
        cost = plan_cost(compiled(wide, **sections, dictionary={"skip_connection": skip}))
        of_skip = 4 * 48 * 16 * skip
        assert cost.flops_dense_equivalent - cost.lm_flops == 4096 * (6 * 64 * (48 + 16) + of_skip)
        assert cost.flops - cost.lm_flops == 4096 * (2 * 48 * 64 + (2 * 48 + 6 * 16) * 4 + of_skip)


def test_experts_that_a_token_is_not_sent_to_cost_nothing_but_memory(facts: ModelFacts) -> None:
    sparse = facts.changed(idle_layer_params=1000)
    assert forward_flops(facts, 3, 16) - forward_flops(sparse, 3, 16) == 3 * 2 * 1000
    plan = compiled(facts)
    assert model_bytes(plan.changed(facts=sparse)) == model_bytes(plan)


def test_transfer_costs_less_than_all_from_scratch(facts: ModelFacts) -> None:
    plan = compiled(facts, plan={"fork_at": 0.5})
    assert plan_cost(plan).flops < plan_cost(plan.all_from_scratch()).flops


def test_a_control_from_which_a_leg_begins_belongs_to_the_suite(facts: ModelFacts) -> None:
    legs = [
        {"id": "L1", "layer": 1, "tokens": 1024},
        {"id": "L0", "layer": 0, "tokens": 1024, "parent": "L1"},
        {"id": "control", "layer": 0, "tokens": 0, "control_of": "L0"},
        {"id": "L1-seed1", "layer": 1, "tokens": 1024, "seed": 1},
        {"id": "L2", "layer": 2, "tokens": 1024, "parent": "control"},
        {"id": "L3", "layer": 3, "tokens": 1024, "parent": "L1-seed1"},
        {"id": "unused", "layer": 3, "tokens": 0, "control_of": "L3"},
    ]
    plan = compiled(facts, plan={"legs": legs})
    suite = plan.without_controls()
    assert [leg.id for leg in suite.legs] == [leg.id for leg in plan.legs if leg.id != "unused"]
    assert 0 < plan_cost(suite).flops < plan_cost(plan).flops
    assert [leg.id for leg in plan.all_from_scratch().legs] == ["L1", "L0", "L2", "L3"]


@pytest.mark.parametrize("key", ["goal_fvu", "predicted_fvu"])
def test_a_leg_with_either_kind_of_goal_is_measured_on_held_out_rows(facts: ModelFacts, key: str) -> None:
    leg = {"id": "L0", "layer": 0, "tokens": 1024}
    assert compiled(facts, plan={"legs": [leg | {key: 0.1}]}).has_goals
    assert not compiled(facts, plan={"legs": [leg]}).has_goals


def test_all_from_scratch_is_the_scratch_preset(facts: ModelFacts) -> None:
    hub = compiled(facts, plan={"preset": "hub", "controls": [1]})
    assert plan_cost(hub.all_from_scratch()) == plan_cost(compiled(facts, plan={"preset": "scratch"}))


def test_an_extension_adds_legs_and_tokens_after_the_end(facts: ModelFacts) -> None:
    old = compiled(facts, sites={"layers": [2, 3]}, plan={"controls": [2]})
    sections = {"sites": {"layers": [2, 3, 4]}, "plan": {"root_tokens": 6144, "controls": [2]}}
    new = compiled(facts, finished=old, **sections)
    assert new.legs[: len(old.legs)] == old.legs and new.block_tokens == old.block_tokens
    more, child = new.leg("L3+6.14k"), new.leg("L4-from-L3")
    assert (more.parent, more.role, more.budget_tokens, more.method) == ("L3", "root", 2048, "identity")
    control = new.leg("L2-scratch-full+6.14k")
    assert (control.role, control.control_of, control.control_kind) == ("control", "L2-from-L3", "full")
    assert more.start == child.start == old.n_tokens and new.n_tokens <= old.n_tokens + 2048
    assert compiled(facts, finished=new, **sections).legs == new.legs
    sections["plan"] = sections["plan"] | {"root_tokens": 8192}
    again = compiled(facts, finished=new, **sections).leg("L3+8.19k")
    assert (again.parent, again.budget_tokens) == ("L3+6.14k", 2048)


def test_an_extension_of_a_transfer_extends_its_control_with_equal_tokens(facts: ModelFacts) -> None:
    plan = None
    for tokens in (1024, 2048, 4096):
        plan = compiled(
            facts,
            finished=plan,
            sites={"layers": [2, 3]},
            plan={"controls": [2], "transfer_tokens": tokens},
            train={"seeds": 2},
        )
        for seed in ("", "-seed1"):
            transfer = parts_of(plan.leg(f"L2-from-L3{seed}"), plan.legs)
            control = parts_of(plan.leg(f"L2-scratch-equal{seed}"), plan.legs)
            looked_at = transfer[0].moment_tokens + tokens
            assert sum(leg.budget_tokens for leg in transfer) == tokens
            assert sum(leg.budget_tokens for leg in control) == looked_at and len(control) == len(transfer)
            assert plan.repeat_of(control[-1]) == (control[-1].id.replace(seed, "") if seed else "")


def test_an_extension_keeps_the_roots_and_the_probe(facts: ModelFacts) -> None:
    old = compiled(facts, sites={"layers": [0, 1]})
    new = compiled(facts, finished=old)
    assert {leg.layer for leg in new.legs if not leg.parent} == {leg.layer for leg in old.legs if not leg.parent}
    assert new.probe == old.probe


def test_an_extension_that_leaves_out_a_root_says_so(facts: ModelFacts) -> None:
    old = compiled(facts, sites={"layers": [1, 2]}, plan={"roots": [1]})
    with pytest.raises(PlanError, match=r"sites.layers \(2, 3\) leaves out layer 1, a root of the run"):
        compiled(facts, finished=old, sites={"layers": [2, 3]})
    kept = compiled(facts, finished=old, sites={"layers": [1, 3]})
    assert [leg.id for leg in kept.legs] == ["L1", "L2-from-L1", "L3-from-L1"]


def test_extensions_whose_counts_look_alike_have_names_of_their_own(facts: ModelFacts) -> None:
    plan = None
    for tokens in (999_936, 1_000_960, 1_001_984):
        plan = compiled(facts, finished=plan, plan={"preset": "scratch", "root_tokens": tokens}, sites={"layers": [1]})
    assert plan and [leg.id for leg in plan.legs] == ["L1", "L1+1M", "L1+1001984"]
    assert [leg.parent for leg in plan.legs] == ["", "L1", "L1+1M"]


def test_an_extension_keeps_the_parents_outside_the_plan_that_it_no_longer_names(facts: ModelFacts) -> None:
    outside = External(layer=4, module="resid_post", architecture="topk", n_latents=48, d_model=16, k=3, path="/a")
    leg = {"id": "x", "layer": 1, "parent": "./a", "tokens": 512}
    old = compiled(facts, externals={"./a": outside}, plan={"legs": [leg]})
    new = compiled(facts, finished=old, plan={"legs": [{"id": "y", "layer": 2, "tokens": 512}]})
    assert [leg.id for leg in new.legs] == ["x", "y"] and new.externals == old.externals


def test_an_extension_does_not_change_what_is_finished(facts: ModelFacts) -> None:
    old = compiled(facts)
    with pytest.raises(PlanError, match="is finished, but the recipe changes its dictionary"):
        compiled(facts, finished=old, dictionary={"n_latents": 64, "k": 8})

    # Nor does it leave out what made a leg what it is.
    leg = {"id": "a", "layer": 2, "tokens": 1024, "module": "mlp_in"}
    old = compiled(facts, plan={"legs": [leg | {"module_out": "mlp_out"}]})
    with pytest.raises(PlanError, match="leg a is finished, but the recipe changes its module_out"):
        compiled(facts, finished=old, plan={"legs": [leg | {"tokens": 2048}]})
    legs = [leg, {"id": "b", "layer": 3, "module": "mlp_in", "tokens": 1024, "control_of": "a"}]
    old = compiled(facts, plan={"legs": [leg, legs[1] | {"parent": "a"}]})
    with pytest.raises(PlanError, match="leg b is finished, but the recipe changes its parent, method"):
        compiled(facts, finished=old, plan={"legs": legs})


def test_what_would_take_years_or_all_memory_is_refused(facts: ModelFacts) -> None:
    with pytest.raises(PlanError, match="evaluate.tokens is 100000B, but at most 1B are allowed"):
        compiled(facts, evaluate={"tokens": 1e14})
    with pytest.raises(PlanError, match="the plan reads 1000B tokens, but at most 100B are allowed"):
        compiled(facts, plan={"root_tokens": 1e12})
    recipe = Recipe.parse({"data": {"block_tokens": 2**35}}, source="test")
    with pytest.raises(PlanError, match=r"of one leg in a block of 34,359,738,368 tokens take .* GiB, but"):
        plan_run(recipe)


def test_untrained_hops_live_for_one_block(facts: ModelFacts) -> None:
    plan = compiled(facts, plan={"transfer_tokens": 0, "refit": False})
    child = plan.leg("L2-from-L3")
    assert (child.budget_tokens, child.refit_tokens, child.fold_at) == (0, 0, 4096) and plan.n_tokens == 4096 + 256
    plan = compiled(facts, plan={"transfer_tokens": 0})
    assert (plan.leg("L2-from-L3").budget_tokens, plan.leg("L2-from-L3").refit_tokens) == (0, 256)


def test_default_rates_fall_with_budget_and_width() -> None:
    rates = [auto_lr(192, n, 512) for n in (10**5, 10**6, 4 * 10**6, 10**9)]
    assert rates == pytest.approx([1e-2, 5e-3, 2.5e-3, 5e-3 / 6])
    assert [auto_lr(768, 10**6, 512), auto_lr(192, 10**6, 128)] == pytest.approx([2.5e-3, 2.5e-3])


def test_only_a_hop_without_a_rate_of_its_own_takes_it_from_its_map(facts: ModelFacts) -> None:
    by_map = compiled(facts).leg("L2-from-L3")
    copied = compiled(facts, plan={"method": "identity"}).leg("L2-from-L3")
    given = compiled(facts, train={"batch_tokens": 64, "transfer_lr": 1e-3}).leg("L2-from-L3")
    assert [leg.schedule.lr_by_map for leg in (by_map, copied, given)] == [True, False, False]
    assert copied.schedule.lr == by_map.schedule.lr / 8 and given.schedule.lr == 1e-3


def test_a_hop_that_is_only_refitted_has_a_block_to_be_refitted_on(facts: ModelFacts) -> None:
    outside = External(layer=4, module="resid_post", architecture="topk", n_latents=48, d_model=16, k=3, path="/a")
    leg = {"id": "x", "layer": 3, "parent": "runs/a/legs/L4", "tokens": 0}
    sections: dict[str, Any] = {"data": {"block_tokens": 0}, "plan": {"legs": [leg], "refit_tokens": 4096}}
    plan = compiled(facts, externals={"runs/a/legs/L4": outside}, **sections)
    assert plan.block_tokens >= 4096 and plan.legs[0].refit_tokens == 4096


def test_on_a_gpu_forward_passes_and_blocks_are_larger(facts: ModelFacts, tmp_path: Path) -> None:
    wide = facts.changed(d_model=2304, d_attn_z=2304, n_layers=26, dtype="bfloat16")
    wide = wide.changed(tokens=facts.tokens.changed(max_context=512))
    sections: dict[str, Any] = {
        "data": {"context": 256, "block_tokens": "auto"},
        "train": {"batch_tokens": 4096},
        "plan": {"preset": "scratch", "root_tokens": "8M", "refit": False},
    }
    on_cpu = compiled(wide, **sections)
    on_gpu = compiled(wide.changed(device="cuda:0"), **sections)
    assert on_cpu.lm_batch_tokens == 4096 and on_cpu.block_tokens <= 8192
    assert on_gpu.lm_batch_tokens == 32_768 and on_gpu.block_tokens >= 32_768
    on_gpu.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").lm_batch_tokens == 32_768


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("facts", "dtype"), "/etc/passwd"),
        (("facts", "device"), "[/]"),
        (("legs", 0, "reuse"), 0),
        (("legs", 0, "batch_tokens"), 0),
    ],
)
def test_a_plan_with_nonsense_in_it_is_refused(facts: ModelFacts, where: tuple, value: object) -> None:
    """Found by the fuzz harness: numbers to divide by, and a name that was looked up in torch."""
    import json

    data = json.loads(compiled(facts).to_json())
    place = data
    for key in where[:-1]:
        place = place[key]
    assert where[-1] in place
    place[where[-1]] = value
    with pytest.raises(Exception, match=str(where[-1])):
        Plan.from_data(data, source="plan.json")
