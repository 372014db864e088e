"""A leg's steps on a GPU: launched one after the other, without waiting for the device in between.

What a step needs to know, and what the host would have to ask after each, lies on the device: the leg's age with the
rates that follow from it (`Clock`), and whether its loss is still finite (`Fate`). So the same operations run in each
step on the same memory, and can be recorded once as a CUDA graph and replayed (`Replayed`), which takes the host a
fraction of the time that launching them one by one does. `Trainee.settle` asks the device, once a block.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

STEPS_AHEAD = 256
"""Steps whose rates are computed and copied to the device at once."""
STEPS_BEFORE_RECORDING = 3
"""Steps of a shape taken as they are, which compile kernels and claim memory, before one is recorded."""


class Now(NamedTuple):
    """What a step depends on of its leg's age: numbers on a processor, single-number tensors on a GPU."""

    age: int | Tensor
    """Before the step."""
    learning_rate: float | Tensor
    warmth: float | Tensor
    """Share of the penalty's weight in force."""


class Clock:
    """A leg's age, and what follows from it, on a device.

    >>> clock = Clock(torch.device("cpu"))
    >>> clock.set([Now(0, 0.1, 0.0), Now(512, 0.2, 0.5)])
    >>> clock.tick()
    >>> clock.now().age, clock.now().learning_rate
    (tensor(512), tensor(0.2000))
    """

    def __init__(self, device: torch.device) -> None:
        self.ages = torch.zeros(STEPS_AHEAD, dtype=torch.int64, device=device)
        self.rates = torch.zeros(STEPS_AHEAD, 2, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.n_left = 0
        """Steps that the host may still launch before it has to `set` the clock; the host counts them."""

    def set(self, steps: Sequence[Now]) -> None:
        """Let the coming steps, at most STEPS_AHEAD, be these."""
        ages = torch.tensor([step.age for step in steps])
        rates = torch.tensor([(step.learning_rate, step.warmth) for step in steps])
        for table, rows in ((self.ages, ages), (self.rates, rates)):
            pinned = rows.pin_memory() if table.device.type == "cuda" else rows
            table[: len(steps)].copy_(pinned, non_blocking=True)
        self.place.zero_()
        self.n_left = len(steps)

    def now(self) -> Now:
        """The step that comes next."""
        rates = self.rates.index_select(0, self.place)[0]
        return Now(self.ages.index_select(0, self.place)[0], rates[0], rates[1])

    def tick(self) -> None:
        """Go on to the step after it."""
        self.place.add_(1)


class Verdict(NamedTuple):
    """What the host learns of the steps it launched."""

    failed: bool
    age: int
    """After the last step whose loss was finite."""
    loss: float
    """Of the last step, or of the first that was not finite."""


@dataclass
class Fate:
    """Whether a leg's loss was finite in all its steps, on a device; from the first that was not on, nothing moves."""

    failed: Tensor
    """float32, 0 or 1: what Adam's kernel takes."""
    age: Tensor
    """int64: after the last good step."""
    loss: Tensor

    @classmethod
    def at(cls, age: int, device: torch.device) -> "Fate":
        """That of a leg which is well at some age."""
        return cls(
            failed=torch.zeros((), device=device),
            age=torch.full((), age, dtype=torch.int64, device=device),
            loss=torch.zeros((), device=device),
        )

    def judge(self, loss: Tensor, age: Tensor) -> None:
        """Take in the loss of a step after which the leg has an age."""
        is_over = self.failed > 0
        self.loss.copy_(torch.where(is_over, self.loss, loss.float()))
        self.failed.copy_((is_over | ~torch.isfinite(loss)).float())
        self.age.copy_(torch.where(self.failed > 0, self.age, age))

    def verdict(self) -> Verdict:
        """What became of the leg; the host waits for the device."""
        failed, age, loss = torch.stack([self.failed.double(), self.age.double(), self.loss.double()]).tolist()
        return Verdict(bool(failed), int(age), loss)


class Stopwatch:
    """Seconds that a device spends on what is launched between `start` and `stop`."""

    def __init__(self) -> None:
        self.spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin a span."""
        begin = torch.cuda.Event(enable_timing=True)
        begin.record()
        self.spans.append((begin, torch.cuda.Event(enable_timing=True)))

    def stop(self) -> None:
        """End it."""
        self.spans[-1][1].record()

    def read(self) -> float:
        """Seconds since the last reading; the host waits for the device."""
        seconds = 0.0
        for begin, end in self.spans:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1e3
        self.spans.clear()
        return seconds


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    given: tuple[Tensor | None, ...]
    """What it reads."""


class Replayed:
    """A function of a batch, one or two tensors, that is recorded as a CUDA graph for each shape, and then replayed.

    It must run the same operations on the same memory each time, must not wait for the device, and returns nothing.
    Where recording fails, the function is called as it is from then on, and a warning says so.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.recordings: dict[tuple, _Recording] = {}
        self.n_calls: Counter[tuple] = Counter()
        """By shapes: each compiles kernels of its own."""
        self.can_record = True

    def __call__(self, x: Tensor, target: Tensor | None = None) -> None:
        """Call the function, or replay what it did."""
        given = (x, target)
        shapes = _shapes(given)
        recording = self.recordings.get(shapes)
        if recording is None and self.can_record and self.n_calls[shapes] >= STEPS_BEFORE_RECORDING:
            recording = self._record(given)
        if recording is None:
            self.n_calls[shapes] += 1
            self.function(x, target)
            return
        for kept, tensor in zip(recording.given, given, strict=True):
            if kept is not None and tensor is not None:
                kept.copy_(tensor)
        recording.graph.replay()

    def _record(self, given: tuple[Tensor, Tensor | None]) -> _Recording | None:
        """The graph for the shapes of what is given; recording computes nothing."""
        copies = tuple(None if tensor is None else tensor.clone() for tensor in given)
        recording = _Recording(torch.cuda.CUDAGraph(), copies)
        device = given[0].device
        graphs = _graphs.setdefault(device, WeakSet())
        pool = next((graph.pool() for graph in graphs), None)
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device)
        before = torch.cuda.current_stream(device)
        try:
            with torch.cuda.graph(
                recording.graph, pool=pool, stream=_streams[device], capture_error_mode="thread_local"
            ):
                self.function(*recording.given)
        except RuntimeError as error:
            self.can_record = False
            torch.cuda.set_stream(before)  # a recording that breaks off leaves its own stream behind
            torch.cuda.synchronize(device)
            warnings.warn(
                f"a training step could not be recorded as a CUDA graph ({str(error).splitlines()[0]}); "
                "it runs without one, more slowly",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        graphs.add(recording.graph)
        self.recordings[_shapes(given)] = recording
        return recording


def _shapes(given: tuple[Tensor | None, ...]) -> tuple:
    return tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in given)


_graphs: dict[torch.device, WeakSet[torch.cuda.CUDAGraph]] = {}
"""Those that exist. They share the memory for what a step makes and forgets, since one is replayed after the other."""
_streams: dict[torch.device, torch.cuda.Stream] = {}
"""What is recorded, and not run, on a device."""
