"""Commands that plan and train: init, plan, train, hop, demo."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saerelay.cli.options import (
    InputFormat,
    Json,
    OutRun,
    RecipePath,
    Seeds,
    print_all,
    print_json,
    print_summary,
    progress,
    say,
    site_of,
    with_seeds,
)
from saerelay.rank import rank

if TYPE_CHECKING:
    from saerelay.planning.cost import Cost
    from saerelay.planning.plan import Plan
    from saerelay.planning.ranks import Speeds, Spread
    from saerelay.planning.recipe import Recipe
    from saerelay.views.tables.savings import Price


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to the program."""
    for command in (init, plan, train, hop, demo):
        app.command(rich_help_panel="Train")(command)


def init() -> None:
    """Print a recipe with every key, its default and its meaning."""
    from saerelay.planning.recipe import Recipe
    from saerelay.planning.toml import annotated_toml

    print(annotated_toml(Recipe()), end="")


def plan(
    recipe: RecipePath,
    as_json: Json = False,
    timing: Annotated[
        bool, typer.Option(help="Load the model's weights and time a few steps, to predict how long the run takes.")
    ] = False,
    write: Annotated[
        Path | None, typer.Option(help='With preset = "auto": write a recipe that spells out the chosen legs.')
    ] = None,
    ranks: Annotated[
        int, typer.Option(min=1, help="Show how this many processes would share the work; see docs/scale-out.md.")
    ] = 1,
    seeds: Seeds = None,
) -> None:
    """Show the plan: each SAE, its parent, and the estimated cost. With preset = "auto", survey the layers first."""
    from saerelay.planning.cost import plan_cost
    from saerelay.planning.ranks import spread
    from saerelay.planning.recipe import Recipe
    from saerelay.views.tables.plan import plan_facts, plan_table
    from saerelay.views.tables.savings import prices_of
    from saerelay.workflows.settle import check_data, plan_run

    run = with_seeds(Recipe.from_toml(recipe), seeds)
    check_data(run)
    ranks = max(ranks, run.model.tensor_parallel)
    if run.plan.surveyed:
        plan_auto(run, as_json, write, ranks)
        return
    if write:
        raise typer.BadParameter(f'{recipe} needs no survey; this option is for preset = "auto"', param_hint="--write")

    with progress().status("planning"):
        compiled = plan_run(run)
    suite = compiled.without_controls()
    from_scratch = compiled.all_from_scratch()
    cost = plan_cost(compiled)
    speeds = seconds = totals = None
    if timing:
        all_speeds, (seconds, of_suite, of_scratch) = timed_plans([compiled, suite, from_scratch])
        speeds = all_speeds[0]
        totals = (of_suite["total"], of_scratch["total"])
    shares = spread(compiled, ranks, speeds)
    if as_json:
        print_json(plan_data(compiled, cost, plan_cost(from_scratch), seconds, shares))
        return

    prices = prices_of(plan_cost(suite), plan_cost(from_scratch), totals)
    print_all([plan_table(compiled), "", plan_facts(compiled, cost, seconds)])
    print_savings(compiled, prices, shares)


def timed_plans(plans: "Sequence[Plan]") -> "tuple[list[Speeds], list[dict[str, float]]]":
    """Measure how fast this machine runs some plans for one model, and how long each takes; show that it measures."""
    from saerelay.lm.model import LanguageModel
    from saerelay.workflows.timing import measured_speeds, plan_seconds

    with progress().status("loading the model and timing a few steps"):
        speeds = measured_speeds(plans, LanguageModel.load(plans[0].recipe.model))
    return speeds, [plan_seconds(*pair) for pair in zip(plans, speeds, strict=True)]


def plan_auto(run: "Recipe", as_json: bool, write: Path | None, ranks: int) -> None:
    """Survey the layers, and show or write the legs that are chosen from the survey."""
    from saerelay.files import write_text
    from saerelay.planning.choose import with_legs, written_out
    from saerelay.planning.cost import plan_cost
    from saerelay.planning.ranks import spread
    from saerelay.planning.toml import annotated_toml
    from saerelay.views.tables.plan import choice_lines, plan_facts, plan_table, survey_table, time_basis
    from saerelay.views.tables.savings import prices_of
    from saerelay.workflows.settle import plan_run
    from saerelay.workflows.survey import survey_once

    if write and write.exists():
        raise typer.BadParameter(f"{write} exists; choose another file", param_hint="--write")
    survey, choice = survey_once(run, progress())
    explicit = written_out(run, survey, choice)
    if write:
        write_text(write, annotated_toml(explicit))
    compiled = plan_run(explicit)
    from_scratch = plan_cost(compiled.all_from_scratch())
    seconds = choice.time()
    shares = spread(compiled, ranks)
    if as_json:
        surveyed = survey.to_data()
        del surveyed["asked"]
        data = plan_data(compiled, choice.cost, from_scratch, seconds, shares)
        data |= {"survey": surveyed, "fvu_ratio": choice.ratio, "fvu_from_scratch": choice.reference}
        print_json(data)
        return
    tables = (survey_table(survey), plan_table(compiled, choice.reference), *choice_lines(survey, choice))
    predicted = plan_run(with_legs(run, survey, choice.legs))
    prices = prices_of(plan_cost(predicted.without_controls()), from_scratch, None)
    print_all([*tables, plan_facts(predicted, choice.cost, seconds, time_basis(predicted))])
    print_savings(compiled, prices, shares)


def plan_data(
    plan: "Plan", cost: "Cost", from_scratch: "Cost", seconds: dict[str, float] | None, shares: "Spread"
) -> dict[str, Any]:
    """Return a plan and its cost for `--json`, with the work of each rank if there are several."""
    data: dict[str, Any] = {
        "plan": plan.to_data(),
        "cost": cost.model_dump(),
        "from_scratch": from_scratch.model_dump(),
        "seconds": seconds,
    }
    if len(shares.ranks) > 1:
        data["ranks"] = shares.model_dump()
    return data


def print_savings(plan: "Plan", prices: "Sequence[Price]", shares: "Spread") -> None:
    """Print what a plan saves over training every layer from scratch, and, on several ranks, the work of each."""
    from rich.text import Text

    from saerelay.views.labels import uncounted
    from saerelay.views.tables.plan import spread_table
    from saerelay.views.tables.savings import savings_table, verdict

    # A suite without transfers is what it would be compared with.
    if any(plan.first_of(leg).role == "transfer" for leg in plan.legs):
        tokens, reuse = plan.recipe.plan.root_tokens, plan.recipe.plan.root_reuse
        transfers = [leg for leg in plan.legs if leg.role == "transfer" and leg.method != "random"]
        outside = dict.fromkeys(leg.parent for leg in transfers if not plan.has(leg.parent))
        notes = []
        if plan.recipe.plan.legs:
            notes.append(Text("In a plan written leg by leg, from scratch means plan.root_tokens for every layer."))
        if outside:
            notes.append(Text(uncounted(list(outside))))
        print_all(["", savings_table(prices, tokens, reuse), verdict(prices, tokens, reuse), *notes])
    if len(shares.ranks) > 1:
        print_all(["", spread_table(plan, shares)])


def train(
    recipe: RecipePath,
    out: OutRun,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was interrupted.")] = False,
    extend: Annotated[bool, typer.Option("--extend", help="Add legs or tokens to a finished run.")] = False,
    seeds: Seeds = None,
) -> None:
    """Train all SAEs of a recipe."""
    from saerelay.planning.recipe import Recipe
    from saerelay.workflows.launch import train_run
    from saerelay.workflows.settle import mend_recipe

    if rank() == 0:
        mend_recipe(out)
    run = with_seeds(Recipe.from_toml(recipe), seeds)
    suite = train_run(run, out, resume=resume, extend=extend, console=progress())
    saes = "1 SAE" if len(suite) == 1 else f"{len(suite)} SAEs"
    say(f"{saes} in {out}/legs. Measure their quality: saerelay eval {out}")


def hop(
    source: Annotated[str, typer.Option("--from", help="A trained SAE in any format: a path, or hf://user/repo/path.")],
    to_layer: Annotated[int, typer.Option("--to-layer", help="Layer to transfer the SAE to.")],
    recipe: Annotated[Path, typer.Option("--recipe", help="Recipe with the model, the data and all other settings.")],
    out: OutRun,
    tokens: Annotated[
        str, typer.Option(help="Tokens to train on after the transfer; 0 for none. Default: the recipe's.")
    ] = "",
    method: Annotated[
        str,
        typer.Option(
            help="Map between the layers: auto (the best by measurement), identity, rescale, procrustes, affine. "
            "Default: the recipe's."
        ),
    ] = "",
    refit: Annotated[bool | None, typer.Option(help="Refit the decoder in closed form. Default: the recipe's.")] = None,
    architecture: Annotated[
        str, typer.Option(help="Target architecture: topk, batchtopk, jumprelu, gated, relu. Default: unchanged.")
    ] = "",
    n_latents: Annotated[str, typer.Option(help="Target number of latents. Default: unchanged.")] = "",
    k: Annotated[int | None, typer.Option(help="Active latents per token. Default: unchanged.")] = None,
    skip_connection: Annotated[
        bool | None,
        typer.Option(help="Of a transcoder: fit a skip connection, or drop the one it has. Default: unchanged."),
    ] = None,
    from_model: Annotated[
        str,
        typer.Option(
            help="Model the SAE was trained on, if it is not the recipe's; the map is fitted between the two models."
        ),
    ] = "",
    from_layer: Annotated[int | None, typer.Option(help="Layer the SAE reads, if its files do not say.")] = None,
    from_module: Annotated[
        str, typer.Option(help="With --from-layer: the kind of module, such as mlp_out.")
    ] = "resid_post",
    format: InputFormat = "",
) -> None:
    """Transfer one trained SAE, in any format, to a layer of a model, with or without fine-tuning.

    The target may differ in layer, model (a fine-tuned one), text, number of latents, sparsity or architecture.

    At the SAE's own layer, --tokens 0 --no-refit leaves it unchanged, ready to be measured.
    """
    from saerelay.planning.recipe import Recipe
    from saerelay.workflows.hop import hop_run

    leg_keys: dict[str, Any] = {
        "tokens": tokens or None,
        "method": method or None,
        "architecture": architecture or None,
        "n_latents": n_latents or None,
        "refit": refit,
        "k": k,
        "skip_connection": skip_connection,
    }
    given_keys = {key: value for key, value in leg_keys.items() if value is not None}
    suite = hop_run(
        source,
        to_layer,
        Recipe.from_toml(recipe),
        out,
        site=site_of(from_layer, from_module),
        model=from_model,
        format=format,
        console=progress(),
        **given_keys,
    )
    say(f"{', '.join(suite)} in {out}/legs. Measure its quality: saerelay eval {out}")


def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory; an earlier demo in it is replaced.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Train, transfer and evaluate SAEs for all layers of the built-in model, offline."""
    from saerelay.workflows.demo import run_demo

    print_summary(run_demo(out, progress()))
    say(f"\nOpen {out}/report/index.html in a browser to see everything. The SAEs are in {out}/legs/.")
