"""Figures of a finished run, each drawn from the documents of its directory; one column of a paper wide.

    figure = matrix_figure(summary, matrix, "fvu", "affine")
    save(figure, Path("matrix.png"))

Every function takes documents as they are read from JSON (see docs/run-directory.md) and returns a Figure, whose title
says what is seen, and whose small print says of what, on which tokens, and what was measured. Nothing is below 7 points
in print. `theme` is "light", for paper, or "dark", with no background, for a page that is dark itself.
"""

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saerelay.spec import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Theme = Literal["light", "dark"]
Document = dict[str, Any]

WIDTH = 3.35
"""Of a column, in inches."""
_LINE = 0.125
"""Height of a line of small print, in inches."""
_COLOURS = {
    "light": {
        "ink": "#1c2429",
        "faint": "#6b7780",
        "root": "#1b4965",
        "transfer": "#ca6702",
        "below": "#ca6702",
        "above": "#e0a400",
        "equal_tokens": "#8b979e",
        "full": "#5fa8d3",
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
    },
}
_KINDS = {
    "root": ("s", "from scratch (root)"),
    "transfer": ("o", "transferred"),
    "below": (">", "transferred from below"),
    "above": ("<", "transferred from above"),
    "equal_tokens": ("v", "control: scratch, equal tokens"),
    "full": ("^", "control: scratch, full budget"),
}
METRICS = {
    "fvu": ("FVU", "FVU: E‖x − x̂‖² / E‖x − E x‖², lower is better"),
    "explained_variance": ("explained variance", "Explained variance: 1 − FVU, higher is better"),
    "l0": ("L0", "L0: mean number of active latents per token"),
    "ce_loss_score": (
        "CE score",
        "CE score: (CE zero-ablated − CE with SAE) / (CE zero-ablated − CE clean), 1 is best; it saturates",
    ),
    "delta_ce": (
        "ΔCE (nats per token)",
        "ΔCE: cross-entropy with the SAE in place minus the clean one, lower is better",
    ),
    "kl_div_with_sae": ("KL (nats per token)", "KL: KL(clean ‖ with SAE) over the vocabulary, lower is better"),
    "kl_div_score": ("KL score", "KL score: (KL zero-ablated − KL with SAE) / KL zero-ablated, higher is better"),
}
"""Name for an axis, and definition."""


def save(figure: "Figure", path: Path) -> None:
    """Write a figure under a temporary name and rename it: PNG at 300 dpi, or SVG, as the file's suffix says."""
    import matplotlib as mpl

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    kind = path.suffix.removeprefix(".")
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):  # text as text, the same bytes every time
        figure.savefig(temporary, dpi=300, format=kind, metadata={"Date": None} if kind == "svg" else None)
    temporary.replace(path)


# --- quality ----------------------------------------------------------------------------------------------------


def quality_figure(summary: Document, *, theme: Theme = "light") -> "Figure":
    """FVU and, with a language-model head, ΔCE by layer: the suite, and its from-scratch controls beside it."""
    legs, colours, places = summary["legs"], _COLOURS[theme], _places(summary["legs"])
    names = [name for name in ("fvu", "delta_ce") if any(leg[name] is not None for leg in legs)]
    definition = ". ".join(METRICS[name][1] for name in names)
    definition += ", ± standard error over sequences." if "delta_ce" in names else "."
    with _page(theme, summary, "Held-out quality by layer", definition, 0.55 + 1.55 * len(names)) as figure:
        axes = figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0]
        for axis, name in zip(axes, names, strict=True):
            for kind, (marker, text) in _KINDS.items():
                points = [leg for leg in legs if kind == _kind(leg, summary) and leg[name] is not None]
                if points:
                    axis.errorbar(
                        [places[leg["id"]] for leg in points],
                        [leg[name] for leg in points],
                        yerr=[leg["delta_ce_se"] for leg in points] if name == "delta_ce" else None,
                        fmt=marker,
                        color=colours[kind],
                        markersize=4.5,
                        elinewidth=0.8,
                        label=f"{text}, {format_count(max(leg['tokens'] for leg in points))} tokens",
                    )
            _dress(axis, theme, ylabel=METRICS[name][0])
            axis.margins(y=0.1)
            axis.set_ylim(bottom=0)
        _layer_ticks(axes[-1], [leg["layer"] for leg in legs])
        _legend(axes[0], columns=1)
    return figure


# --- how all figures look ---------------------------------------------------------------------------------------


@contextmanager
def _page(
    theme: Theme, about: Document | Sequence[str], title: str, definition: str, height: float, tokens: int = 0
) -> "Iterator[Figure]":
    """An empty figure with a title and small print: facts of a run (its summary, or parts of a line), a definition."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    facts = _facts(about, tokens) if isinstance(about, dict) else "; ".join(about)
    small = [line for text in (facts, definition) for line in textwrap.wrap(text, 61, break_on_hyphens=False)]
    colours = _COLOURS[theme]
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


def _facts(summary: Document, tokens: int) -> str:
    """Model, data, tokens, dictionaries, L0 and seed of a run; `tokens` if a figure's are not the summary's."""
    legs = [leg for leg in summary["legs"] if leg["role"] != "control"] or summary["legs"]
    data = f"{summary['data']}, test split" if summary.get("data") else "test split"
    kinds = ", ".join(sorted({f"{leg['architecture']} with {leg['n_latents']} latents" for leg in legs}))
    seeds = ", ".join(str(seed) for seed in sorted({leg["seed"] for leg in legs}))
    l0 = sum(leg["l0"] for leg in legs) / len(legs)
    n = tokens or legs[0]["n_eval_tokens"]
    return f"{summary['model']}; {data}, {n:,} tokens; {kinds}, mean L0 {l0:.3g}; seed {seeds}."


def _kind(leg: Document, summary: Document) -> str:
    """Which of `_KINDS` a leg is."""
    if leg["role"] != "transfer":
        return leg["control_kind"] or leg["role"]
    parent = next((other["layer"] for other in summary["legs"] if other["id"] == leg["parent"]), leg["layer"])
    return "below" if parent < leg["layer"] else "above" if parent > leg["layer"] else "transfer"


def _places(legs: Iterable[Document]) -> dict[str, float]:
    """Where on an axis of layers each leg is drawn: those of one layer side by side."""
    by_layer = defaultdict[int, list[str]](list)
    for leg in legs:
        by_layer[leg["layer"]].append(leg["id"])
    return {
        leg_id: layer + (i - (len(ids) - 1) / 2) * min(0.18, 0.7 / len(ids))
        for layer, ids in by_layer.items()
        for i, leg_id in enumerate(ids)
    }


def _dress(axis: "Axes", theme: Theme, *, xlabel: str = "", ylabel: str = "", grid: bool = True) -> None:
    """Labels, ticks and lines of an axis, all coloured here: ticks are made when drawn, beyond the page's settings."""
    colours = _COLOURS[theme]
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.tick_params(labelsize=7, color=colours["faint"], labelcolor=colours["ink"], length=2, width=0.6, pad=2)
    axis.spines[["top", "right"]].set_visible(False)
    if grid:
        axis.grid(axis="y", color=colours["faint"], alpha=0.3, linewidth=0.5)
        axis.set_axisbelow(True)


def _layer_ticks(axis: "Axes", layers: Sequence[int]) -> None:
    """Whole layers below an axis, at most 16 of them."""
    shown = sorted(set(layers))
    axis.set_xticks(shown[:: -(-len(shown) // 16)])
    axis.set_xlim(shown[0] - 0.5, shown[-1] + 0.5)
    axis.set_xlabel("layer")


def _legend(axis: "Axes", columns: int = 2) -> None:
    """Above the axis, where it hides nothing."""
    axis.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, frameon=False, fontsize=7, handletextpad=0.3,
        borderaxespad=0.2, columnspacing=1.0, labelspacing=0.25, handlelength=1.2,
    )  # fmt: skip
