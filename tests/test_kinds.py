"""Suites of several kinds of sites and of several tiers of L0: plans, one run of them, and what is said of it."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_run import CONTEXT, FACTS, fake_evaluation, fake_tokens, fake_training
from rich.console import Console
from tensor_stream import TensorStream
from test_train import Watch, assert_same, run

from saerelay.analysis.circuits import chosen_legs
from saerelay.analysis.lineage import leg_pairs
from saerelay.analysis.matrix import cells_of
from saerelay.analysis.suite import Suite, load
from saerelay.analysis.summary import summarise
from saerelay.data.corpus import Corpus
from saerelay.errors import PlanError, RecipeError, RunDirectoryError
from saerelay.interop.origin import Origin
from saerelay.planning.compile import compile_plan
from saerelay.planning.cost import peak_state_bytes, state_bytes
from saerelay.planning.facts import ModelFacts
from saerelay.planning.leg_spec import LegSpec
from saerelay.planning.plan import Plan
from saerelay.planning.presets import Place
from saerelay.planning.recipe import Recipe
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.quality import Summary
from saerelay.runs.documents.training import PhaseSeconds, RunCost
from saerelay.sae.quality import mean_l0
from saerelay.site import Site
from saerelay.views import labels
from saerelay.views.figures import quality_figure
from saerelay.views.report.overview import overviews
from saerelay.views.report.story import story
from saerelay.views.tables.quality import quality_table
from saerelay.workflows import share
from saerelay.workflows.hop import of_one_kind, with_leg
from saerelay.workflows.settle import describe_external, parents_in
from saerelay.workflows.share import export_run
from saerelay.workflows.survey import survey_run

KINDS = ["resid_post", "mlp_out", "transcoder"]
W = 16


def recipe(**sections: Any) -> Recipe:
    base: dict[str, Any] = {
        "sites": {"layers": [0, 1, 2], "module": KINDS},
        "data": {"context": 16, "block_tokens": 512, "outlier_norm": 0},
        "dictionary": {"n_latents": 48, "k": 8},
        "plan": {
            "root_tokens": 4096,
            "transfer_tokens": 1024,
            "moment_tokens": 1024,
            "refit_tokens": 512,
            "roots": [1],
            "tiers": [4, 8, 16],
        },
        "train": {"batch_tokens": 64, "checkpoint_every": 640, "lr": 3e-3, "transfer_lr": 1e-3},
    }
    for section, keys in sections.items():
        base[section] = base.get(section, {}) | keys
    return Recipe.parse(base, source="test")


def make_plan(facts: ModelFacts, parents: dict[Place, str] | None = None, **sections: Any) -> Plan:
    asked = recipe(**sections)
    externals = {place: describe_external(place, asked) for place in (parents or {}).values()}
    return compile_plan(asked, facts, parents=parents, externals=externals)


def stream() -> TensorStream:
    tensors = {}
    x = torch.randn(8192, W, generator=torch.Generator().manual_seed(9))
    for layer in range(3):
        g = torch.Generator().manual_seed(layer)
        for module in ("resid_post", "mlp_in"):
            tensors[Site(layer, module)] = x @ torch.randn(W, W, generator=g) / 4 + 1
        tensors[Site(layer, "mlp_out")] = torch.tanh(tensors[Site(layer, "mlp_in")] @ torch.randn(W, W, generator=g))
    return TensorStream(tensors, block_tokens=512, batch_tokens=64)


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_of_several_kinds_is_the_plans_of_each(facts: ModelFacts) -> None:
    several = make_plan(facts, plan={"controls": [2]})
    alone: list[dict[str, Any]] = []
    for kind in KINDS:
        plan = make_plan(facts, sites={"module": kind}, plan={"controls": [2]})
        alone += [leg.model_dump() for leg in plan.legs]
    assert [leg.model_dump() for leg in several.legs] == alone
    assert several.n_tokens == make_plan(facts, sites={"module": "mlp_out"}).n_tokens  # one pass for all


def test_ids_of_one_kind_are_what_they_were(facts: ModelFacts) -> None:
    plan = make_plan(facts, sites={"module": ["mlp_out"]}, plan={"tiers": [], "controls": [0]})
    assert [leg.id for leg in plan.legs] == [
        "L1.mlp_out",
        "L0.mlp_out-from-L1",
        "L2.mlp_out-from-L1",
        "L0.mlp_out-scratch-equal",
        "L0.mlp_out-scratch-full",
    ]
    assert plan.legs == make_plan(facts, sites={"module": "mlp_out"}, plan={"tiers": [], "controls": [0]}).legs


def test_transcoder_is_a_word_for_mlp_in_to_mlp_out(facts: ModelFacts) -> None:
    by_word = make_plan(facts, sites={"module": "transcoder"})
    by_keys = make_plan(facts, sites={"module": "mlp_in", "module_out": "mlp_out"})
    assert by_word.legs == by_keys.legs and by_word.legs[0].id == "L1.transcoder"


def test_each_sae_has_a_tier_at_every_other_l0_where_it_ends(facts: ModelFacts) -> None:
    plan = make_plan(facts, sites={"module": "mlp_out"})
    tiers = {
        leg.id: (leg.parent, leg.dictionary.l0, leg.budget_tokens) for leg in plan.legs if plan.stays_as(leg) == "tier"
    }
    assert tiers == {
        f"{leg_id}-k{k}": (leg_id, k, 1024)
        for leg_id in ("L1.mlp_out", "L0.mlp_out-from-L1", "L2.mlp_out-from-L1")
        for k in (4, 16)
    }
    for leg_id in tiers:
        leg = plan.leg(leg_id)
        assert leg.start == plan.leg(leg.parent).end and leg.moment_tokens == 0 and leg.method == "identity"
    assert make_plan(facts, plan={"tier_tokens": 640}).leg("L1-k4").budget_tokens == 640


def test_a_suite_is_compared_with_all_its_kinds_and_tiers_from_scratch(facts: ModelFacts) -> None:
    plan = make_plan(facts, plan={"controls": [0]})
    scratch = plan.all_from_scratch()
    assert len(scratch.legs) == 3 * len(KINDS) * 3  # layers, kinds, tiers
    assert {leg.budget_tokens for leg in scratch.legs} == {4096}


def test_a_skip_connection_is_the_transcoders(facts: ModelFacts) -> None:
    plan = make_plan(facts, dictionary={"skip_connection": True})
    assert {leg.kind.module_out for leg in plan.legs if leg.dictionary.skip_connection} == {"mlp_out"}
    assert all(leg.dictionary.skip_connection for leg in plan.legs if leg.is_transcoder)


def test_a_leg_may_be_called_a_transcoder(facts: ModelFacts) -> None:
    leg = {"id": "a", "layer": 0, "module": "transcoder", "tokens": 4096}
    (settled,) = make_plan(facts, plan={"legs": [leg], "tiers": []}).legs
    assert str(settled.kind) == "transcoder" and settled.site_out == Site(0, "mlp_out")
    with pytest.raises(RecipeError, match='with module_out = "attn_out", set module to the module that is read'):
        make_plan(facts, plan={"legs": [leg | {"module_out": "attn_out"}], "tiers": []})
    with pytest.raises(PlanError, match=r'write suite\["L3.transcoder"\]'):
        Site(3, "transcoder")  # type: ignore[arg-type]


def test_a_hop_goes_to_the_kind_that_its_source_is_of() -> None:
    asked = recipe()
    transcoder = of_one_kind(asked, Origin(site=Site(1, "mlp_in"), site_out=Site(1, "mlp_out")))
    assert [str(kind) for kind in transcoder.sites.kinds] == ["transcoder"]
    assert of_one_kind(asked, Origin(site=Site(1, "mlp_out"))).sites.module == "mlp_out"
    assert of_one_kind(asked, Origin(site=Site(1, "attn_z"))).sites.module == "resid_post"
    alone = with_leg(asked, LegSpec(id="a", layer=0, tokens=4096))
    assert not alone.plan.tier.tiers  # which the recipe asks for, and a hop has no use for


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"sites": {"module": []}}, "empty list"),
        ({"sites": {"module": ["mlp_out", "mlp_out"]}}, "is listed twice in .*name it once"),
        ({"sites": {"module": ["mlp"]}}, "'transcoder'"),
        ({"sites": {"module": ["mlp_in"], "module_out": "mlp_out"}}, 'name MLP transcoders "transcoder"'),
        ({"plan": {"tiers": [0]}}, "plan.tiers"),
    ],
)
def test_what_cannot_be_meant_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(**sections)


def test_tiers_and_kinds_are_refused_where_they_mean_nothing(facts: ModelFacts, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="follows from a penalty"):
        make_plan(facts, dictionary={"architecture": "relu"})
    leg = {"id": "a", "layer": 0, "tokens": 4096}
    with pytest.raises(PlanError, match=r"plan\.tiers belongs to the presets"):
        make_plan(facts, plan={"legs": [leg]})
    with pytest.raises(PlanError, match="resid_post, mlp_out, transcoder"):
        survey_run(recipe(plan={"preset": "auto"}), RunDirectory(tmp_path), None)
    with pytest.raises(PlanError, match=r"plan\.tiers and plan\.parents"):
        survey_run(recipe(sites={"module": "mlp_out"}, plan={"preset": "auto"}), RunDirectory(tmp_path), None)


def test_peak_memory_is_that_of_the_legs_that_live_together(facts: ModelFacts) -> None:
    plan = make_plan(facts)
    most = 0.0
    for leg in plan.legs:
        live = [other for other in plan.legs if other.start <= leg.start < other.end]
        most = max(most, sum(state_bytes(other, facts, plan.block_tokens) for other in live))
    assert peak_state_bytes(plan.legs, facts, plan.block_tokens) == most


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, facts: ModelFacts) -> Path:
    root = tmp_path_factory.mktemp("kinds") / "whole"
    run(make_plan(facts), root, facts, stream=stream())
    return root


def test_one_run_trains_all_kinds_and_tiers(whole: Path) -> None:
    suite = load(whole)
    assert len(suite) == 3 * 3 * len(KINDS)
    x = stream().block(0, [Site(2, "mlp_out")]).rows(Site(2, "mlp_out"), 512)
    for k in (4, 16):
        tier = suite[f"L2.mlp_out-from-L1-k{k}"]
        assert tier.k == k and mean_l0(tier, x) == pytest.approx(k, rel=0.01)
    inherited = suite["L2.mlp_out-from-L1"].W_dec, suite["L2.mlp_out-from-L1-k16"].W_dec
    cosine = torch.nn.functional.cosine_similarity(*inherited).median()
    assert cosine > 0.8  # the same latents under the same numbers


def test_kinds_and_tiers_resume_to_the_same_bits(whole: Path, tmp_path: Path, facts: ModelFacts) -> None:
    with pytest.raises(MemoryError):
        run(make_plan(facts), tmp_path / "killed", facts, Watch(kill_at=5760), stream())
    run(make_plan(facts), tmp_path / "killed", facts, stream=stream())
    assert_same(whole, tmp_path / "killed")


def test_the_recipes_own_l0_stands_for_a_site_and_others_are_named(whole: Path) -> None:
    suite = load(whole)
    assert suite.leg_at(Site(1)).id == "L1" and suite[Site(1)].k == 8
    assert suite.leg_at(Site(0, "mlp_out")).id == "L0.mlp_out-from-L1"
    assert suite.leg(0) == suite.leg("0") == suite.leg(Site(0)) == suite.leg_at(Site(0))
    assert torch.equal(suite[0].W_dec, suite[Site(0)].W_dec)
    assert suite[Site(1), 16].k == 16
    assert suite.leg("2").id == "L2-from-L1"
    assert [leg.id for leg in suite.one_per_site][:4] == ["L0-from-L1", "L1", "L2-from-L1", "L0.mlp_out-from-L1"]
    assert suite.successor(suite.leg("L1")) is None
    with pytest.raises(RunDirectoryError, match="none with 5 active latents"):
        suite[Site(1), 5]


def test_analyses_compare_saes_of_one_kind_and_the_suites_tier(whole: Path) -> None:
    suite = load(whole)
    for cell in cells_of(suite, "affine", snapshots=False):
        assert cell.source.module == cell.target.module and "-k" not in cell.leg
    for pair in leg_pairs(suite):
        assert pair.source.kind == pair.target.kind
        assert pair.kind == "hop" or "-k" not in pair.source.id + pair.target.id
    assert {leg.id for leg in chosen_legs(suite, [])} == {leg.id for leg in suite.one_per_site if not leg.is_transcoder}


def test_a_format_takes_what_it_can_express(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share, "module_paths", lambda spec, sites: {})
    folders = {}
    for format in ("saelens", "saerelay"):
        folders[format] = [sae.folder for sae in export_run(str(whole), tmp_path / format, format)]
    saes = [f"layer_{layer}{kind}" for kind in ("", ".mlp_out") for layer in range(3)]
    assert folders == {"saelens": saes, "saerelay": [*saes, *(f"layer_{layer}.transcoder" for layer in range(3))]}
    (tier,) = export_run(str(whole), tmp_path / "tier", "saerelay", legs=["L1-k4"])
    assert tier.folder == "layer_1" and tier.description.startswith("topk, k 4")


# --- another run's SAEs -----------------------------------------------------------------------------------------------


def test_another_runs_saes_are_continued_tier_by_tier(whole: Path, tmp_path: Path, facts: ModelFacts) -> None:
    asked = {"parents": str(whole), "tiers": [4, 24], "transfer_tokens": 1024, "roots": []}
    parents = parents_in(whole, recipe(plan=asked))
    plan = make_plan(facts, parents, plan=asked)
    legs = {leg.id: leg.parent for leg in plan.legs if not leg.kind.module_out and leg.module == "mlp_out"}
    assert legs == {
        "L0.mlp_out": f"{whole}/legs/L0.mlp_out-from-L1",
        "L1.mlp_out": f"{whole}/legs/L1.mlp_out",
        "L2.mlp_out": f"{whole}/legs/L2.mlp_out-from-L1",
        "L0.mlp_out-k4": f"{whole}/legs/L0.mlp_out-from-L1-k4",
        "L1.mlp_out-k4": f"{whole}/legs/L1.mlp_out-k4",
        "L2.mlp_out-k4": f"{whole}/legs/L2.mlp_out-from-L1-k4",
        "L0.mlp_out-k24": "L0.mlp_out",
        "L1.mlp_out-k24": "L1.mlp_out",
        "L2.mlp_out-k24": "L2.mlp_out",
    }
    assert plan.leg("L1.mlp_out").start == plan.leg("L1.mlp_out-k4").start == 0
    run(plan, tmp_path / "it", facts, stream=stream())
    suite = load(tmp_path / "it")
    assert (suite[Site(1)].k, suite[Site(1), 4].k, suite[Site(1), 24].k) == (8, 4, 24)
    assert suite.leg_at(Site(1)).id == "L1"


def test_a_run_that_lacks_what_is_continued_is_refused(whole: Path, facts: ModelFacts) -> None:
    for keys, said in (
        ({"dictionary": {"k": 5}}, "no SAE at L0 with 5 active latents, only with"),
        ({"sites": {"module": ["attn_out"]}}, r"no SAE at L0\.attn_out"),
    ):
        asked = {**keys, "plan": {"parents": str(whole)}}
        with pytest.raises(PlanError, match=said):
            make_plan(facts, parents_in(whole, recipe(**asked)), **asked)


# --- what is said of it -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """A finished run of nothing, with made-up numbers."""
    root = tmp_path_factory.mktemp("fake")
    asked = recipe(
        plan={"controls": [0]}, data={"context": CONTEXT, "block_tokens": "auto"}, train={"batch_tokens": 96}
    )
    plan = compile_plan(asked, FACTS)
    paths = RunDirectory(root)
    plan.save(paths.plan)
    test = fake_tokens(paths, np.random.default_rng(0))
    fake_training(paths, plan)
    for leg in plan.legs:
        fake_evaluation(paths, leg, test)
    return load(root)


@pytest.fixture(scope="module")
def summary(fake: Suite) -> Summary:
    return summarise(fake, Corpus.open(fake.directory.tokens))


def test_ranks_that_train_legs_at_the_same_time_save_nothing_by_it(fake: Suite, tmp_path: Path) -> None:
    """Both the time of controls and that of training from scratch are the times of as many ranks."""
    shutil.copytree(fake.directory.root, tmp_path / "run")
    suite = load(tmp_path / "run")
    costs = []
    for ranks in (1, 4):
        RunCost(seconds=PhaseSeconds(total=100.0, lm=0.0), ranks=ranks).save(suite.directory.cost)
        costs.append(summarise(suite, Corpus.open(suite.directory.tokens)).cost)
    alone, together = costs
    assert alone.controls.seconds and together.controls.seconds == alone.controls.seconds / 4
    assert together.seconds == 100.0 - together.controls.seconds
    assert together.from_scratch.seconds_estimate == alone.from_scratch.seconds_estimate / 4


def test_the_language_models_time_from_scratch_is_that_of_its_operations(fake: Suite, tmp_path: Path) -> None:
    """Twice as much if roots are to have twice the tokens, however few the run read; half if each counts twice."""
    share = {}
    blocks = 8 * fake.plan.block_tokens
    for tokens, reuse in ((blocks, 1), (2 * blocks, 1), (blocks, 2)):
        root = tmp_path / f"{tokens}-{reuse}"
        shutil.copytree(fake.directory.root, root)
        plan = fake.plan.recipe.plan.changed(root_tokens=tokens, root_reuse=reuse)
        fake.plan.changed(recipe=fake.plan.recipe.changed(plan=plan)).save(root / "plan.json")
        suite = load(root)
        estimates = []
        for seconds in (0.0, 100.0):
            RunCost(seconds=PhaseSeconds(total=200.0, lm=seconds)).save(suite.directory.cost)
            cost = summarise(suite, Corpus.open(suite.directory.tokens)).cost
            estimates.append(cost.from_scratch.seconds_estimate or 0.0)
            assert cost.from_scratch.reuse == reuse
        share[tokens, reuse] = (estimates[1] - estimates[0]) / 100
    n_blocks = fake.plan.n_tokens / fake.plan.block_tokens
    assert share[blocks, 1] >= 8 / n_blocks  # from scratch, the deepest layer is read from the first block on
    assert share[2 * blocks, 1] == pytest.approx(2 * share[blocks, 1])
    assert share[blocks, 2] == pytest.approx(share[blocks, 1] / 2)


def test_a_summary_of_one_kind_has_its_controls_and_no_other_tier(summary: Summary) -> None:
    assert summary.kinds == KINDS and any(map(summary.is_other_tier, summary.final_legs))
    part = summary.of_kind("mlp_out")
    assert [leg.id for leg in part.suite] == ["L0.mlp_out-from-L1", "L1.mlp_out", "L2.mlp_out-from-L1"]
    assert part.final_legs == part.suite and not any(map(part.is_other_tier, part.final_legs))
    assert {leg.id for leg in part.legs if leg.role == "control"} == {
        "L0.mlp_out-scratch-equal",
        "L0.mlp_out-scratch-full",
    }
    assert summary.of_kind() == summary.of_kind("resid_post") == summary.of_kind().of_kind()


def test_the_overview_draws_the_suites_tier_whether_there_are_one_or_several_kinds(summary: Summary) -> None:
    several = overviews(summary)
    assert [chart.of for chart in several] == KINDS
    of_one = summary.changed(legs=[leg for leg in summary.legs if leg.kind == KINDS[0]])
    (one,) = overviews(of_one)
    assert one.of == "" and one.panels == several[0].panels
    assert not any("-k" in mark.text for mark in one.panels[0].marks)


def test_final_legs_stand_kind_by_kind_and_the_suites_tier_first(summary: Summary) -> None:
    assert [leg.id for leg in summary.final_legs][:4] == ["L0-from-L1", "L0-from-L1-k4", "L0-from-L1-k16", "L1"]
    assert [leg.kind for leg in summary.final_legs] == [kind for kind in KINDS for _ in range(9)]
    assert labels.place_name(summary, summary.leg("L1.mlp_out-k4")) == "layer 1, mlp_out, 4 active latents"
    assert labels.place_name(summary.of_kind(), summary.leg("L1")) == "layer 1"


def test_the_quality_table_has_a_heading_for_each_kind(summary: Summary) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(quality_table(summary))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert [line[0] for line in lines if len(line) == 1] == KINDS
    assert "1 copy with 4 active latents " in " ".join(" ".join(line) for line in lines)
    console.print(quality_table(summary.of_kind()))
    assert "mlp_out" not in console.export_text()


def test_legs_that_were_made_alike_are_told_apart_by_their_ids(fake: Suite, summary: Summary) -> None:
    """Two legs of a plan written leg by leg may differ in nothing that a table shows, such as a skip connection."""
    leg = summary.leg("L1.mlp_out")
    two = summary.changed(legs=[*summary.legs, leg.changed(id="twin")])
    assert labels.made(two, leg) == f"{leg.made} (L1.mlp_out)" and labels.made(summary, leg) == leg.made
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(quality_table(two))
    text = console.export_text()
    assert f"{leg.made} (L1.mlp_out)" in text and f"{leg.made} (twin)" in text
    assert {f"{leg.made} (twin)", f"{leg.made} (L1.mlp_out)"} < {row.made for row in story(fake.plan, two)["rows"]}


def test_the_story_answers_for_each_kind(fake: Suite, summary: Summary) -> None:
    told = story(fake.plan, summary)
    assert "at each of resid_post, mlp_out and transcoder" in told["trained"]
    assert "Copies of each SAE with 4 and 16 active latents" in told["trained"]
    for kind in KINDS:
        assert any(sentence.startswith(f"{kind}: ") for sentence in told["lost"])
    assert [row.kind for row in told["rows"] if row.kind] == KINDS
    alone = story(fake.plan, summary.of_kind())
    assert not any(": " in sentence.split(".")[0][:14] for sentence in alone["lost"])


def test_a_figure_shows_one_kind_and_one_tier(summary: Summary) -> None:
    def marks(part: Summary) -> int:
        return sum(np.size(line.get_xdata()) for line in quality_figure(part).axes[0].lines)

    assert marks(summary) == marks(summary.of_kind("mlp_out")) < marks(summary.of_kind()) * 2
    assert "mlp_out" in quality_figure(summary.of_kind("mlp_out"))._supxlabel.get_text()  # type: ignore[attr-defined]
