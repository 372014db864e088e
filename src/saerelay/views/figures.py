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
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saerelay.planning.plan import Plan
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
_METHODS = {"identity": "o", "rescale": "v", "procrustes": "s", "affine": "D", "affine+refit": "^"}
_FATES = {"k": "kept", "d": "drifted", "r": "replaced", "x": "died", "b": "born"}
_FATE_COLOURS = {
    "light": ("#1b4965", "#5fa8d3", "#bfdbec", "#b4bcc1", "#ca6702"),
    "dark": ("#8ecae6", "#4279a3", "#24445c", "#6b7780", "#f2914a"),
}
_FVU = "FVU: E‖x − x̂‖² / E‖x − E x‖²".replace(" ", "\u00a0")  # not broken between lines
METRICS = {
    "fvu": ("FVU", f"{_FVU}, lower is better"),
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


# --- across layers ----------------------------------------------------------------------------------------------


def matrix_figure(
    summary: Document, matrix: Document, metric: str = "fvu", method: str = "affine", *, theme: Theme = "light"
) -> "Figure":
    """Heat map of one metric: the SAE that stands for each layer, on every layer's activations, carried by `method`."""
    legs = _standing(summary)
    found = {
        (cell["source"], cell["target"]): cell.get(metric)
        for cell in matrix["cells"]
        if cell["leg"] in legs and not cell["snapshot"]
        if cell["method"] == (method if cell["source"] != cell["target"] else "identity")
    }
    name, definition = METRICS[metric]
    carried = "copied as they are" if method == "identity" else f"carried by {method}"
    small = f"{definition}. SAEs {carried}, not trained at the new layer."
    return _heat_map(theme, summary, f"{name.split(' (')[0]} across layers", small, found, name, matrix["n_tokens"])


def similarity_figure(
    summary: Document, measures: Document, *, folded: bool = True, theme: Theme = "light"
) -> "Figure":
    """Heat map of mean max cosine similarity of the legs that stand for the layers: folded, or raw as in the paper."""
    key = "mmcs_folded" if folded else "mmcs"
    rows = [row for row in measures["similarity"] if row["kind"] == "suite" and not row["snapshot"]]
    found: dict[tuple[int, int], float | None] = {
        (leg["layer"], leg["layer"]): None for leg in summary["legs"] if leg["role"] != "control"
    }
    found |= {(row["source_layer"], row["target_layer"]): row[key] for row in rows}
    small = "MMCS: mean over a SAE's alive latents of the largest cosine with a decoder row of the other's. "
    small += (
        "Sources are carried through the affine map between the layers."
        if folded
        else "Raw decoder rows, as in Ghilardi et al. 2024, although the spaces of two layers are not comparable."
    )
    title = f"Mean max cosine similarity, {'folded' if folded else 'raw'}"
    return _heat_map(theme, summary, title, small, found, "MMCS", measures["n_tokens"])


def _heat_map(
    theme: Theme,
    summary: Document,
    title: str,
    definition: str,
    found: dict[tuple[int, int], float | None],
    label: str,
    tokens: int,
) -> "Figure":
    """Layers × layers, with numbers if there is room; colours begin at 0 for scores, and may be logarithmic."""
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    sources, targets = (sorted({pair[i] for pair in found}) for i in (0, 1))
    rows = [[found.get((source, target)) for target in targets] for source in sources]
    values = np.array(rows, dtype=float).reshape(len(sources), len(targets))
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
    score = "score" in label or "explained" in label
    wide = not score and 0 < 30 * low < high
    low = max(low, 0.0) if score else low
    norm = LogNorm(low, high) if wide else Normalize(low, max(high, low + 1e-9))
    height = 2.9 * max(0.35, len(sources) / max(1, len(targets)))
    with _page(theme, summary, title, definition, height, tokens) as figure:
        axis = figure.subplots()
        image = axis.imshow(values, cmap="viridis", norm=norm, aspect="equal")
        if max(values.shape) <= 12:
            digits = 3 if max(values.shape) <= 6 else 2
            for (i, j), value in np.ndenumerate(values):
                if np.isfinite(value):
                    red, green, blue, _ = image.cmap(norm(value))
                    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                    colour = "white" if dark else "black"
                    axis.text(j, i, _short(value, digits), ha="center", va="center", fontsize=7, color=colour)
        _dress(axis, theme, xlabel="on activations of layer", ylabel="SAE of layer", grid=False)
        axis.spines[:].set_visible(False)
        for ticks, layers in ((axis.set_xticks, targets), (axis.set_yticks, sources)):
            step = -(-len(layers) // 16)
            ticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        extend = "min" if len(known) and known.min() < low else "neither"
        bar = figure.colorbar(image, ax=axis, extend=extend, fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)  # type: ignore[operator]
        _dress(bar.ax, theme, ylabel=label, grid=False)
    return figure


def offsets_figure(summary: Document, measures: Document, metric: str = "fvu", *, theme: Theme = "light") -> "Figure":
    """A metric of matrix.json by distance from home, averaged over layers: one line a method."""
    rows = [row for row in measures["offsets"] or [] if row["metric"] == metric and row["tokens"] is None]
    name, definition = METRICS[metric]
    small = (
        f"{definition}. Mean over pairs of layers; untrained; offset is the layer used on minus the layer trained at."
    )
    with _page(theme, summary, f"{name.split(' (')[0]} by offset", small, 2.3, measures["n_matrix_tokens"]) as figure:
        axis = figure.subplots()
        for (method, marker), colour in zip(_METHODS.items(), _lines(theme), strict=True):
            points = [row for row in rows if row["method"] == method]
            if points:
                x, y = [row["offset"] for row in points], [row["mean"] for row in points]
                axis.plot(x, y, marker=marker, markersize=3.5, color=colour, label=method)
        means = [row["mean"] for row in rows if row["mean"] is not None]
        if means and min(means) > 0 and max(means) > 20 * min(means):
            axis.set_yscale("log")
        _dress(axis, theme, xlabel="offset (layers)", ylabel=name)
        _whole_ticks(axis, [row["offset"] for row in rows])
        _legend(axis, columns=4)
    return figure


# --- what transfers ---------------------------------------------------------------------------------------------


def transferability_figure(summary: Document, measures: Document, *, theme: Theme = "light") -> "Figure":
    """Feature transferability of each transferred leg by layer, beside the means that the paper reports."""
    rows = [row for row in measures["transferability"] or [] if not row["snapshot"]]
    rows = [
        row | {"id": row["leg"], "kind": "below" if row["parent_layer"] < row["layer"] else "above"} for row in rows
    ]
    several = len(rows) > len({row["layer"] for row in rows})
    places, colours, width = _places(rows, 0.38), _COLOURS[theme], 0.36 if several else 0.7
    small = (
        "Transferability of a latent: top 10 logits, bottom 10 logits and 10 tokens of highest activation, shared with "
        "the latent of the same index in the SAE it was transferred from, over 30; mean over latents alive in both."
    )
    with _page(theme, summary, "Feature transferability by layer", small, 2.3, measures["n_tokens"]) as figure:
        axis = figure.subplots()
        for kind in ("below", "above"):
            points = [row for row in rows if row["kind"] == kind]
            if points:
                x, y = [places[row["leg"]] for row in points], [100 * row["transferability"] for row in points]
                axis.bar(x, y, width=width, color=colours[kind], label=_KINDS[kind][1])
        for mean, direction, stroke in ((30.3, "forward", (0, (4, 2))), (28.8, "backward", (0, (1, 1.5)))):
            label = f"paper, {direction}: {mean} %"
            axis.axhline(mean, color=colours["ink"], linewidth=0.7, linestyle=stroke, label=label)
        _dress(axis, theme, ylabel="transferability (%)")
        axis.set_ylim(0, 105)
        _layer_ticks(axis, [leg["layer"] for leg in summary["legs"]])
        _legend(axis)
    return figure


def transfer_score_figure(
    summary: Document, measures: Document, metric: str = "fvu", method: str = "identity", *, theme: Theme = "light"
) -> "Figure":
    """Normalised transfer score of each transferred leg by layer, against each leg from scratch at its site."""
    rows = [row for row in measures["transfer_scores"] or [] if not row["snapshot"] and row["method"] == method]
    rows = [row | {"id": f"{row['leg']} {row['scratch']}"} for row in rows if row[metric] is not None]
    places, colours = _places(rows), _COLOURS[theme]
    name, start = METRICS[metric][0], "copied as it is" if method == "identity" else f"carried by {method}"
    small = (
        f"Score: (transferred − zero-shot) / (from scratch − zero-shot) of {name}; zero-shot is the parent {start}, "
        f"untrained. 0 is as good as zero-shot, 1 as good as from scratch. {METRICS[metric][1]}."
    )
    title = f"Normalised transfer score ({name})"
    with _page(theme, summary, title, small, 2.3, measures["n_matrix_tokens"]) as figure:
        axis = figure.subplots()
        for kind in ("root", "equal_tokens", "full"):
            for direction, marker in (("from below", ">"), ("from above", "<")):
                points = [
                    row
                    for row in rows
                    if row["scratch_kind"] == kind
                    and (row["parent_layer"] < row["layer"]) == (direction == "from below")
                ]
                if points:
                    text = {"root": "a root's tokens", "equal_tokens": "equal tokens", "full": "the full budget"}[kind]
                    axis.plot(
                        [places[row["id"]] for row in points],
                        [row[metric] for row in points],
                        marker,
                        markersize=4.5,
                        color=colours[kind],
                        label=f"{direction}, against scratch with {text}",
                    )
        axis.axhline(1, color=colours["ink"], linewidth=0.6, linestyle=(0, (4, 2)))
        _dress(axis, theme, ylabel="normalised transfer score")
        axis.margins(y=0.15)
        _layer_ticks(axis, [leg["layer"] for leg in summary["legs"]])
        _legend(axis, columns=1)
    return figure


def attribution_figure(summary: Document, measures: Document, *, theme: Theme = "light") -> "Figure":
    """Direct logit attribution by layer: mean over prompts of the largest of a latent."""
    dla = measures["dla"] or {"prompts": "none", "n_prompts": 0, "legs": []}
    rows = [row | {"id": row["leg"]} for row in dla["legs"] if not row["snapshot"]]
    places, kinds = _places(rows), {leg["id"]: _kind(leg, summary) for leg in summary["legs"]}
    small = (
        "Attribution of a latent: activation at the last position times decoder row · (unembedding of the correct − of "
        f"the wrong token), before the final norm's division; largest over latents, mean over {dla['n_prompts']} "
        f"prompts, ± standard error. Prompts: {dla['prompts']}."
    )
    with _page(theme, summary, "Direct logit attribution by layer", small, 2.3, measures["n_tokens"]) as figure:
        axis = figure.subplots()
        for kind, (marker, text) in _KINDS.items():
            points = [row for row in rows if kinds[row["leg"]] == kind]
            if points:
                axis.errorbar(
                    [places[row["leg"]] for row in points],
                    [row["mean"] for row in points],
                    yerr=[row["standard_error"] for row in points],
                    fmt=marker,
                    color=_COLOURS[theme][kind],
                    markersize=4,
                    elinewidth=0.8,
                    label=text,
                )
        _dress(axis, theme, ylabel="attribution")
        _layer_ticks(axis, [leg["layer"] for leg in summary["legs"]])
        _legend(axis, columns=1)
    return figure


def circuits_figure(summary: Document, circuits: Document, k: int | None = None, *, theme: Theme = "light") -> "Figure":
    """Faithfulness and completeness of circuits of k latents by layer; without k, of the smallest."""
    k = k or min(circuits["asked"]["k"])
    rows = [row | {"id": row["leg"]} for row in circuits["legs"]]
    places, kinds = _places(rows), {leg["id"]: _kind(leg, summary) for leg in summary["legs"]}
    small = (
        f"Circuit: the {k} latents with the largest indirect effect ({circuits['asked']['method']}), found on "
        f"{circuits['n_found_on']} prompts, judged on {circuits['n_judged_on']} others, ± standard error. Share of the "
        "logit difference (1: nothing ablated, 0: all latents at their means) with only the circuit kept "
        "(faithfulness, ideal 1), and with only it ablated (completeness, ideal 0)."
    )
    split = f"{circuits['asked']['n_prompts']} prompts of {circuits['asked']['task']}"
    with _page(
        theme, summary, f"Circuits of {k} latents: {circuits['asked']['task']}", small, 3.65, split=split
    ) as figure:
        axes = figure.subplots(2, 1, sharex=True)
        for axis, name, ideal in zip(axes, ("faithfulness", "completeness"), (1, 0), strict=True):
            for kind, (marker, text) in _KINDS.items():
                here = [(row, c) for row in rows for c in row["circuits"] if kinds[row["leg"]] == kind]
                points = [(places[row["leg"]], c) for row, c in here if c["k"] == k and c[name] is not None]
                if points:
                    axis.errorbar(
                        [x for x, _ in points],
                        [circuit[name] for _, circuit in points],
                        yerr=[circuit[f"{name}_se"] for _, circuit in points],
                        fmt=marker,
                        color=_COLOURS[theme][kind],
                        markersize=4,
                        elinewidth=0.8,
                        label=text,
                    )
            axis.axhline(ideal, color=_COLOURS[theme]["ink"], linewidth=0.6, linestyle=(0, (4, 2)))
            _dress(axis, theme, ylabel=name)
            axis.margins(y=0.1)
        _layer_ticks(axes[-1], [leg["layer"] for leg in summary["legs"]])
        _legend(axes[0], columns=1)
    return figure


def lineage_figure(summary: Document, lineage: Document, kind: str = "hop", *, theme: Theme = "light") -> "Figure":
    """What became of latents over each link of a kind ("hop", "depth", "control"): shares of each state."""
    links = sorted(
        [link for link in lineage["links"] if link["kind"] == kind],
        key=lambda link: (link["target_layer"], link["source_layer"]),
    )
    by = " and ".join(sorted({"by index" if link["by"] == "index" else "by optimal assignment" for link in links}))
    small = (
        f"Latents alive at either end, {by or 'none'}. Kept: cosine of decoder rows over {lineage['kept_above']}, the "
        f"source folded through the affine map between the layers; replaced: under {lineage['replaced_below']}; "
        f"alive: fired more than {lineage['alive_above']} times."
    )
    titles = {"hop": "From parent to child", "depth": "From layer to layer", "control": "Beside from-scratch controls"}
    with _page(theme, summary, titles[kind], small, 0.6 + 0.17 * max(3, len(links)), lineage["n_tokens"]) as figure:
        axis = figure.subplots()
        left = [0.0] * len(links)
        for (letter, text), colour in zip(_FATES.items(), _FATE_COLOURS[theme], strict=True):
            shares = []
            for link in links:
                alive = len(link["status"]) - link["status"].count("-")
                shares.append(100 * link["status"].count(letter) / max(1, alive))
            axis.barh(range(len(links)), shares, left=left, color=colour, height=0.75, label=text)
            left = [a + b for a, b in zip(left, shares, strict=True)]
        names = [f"{link['source_layer']} → {link['target_layer']}" for link in links]
        axis.set_yticks(range(len(links)), names if kind != "control" else [link["target"] for link in links])
        axis.invert_yaxis()
        _dress(axis, theme, xlabel="latents (%)", ylabel="layers" if kind != "control" else "", grid=False)
        axis.set_xlim(0, 100)
        _legend(axis, columns=5)
    return figure


# --- how it was trained -----------------------------------------------------------------------------------------


def training_figure(summary: Document, metrics: Sequence[Document], *, theme: Theme = "light") -> "Figure":
    """FVU against a leg's own tokens, from the lines of metrics.jsonl: colours are layers, strokes are roles."""
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    legs = {leg["id"]: leg for leg in summary["legs"]}
    layers = sorted({leg["layer"] for leg in legs.values()})
    strokes: dict[str, dict[str, Any]] = {
        "root": {"linestyle": "-", "linewidth": 1.8},
        "transfer": {"linestyle": "-", "linewidth": 0.9},
        "control": {"linestyle": (0, (2, 1.2)), "linewidth": 0.9},
    }
    colours = LinearSegmentedColormap.from_list("layers", [mpl.colormaps["viridis"](x) for x in _span(theme, 256)])
    norm = Normalize(layers[0], max(layers[-1], layers[0] + 1))
    small = f"{_FVU} over each block of the training split, while it is trained on."
    with _page(theme, summary, "Training curves", small, 2.5, split="training split") as figure:
        axis = figure.subplots()
        curves = defaultdict[str, list[Document]](list)
        for line in metrics:
            curves[line["leg"]].append(line)
        for leg_id in (leg_id for leg_id in legs if leg_id in curves):
            x, y = [line["age"] for line in curves[leg_id]], [line["fvu"] for line in curves[leg_id]]
            leg = legs[leg_id]
            axis.plot(x, y, color=colours(norm(leg["layer"])), **strokes[leg["role"]])
        for role, text in (("root", "root"), ("transfer", "transferred"), ("control", "control")):
            if any(leg["role"] == role for leg in legs.values()):
                axis.plot([], [], color=_COLOURS[theme]["ink"], label=text, **strokes[role])
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda x, _: format_count(round(x)))
        axis.xaxis.set_minor_formatter(lambda x, _: "")
        axis.set_ylim(bottom=0)
        _dress(axis, theme, xlabel="tokens trained on", ylabel="FVU")
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=axis, fraction=0.04, pad=0.02)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.set_ticks(layers[:: -(-len(layers) // 12)])
        _dress(bar.ax, theme, ylabel="layer", grid=False)
        _legend(axis, columns=3)
    return figure


def plan_figure(compiled: Plan, *, theme: Theme = "light") -> "Figure":
    """Who came from whom: each leg a bar over its layer, along the tokens that the language model reads."""
    colours = _COLOURS[theme]
    places = _places([{"id": leg.id, "layer": leg.layer} for leg in compiled.legs], 0.25)
    run, facts = compiled.run, compiled.facts
    parts = [facts.name, f"{format_count(compiled.n_tokens)} tokens of the training split", f"seed {run.train.seed}."]
    small = (
        "A bar is a SAE in training, with its tokens; a thin line is where its map is fitted; an arrow leads from the "
        "parent, at the age it was left at, to the child."
    )
    with _page(theme, parts, f"The plan: {len(compiled.legs)} SAEs", small, 3.0) as figure:
        axis = figure.subplots()
        width = 0.7 * min((b - a for a, b in pairwise(sorted(set(places.values())))), default=0.7)
        kinds = {leg.id: leg.control_kind or leg.role for leg in compiled.legs}
        for kind in dict.fromkeys(("root", "transfer", "equal_tokens", "full")):
            legs = [leg for leg in compiled.legs if kinds[leg.id] == kind]
            if legs:
                axis.bar(
                    [places[leg.id] for leg in legs],
                    [leg.end - leg.fold_at for leg in legs],
                    bottom=[leg.fold_at for leg in legs],
                    width=min(width, 0.3),
                    color=colours[kind],
                    label=_KINDS[kind][1],
                )
        for leg in compiled.legs:
            x = places[leg.id]
            axis.plot([x, x], [leg.start, leg.fold_at], color=colours[kinds[leg.id]], linewidth=0.8)
            if len(compiled.legs) <= 24:
                place = {
                    "xytext": (0, 2),
                    "textcoords": "offset points",
                    "rotation": 90,
                    "ha": "center",
                    "va": "bottom",
                }
                axis.annotate(format_count(leg.budget_tokens), (x, leg.end), **place)
            if compiled.has(leg.parent):
                parent = compiled.leg(leg.parent)
                left_at = parent.fold_at + leg.fork_at_tokens / parent.reuse
                arrow = {
                    "arrowstyle": "-|>,head_width=0.12,head_length=0.3",
                    "color": colours["faint"],
                    "linewidth": 0.6,
                }
                arrow |= {"shrinkA": 0, "shrinkB": 0}
                arrow |= {"connectionstyle": f"arc3,rad={0.12 if places[leg.parent] < x else -0.12}"}
                axis.annotate("", (x, leg.fold_at), (places[leg.parent], left_at), arrowprops=arrow)
        axis.yaxis.set_major_formatter(lambda y, _: format_count(round(y)))
        axis.margins(y=0.16)
        axis.set_ylim(bottom=0)
        _dress(axis, theme, ylabel="tokens read by the language model")
        _layer_ticks(axis, [leg.layer for leg in compiled.legs])
        _legend(axis)
    return figure


# --- how all figures look ---------------------------------------------------------------------------------------


@contextmanager
def _page(
    theme: Theme,
    about: Document | Sequence[str],
    title: str,
    definition: str,
    height: float,
    tokens: int | None = None,
    split: str = "",
) -> "Iterator[Figure]":
    """An empty figure with a title and small print: facts of a run (its summary, or parts of a line), a definition."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    facts = _facts(about, tokens, split) if isinstance(about, dict) else "; ".join(about)
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


def _facts(summary: Document, tokens: int | None, split: str) -> str:
    """Model, data, tokens, dictionaries, L0 and seed of a run; `tokens` if a figure's are not the summary's."""
    legs = [leg for leg in summary["legs"] if leg["role"] != "control"] or summary["legs"]
    split = split or f"test split, {tokens or legs[0]['n_eval_tokens']:,} tokens"
    data = f"{summary['data']}, {split}" if summary.get("data") else split
    kinds = ", ".join(sorted({f"{leg['architecture']} with {leg['n_latents']} latents" for leg in legs}))
    seeds = ", ".join(str(seed) for seed in sorted({leg["seed"] for leg in legs}))
    l0 = sum(leg["l0"] for leg in legs) / len(legs)
    return f"{summary['model']}; {data}; {kinds}, mean L0 {l0:.3g}; seed {seeds}."


def _kind(leg: Document, summary: Document) -> str:
    """Which of `_KINDS` a leg is."""
    if leg["role"] != "transfer":
        return leg["control_kind"] or leg["role"]
    parent = next((other["layer"] for other in summary["legs"] if other["id"] == leg["parent"]), leg["layer"])
    return "below" if parent < leg["layer"] else "above" if parent > leg["layer"] else "transfer"


def _places(legs: Iterable[Document], step: float = 0.18) -> dict[str, float]:
    """Where on an axis of layers each leg is drawn: those of one layer side by side."""
    by_layer = defaultdict[int, list[str]](list)
    for leg in legs:
        by_layer[leg["layer"]].append(leg["id"])
    return {
        leg_id: layer + (i - (len(ids) - 1) / 2) * min(step, 0.76 / len(ids))
        for layer, ids in by_layer.items()
        for i, leg_id in enumerate(ids)
    }


def _dress(axis: "Axes", theme: Theme, *, xlabel: str = "", ylabel: str = "", grid: bool = True) -> None:
    """Labels, ticks and lines of an axis, all coloured here: ticks are made when drawn, beyond the page's settings."""
    colours = _COLOURS[theme]
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.tick_params(
        which="both", labelsize=7, color=colours["faint"], labelcolor=colours["ink"], length=2, width=0.6, pad=2
    )
    axis.spines[["top", "right"]].set_visible(False)
    if grid:
        axis.grid(axis="y", color=colours["faint"], alpha=0.3, linewidth=0.5)
        axis.set_axisbelow(True)


def _span(theme: Theme, n: int) -> list[float]:
    """n places on viridis that can be seen on the page."""
    low, high = (0.0, 0.92) if theme == "light" else (0.25, 1.0)
    return [low + (high - low) * i / (n - 1) for i in range(n)]


def _lines(theme: Theme) -> list[Any]:
    """Colours of the methods."""
    import matplotlib as mpl

    return [mpl.colormaps["viridis"](x) for x in _span(theme, len(_METHODS))]


def _short(value: float, digits: int = 2) -> str:
    """A number with two digits, or so many more, where there is little room.

    >>> [_short(value) for value in (0.8349, 1.462, 24.0, 3543.0, -0.277, 1.0)], _short(0.99462, 3)
    (['.83', '1.5', '24', '4k', '−.28', '1.0'], '.995')
    """
    size = abs(value)
    text = f"{size:.{digits - 1}f}" if size < 9.95 else f"{size:.0f}"
    if f"{size:.{digits}f}" < "1":
        text = f"{size:.{digits}f}"[1:]
    return ("−" if value < 0 else "") + (text if size < 999.5 else f"{size / 1000:.0f}k")


def _standing(summary: Document) -> set[str]:
    """Ids of the legs that stand for their layers: no controls, none that was continued; of several, the first."""
    legs, found = [leg for leg in summary["legs"] if leg["role"] != "control"], dict[int, str]()
    continued = {(leg["parent"], leg["layer"], leg["module"]) for leg in legs}
    for leg in legs:
        if (leg["id"], leg["layer"], leg["module"]) not in continued:
            found.setdefault(leg["layer"], leg["id"])
    return set(found.values())


def _whole_ticks(axis: "Axes", values: Sequence[int]) -> None:
    """Whole numbers below an axis that is as long to both sides of 0, at most 16 of them."""
    reach = max((abs(value) for value in values), default=1)
    step = -(-(2 * reach + 1) // 16)
    axis.set_xticks(range(-(reach // step) * step, reach + 1, step))
    axis.set_xlim(-reach - 0.5, reach + 0.5)


def _layer_ticks(axis: "Axes", layers: Sequence[int]) -> None:
    """Whole layers below an axis, at most 16 of them."""
    shown = sorted(set(layers))
    axis.set_xticks(shown[:: -(-len(shown) // 16)])
    axis.set_xlim(shown[0] - 0.5, shown[-1] + 0.5)
    axis.set_xlabel("layer")


def _legend(axis: "Axes", columns: int = 2) -> None:
    """Above the axis, where it hides nothing; none where nothing is drawn."""
    if not axis.get_legend_handles_labels()[0]:
        return
    axis.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, frameon=False, fontsize=7, handletextpad=0.3,
        borderaxespad=0.2, columnspacing=1.0, labelspacing=0.25, handlelength=1.2,
    )  # fmt: skip
