"""Progress of an analysis on a terminal: a bar with the rate and the time left; nothing elsewhere."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")


class Track(Protocol):
    """Gives the items of a sequence one by one, and may show how far it has come."""

    def __call__(self, items: Sequence[T], label: str, /) -> Iterable[T]: ...


def untracked(items: Sequence[T], label: str) -> Iterable[T]:
    """The items, without showing anything."""
    return items


Done = Callable[[], object]
"""Is called after each step of some work."""


def uncounted() -> None:
    """Counts nothing."""


class RateColumn(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        """The rate, once it is known."""
        rate = task.finished_speed or task.speed
        return Text("" if rate is None else f"{rate:.3g}/s")


class ProgressDisplay:
    """Bars and messages on a console, one at a time: what begins inside another shows nothing."""

    def __init__(self, console: Console | None) -> None:
        self.console = console if console is not None and console.is_terminal else None
        self.showing = False

    def track(self, items: Sequence[T], label: str) -> Iterator[T]:
        """The items one by one, under a bar with the rate and the time left."""
        with self.counting(len(items), label) as done:
            for item in items:
                yield item
                done()

    @contextmanager
    def counting(self, n_steps: int, label: str) -> Iterator[Done]:
        """A bar with the rate and the time left, for work that says when each of its steps is done."""
        if self.console is None or self.showing:
            yield uncounted
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn())
        bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
        task = bar.add_task(label, total=n_steps)
        self.showing = True
        try:
            with bar:
                yield partial(bar.advance, task)
        finally:
            self.showing = False

    @contextmanager
    def status(self, message: str) -> Iterator[None]:
        """A message with a spinner while a block runs."""
        if self.console is None or self.showing:
            yield
            return
        self.showing = True
        try:
            with self.console.status(message):
                yield
        finally:
            self.showing = False
