"""Held-out quality by layer."""

from typing import TYPE_CHECKING

from saerelay.runs.documents.quality import Summary
from saerelay.views.figures.page import (
    KINDS,
    Point,
    Theme,
    draw_points,
    dress,
    facts_of,
    kind_of,
    layer_ticks,
    legend,
    page,
    places_on_axis,
)
from saerelay.views.labels import METRICS, tokens_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def quality_figure(summary: Summary, *, theme: Theme = "light") -> "Figure":
    """Draw balanced FVU and, with a language-model head, ΔCE by layer, of the suite and its from-scratch controls."""
    summary = summary.of_kind()
    legs = summary.drawn_legs
    x = places_on_axis((leg.id, leg.layer) for leg in legs)
    metrics = [name for name in ("delta_ce", "balanced_fvu") if any(getattr(leg, name) is not None for leg in legs)]
    definition = ". ".join(METRICS[name][1] for name in metrics) + "."
    if "delta_ce" in metrics:
        definition += " Bars of ΔCE: ± standard error over sequences."

    labels = {}
    for kind, style in KINDS.items():
        of_kind = [leg for leg in legs if kind_of(leg) == kind]
        if of_kind:
            labels[kind] = f"{style.label}, {tokens_of(of_kind)} tokens"

    height = 0.55 + 1.55 * len(metrics)
    with page(theme, facts_of(summary), "Held-out quality by layer", definition, height) as figure:
        axes = figure.subplots(len(metrics), 1, squeeze=False, sharex=True)[:, 0]
        for axis, name in zip(axes, metrics, strict=True):
            points = []
            for leg in legs:
                value = getattr(leg, name)
                if value is not None:
                    error = leg.delta_ce_se if name == "delta_ce" else None
                    points.append(Point(kind_of(leg), x[leg.id], value, error))
            draw_points(axis, theme, points, labels)
            dress(axis, theme, ylabel=METRICS[name][0])
            _from_zero(axis)
        layer_ticks(axes[-1], [leg.layer for leg in legs])
        legend(axes[0], columns=1)
    return figure


def _from_zero(axis: "Axes") -> None:
    """Let an axis begin at 0, or below its lowest mark if that is negative, with room above the highest one."""
    axis.update_datalim([(0.0, 0.0)], updatex=False)
    axis.margins(y=0.1)
    axis.autoscale_view(scalex=False)
    if axis.dataLim.ymin >= 0:
        axis.set_ylim(bottom=0)
