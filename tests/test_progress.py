"""What people see: the live table, the plain log, tables and the figure."""

import io
from itertools import product
from pathlib import Path

import pytest
from rich.console import Console
from test_figures import COST, leg

from saerelay.analysis.progress import PlainCount, ProgressDisplay
from saerelay.planning.compile import compile_plan
from saerelay.planning.facts import ModelFacts
from saerelay.planning.leg import External
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import Recipe
from saerelay.runs.documents.cost import ControlCost
from saerelay.runs.documents.quality import Summary
from saerelay.site import SiteKind
from saerelay.training.engine import Progress
from saerelay.training.progress import LiveTable, PlainLog
from saerelay.views.figures import quality_figure, save
from saerelay.views.tables.quality import notes, quality_table

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


def test_no_speed_is_told_before_a_block_is_done(plan: Plan) -> None:
    """The language model reads a whole block before the first batch is trained on."""
    out = io.StringIO()
    log = PlainLog(plan, cursor=2048, every_seconds=0.0, out=out)
    for cursor in (2048 + 64, 2048 + 1024, 2048 + 1088):
        log.tick(cursor)
    first, second, third = out.getvalue().splitlines()
    assert "measuring the speed" in first and "tokens/s" in second and "tokens/s" in third


def summary() -> Summary:
    """A root, a child with a hostile name, and its control; a run whose time is not known."""
    root = leg("L1", "root", 1, None)
    child = leg("L0-from-L1", "transfer", 0, "[bold]x[/y]")
    control = leg("c", "control", 0, None, kind="full").changed(control_of="L0-from-L1")
    cost = COST.changed(
        from_scratch=COST.from_scratch.changed(seconds_estimate=None),
        controls=ControlCost(sae_samples=0, flops=0.0, seconds=5.0),
    )
    legs = [root, child, control]
    return Summary(model="hostile [red]model[/blue]", revision="", data="text", legs=legs, cost=cost)


def test_tables_show_names_as_they_are() -> None:
    console = Console(file=io.StringIO(), width=140)
    console.print(quality_table(summary()))
    for line in notes(summary()):
        console.print(line)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "hostile [red]model[/blue]" in shown and "affine from [bold]x[/y]" in shown
    assert shown.index("affine from") < shown.index("control: from scratch, full budget")
    assert "wall-clock" not in shown and "Controls took another 5 s" in shown


@pytest.mark.parametrize(("l0", "told"), [(8.7, False), (8.9, True), (7.1, True), (None, False)])
def test_another_l0_than_asked_for_is_told(l0: float | None, told: bool) -> None:
    legs = [one.changed(l0=l0 if one.id == "c" else 8.0, target_l0=8.0) for one in summary().legs]
    lines = [str(line) for line in notes(summary().changed(legs=legs)) if "from what was asked for" in str(line)]
    assert bool(lines) == told
    if told:
        assert f"asked for: c ({l0} for 8). " in lines[0]


@pytest.mark.parametrize("delta", [0.01, None])
def test_the_figure_is_a_picture(tmp_path: Path, delta: float | None) -> None:
    legs = [one.changed(delta_ce=delta) for one in summary().legs]
    save(quality_figure(summary().changed(legs=legs)), tmp_path / "q.png")
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


def test_recipes_of_the_repository_compile(facts: ModelFacts) -> None:
    recipes = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))
    assert recipes
    model = facts.changed(n_layers=18, d_model=768, d_attn_z=768, max_context=2048)
    for path in recipes:
        recipe = Recipe.from_toml(path)
        base = saes_of_another_run(recipe) if recipe.plan.hop.parents else {}
        parents = {(SiteKind(sae.module, sae.module_out), sae.layer, sae.l0): name for name, sae in base.items()}
        plan = compile_plan(recipe, model, externals=base, parents=parents or None)
        assert plan.n_tokens > 0


def saes_of_another_run(recipe: Recipe) -> dict[str, External]:
    """An SAE for each layer, kind and tier that a recipe asks for."""
    found = {}
    for kind, layer, l0 in product(recipe.sites.kinds, range(18), {recipe.dictionary.l0, *recipe.plan.tier.tiers}):
        found[f"runs/base/legs/{len(found)}"] = External(
            layer=layer,
            module=kind.module,
            module_out=kind.module_out,
            architecture=recipe.dictionary.architecture,
            n_latents=16_384,
            d_model=768,
            k=None,
            l0=l0,
            path="/",
        )
    return found


def test_a_file_gets_a_line_now_and_then_with_the_time_left() -> None:
    console = Console(file=io.StringIO(), width=100)
    now = iter([0.0, 4.0, 12.0, 13.0, 40.0])
    count = PlainCount(console, 10, "fitting maps between layers 0/1", clock=lambda: next(now))
    for _ in range(4):
        count.done()
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "fitting maps between layers 0/1: 2 of 10, 48 s left",
        "fitting maps between layers 0/1: 4 of 10, 60 s left",
    ]


def test_steps_are_counted_with_the_time_left() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    display = ProgressDisplay(console)
    with display.counting(3, "circuits") as done:
        done()
        for item in display.track([1, 2], "inside"):  # shows nothing: one bar at a time
            assert item
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "circuits" in shown and "1/3" in shown and "inside" not in shown and ":" in shown
    assert list(display.track([1, 2], "again")) == [1, 2]
    assert "again" in console.file.getvalue() and "2/2" in console.file.getvalue()  # type: ignore[attr-defined]
