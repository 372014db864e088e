"""What hops of `transfer_real.py` are worth on many documents, as docs/transfer-real-documents.json and as a table.

    python bench/transfer_real.py run ... --only scratch,hops,twice --seeds 1 --out study
    python bench/transfer_real.py documents --out study --docs docs

Held-out sequences are of one document each, and some documents are of a kind that most SAEs hardly saw: a mean over
documents depends on few of them. So the median document stands beside the mean.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from transfer_real_report import table, write_tables

from saerelay.files import write_json
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.quality import Evaluation, EvaluationMetrics, Summary
from saerelay.spec import format_count


@dataclass(frozen=True)
class Measured:
    """ΔCE of an SAE, by document."""

    seed: int
    made: str
    """Which row of the table it belongs to."""
    source: int | None
    """The layer that it hopped from; None from scratch."""
    layer: int
    deltas: list[float]

    @property
    def mean(self) -> float:
        """ΔCE over all documents."""
        return sum(self.deltas) / len(self.deltas)

    @property
    def median(self) -> float:
        """ΔCE of the median document."""
        return median(self.deltas)


Quality = Callable[[Measured], float]


def read(out: Path) -> Iterator[Measured]:
    """All SAEs of a study's jobs."""
    for path in sorted(out.glob("*-s[0-9]/summary.json")):
        job, _, seed = path.parent.name.rpartition("-s")
        run = RunDirectory(path.parent)
        for leg in Summary.load(path).legs:
            evaluation = Evaluation.load(run.evaluation(leg.id))
            hop = re.match(r"L(\d+)-L(\d+)-", leg.id)
            source = int(hop[1]) if hop else None
            name = f"{job} {leg.tokens}"
            yield Measured(int(seed), name, source, leg.layer, by_document(evaluation.metrics))
            for age, metrics in evaluation.snapshots.items():
                yield Measured(int(seed), f"{job} {age}", source, leg.layer, by_document(metrics))


def by_document(metrics: EvaluationMetrics) -> list[float]:
    """ΔCE of each held-out sequence."""
    assert metrics.sequence_delta_ce is not None
    return metrics.sequence_delta_ce


def row_of(made: str, measured: Sequence[Measured], full: str, equal: str) -> dict[str, Any]:
    """A row: ΔCE over that of the full budget at the same layer and seed, geometric means over layers and seeds."""
    scratch = {(m.made, m.seed, m.layer): m for m in measured if m.source is None}
    own = [m for m in measured if m.made == made]

    def ratio(m: Measured, quality: Quality) -> float:
        return quality(m) / quality(scratch[full, m.seed, m.layer])

    def better(quality: Quality) -> list[Measured]:
        """The better neighbour of each layer."""
        places = sorted({(m.seed, m.layer) for m in own})
        return [min((m for m in own if (m.seed, m.layer) == place), key=quality) for place in places]

    row: dict[str, Any] = {"made": made, "seeds": sorted({m.seed for m in own})}
    for name, quality in (("mean", Measured.mean.fget), ("median", Measured.median.fget)):
        assert quality is not None
        best = better(quality)
        row[name] = {
            "forward": [ratio(m, quality) for m in own if m.source is not None and m.source < m.layer],
            "backward": [ratio(m, quality) for m in own if m.source is not None and m.source > m.layer],
            "better": [ratio(m, quality) for m in best],
            "better_than_equal_tokens": sum(quality(m) < quality(scratch[equal, m.seed, m.layer]) for m in best),
        }
    return row


def documents(out: Path, docs: Path) -> None:
    """Write the numbers and the table."""
    measured = list(read(out))
    budgets = sorted({int(m.made.split()[1]) for m in measured if m.source is None})
    equal, full = f"scratch {budgets[0]}", f"scratch {budgets[-1]}"
    hops = sorted({int(m.made.split()[1]) for m in measured if m.made.startswith("hops")})
    names = {f"hops {n}": f"+ {format_count(n)}" if n else "no training" for n in hops}
    for m in measured:
        if m.made.startswith("twice"):
            tokens = int(m.made.split()[1])
            names[m.made] = f"+ {format_count(tokens)}, half of them those of the map (`reuse = 2`)"
    names[equal] = f"from scratch, {format_count(budgets[0])}"
    rows = [row_of(made, measured, full, equal) for made in names]
    layers = sorted({m.layer for m in measured})
    n_documents = len(measured[0].deltas)
    write_json(docs / "transfer-real-documents.json", {"layers": layers, "n_sequences": n_documents, "rows": rows})
    write_tables(docs / "transfer.md", {"real-documents": shown(rows, names)})


def shown(rows: Sequence[dict[str, Any]], names: dict[str, str]) -> str:
    """The rows for people."""

    def mean_of(ratios: Sequence[float]) -> str:
        return f"{geometric_mean(ratios):.2f}" if ratios else "-"

    lines = []
    for row in rows:
        mean, middle = row["mean"], row["median"]
        is_hop = bool(mean["forward"])
        cells = [mean_of(mean[key]) for key in ("forward", "backward", "better")]
        cells += [f"{max(mean['better']):.2f}", mean_of(middle["better"])]
        n = len(mean["better"])
        counts = [f"{part['better_than_equal_tokens']} of {n}" if is_hop else "-" for part in (mean, middle)]
        lines.append([names[row["made"]], *cells, *counts])
    columns = ["", "forward", "backward", "better neighbour", "its worst layer", "better neighbour, median document"]
    columns += ["better than scratch with equal tokens", "the same, median document"]
    return table(columns, lines)
