"""Heat maps of every dictionary at every layer, and means by distance between layers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from saerelay.runs.documents.across_layers import Matrix, Measures
from saerelay.runs.documents.quality import Summary
from saerelay.views.figures.page import Theme, dress, facts_of, legend, offset_ticks, page, tick_step, viridis
from saerelay.views.labels import METHODS, METRICS, carried, metric_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cells = dict[tuple[int, int], float | None]
"""Values by source and target layer."""
MOST_NUMBERED = 10
"""Most layers for which heat maps have numbers in their cells."""
SCORES = ("explained_variance", "ce_loss_score", "kl_div_score")
"""Metrics that are best at 1."""
_MARKERS = dict(zip(METHODS, ("o", "v", "s", "D", "^", "P", "X"), strict=False))
"""A marker per method; there are more markers than methods."""


def matrix_figure(
    summary: Summary, matrix: Matrix, metric: str = "fvu", method: str = "affine", *, theme: Theme = "light"
) -> "Figure":
    """Draw a heat map of one metric: each layer's SAE on every layer's activations, transferred by `method`."""
    summary = summary.of_kind()
    legs = {leg.id for leg in summary.suite}
    cells: Cells = {}
    for cell in matrix.cells:
        wanted = "identity" if cell.source == cell.target else method
        if cell.leg in legs and not cell.snapshot and cell.method == wanted:
            cells[cell.source, cell.target] = getattr(cell, metric)
    name, definition = METRICS[metric]
    small = f"{definition}. SAEs {carried(method)}, not trained at the target layer."
    title = f"{metric_name(metric)} across layers"
    return heat_map(theme, facts_of(summary, matrix.n_tokens), title, small, cells, name, is_score=metric in SCORES)


def similarity_figure(summary: Summary, measures: Measures, *, folded: bool = True, theme: Theme = "light") -> "Figure":
    """Draw a heat map of mean max cosine similarity between the layers' SAEs: folded, or raw as in the paper."""
    summary = summary.of_kind()
    cells: Cells = {(leg.layer, leg.layer): None for leg in summary.suite}
    legs = {leg.id for leg in summary.suite}
    for row in measures.similarity:
        if row.kind == "suite" and not row.snapshot and row.target in legs:
            cells[row.source_layer, row.target_layer] = row.mmcs_folded if folded else row.mmcs
    small = "MMCS: mean over an SAE's alive latents of the largest cosine with any decoder row of the other SAE. "
    if folded:
        small += "Sources are folded through the affine map between the layers."
    else:
        small += "Raw decoder rows, as in Ghilardi et al. 2024, although the spaces of two layers are not comparable."
    title = f"Mean max cosine similarity, {'folded' if folded else 'raw'}"
    return heat_map(theme, facts_of(summary, measures.n_tokens), title, small, cells, "MMCS")


def heat_map(
    theme: Theme, facts: str, title: str, definition: str, cells: Cells, label: str, *, is_score: bool = False
) -> "Figure":
    """Draw layers × layers, with numbers if there is room; `label` is the name of what the colours show."""
    import numpy as np

    sources = sorted({source for source, _ in cells})
    targets = sorted({target for _, target in cells})
    values = np.full((len(sources), len(targets)), np.nan)
    for (source, target), value in cells.items():
        if value is not None:
            values[sources.index(source), targets.index(target)] = value

    norm = _colour_scale(values, is_score)
    some_below_scale = bool((values < norm.vmin).any())  # NaN is not
    height = 2.9 * max(0.35, len(sources) / max(1, len(targets)))
    with page(theme, facts, title, definition, height) as figure:
        axis = figure.subplots()
        image = axis.imshow(values, cmap="viridis", norm=norm, aspect="equal")
        if max(values.shape) <= MOST_NUMBERED:
            _number_cells(axis, image, values)
        dress(axis, theme, xlabel="on activations of layer", ylabel="SAE of layer", grid=False)
        axis.spines[:].set_visible(False)
        axis.set_xticks(*_numbered_layers(targets))
        axis.set_yticks(*_numbered_layers(sources))
        extend = "min" if some_below_scale else "neither"
        bar = figure.colorbar(image, ax=axis, extend=extend, fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)  # type: ignore[operator]
        dress(bar.ax, theme, ylabel=label, grid=False)
    return figure


def _colour_scale(values: Any, is_score: bool) -> Any:
    """Return the scale from the lowest to the highest finite value.

    A score is best at 1 and may be far below 0, which only says that an SAE is useless there: its scale begins at 0.
    Other metrics, if their values differ by more than a factor of 30, get a logarithmic scale.
    """
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    finite = values[np.isfinite(values)]
    low = finite.min() if len(finite) else 0.0
    high = finite.max() if len(finite) else 1.0
    if is_score:
        low = max(low, 0.0)
    elif 0 < 30 * low < high:
        return LogNorm(low, high)
    return Normalize(low, max(high, low + 1e-9))  # a scale needs two ends


def _numbered_layers(layers: Sequence[int]) -> tuple[list[int], list[str]]:
    """Return the rows or columns of a heat map that have a number beside them, and the numbers."""
    step = tick_step(len(layers))
    return list(range(0, len(layers), step)), [str(layer) for layer in layers[::step]]


def _number_cells(axis: "Axes", image: Any, values: Any) -> None:
    """Write each value into its cell, white on dark colours and black on light ones."""
    import numpy as np

    digits = 3 if max(values.shape) <= 6 else 2
    for (i, j), value in np.ndenumerate(values):
        if not np.isfinite(value):
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        colour = "white" if is_dark else "black"
        axis.text(j, i, short(value, digits), ha="center", va="center", fontsize=7, color=colour)


def short(value: float, digits: int = 2) -> str:
    """Format a number for little room: `digits` digits after the point below 1, and fewer above.

    >>> [short(value) for value in (0.8349, 1.462, 24.0, 3543.0, -0.277, 1.0)], short(0.99462, 3)
    (['0.83', '1.5', '24', '4k', '−0.28', '1.0'], '0.995')
    """
    sign = "−" if value < 0 else ""
    size = abs(value)
    if float(f"{size:.{digits}f}") < 1:
        return f"{sign}{size:.{digits}f}"
    if size < 9.95:
        return f"{sign}{size:.{digits - 1}f}"
    if size < 999.5:
        return f"{sign}{size:.0f}"
    return f"{sign}{size / 1000:.0f}k"


def offsets_figure(summary: Summary, measures: Measures, metric: str = "fvu", *, theme: Theme = "light") -> "Figure":
    """Draw a metric of matrix.json by distance from the SAE's own layer, averaged over layers: one line per method."""
    import matplotlib as mpl

    summary = summary.of_kind()
    kinds = ("", summary.kinds[0])
    rows = [row for row in measures.offsets or () if (row.metric, row.tokens) == (metric, None) and row.kind in kinds]
    name, definition = METRICS[metric]
    small = (
        f"{definition}. Mean over pairs of layers, without training at the target layer. Offset: target − source layer."
    )
    colours = [mpl.colormaps["viridis"](value) for value in viridis(theme, len(METHODS))]
    facts = facts_of(summary, measures.n_matrix_tokens)
    with page(theme, facts, f"{metric_name(metric)} by layer offset", small, 2.3) as figure:
        axis = figure.subplots()
        for (method, label), colour in zip(METHODS.items(), colours, strict=True):
            means = {row.offset: row.mean for row in rows if row.method == method and row.mean is not None}
            if means:
                axis.plot(
                    list(means),
                    list(means.values()),
                    marker=_MARKERS[method],
                    markersize=3.5,
                    color=colour,
                    label=label,
                )
        means = [row.mean for row in rows if row.mean is not None]
        if means and min(means) > 0 and max(means) > 20 * min(means):
            axis.set_yscale("log")
        dress(axis, theme, xlabel="target layer − source layer", ylabel=name)
        offset_ticks(axis, [row.offset for row in rows])
        legend(axis)
    return figure
