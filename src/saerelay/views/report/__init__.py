"""`saerelay report`: one page, opened from disk, that shows all of a run; made from files of its directory only.

report/index.html, style.css, *.js     the page: the summary is in it, all else is drawn from data
report/data/                           script files, loaded when they are looked at (see `data`)
report/figures/                        PNG, for papers
"""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console

from saerelay.analysis.evaluate import evaluate_run
from saerelay.analysis.lineage import lineage_run
from saerelay.analysis.matrix import matrix_run
from saerelay.analysis.measures import measures_run
from saerelay.analysis.site_maps import SiteMaps
from saerelay.errors import RunDirectoryError
from saerelay.files import read_json, write_json
from saerelay.lm.model import LanguageModel, load_model
from saerelay.runs.suite import PublishedSuite
from saerelay.views.figures import (
    Theme,
    attribution_figure,
    circuits_figure,
    lineage_figure,
    matrix_figure,
    offsets_figure,
    plan_figure,
    quality_figure,
    save,
    similarity_figure,
    training_figure,
    transfer_score_figure,
    transferability_figure,
)
from saerelay.views.report.data import write_data
from saerelay.views.report.story import caption, story

MATRIX_TOKENS = 4_096
"""Held-out tokens of a matrix that is made for a report; `saerelay eval --matrix` takes more."""
Drawing = Callable[[Theme], Any]
MARK = ".saerelay-report"
"""Marks a directory that a report made, so that the next may replace it."""
ASSETS = ("style.css", "core.js", "views.js", "charts.js", "features.js", "interpret.js")


def report_run(
    suite: PublishedSuite, model: LanguageModel | None = None, *, quick: bool = False, console: Console | None = None
) -> Path:
    """Make the report of a run, and first whatever of its measurements is missing; its index.html.

    `quick` leaves out the matrix and the measures, whose cost grows with the square of the layers, unless they are
    there. An earlier report is replaced. Raises RunDirectoryError if no leg is finished, or if report/ holds something
    else.
    """
    check_replaceable(suite)
    paths = suite.directory
    no_matrix, no_measures = (not quick and not path.is_file() for path in (paths.matrix, paths.measures))
    model = model or (load_model(suite.plan) if no_matrix or no_measures else None)
    maps = SiteMaps.of(suite, model, console) if model else None
    summary = evaluate_run(suite, model, console=console)
    write_json(paths.root / "summary.json", summary)
    lineage_run(suite, model, features=True, maps=maps, console=console)
    if no_matrix:
        matrix_run(suite, model, tokens=MATRIX_TOKENS, maps=maps, console=console)
    if no_measures:
        measures_run(suite, model, maps=maps, console=console)
    with console.status("writing the report") if console else nullcontext():
        return write_report(suite, summary)


def check_replaceable(suite: PublishedSuite) -> None:
    """Refuse to replace a folder that no report made."""
    place = suite.directory.report
    if place.exists() and not (place / MARK).is_file():
        raise RunDirectoryError(f"{place} holds something that is no report; move it away")


def write_report(suite: PublishedSuite, summary: dict[str, Any]) -> Path:
    """Write the report of a run whose features and lineage are there, beside an older one, and take its place."""
    check_replaceable(suite)
    paths = suite.directory
    fresh = paths.root / ".report.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    (fresh / MARK).write_text("made by `saerelay report`; the next report replaces this directory\n")
    write_data(suite, summary, caption(summary), fresh / "data")
    write_page(suite, summary, write_figures(suite, summary, fresh / "figures"), fresh)
    shutil.rmtree(paths.report, ignore_errors=True)
    fresh.replace(paths.report)
    return paths.report / "index.html"


def write_figures(suite: PublishedSuite, summary: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Draw what there is to draw as PNG, for paper and (its name ending in "-dark") for a dark page; what they show."""
    paths = suite.directory
    lineage = read_json(paths.lineage)
    kinds = {link["kind"] for link in lineage["links"]}
    plan, metrics = suite.plan, [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    drawings: dict[str, tuple[str, Drawing]] = {
        "quality": ("Held-out quality by layer", lambda theme: quality_figure(summary, theme=theme)),
        "plan": ("Who was trained from whom, and when", lambda theme: plan_figure(plan, theme=theme)),
        "training": ("Training curves", lambda theme: training_figure(summary, metrics, theme=theme)),
    }
    for kind, what in (
        ("depth", "from layer to layer"),
        ("hop", "from parent to child"),
        ("control", "beside controls"),
    ):
        if kind in kinds:
            drawings[f"lineage-{kind}"] = (
                f"What became of latents {what}",
                lambda theme, kind=kind: lineage_figure(summary, lineage, kind, theme=theme),
            )
    if paths.matrix.is_file():
        matrix = read_json(paths.matrix)
        for method in dict.fromkeys(cell["method"] for cell in matrix["cells"]):
            drawings[f"matrix-fvu-{method}"] = (
                f"FVU of every SAE on every layer, carried by {method}",
                lambda theme, method=method: matrix_figure(summary, matrix, "fvu", method, theme=theme),
            )
    if paths.measures.is_file():
        measures = read_json(paths.measures)
        for rows, draw, what in (
            ("similarity", similarity_figure, "Mean maximum cosine similarity between layers"),
            ("transferability", transferability_figure, "Feature transferability by layer"),
            ("transfer_scores", transfer_score_figure, "Transfer score by layer"),
            ("offsets", offsets_figure, "FVU by distance between layers"),
            ("dla", attribution_figure, "Direct logit attribution by layer"),
        ):
            if measures[rows]:
                drawings[rows] = (what, lambda theme, draw=draw: draw(summary, measures, theme=theme))
    for i, circuits in enumerate(read_circuits(suite)):  # a user's names are no file names here
        drawings[f"circuits-{i}"] = (
            f"Circuits by layer: {circuits['asked']['task']}",
            lambda theme, circuits=circuits: circuits_figure(summary, circuits, theme=theme),
        )
    shown = []
    for name, (what, draw) in drawings.items():
        save(draw("dark"), folder / f"{name}-dark.png")
        save(figure := draw("light"), folder / f"{name}.png")
        width, height = figure.get_size_inches()
        shown.append({"name": name, "alt": what, "width": round(100 * width), "height": round(100 * height)})
    return shown


def read_circuits(suite: PublishedSuite) -> list[dict[str, Any]]:
    """What circuits were found in a run, task by task."""
    return [read_json(path) for path in sorted((suite.directory.root / "circuits").glob("*.json"))]


def write_page(suite: PublishedSuite, summary: dict[str, Any], figures: list[dict[str, Any]], folder: Path) -> None:
    """Fill the template, with everything escaped, and put the page's own files beside it."""
    here = files("saerelay.views.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    measures = read_json(suite.directory.measures) if suite.directory.measures.is_file() else None
    scores = suite.directory.judging / "scores.json"
    judging = read_json(scores) if scores.is_file() else None
    template = environment.from_string(here.joinpath("template.html").read_text(encoding="utf-8"))
    page = template.render(
        story(suite.plan, summary, measures),
        figures=figures,
        judging=judging,
        circuits=read_circuits(suite),
        run=suite.directory.root.resolve().name,
    )
    (folder / "index.html").write_text(page, encoding="utf-8", errors="replace")
    for name in ASSETS:
        (folder / name).write_bytes(here.joinpath(name).read_bytes())
