"""The report of the transfer study: its arithmetic, and a report on a small made-up study."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from test_figures import COST, leg
from transfer_report import replace_block, report
from transfer_tables import LEG, budget_for, mean_interval, pareto_table, read_study, scratch_equivalent

from saerelay.planning.compile import compile_plan
from saerelay.planning.facts import ModelFacts
from saerelay.planning.recipe import Recipe
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.quality import Density, Evaluation, EvaluationMetrics, EvaluationQuestion, Summary

CURVE = [(n, 100 * n**-0.5) for n in (100.0, 400.0, 1600.0)]
"""FVU falls as the root of the budget."""
N_LAYERS = 4
FULL = 2_000_000
FACTS = ModelFacts(
    name="m", revision="", family="gpt_neox", dtype="float32", device="cpu", n_layers=N_LAYERS, d_model=16,
    d_attn_z=16, vocab_size=101, max_context=1024, bos_token_id=0, eos_token_id=0, has_lm_head=True,
    layer_params=3000, model_params=25_000,
)  # fmt: skip


def test_the_budget_for_a_quality_is_read_off_the_curve() -> None:
    assert budget_for(CURVE, 100 * 900**-0.5) == pytest.approx(900)
    assert budget_for(CURVE, 20.0) == 100.0, "reached where measuring began"
    assert budget_for(CURVE, 1.0) is None, "not reached by what was tried"
    assert budget_for([(100.0, 3.0), (200.0, 4.0), (400.0, 2.0)], 3.0) == 100.0, "first crossing"


def test_a_curve_may_begin_with_no_tokens() -> None:
    found = budget_for([(0.0, 4.0), (100.0, 1.0)], 2.0)
    assert found == pytest.approx(50), "straight in the budget, logarithmic in FVU"


def test_scratch_tokens_of_equal_quality_are_marked_where_extrapolated() -> None:
    for tokens, outside in ((900, False), (100, False), (1600, False), (25, True), (6400, True)):
        found, beyond = scratch_equivalent(CURVE, 100 * tokens**-0.5)
        assert found == pytest.approx(tokens)
        assert beyond == outside
    assert scratch_equivalent([(100.0, 2.0), (200.0, 2.0)], 1.0) == (pytest.approx(3200), True), "a flat end"
    assert scratch_equivalent(CURVE, 1e9) == (pytest.approx(100 / 16), True)


def test_intervals_bracket_the_mean() -> None:
    values = np.random.default_rng(1).normal(1.1, 0.05, 12).tolist()
    mean, low, high = mean_interval(values)
    assert low < mean < high
    assert mean == pytest.approx(float(np.mean(values)))
    assert high - low == pytest.approx(2 * 1.96 * float(np.std(values)) / math.sqrt(12), rel=0.5)
    assert mean_interval([1.0, 2.0]) == 1.5, "two values have no interval"
    assert mean_interval([math.nan]) is None


def test_prose_around_the_markers_stays() -> None:
    text = "before <!-- begin:a -->old<!-- end:a --> between <!-- begin:b --><!-- end:b --> after"
    once = replace_block(text, "a", "| new |")
    assert once == "before <!-- begin:a -->\n\n| new |\n\n<!-- end:a --> between <!-- begin:b --><!-- end:b --> after"
    assert replace_block(once, "a", "| new |") == once
    assert replace_block(text, "c", "nothing") == text
    with pytest.raises(SystemExit, match="end:a"):
        replace_block("<!-- begin:a --> and no end", "a", "")


@pytest.mark.parametrize(
    ("leg", "parts"),
    [
        ("L0-2M", (None, "0", None, "2M")),
        ("L2-L3-affine+refit-0", ("2", "3", "affine+refit", "0")),
        ("L5-L4-fork0.25-250k", ("5", "4", "fork0.25", "250k")),
        ("L5-L0-chain-refit-125k", ("5", "0", "chain-refit", "125k")),
        ("L4-scratch-x8", (None, "4", "scratch", "x8")),
    ],
)
def test_ids_of_the_study_are_understood(leg: str, parts: tuple[str | None, ...]) -> None:
    found = LEG.fullmatch(leg)
    assert found and found.groups() == parts


def finish(out: Path, job: str, legs: list[tuple[str, int, int, float]]) -> None:
    """A finished job with legs of (id, tokens, tokens of its map, FVU); half of the map refits the decoder."""
    rng = np.random.default_rng(len(job))
    rows = []
    for leg_id, tokens, moments, fvu in legs:
        found = LEG.fullmatch(leg_id)
        assert found
        row = leg(leg_id, "root", int(found["layer"]), None).changed(
            tokens=tokens, moment_tokens=moments, refit_tokens=moments // 2, fvu=fvu, delta_ce=fvu
        )
        rows.append(row)
        deltas = rng.normal(fvu, 0.01, 8).tolist()
        evaluation(leg_id, deltas).save(RunDirectory(out / job).evaluation(leg_id))
    cost = COST.changed(lm_tokens_unique=100_352)
    Summary(model="m", revision="", data="", legs=rows, cost=cost).save(out / job / "summary.json")
    recipe = Recipe.parse({"model": {"name": "m"}, "dictionary": {"n_latents": 64}, "plan": {"preset": "scratch"}})
    compile_plan(recipe, FACTS).save(out / job / "plan.json")


def evaluation(leg_id: str, deltas: list[float]) -> Evaluation:
    """A leg's evaluation of which only the rise of the CE of each sequence matters."""
    density = Density(log10_edges=[], counts=[], never=0, freq_over_1_percent=0.0, freq_over_10_percent=0.0)
    metrics = EvaluationMetrics(n_tokens=8, density=density, sequence_delta_ce=deltas)
    asked = EvaluationQuestion(tokens=8, ce=True, ages=[])
    return Evaluation(asked=asked, leg=leg_id, metrics=metrics, snapshots={})


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """From scratch FVU is (tokens / 2M)^-½ / 10; hops backward are as good as scratch with four times their samples."""
    out = tmp_path / "study" / "demo"
    budgets = {"250k": 250_000, "500k": 500_000, "1M": 1_000_000, "2M": FULL}

    def fvu(tokens: float) -> float:
        return 0.1 * (tokens / FULL) ** -0.5

    own = [(f"L{layer}-{label}", n, 0, fvu(n)) for label, n in budgets.items() for layer in range(N_LAYERS)]
    finish(out, "scratch-s0", own)
    finish(out, "forks-s0", [("L2-L1-fork0.5-250k", 250_000, 100_000, 0.11)])
    for target in range(N_LAYERS - 1):
        hops = [
            (f"L{source}-L{target}-{kind}-{label}", n, moments, (1 if source > target else 1.1) * fvu(4 * paid))
            for source in (target - 1, target + 1)
            if source >= 0
            for kind, moments in (("identity", 0), ("affine+refit", 100_000))
            for label, n in (("0", 0), ("250k", 250_000), ("500k", 500_000))
            if (paid := n + moments // 2 or 31_250)
        ]
        finish(out, f"hops-L{target}-s0", hops)
    return tmp_path / "study"


@pytest.mark.slow
def test_a_partly_finished_study_is_reported(study: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    page = docs / "transfer.md"
    names = ("status", "tokens-to-quality", "head-start", "direction", "delta-ce", "forks", "groups", "suites", "paper")
    page.write_text("# By hand\n" + "".join(f"<!-- begin:{n} --><!-- end:{n} -->\nprose on {n}\n" for n in names))
    report(study, docs, None)
    text, tables = page.read_text(), json.loads((docs / "transfer.json").read_text())
    assert text.startswith("# By hand\n") and all(f"prose on {n}\n" in text for n in names)
    (status,) = tables["status"]["demo"]
    assert "groups-s0" in status["not run"] and "hops-L3-s0" in status["not run"]
    assert tables["groups"]["demo"][0]["suite"].startswith("alternate")
    assert tables["suites"]["demo"] == []
    assert "Not run yet." in text

    reach = {(row["hop"], row["direction"]): row for row in tables["tokens-to-quality"]["demo"]}
    own = 100 * 1.1**-2
    assert reach["scratch", "own layer"]["1.10×: samples"] == f"{own:.1f}%"
    assert reach["affine+refit", "backward"]["1.10×: samples"] == f"{own / 4:.1f}%"
    assert reach["affine+refit", "backward"]["1.10×: LM tokens"] != reach["affine+refit", "backward"]["1.10×: samples"]
    assert reach["identity", "forward"]["1.02×: reached"] == "0 of 2", "1.1 times scratch's at 2M"

    starts = {(row["hop"], row["tokens"]): row for row in tables["head-start"]["demo"]}
    assert starts["affine+refit", "250k"]["backward: × samples"] == pytest.approx(4, rel=0.01)
    assert starts["affine+refit", "250k"]["backward: extrapolated"] == "0 of 3"
    assert starts["identity", "0"].get("backward: × samples") is None
    for row in tables["direction"]["demo"]:
        assert row["backward better"] == "2 of 2"
        assert row["FVU backward / forward"] == pytest.approx(1 / 1.1, rel=0.01)
    (fork,) = tables["forks"]["demo"]
    assert fork["forks from the root at"] == "50%" and fork["FVU ratio"] == pytest.approx(1.1)
    assert fork["scratch, equal tokens"] == pytest.approx(8**0.5, rel=0.01)
    (zero,) = [row for row in tables["delta-ce"]["demo"] if (row["hop"], row["tokens"]) == ("identity", "0")]
    assert zero["backward: ΔCE − control"][0] > 10 * zero["backward: ΔCE − control"][1] > 0
    assert {path.name for path in docs.glob("*.png")} == {
        "transfer-demo.png",
        "transfer-head-start.png",
        "transfer-suites.png",
    }
    report(study, docs, None)
    assert page.read_text() == text, "a second report changes nothing"


def test_the_cheapest_suite_within_a_bound(study: Path) -> None:
    tight, *_, loose = pareto_table(read_study(study / "demo"))
    assert tight["worst layer within"] == "2%" and tight["scratch: samples"] == 1
    assert tight["hops used"] == "1 → 0, 3 → 2", "500k tokens, backward, are as good as 2M from scratch"
    assert tight["hops: samples"] == pytest.approx((2 * FULL + 2 * 500_000) / (4 * FULL))
    assert tight["hops: LM tokens"] == pytest.approx((FULL + 500_000) / FULL)
    assert loose["hops: mean FVU ratio"] <= 1.2 and loose["hops: samples"] <= tight["hops: samples"]
