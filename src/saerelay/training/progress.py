"""The display of a run in training: a live table on a terminal, plain lines elsewhere."""

import sys
import time
from typing import IO, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from saerelay.planning.plan import Plan
from saerelay.spec import format_count
from saerelay.training import engine


class Watcher(Protocol):
    """Is told how training proceeds; never changes it."""

    def tick(self, cursor: int) -> None:
        """Note that the stream has come to `cursor`."""

    def leg(self, leg_id: str, progress: engine.Progress) -> None:
        """Note a leg's averages since its last report."""


class Speed:
    """Tokens per second, known once a whole block is done: the language model reads all of a block at its start."""

    def __init__(self, plan: Plan, cursor: int) -> None:
        self.plan = plan
        self.first = cursor
        self.began = time.monotonic()
        self.rate: float | None = None

    def tick(self, cursor: int) -> None:
        """Note that the stream has come to `cursor`."""
        ends_block = cursor % self.plan.block_tokens == 0
        if ends_block and cursor - self.first >= self.plan.block_tokens:
            self.rate = (cursor - self.first) / max(time.monotonic() - self.began, 1e-9)

    def said(self, cursor: int) -> str:
        """The rate, and the time left from `cursor`, as text."""
        if self.rate is None:
            return "measuring the speed"
        left = (self.plan.n_tokens - cursor) / self.rate
        return f"{format_count(round(self.rate))} tokens/s  {left:.0f} s left"


class PlainLog:
    """A line every few seconds, for logs and pipes."""

    def __init__(self, plan: Plan, cursor: int = 0, *, every_seconds: float = 10.0, out: IO[str] = sys.stderr) -> None:
        self.plan = plan
        self.every = every_seconds
        self.out = out
        self.speed = Speed(plan, cursor)
        self.told = time.monotonic()
        self.legs: dict[str, engine.Progress] = {}

    def tick(self, cursor: int) -> None:
        """See `Watcher`."""
        self.speed.tick(cursor)
        now = time.monotonic()
        if now - self.told < self.every and cursor < self.plan.n_tokens:
            return
        self.told = now
        legs = "  ".join(f"{leg_id} {p.fvu:.4f}/{p.l0:.1f}" for leg_id, p in list(self.legs.items())[:6])
        more = f" (+{len(self.legs) - 6})" if len(self.legs) > 6 else ""
        done = f"{format_count(cursor):>6} of {format_count(self.plan.n_tokens)} tokens"
        shown = f"  training FVU/L0: {legs}{more}" if legs else ""  # in training units: not the FVU of `eval`
        print(f"{done}  {self.speed.said(cursor)}{shown}", file=self.out, flush=True)
        self.legs = {}

    def leg(self, leg_id: str, progress: engine.Progress) -> None:
        """See `Watcher`."""
        self.legs[leg_id] = progress


class LiveTable:
    """A progress bar and a table of legs that refreshes itself; use as a context manager."""

    def __init__(self, plan: Plan, console: Console, cursor: int = 0) -> None:
        self.plan = plan
        self.cursor = cursor
        self.speed = Speed(plan, cursor)
        self.legs: dict[str, engine.Progress] = {}
        self.bar = Progress(
            TextColumn("{task.fields[done]} of {task.fields[all]} tokens"),
            BarColumn(),
            TextColumn("{task.fields[speed]}"),
        )
        self.task = self.bar.add_task(
            "",
            total=plan.n_tokens,
            completed=cursor,
            done="0",
            all=format_count(plan.n_tokens),
            speed=self.speed.said(0),
        )
        self.live = Live(console=console, refresh_per_second=4, get_renderable=self._render)

    def __enter__(self) -> "LiveTable":
        self.live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.__exit__(None, None, None)

    def tick(self, cursor: int) -> None:
        """See `Watcher`."""
        self.cursor = cursor
        self.speed.tick(cursor)
        self.bar.update(self.task, completed=cursor, done=format_count(cursor), speed=self.speed.said(cursor))

    def leg(self, leg_id: str, progress: engine.Progress) -> None:
        """See `Watcher`."""
        self.legs[leg_id] = progress

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for name in ("leg", "tokens", "training FVU", "L0", "dead", "lr"):
            table.add_column(name, justify="left" if name == "leg" else "right")
        live = {leg.id for leg in self.plan.legs if leg.start <= self.cursor <= leg.end}
        shown = [(i, p) for i, p in self.legs.items() if i in live]
        for leg_id, p in shown[:20]:
            table.add_row(
                leg_id, format_count(p.age), f"{p.fvu:.4f}", f"{p.l0:.1f}", str(p.n_dead), f"{p.learning_rate:.1e}"
            )
        return Group(self.bar, table)
