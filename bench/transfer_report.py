"""What `bench/transfer.py report` writes: numbers as docs/transfer.json, figures, and the tables of docs/transfer.md.

A table is written between `<!-- begin:NAME -->` and `<!-- end:NAME -->`; what stands around is prose and is kept.
"""

import json
import math
from pathlib import Path
from typing import Any

from transfer_figures import draw_all
from transfer_tables import Row, all_tables, read_study, status_table

from saerelay.files import write_json, write_text
from saerelay.spec import format_count


def cell(value: Any) -> str:
    """A value as a table shows it."""
    match value:
        case None:
            return "–"
        case (float() as m, float() as low, float() as high):
            return f"{number(m)} [{number(low)}, {number(high)}]"
        case (float() as m, float() as se):
            return f"{number(m)} ± {number(se)}"
        case int():
            return format_count(value) if value >= 10_000 else str(value)
        case float():
            return number(value)
    return str(value)


def number(x: float) -> str:
    """Three figures or so."""
    if not math.isfinite(x):
        return "–"
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.3f}" if abs(x) >= 1 else f"{x:.4f}"


def markdown(tables: dict[str, list[Row]]) -> str:
    """A table a model."""
    parts = []
    for model, rows in tables.items():
        if rows:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            lines = [columns, ["---"] * len(columns), *[[cell(row.get(c)) for c in columns] for row in rows]]
            text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
            parts.append(f"**{model}**\n\n{text}")
    return "\n\n".join(parts) or "Not run yet."


def replace_block(text: str, name: str, content: str) -> str:
    """Put content between a name's markers; text without them stays as it is."""
    begin, end = f"<!-- begin:{name} -->", f"<!-- end:{name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found:
        return text
    if not closed:
        raise SystemExit(f"{begin} has no {end}")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def rounded(value: Any) -> Any:
    """Four significant figures are enough to read, and keep the file small."""
    match value:
        case float():
            return float(f"{value:.4g}")
        case dict():
            return {key: rounded(item) for key, item in value.items()}
        case list() | tuple():
            return [rounded(item) for item in value]
    return value


def report(out: Path, docs: Path, paper: Path | None) -> None:
    """Aggregate, draw, and write the tables between their markers."""
    models = [read_study(folder) for folder in sorted(out.iterdir()) if (folder / "scratch-s0").is_dir()]
    if not models:
        raise SystemExit(f"{out}: no study here; make one with `run --out {out}`")
    tables = all_tables(models, paper)
    write_json(docs / "transfer.json", rounded(tables))
    page = docs / "transfer.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    for name, table in tables.items():
        if f"<!-- begin:{name} -->" not in text:
            print(f"{page}: no marker for {name}")
        text = replace_block(text, name, markdown(table))
    if text:
        write_text(page, text)
    for path in draw_all(models, docs):
        print(f"{path}: {path.stat().st_size // 1000} kB")
    for r in models:
        print(f"{r.model}: {json.dumps(status_table(r)[0], ensure_ascii=False)}")
