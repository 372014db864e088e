"""The report's files: what is written for a page to read, and what the summary says of a run."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import HOSTILE, KNOWN, F, V, fake_run, token_text, write_studies

import saerelay.views.report
from saerelay.analysis.features import load_features
from saerelay.analysis.suite import Suite
from saerelay.analysis.summary import summary
from saerelay.errors import RunDirectoryError
from saerelay.files import read_json, write_json
from saerelay.views.report import data, write_report
from saerelay.views.report.data import CHUNK, LEVELS, feed
from saerelay.views.report.story import lost, saved, story, tiles, transfers_badly

LEG = "L1"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """A run with its report, for tests that only read."""
    suite = fake_run(tmp_path_factory.mktemp("written") / "run")
    write_studies(suite)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "token_texts", lambda plan: token_text)
        write_report(suite, summary(suite))
    return suite


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """A run of one's own, whose report is quick to write: without figures."""
    monkeypatch.setattr(data, "token_texts", lambda plan: token_text)
    monkeypatch.setattr(saerelay.views.report, "write_figures", lambda suite, summary, folder: [])
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
        assert np.allclose(np.array(own["top"][1::2]) / 100, features.top_logits_values[latent], atol=0.006)  # type: ignore[index]
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
    lineage, run = read_json(written.directory.lineage), read(report, "run")
    assert [leg["id"] for leg in run["legs"] if leg["role"] == "control"]
    for number, (link, about) in enumerate(zip(lineage["links"], run["links"], strict=True)):
        shown = read(report, f"links/{number}")
        assert shown["partner"] == link["partner"] and shown["status"] == link["status"]
        assert sum(about["counts"].values()) == F and about["counts"]["-"] == 1
        assert shown["decoder_cosine"] == [round(1000 * c) for c in link["decoder_cosine"]]
        assert shown["correlation"][0] is None


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
    page, document = suite.directory.report / "index.html", summary(suite)
    page.parent.mkdir()
    page.write_text("mine")
    with pytest.raises(RunDirectoryError, match="holds something that is no report"):
        write_report(suite, document)
    assert page.read_text() == "mine"
    page.unlink()
    page.parent.rmdir()
    write_report(suite, document)
    (page.parent / "data/index/gone.js").write_text("")
    write_report(suite, document)
    assert page.is_file() and not (page.parent / "data/index/gone.js").exists()


def test_figures_are_there_and_named_on_the_page(written: Suite) -> None:
    page = (written.directory.report / "index.html").read_text(encoding="utf-8")
    drawn = {path.name for path in (written.directory.report / "figures").iterdir()}
    assert {"quality.png", "plan-dark.png", "lineage-depth.png", "matrix-fvu-affine.png"} <= drawn
    assert set(re.findall(r'src="figures/([^"]+)"', page)) == drawn
    assert {"circuits-0.png", "circuits-0-dark.png"} < drawn and "Circuits by layer: &lt;b&gt;sums" in page


def test_a_run_without_matrix_says_how_to_make_it(suite: Suite) -> None:
    suite.directory.matrix.unlink()
    report = write_report(suite, summary(suite)).parent
    assert read(report, "run")["has"] == {"matrix": False, "measures": False, "interpretations": True}
    assert not (report / "data/matrix.js").exists()


def test_long_training_logs_are_thinned_and_keep_their_ends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"leg": "L0", "age": n, "fvu": float("nan")}) + "\n" for n in range(1001)))
    curve = data.training_curves(path)["L0"]
    assert (curve["age"][0], curve["age"][-1]) == (0, 1000) and len(curve["age"]) <= data.CURVE_POINTS
    assert curve["fvu"][0] is None and curve["loss"][0] is None


def test_feeding_refuses_what_json_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        feed(tmp_path, "a", [float("nan")])


# --- what is said -----------------------------------------------------------------------------------------------


def test_the_summary_says_what_was_saved_and_lost(suite: Suite) -> None:
    document = summary(suite)
    document["cost"] |= {"seconds": 100.0, "seconds_all_from_scratch_estimate": 250.0, "flops": 2e12}
    document["cost"] |= {"flops_all_from_scratch": 1e12}
    ratios = {tile["name"]: (tile["ratio"], tile["less"]) for tile in tiles(document)}
    assert ratios["Time"] == ("2.5", True) and ratios["Compute"] == ("2.0", False)
    assert "2.5 times as long" in saved(document)
    document["cost"]["survey"] = {"seconds": 200.0, "flops": 0.0, "sae_samples": 0}
    assert "nothing was saved" in saved(document) and "survey" in saved(document)
    document["cost"]["seconds"] = None
    assert (
        "Time" not in {tile["name"] for tile in tiles(document)} and "took" not in saved(document).split("control")[0]
    )


def test_the_summary_names_the_layer_that_transfers_worst(suite: Suite) -> None:
    document = summary(suite)
    by_id = {leg["id"]: leg for leg in document["legs"]}
    full = next(leg for leg in document["legs"] if leg["control_kind"] == "full")
    by_id[full["control_of"]]["fvu"], full["fvu"] = 0.12, 0.1
    by_id["L2-from-L1"]["fvu"] = 0.5
    said = " ".join(transfers_badly(document))
    assert "layer 0: its FVU is 1.20 times that of its control" in said
    assert "Layer 2 has no control with the full budget" in said and "this run cannot tell" in said
    assert "1.20 at layer 0" in " ".join(lost(document))
    alone = document | {"legs": [leg for leg in document["legs"] if leg["role"] != "control"]}
    assert "does not say what the transfer costs" in " ".join(lost(alone))
    assert "FVU is highest at layer 2 (0.5000)" in " ".join(transfers_badly(alone))
    roots = document | {"legs": [leg for leg in document["legs"] if not leg["parent"] and leg["role"] != "control"]}
    assert transfers_badly(roots) == ["Nothing was transferred in this run."]


def test_predictions_stand_beside_outcomes(suite: Suite) -> None:
    document = summary(suite)
    assert not story(suite.plan, document)["surveyed"]
    for leg in document["legs"]:
        leg |= {"predicted_fvu": 0.1, "validation_fvu": 0.1 + leg["layer"] / 100}
    assert story(suite.plan, document)["surveyed"]
    assert "layer 2 came out worst: 1.20 times the predicted FVU" in " ".join(transfers_badly(document))


def test_the_plan_is_a_tree_in_order(suite: Suite) -> None:
    rows = story(suite.plan, summary(suite))["plan_rows"]
    assert [(row["id"], row["depth"]) for row in rows[:3]] == [("L1", 0), ("L0-from-L1", 1), ("L2-from-L1", 1)]
    assert all(0 <= row["start"] <= row["fold"] < row["end"] <= 100 for row in rows)


def test_a_model_without_a_head_has_a_report(suite: Suite) -> None:
    document = summary(suite)
    for leg in document["legs"]:
        leg |= {"delta_ce": None, "delta_ce_se": None, "ce_loss_score": None}
    write_json(suite.directory.root / "summary.json", document)
    page = write_report(suite, document)
    assert "nats per token rises" not in page.read_text(encoding="utf-8")
