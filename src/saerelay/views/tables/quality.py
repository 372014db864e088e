"""The quality and the cost of a suite."""

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from saerelay.runs.documents.quality import LegSummary, SnapshotSummary, Summary
from saerelay.site import SiteKind
from saerelay.spec import format_count
from saerelay.views.labels import (
    ROLES,
    few_documents,
    made,
    misleading_fvu,
    seeds_label,
    spread_cells,
    uncounted,
    unequal_l0,
)
from saerelay.views.text import decimal, duration, is_number, percent, with_error


def quality_table(summary: Summary) -> Table:
    """Show one row per leg, with its controls and snapshots below it, layer by layer.

    A control whose leg is not published has a row of its own.
    """
    title = f"{escape(summary.model)}: held-out quality of every SAE"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    predicted = any(leg.predicted_fvu is not None for leg in summary.legs)
    for name in ("layer", "SAE"):
        table.add_column(name)
    numbers = ["tokens", "L0", "ΔCE (nats)", "balanced FVU", "FVU", "CE score", "alive"]
    if predicted:
        numbers += ["predicted FVU", "validation FVU"]
    for name in numbers:
        table.add_column(name, justify="right")

    kind = "" if len(summary.kinds) > 1 else str(SiteKind())  # no heading where all are of the usual kind
    shown = [leg for leg in summary.first_seeds if not summary.has(leg.control_of)]
    for leg in summary.in_order(shown):
        if leg.kind != kind:
            kind = leg.kind
            table.add_row("", f"[underline]{kind}[/underline]")
        name = ROLES[leg.control_kind] if leg.control_kind else escape(made(summary, leg))
        table.add_row(str(leg.layer), name, *_leg_cells(leg, predicted), style="bold")
        _add_spread(table, summary, leg)
        for control in summary.legs:
            if control.control_of == leg.id:
                name = ROLES[control.control_kind or "full"]
                if control.continued_by:
                    name += ", before it was continued"
                table.add_row("", f"  {name}", *_leg_cells(control, predicted), style="dim")
                _add_spread(table, summary, control)
        for snapshot in leg.snapshots:
            cells = [format_count(snapshot.tokens), *_metrics(snapshot)]
            table.add_row("", "  snapshot during training", *cells, style="dim")
    return table


def _add_spread(table: Table, summary: Summary, leg: LegSummary) -> None:
    """Add a row with a leg's means over its seeds, if it has several."""
    legs = summary.over_seeds(leg)
    if len(legs) > 1:
        table.add_row("", f"  {seeds_label(legs)}", "", *spread_cells(legs), style="dim")


def _leg_cells(leg: LegSummary, predicted: bool) -> list[str]:
    return [format_count(leg.tokens_in_all), *_metrics(leg), *_predictions(leg, predicted)]


def _metrics(leg: LegSummary | SnapshotSummary) -> list[str]:
    return [
        decimal(leg.l0, 1),
        with_error(leg.delta_ce, leg.delta_ce_se, 4),
        decimal(leg.balanced_fvu, 4),
        decimal(leg.fvu, 4),
        decimal(leg.ce_loss_score, 4),
        percent(leg.frac_alive),
    ]


def _predictions(leg: LegSummary, predicted: bool) -> list[str]:
    if not predicted:
        return []
    return [decimal(leg.predicted_fvu, 4), decimal(leg.validation_fvu, 4)]


def notes(summary: Summary) -> list[Text]:
    """Explain the numbers above, and what the costs leave out."""
    cost = summary.cost
    lines = []
    if is_number(cost.seconds) and is_number(cost.from_scratch.seconds_estimate):
        lines.append(
            "Time is wall-clock time on this machine; from scratch it is extrapolated from the legs that were trained "
            "from scratch. If other programs ran at the same time, rely on samples and operations instead."
        )
    if is_number(cost.processor_seconds):
        lines.append(f"CPU time of the whole run, controls included: {duration(cost.processor_seconds)}.")
    if cost.controls.seconds:
        extra = "Controls and repeats with other seeds" if summary.first_seeds != summary.legs else "Controls"
        lines.append(
            f"{extra} took another {duration(cost.controls.seconds)}; neither this nor evaluation is counted above."
        )
    from_outside = uncounted(summary.outside_parents)
    if from_outside and not summary.only_measured:
        lines.append(from_outside)
    if summary.left_out and summary.left_out.note:
        lines.append(f"Note: {summary.left_out.note}.")
    misleading = misleading_fvu(summary)
    if misleading:
        lines.append(misleading)
    unequal = unequal_l0(summary)
    if unequal:
        lines.append(unequal)
    few = few_documents(summary)
    if few:
        lines.append(few)
    lines.append(
        "ΔCE: increase of the model's loss with the SAE in place, ± standard error over sequences. The sequences are "
        "the same for all SAEs, so differences between SAEs are more certain than these errors suggest (eval/*.json "
        "has ΔCE by sequence). FVU: lower is better."
    )
    return [Text(line) for line in lines]
