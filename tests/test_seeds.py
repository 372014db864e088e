"""Several seeds: what is repeated, what the repeats leave as it was, and how the spread is shown."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import saerelay as sr
from saerelay.analysis.similarity import share_found_again
from saerelay.cli import app
from saerelay.planning.plan import Plan
from saerelay.runs.documents.quality import Summary
from saerelay.runs.documents.seeds import spread
from saerelay.views.report.rows import quality_rows
from saerelay.views.tables.quality import quality_table
from saerelay.workflows.settle import plan_run


def sections(model: Path, **plan: Any) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(1, 101, (400, 64)).astype(np.uint16)
    np.save(model.parent / "ids.npy", ids)
    tokens = {"root_tokens": 2048, "transfer_tokens": 1024, "moment_tokens": 1024, "refit_tokens": 512}
    return {
        "model": {"name": str(model)},
        "sites": {"layers": [0, 1]},
        "data": {"tokens": str(model.parent / "ids.npy"), "context": 16},
        "dictionary": {"n_latents": 64, "k": 4},
        "plan": {**tokens, **plan},
        "train": {"batch_tokens": 64, "checkpoint_every": 1024},
        "evaluate": {"tokens": 512},
    }


def planned(model: Path, seeds: int, **plan: Any) -> Plan:
    data = sections(model, **plan)
    data["train"] |= {"seed": 5, "seeds": seeds}
    return plan_run(sr.Recipe.parse(data, source="test"))


def test_every_leg_is_repeated_from_the_repeat_of_its_parent(tiny_model: Path) -> None:
    plan = planned(tiny_model, 3, controls=[0])
    legs = {leg.id: (leg.seed, leg.parent, leg.control_of, plan.repeat_of(leg)) for leg in plan.legs}
    assert legs["L1"] == (5, "", "", "")
    assert legs["L1-seed6"] == (6, "", "", "L1")
    assert legs["L0-from-L1-seed7"] == (7, "L1-seed7", "", "L0-from-L1")
    assert legs["L0-scratch-equal-seed7"] == (7, "", "L0-from-L1-seed7", "L0-scratch-equal")
    assert len(legs) == 3 * 4 and list(legs)[:4] == [leg.id for leg in planned(tiny_model, 1, controls=[0]).legs]


def test_the_price_of_a_suite_is_that_of_its_first_seed(tiny_model: Path) -> None:
    one, three = planned(tiny_model, 1), planned(tiny_model, 3)
    assert [leg.id for leg in three.without_controls().legs] == [leg.id for leg in one.legs]
    assert [leg.id for leg in three.all_from_scratch().legs] == [leg.id for leg in one.all_from_scratch().legs]
    assert three.n_tokens == one.n_tokens  # one pass of the language model


def test_legs_that_are_written_out_are_repeated_with_their_own_seeds(tiny_model: Path) -> None:
    legs = [
        {"id": "a", "layer": 1, "tokens": 1024, "seed": 11},
        {"id": "b", "layer": 0, "tokens": 1024, "parent": "a"},
        {"id": "c", "layer": 0, "tokens": 1024, "after": "b"},
    ]
    plan = planned(tiny_model, 2, legs=legs)
    repeats = {leg.id: (leg.seed, leg.parent) for leg in plan.legs if plan.repeat_of(leg)}
    assert repeats == {"a-seed12": (12, ""), "b-seed6": (6, "a-seed12"), "c-seed6": (6, "")}
    assert plan.leg("c-seed6").start >= plan.leg("b-seed6").end


def test_a_name_that_only_looks_like_a_repeat_is_none(tiny_model: Path) -> None:
    legs = [
        {"id": "a", "layer": 1, "tokens": 1024},
        {"id": "a-seed9", "layer": 1, "tokens": 1024, "seed": 8},
        {"id": "b-seed7", "layer": 1, "tokens": 1024, "seed": 7},
    ]
    plan = planned(tiny_model, 1, legs=legs)
    assert not any(plan.repeat_of(leg) for leg in plan.legs)


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run of two seeds, by the command line, measured."""
    data = sections(tiny_model, controls=[0])
    recipe = tmp_path / "run.toml"
    lines = []
    for section, keys in data.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    recipe.write_text("\n".join(lines))
    app(["train", str(recipe), "--out", str(tmp_path / "run"), "--seeds", "2"], standalone_mode=False)
    app(["eval", str(tmp_path / "run")], standalone_mode=False)
    capsys.readouterr()
    return tmp_path / "run"


def test_the_suite_stands_on_the_first_seed_and_shows_the_spread(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    suite = sr.load(run)
    assert len(suite) == 8
    assert [leg.id for leg in suite.one_per_site] == ["L0-from-L1", "L1"]
    assert torch.equal(suite[sr.Site(0)].W_dec, suite["L0-from-L1"].W_dec)
    assert [leg.id for leg in suite.scratch_counterparts(suite.leg("L0-from-L1-seed1"))] == [
        "L0-scratch-equal-seed1",
        "L0-scratch-full-seed1",
    ]

    summary = Summary.load(run / "summary.json")
    of_first = summary.leg("L0-from-L1")
    legs = summary.over_seeds(of_first)
    assert [leg.id for leg in legs] == ["L0-from-L1", "L0-from-L1-seed1"]
    assert [leg.id for leg in summary.final_legs] == ["L0-from-L1", "L1"]
    mean, deviation = spread(legs, "fvu")
    values = [leg.fvu for leg in legs]
    assert values[0] != values[1]
    assert mean == pytest.approx(sum(values) / 2)  # type: ignore[arg-type]
    assert deviation == pytest.approx(abs(values[0] - values[1]) / 2**0.5)  # type: ignore[operator]
    shared = share_found_again(suite["L0-from-L1-seed1"].W_dec, suite["L0-from-L1"].W_dec)
    assert legs[1].found_again == pytest.approx(shared) and legs[0].found_again is None

    console = Console(width=200, record=True, file=StringIO())
    console.print(quality_table(summary))
    text = console.export_text()
    assert text.count("of 2 seeds") == 4 and f"{mean:.4f} ± {deviation:.4f}" in text and "-seed1" not in text
    rows = {row.leg.id: [spread_row.name for spread_row in row.spreads] for row in quality_rows(summary)}
    assert [name.split(":")[0] for name in rows["L0-from-L1"][1:]] == ["control", "control"]
    assert len(rows["L1"]) == 1 and rows["L1"][0].startswith("mean ± SD of 2 seeds, ")


def test_repeats_leave_the_first_seed_as_it_was(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    alone = sr.train_run(sr.Recipe.parse(sections(tiny_model, controls=[0]), source="test"), tmp_path / "alone")
    suite = sr.load(run)
    for leg_id in alone:
        for name, tensor in alone[leg_id].tensors().items():
            assert torch.equal(suite[leg_id].tensors()[name], tensor), (leg_id, name)
    assert not torch.equal(suite["L1-seed1"].W_enc, suite["L1"].W_enc)


def test_one_seed_shows_no_spread(tiny_model: Path, tmp_path: Path) -> None:
    suite = sr.train_run(sr.Recipe.parse(sections(tiny_model), source="test"), tmp_path / "run")
    sr.evaluate_run(suite)
    summary = Summary.load(tmp_path / "run" / "summary.json")
    assert all(not row.spreads for row in quality_rows(summary))
    assert all(leg.repeat_of is None and leg.found_again is None for leg in summary.legs)
