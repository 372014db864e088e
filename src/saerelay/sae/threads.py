"""CPU cores shared by pieces of work, each computed by a single thread.

torch splits single operations over cores, which costs a barrier per operation and leaves cores idle in operations that
do not split. Here each thread computes whole pieces alone: pieces of one training step, or whole steps of several
dictionaries. Pieces are cut by shapes, never by the number of threads, so the bits of a result do not depend on that
number.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from queue import SimpleQueue
from typing import TypeVar

import torch

A = TypeVar("A")
R = TypeVar("R")

_mine = threading.local()
"""`n_threads`: the number of threads this thread may share its work with, itself included. `busy`: it is at work."""
_lock = threading.Lock()
_helpers: list["SimpleQueue[Callable[[], None]]"] = []


@contextmanager
def alone() -> Iterator[None]:
    """Let this thread compute with one core, so that `in_parallel` can use the others; flush denormals to zero.

    Denormal numbers (below 1e-38), to which the Adam moments of dead latents decay, would slow Adam down tenfold.
    """
    if getattr(_mine, "n_threads", 0):
        yield
        return
    _mine.n_threads = torch.get_num_threads()
    flushing = _flushes_denormals()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(_mine.n_threads)
        torch.set_flush_denormal(flushing)
        _mine.n_threads = 0


def in_parallel(function: Callable[[A], R], items: Iterable[A]) -> list[R]:
    """`[function(item) for item in items]`, computed in parallel on the cores that `alone` left free, if it did.

    >>> with alone():
    ...     in_parallel(lambda x: x * x, range(5))
    [0, 1, 4, 9, 16]
    """
    work = list(items)
    n_helpers = min(getattr(_mine, "n_threads", 0), len(work)) - 1
    if n_helpers < 1 or getattr(_mine, "busy", False):
        return [function(item) for item in work]
    results: list = [None] * len(work)
    todo = iter(range(len(work)))  # shared: each thread takes the next
    finished: SimpleQueue[BaseException | None] = SimpleQueue()

    def take() -> None:
        error = None
        _mine.busy = True
        try:
            for i in todo:
                results[i] = function(work[i])
        except BaseException as problem:
            error = problem
        _mine.busy = False
        finished.put(error)

    for helper in _first_helpers(n_helpers):
        helper.put(take)
    take()
    for error in [finished.get() for _ in range(n_helpers + 1)]:
        if error is not None:
            raise error
    return results


def side_by_side(function: Callable[[A], R], items: Iterable[A], device: torch.device, *, n_in_all: int = 0) -> list[R]:
    """`[function(item) for item in items]`, with one core per item if that keeps all cores of a CPU busy.

    `n_in_all` is the number of all items, if this process has only some of them: the bits of an item may depend on how
    it is computed, so this must not depend on which process computes it.
    """
    work = list(items)
    enough = device.type == "cpu" and max(len(work), n_in_all) >= torch.get_num_threads()
    with alone() if enough else nullcontext():
        return in_parallel(function, work)


def _first_helpers(n: int) -> "list[SimpleQueue[Callable[[], None]]]":
    """Queues of threads; each thread runs the functions put into its queue, with one core."""
    with _lock:
        while len(_helpers) < n:
            queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
            ready = threading.Event()

            def serve(queue: "SimpleQueue[Callable[[], None]]" = queue, ready: threading.Event = ready) -> None:
                torch.set_num_threads(1)
                torch.set_flush_denormal(True)
                ready.set()
                while True:
                    queue.get()()

            threading.Thread(target=serve, name=f"saerelay-{len(_helpers)}", daemon=True).start()
            ready.wait()
            _helpers.append(queue)
        return _helpers[:n]


def _flushes_denormals() -> bool:
    smallest = 5e-324
    return smallest * 1.0 == 0
