"""A leg's steps on a GPU: launched one after the other, without waiting for the device in between.

All that a step needs to know, or that the host would have to ask after each step, is on the device: the leg's age with
the rates that follow from it (`Clock`), and whether its loss is still finite (`Fate`). So each step runs the same
operations on the same memory, and can be recorded once as a CUDA graph and replayed (`Recordings`), which takes the
host a fraction of the time of launching the operations one by one. `Trainee.settle` asks the device, once per block.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

STEPS_AHEAD = 256
"""Number of steps whose rates are computed and copied to the device at once."""
MORE_ROOM = 1.5
"""Room for codes, over the most codes that a batch had."""
STEPS_BEFORE_RECORDING = 3
"""Number of steps run unrecorded, to compile kernels and allocate memory, before a step is recorded."""

Function = Callable[[Tensor, Tensor | None], None]
"""What is done on the device with a batch, and with what it is to be reconstructed as, if that is not itself."""


class Now(NamedTuple):
    """The quantities of a step that depend on its leg's age: numbers on a CPU, zero-dimensional tensors on a GPU."""

    age: int | Tensor
    """The age before the step."""
    learning_rate: float | Tensor
    warmth: float | Tensor
    """Share of the penalty's weight in force."""


class Clock:
    """A leg's age, and the rates that follow from it, on a device.

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
        """Steps that the host may still launch before it must `set` the clock; counted on the host."""

    def set(self, steps: Sequence[Now]) -> None:
        """Set the coming steps, at most STEPS_AHEAD."""
        ages = torch.tensor([step.age for step in steps])
        rates = torch.tensor([(step.learning_rate, step.warmth) for step in steps])
        for table, rows in ((self.ages, ages), (self.rates, rates)):
            pinned = rows.pin_memory() if table.device.type == "cuda" else rows
            table[: len(steps)].copy_(pinned, non_blocking=True)
        self.place.zero_()
        self.n_left = len(steps)

    def now(self) -> Now:
        """The coming step."""
        rates = self.rates.index_select(0, self.place)[0]
        return Now(self.ages.index_select(0, self.place)[0], rates[0], rates[1])

    def tick(self) -> None:
        """Advance by one step."""
        self.place.add_(1)


class Verdict(NamedTuple):
    """What the host learns about the steps it launched."""

    failed: bool
    """Whether some step was not taken."""
    age: int
    """The age after the last step that was taken."""
    loss: float
    """The loss of the last step, or of the first that was not taken."""
    n_selected: int
    """The most codes of a batch, up to the first step that was not taken; 0 if they were not counted."""

    @property
    def lacked_room(self) -> bool:
        """Whether the step that was not taken had more codes than there was room for."""
        return self.failed and math.isfinite(self.loss)


@dataclass
class Fate:
    """Whether all steps of a leg could be taken, kept on a device; after the first that could not, nothing is updated.

    A step cannot be taken if its loss is not finite, or if there was not enough room for its codes.
    """

    failed: Tensor
    """float32, 0 or 1: the form that Adam's kernel takes."""
    age: Tensor
    """int64: the age after the last good step."""
    loss: Tensor
    n_selected: Tensor
    """int64: the most codes of a batch."""

    @classmethod
    def at(cls, age: int, device: torch.device) -> "Fate":
        """The fate of a leg that has not failed, at some age."""
        return cls(
            failed=torch.zeros((), device=device),
            age=torch.full((), age, dtype=torch.int64, device=device),
            loss=torch.zeros((), device=device),
            n_selected=torch.zeros((), dtype=torch.int64, device=device),
        )

    def judge(self, loss: Tensor, age: Tensor, n_selected: Tensor | None, room: int | None) -> None:
        """Record the loss of a step, the leg's age after it, and the number of its codes, if room was limited."""
        was_over = self.failed > 0
        is_over = was_over | ~torch.isfinite(loss)
        if n_selected is not None and room is not None:
            is_over = is_over | (n_selected > room)
            counted = torch.where(was_over, 0, n_selected)
            self.n_selected.copy_(torch.maximum(self.n_selected, counted))
        self.loss.copy_(torch.where(was_over, self.loss, loss.float()))
        self.failed.copy_(is_over.float())
        self.age.copy_(torch.where(is_over, self.age, age))

    def verdict(self) -> Verdict:
        """Read the outcome; the host waits for the device."""
        numbers = (self.failed, self.age, self.loss, self.n_selected)
        failed, age, loss, n_selected = torch.stack([number.double() for number in numbers]).tolist()
        return Verdict(bool(failed), int(age), loss, int(n_selected))


class Stopwatch:
    """Measures the seconds that a device spends on work launched between `start` and `stop`."""

    def __init__(self) -> None:
        self.spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin a span."""
        begin = torch.cuda.Event(enable_timing=True)
        begin.record()
        self.spans.append((begin, torch.cuda.Event(enable_timing=True)))

    def stop(self) -> None:
        """End the span."""
        self.spans[-1][1].record()

    def read(self) -> float:
        """Return the seconds since the last reading; the host waits for the device."""
        seconds = 0.0
        for begin, end in self.spans:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1e3
        self.spans.clear()
        return seconds


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    given: tuple[Tensor, Tensor | None]
    """Memory that the graph reads its inputs from."""


class Recordings:
    """The recordings of one function of one or two tensors, as a CUDA graph for each shape.

    The function must be the same at each call, must run the same operations on the same memory each time, must not wait
    for the device, and returns nothing. If recording fails, a warning says so, and from then on the function is called
    directly.
    """

    def __init__(self) -> None:
        self.recordings: dict[tuple, _Recording] = {}
        self.n_calls: Counter[tuple] = Counter()
        """By shapes: each compiles kernels of its own."""
        self.can_record = True

    def replay(self, function: Function, x: Tensor, target: Tensor | None = None) -> None:
        """Replay the recording of the function, or call it."""
        given = (x, target)
        shapes = _shapes(given)
        recording = self.recordings.get(shapes)
        if recording is None and self.can_record and self.n_calls[shapes] >= STEPS_BEFORE_RECORDING:
            recording = self._record(function, given)
        if recording is None:
            self.n_calls[shapes] += 1
            function(x, target)
            return
        for kept, tensor in zip(recording.given, given, strict=True):
            if kept is not None and tensor is not None:
                kept.copy_(tensor)
        recording.graph.replay()

    def _record(self, function: Function, given: tuple[Tensor, Tensor | None]) -> _Recording | None:
        """Record the graph for the shapes of the inputs; recording computes nothing."""
        x, target = given
        copies = (x.clone(), None if target is None else target.clone())
        recording = _Recording(torch.cuda.CUDAGraph(), copies)
        device = x.device
        graphs = _graphs.setdefault(device, WeakSet())
        pool = next((graph.pool() for graph in graphs), None)
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device)
        before = torch.cuda.current_stream(device)
        try:
            with torch.cuda.graph(
                recording.graph, pool=pool, stream=_streams[device], capture_error_mode="thread_local"
            ):
                function(*recording.given)
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
"""The existing graphs. They share memory for temporary tensors, since graphs are replayed one after the other."""
_streams: dict[torch.device, torch.cuda.Stream] = {}
"""The stream on which steps are recorded, by device; nothing runs there."""


class Launcher:
    """The device's side of a leg in training: its clock, its fate, and its steps, recorded where that is possible.

    A TopK or BatchTopK step has a fixed number of codes. The steps of other architectures get `room` for somewhat more
    codes than batches had so far. If there is too little for some batch, nothing is updated from there on, and the leg
    repeats these steps with more room: numbers do not depend on the room.

    The step itself is passed to each `launch`. If it were kept here, the trainee and its launcher would refer to each
    other, and the device's memory would not be freed when the leg ends, but whenever Python next looks for such pairs.
    """

    def __init__(self, device: torch.device, age: int, *, is_recorded: bool, limits_room: bool) -> None:
        self.device = device
        self.clock = Clock(device)
        self.fate = Fate.at(age, device)
        self.stopwatch = Stopwatch()
        self.gradients: dict[str, Tensor] = {}
        """Where a recorded step writes gradients; held here so that the memory stays allocated."""
        self.limits_room = limits_room
        self.room: int | None = None
        """Places for a batch's codes; None if they are not limited, and before the first step has counted them."""
        self.unsettled: list[tuple[Tensor, Tensor | None]] = []
        """The batches since the last verdict, if room is limited: their steps may have to be repeated."""
        self.recordings = Recordings() if is_recorded and not limits_room else None
        """The recordings of the step; None while steps are launched one operation after the other."""

    def launch(self, step: Function, x: Tensor, target: Tensor | None) -> None:
        """Launch a step, always the same function, on a batch."""
        if self.recordings is None:
            step(x, target)
        else:
            self.recordings.replay(step, x, target)

    def make_room(self, n_codes: int) -> None:
        """Have room for somewhat more codes than a batch had; steps are recorded anew, as their memory changes."""
        self.room = math.ceil(MORE_ROOM * max(n_codes, 1))
        self.recordings = Recordings()

    def settled(self, verdict: Verdict, age: int) -> None:
        """All steps up to an age were taken: forget the batches, and change a room that is almost full or too large."""
        self.unsettled.clear()
        self.fate.age.fill_(age)  # batches without rows aged the leg, too
        if self.room is None or not verdict.n_selected:
            return
        self.fate.n_selected.zero_()
        if not self.room / MORE_ROOM**2 <= verdict.n_selected <= self.room / MORE_ROOM**0.25:
            self.make_room(verdict.n_selected)

    def start_again(self, verdict: Verdict, n_lost: int) -> list[tuple[Tensor, Tensor | None]]:
        """Return the batches of the last steps, which were not taken for want of room, and make enough of it."""
        batches = self.unsettled[-n_lost:]
        self.unsettled = []
        self.make_room(verdict.n_selected)
        self.fate = Fate.at(verdict.age, self.device)
        self.clock.n_left = 0  # it has ticked on
        return batches
