"""The processes that train one run together, started by torchrun, and how they communicate.

A process on its own is a team of one (`Team.alone`), for which everything here is free. All ranks make the same calls
in the same order; an exception on one rank ends that process, and torchrun ends the others.
"""

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from saerelay.errors import RunDirectoryError, TeamError
from saerelay.files import appears, write_text
from saerelay.rank import in_team, n_ranks, n_ranks_here

T = TypeVar("T")

PATIENCE = timedelta(hours=24)
"""How long ranks wait for a rank that tokenises, downloads or fits a map; a dead rank is noticed at once."""
DATA_PATIENCE = timedelta(minutes=30)
"""How long a GPU waits for another GPU in `exchange`."""
SECONDS_TO_SEE_A_FILE = 60.0
"""Seconds after which a file that another rank wrote counts as missing."""


class Team:
    """The ranks of one run; small objects go over a gloo group, activations over NCCL if each rank has a GPU."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.control: Any = None
        """The process group for everything but activations; None for a process on its own."""
        self.data: Any = None
        self.busy = [0.0] * size
        """Seconds that each rank spent on its legs in the last block; all ranks hold the same list."""
        self.seconds_per_batch = 1.0
        """Seconds per micro-batch in the language model; all ranks hold the same number."""
        self.own_seconds_per_batch = 0.0
        """Seconds per micro-batch as this rank measured them; 0 where it forwarded nothing."""
        self.seconds_exchanging = 0.0
        """Seconds spent in `exchange`, including the wait for other ranks, since `meet` last asked."""

    @classmethod
    def alone(cls) -> "Team":
        """A process on its own."""
        return cls()

    @classmethod
    @cache
    def joined(cls) -> "Team":
        """The team that torchrun (or whatever set the same variables) started this process for; else a team of one."""
        if not in_team():
            return cls.alone()
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        team = cls(int(os.environ["RANK"]), n_ranks(), local_rank)
        gpu_each = torch.cuda.is_available() and torch.cuda.device_count() >= n_ranks_here()
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        with stopping_together():
            if not dist.is_initialized():  # NCCL is for a language model that several ranks hold together
                dist.init_process_group("cpu:gloo,cuda:nccl" if gpu_each else "gloo", timeout=PATIENCE)
            team.control = dist.group.WORLD
            team.data = team.control
            if all(team.gather(gpu_each)):
                team.data = dist.new_group(backend="nccl", timeout=DATA_PATIENCE)
        return team

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone writes logs, shows progress, and holds the lock."""
        return self.rank == 0

    def balance(self, busy: list[float], seconds_per_batch: list[float]) -> None:
        """Record what every rank measured in a block; the next block is distributed by these numbers."""
        self.busy = busy
        measured = [seconds for seconds in seconds_per_batch if seconds]
        if measured:
            self.seconds_per_batch = sum(measured) / len(measured)

    def leave(self) -> None:
        """Leave the process group, at the end of the program."""
        if self.control is not None:
            dist.destroy_process_group()

    def share(self, work: Sequence[T], degree: int = 1) -> list[T]:
        """Return the part of `work`, cut into equal stretches, that falls to this rank's group of `degree` ranks."""
        group, n_groups = self.rank // degree, self.size // degree
        return list(work[len(work) * group // n_groups : len(work) * (group + 1) // n_groups])

    # --- small objects: agreement between ranks ---

    def gather(self, mine: T) -> list[T]:
        """Return what every rank passes, in order of ranks; also the way to wait for all ranks."""
        if self.control is None:
            return [mine]
        words: list[Any] = [None] * self.size
        with stopping_together():
            dist.all_gather_object(words, mine, group=self.control)
        return words

    def any(self, *mine: bool) -> list[bool]:
        """Which of some statements hold on at least one rank."""
        return [any(of_ranks) for of_ranks in zip(*self.gather(mine), strict=True)]

    def once(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0 alone and return its result on all ranks; TeamError on the others if it fails."""
        if self.control is None:
            return function()
        if not self.leads:
            result, failure = cast(Any, self.gather(None)[0])
            if failure:
                raise TeamError(failure)
            return result
        try:
            result = function()
        except BaseException as error:
            self.gather((None, f"rank 0 stopped: {type(error).__name__}"))
            raise
        self.gather((result, ""))
        return result

    def in_turn(self, function: Callable[[], T]) -> T:
        """Call a function on one rank per machine first, then on the others: it may fill a cache for them."""
        if self.local_rank:
            self.gather(None)
            return function()
        result = function()
        self.gather(None)
        return result

    def send(self, thing: Any, to: int) -> None:
        """Send a small object, or a dictionary, to another rank, which must call `receive`."""
        with stopping_together():
            dist.send_object_list([thing], dst=to, group=self.control)

    def receive(self, source: int) -> Any:
        """Return the object that another rank sends."""
        things: list[Any] = [None]
        with stopping_together():
            dist.recv_object_list(things, src=source, group=self.control)
        return things[0]

    # --- activations ---

    def exchange(self, outbox: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send bytes to every rank, and return what every rank sends to this one, both in order of ranks.

        outbox: uint8 (Σ sent); the result is uint8 (Σ received). Any size may be 0, also the rank's own.
        """
        began = time.perf_counter()
        source = outbox.cpu() if self.data is self.control else outbox  # gloo goes through the host
        inbox = source.new_empty(sum(received))
        with stopping_together():
            dist.all_to_all_single(inbox, source, received, sent, group=self.data)
            if inbox.is_cuda:  # NCCL returns once it is told what to do, and the block needs the result at once anyway
                torch.cuda.synchronize(inbox.device)
        self.seconds_exchanging += time.perf_counter() - began
        return inbox.to(outbox.device)

    # --- the common directory ---

    def check_shared(self, root: Path) -> None:
        """Raise RunDirectoryError unless every rank sees the same directory."""
        if self.control is None:
            return
        mark = root / self.once(lambda: f".team-{uuid.uuid4().hex}.tmp")
        if self.leads:
            write_text(mark, "")
        name = f"rank {self.rank} on host {socket.gethostname()}"
        blind = [word for word in self.gather("" if appears(mark, SECONDS_TO_SEE_A_FILE) else name) if word]
        if self.leads:
            mark.unlink()
        if blind:
            raise RunDirectoryError(
                f"{blind[0]} does not see {root} of rank 0; --out must be on a file system that all machines share"
            )


@contextmanager
def stopping_together() -> Iterator[None]:
    """Turn the error that torch raises when another rank is gone into one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise TeamError(f"stopped because another rank stopped ({first_line[:200]})") from None
