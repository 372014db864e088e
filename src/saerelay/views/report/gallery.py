"""The report's figures, also for papers: PNG files, each drawn for a light and a dark page."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from saerelay.runs.documents.across_layers import Measures
from saerelay.runs.documents.quality import Summary
from saerelay.views.figures import (
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
from saerelay.views.labels import LINK_KINDS, carried
from saerelay.views.report.sources import ReportSources

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn in either theme."""

    name: str
    alt: str
    """Text that says what the figure shows."""
    draw: Callable[..., "Figure"]


@dataclass(frozen=True)
class Picture:
    """A figure written for the page; sizes in hundredths of an inch."""

    name: str
    alt: str
    width: int
    height: int


def write_figures(sources: ReportSources, folder: Path) -> list[Picture]:
    """Draw all figures that have data: `<name>.png` for paper, `<name>-dark.png` for a dark page."""
    pictures = []
    for drawing in drawings(sources):
        save(drawing.draw(theme="dark"), folder / f"{drawing.name}-dark.png")
        figure = drawing.draw(theme="light")
        save(figure, folder / f"{drawing.name}.png")
        width, height = figure.get_size_inches()
        pictures.append(Picture(drawing.name, drawing.alt, round(100 * width), round(100 * height)))
    return pictures


def drawings(sources: ReportSources) -> Iterator[Drawing]:
    """Yield all figures of a run."""
    summary = sources.summary
    yield Drawing("quality", "Held-out quality by layer", partial(quality_figure, summary))
    yield Drawing("plan", "Which SAE was trained from which, and when", partial(plan_figure, sources.plan))
    yield Drawing("training", "Training curves", partial(training_figure, summary, sources.training))
    kinds = {link.kind for link in sources.lineage.links}
    for kind in ("depth", "hop", "control"):
        if kind in kinds:
            draw = partial(lineage_figure, summary, sources.lineage, kind)
            yield Drawing(f"lineage-{kind}", f"Lineage of latents, {LINK_KINDS[kind]}", draw)
    if sources.matrix:
        for method in dict.fromkeys(cell.method for cell in sources.matrix.cells):
            draw = partial(matrix_figure, summary, sources.matrix, "fvu", method)
            yield Drawing(f"matrix-fvu-{method}", f"FVU of every SAE on every layer, {carried(method)}", draw)
    if sources.measures:
        yield from measure_drawings(summary, sources.measures)
    for i, circuits in enumerate(sources.circuits):  # names chosen by users are not used as file names
        draw = partial(circuits_figure, summary, circuits)
        yield Drawing(f"circuits-{i}", f"Circuits by layer: {circuits.asked.task}", draw)


def measure_drawings(summary: Summary, measures: Measures) -> Iterator[Drawing]:
    """Yield the figures of measures.json that have data."""
    figures = (
        ("similarity", measures.similarity, "Mean maximum cosine similarity between layers", similarity_figure),
        ("transferability", measures.transferability, "Feature transferability by layer", transferability_figure),
        ("transfer_scores", measures.transfer_scores, "Transfer score by layer", transfer_score_figure),
        ("offsets", measures.offsets, "FVU by layer offset", offsets_figure),
        ("dla", measures.dla, "Direct logit attribution by layer", attribution_figure),
    )
    for name, content, alt, draw in figures:
        if content:
            yield Drawing(name, alt, partial(draw, summary, measures))
