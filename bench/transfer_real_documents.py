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
from statistics import geometric_mean, mean, median
from typing import Any

from transfer_real_report import table, write_tables

from saerelay.files import write_json
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.quality import Evaluation, Summary
from saerelay.spec import format_count

Quality = Callable[[Sequence[float]], float]
"""ΔCE of an SAE, from those of the documents."""
QUALITIES: dict[str, Quality] = {"mean": mean, "median": median}


@dataclass(frozen=True)
class Measured:
    """ΔCE of an SAE, by document."""

    seed: int
    job: str
    """The job that made it: scratch, hops or twice ..."""
    tokens: int
    """... and what it was trained on; together they say which row of the table it belongs to."""
    source: int | None
    """The layer that it hopped from; None from scratch."""
    layer: int
    deltas: list[float]


def read(out: Path) -> Iterator[Measured]:
    """All SAEs of a study's jobs."""
    for path in sorted(out.glob("*-s[0-9]/summary.json")):
        job, _, seed = path.parent.name.rpartition("-s")
        run = RunDirectory(path.parent)
        for leg in Summary.load(path).legs:
            evaluation = Evaluation.load(run.evaluation(leg.id))
            hop = re.match(r"L(\d+)-L(\d+)-", leg.id)
            source = int(hop[1]) if hop else None
            for tokens, metrics in {leg.tokens: evaluation.metrics, **evaluation.snapshots}.items():
                assert metrics.sequence_delta_ce is not None
                yield Measured(int(seed), job, tokens, source, leg.layer, metrics.sequence_delta_ce)


def row_of(job: str, tokens: int, measured: Sequence[Measured]) -> dict[str, Any]:
    """A row of the table: its SAEs compared with training from scratch, by the mean and by the median document."""
    own = [m for m in measured if (m.job, m.tokens) == (job, tokens)]
    row: dict[str, Any] = {"made": f"{job} {tokens}", "seeds": sorted({m.seed for m in own})}
    for name, over_documents in QUALITIES.items():
        row[name] = compared(own, measured, over_documents)
    return row


def compared(own: Sequence[Measured], measured: Sequence[Measured], over_documents: Quality) -> dict[str, Any]:
    """ΔCE over that of the full budget from scratch, of all hops of a row and of each layer's better neighbour."""
    equal, full = budgets(measured)
    scratch = {(m.tokens, m.seed, m.layer): over_documents(m.deltas) for m in measured if m.job == "scratch"}

    def delta(m: Measured) -> float:
        return over_documents(m.deltas)

    def ratio(m: Measured) -> float:
        return delta(m) / scratch[full, m.seed, m.layer]

    places = sorted({(m.seed, m.layer) for m in own})
    better = [min((m for m in own if (m.seed, m.layer) == place), key=delta) for place in places]
    return {
        "forward": [ratio(m) for m in own if m.source is not None and m.source < m.layer],
        "backward": [ratio(m) for m in own if m.source is not None and m.source > m.layer],
        "better": [ratio(m) for m in better],
        "better_than_equal_tokens": sum(delta(m) < scratch[equal, m.seed, m.layer] for m in better),
    }


def budgets(measured: Sequence[Measured]) -> tuple[int, int]:
    """The tokens from scratch: as many as a hop looks at in all, and the full budget."""
    tokens = {m.tokens for m in measured if m.job == "scratch"}
    return min(tokens), max(tokens)


def documents(out: Path, docs: Path) -> None:
    """Write the numbers and the table."""
    measured = list(read(out))
    equal, _ = budgets(measured)
    names: dict[tuple[str, int], str] = {}
    for tokens in sorted({m.tokens for m in measured if m.job == "hops"}):
        names["hops", tokens] = f"+ {format_count(tokens)}" if tokens else "no training"
    for tokens in sorted({m.tokens for m in measured if m.job == "twice"}):
        names["twice", tokens] = f"+ {format_count(tokens)}, half of them those of the map (`reuse = 2`)"
    names["scratch", equal] = f"from scratch, {format_count(equal)}"
    rows = [row_of(*made, measured) for made in names]
    layers = sorted({m.layer for m in measured})
    n_sequences = len(measured[0].deltas)
    write_json(docs / "transfer-real-documents.json", {"layers": layers, "n_sequences": n_sequences, "rows": rows})
    write_tables(docs / "transfer.md", {"real-documents": shown(rows, list(names.values()))})


def shown(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """The rows for people."""

    def mean_of(ratios: Sequence[float]) -> str:
        return f"{geometric_mean(ratios):.2f}" if ratios else "-"

    lines = []
    for name, row in zip(names, rows, strict=True):
        mean, middle = row["mean"], row["median"]
        is_hop = bool(mean["forward"])
        cells = [mean_of(mean[key]) for key in ("forward", "backward", "better")]
        cells += [f"{max(mean['better']):.2f}", mean_of(middle["better"])]
        n = len(mean["better"])
        counts = [f"{part['better_than_equal_tokens']} of {n}" if is_hop else "-" for part in (mean, middle)]
        lines.append([name, *cells, *counts])
    columns = ["", "forward", "backward", "better neighbour", "its worst layer", "better neighbour, median document"]
    columns += ["better than scratch with equal tokens", "the same, median document"]
    return table(columns, lines)
