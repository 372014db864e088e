"""Faults at the n-th call of the operating system: the process is killed there, or the call fails."""

import builtins
import errno
import io
import os
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import safetensors

KILLED_AT = ("replace", "rename", "fsync", "mkdir", "unlink", "rmdir", "truncate")
"""Functions of `os` that change what is on the disk."""
FAIL_AT = (*KILLED_AT, "open", "write")
"""Calls that can fail: those, a file opened for writing, and a write into it."""


class Fault(NamedTuple):
    """What happens, and when."""

    call: str
    number: int
    """Of the call, from 1 on."""
    what: str
    """"before" or "after": killed before or after the call; or the name of the error it fails with: "ENOSPC"."""

    @property
    def kills(self) -> bool:
        """Whether the process is killed; else the call fails."""
        return self.what in ("before", "after")

    def __str__(self) -> str:
        happens = f"killed {self.what}" if self.kills else self.what
        return f"{happens} at {self.call} {self.number}"


class Injector:
    """Counts calls, and lets one of them come to grief."""

    def __init__(self, fault: Fault | None) -> None:
        self.fault = fault
        self.counts: Counter[str] = Counter()

    def called(self, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Make a call, or what becomes of it."""
        self.counts[name] += 1
        fault = self.fault
        if fault is None or (name, self.counts[name]) != (fault.call, fault.number):
            return function(*args, **options)
        if fault.what == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.what == "after":
            try:
                function(*args, **options)
            finally:  # the call may fail by itself: a directory that is there already, a file that is not
                os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, fault.what)
        place = args[0] if args and isinstance(args[0], str | os.PathLike) else None
        raise OSError(number, os.strerror(number), place)

    def install(self) -> None:
        """Take the place of the functions; for the rest of the process."""
        for name in KILLED_AT:
            setattr(os, name, self._hooked(name, getattr(os, name)))
        opened = io.open
        io.open = builtins.open = self._hooked_open(opened)  # type: ignore[assignment]
        self._hook_safetensors()

    def _hooked(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(*args: Any, **options: Any) -> Any:
            return self.called(name, real, *args, **options)

        return hooked

    def _hooked_open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Files opened for writing by name go through `_File`, whose writes are counted."""

        def hooked(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return real(file, mode, buffering, *args, **options)
            return self.called("open", self._opened, file, mode, *args, **options)

        return hooked

    def _opened(self, file: Any, mode: str, *args: Any, **options: Any) -> Any:
        raw = _File(self, file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **options)

    def _hook_safetensors(self) -> None:
        """It writes by itself, and says what went wrong in its own way."""
        from saerelay.data import cache
        from saerelay.runs import tensors

        real = tensors.save_file

        def hooked(*args: Any, **options: Any) -> Any:
            try:
                return self.called("write", real, *args, **options)
            except OSError as error:
                text = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                raise safetensors.SafetensorError(text) from None

        tensors.save_file = hooked
        cache.save_file = hooked


class _File(io.FileIO):
    """A file whose writes are counted."""

    def __init__(self, injector: Injector, file: Any, mode: str) -> None:
        super().__init__(file, mode)
        self.injector = injector

    def write(self, data: Any) -> int:
        return self.injector.called("write", super().write, data)
