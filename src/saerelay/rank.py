"""This process's place among those that one command (torchrun) started, from environment variables alone."""

import os


def n_ranks() -> int:
    """How many processes were started together; 1 for a process on its own."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among the processes started together; 0 for a process on its own."""
    return int(os.environ.get("RANK", "0")) if n_ranks() > 1 else 0


def in_team() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process, even as the only one."""
    return n_ranks() > 1 or "TORCHELASTIC_RUN_ID" in os.environ


def n_ranks_here() -> int:
    """How many of the processes started together run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", n_ranks()))


def restarts_will_fail() -> bool:
    """Whether torchrun was asked for restarts, but without the setting that they need to succeed (torch 2.13)."""
    asked = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return asked and shares_store and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1"
