"""What `bench/transfer.py report` makes of a study: results as JSON, figures, and the tables of docs/transfer.md."""

from pathlib import Path


def report(out: Path, docs: Path, paper: Path | None) -> None:
    """Aggregate, draw, and write the tables between their markers."""
    raise SystemExit("not there yet")
