"""When the resume state is saved, and how: on a GPU by a thread, while training goes on.

`Training.save` hands the tensors over; `Training.commit` waits for them.
"""

import threading
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from saerelay.planning.recipe import TrainSpec
from saerelay.runs.state import Tensors, save_part

SECONDS_BETWEEN_STATES = 300.0
"""Applies unless the recipe counts tokens instead."""


class SavingTimes:
    """Says when the next state is due: a number of tokens, or a time, after the last state."""

    def __init__(self, spec: TrainSpec, cursor: int) -> None:
        self.every = spec.checkpoint_every
        self.saved(cursor)

    def saved(self, cursor: int) -> None:
        """Note that the state was saved."""
        self.cursor = cursor
        self.time = time.monotonic()

    def due(self, cursor: int) -> bool:
        """Whether it is time to save the state again."""
        if isinstance(self.every, str):  # "auto"
            return time.monotonic() - self.time >= SECONDS_BETWEEN_STATES
        return cursor - self.cursor >= self.every


class StateWriter:
    """Writes the parts of resume states, one state after the other; `wait` raises any error.

    GPU tensors are copied to pinned memory, which takes milliseconds, and a thread writes them from there; CPU tensors,
    which training goes on to change, are written at once.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._digests: dict[str, dict[str, str]] = {}
        self._pinned: dict[str, dict[str, Tensor]] = {}
        """The last state's copies in pinned memory, by part and name."""

    @property
    def is_idle(self) -> bool:
        """Whether all parts are on disk."""
        return self._thread is None or not self._thread.is_alive()

    def write(self, directory: Path, parts: Mapping[str, Tensors]) -> None:
        """Write some parts of a state, once the parts of the previous state are on disk."""
        self.wait()
        on_gpus = {tensor.device for tensors in parts.values() for tensor in tensors.values() if tensor.is_cuda}
        if not on_gpus:
            self._save(directory, parts)
            return
        copies = {}
        for part, tensors in parts.items():
            before = self._pinned.get(part, {})
            copies[part] = {name: _pinned(tensor, before.get(name)) for name, tensor in tensors.items()}
        self._pinned = copies  # the memory of legs that have ended is let go
        for gpu in on_gpus:
            torch.cuda.synchronize(gpu)
        self._thread = threading.Thread(target=self._save, args=(directory, copies), name="saerelay-state")
        self._thread.start()

    def wait(self) -> dict[str, dict[str, str]]:
        """Wait until everything is on disk; return the digests of the tensors, by part."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error = self._error
            self._error = None
            raise error
        return self._digests

    def _save(self, directory: Path, parts: Mapping[str, Tensors]) -> None:
        try:
            self._digests = {name: save_part(directory, name, tensors) for name, tensors in parts.items()}
        except BaseException as error:
            self._error = error


def _pinned(tensor: Tensor, memory: Tensor | None) -> Tensor:
    """A copy in pinned memory: in `memory`, a copy that is no longer needed, if it fits; allocating takes longer."""
    if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
        memory = torch.empty(tensor.shape, dtype=tensor.dtype).pin_memory()
    return memory.copy_(tensor, non_blocking=True)
