"""The numbers of docs/transfer.md: what a study's finished jobs say, as tables.

Jobs that are not done are named, and what needs them is left out. Two costs are counted apart: *samples*, activations
that an SAE is trained or refitted on, and *LM tokens*, which the language model reads for it (those of the map
included; the refit uses tokens of the map again).
"""

import csv
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap, gmean
from transfer import Study, all_jobs, suites

from saerelay.files import read_json
from saerelay.runs.directory import RunDirectory, read_plan
from saerelay.runs.documents.quality import Evaluation, Summary
from saerelay.spec import format_count
from saerelay.workflows.demo import DEMO

Row = dict[str, Any]
"""One line of a table, by column: text, a count, a number, (mean, standard error), or (mean, low, high)."""

SEEDS = 3
WITHIN = (1.02, 1.05, 1.10)
"""Qualities to reach, as FVU over that of the layer's own full-budget leg."""
BOUNDS = (1.02, 1.05, 1.10, 1.20)
"""The same, for the worst layer of a suite."""
ORDER = ("identity", "rescale", "procrustes", "affine", "affine+refit")
CURVES = ("identity", "affine+refit")
"""Hops at every budget."""
DIRECTIONS = ("forward", "backward")
GROUPS = "groups-s0"
"""The job of `train_groups`, whose summary is not that of a run."""


@dataclass(frozen=True)
class Point:
    """A finished, evaluated leg."""

    job: str
    source: int | None
    layer: int
    kind: str
    """`scratch`, a hop's method, or what its job calls it."""
    label: str
    """The last part of its id: a budget, mostly."""
    seed: int
    tokens: int
    samples: int
    lm_tokens: int
    fvu: float
    l0: float
    alive: float
    delta_ce: float | None
    ce_score: float | None
    sequences: np.ndarray | None
    """ΔCE of each held-out sequence."""

    @property
    def direction(self) -> str:
        """`backward` comes from a later layer."""
        return "backward" if self.source is not None and self.source > self.layer else "forward"


@dataclass
class Results:
    """All that is finished of one model's study."""

    model: str
    points: list[Point] = field(default_factory=list)
    summaries: dict[str, Summary] = field(default_factory=dict)
    groups: dict[str, Any] | None = None
    """What `train_groups` wrote, if it is finished."""
    under_way: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def of(self, job: str) -> list[Point]:
        """The legs of jobs whose name begins so."""
        return [p for p in self.points if p.job.startswith(job)]

    @property
    def layers(self) -> list[int]:
        """All layers."""
        return sorted({p.layer for p in self.of("scratch")})

    def scratch(self, layer: int) -> list[Point]:
        """A layer's legs from scratch at seed 0, cheapest first."""
        mine = [p for p in self.of("scratch-s0") if p.layer == layer and p.kind == "scratch"]
        return sorted(mine, key=lambda p: p.tokens)

    def control(self, layer: int, seed: int = 0) -> Point | None:
        """A layer's own leg from scratch with the full budget."""
        mine = [p for p in self.of(f"scratch-s{seed}") if p.layer == layer and p.kind == "scratch"]
        return max(mine, key=lambda p: p.tokens, default=None)

    def hops(self, kind: str, direction: str | None = None, seed: int | None = None) -> list[Point]:
        """Hops between neighbours whose control is there, cheapest first."""
        return sorted(
            (
                p
                for p in self.of("hops")
                if p.kind == kind and direction in (None, p.direction) and seed in (None, p.seed)
                if self.control(p.layer, p.seed)
            ),
            key=lambda p: p.tokens,
        )

    def ratio(self, p: Point) -> float:
        """FVU over that of the layer's own full-budget leg of the same seed."""
        control = self.control(p.layer, p.seed)
        return p.fvu / control.fvu if control else math.nan


# --- reading ----------------------------------------------------------------------------------------------------

LEG = re.compile(r"(?:L(?P<source>\d+)-)?L(?P<layer>\d+)-(?:(?P<kind>.+)-)?(?P<label>x?[\d.]+[kM]?)")


def read_study(folder: Path) -> Results:
    """The finished jobs of one model; the others by name."""
    results = Results(folder.name)
    for path in sorted(folder.glob("*/summary.json")):
        job = path.parent
        if job.name == GROUPS:
            results.groups = read_json(path)
        else:
            results.summaries[job.name] = Summary.load(path)
            results.points += read_points(job, results.summaries[job.name])
    n_layers = read_plan(folder / "scratch-s0").facts.n_layers
    study = Study(folder.name, DEMO, n_layers, (2,), (1,), (1,), 1, 1e-3)
    wanted = [job.name for job in [*all_jobs(study, folder, SEEDS), *suites(study)]]
    left = [name for name in wanted if not (folder / name / "summary.json").is_file()]
    results.under_way = [name for name in left if (folder / name).is_dir()]
    results.missing = [name for name in left if name not in results.under_way]
    return results


def read_points(job: Path, summary: Summary) -> list[Point]:
    """The legs of a finished job whose ids the study made."""
    points = []
    for leg in summary.legs:
        found = LEG.fullmatch(leg.id)
        if not found:
            continue
        evaluation = Evaluation.load_if_any(RunDirectory(job).evaluation(leg.id))
        deltas = evaluation.metrics.sequence_delta_ce if evaluation else None
        points.append(
            Point(
                job=job.name,
                source=int(found["source"]) if found["source"] else None,
                layer=leg.layer,
                kind=found["kind"] or "scratch",
                label=found["label"],
                seed=int(job.name[-1]) if re.search(r"-s\d$", job.name) else 0,
                tokens=leg.tokens,
                samples=leg.tokens + leg.refit_tokens,
                lm_tokens=leg.tokens + leg.moment_tokens,
                fvu=number(leg.fvu),
                l0=number(leg.l0),
                alive=number(leg.frac_alive),
                delta_ce=leg.delta_ce,
                ce_score=leg.ce_loss_score,
                sequences=np.array(deltas) if deltas else None,
            )
        )
    return points


def number(value: float | None) -> float:
    """A measured number; NaN where it could not be computed."""
    return math.nan if value is None else value


# --- arithmetic -------------------------------------------------------------------------------------------------


def mean_interval(values: Sequence[float]) -> Any:
    """Mean and its 95 % bootstrap interval; the mean alone of fewer than three values, None of none."""
    x = np.array([v for v in values if math.isfinite(v)])
    if len(x) < 3 or np.ptp(x) == 0:
        return float(x.mean()) if len(x) else None
    ci = bootstrap((x,), np.mean, n_resamples=5000, rng=np.random.default_rng(0)).confidence_interval
    return float(x.mean()), float(ci.low), float(ci.high)


def geometric_interval(ratios: Sequence[float]) -> Any:
    """The same of ratios, which are as often halved as doubled."""
    found = mean_interval(np.log(ratios).tolist())
    return tuple(map(math.exp, found)) if isinstance(found, tuple) else math.exp(found)


def budget_for(curve: Sequence[tuple[float, float]], fvu: float) -> float | None:
    """The smallest budget at which a measured curve of (budget, FVU) is at or under an FVU; None: not at any measured.

    Straight in log-log between neighbours; straight in the budget where it begins at 0.
    """
    for i, (x, y) in enumerate(curve):
        if y <= fvu:
            if i == 0:
                return x
            x0, y0 = curve[i - 1]
            share = math.log(y0 / fvu) / math.log(y0 / y)
            return x0 * (x / x0) ** share if x0 else share * x
    return None


def scratch_equivalent(curve: Sequence[tuple[float, float]], fvu: float) -> tuple[float, bool]:
    """The budget at which a falling curve has an FVU, and whether that lies outside of what was measured.

    Outside, the curve goes on with its last slope, at most 16-fold.
    """
    x, y = np.log(np.array(curve)).T
    y = np.minimum.accumulate(y)
    wanted = math.log(fvu)
    if y[-1] <= wanted <= y[0]:
        return math.exp(np.interp(-wanted, -y, x)), False
    i, j, sign = (1, 0, -1) if wanted > y[0] else (-2, -1, 1)
    slope = abs((y[j] - y[i]) / (x[j] - x[i]))
    steps = abs(wanted - y[j]) / slope if slope else math.inf
    return math.exp(x[j] + sign * min(steps, math.log(16))), True


def by_label(points: Iterable[Point]) -> dict[str, list[Point]]:
    """Legs of one budget, smallest first."""
    found: dict[str, list[Point]] = defaultdict(list)
    for p in sorted(points, key=lambda p: p.tokens):
        found[p.label].append(p)
    return found


# --- tables: each takes one model's results and returns rows --------------------------------------------------------


def status_table(r: Results) -> list[Row]:
    """What is done."""
    n_jobs = len(r.summaries) + (r.groups is not None)
    n_legs = sum(len(summary.legs) for summary in r.summaries.values())
    return [
        {
            "done": f"{n_jobs} jobs, {n_legs} legs",
            "in progress": ", ".join(r.under_way) or "–",
            "not run": ", ".join(shorten(r.missing)) or "–",
        }
    ]


def shorten(names: Sequence[str]) -> list[str]:
    """Names of jobs, those of one seed's hops as one."""
    seeds = sorted({name[-2:] for name in names if name.startswith("hops-")})
    hops = {s: [name for name in names if name.startswith("hops-") and name.endswith(s)] for s in seeds}
    return [name for name in names if not name.startswith("hops-")] + [
        f"hops-{'/'.join(name.split('-')[1] for name in found)}-{s}" for s, found in hops.items()
    ]


def scratch_table(r: Results) -> list[Row]:
    """FVU of every layer at every budget, and how much the full one varies with the seed."""
    rows = []
    for layer in r.layers:
        controls = [c for seed in range(SEEDS) if (c := r.control(layer, seed))]
        row: Row = {"layer": layer} | {p.label: p.fvu for p in r.scratch(layer)}
        if len(controls) > 1:
            row |= {f"full, {len(controls)} seeds": (mean(controls), float(np.std([c.fvu for c in controls], ddof=1)))}
        rows.append(row)
    return rows


def mean(points: Sequence[Point]) -> float:
    """Mean FVU."""
    return float(np.mean([p.fvu for p in points]))


def scratch_ce_table(r: Results) -> list[Row]:
    """ΔCE of every layer at every budget."""
    return [
        {"layer": layer} | {p.label: p.delta_ce for p in r.scratch(layer)}
        for layer in r.layers
        if r.scratch(layer)[-1].delta_ce is not None
    ]


def quality_table(r: Results, zero_shot: bool) -> list[Row]:
    """FVU and ΔCE of hops between neighbours over the layer's own full-budget leg."""
    rows = []
    for kind in ORDER:
        for label, points in by_label(p for p in r.hops(kind) if (p.tokens == 0) == zero_shot).items():
            row: Row = {"hop": kind} if zero_shot else {"hop": kind, "tokens": label}
            for direction in DIRECTIONS:
                mine = [p for p in points if p.direction == direction]
                row[f"{direction}: FVU ratio"] = mean_interval([r.ratio(p) for p in mine])
                if any(p.delta_ce is not None for p in r.points):
                    row[f"{direction}: ΔCE ratio"] = mean_interval([ce_ratio(r, p) for p in mine])
                row[f"{direction}: n"] = len(mine)
            rows.append(row)
    return rows


def ce_ratio(r: Results, p: Point) -> float:
    """ΔCE over that of the layer's own full-budget leg."""
    control = r.control(p.layer, p.seed)
    return p.delta_ce / control.delta_ce if control and p.delta_ce is not None and control.delta_ce else math.nan


def delta_ce_table(r: Results) -> list[Row]:
    """ΔCE of hops minus that of the controls, in nats, averaged over targets; errors over sequences: all share them."""
    rows = []
    for kind in ORDER:
        for label, points in by_label(r.hops(kind, seed=0)).items():
            row: Row = {"hop": kind, "tokens": label}
            for direction in DIRECTIONS:
                mine = [p for p in points if p.direction == direction]
                row[f"{direction}: ΔCE − control"] = paired(r, mine)
                worse = [p for p in mine if (d := paired(r, [p])) is not None and d[0] > 2 * d[1]]
                row[f"{direction}: worse by 2 standard errors"] = f"{len(worse)} of {len(mine)}"
            if any(isinstance(value, tuple) for value in row.values()):
                rows.append(row)
    return rows


def paired(r: Results, points: Sequence[Point]) -> tuple[float, float] | None:
    """Mean difference of ΔCE to the controls and its standard error over sequences."""
    differences = []
    for p in points:
        control = r.control(p.layer, p.seed)
        if control and p.sequences is not None and control.sequences is not None:
            differences.append(p.sequences - control.sequences)
    if not differences:
        return None
    each = np.mean(differences, axis=0)
    return float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each)))


def direction_table(r: Results) -> list[Row]:
    """Backward against forward on the layers that have both neighbours: FVU(backward) / FVU(forward)."""
    rows = []
    for kind in ORDER:
        for label, points in by_label(r.hops(kind)).items():
            pairs: dict[tuple[int, int], dict[str, Point]] = defaultdict(dict)
            for p in points:
                pairs[p.layer, p.seed][p.direction] = p
            both = [pair for pair in pairs.values() if len(pair) == 2]
            if both:
                ratios = [pair["backward"].fvu / pair["forward"].fvu for pair in both]
                rows.append(
                    {
                        "hop": kind,
                        "tokens": label,
                        "FVU backward / forward": geometric_interval(ratios),
                        "backward better": f"{sum(x < 1 for x in ratios)} of {len(ratios)}",
                    }
                )
    return rows


def reach_table(r: Results) -> list[Row]:
    """What it costs to come within 2, 5 and 10 % of the own full-budget leg, as shares of its budget; seed 0."""
    rows = []
    for kind in ("scratch", *CURVES):
        for which in ("own layer",) if kind == "scratch" else (*DIRECTIONS, "best"):
            targets = reached(r, kind, which)
            if not targets:
                continue
            row: Row = {"hop": kind, "direction": which}
            for within in WITHIN:
                found = [cost for cost in (costs[within] for costs in targets.values()) if cost]
                row[f"{within:.2f}×: samples"] = percent([samples for samples, _ in found])
                row[f"{within:.2f}×: LM tokens"] = percent([lm for _, lm in found])
                row[f"{within:.2f}×: reached"] = f"{len(found)} of {len(targets)}"
            rows.append(row)
    return rows


def reached(r: Results, kind: str, which: str) -> dict[int, dict[float, tuple[float, float] | None]]:
    """For each target and quality, the cost of reaching it over the control's budget: (samples, LM tokens)."""
    targets: dict[int, dict[float, tuple[float, float] | None]] = {}
    for layer in r.layers:
        control = r.control(layer)
        if kind == "scratch":
            curves = [r.scratch(layer)]
        else:
            wanted = DIRECTIONS if which == "best" else (which,)
            curves = [[p for p in r.hops(kind, d, seed=0) if p.layer == layer] for d in wanted]
        curves = [curve for curve in curves if len(curve) > 1]
        if not control or not curves:
            continue
        targets[layer] = {}
        for within in WITHIN:
            costs = []
            for curve in curves:
                samples = budget_for([(p.samples, p.fvu) for p in curve], within * control.fvu)
                lm = budget_for([(p.lm_tokens, p.fvu) for p in curve], within * control.fvu)
                if samples is not None and lm is not None:
                    costs.append((samples / control.tokens, lm / control.tokens))
            targets[layer][within] = min(costs, default=None)
    return targets


def percent(shares: Sequence[float]) -> str:
    """A mean share."""
    return f"{100 * np.mean(shares):.1f}%" if len(shares) else "not reached"


def tried_table(r: Results) -> list[Row]:
    """The largest budgets behind `not reached`."""
    full = next((c.tokens for layer in r.layers if (c := r.control(layer))), None)
    if not full:
        return []
    row: Row = {"control": full}
    for kind in CURVES:
        for direction in DIRECTIONS:
            if hops := r.hops(kind, direction, seed=0):
                row[f"{kind}, {direction}: largest budget"] = hops[-1].tokens
    return [row]


def head_start(r: Results, points: Sequence[Point]) -> dict[str, float] | None:
    """Tokens that scratch needs for the same FVU (geometric mean over targets), beside the mean cost of the hops.

    `beyond` of `n` lie outside of what was measured.
    """
    equivalents, samples, lm, beyond = [], [], [], 0
    for p in points:
        curve = [(q.tokens, q.fvu) for q in r.scratch(p.layer)]
        if len(curve) > 1:
            equivalent, extrapolated = scratch_equivalent(curve, p.fvu)
            beyond += extrapolated
            equivalents.append(equivalent)
            samples.append(p.samples)
            lm.append(p.lm_tokens)
    if not equivalents:
        return None
    cost = {"samples": float(np.mean(samples)), "lm": float(np.mean(lm))}
    return cost | {"tokens": float(gmean(equivalents)), "beyond": beyond, "n": len(equivalents)}


def head_start_table(r: Results) -> list[Row]:
    """What scratch would have needed for the same FVU."""
    rows = []
    for kind in CURVES:
        for label, points in by_label(r.hops(kind, seed=0)).items():
            row: Row = {"hop": kind, "tokens": label}
            for direction in DIRECTIONS:
                found = head_start(r, [p for p in points if p.direction == direction])
                if found:
                    row[f"{direction}: scratch needs"] = format_count(round(found["tokens"]))
                    for cost, name in (("samples", "samples"), ("lm", "LM tokens")):
                        row[f"{direction}: × {name}"] = found["tokens"] / found[cost] if found[cost] else None
                    row[f"{direction}: extrapolated"] = f"{found['beyond']} of {found['n']}"
            rows.append(row)
    return rows


def distance_table(r: Results) -> list[Row]:
    """FVU over the own full-budget leg, by distance from the source."""
    rows: dict[int, Row] = {}
    for p in sorted(r.of("far-s0"), key=lambda p: -p.layer):
        assert p.source is not None
        row = rows.setdefault(p.layer, {"from → to": f"{p.source} → {p.layer}", "layers": p.source - p.layer})
        row[f"{p.kind}, {p.label}"] = r.ratio(p)
    named = ("from → to", "layers")
    columns = sorted(
        {key for row in rows.values() for key in row if key not in named}, key=lambda c: c.split(", ")[::-1]
    )
    return [
        {"from → to": row["from → to"], "layers": row["layers"]} | {c: row.get(c) for c in columns}
        for row in rows.values()
    ]


def fork_table(r: Results) -> list[Row]:
    """Children that leave an unfinished root, beside the child of the finished one."""
    rows = []
    forks = [p for p in r.of("forks-s0") if p.kind.startswith("fork")]
    for p in sorted(forks, key=lambda p: (p.layer, p.kind)):
        finished = [
            q for q in r.hops("affine+refit", seed=0) if (q.source, q.layer, q.label) == (p.source, p.layer, p.label)
        ]
        rows.append(
            {
                "from → to": f"{p.source} → {p.layer}",
                "forks from the root at": f"{100 * float(p.kind.removeprefix('fork')):.0f}%",
                "tokens": p.label,
                "FVU ratio": r.ratio(p),
                "from the finished root": r.ratio(finished[0]) if finished else None,
                "scratch, equal tokens": scratch_ratio(r, p),
            }
        )
    return rows


def scratch_ratio(r: Results, p: Point) -> float:
    """What scratch has with as many training tokens (log-log between measured budgets), over the control's."""
    curve = r.scratch(p.layer)
    tokens, fvu = np.log([q.tokens for q in curve]), np.log([q.fvu for q in curve])
    return math.exp(np.interp(math.log(p.tokens), tokens, fvu)) / curve[-1].fvu


def reuse_table(r: Results) -> list[Row]:
    """Few unique tokens, read several times."""
    legs = r.of("reuse-s0")
    unique = r.summaries["reuse-s0"].cost.lm_tokens_unique if legs else 0
    return [
        {"unique tokens": unique, "passes": label.replace("x", "× "), "samples": points[0].tokens}
        | {("scratch" if p.kind == "scratch" else "hop"): r.ratio(p) for p in points}
        for label, points in by_label(legs).items()
    ]


def alive_table(r: Results) -> list[Row]:
    """Share of latents that fire on the held-out tokens."""
    rows = []
    for label, points in by_label(p for layer in r.layers for p in r.scratch(layer)).items():
        rows.append({"leg": "scratch", "tokens": label, "alive": mean_interval([p.alive for p in points])})
    for kind in CURVES:
        for label, points in by_label(r.hops(kind, seed=0)).items():
            alive = mean_interval([p.alive for p in points])
            controls = [c.alive for p in points if (c := r.control(p.layer))]
            rows.append({"leg": kind, "tokens": label, "alive": alive, "controls alive": float(np.mean(controls))})
    return rows


def groups_table(r: Results) -> list[Row]:
    """One SAE for a group of layers, and beside it alternate layers from scratch with hops backward between them."""
    summary, n = r.groups, len(r.layers)
    rows = []
    if summary:
        trained = {tuple(g["layers"]): g["quality"] for g in summary["groups"]}
        for number, partition in sorted(summary["partitions"].items(), key=lambda item: int(item[0])):
            ratios = []
            for group in partition:
                for layer in group:
                    control = r.control(layer)
                    own = trained.get(tuple(group))
                    ratios.append(own[str(layer)]["fvu"] / control.fvu if own and control else 1.0)
            chosen = " (number chosen by the method)" if int(number) == summary["best"] else ""
            groups = "group" if int(number) == 1 else "groups"
            rows.append(
                {
                    "suite": f"Group-SAE, {number} {groups}{chosen}",
                    "samples": int(number) / n,
                    "mean FVU ratio": float(np.mean(ratios)),
                    "worst": max(ratios),
                }
            )
    return rows + composed(r)


def composed(r: Results) -> list[Row]:
    """Every other layer from scratch, the others by a hop from the layer above: put together from legs of the study."""
    rows, n = [], len(r.layers)
    for kind in CURVES:
        for label, points in by_label(r.hops(kind, "backward", seed=0)).items():
            children = [p for p in points if (r.layers[-1] - p.layer) % 2]
            if len(children) == n // 2:
                ratios = [r.ratio(p) for p in children] + [1.0] * (n - len(children))
                cost = sum((c.tokens if (c := r.control(p.layer)) else 0) - p.samples for p in children)
                full = sum(c.tokens for layer in r.layers if (c := r.control(layer)))
                rows.append(
                    {
                        "suite": f"alternate, {kind} {label}",
                        "samples": 1 - cost / full,
                        "mean FVU ratio": float(np.mean(ratios)),
                        "worst": max(ratios),
                    }
                )
    return rows


def pareto_table(r: Results, bounds: Sequence[float] = BOUNDS) -> list[Row]:
    """The cheapest suite whose worst layer is within a bound: from scratch alone, and with hops between neighbours.

    Every layer is a leg from scratch, at some budget, or a hop from a neighbour that has the full one; all choices of
    such parents are tried. Shares of all layers from scratch with the full budget.
    """
    controls = {layer: c for layer in r.layers if (c := r.control(layer))}
    hops = [p for kind in CURVES for p in r.hops(kind, seed=0)]
    if not hops or len(controls) < len(r.layers):
        return []
    full, rows = sum(c.tokens for c in controls.values()), []
    for bound in bounds:
        alone = {
            layer: next(p for p in [*r.scratch(layer), control] if r.ratio(p) <= bound)
            for layer, control in controls.items()
        }
        good = [p for p in hops if r.ratio(p) <= bound]
        choices = []
        for n in range(len(r.layers) + 1):
            for parents in combinations(r.layers, n):
                legs = {layer: controls[layer] if layer in parents else alone[layer] for layer in r.layers}
                for p in good:
                    if p.source in parents and p.layer not in parents and p.samples < legs[p.layer].samples:
                        legs[p.layer] = p
                choices.append(list(legs.values()))
        row: Row = {"worst layer within": f"{100 * (bound - 1):.0f}%"}
        for name, legs in (("scratch", list(alone.values())), ("hops", min(choices, key=samples_of))):
            hopped = [p for p in legs if p.kind != "scratch"]
            tokens = max(p.tokens for p in legs if p.kind == "scratch") + max((p.lm_tokens for p in hopped), default=0)
            row |= {f"{name}: samples": samples_of(legs) / full, f"{name}: LM tokens": tokens * len(controls) / full}
            row |= {f"{name}: mean FVU ratio": float(np.mean([r.ratio(p) for p in legs]))}
        by_hop = sorted((p.layer, p.source) for p in hopped)
        rows.append(row | {"hops used": ", ".join(f"{source} → {layer}" for layer, source in by_hop) or "none"})
    return rows


def samples_of(legs: Iterable[Point]) -> int:
    """Samples of several legs."""
    return sum(p.samples for p in legs)


def suites_table(r: Results) -> list[Row]:
    """Whole presets: cost, a survey's included, and quality over suite-scratch's."""
    own = r.summaries.get("suite-scratch")
    if not own:
        return []

    def taken(summary: Summary, cost: str) -> float:
        return getattr(summary.cost, cost) + getattr(summary.cost.survey, cost, 0)

    fvu = {leg.layer: number(leg.fvu) for leg in own.legs}
    rows = []
    for name, summary in r.summaries.items():
        if name.startswith("suite-"):
            legs = {leg.layer: number(leg.fvu) for leg in summary.legs if leg.role != "control"}
            ratios = [legs[layer] / fvu[layer] for layer in fvu if layer in legs]
            costs = ("seconds", "flops", "sae_samples", "lm_tokens")
            share = {cost: taken(summary, cost) / taken(own, cost) for cost in costs}
            rows.append(
                {
                    "suite": name.removeprefix("suite-"),
                    "seconds": taken(summary, "seconds"),
                    "share of scratch's time": share["seconds"],
                    "FLOPs": share["flops"],
                    "samples": share["sae_samples"],
                    "LM tokens": share["lm_tokens"],
                    "mean FVU ratio": float(np.mean(ratios)),
                    "worst": max(ratios),
                    "layers": len(ratios),
                }
            )
    return sorted(rows, key=lambda row: -row["samples"])


# --- the seed paper ---------------------------------------------------------------------------------------------


def paper_rows(folder: Path) -> list[Row]:
    """Ghilardi et al. 2024 from the CSV files of their `camera_ready` branch: hops over 1B-token SAEs of Pythia-160M.

    A row `i-j` is SAE j on the activations of layer i; FVU is 1 − explained variance, ΔCE against the clean model.
    """

    def read(path: Path) -> dict[tuple[int, int], dict[str, float]]:
        with path.open() as file:
            rows = {row[""]: row for row in csv.DictReader(file)}
        found = {}
        for key, row in rows.items():
            i, j = map(int, key.split("-"))
            clean = float(row["ce_loss_without_sae"])
            found[i, j] = {
                "score": float(row["ce_loss_score"]),
                "delta_ce": float(row["ce_loss_with_sae"]) - clean,
                "fvu": 1 - float(row["explained_variance"]),
                "l0": float(row["l0"]),
            }
        return found

    everything = read(folder / "rs-post_all.csv")
    base = {i: row for (i, j), row in everything.items() if i == j}
    rows = []
    for direction, step in (("forward", -1), ("backward", 1)):
        hops = {0.0: {i: everything[i, i + step] for i in base if (i, i + step) in everything}}
        for tokens in (100, 200, 300, 400, 500):
            found = read(folder / f"rs-post_transfer_{direction}_{tokens}M_all_mse.csv")
            hops[tokens / 1000] = {i: row for (i, _), row in found.items()}
        for share, legs in hops.items():
            rows.append(paper_row("paper, copy", direction, share, legs, base))
            if share == 0 and direction == "forward":
                less = {i: row for i, row in legs.items() if i != max(base)}
                rows.append(paper_row(f"paper, copy, without layer {max(base)}", direction, share, less, base))
    return rows


def paper_row(who: str, direction: str, share: float, legs: dict[int, Any], base: dict[int, Any]) -> Row:
    """Hops against their layers' own SAEs: the mean over layers of differences and ratios."""

    def mean_of(compare: Callable[[Any, Any], float]) -> float:
        return float(np.mean([compare(leg, base[i]) for i, leg in legs.items()]))

    return {
        "hop": who,
        "direction": direction,
        "tokens": f"{100 * share:.0f}%" if share else "0",
        "layers": len(legs),
        "CE score": mean_of(lambda leg, _: leg["score"]),
        "difference from own": mean_of(lambda leg, own: leg["score"] - own["score"]),
        "ΔCE ratio": mean_of(lambda leg, own: leg["delta_ce"] / own["delta_ce"]),
        "FVU ratio": mean_of(lambda leg, own: leg["fvu"] / own["fvu"]),
        "L0 ratio": mean_of(lambda leg, own: leg["l0"] / own["l0"]),
    }


def paper_table(r: Results, paper: Path | None) -> list[Row]:
    """The paper's numbers and ours, seed 0, at the budgets nearest to theirs."""
    if r.model != "demo":
        return []
    rows = paper_rows(paper) if paper else []
    for kind in CURVES:
        for direction in DIRECTIONS:
            for points in by_label(r.hops(kind, direction, seed=0)).values():
                legs = {p.layer: as_paper(p) for p in points}
                base = {p.layer: as_paper(c) for p in points if (c := r.control(p.layer))}
                share = points[0].tokens / max(c.tokens for layer in r.layers if (c := r.control(layer)))
                if share == 0 or share > 0.04:
                    rows.append(paper_row(f"ours, {kind}", direction, share, legs, base))
    return rows


def as_paper(p: Point) -> dict[str, float | None]:
    """A leg in the paper's terms."""
    return {"score": p.ce_score, "delta_ce": p.delta_ce, "fvu": p.fvu, "l0": p.l0}


def all_tables(models: Sequence[Results], paper: Path | None) -> dict[str, dict[str, list[Row]]]:
    """Every table of every model, by name."""
    makers: dict[str, Callable[[Results], list[Row]]] = {
        "status": status_table,
        "direction": direction_table,
        "zero-shot": lambda r: quality_table(r, zero_shot=True),
        "trained": lambda r: quality_table(r, zero_shot=False),
        "delta-ce": delta_ce_table,
        "tokens-to-quality": reach_table,
        "tried": tried_table,
        "head-start": head_start_table,
        "distance": distance_table,
        "forks": fork_table,
        "reuse": reuse_table,
        "groups": groups_table,
        "suites": suites_table,
        "pareto": pareto_table,
        "alive": alive_table,
        "scratch": scratch_table,
        "scratch-ce": scratch_ce_table,
        "paper": lambda r: paper_table(r, paper),
    }
    return {name: {r.model: make(r) for r in models} for name, make in makers.items()}
