"""Progress of an analysis on a terminal: a bar with the rate and the time left; nothing elsewhere."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
        if self.console is None or self.showing:
            yield from items
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn())
        bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
        self.showing = True
        try:
            with bar:
                yield from bar.track(items, description=label)
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
