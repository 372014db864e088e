"""One rank of a team, or a process on its own, as tests start it: a forked process that has imported everything."""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch.distributed", "transformers.models.gpt_neox.modeling_gpt_neox", "saerelay.workflows.launch"]
)


def run(rank: int, size: int, store: str, log: str, words: Sequence[str], prepare: Callable[[int], object]) -> None:
    """A command of `saerelay` in this process, once `prepare(rank)` was called; what it prints goes to a file."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    import torch
    import torch.distributed as dist

    from saerelay.cli import main
    from saerelay.planning import placing

    torch.set_num_threads(1)
    placing.LM_BATCH_TOKENS = 512  # several forward passes in a small block
    if size:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
        }
        os.environ |= {"TORCHELASTIC_RUN_ID": "test"}
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    prepare(rank)
    sys.argv = ["saerelay", *words]
    main()


def nothing(rank: int) -> None:
    """Change nothing before the command is run."""


class Ranks:
    """Some ranks at work, or one process on its own (`size` 0)."""

    def __init__(
        self, size: int, folder: Path, words: Sequence[object], prepare: Callable[[int], object] = nothing
    ) -> None:
        self.logs = Path(tempfile.mkdtemp(dir=folder, prefix=f"ranks-{size}-"))
        self.processes: list[BaseProcess] = []
        for rank in range(max(1, size)):
            options = [str(word) for word in words]
            arguments = (rank, size, str(self.logs / "store"), str(self.logs / f"{rank}.log"), options, prepare)
            process = CONTEXT.Process(target=run, args=arguments, daemon=True)
            process.start()
            self.processes.append(process)

    def wait(self, seconds: float = 240) -> list[int | None]:
        """The exit codes once all have ended; those that have not by then are killed, and have None."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        return codes

    def said(self) -> str:
        """All that they printed, by rank."""
        texts = [path.read_text(errors="replace") for path in sorted(self.logs.glob("*.log"))]
        return "\n---\n".join(texts)
