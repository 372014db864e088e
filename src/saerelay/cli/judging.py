"""Commands for human evaluation: judge, score."""

from pathlib import Path
from typing import Annotated

import typer

from saerelay.cli.options import Json, RunDir, number_list, one_at_a_time, print_all, print_json, progress, say

N_LATENTS = 32


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to the program."""
    for command in (judge, score):
        app.command(rich_help_panel="Judge")(one_at_a_time(command))


def judge(
    run: RunDir,
    files: Annotated[list[Path] | None, typer.Argument(hidden=True)] = None,
    layers: Annotated[str, typer.Option(help="Layers, separated by commas, or all.")] = "all",
    n: Annotated[
        int,
        typer.Option("--n", min=1, help="Number of latents per layer and origin (from scratch, forward, backward)."),
    ] = N_LATENTS,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for drawing latents.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="File or directory for the page. Default: in the run directory.")
    ] = None,
    score_instead: Annotated[bool, typer.Option("--score", hidden=True)] = False,
    as_json: Json = False,
) -> None:
    """Make a page on which people judge latents without knowing which of them were transferred."""
    if score_instead:  # older than the command `score`
        if (layers, n, seed, out) != ("all", N_LATENTS, 0, None):
            raise typer.BadParameter(
                "--layers, --n, --seed and --out are for making a page; to score answers: saerelay score RUN FILE..."
            )
        score(run, files or [], as_json)
        return
    if files:
        raise typer.BadParameter(
            f"unexpected {files[0]}; to score the files that judges exported: saerelay score RUN FILE..."
        )
    from saerelay.analysis.suite import load
    from saerelay.views.tables.judging import drawn_lines
    from saerelay.workflows.judge import judge_run

    chosen = None if layers == "all" else sorted(set(number_list(layers, "--layers", "1,2,3, or all")))
    suite = load(run)
    page, key = judge_run(suite, layers=chosen, n=n, seed=seed, out=out, console=progress())
    if as_json:
        print_json({"path": str(page), **key.to_data()})
        return
    for line in drawn_lines(key):
        say(line)
    key_file = suite.directory.judging / f"{key.page}.json"
    say(f"\nGive {page} to the judges; it needs nothing else. Do not give them its key, {key_file}.")
    say(f"To score the files they export: saerelay score {run} FILE...")


def score(
    run: RunDir,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Files that the judges exported, one per judge.")
    ],
    as_json: Json = False,
) -> None:
    """Score the judges' answers: the share of latents that people find interpretable, by origin and layer."""
    from saerelay.analysis.suite import load
    from saerelay.views.tables.judging import judging_tables
    from saerelay.workflows.judge import score_run

    scores = score_run(load(run), files)
    if as_json:
        print_json(scores.to_data())
    else:
        print_all(judging_tables(scores))
