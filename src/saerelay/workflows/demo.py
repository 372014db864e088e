"""`saerelay demo`: the full pipeline on the built-in model, in minutes, offline."""

import shutil
from pathlib import Path

from rich.console import Console

from saerelay.errors import RunDirectoryError
from saerelay.files import write_text
from saerelay.planning.recipe import DataSpec, EvaluateSpec, HopSpec, PlanSpec, Recipe, TrainSpec
from saerelay.runs.directory import RunDirectory, sole_writer
from saerelay.runs.documents.quality import Summary
from saerelay.runs.state import clear_state
from saerelay.sae.architectures import TopK
from saerelay.sae.spec import DictionarySpec
from saerelay.workflows.launch import train_run
from saerelay.workflows.report import report_run

MARK = ".saerelay-demo"
"""Marks a directory that a demo made, so that the next demo may replace it."""

DEMO = Recipe(
    data=DataSpec(epochs=2),  # needed only where Python comes without the standard library's tests (as in Debian)
    dictionary=DictionarySpec(expansion=16, activation=TopK(k=24)),
    plan=PlanSpec(
        preset="hub",
        root_tokens=1_000_000,
        transfer_tokens=125_000,
        hop=HopSpec(refit_tokens=31_744),  # one block, which is quick
        controls=[2, 6],
    ),
    train=TrainSpec(batch_tokens=512),
    evaluate=EvaluateSpec(tokens=32_768),
)
"""One root, transferred to all other layers, and from-scratch controls for two of them."""


def run_demo(out: Path, console: Console | None) -> Summary:
    """Train, transfer, evaluate and report; replaces an earlier demo in `out`, and nothing else.

    Raises RunDirectoryError if `out` holds anything but a demo.
    """
    if out.exists():
        clear_demo(out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / MARK, "made by `saerelay demo`; the next demo replaces this directory\n")
    suite = train_run(DEMO, out, resume=True, console=console)
    report_run(suite, console=console)
    return Summary.load(RunDirectory(out).summary)


def clear_demo(out: Path) -> None:
    """Remove an earlier demo, except its lock."""
    if not out.is_dir():
        raise RunDirectoryError(f"{out} is a file; choose another --out")
    entries = {entry.name for entry in out.iterdir()}
    if not entries - {f".{MARK}.tmp"}:  # the earlier demo was killed before it was marked
        return
    if MARK not in entries:
        raise RunDirectoryError(f"{out} holds something that is not a demo; move it away or choose another --out")
    with sole_writer(out):
        for entry in out.iterdir():
            if entry.name in ("state", MARK):
                continue
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        clear_state(out / "state")
