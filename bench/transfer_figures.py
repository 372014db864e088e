"""The figures of docs/transfer.md."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transfer_tables import (
    CURVES,
    DIRECTIONS,
    Point,
    Results,
    by_label,
    composed,
    distance_table,
    groups_table,
    head_start,
    head_start_table,
    pareto_table,
    suites_table,
)

from saerelay.spec import format_count

COLOURS = {"scratch": "black", "identity": "tab:orange", "affine+refit": "tab:blue"}


def subplots(rows: int, columns: int, **options: Any) -> tuple[Any, Any]:
    """A figure without a screen, and its panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    wide = 2.8 if columns > 2 else 3.8
    size = (wide * columns, 2.6 * rows + 0.3)
    return plt.subplots(rows, columns, figsize=size, constrained_layout=True, squeeze=False, **options)


def save(figure: Any, path: Path) -> None:
    """Write it whole or not at all."""
    from matplotlib import pyplot as plt

    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)
    plt.close(figure)


def tokens_axis(panel: Any, label: str) -> None:
    """Logarithmic, in counts that people say."""
    from matplotlib.ticker import LogLocator

    panel.set(xscale="log", xlabel=label)
    panel.xaxis.set_major_formatter(lambda x, _: format_count(round(x)))
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_minor_formatter("")
    panel.grid(alpha=0.3)


def ratio_axis(panel: Any) -> None:
    """Ratios upwards of 1, logarithmic."""
    from matplotlib.ticker import LogLocator

    panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.1, 1.2, 1.3, 1.5, 2, 3, 5, 7)))
    panel.yaxis.set_major_formatter("{x:.1f}")
    panel.yaxis.set_minor_formatter("")


def draw_curves(r: Results, path: Path) -> None:
    """FVU against samples, a panel a layer: scratch, and hops from the better neighbour."""
    columns = math.ceil(len(r.layers) / 2)
    figure, panels = subplots(2, columns, sharex=True)
    for layer, panel in zip(r.layers, panels.flat, strict=False):
        curve = r.scratch(layer)
        panel.plot([p.tokens for p in curve], [p.fvu for p in curve], "o-", color="black", ms=3.5, label="from scratch")
        for kind, marker in zip(CURVES, "s^", strict=True):
            best: dict[str, Point] = {}
            for p in r.hops(kind, seed=0):
                if p.layer == layer and (p.label not in best or p.fvu < best[p.label].fvu):
                    best[p.label] = p
            hops = [p for p in best.values() if p.samples]
            at, fvu = [p.samples for p in hops], [p.fvu for p in hops]
            panel.plot(at, fvu, f"{marker}-", color=COLOURS[kind], ms=3.5, label=f"hop, {kind}")
            for p in best.values():
                if not p.samples:
                    panel.axhline(p.fvu, color=COLOURS[kind], ls=":", lw=1, label=f"{kind}, zero-shot")
        panel.set(yscale="log", title=f"layer {layer}")
        panel.title.set_fontsize(9)
        panel.yaxis.set_major_formatter("{x:.2f}")
        panel.yaxis.set_minor_formatter("{x:.2f}")
        tokens_axis(panel, "samples" if layer >= columns else "")
        panel.tick_params(which="both", labelsize=7)
    for panel in panels[:, 0]:
        panel.set_ylabel("FVU, held out")
    panels[0, 0].legend(fontsize=6.5)
    figure.suptitle(f"{r.model}: from scratch, and one hop from the better neighbour", fontsize=10)
    save(figure, path)


def draw_head_start(models: Sequence[Results], path: Path) -> None:
    """How many times its own cost a hop is worth, against its cost: in samples above, in LM tokens below."""
    figure, panels = subplots(2, len(models), sharey=True)
    for r, column in zip(models, panels.T, strict=True):
        for panel, cost, name in zip(column, ("samples", "lm"), ("samples", "LM tokens"), strict=True):
            for kind in CURVES:
                for direction, style in zip(DIRECTIONS, ("--", "-"), strict=True):
                    budgets = by_label(r.hops(kind, direction, seed=0)).values()
                    shown = [start for points in budgets if (start := head_start(r, points)) and start[cost]]
                    at, times = [start[cost] for start in shown], [start["tokens"] / start[cost] for start in shown]
                    panel.plot(at, times, style, color=COLOURS[kind], label=f"{kind}, {direction}")
                    faces = ["white" if 2 * start["beyond"] > start["n"] else COLOURS[kind] for start in shown]
                    panel.scatter(at, times, s=16, edgecolors=COLOURS[kind], color=faces, zorder=3)
            panel.axhline(1, color="grey", lw=1)
            panel.set(yscale="log", yticks=[0.5, 1, 2, 4, 8, 16, 32], yticklabels=["½", 1, 2, 4, 8, 16, 32])
            panel.minorticks_off()
            tokens_axis(panel, f"{name} of the hop")
            column[0].set_title(r.model)
    for panel in panels[:, 0]:
        panel.set_ylabel("scratch needs × as many")
    panels[0, 0].legend(fontsize=7)
    save(figure, path)


def draw_distance(models: Sequence[Results], path: Path) -> None:
    """FVU over the own control, against the distance from the source."""
    from matplotlib.ticker import MultipleLocator

    figure, panels = subplots(1, len(models))
    for r, panel in zip(models, panels.flat, strict=True):
        rows = distance_table(r)
        for column, marker in zip([key for key in rows[0] if "," in key], "osv^D", strict=False):
            style = "--" if column.endswith(" 0") else "-"
            shown = [row for row in rows if row[column]]
            at, ratios = [row["layers"] for row in shown], [row[column] for row in shown]
            panel.plot(at, ratios, f"{marker}{style}", ms=4, label=column)
        panel.axhline(1, color="grey", lw=1)
        panel.set(title=r.model, xlabel="layers below the source", yscale="log")
        ratio_axis(panel)
        panel.xaxis.set_major_locator(MultipleLocator(1))
        panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("FVU / own full-budget leg")
    panels[0, 0].legend(fontsize=7)
    save(figure, path)


def draw_suites(models: Sequence[Results], path: Path) -> None:
    """The worst layer's FVU ratio against samples: suites as they are, and the cheapest ones put together."""
    figure, panels = subplots(1, len(models))
    for r, panel in zip(models, panels.flat, strict=True):
        grouped = [row for row in groups_table(r) if row["suite"].startswith("Group")]
        kinds = {"presets, timed": ("tab:purple", "o", suites_table(r)), "Group-SAE": ("tab:red", "s", grouped)}
        for hop in ("identity", "affine+refit"):
            kinds[f"alternate, {hop}"] = (COLOURS[hop], ".", [row for row in composed(r) if hop in row["suite"]])
        for name, (colour, marker, rows) in ((name, kind) for name, kind in kinds.items() if kind[2]):
            at = [row["samples"] for row in rows]
            panel.plot(at, [row["worst"] for row in rows], marker, color=colour, ms=5, label=name)
        bounds = [1 + step / 100 for step in range(1, 81)]
        cheapest = pareto_table(r, bounds)
        for name, colour in (("scratch", COLOURS["scratch"]), ("hops", COLOURS["affine+refit"])):
            at = [row[f"{name}: samples"] for row in cheapest]
            if at:
                panel.step(at, bounds, color=colour, lw=1, where="post", label=f"cheapest, {name}")
        panel.set(title=r.model, xlabel="samples / all layers from scratch", ylim=(0.99, 1.8))
        panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("FVU ratio of the worst layer")
    panels[0, -1].legend(fontsize=7)
    save(figure, path)


def draw_all(models: Sequence[Results], docs: Path) -> list[Path]:
    """The figures there are numbers for."""
    drawn = []

    def add(name: str, some: Sequence[Results], draw: Callable[[Any, Path], None]) -> None:
        if some:
            draw(some, docs / name)
            drawn.append(docs / name)

    for r in models:
        add(f"transfer-{r.model}.png", [r] if r.scratch(r.layers[0]) else [], lambda some, p: draw_curves(some[0], p))
    add("transfer-head-start.png", [r for r in models if head_start_table(r)], draw_head_start)
    add("transfer-distance.png", [r for r in models if distance_table(r)], draw_distance)
    add("transfer-suites.png", [r for r in models if groups_table(r) or suites_table(r)], draw_suites)
    return drawn
