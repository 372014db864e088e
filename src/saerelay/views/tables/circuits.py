"""The circuits of a task."""

from rich.table import Table
from rich.text import Text

from saerelay.runs.documents.circuits import Circuits
from saerelay.views.text import visible, with_error


def circuit_tables(document: Circuits) -> list[Text | Table]:
    """Show faithfulness and completeness of each leg's circuits, and of transferred legs minus legs from scratch."""
    asked = document.asked
    head = (
        f"{visible(asked.task)}: {document.model} answers {document.accuracy:.1%} of {asked.n_prompts} prompts right, "
        f"mean logit difference {document.m:.3g} ± {document.m_se:.2g}. Circuits of K latents were found on "
        f"{document.n_found_on} prompts by {asked.method}, and evaluated on the other {document.n_judged_on}."
    )
    faithfulness = _table("faithfulness (ideal: 1)", ("leg", "∅"), asked.k)
    completeness = _table("completeness (ideal: 0)", ("leg", "∅"), asked.k)
    for row in document.legs:
        empty = f"{sum(row.m_empty) / len(row.m_empty):.2f}"
        with_circuit = [with_error(circuit.faithfulness, circuit.faithfulness_se, 2) for circuit in row.circuits]
        without_circuit = [with_error(circuit.completeness, circuit.completeness_se, 2) for circuit in row.circuits]
        faithfulness.add_row(row.leg, empty, *with_circuit)
        completeness.add_row(row.leg, empty, *without_circuit)

    differences = _table("faithfulness: transferred − from scratch", ("leg", "scratch"), asked.k)
    pairs: dict[tuple[str, str], list[str]] = {}
    for row in document.differences:
        name = (row.leg or "mean", row.scratch or f"all {row.kind}")
        pairs.setdefault(name, []).append(with_error(row.faithfulness, row.faithfulness_se, 2))
    for name, cells in pairs.items():
        differences.add_row(*name, *cells)

    end = (
        "\n∅: mean logit difference with all latents ablated, each at its mean over prompts; the SAE's "
        "reconstruction error stays in place. ±: standard error over prompts."
    )
    tables = [table for table in (faithfulness, completeness, differences) if table.row_count]
    return [Text(head), *tables, Text(end)]


def _table(title: str, columns: tuple[str, str], sizes: list[int]) -> Table:
    table = Table(box=None, pad_edge=False, title=f"\n{title}", title_justify="left")
    for name in columns:
        table.add_column(name, justify="right" if name == "∅" else "left")
    for size in sizes:
        table.add_column(f"K = {size}", justify="right")
    return table
