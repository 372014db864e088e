"""The tables of the report's first page: prices, quality by layer, and the plan as a tree."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from saerelay.planning.leg import Leg
from saerelay.planning.leg_spec import ControlKind
from saerelay.planning.plan import Plan
from saerelay.runs.documents.quality import LegSummary, Summary
from saerelay.runs.suite import copy_of_tier, method_of
from saerelay.spec import format_count
from saerelay.views.labels import ROLES, leading_metric, made, seeds_label, spread_cells
from saerelay.views.tables.plan import learning_rate
from saerelay.views.text import duration, flops, is_number


@dataclass(frozen=True)
class Tile:
    """One price of the suite, compared with that of all layers from scratch."""

    name: str
    what: str
    """The quantity that is counted, such as "wall-clock"."""
    ratio: str
    less: bool
    """Whether the suite is cheaper."""
    ours: str
    theirs: str
    share: float
    """The suite's price in percent of the other, at most 100."""


def tiles(summary: Summary) -> list[Tile]:
    """Return the prices of the suite: samples, tokens and compute, which are the same on any machine, and time."""
    if summary.only_measured:
        return []
    cost = summary.cost.with_survey
    scratch = cost.from_scratch

    prices = [
        ("Samples", "activations seen by SAEs", cost.sae_samples, scratch.sae_samples, format_count),
        ("Tokens", "read by the language model", cost.lm_tokens, scratch.lm_tokens, format_count),
        ("Compute", "operations executed", cost.flops, scratch.flops, flops),
        ("Time", "wall-clock, on this machine", cost.seconds, scratch.seconds_estimate, duration),
    ]
    known = []
    for name, counted, ours, theirs, write in prices:
        if is_number(ours) and is_number(theirs) and ours > 0 and theirs > 0:
            known.append(_tile(name, counted, ours, theirs, write))
    return known


def _tile(name: str, counted: str, ours: float, theirs: float, write: Callable[..., str]) -> Tile:
    return Tile(
        name=name,
        what=counted,
        ratio=f"{max(theirs / ours, ours / theirs):.1f}",
        less=theirs >= ours,
        ours=write(ours),
        theirs=write(theirs),
        share=round(100 * min(1.0, ours / theirs), 1),
    )


# --- quality by layer -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QualityRow:
    """A leg of the suite, with its controls below it."""

    leg: LegSummary
    made: str
    """How it was made, in words."""
    kind: str
    """The kind of site, in the first row of each kind if a run has several; else ""."""
    tokens: str
    ratio: float | None
    """Its leading metric divided by that of its control with the full budget."""
    controls: list["ControlRow"] = field(default_factory=list)
    spreads: list["SpreadRow"] = field(default_factory=list)
    """Spreads of the leg and its controls, if they were trained with several seeds."""


@dataclass(frozen=True)
class ControlRow:
    """A control of a leg."""

    leg: LegSummary
    tokens: str


@dataclass(frozen=True)
class SpreadRow:
    """The means of a leg, or of a control, over its seeds."""

    name: str
    cells: list[str]
    """Cells as from `spread_cells`."""


def _spreads(summary: Summary, legs: Sequence[LegSummary]) -> list[SpreadRow]:
    rows = []
    for leg in legs:
        seeds = summary.over_seeds(leg)
        if len(seeds) > 1:
            name = seeds_label(seeds)
            if leg.control_kind:
                name = f"{ROLES[leg.control_kind]}: {name}"
            rows.append(SpreadRow(name, spread_cells(seeds)))
    return rows


def quality_rows(summary: Summary) -> list[QualityRow]:
    """Return a row for each final leg, with its controls."""
    metric = leading_metric(summary)
    rows = []
    kind = "" if len(summary.kinds) > 1 else summary.kinds[0]
    for leg in summary.final_legs:
        begins = leg.kind != kind
        kind = leg.kind
        full = summary.control(leg, "full")
        controls = [summary.control(leg, "equal_tokens"), full, summary.control(leg, "random")]
        listed = [control for control in controls if control]
        rows.append(
            QualityRow(
                leg=leg,
                made=made(summary, leg),
                kind=kind if begins else "",
                tokens=format_count(leg.tokens_in_all),
                ratio=quality_ratio(leg, full, metric),
                controls=[ControlRow(control, format_count(control.tokens_in_all)) for control in listed],
                spreads=_spreads(summary, [leg, *listed]),
            )
        )
    return rows


CLEAR = 2
"""Standard errors by which a control's metric must exceed 0 for a ratio to it to mean anything."""


def quality_ratio(leg: LegSummary, control: LegSummary | None, metric: str) -> float | None:
    """Return a leg's metric divided by a control's; None without a control, or if a ratio would mean nothing."""
    if control is None:
        return None
    ours = getattr(leg, metric)
    theirs = getattr(control, metric)
    error = getattr(control, f"{metric}_se", None)  # only ΔCE has one
    least = CLEAR * error if is_number(error) else 0.0
    if not is_number(ours) or not is_number(theirs) or theirs <= least:
        return None
    return ours / theirs


# --- the plan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanRow:
    """A leg of the plan, with its time on the axis of tokens in percent."""

    id: str
    depth: int
    layer: int
    role: str
    control_kind: ControlKind | None
    parent: str
    """The directory of a parent outside the plan; "" for a parent inside it, which is the row above."""
    how: str
    tokens: str
    moments: str
    lr: str
    start: float
    fold: float
    end: float


def plan_rows(plan: Plan) -> list[PlanRow]:
    """Return the legs as a tree, parents first."""
    ids = {leg.id for leg in plan.legs}
    tops = [leg for leg in plan.legs if leg.parent not in ids]
    kinds = list(dict.fromkeys(leg.kind for leg in plan.legs))
    tops.sort(key=lambda leg: (kinds.index(leg.kind), leg.role == "control", leg.layer))
    rows = []
    for leg in tops:
        rows += _branch(plan, leg, depth=0)
    return rows


def _branch(plan: Plan, leg: Leg, depth: int) -> list[PlanRow]:
    """Return a leg and all its descendants."""
    rows = [_plan_row(plan, leg, depth)]
    children = [other for other in plan.legs if other.parent == leg.id]
    for child in sorted(children, key=lambda child: child.layer):
        rows += _branch(plan, child, depth + 1)
    return rows


def _plan_row(plan: Plan, leg: Leg, depth: int) -> PlanRow:
    how = method_of(leg) or "from scratch"
    if plan.stays_as(leg) == "tier":
        how = copy_of_tier(leg)
    return PlanRow(
        id=leg.id,
        depth=depth,
        layer=leg.layer,
        role=leg.role,
        control_kind=leg.control_kind,
        parent="" if plan.has(leg.parent) else leg.parent,
        how=how,
        tokens=format_count(leg.budget_tokens),
        moments=format_count(leg.moment_tokens) if leg.moment_tokens else "",
        lr=learning_rate(leg),
        start=round(100 * leg.start / plan.n_tokens, 2),
        fold=round(100 * leg.fold_at / plan.n_tokens, 2),
        end=round(100 * leg.end / plan.n_tokens, 2),
    )
