"""The common look of all figures: the page with its title and small print, axes, colours, legends, and files."""

import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saerelay.files import replacing
from saerelay.runs.documents.quality import LegSummary, Summary
from saerelay.views.labels import ORIGINS, ROLES
from saerelay.views.text import is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Theme = Literal["light", "dark"]

WIDTH = 3.35
"""Width of a column, in inches."""
_LINE = 0.125
"""Height of a line of small print, in inches."""

COLOURS = {
    "light": {
        "ink": "#1c2429",
        "faint": "#6b7780",
        "root": "#1b4965",
        "transfer": "#ca6702",
        "below": "#ca6702",
        "above": "#e0a400",
        "equal_tokens": "#8b979e",
        "full": "#5fa8d3",
        "random": "#c9ced2",
    },
    "dark": {
        "ink": "#e8ecee",
        "faint": "#9aa5ab",
        "root": "#8ecae6",
        "transfer": "#f2914a",
        "below": "#f2914a",
        "above": "#f5cc5c",
        "equal_tokens": "#9aa5ab",
        "full": "#4f9bd0",
        "random": "#5c666d",
    },
}
"""Colours of text and lines, and of the kinds of legs, by theme."""


@dataclass(frozen=True)
class LegKind:
    """The marks of legs of a kind, and their name in the legend."""

    marker: str
    label: str


KINDS = {
    "root": LegKind("s", ROLES["root"]),
    "transfer": LegKind("o", ROLES["transfer"]),
    "below": LegKind(">", f"transferred {ORIGINS['from below']}"),
    "above": LegKind("<", f"transferred {ORIGINS['from above']}"),
    "equal_tokens": LegKind("v", ROLES["equal_tokens"]),
    "full": LegKind("^", ROLES["full"]),
    "random": LegKind("x", ROLES["random"]),
}
_KIND_OF_ORIGIN = {
    "scratch": "root",
    "random": "random",
    "from below": "below",
    "from above": "above",
    "same layer": "transfer",
}


def kind_of(leg: LegSummary) -> str:
    """Return the key of a leg's kind in `KINDS`."""
    return leg.control_kind or _KIND_OF_ORIGIN[leg.origin]


def save(figure: "Figure", path: str | Path) -> None:
    """Write a figure atomically: PNG at 300 dpi, or SVG, as the file's suffix says."""
    import matplotlib as mpl

    path = Path(path)
    kind = path.suffix.removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else None
    settings: dict[Any, str] = {
        "svg.fonttype": "none",
        "svg.hashsalt": path.name,
    }  # text stays text, and the bytes are the same every time
    with mpl.rc_context(settings), replacing(path) as temporary:
        figure.savefig(temporary, dpi=300, format=kind, metadata=metadata)


# --- the page -------------------------------------------------------------------------------------------------------


def facts_of(summary: Summary, tokens: int | None = None, split: str = "") -> str:
    """Return model, data, tokens, dictionaries, L0 and seed of a run; `tokens` if they are not the summary's."""
    legs = [leg for leg in summary.legs if leg.role != "control"] or summary.legs
    measured_on = split or f"test split, {tokens or legs[0].n_eval_tokens:,} tokens"
    data = f"{summary.data}, {measured_on}" if summary.data else measured_on
    kinds = sorted({f"{leg.architecture} with {leg.n_latents} latents" for leg in legs})
    seeds = sorted({leg.seed for leg in legs})
    l0 = [leg.l0 for leg in legs if is_number(leg.l0)]
    mean_l0 = f"mean L0 {sum(l0) / len(l0):.3g}" if l0 else "L0 unknown"
    seed_list = ", ".join(str(seed) for seed in seeds)
    kind = summary.kinds[0]
    model = summary.model if kind == "resid_post" else f"{summary.model}, {kind}"
    return f"{model}; {data}; {', '.join(kinds)}, {mean_l0}; seed {seed_list}."


@contextmanager
def page(theme: Theme, facts: str, title: str, definition: str, height: float) -> "Iterator[Figure]":
    """Make an empty figure with a title, and small print: facts of the run, and the definition of what is drawn."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    small = []
    for text in (facts, definition):
        small += textwrap.wrap(text, 61, break_on_hyphens=False)
    colours = COLOURS[theme]
    settings: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 7,
        "axes.labelsize": 7.5,
        "text.color": colours["ink"],
        "text.parse_math": False,  # a model's name may hold a dollar
        "axes.labelcolor": colours["ink"],
        "axes.edgecolor": colours["faint"],
        "axes.linewidth": 0.6,
        "figure.facecolor": "none" if theme == "dark" else "white",
        "axes.facecolor": "none",
        "lines.linewidth": 1.1,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(WIDTH, height + 0.2 + _LINE * len(small)), layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)  # type: ignore[union-attr]
        figure.suptitle("\n".join(textwrap.wrap(title, 50)), x=0.01, ha="left", fontsize=8, fontweight="bold")
        figure.supxlabel("\n".join(small), x=0.01, ha="left", fontsize=7, color=colours["faint"], linespacing=1.15)
        yield figure


# --- axes -----------------------------------------------------------------------------------------------------------


def dress(axis: "Axes", theme: Theme, *, xlabel: str = "", ylabel: str = "", grid: bool = True) -> None:
    """Style the labels, ticks and lines of an axis, here because ticks are made too late for the page's settings."""
    colours = COLOURS[theme]
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.tick_params(
        which="both", labelsize=7, color=colours["faint"], labelcolor=colours["ink"], length=2, width=0.6, pad=2
    )
    axis.spines[["top", "right"]].set_visible(False)
    if grid:
        axis.grid(axis="y", color=colours["faint"], alpha=0.3, linewidth=0.5)
        axis.set_axisbelow(True)


def places_on_axis(legs: Iterable[tuple[str, int]], step: float = 0.18) -> dict[str, float]:
    """Return the place of each leg (key, layer) on an axis of layers: legs of one layer stand side by side.

    >>> places_on_axis([("a", 3), ("b", 3), ("c", 4)], step=0.2)
    {'a': 2.9, 'b': 3.1, 'c': 4.0}
    """
    by_layer: dict[int, list[str]] = defaultdict(list)
    for key, layer in legs:
        by_layer[layer].append(key)
    x = {}
    for layer, keys in by_layer.items():
        width = min(step, 0.76 / len(keys))
        for i, key in enumerate(keys):
            x[key] = layer + (i - (len(keys) - 1) / 2) * width
    return x


def tick_step(n: int, most: int = 16) -> int:
    """Return the step at which at most `most` of n numbers are written at an axis.

    >>> tick_step(16), tick_step(17)
    (1, 2)
    """
    return math.ceil(n / most)


def layer_ticks(axis: "Axes", layers: Iterable[int]) -> None:
    """Put whole layer numbers below an axis."""
    distinct = sorted(set(layers))
    axis.set_xticks(distinct[:: tick_step(len(distinct))])
    axis.set_xlim(distinct[0] - 0.5, distinct[-1] + 0.5)
    axis.set_xlabel("layer")


def offset_ticks(axis: "Axes", offsets: Sequence[int]) -> None:
    """Put whole numbers below an axis that extends equally far to both sides of 0."""
    reach = max((abs(offset) for offset in offsets), default=1)
    step = tick_step(2 * reach + 1)
    axis.set_xticks(range(-(reach // step) * step, reach + 1, step))
    axis.set_xlim(-reach - 0.5, reach + 0.5)


def legend(axis: "Axes", columns: int = 2) -> None:
    """Put a legend above the axis, where it hides nothing; no legend if nothing is drawn."""
    if not axis.get_legend_handles_labels()[0]:
        return
    axis.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=7,
        handletextpad=0.3,
        borderaxespad=0.2,
        columnspacing=1.0,
        labelspacing=0.25,
        handlelength=1.2,
    )


@dataclass(frozen=True)
class Point:
    """A value with its error bar."""

    kind: str
    x: float
    y: float
    error: float | None = None


def draw_points(axis: "Axes", theme: Theme, points: Iterable[Point], labels: dict[str, str] | None = None) -> None:
    """Draw markers with error bars, kind by kind; `labels` by kind, if not those of `KINDS`."""
    drawn = list(points)
    for kind, style in KINDS.items():
        of_kind = [point for point in drawn if point.kind == kind]
        if not of_kind:
            continue
        errors = [math.nan if point.error is None else point.error for point in of_kind]
        has_errors = any(math.isfinite(error) for error in errors)
        axis.errorbar(
            [point.x for point in of_kind],
            [point.y for point in of_kind],
            yerr=errors if has_errors else None,
            fmt=style.marker,
            color=COLOURS[theme][kind],
            markersize=4.5,
            elinewidth=0.8,
            label=(labels or {}).get(kind, style.label),
        )


def ideal_line(axis: "Axes", theme: Theme, y: float, **style: Any) -> None:
    """Draw a dashed line across an axis."""
    dashes = {"linewidth": 0.6, "linestyle": (0, (4, 2)), **style}
    axis.axhline(y, color=COLOURS[theme]["ink"], **dashes)


def viridis(theme: Theme, n: int) -> list[float]:
    """Return n evenly spaced values of viridis that are visible on the page."""
    low, high = (0.0, 0.92) if theme == "light" else (0.25, 1.0)
    return [low + (high - low) * i / (n - 1) for i in range(n)]
