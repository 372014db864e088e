"""Show the progress of a run: a live table on a terminal, plain lines elsewhere, and the loggers a recipe names."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from rich.console import Console
from rich.text import Text

from saerelay.planning.plan import Plan
from saerelay.runs.directory import RunDirectory
from saerelay.runs.state import state_facts
from saerelay.training.progress import LiveTable, PlainLog, Watcher
from saerelay.training.run_state import machine
from saerelay.training.trackers import Several, loggers_of


def status(console: Console | None, message: str | Text) -> AbstractContextManager[object]:
    """Show a message with a spinner while a block runs; nothing without a console."""
    return console.status(message) if console else nullcontext()


@contextmanager
def watching(plan: Plan, paths: RunDirectory, console: Console | None) -> Iterator[Watcher]:
    """Make the watchers of a run; nothing is printed without a console."""
    saved = state_facts(paths.state)
    cursor = saved["cursor"] if saved else 0
    here = machine(torch.device(plan.facts.device))
    if saved and console and saved["machine"] != here:
        console.print(
            f"note: this run was begun with {saved['machine']}, and this is {here}: it continues, but its weights "
            "will not be bitwise those of an uninterrupted run"
        )
    with loggers_of(plan, paths) as loggers:
        if console is None:
            yield loggers
        elif console.is_terminal:
            with LiveTable(plan, console, cursor) as table:
                yield Several([table, loggers])
        else:
            yield Several([PlainLog(plan, cursor, out=console.file), loggers])
