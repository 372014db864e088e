"""Faithfulness and completeness of circuits by layer."""

from typing import TYPE_CHECKING

from saerelay.runs.documents.circuits import Circuits
from saerelay.runs.documents.quality import Summary
from saerelay.views.figures.page import (
    Point,
    Theme,
    draw_points,
    dress,
    facts_of,
    ideal_line,
    kind_of,
    layer_ticks,
    legend,
    page,
    places_on_axis,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def circuits_figure(summary: Summary, circuits: Circuits, k: int | None = None, *, theme: Theme = "light") -> "Figure":
    """Draw faithfulness and completeness of circuits of k latents by layer; without k, of the smallest circuits."""
    summary = summary.of_kind()
    asked = circuits.asked
    k = k or min(asked.k)
    legs = {leg.id for leg in summary.legs}
    rows = [row for row in circuits.legs if row.leg in legs]
    x = places_on_axis([(row.leg, row.layer) for row in rows])
    small = (
        f"Circuit: the {k} latents with the largest indirect effect ({asked.method}), found on "
        f"{circuits.n_found_on} prompts, judged on {circuits.n_judged_on} others, ± standard error. Faithfulness "
        "(ideal 1): share of the logit difference that remains if only the circuit is kept; completeness (ideal 0): if "
        "only the circuit is ablated. The share is 1 with nothing ablated, and 0 with all latents at their means."
    )
    facts = facts_of(summary, split=f"{asked.n_prompts} prompts of {asked.task}")
    with page(theme, facts, f"Circuits of {k} latents: {asked.task}", small, 3.65) as figure:
        axes = figure.subplots(2, 1, sharex=True)
        for axis, name, ideal in zip(axes, ("faithfulness", "completeness"), (1, 0), strict=True):
            points = []
            for row in rows:
                for circuit in row.circuits:
                    value = getattr(circuit, name)
                    if circuit.k == k and value is not None:
                        error = getattr(circuit, f"{name}_se")
                        points.append(Point(kind_of(summary.leg(row.leg)), x[row.leg], value, error))
            draw_points(axis, theme, points)
            ideal_line(axis, theme, ideal)
            dress(axis, theme, ylabel=name)
            axis.margins(y=0.1)
        layer_ticks(axes[-1], [leg.layer for leg in summary.legs])
        legend(axes[0], columns=1)
    return figure
