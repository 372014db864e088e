"""What people see: the live table, the plain log, tables and the figure."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from saerelay.planning.compile import compile_plan
from saerelay.planning.facts import ModelFacts
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import Recipe
from saerelay.training.engine import Progress
from saerelay.training.progress import LiveTable, PlainLog
from saerelay.views.figures import quality_figure, save
from saerelay.views.tables import cost_lines, quality_table

STEP = Progress(age=4096, loss=0.1, fvu=0.1234, l0=4.0, n_dead=7, learning_rate=1e-3, seconds=1.0)


@pytest.fixture
def plan(facts: ModelFacts) -> Plan:
    sections = {"data": {"context": 16, "block_tokens": 1024}, "dictionary": {"n_latents": 64, "k": 4}}
    sections |= {"plan": {"root_tokens": 8192, "transfer_tokens": 2048, "moment_tokens": 1024}}
    return compile_plan(Recipe.parse(sections, source="test"), facts)


def test_the_live_table_shows_the_legs_that_train(plan: Plan) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with LiveTable(plan, console) as table:
        table.leg("L3", STEP)
        table.tick(4096)
        table.live.refresh()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "4.1k of" in shown and "tokens/s" in shown and "0.1234" in shown and "1.0e-03" in shown


def test_the_plain_log_is_one_line_at_a_time(plan: Plan) -> None:
    out = io.StringIO()
    log = PlainLog(plan, every_seconds=0.0, out=out)
    log.leg("L3", STEP)
    log.tick(4096)
    log.tick(plan.n_tokens)
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 and "4.1k of" in lines[0] and "L3 0.1234/4.0" in lines[0] and "0 s left" in lines[1]
    quiet = PlainLog(plan, every_seconds=100.0, out=out)
    quiet.tick(64)
    assert len(out.getvalue().splitlines()) == 2


def summary() -> dict[str, Any]:
    leg = {
        "id": "L1", "role": "root", "control_of": None, "control_kind": None, "layer": 1, "module": "resid_post",
        "seed": 0, "architecture": "topk", "method": None, "parent": None,
        "tokens": 2000, "refit_tokens": 0, "n_latents": 64,
        "n_eval_tokens": 100, "l0": 4.0, "fvu": 0.1, "delta_ce": 0.01, "delta_ce_se": 0.001, "ce_loss_score": 0.99,
        "frac_alive": 0.5, "snapshots": [], "goal_fvu": None, "predicted_fvu": None,
    }  # fmt: skip
    child = leg | {"id": "L0-from-L1", "role": "transfer", "layer": 0, "method": "affine", "parent": "[bold]x[/y]"}
    control = leg | {"id": "c", "role": "control", "control_of": "L0-from-L1", "control_kind": "full", "layer": 0}
    cost = {
        "seconds": 10.0, "flops": 2e12, "sae_samples": 5000, "lm_tokens": 3000, "flops_all_from_scratch": 4e12,
        "seconds_all_from_scratch_estimate": None, "controls": {"seconds": 5.0},
    }  # fmt: skip
    return {"model": "hostile [red]model[/blue]", "legs": [leg, child, control], "cost": cost}


def test_tables_show_names_as_they_are() -> None:
    console = Console(file=io.StringIO(), width=140)
    console.print(quality_table(summary()))
    for line in cost_lines(summary()):
        console.print(line)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "hostile [red]model[/blue]" in shown and "affine from [bold]x[/y]" in shown
    assert shown.index("affine from") < shown.index("control: from scratch, full budget") and "unknown time" in shown


@pytest.mark.parametrize("delta", [0.01, None])
def test_the_figure_is_a_picture(tmp_path: Path, delta: float | None) -> None:
    document = json.loads(json.dumps(summary()))
    for leg in document["legs"]:
        leg["delta_ce"] = delta
    save(quality_figure(document), tmp_path / "q.png")
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


def test_recipes_of_the_repository_compile(facts: ModelFacts) -> None:
    recipes = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))
    assert recipes
    pythia = facts.changed(n_layers=12, d_model=768, d_attn_z=768, max_context=2048)
    for path in recipes:
        assert compile_plan(Recipe.from_toml(path), pythia).n_tokens > 0
