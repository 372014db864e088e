"""What a transfer keeps and gains: transferability, transfer scores, direct logit attribution."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from saerelay.runs.documents.across_layers import Measures, Version
from saerelay.runs.documents.quality import Summary
from saerelay.views.figures.page import (
    COLOURS,
    KINDS,
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
from saerelay.views.labels import METRICS, ORIGINS, SCRATCH_KINDS, carried

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Row = TypeVar("Row", bound=Version)


def _finished(summary: Summary, rows: Sequence[Row] | None) -> list[Row]:
    """Return the rows of measures.json about finished legs of a summary."""
    legs = {leg.id for leg in summary.legs}
    return [row for row in rows or () if row.leg in legs and not row.snapshot]


def transferability_figure(summary: Summary, measures: Measures, *, theme: Theme = "light") -> "Figure":
    """Draw feature transferability of each transferred leg by layer, with the means that the paper reports."""
    summary = summary.of_kind()
    rows = [row for row in _finished(summary, measures.transferability) if row.transferability is not None]
    several_per_layer = len(rows) > len({row.layer for row in rows})
    width = 0.36 if several_per_layer else 0.7
    x = places_on_axis([(row.leg, row.layer) for row in rows], 0.38)
    small = (
        "Transferability of a latent: share of its 10 most promoted tokens, 10 most suppressed tokens and 10 tokens of "
        "highest activation that the parent SAE's latent of the same index has, too; mean over latents alive in both."
    )
    facts = facts_of(summary, measures.n_tokens)
    with page(theme, facts, "Feature transferability by layer", small, 2.3) as figure:
        axis = figure.subplots()
        for kind in KINDS:
            of_kind = [row for row in rows if kind_of(summary.leg(row.leg)) == kind]
            if of_kind:
                heights = [100 * (row.transferability or 0) for row in of_kind]
                bars = [x[row.leg] for row in of_kind]
                axis.bar(bars, heights, width=width, color=COLOURS[theme][kind], label=KINDS[kind].label)
        for mean, direction, dashes in ((30.3, "forward", (4, 2)), (28.8, "backward", (1, 1.5))):
            label = f"Ghilardi et al. 2024, {direction}: {mean} %"
            ideal_line(axis, theme, mean, linewidth=0.7, linestyle=(0, dashes), label=label)
        dress(axis, theme, ylabel="transferability (%)")
        axis.set_ylim(0, 105)
        layer_ticks(axis, [leg.layer for leg in summary.legs])
        legend(axis, columns=1)
    return figure


def transfer_score_figure(
    summary: Summary, measures: Measures, metric: str = "fvu", method: str = "identity", *, theme: Theme = "light"
) -> "Figure":
    """Draw the normalised transfer score of each transferred leg by layer, against each leg from scratch there."""
    summary = summary.of_kind()
    rows = []
    for row in _finished(summary, measures.transfer_scores):
        if row.method == method and getattr(row, metric) is not None:
            rows.append(row)
    x = places_on_axis([(f"{row.leg} {row.scratch}", row.layer) for row in rows])
    name, definition = METRICS[metric]
    small = (
        f"Score: (transferred − zero-shot) / (from scratch − zero-shot) of {name}; zero-shot is the parent "
        f"{carried(method)}, without training. 0: as good as zero-shot, 1: as good as from scratch. {definition}."
    )
    facts = facts_of(summary, measures.n_matrix_tokens)
    with page(theme, facts, f"Normalised transfer score ({name})", small, 2.3) as figure:
        axis = figure.subplots()
        for kind, trained_on in SCRATCH_KINDS.items():
            of_kind = [row for row in rows if row.scratch_kind == kind]
            for origin, words in ORIGINS.items():
                series = [row for row in of_kind if summary.leg(row.leg).origin == origin]
                if series:
                    axis.plot(
                        [x[f"{row.leg} {row.scratch}"] for row in series],
                        [getattr(row, metric) for row in series],
                        KINDS[kind_of(summary.leg(series[0].leg))].marker,
                        markersize=4.5,
                        color=COLOURS[theme][kind],
                        label=f"{words}, vs. scratch on {trained_on}",
                    )
        ideal_line(axis, theme, 1)
        dress(axis, theme, ylabel="normalised transfer score")
        axis.margins(y=0.15)
        layer_ticks(axis, [leg.layer for leg in summary.legs])
        legend(axis, columns=1)
    return figure


def attribution_figure(summary: Summary, measures: Measures, *, theme: Theme = "light") -> "Figure":
    """Draw direct logit attribution by layer: the mean over prompts of the largest effect of a latent."""
    summary = summary.of_kind()
    dla = measures.dla
    rows = [row for row in _finished(summary, dla.legs if dla else None) if row.mean is not None]
    x = places_on_axis([(row.leg, row.layer) for row in rows])
    points = [Point(kind_of(summary.leg(row.leg)), x[row.leg], row.mean or 0, row.standard_error) for row in rows]
    n_prompts = dla.n_prompts if dla else 0
    small = (
        "Attribution of a latent: activation at the last position × decoder row · (unembedding of the right token − "
        "that of the wrong token), before the division by the final norm; largest over latents, mean over "
        f"{n_prompts} prompts, ± standard error. Prompts: {dla.prompts if dla else 'none'}."
    )
    facts = facts_of(summary, measures.n_tokens)
    with page(theme, facts, "Direct logit attribution by layer", small, 2.3) as figure:
        axis = figure.subplots()
        draw_points(axis, theme, points)
        dress(axis, theme, ylabel="attribution")
        layer_ticks(axis, [leg.layer for leg in summary.legs])
        legend(axis, columns=1)
    return figure
