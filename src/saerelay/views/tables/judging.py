"""Blind judging: the contents of a page, and the judges' scores."""

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from saerelay.runs.documents.judging import JudgingKey, LayerTally, OriginTally, Scores
from saerelay.views.labels import ORIGINS
from saerelay.views.text import decimal, percent, visible

PUBLISHED = (
    "Ghilardi et al. 2024, Pythia-160m: 83.6 % from scratch, 88.1 % forward, 84.7 % backward; 32 features per layer."
)


def drawn_lines(key: JudgingKey) -> list[str]:
    """List the latents of a judging page by origin, and the origins that the run lacks; not for judges."""
    lines = []
    for origin in ("scratch", "forward", "backward"):
        legs = [item.leg for item in key.items if item.origin == origin]
        names = f"latents of {', '.join(sorted(set(legs)))}" if legs else "(there is no such leg)"
        lines.append(f"{origin:<9}{len(legs):>5} {names}")
    lines.append(f"{len(key.items)} latents of {key.model}, drawn with seed {key.seed}.")
    return lines


def judging_tables(scores: Scores) -> list[Table | Text]:
    """Show the share of latents that people find interpretable, by origin and layer, and how far judges agree."""
    title = f"{escape(scores.model)}: share of latents found interpretable, with 95 % intervals"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for name in ("origin", "layer", "leg", "latents", "judged", "tied", "yes", "share", "interval"):
        table.add_column(name, justify="left" if name in ("origin", "leg") else "right")
    for total in scores.origins:
        table.add_row(ORIGINS[total.origin], "all", "", *_tally(total), style="bold")
        for row in scores.layers:
            if row.origin == total.origin:
                table.add_row("", str(row.layer), escape(row.leg), *_tally(row), style="dim")

    lines = []
    for row in scores.differences:
        layers = ", ".join(str(layer) for layer in row.layers) or "none"
        interval = f"{percent(row.low, '+')} to {percent(row.high, '+')}"
        lines.append(
            f"{row.origin} − scratch, over the layers that have both ({layers}): {percent(row.difference, '+')} "
            f"(95 % interval {interval})"
        )
    for row in scores.judges:
        answers = f"{row.n_yes} yes, {row.n_no} no, {row.n_skip} skipped, {row.n_left} not answered"
        lines.append(f"judge {visible(row.judge)}: {answers}; found {percent(row.share)} interpretable")
    for row in scores.agreement:
        both = " and ".join(visible(judge) for judge in row.judges)
        lines.append(
            f"{both} agree on {percent(row.raw)} of the {row.n_latents} that both judged; Cohen's kappa "
            f"{decimal(row.kappa, 2)}"
        )
    lines.append(f"For comparison, another model and other judges: {PUBLISHED}")
    return [table, Text(), *(Text(line) for line in lines)]


def _tally(row: OriginTally | LayerTally) -> list[str]:
    counts = [str(n) for n in (row.n_latents, row.n_judged, row.n_tied, row.n_interpretable)]
    return [*counts, percent(row.share), f"{percent(row.low)} to {percent(row.high)}"]
