"""The plan: which leg is trained from which, and when."""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from saerelay.planning.leg import Leg
from saerelay.planning.plan import Plan
from saerelay.spec import format_count
from saerelay.views.figures.page import COLOURS, KINDS, Theme, dress, layer_ticks, legend, page, places_on_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NUMBERED = 24
"""Most legs for which tokens are written at the bars."""


def plan_figure(plan: Plan, *, theme: Theme = "light") -> "Figure":
    """Draw each leg as a bar over its layer, along the tokens the language model reads, with arrows from parents."""
    x = places_on_axis([(leg.id, leg.layer) for leg in plan.legs], 0.25)
    facts = (
        f"{plan.facts.name}; {format_count(plan.n_tokens)} tokens of the training split; seed {plan.recipe.train.seed}."
    )
    small = (
        "Bars: training of the SAEs, with their numbers of tokens. Thin lines: fits of their maps. Arrows: from each "
        "parent, at the age from which it was transferred, to the child."
    )
    with page(theme, facts, f"The plan: {len(plan.legs)} SAEs", small, 3.0) as figure:
        axis = figure.subplots()
        _draw_bars(axis, plan, x, theme)
        for leg in plan.legs:
            colour = COLOURS[theme][_kind(leg)]
            axis.plot([x[leg.id], x[leg.id]], [leg.start, leg.fold_at], color=colour, linewidth=0.8)
            if len(plan.legs) <= MOST_NUMBERED:
                _write_tokens(axis, leg, x[leg.id])
            if plan.has(leg.parent):
                _draw_arrow(axis, leg, plan.leg(leg.parent), x, theme)
        axis.yaxis.set_major_formatter(lambda y, _: format_count(round(y)))
        axis.margins(y=0.16)
        axis.set_ylim(bottom=0)
        dress(axis, theme, ylabel="tokens read by the language model")
        layer_ticks(axis, [leg.layer for leg in plan.legs])
        legend(axis)
    return figure


def _kind(leg: Leg) -> str:
    return leg.control_kind or leg.role


def _draw_bars(axis: "Axes", plan: Plan, x: dict[str, float], theme: Theme) -> None:
    """Draw the time in training of each leg, kind by kind."""
    nearest = min((b - a for a, b in pairwise(sorted(set(x.values())))), default=0.7)
    for kind in ("root", "transfer", "equal_tokens", "full", "random"):
        legs = [leg for leg in plan.legs if _kind(leg) == kind]
        if legs:
            axis.bar(
                [x[leg.id] for leg in legs],
                [leg.end - leg.fold_at for leg in legs],
                bottom=[leg.fold_at for leg in legs],
                width=min(0.7 * nearest, 0.3),
                color=COLOURS[theme][kind],
                label=KINDS[kind].label,
            )


def _write_tokens(axis: "Axes", leg: Leg, x: float) -> None:
    above = {"xytext": (0, 2), "textcoords": "offset points", "rotation": 90, "ha": "center", "va": "bottom"}
    axis.annotate(format_count(leg.budget_tokens), (x, leg.end), **above)


def _draw_arrow(axis: "Axes", leg: Leg, parent: Leg, x: dict[str, float], theme: Theme) -> None:
    """Draw an arrow from the parent, at the age at which the child forks off, to the child at its fold."""
    assert leg.hop
    left_at = parent.fold_at + leg.hop.fork_at_tokens / parent.schedule.reuse
    bend = 0.12 if x[parent.id] < x[leg.id] else -0.12
    arrow: dict[str, Any] = {
        "arrowstyle": "-|>,head_width=0.12,head_length=0.3",
        "color": COLOURS[theme]["faint"],
        "linewidth": 0.6,
        "shrinkA": 0,
        "shrinkB": 0,
        "connectionstyle": f"arc3,rad={bend}",
    }
    axis.annotate("", (x[leg.id], leg.fold_at), (x[parent.id], left_at), arrowprops=arrow)
