"""`preset = "shared"`: one SAE trained on the aligned activations of several layers, and its hops to each of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tensor_stream import TensorStream
from test_train import D, Watch, assert_same, make_plan, make_stream, run, weights

from saerelay.analysis.suite import load
from saerelay.errors import PlanError
from saerelay.planning.compile import compile_plan
from saerelay.planning.cost import plan_cost
from saerelay.planning.facts import ModelFacts
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import Recipe
from saerelay.runs.dictionaries import read_dictionary
from saerelay.runs.suite import PublishedSuite
from saerelay.sae.quality import fvu
from saerelay.site import Site
from saerelay.training.alignment import Alignment

SHARED = {"preset": "shared", "roots": [1]}
LEGS = ["L1-shared", "L1", "L0-from-L1", "L2-from-L1"]


def with_recipe(facts: ModelFacts, **changes: Any) -> Plan:
    recipe = make_plan(facts, **SHARED).recipe
    return compile_plan(Recipe.parse(recipe.model_dump() | changes, source="test"), facts)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, facts: ModelFacts) -> Path:
    root = tmp_path_factory.mktemp("shared") / "whole"
    run(make_plan(facts, **SHARED, controls=[1]), root, facts)
    return root


# --- plans ------------------------------------------------------------------------------------------------------------


def test_every_layer_starts_from_the_sae_that_all_share(facts: ModelFacts) -> None:
    plan = make_plan(facts, **SHARED)
    assert [leg.id for leg in plan.legs] == LEGS
    shared, home, below, above = plan.legs
    assert shared.shared_layers == [0, 2] and shared.role == "root" and not shared.hop
    assert {leg.parent for leg in (home, below, above)} == {"L1-shared"}
    assert home.method == "identity" and below.method == "auto"
    # Its layers are read while they are aligned, and as long as it trains.
    assert shared.fold_at == shared.moment_tokens == 1024
    assert plan.open_sites(0, 512) == plan.open_sites(shared.end - 512, shared.end) == [Site(0), Site(1), Site(2)]


def test_tiers_are_copies_of_each_layers_own_leg(facts: ModelFacts) -> None:
    plan = make_plan(facts, **SHARED, tiers=[2])
    assert [leg.id for leg in plan.legs] == [*LEGS, "L1-k2", "L0-from-L1-k2", "L2-from-L1-k2"]


def test_layers_that_have_no_leg_of_their_own_are_read_all_the_same(facts: ModelFacts) -> None:
    plan = make_plan(facts, legs=[{"id": "a", "layer": 0, "tokens": 4096, "shared_layers": [2]}])
    assert plan.sites == [Site(0)] and plan.sites_read == [Site(0), Site(2)]
    assert plan.deepest == Site(2)


def test_layers_share_the_sae_of_the_nearest_root(facts: ModelFacts) -> None:
    plan = make_plan(facts, preset="shared", roots=[0, 2])
    assert [leg.id for leg in plan.legs] == ["L0", "L2-shared", "L2", "L1-from-L2"], "a root alone shares with nobody"
    assert plan.leg("L2-shared").shared_layers == [1]


def test_a_plan_of_other_presets_says_nothing_of_it(facts: ModelFacts) -> None:
    assert "shared_layers" not in make_plan(facts).legs[0].model_dump_json()


@pytest.mark.parametrize(
    ("leg", "said"),
    [
        ({"shared_layers": [0, 7]}, "layer 7 is out of range"),
        ({"shared_layers": [1, 2]}, r"layers other than its own, 1, each once; found \[1, 2\]"),
        ({"shared_layers": [0, 0]}, "each once"),
        ({"shared_layers": [0], "parent": "runs/a/legs/L0"}, "belong to a leg from scratch"),
        ({"shared_layers": [0], "module": "transcoder"}, "layers can share only SAEs"),
    ],
)
def test_what_cannot_be_shared_is_refused(facts: ModelFacts, leg: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        make_plan(facts, legs=[{"id": "a", "layer": 1, "tokens": 4096} | leg])


def test_too_few_tokens_to_align_on_are_refused(facts: ModelFacts) -> None:
    data = {"context": 16, "block_tokens": 64, "outlier_norm": 0}
    plan = make_plan(facts, **SHARED).recipe.plan
    with pytest.raises(PlanError, match=r"leg L1-shared: .* raise plan.moment_tokens above 80"):
        with_recipe(facts.changed(d_model=40), data=data, plan=plan.changed(moment_tokens=64).model_dump())


def test_what_the_shared_leg_takes_is_counted(facts: ModelFacts) -> None:
    plan = make_plan(facts, **SHARED)
    scratch = plan.all_from_scratch()
    assert [leg.layer for leg in scratch.legs] == [1, 0, 2] and not any(leg.shared_layers for leg in scratch.legs)
    own = 4096 + 3 * (2048 + 512)
    assert plan_cost(plan).sae_samples == own and plan_cost(scratch).sae_samples == 3 * 4096
    alone = plan.changed(legs=[plan.legs[0].changed(shared_layers=[], alignment_tokens=0)])
    with_others = plan.changed(legs=plan.legs[:1])
    assert plan_cost(with_others).flops > plan_cost(alone).flops


# --- runs -------------------------------------------------------------------------------------------------------------


def test_rows_are_of_each_site_by_turns() -> None:
    g = torch.Generator().manual_seed(0)
    x = {Site(layer): torch.randn(10, 4, generator=g).bfloat16() for layer in (1, 0, 2)}
    maps = {Site(layer): (torch.randn(4, 4, generator=g), torch.randn(4, generator=g)) for layer in (0, 2)}
    found = Alignment(Site(1), maps).rows(x)
    for i in range(10):
        site = Site((1, 0, 2)[i % 3])
        expected = x[site][i].float()
        if site in maps:
            A, c = maps[site]
            expected = A @ expected + c
        torch.testing.assert_close(found[i], expected)


def test_layers_that_are_one_turned_about_share_the_sae_of_that_one(facts: ModelFacts, tmp_path: Path) -> None:
    """Where alignment undoes what tells layers apart, it makes no difference of which layer a row is."""
    x = make_stream(facts).tensors[Site(1)]
    turns = [torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(i)))[0] for i in range(3)]
    turned = {Site(0): 3 * x @ turns[0] + 1, Site(1): x, Site(2): x @ turns[2] - 2}
    stream = TensorStream(turned, block_tokens=512, batch_tokens=64)
    keys = {"balance": 0.0, "lr": 1e-3, "batch_tokens": 64}
    shared = with_recipe(facts, train=keys)
    run(shared, tmp_path / "shared", facts, stream=stream)
    one = shared.changed(legs=[shared.legs[0].changed(shared_layers=[], alignment_tokens=0, start=1024)])
    run(one, tmp_path / "one", facts, stream=stream)
    together, _ = read_dictionary(tmp_path / "shared/legs/L1-shared")
    alone, _ = read_dictionary(tmp_path / "one/legs/L1-shared")
    cosine = torch.nn.functional.cosine_similarity(together.W_dec, alone.W_dec)
    assert cosine.median() > 0.999
    for layer in range(3):
        hopped, _ = read_dictionary(tmp_path / "shared/legs" / {0: "L0-from-L1", 1: "L1", 2: "L2-from-L1"}[layer])
        assert fvu(hopped, turned[Site(layer)]) < 1.02 * fvu(alone, x)


def test_the_other_layers_are_learned_too(whole: Path, facts: ModelFacts, tmp_path: Path) -> None:
    """With as many samples it is better at layers that are not its own than an SAE of its own layer alone."""
    plan = make_plan(facts, **SHARED, transfer_tokens=0)
    run(plan, tmp_path / "shared", facts)
    hub = make_plan(facts, preset="hub", roots=[1], transfer_tokens=0)
    run(hub, tmp_path / "hub", facts)
    x = make_stream(facts).tensors
    for layer in (0, 2):
        found = {}
        for name in ("shared", "hub"):
            dictionary, _ = read_dictionary(tmp_path / name / f"legs/L{layer}-from-L1")
            found[name] = fvu(dictionary, x[Site(layer)])
        assert found["shared"] < found["hub"]


@pytest.mark.parametrize("killed_at", [640, 1024, 2560, 5760])
def test_killed_anywhere_it_resumes_to_the_same_bits(
    whole: Path, tmp_path: Path, facts: ModelFacts, killed_at: int
) -> None:
    """While layers are aligned, right after, in training, and in the hops."""
    plan = make_plan(facts, **SHARED, controls=[1])
    with pytest.raises(MemoryError):
        run(plan, tmp_path / "killed", facts, Watch(kill_at=killed_at))
    run(plan, tmp_path / "killed", facts)
    assert_same(whole, tmp_path / "killed")


def test_alone_it_is_what_it_is_in_company(whole: Path, tmp_path: Path, facts: ModelFacts) -> None:
    plan = make_plan(facts, **SHARED)
    run(plan.changed(legs=plan.legs[:1]), tmp_path / "alone", facts)
    alone = weights(tmp_path / "alone")
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in alone.items())


def test_the_suite_has_each_layers_own_sae_and_says_how_they_were_made(whole: Path) -> None:
    suite = load(whole)
    assert [leg.id for leg in suite.final_legs] == ["L0-from-L1", "L1", "L2-from-L1"]
    assert suite.made(suite.leg("L1-shared")) == "from scratch, on aligned activations of layers 1, 0, 2"
    assert suite.made(suite.leg("L1")) == "identity + refit from L1-shared"
    assert suite.origin(suite.leg("L2-from-L1")) == "from below"
    counterparts = {leg.id for leg in suite.scratch_counterparts(suite.leg("L1"))}
    assert counterparts == {"L1-scratch-equal", "L1-scratch-full"}, "what layers share is no control"


def test_latents_come_from_where_the_leg_took_them(facts: ModelFacts) -> None:
    """Not from its parent, if it took none; and a hop from another module of its layer is a hop."""
    plan = make_plan(facts, preset="shared", controls=[1], control_kinds=["random"])
    suite = PublishedSuite(Path("nowhere"), plan)
    assert plan.leg("L1-random").parent == plan.leg("L1").parent == "L1-shared"
    assert suite.origin(plan.leg("L1-random")) == "random" and suite.origin(plan.leg("L1")) == "scratch"
    legs = [
        {"id": "a", "layer": 1, "tokens": 4096, "module": "mlp_out"},
        {"id": "b", "layer": 1, "tokens": 2048, "parent": "a", "module": "resid_post"},
        {"id": "c", "layer": 1, "tokens": 2048, "parent": "b", "module": "resid_post", "k": 2},
    ]
    plan = make_plan(facts, legs=legs)
    suite = PublishedSuite(Path("nowhere"), plan)
    assert [suite.origin(leg) for leg in plan.legs] == ["scratch", "same layer", "same layer"]


def test_more_layers_hop_from_it_and_more_tokens_are_refused(facts: ModelFacts) -> None:
    finished = make_plan(facts, **SHARED)
    recipe = finished.recipe
    two = recipe.changed(sites=recipe.sites.changed(layers=[0, 1]))
    small = compile_plan(two, facts)
    grown = compile_plan(recipe, facts, finished=small)
    assert [leg.id for leg in grown.legs if leg not in small.legs] == ["L2-from-L1"]
    assert grown.leg("L1-shared") == small.leg("L1-shared")
    longer = recipe.changed(plan=recipe.plan.changed(root_tokens=8192))
    with pytest.raises(PlanError, match="several layers share cannot be trained further"):
        compile_plan(longer, facts, finished=finished)
