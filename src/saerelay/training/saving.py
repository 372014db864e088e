"""When the resume state is saved, and by whom: on a GPU by a thread, while training goes on."""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saerelay.planning.recipe import TrainSpec
from saerelay.runs.state import save_state

SECONDS_BETWEEN_STATES = 300.0
"""Unless the recipe counts tokens instead."""


class SavingTimes:
    """Says when the next state is due: after so many tokens, or so much time, since the last."""

    def __init__(self, spec: TrainSpec, cursor: int) -> None:
        self.every = spec.checkpoint_every
        self.saved(cursor)

    def saved(self, cursor: int) -> None:
        """Take note that the state was saved."""
        self.cursor = cursor
        self.time = time.monotonic()

    def due(self, cursor: int) -> bool:
        """Whether it is time to save it again."""
        if isinstance(self.every, str):  # "auto"
            return time.monotonic() - self.time >= SECONDS_BETWEEN_STATES
        return cursor - self.cursor >= self.every


class StateWriter:
    """Writes resume states, one after the other; what goes wrong is raised at the next call.

    Tensors of a GPU are copied to pinned memory, which takes milliseconds, and written from there by a thread; those
    of a processor, which training goes on to change, are written at once.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._pinned: dict[str, Tensor] = {}

    def write(self, directory: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a state, once the one before it is on disk."""
        self.wait()
        if not any(tensor.is_cuda for tensor in tensors.values()):
            save_state(directory, tensors, facts)
            return
        copies = {name: self._copied(name, tensor) for name, tensor in tensors.items()}
        torch.cuda.synchronize()
        self._thread = threading.Thread(target=self._save, args=(directory, copies, facts), name="saerelay-state")
        self._thread.start()

    def wait(self) -> None:
        """Wait until all that was written is on disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error = self._error
            self._error = None
            raise error

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        """A copy in pinned memory, which is kept for the next state: to claim it takes longer than to fill it."""
        old = self._pinned.get(name)
        if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
            self._pinned[name] = torch.empty(tensor.shape, dtype=tensor.dtype).pin_memory()
        return self._pinned[name].copy_(tensor, non_blocking=True)

    def _save(self, directory: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        try:
            save_state(directory, tensors, facts)
        except BaseException as error:
            self._error = error
