"""The report's files: what is written for a page to read, and what the summary says of a run."""

import io
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import HOSTILE, KNOWN, F, V, extended_run, fake_run, sources_of, summary_of, write_studies
from rich.console import Console

import saerelay.views.report
from saerelay.analysis.judging import legs_by_origin
from saerelay.analysis.lineage import ancestor, leg_pairs
from saerelay.analysis.suite import Suite, load
from saerelay.analysis.summary import summarise
from saerelay.data.corpus import Corpus
from saerelay.errors import RunDirectoryError
from saerelay.planning.survey import SurveyCost
from saerelay.runs.documents.across_layers import Matrix, Measures, Transferability
from saerelay.runs.documents.latents import STATUSES, LineageDocument
from saerelay.runs.documents.quality import LegSummary, Summary
from saerelay.runs.documents.training import TrainingLine
from saerelay.runs.features import load_features
from saerelay.views.labels import METHODS, METRICS, ORIGINS, ROLES, mean_l0, place_name
from saerelay.views.report import write_report
from saerelay.views.report.data import CHUNK, CURVE_POINTS, LEVELS, feed, training_curves
from saerelay.views.report.overview import BOTTOM, TOP, mark_kind, overview
from saerelay.views.report.rows import tiles
from saerelay.views.report.story import lost, other_signs, saved, story, trained, transfers_badly
from saerelay.views.tables.across_layers import matrix_tables
from saerelay.views.tables.quality import notes, quality_table
from saerelay.views.tables.savings import summary_prices
from saerelay.workflows.placeless import placeless
from saerelay.workflows.report import report_run

LEG = "L1"


def report_of(suite: Suite, summary: Summary | None = None) -> Path:
    """Write the report of a fake run; its index.html."""
    return write_report(sources_of(suite, summary), suite.directory.report)


def with_legs(summary: Summary, **changes: dict[str, Any]) -> Summary:
    """A summary with fields of some legs changed, by id."""
    legs = [leg.model_copy(update=changes.get(leg.id, {})) for leg in summary.legs]
    return summary.changed(legs=legs)


def only(summary: Summary, legs: list[LegSummary]) -> Summary:
    """A summary of fewer legs."""
    return summary.changed(legs=legs)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """A run with its report, for tests that only read."""
    suite = fake_run(tmp_path_factory.mktemp("written") / "run")
    write_studies(suite)
    report_of(suite)
    return suite


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """A run of one's own, whose report is quick to write: without figures."""
    monkeypatch.setattr(saerelay.views.report, "write_figures", lambda sources, folder: [])
    return fake_run(tmp_path / "run")


def read(report: Path, name: str) -> Any:
    """What a data file feeds the page."""
    text = (report / "data" / f"{name}.js").read_text(encoding="ascii")
    head = f"saerelay.feed({json.dumps(name)}, "
    assert text.startswith(head) and text.endswith(");\n")
    return json.loads(text.removeprefix(head).removesuffix(");\n"))


@pytest.mark.slow
def test_features_come_back_from_the_data_files(written: Suite) -> None:
    report = written.directory.report
    features = load_features(written.directory, LEG)
    tokens, index, run = read(report, "tokens"), read(report, f"index/{LEG}"), read(report, "run")
    assert np.array_equal(tokens, np.load(written.directory.tokens / "test.npy"))
    assert run["chunk"] == CHUNK and run["levels"] == LEVELS
    for latent in (0, 1, KNOWN[1], CHUNK - 1, CHUNK, F - 1):
        columns = read(report, f"features/{LEG}/{latent // CHUNK}")
        own = {name: column[latent % CHUNK] for name, column in columns.items()}
        assert own["fired"] == index["fired"][latent] == features.n_fired[latent]
        assert index["peaks"][latent] == [tokens[e.sequence][e.position] for e in features.examples(latent)]
        assert own["top"][::2] == features.top_logits[latent].tolist()  # type: ignore[index]
        assert np.allclose(own["top"][1::2], features.top_logits_values[latent], rtol=0.006, atol=0)  # type: ignore[index]
        counts = np.zeros(features.histogram.shape[1], dtype=int)
        if own["histogram"]:
            first, *used = own["histogram"]
            counts[first : first + len(used)] = used
        assert counts.tolist() == features.histogram[latent].tolist()
        assert len(own["examples"]) == len(features.examples(latent))
        for slot, (sequence, position, *pairs) in enumerate(own["examples"]):
            assert (sequence, position) == (
                features.example_sequence[latent, slot],
                features.example_position[latent, slot],
            )
            window = np.zeros(features.example_window.shape[2])
            window[pairs[::2]] = pairs[1::2]
            exact = features.example_window[latent, slot].float().numpy()
            assert np.abs(window / LEVELS * float(features.max_activation[latent]) - exact).max() < 0.03
            assert ((window > 0) == (exact > 0)).all()
    assert index["peaks"][KNOWN[1]] == [V - 1] and index["peaks"][0] == []


@pytest.mark.slow
def test_lineage_comes_back_from_the_data_files(written: Suite) -> None:
    report = written.directory.report
    lineage, run = LineageDocument.load(written.directory.lineage), read(report, "run")
    assert [leg["id"] for leg in run["legs"] if leg["role"] == "control"]
    for number, (link, about) in enumerate(zip(lineage.links, run["links"], strict=True)):
        shown = read(report, f"links/{number}")
        assert shown["partner"] == link.partner and shown["status"] == link.status
        assert sum(about["counts"].values()) == F and about["counts"]["-"] == 1
        assert shown["decoder_cosine"] == [round(1000 * c) for c in link.decoder_cosine if c is not None]
        assert shown["correlation"][0] is None


def test_the_words_of_the_page_are_those_of_tables_and_figures(written: Suite) -> None:
    script = (written.directory.report / "data/labels.js").read_text(encoding="ascii")
    labels = json.loads(script.removeprefix("const labels = ").removesuffix(";\n"))
    assert labels["methods"] == METHODS and labels["statuses"] == STATUSES and labels["origins"] == ORIGINS
    assert labels["roles"] == ROLES and {name: tuple(text) for name, text in labels["metrics"].items()} == METRICS
    declared = re.search(
        r"declare const labels: \{(.*?)\n\};",
        (Path(saerelay.views.report.__file__).parent / "types.d.ts").read_text(),
        re.DOTALL,
    )
    assert declared and set(re.findall(r"^  (\w+):", declared[1], re.MULTILINE)) == set(labels)
    page = (written.directory.report / "index.html").read_text(encoding="utf-8")
    assert page.index('src="data/labels.js"') < page.index('src="features.js"'), "words are there when scripts start"
    assert ROLES["equal_tokens"] in page and ROLES["full"] in page


def test_hostile_text_stays_text_in_files(written: Suite) -> None:
    report = written.directory.report
    for path in report.rglob("*.js"):
        if path.parent != report:  # data, not the page's own
            text = path.read_text(encoding="ascii")
            assert "<" not in text and len(text.splitlines()) == 1
    assert {int(i): text for i, text in read(report, "vocabulary").items() if int(i) in HOSTILE} == HOSTILE
    page = (report / "index.html").read_text(encoding="utf-8")
    assert "<b>text</b>" not in page and "&lt;b&gt;text&lt;/b&gt;" in page


def test_an_older_report_is_replaced_and_nothing_else(suite: Suite) -> None:
    page = suite.directory.report / "index.html"
    page.parent.mkdir()
    page.write_text("mine")
    with pytest.raises(RunDirectoryError, match="holds something that is not a report"):
        report_of(suite)
    assert page.read_text() == "mine"
    page.unlink()
    page.parent.rmdir()
    report_of(suite)
    (page.parent / "data/index/gone.js").write_text("")
    report_of(suite)
    assert page.is_file() and not (page.parent / "data/index/gone.js").exists()


def test_figures_are_there_and_named_on_the_page(written: Suite) -> None:
    page = (written.directory.report / "index.html").read_text(encoding="utf-8")
    drawn = {path.name for path in (written.directory.report / "figures").iterdir()}
    assert {"quality.png", "plan-dark.png", "lineage-depth.png", "matrix-fvu-affine.png"} <= drawn
    assert set(re.findall(r'src="figures/([^"]+)"', page)) == drawn
    assert {"circuits-0.png", "circuits-0-dark.png"} < drawn and "Circuits by layer: &lt;b&gt;sums" in page


def test_a_run_without_matrix_says_how_to_make_it(suite: Suite) -> None:
    suite.directory.matrix.unlink()
    report = report_of(suite).parent
    assert read(report, "run")["has"] == {"matrix": False, "measures": False, "interpretations": True}
    assert not (report / "data/matrix.js").exists()


def test_long_training_logs_are_thinned_and_keep_their_ends() -> None:
    lines = [TrainingLine(cursor=n, leg="L0", age=n, fvu=float("nan")) for n in range(1001)]
    curve = training_curves(lines)["L0"]
    assert (curve["age"][0], curve["age"][-1]) == (0, 1000) and len(curve["age"]) <= CURVE_POINTS
    assert curve["fvu"][0] is None and curve["loss"][0] is None


def test_feeding_refuses_what_json_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        feed(tmp_path, "a", [float("nan")])


# --- what is said -----------------------------------------------------------------------------------------------


def test_the_summary_says_what_was_saved_and_lost(suite: Suite) -> None:
    summary = summary_of(suite)

    def costing(**changes: Any) -> Summary:
        scratch = summary.cost.from_scratch.changed(seconds_estimate=250.0, flops=1e12)
        cost = {"seconds": 100.0, "flops": 2e12, "from_scratch": scratch, **changes}
        return summary.changed(cost=summary.cost.changed(**cost))

    ratios = {tile.name: (tile.ratio, tile.less) for tile in tiles(costing())}
    assert ratios["Time"] == ("2.5", True) and ratios["Compute"] == ("2.0", False)
    assert "2.5 times as long" in saved(costing())
    survey = SurveyCost(
        lm_tokens=0, sae_samples=0, flops=0.0, seconds=200.0, seconds_per_sample=0.0, seconds_per_lm_flop=0.0
    )
    surveyed = costing(survey=survey)
    assert "nothing was saved" in saved(surveyed) and "survey" in saved(surveyed)
    priceless = costing(sae_samples=0)  # such as copies that are neither trained nor refitted
    assert "Samples" not in {tile.name for tile in tiles(priceless)} and len(tiles(priceless)) == 3
    untimed = costing(seconds=None)
    assert "Time" not in {tile.name for tile in tiles(untimed)} and "took" not in saved(untimed).split("control")[0]


def test_what_an_sae_from_elsewhere_took_is_said_to_be_left_out(suite: Suite) -> None:
    """And a run that only measures such an SAE makes no claim about savings."""
    summary = summary_of(suite)
    assert "outside" not in saved(summary)
    hop = summary.leg("L0-from-L1").changed(parent="saes/layer_1", made="affine from saes/layer_1")
    outside = only(summary, [hop])
    assert "What it took to train saes/layer_1, from outside this run, is not counted." in saved(outside)
    assert any("saes/layer_1" in str(note) for note in notes(outside)) and tiles(outside)
    assert "Layer 0 was transferred from saes/layer_1 (" in trained(suite.plan, outside)

    shown = placeless(outside, {"saes/layer_1": "./layer_1"}).legs[0]
    assert (shown.parent, shown.made) == ("./layer_1", "affine from ./layer_1")

    measured = only(summary, [hop.changed(tokens=0, moment_tokens=0, refit_tokens=0)])
    assert saved(measured).startswith("Nothing was trained or fitted") and not tiles(measured)
    assert not any("outside" in str(note) for note in notes(measured))


def test_what_was_trained_is_said_kind_by_kind(suite: Suite) -> None:
    """The layers of one kind may be transferred where those of another are not."""
    summary = with_legs(summary_of(suite), **{"L2-from-L1": {"module": "mlp_out", "n_latents": 1200}})
    told = trained(suite.plan, summary)
    assert told.startswith("Sparse autoencoders (TopK, 600 or 1,200 latents) for all 3 layers, at each of resid_post")
    assert "resid_post: Layer 1 was trained from scratch" in told and "resid_post: Layer 0 was transferred" in told
    assert "mlp_out: Layer 2 was transferred" in told


def test_an_sae_of_another_l0_is_called_a_copy_only_if_it_is_one(suite: Suite) -> None:
    """Plans written leg by leg put SAEs of any L0 side by side; the L0 of a ReLU SAE follows from its penalty."""
    summary = with_legs(summary_of(suite), L1={"target_l0": 4.0, "l0": 4.0})
    own = summary.leg("L1")
    relu = own.changed(id="relu", architecture="relu", target_l0=None, l0=90.0, in_suite=False)
    denser = own.changed(id="denser", target_l0=8.0, l0=8.0, in_suite=False)
    tier = own.changed(id="L1-k2", role="transfer", parent="L1", target_l0=2.0, l0=2.0, in_suite=False)
    summary = only(summary, [own, relu, denser, tier])
    told = trained(suite.plan, summary)
    assert "Copies of each SAE with 2 active latents" in told and "at another L0: relu and denser" in told
    places = [place_name(summary, leg) for leg in summary.legs]
    assert places == ["layer 1", "layer 1, relu", "layer 1, 8 active latents", "layer 1, 2 active latents"]
    assert mean_l0(summary) == "2, 4, 8 and 90"


def test_transferability_is_told_of_hops_and_not_of_their_repeats(suite: Suite) -> None:
    summary = summary_of(suite)
    hop = summary.leg("L0-from-L1")
    repeat = hop.changed(id="L0-from-L1-seed1", repeat_of=hop.id)
    more = [hop.changed(id=f"L{layer}-from-L1", layer=layer) for layer in (3, 4)]
    summary = summary.changed(legs=[*summary.legs, repeat, *more])
    shares = {"L0-from-L1": 0.5, "L0-from-L1-seed1": 0.1, "L2-from-L1": 0.3, "L3-from-L1": 0.6, "L4-from-L1": 0.7}
    rows = [shared(summary.leg(leg_id), share) for leg_id, share in shares.items()]
    [told] = other_signs(summary, Measures.model_construct(transferability=rows))
    assert "lowest with 30 % at layer 2 and 50 % at layer 0, and highest with 70 % at layer 4" in told


def shared(leg: LegSummary, share: float) -> Transferability:
    """That a leg's latents share a share of their tokens with its parent's."""
    shares = dict.fromkeys(("transferability", "top_logits", "bottom_logits", "top_tokens"), share)
    facts = {"leg": leg.id, "layer": leg.layer, "tokens": leg.tokens, "snapshot": False}
    return Transferability(**facts, parent="L1", parent_layer=1, n_latents=9, **shares)


def test_the_summary_names_the_layer_that_transfers_worst(suite: Suite) -> None:
    summary = summary_of(suite)
    full = next(leg for leg in summary.legs if leg.control_kind == "full")
    assert full.control_of
    changes = {full.control_of: {"delta_ce": 0.12}, full.id: {"delta_ce": 0.1}, "L2-from-L1": {"balanced_fvu": 0.5}}
    summary = with_legs(summary, **changes)
    said = " ".join(transfers_badly(summary))
    assert "layer 0: its ΔCE is 1.20 times that of its control" in said
    assert "Layer 2 has no control with the full budget" in said and "this run cannot tell" in said
    assert "1.20 at layer 0" in " ".join(lost(summary))
    alone = only(summary, [leg for leg in summary.legs if leg.role != "control"])
    assert "does not say what the transfer costs" in " ".join(lost(alone))
    assert "balanced FVU is highest at layer 2 (0.5000)" in " ".join(transfers_badly(alone))
    roots = only(summary, [leg for leg in alone.legs if not leg.parent])
    assert transfers_badly(roots) == ["Nothing was transferred in this run."]


def test_a_leg_that_was_continued_is_not_counted_twice(suite: Suite) -> None:
    """The first page is about the legs that stand for their layers now, not about what they were continued from."""
    summary = summary_of(suite)
    old = summary.leg("L2-from-L1")
    more = old.changed(id="more", parent=old.id, fvu=0.3, made="identity from L2-from-L1")
    continued = old.changed(continued_by="more", in_suite=False)
    legs = [continued if leg.id == old.id else leg for leg in summary.legs]
    rows = story(suite.plan, only(summary, [*legs, more]))["rows"]
    assert [row.leg.id for row in rows] == ["L0-from-L1", "L1", "more"]


def test_the_survey_counts_in_every_price_that_is_known(suite: Suite) -> None:
    cost = summary_of(suite).cost
    survey = SurveyCost(
        lm_tokens=1, sae_samples=2, flops=8e9, lm_flops=4e9, seconds=3.0, seconds_per_sample=0.0,
        seconds_per_lm_flop=0.0,
    )  # fmt: skip
    together = cost.changed(survey=survey).with_survey
    assert cost.lm_flops and together.lm_flops == cost.lm_flops + 4e9 and together.flops == cost.flops + 8e9
    of_old_version = summary_of(suite).changed(cost=cost.changed(survey=survey.changed(lm_flops=None)))
    names = [price.name for price in summary_prices(of_old_version)]
    assert "operations" in names and "operations of the language model" not in names


def partial_run(suite: Suite, root: Path, legs: list[str]) -> Suite:
    """A copy of a fake run of which only some legs are published so far."""
    shutil.copytree(suite.directory.root, root)
    for leg in suite.legs:
        if leg.id not in legs:
            shutil.rmtree(root / "legs" / leg.id)
    return load(root)


def test_what_is_not_published_has_no_price(suite: Suite, tmp_path: Path) -> None:
    root = suite.plan.leg("L1")
    summary = summary_of(partial_run(suite, tmp_path / "root", ["L1"]))
    cost = summary.cost
    assert cost.sae_samples == cost.from_scratch.sae_samples == root.budget_tokens and not cost.controls.sae_samples
    child = suite.plan.leg("L0-from-L1")
    cost = summary_of(partial_run(suite, tmp_path / "child", ["L0-from-L1"])).cost
    assert child.hop and cost.from_scratch.sae_samples == root.budget_tokens, "of one layer"
    assert cost.sae_samples == child.hop.fork_at_tokens + child.budget_tokens + child.refit_tokens
    assert 0 < cost.flops < summary_of(suite).cost.flops


def test_of_controls_alone_there_is_their_quality_and_nothing_else(suite: Suite, tmp_path: Path) -> None:
    alone = partial_run(suite, tmp_path / "alone", ["L0-scratch-full"])
    summary = summary_of(alone)
    table = quality_table(summary)
    assert list(table.columns[1].cells) == [ROLES["full"]] and list(table.columns[0].cells) == ["0"]
    assert summary.cost.sae_samples == 0 < summary.cost.controls.sae_samples
    for analysis in (alone.matrix, lambda: report_run(alone)):
        with pytest.raises(RunDirectoryError, match="only controls are finished yet. This continues the run: saerelay"):
            analysis()


def test_a_matrix_is_shown_leg_by_leg_as_it_was_asked_for(suite: Suite) -> None:
    """Also without the cells of the legs' own layers, which only the plain copy has."""
    matrix = Matrix.load(suite.directory.matrix)
    hostile = matrix.asked.legs | {"[/x]": [1]}
    foreign = matrix.cells[0].changed(leg="gone")
    for method in ("affine", "identity"):
        cells = [cell for cell in matrix.cells if cell.method == method]
        part = matrix.changed(cells=[foreign.changed(method=method), *cells], asked=matrix.asked.changed(legs=hostile))
        output = Console(width=200, file=io.StringIO())
        output.print(*matrix_tables(part))
        shown = output.file.getvalue()  # type: ignore[attr-defined]
        assert "L0-from-L1" in shown and "[/x]" in shown and "gone" not in shown
        assert f"{next(cell.fvu for cell in cells if cell.source != cell.target):.3f}" in shown


def test_a_cell_that_cannot_be_measured_leaves_the_others(suite: Suite) -> None:
    matrix = Matrix.load(suite.directory.matrix)
    first, *others = matrix.cells
    console = Console(width=200, file=io.StringIO())
    console.print(*matrix_tables(matrix.changed(cells=[first.changed(fvu=None), *others])))
    assert "FVU of each SAE on the activations of each layer" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_matrix_of_an_unknown_method_is_damaged(suite: Suite) -> None:
    """Figures are named after methods, and a name from a file could lead out of the run."""
    data = json.loads(suite.directory.matrix.read_text())
    data["cells"][1]["method"] = "x/../../outside"
    suite.directory.matrix.write_text(json.dumps(data))
    with pytest.raises(RunDirectoryError, match="damaged .*method"):
        sources_of(suite)


def test_an_extended_run_is_compared_with_the_controls_as_they_are_now(suite: Suite, tmp_path: Path) -> None:
    old, new = "L0-from-L1", "L0-from-L1+more"
    equal, full = "L0-scratch-equal", "L0-scratch-full+more"
    extended = extended_run(suite, tmp_path / "extended", ["L1", old, "L0-scratch-full"])
    assert [leg.id for leg in extended.scratch_counterparts(extended.leg(new))] == [full]
    assert [leg.id for leg in extended.scratch_counterparts(extended.leg(old))] == [equal]
    pairs = [(pair.source.id, pair.target.id) for pair in leg_pairs(extended) if pair.kind == "control"]
    assert pairs == [(old, equal), (new, full)]
    assert [leg.id for (site, _, _), leg in legs_by_origin(extended).items() if site.layer < 2] == [
        new,
        full,
        "L1+more",
    ]

    summary = summary_of(extended)
    assert summary.controls_of(summary.leg(new)) == [summary.leg(full)]
    assert summary.controls_of(summary.leg(old)) == [summary.leg(equal)], "the continued leg has more tokens"
    assert summary.leg(full).tokens_in_all == 2 * summary.leg("L0-scratch-full").tokens
    assert summary.leg(new).made == f"{summary.leg(old).made}, continued"
    told = story(extended.plan, with_legs(summary, **{new: {"delta_ce": 0.12}}))
    assert "1.20 at layer 0" in told["lost"][0] and "1.20 times" in told["price"][0]
    assert "Layer 1 was trained from scratch on 16.5k tokens" in told["trained"]
    (row,) = (row for row in told["rows"] if row.leg.id == new)
    assert [(control.leg.id, control.tokens) for control in row.controls] == [(full, "16.5k")]
    output = Console(width=200, file=io.StringIO())
    output.print(quality_table(summary))
    shown = output.file.getvalue()  # type: ignore[attr-defined]
    assert "from scratch, continued" in shown and "full budget, before it was continued" in shown


def test_of_a_continued_transfer_that_fell_back_nothing_is_transferred(suite: Suite, tmp_path: Path) -> None:
    extended = extended_run(suite, tmp_path / "extended", ["L2-from-L1"])
    fell_back(extended, "L2-from-L1")
    summary = summary_of(extended)
    assert not summary.is_transferred(summary.leg("L2-from-L1+more"))
    assert "Layers 1 and 2 were trained from scratch on 4.22k to 8.26k tokens" in trained(extended.plan, summary)
    first, more = extended.leg("L2-from-L1"), extended.leg("L2-from-L1+more")
    assert [extended.is_transferred(leg) for leg in (first, more, extended.leg("L0-from-L1"))] == [False, False, True]
    assert ancestor(extended, first) == ancestor(extended, more) == first.id
    pairs = {(pair.source.id, pair.target.id) for pair in leg_pairs(extended) if pair.kind == "hop"}
    assert pairs == {("L1", "L0-from-L1"), (first.id, more.id)}


def fell_back(suite: Suite, leg_id: str) -> None:
    """Say of a leg that no map from its parent helped."""
    path = suite.directory.leg(leg_id) / "dictionary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hop": {"method": "scratch"}}))


@pytest.mark.parametrize("delta_ce", [-0.01, 0.015])
def test_controls_that_are_as_good_as_the_model_have_no_ratio(suite: Suite, delta_ce: float) -> None:
    """A ΔCE within two standard errors of 0 may be 0: a ratio to it could be anything."""
    summary = with_legs(summary_of(suite), **{"L0-scratch-full": {"delta_ce": delta_ce}})
    told = story(suite.plan, summary)
    assert f"in nats per token, the model's loss is {0.1 - delta_ce:.3f}" in told["lost"][0]
    assert "not clearly above 0" in told["lost"][0]
    assert "ratios would say nothing" in told["price"][0]
    assert not any("No from-scratch controls" in sentence for sentence in told["lost"])
    assert "cannot be ranked" in told["badly"][0]


def test_a_hop_that_was_trained_from_scratch_is_shown_as_one_from_scratch(suite: Suite, tmp_path: Path) -> None:
    """Where no map was better than a random dictionary."""
    root = shutil.copytree(suite.directory.root, tmp_path / "fallen back")
    fallen_back = load(root)
    fell_back(fallen_back, "L2-from-L1")
    leg = fallen_back.leg("L2-from-L1")
    assert suite.origin(leg) == "from below" and fallen_back.origin(leg) == "scratch"
    row = summarise(fallen_back, Corpus.open(fallen_back.directory.tokens)).leg("L2-from-L1")
    assert mark_kind(row) == "root" and row.parent == "L1"


def test_predictions_stand_beside_outcomes(suite: Suite) -> None:
    summary = summary_of(suite)
    assert not story(suite.plan, summary)["surveyed"]
    changes = {leg.id: {"predicted_fvu": 0.1, "validation_fvu": 0.1 + leg.layer / 100} for leg in summary.legs}
    surveyed = with_legs(summary, **changes)
    assert story(suite.plan, surveyed)["surveyed"]
    assert "layer 2 is worst: its FVU is 1.20 times the predicted one" in " ".join(transfers_badly(surveyed))


def test_the_plan_is_a_tree_in_order(suite: Suite) -> None:
    rows = story(suite.plan, summary_of(suite))["plan_rows"]
    assert [(row.id, row.depth) for row in rows[:3]] == [("L1", 0), ("L0-from-L1", 1), ("L2-from-L1", 1)]
    assert all(0 <= row.start <= row.fold < row.end <= 100 for row in rows)


def test_a_rate_that_the_map_may_lower_is_an_upper_bound(suite: Suite) -> None:
    legs = [leg.changed(lr_by_map=leg.id == "L0-from-L1") for leg in suite.plan.legs]
    told = story(suite.plan.changed(legs=legs), summary_of(suite))
    bounded = {row.id for row in told["plan_rows"] if row.lr.startswith("≤ ")}
    assert bounded == {"L0-from-L1"} and told["rate_note"].startswith("≤: the better a hop's map")
    for_copies = suite.plan.changed(legs=[leg.changed(lr_by_map=False) for leg in suite.plan.legs])
    assert not story(for_copies, summary_of(suite))["rate_note"]


def test_a_model_without_a_head_has_a_report(suite: Suite) -> None:
    summary = summary_of(suite)
    headless = {"delta_ce": None, "delta_ce_se": None, "ce_loss_score": None}
    page = report_of(suite, with_legs(summary, **{leg.id: headless for leg in summary.legs}))
    assert "nats per token rises" not in page.read_text(encoding="utf-8")


# --- the chart on the first page ------------------------------------------------------------------------------------


def test_the_overview_shows_every_sae_and_its_controls_with_the_numbers_of_the_table(written: Suite) -> None:
    summary = summary_of(written)
    page = (written.directory.report / "index.html").read_text(encoding="utf-8")
    table = page[page.index('id="quality-table"') : page.index("</table>")]
    panels = overview(summary).panels
    assert [panel.name for panel in panels] == ["ΔCE", "Balanced FVU", "FVU"]
    for panel in panels:
        assert [mark.kind for mark in panel.marks] == ["transfer", "equal_tokens", "full", "root", "transfer"]
        assert all(a.x < b.x for a, b in pairwise(panel.marks)), "side by side, from the first layer to the last"
        for mark in panel.marks:
            value = re.search(r"(0\.\d{4})", mark.text)
            assert value and value[1] in table
    assert "L0-scratch-equal: control: from scratch, equal tokens, 3.55k tokens\nΔCE 0.1000 ± 0.0100" in [
        mark.text for mark in panels[0].marks
    ]


def test_marks_stand_as_high_as_their_values_and_bars_reach_one_standard_error(suite: Suite) -> None:
    summary = with_legs(summary_of(suite), L1={"delta_ce": 0.2, "delta_ce_se": 0.05})
    panel = overview(summary).panels[0]
    root = next(mark for mark in panel.marks if mark.kind == "root")
    other = panel.marks[0]  # 0.1 ± 0.01
    assert BOTTOM - root.y == pytest.approx(2 * (BOTTOM - other.y), abs=0.2)
    assert root.low - root.y == pytest.approx((BOTTOM - root.y) / 4, abs=0.2)
    assert TOP <= root.high < root.y < root.low <= BOTTOM
    assert [tick.text for tick in panel.ticks] == ["0", "0.1", "0.2"]


def test_a_random_dictionary_does_not_squeeze_the_others(suite: Suite) -> None:
    summary = summary_of(suite)
    full = next(leg for leg in summary.legs if leg.control_kind == "full")
    random = full.changed(id="noise", control_kind="random", delta_ce=0.9, delta_ce_se=0.01)
    assert mark_kind(summary.leg("L0-from-L1").changed(origin="random")) == "random", "as in the figures"
    with_random = overview(only(summary, [*summary.legs, random]))
    marks = {mark.text.split(":")[0]: mark for mark in with_random.panels[0].marks}
    before = {mark.text.split(":")[0]: mark for mark in overview(summary).panels[0].marks}
    assert marks["noise"].is_beyond and marks["noise"].y == TOP and "0.9000 ± 0.0100" in marks["noise"].text
    assert marks["L1"].y == before["L1"].y and not marks["L1"].is_beyond
    assert with_random.kinds[-1] == "random"


def test_the_overview_of_a_model_without_a_head_and_of_many_layers(suite: Suite) -> None:
    summary = summary_of(suite)
    headless = {"delta_ce": None, "delta_ce_se": None}
    drawn = overview(with_legs(summary, **{leg.id: headless for leg in summary.legs}))
    assert [panel.name for panel in drawn.panels] == ["Balanced FVU", "FVU"] and not drawn.is_wide
    root = summary.leg("L1")
    deep = overview(only(summary, [root.changed(id=f"L{n}", layer=n) for n in range(40)]))
    assert deep.is_wide and [tick.text for tick in deep.layers] == [str(n) for n in range(0, 40, 3)]
    assert all(0 < mark.x < 100 for mark in deep.panels[0].marks)
