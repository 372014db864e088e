"""Comparisons across layers: the matrix, and the measures of Ghilardi et al. 2024."""

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from saerelay.runs.documents.across_layers import (
    Attribution,
    Matrix,
    MatrixCell,
    Measures,
    Similarity,
    Transferability,
)
from saerelay.spec import format_count
from saerelay.views.labels import METHODS, METRICS
from saerelay.views.text import decimal, percent


def matrix_tables(matrix: Matrix) -> list[Text | Table]:
    """Show FVU, and ΔCE if measured, of every leg at every layer: one titled table per metric and method."""
    cells = [cell for cell in matrix.cells if not cell.snapshot]
    tables: list[Text | Table] = []
    for metric in ("fvu", "delta_ce"):
        if all(getattr(cell, metric) is None for cell in cells):
            continue
        for method in dict.fromkeys(cell.method for cell in cells):
            how = METHODS.get(method, method)
            if method == "identity":
                how += " (zero-shot)"
            name = METRICS[metric][0]
            tables.append(Text(f"\n{name} of each SAE on the activations of each layer: {how}"))
            tables.append(_matrix_table(matrix, cells, metric, method))
    n_tokens = format_count(matrix.n_tokens)
    fitted = format_count(matrix.map_tokens)
    tables.append(Text(f"\n{n_tokens} held-out tokens; maps fitted on {fitted} training tokens. Bold: own layer."))
    return tables


def _matrix_table(matrix: Matrix, cells: list[MatrixCell], metric: str, method: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("SAE", overflow="fold")
    for layer in matrix.layers:
        table.add_column(f"on {layer}", justify="right")
    for leg in matrix.asked.legs:
        row = {}
        for cell in cells:
            if cell.leg != leg:
                continue
            if cell.source == cell.target:  # measured once, for all methods
                row[cell.target] = f"[bold]{decimal(getattr(cell, metric))}[/bold]"
            elif cell.method == method:
                row[cell.target] = decimal(getattr(cell, metric))
        table.add_row(escape(leg), *(row.get(layer, "-") for layer in matrix.layers))
    return table


def measures_tables(measures: Measures) -> list[Table]:
    """Show what each transferred leg shares with its parent, its transfer scores, and mean FVU by layer offset."""
    tables = (_transfer_table(measures), _score_table(measures), _offset_table(measures))
    return [table for table in tables if table.row_count]


def _transfer_table(measures: Measures) -> Table:
    table = Table(box=None, pad_edge=False, title_justify="left", caption_justify="left")
    table.title = "what transfers, and direct logit attribution (DLA)"
    table.caption = (
        "MMCS: mean maximum cosine similarity of the parent's latents with the leg's; folded: after folding the parent "
        "through the map between the layers. The shares are defined in docs/run-directory.md."
    )
    for name in ("leg", "parent"):
        table.add_column(name, overflow="fold")
    for name in ("MMCS", "folded", "transferability", "top logits", "bottom logits", "top tokens", "DLA"):
        longest_word = max(map(len, name.split()))  # so that a narrow terminal breaks names between words
        table.add_column(name, justify="right", min_width=longest_word)

    hops = {}
    for row in measures.similarity:
        if row.kind == "hop" and not row.snapshot and row.leg == row.target:
            hops[row.leg] = row
    shares = {row.leg: row for row in measures.transferability or () if not row.snapshot}
    effects = {}
    if measures.dla:
        table.caption += f" DLA: {measures.dla.n_prompts} prompts, {escape(measures.dla.prompts)}."
        for row in measures.dla.legs:
            if not row.snapshot:
                effects[row.leg] = _effect(row)
    for leg in dict.fromkeys([*effects, *hops]):
        similarity = _similarity_columns(hops.get(leg))
        table.add_row(escape(leg), *similarity, *_share_columns(shares.get(leg)), effects.get(leg, "-"))
    return table


def _effect(row: Attribution) -> str:
    """Return an attribution with its standard error, which a single prompt does not have."""
    if row.mean is None:
        return "-"
    return f"{row.mean:.3g}" if row.standard_error is None else f"{row.mean:.3g} ± {row.standard_error:.2g}"


def _similarity_columns(hop: Similarity | None) -> list[str]:
    if hop is None:
        return ["", "-", "-"]
    return [escape(hop.source), decimal(hop.mmcs), decimal(hop.mmcs_folded)]


def _share_columns(row: Transferability | None) -> list[str]:
    if row is None:
        return ["-"] * 4
    return [percent(share) for share in (row.transferability, row.top_logits, row.bottom_logits, row.top_tokens)]


def _score_table(measures: Measures) -> Table:
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.title = "normalised transfer score: 0 is zero-shot, 1 is from scratch"
    for name in ("leg", "zero-shot method", "from scratch"):
        table.add_column(name)
    for name in ("scratch tokens", "FVU", "CE score"):
        table.add_column(name, justify="right")
    for row in measures.transfer_scores or ():
        if not row.snapshot:
            scores = (decimal(row.fvu), decimal(row.ce_loss_score))
            how = escape(METHODS.get(row.method, row.method))
            tokens = format_count(row.scratch_tokens)
            table.add_row(escape(row.leg), how, escape(row.scratch), tokens, *scores)
    return table


def _offset_table(measures: Measures) -> Table:
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.title = "mean zero-shot FVU by layer offset (target layer − source layer)"
    table.add_column("method")
    rows = [row for row in measures.offsets or () if row.metric == "fvu" and row.tokens is None]
    offsets = sorted({row.offset for row in rows})
    for offset in offsets:
        table.add_column(f"{offset:+d}" if offset else "0", justify="right")
    kinds = list(dict.fromkeys(row.kind for row in rows))
    for kind in kinds:
        of_kind = [row for row in rows if row.kind == kind]
        for method in dict.fromkeys(row.method for row in of_kind):
            means = {row.offset: row.mean for row in of_kind if row.method == method}
            name = METHODS.get(method, method)
            if len(kinds) > 1:
                name = f"{kind}: {name}"
            table.add_row(escape(name), *(decimal(means.get(offset)) for offset in offsets))
    return table
