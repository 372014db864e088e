"""The chart at the top of the report: the quality of every SAE and its controls, layer by layer.

Horizontal positions are in percent, so that the page can make the drawing as wide as its column; vertical ones are in
pixels, from the top.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from saerelay.planning.leg_spec import ControlKind
from saerelay.runs.documents.quality import LegSummary, Summary
from saerelay.spec import format_count
from saerelay.views.figures.page import tick_step
from saerelay.views.labels import ROLES, metric_name
from saerelay.views.text import is_number, with_error

METRICS_DRAWN = ("delta_ce", "balanced_fvu", "fvu")
MARK_KINDS: tuple["MarkKind", ...] = ("root", "transfer", "equal_tokens", "full", "random")
"""Kinds of marks, in the order in which the marks of one layer stand side by side."""

MarkKind = Literal["root", "transfer"] | ControlKind

TOP, BOTTOM = 14.0, 164.0
"""Vertical positions of the largest value and of 0."""
HEADROOM = 1.04
"""The end of an axis, as a multiple of the largest value with its error."""
WIDE_FROM = 16
"""Number of layers from which on a chart takes the whole width of the page."""


@dataclass(frozen=True)
class Tick:
    """A number along an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """One SAE's value, with its error bar from `low` up to `high`."""

    kind: MarkKind
    x: float
    y: float
    low: float
    high: float
    text: str
    """The SAE's name, and its value in numbers."""
    is_beyond: bool
    """Whether the value exceeds the axis, so that the mark stands at the end of the axis."""


@dataclass(frozen=True)
class Panel:
    """The chart of one metric; its marks from left to right."""

    name: str
    ticks: list[Tick]
    marks: list[Mark]


@dataclass(frozen=True)
class Overview:
    """The charts of all metrics that were measured, over the same layers."""

    of: str
    """The kind of site if there are several; else ""."""
    panels: list[Panel]
    layers: list[Tick]
    kinds: list[MarkKind]
    """The kinds of SAE that occur."""
    is_wide: bool
    """Whether there are too many layers for charts side by side."""
    height: float = BOTTOM + 26


def overviews(summary: Summary) -> list[Overview]:
    """Return the charts of a run, one set per kind of site, without other tiers of L0."""
    kinds = summary.kinds
    return [overview(summary.of_kind(kind), kind if len(kinds) > 1 else "") for kind in kinds]


def overview(summary: Summary, kind: str = "") -> Overview:
    """Return the charts of one kind of site, named `kind` if a run has several."""
    legs = list(summary.final_legs)
    for leg in summary.final_legs:
        legs += summary.controls_of(leg)
    legs.sort(key=lambda leg: (leg.layer, MARK_KINDS.index(mark_kind(leg)), leg.id))

    layers = sorted({leg.layer for leg in legs})
    x = columns(legs, layers)
    panels = []
    for metric in METRICS_DRAWN:
        measured = [leg for leg in legs if is_number(getattr(leg, metric))]
        if measured:
            panels.append(panel(measured, metric, x))

    step = tick_step(len(layers))
    names = [Tick(at=middle(i, len(layers)), text=str(layer)) for i, layer in enumerate(layers)]
    occurring = {mark_kind(leg) for leg in legs}
    return Overview(
        of=kind,
        panels=panels,
        layers=names[::step],
        kinds=[kind for kind in MARK_KINDS if kind in occurring],
        is_wide=len(layers) >= WIDE_FROM,
    )


def mark_kind(leg: LegSummary) -> MarkKind:
    """Return the kind of mark of a leg."""
    if leg.control_kind:
        return leg.control_kind
    if leg.origin == "random":
        return "random"
    return "root" if leg.origin == "scratch" else "transfer"


# --- across -----------------------------------------------------------------------------------------------------------


def middle(column: int, n_columns: int) -> float:
    """Return the middle of one of n columns of equal width, in percent.

    >>> middle(0, 4), middle(3, 4)
    (12.5, 87.5)
    """
    return round(100 * (column + 0.5) / n_columns, 2)


def columns(legs: Sequence[LegSummary], layers: Sequence[int]) -> dict[str, float]:
    """Return the position of each leg, in percent: legs of one layer stand side by side within its column."""
    x = {}
    for i, layer in enumerate(layers):
        beside = [leg for leg in legs if leg.layer == layer]
        step = min(0.2, 0.8 / len(beside))
        for j, leg in enumerate(beside):
            shift = (j - (len(beside) - 1) / 2) * step
            x[leg.id] = round(middle(i, len(layers)) + 100 * shift / len(layers), 2)
    return x


# --- upwards ----------------------------------------------------------------------------------------------------------


def panel(legs: Sequence[LegSummary], metric: str, x: dict[str, float]) -> Panel:
    """Return the chart of one metric, whose axis begins at 0.

    A random dictionary is so much worse than all others that it would compress them, so it does not count for the axis.
    """
    drawn = [leg for leg in legs if mark_kind(leg) != "random"]
    ends = [getattr(leg, metric) + error_of(leg, metric) for leg in drawn or legs]
    top = HEADROOM * max(ends) if max(ends) > 0 else 1.0

    def height(value: float) -> float:
        share = min(max(value / top, 0.0), 1.0)
        return round(BOTTOM - share * (BOTTOM - TOP), 1)

    marks = []
    for leg in legs:
        value = getattr(leg, metric)
        error = error_of(leg, metric)
        mark = Mark(
            kind=mark_kind(leg),
            x=x[leg.id],
            y=height(value),
            low=height(value - error),
            high=height(value + error),
            text=mark_text(leg, metric),
            is_beyond=value > top,
        )
        marks.append(mark)
    ticks = [Tick(at=height(value), text=f"{value:.6g}") for value in round_numbers(top)]
    name = metric_name(metric)
    return Panel(name=name[0].upper() + name[1:], ticks=ticks, marks=marks)


def error_of(leg: LegSummary, metric: str) -> float:
    """Return the standard error of a value; 0 if it was not measured."""
    if metric == "delta_ce" and is_number(leg.delta_ce_se):
        return leg.delta_ce_se
    return 0.0


def mark_text(leg: LegSummary, metric: str) -> str:
    """Return the text that a mark shows when it is pointed at."""
    value = with_error(getattr(leg, metric), error_of(leg, metric) or None, 4)
    return f"{leg.id}: {ROLES[mark_kind(leg)]}, {format_count(leg.tokens_in_all)} tokens\n{metric_name(metric)} {value}"


def round_numbers(top: float) -> list[float]:
    """Return round numbers from 0 up to the end of an axis.

    >>> round_numbers(0.23)
    [0.0, 0.1, 0.2]
    """
    from matplotlib.ticker import MaxNLocator

    values = MaxNLocator(nbins=4, steps=[1, 2, 5, 10]).tick_values(0, top)
    return [round(float(value), 12) for value in values if 0 <= value <= top]
