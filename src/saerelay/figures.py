"""Figures of a finished run."""

from pathlib import Path
from typing import Any

from saerelay.spec import format_count

_COLOURS = {"root": "#1b4965", "transfer": "#ca6702", "equal_tokens": "#9aa5ab", "full": "#5fa8d3"}


def quality_figure(summary: dict[str, Any], path: Path) -> None:
    """Draw FVU and ΔCE by layer: the suite, and its from-scratch controls beside it; written as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    legs = summary["legs"]
    measures = [("fvu", "FVU (fraction of variance unexplained)")]
    if any(leg["delta_ce"] is not None for leg in legs):
        measures.append(("delta_ce", "ΔCE (nats per token)"))
    figure = Figure(figsize=(5.2 * len(measures), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, label) in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        for kind, marker, text in (
            ("root", "s", "from scratch (root)"),
            ("transfer", "o", "transferred"),
            ("equal_tokens", "v", "control: scratch, equal tokens"),
            ("full", "^", "control: scratch, full budget"),
        ):
            points = [leg for leg in legs if kind == (leg["control_kind"] or leg["role"]) and leg[name] is not None]
            if not points:
                continue
            tokens = format_count(max(leg["tokens"] for leg in points))
            errors = [leg["delta_ce_se"] for leg in points] if name == "delta_ce" else None
            axis.errorbar(
                [leg["layer"] for leg in points],
                [leg[name] for leg in points],
                yerr=errors,
                fmt=marker,
                color=_COLOURS[kind],
                markersize=7,
                capsize=2,
                label=f"{text}, {tokens} tokens",
            )
        axis.set_xlabel("layer")
        axis.set_ylabel(label)
        axis.set_xticks(sorted({leg["layer"] for leg in legs}))
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    figure.axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    first = legs[0]
    l0 = sum(leg["l0"] for leg in legs) / len(legs)
    figure.suptitle(
        f"{summary['model']}, {first['architecture']}, {first['n_latents']} latents, mean L0 {l0:.0f}, "
        f"{format_count(first['n_eval_tokens'])} held-out tokens, seed {first['seed']}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format="png")
    temporary.replace(path)
