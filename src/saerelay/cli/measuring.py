"""Commands that measure a finished run: eval, matrix, measures, circuits, show, interpret, report."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from saerelay.cli.options import (
    HeldOutTokens,
    Json,
    Legs,
    RunDir,
    SafeConsole,
    number_list,
    one_at_a_time,
    output,
    print_all,
    print_json,
    print_summary,
    progress,
    say,
    split_list,
)

MATRIX_METHODS = "identity,affine"
Methods = Annotated[
    str,
    typer.Option("--methods", help="Methods of carrying an SAE to another layer: identity, affine, affine+refit, ..."),
]
Snapshots = Annotated[bool, typer.Option("--snapshots", help="Measure snapshots of the legs as well.")]
PromptFile = Annotated[
    Path | None,
    typer.Option("--prompts", help="File of prompts, one JSON object per line. Default: the model's own predictions."),
]


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to the program."""
    panel = "Measure"
    app.command(name="eval", rich_help_panel=panel)(one_at_a_time(evaluate))
    for command in (matrix, measures, circuits, show, interpret, report):
        app.command(rich_help_panel=panel)(one_at_a_time(command))


def evaluate(
    run: RunDir,
    as_json: Json = False,
    tokens: HeldOutTokens = 0,
    matrix_too: Annotated[bool, typer.Option("--matrix", hidden=True)] = False,
    methods: Annotated[str | None, typer.Option(hidden=True)] = None,
    snapshots: Annotated[bool, typer.Option("--snapshots", hidden=True)] = False,
    measures_too: Annotated[bool, typer.Option("--measures", hidden=True)] = False,
    prompts: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure the quality of every SAE on held-out documents."""
    # The hidden options are older than the commands `matrix` and `measures`.
    if matrix_too and measures_too:
        raise typer.BadParameter(
            "one command measures one of them; run saerelay matrix RUN, then saerelay measures RUN",
            param_hint="--matrix and --measures",
        )
    if not matrix_too and (methods is not None or snapshots):
        given = "--snapshots" if methods is None else "--methods"
        raise typer.BadParameter("this is an option of saerelay matrix RUN", param_hint=given)
    if not measures_too and prompts:
        raise typer.BadParameter("this is an option of saerelay measures RUN", param_hint="--prompts")
    if matrix_too:
        matrix(run, as_json, tokens, MATRIX_METHODS if methods is None else methods, snapshots)
        return
    if measures_too:
        measures(run, as_json, tokens, prompts)
        return
    from saerelay.analysis.evaluate import evaluate as measure_quality
    from saerelay.analysis.session import Session
    from saerelay.analysis.suite import load
    from saerelay.team import Team

    summary = measure_quality(Session(load(run), console=progress(), team=Team.joined()), tokens=tokens)
    if as_json:
        print_json(summary.to_data())
    else:
        print_summary(summary)


def matrix(
    run: RunDir,
    as_json: Json = False,
    tokens: HeldOutTokens = 0,
    methods: Methods = MATRIX_METHODS,
    snapshots: Snapshots = False,
) -> None:
    """Measure every SAE at every layer, without training it there."""
    from saerelay.analysis.matrix import matrix as measure_matrix
    from saerelay.analysis.session import Session
    from saerelay.analysis.suite import load
    from saerelay.team import Team
    from saerelay.views.tables.across_layers import matrix_tables

    session = Session(load(run), console=progress(), team=Team.joined())
    document = measure_matrix(session, methods=split_list([methods]), tokens=tokens, snapshots=snapshots)
    if as_json:
        print_json(document.to_data())
    else:
        print_all(matrix_tables(document))


def measures(run: RunDir, as_json: Json = False, tokens: HeldOutTokens = 0, prompts: PromptFile = None) -> None:
    """Compare SAEs with their parents and with SAEs from scratch, as in Ghilardi et al. 2024."""
    from saerelay.analysis.measures import measures as take_measures
    from saerelay.analysis.session import Session
    from saerelay.analysis.suite import load
    from saerelay.views.tables.across_layers import measures_tables

    document = take_measures(Session(load(run), console=progress()), prompts=prompts, tokens=tokens)
    if as_json:
        print_json(document.to_data())
    else:
        print_all(measures_tables(document))


def circuits(
    run: RunDir,
    task: Annotated[
        str,
        typer.Option(help="A task: ioi, greater-than, sva, brackets, quotes, self; or a file of prompts (.jsonl)."),
    ],
    k: Annotated[str, typer.Option(help="Circuit sizes (numbers of latents), separated by commas.")] = "4,36,68,100",
    leg: Legs = [],  # noqa: B006
    n_prompts: Annotated[
        int, typer.Option(help="Number of prompts: half to find the circuits, half to evaluate them.")
    ] = 500,
    method: Annotated[
        str, typer.Option(help="How effects are estimated: attribution or integrated-gradients.")
    ] = "attribution",
    seed: Annotated[int, typer.Option(help="Random seed for drawing prompts.")] = 0,
    as_json: Json = False,
    prompts: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Find the latents of each SAE that a task depends on, and measure how faithful and complete these circuits are.

    After Marks et al. 2024, "Sparse feature circuits".
    """
    from saerelay.analysis.circuits import circuits as find_circuits
    from saerelay.analysis.session import Session
    from saerelay.analysis.suite import load
    from saerelay.views.tables.circuits import circuit_tables

    document = find_circuits(
        Session(load(run), console=progress()),
        task,
        k=number_list(k, "--k", "4,36"),
        legs=split_list(leg),
        n_prompts=n_prompts if prompts is None else prompts,
        method=method,
        seed=seed,
    )
    if as_json:
        print_json(document.to_data())
    else:
        print_all(circuit_tables(document))


def show(
    run: RunDir,
    leg: Annotated[str, typer.Argument(help="Leg: its id or layer number.")],
    latent: Annotated[int, typer.Argument(help="Index of the latent.")],
    as_json: Json = False,
) -> None:
    """Show one latent: where it fires, which tokens it promotes, and its counterparts in other layers.

    The first call computes the features and the lineage of the whole run.
    """
    from saerelay.analysis.describe import describe
    from saerelay.analysis.session import Session
    from saerelay.analysis.suite import load
    from saerelay.views.tables.latent import latent_view

    description = describe(Session(load(run), console=progress()), leg, latent)
    if as_json:
        print_json(description.to_data())
        return
    console = output()
    console.print(latent_view(description, colour=console.is_terminal and not console.no_color))


def interpret(
    run: RunDir,
    explainer: Annotated[str, typer.Option(help="Language model that explains, by its name at the endpoint.")] = "",
    endpoint: Annotated[
        str,
        typer.Option(help="Address of the API, http(s)://host/v1. Default: $SAERELAY_ENDPOINT or $OPENAI_BASE_URL."),
    ] = "",
    key_env: Annotated[
        str,
        typer.Option(help="Environment variable that holds the API key. Default: SAERELAY_API_KEY or OPENAI_API_KEY."),
    ] = "",
    body: Annotated[str, typer.Option(help="Additional fields of each request, as JSON, such as a temperature.")] = "",
    leg: Legs = [],  # noqa: B006
    n: Annotated[int, typer.Option("--n", min=1, help="Number of latents per leg.")] = 64,
    latents: Annotated[
        str, typer.Option(help="Explain these latents, separated by commas, instead of drawing some.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Random seed for drawing latents and texts.")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, help="Number of requests in flight at a time.")] = 8,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate the cost and show one prompt of each kind; send nothing.")
    ] = False,
    price_in: Annotated[float, typer.Option(min=0, help="USD per million input tokens.")] = 0.0,
    price_out: Annotated[float, typer.Option(min=0, help="USD per million output tokens.")] = 0.0,
    max_cost: Annotated[
        float | None, typer.Option(min=0, help="Stop before spending more than this, in USD; requires both prices.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    as_json: Json = False,
    model: Annotated[str, typer.Option(hidden=True)] = "",
    legs: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Have a language model explain latents, and score its explanations by detection and fuzzing, as in Delphi.

    The cost is estimated first. All answers are kept, so that the same command, run again, sends only what is missing.
    """
    from saerelay.analysis.endpoint.address import Endpoint
    from saerelay.analysis.suite import load
    from saerelay.views.tables.interpretation import interpretation_tables
    from saerelay.workflows import interpret as workflow

    if not (explainer or model):
        raise typer.BadParameter("give the name of a model at the endpoint", param_hint="--explainer")
    asked = Endpoint.of(explainer or model, endpoint, key_env, body)
    budget = workflow.Budget(concurrency=concurrency, price_in=price_in, price_out=price_out, max_cost=max_cost)
    study = workflow.prepare_study(
        load(run),
        legs=split_list([*leg, legs]),
        n=n,
        latents=number_list(latents, "--latents", "1,2,3"),
        seed=seed,
        console=progress(),
    )
    if dry_run:
        preview = workflow.dry_run(study, asked, budget)
        if as_json:
            print_json(preview.to_data())
        else:
            preview.show(SafeConsole(soft_wrap=True))
        return
    command = shlex.join(["saerelay", *sys.argv[1:]])
    summary = workflow.interpret_run(study, asked, budget, yes=yes, resume_command=command, console=progress())
    if summary is None:
        raise typer.Exit(1)
    if as_json:
        print_json(summary.to_data())
    else:
        print_all(interpretation_tables(summary))


def report(
    run: RunDir,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out the matrix and the measures, unless they are up to date.")
    ] = False,
    open_it: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Write a page that shows the whole run, after measuring whatever is missing or out of date."""
    import webbrowser

    from saerelay.analysis.suite import load
    from saerelay.workflows.report import report_run

    page = report_run(load(run), quick=quick, console=progress())
    n_bytes = sum(path.stat().st_size for path in page.parent.rglob("*") if path.is_file())
    say(f"{page} ({n_bytes / 1e6:.1f} MB)")
    if open_it:
        webbrowser.open(page.resolve().as_uri())
