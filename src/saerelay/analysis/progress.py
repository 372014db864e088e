"""Progress of an analysis: a bar with the rate and the time left; in a file or a pipe, an occasional line."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")


class Track(Protocol):
    """Yields the items of a sequence one by one, and may show its progress."""

    def __call__(self, items: Sequence[T], label: str, /) -> Iterable[T]: ...


Done = Callable[[], object]
"""Called after each step of some work."""


def uncounted() -> None:
    """Count nothing."""


class RateColumn(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        """Render the rate, once it is known."""
        rate = task.finished_speed or task.speed
        return Text("" if rate is None else f"{rate:.3g}/s")


PLAIN_EVERY = 10.0
"""Seconds between two lines if there is no terminal; work that is done sooner prints nothing."""


class PlainCount:
    """Counts steps in lines of text, for a file or a pipe."""

    def __init__(self, console: Console, n_steps: int, label: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.n_steps = n_steps
        self.label = label
        self.clock = clock
        self.n_done = 0
        self.began = self.told = clock()

    def done(self) -> None:
        """Count a step that is done, and print a line if the last one was printed long ago."""
        self.n_done += 1
        now = self.clock()
        if now - self.told < PLAIN_EVERY:
            return
        self.told = now
        left = (now - self.began) / self.n_done * (self.n_steps - self.n_done)
        self.console.print(f"{self.label}: {self.n_done} of {self.n_steps}, {left:.0f} s left", markup=False)


@contextmanager
def _bar(console: Console, n_steps: int, label: str) -> Iterator[Done]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
    task = bar.add_task(label, total=n_steps)
    with bar:
        yield partial(bar.advance, task)


@contextmanager
def _lines(console: Console, n_steps: int, label: str) -> Iterator[Done]:
    yield PlainCount(console, n_steps, label).done


class ProgressDisplay:
    """Bars and messages on a console, one at a time: one that begins inside another shows nothing."""

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self.showing = False

    def track(self, items: Sequence[T], label: str) -> Iterator[T]:
        """Yield the items one by one, under a bar with the rate and the time left."""
        with self.counting(len(items), label) as done:
            for item in items:
                yield item
                done()

    @contextmanager
    def counting(self, n_steps: int, label: str) -> Iterator[Done]:
        """Show a bar with the rate and the time left, for work that reports each finished step."""
        if self.console is None or self.showing:
            yield uncounted
            return
        count = _bar if self.console.is_terminal else _lines
        self.showing = True
        try:
            with count(self.console, n_steps, label) as done:
                yield done
        finally:
            self.showing = False

    @contextmanager
    def status(self, message: str) -> Iterator[None]:
        """Show a message with a spinner while a block runs."""
        if self.console is None or self.showing or not self.console.is_terminal:
            yield
            return
        self.showing = True
        try:
            with self.console.status(message):
                yield
        finally:
            self.showing = False


HIDDEN = ProgressDisplay(None)
"""Shows nothing."""
