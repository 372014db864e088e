"""Training curves."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from saerelay.runs.documents.quality import Summary
from saerelay.runs.documents.training import TrainingLine
from saerelay.spec import format_count
from saerelay.views.figures.page import COLOURS, Theme, dress, facts_of, legend, page, tick_step, viridis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STROKES: dict[str, dict[str, Any]] = {
    "root": {"linestyle": "-", "linewidth": 1.8},
    "transfer": {"linestyle": "-", "linewidth": 0.9},
    "control": {"linestyle": (0, (2, 1.2)), "linewidth": 0.9},
}
_NAMES = {"root": "root", "transfer": "transferred", "control": "control"}


def training_figure(summary: Summary, lines: Sequence[TrainingLine], *, theme: Theme = "light") -> "Figure":
    """Draw FVU against a leg's own tokens, from the lines of metrics.jsonl: colours are layers, line styles roles."""
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    summary = summary.of_kind()
    curves: dict[str, list[TrainingLine]] = defaultdict(list)
    for line in lines:
        curves[line.leg].append(line)
    layers = sorted({leg.layer for leg in summary.legs})
    span = [mpl.colormaps["viridis"](value) for value in viridis(theme, 256)]
    colours = LinearSegmentedColormap.from_list("layers", span)
    norm = Normalize(layers[0], max(layers[-1], layers[0] + 1))
    small = "FVU: E‖x − x̂‖² / E‖x − E x‖² over each block of the training split, measured during training."
    facts = facts_of(summary, split="training split")
    with page(theme, facts, "Training curves", small, 2.5) as figure:
        axis = figure.subplots()
        for leg in summary.legs:
            fvu = {line.age: line.fvu for line in curves[leg.id] if line.fvu is not None}
            axis.plot(list(fvu), list(fvu.values()), color=colours(norm(leg.layer)), **_STROKES[leg.role])
        for role, name in _NAMES.items():
            if any(leg.role == role for leg in summary.legs):
                axis.plot([], [], color=COLOURS[theme]["ink"], label=name, **_STROKES[role])
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda x, _: format_count(round(x)))
        axis.xaxis.set_minor_formatter(lambda x, _: "")
        axis.set_ylim(bottom=0)
        dress(axis, theme, xlabel="tokens trained on", ylabel="FVU")
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=axis, fraction=0.04, pad=0.02)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.set_ticks(layers[:: tick_step(len(layers), most=12)])
        dress(bar.ax, theme, ylabel="layer", grid=False)
        legend(axis, columns=3)
    return figure
