"""Which of several processes this is, where one command was started many times (torchrun): by the environment alone."""

import os


def n_ranks() -> int:
    """How many processes were started together; 1 for a process on its own."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among them; 0 for a process on its own."""
    return int(os.environ.get("RANK", "0")) if n_ranks() > 1 else 0


def in_team() -> bool:
    """Whether torchrun, or whatever sets the same variables, started this process, be it a single one."""
    return n_ranks() > 1 or "TORCHELASTIC_RUN_ID" in os.environ
