"""A fixed sample of both harnesses; `make faults` and `make fuzz` have thousands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SAMPLE = (
    "train:replace:1:after",
    "train:replace:4:after",
    "train:unlink:1:before",
    "train:write:9:ENOSPC",
    "train:open:5:EACCES",
    "extend:replace:2:after",
    "extend:replace:3:before",
    "extend:fsync:6:after",
    "auto:unlink:8:after",
    "auto:rmdir:2:after",
    "hop:replace:1:before",
    "hop:replace:4:after",
    "report:unlink:4:after",
    "report:replace:6:after",
    "report:write:30:ENOSPC",
    "export:rename:1:before",
    "export:mkdir:2:EACCES",
    "import:rename:1:after",
)
"""Faults that once left no way on, a traceback, or another result, and a few others."""


def harness(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a harness in a process of its own, which forks before torch has threads."""
    command = [sys.executable, "-W", "ignore", str(HERE / name), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_after_these_faults_there_is_a_way_on_to_the_same_bits() -> None:
    options = [option for fault in SAMPLE for option in ("--fault", fault)]
    ended = harness("run.py", *options)
    assert ended.returncode == 0 and " 0 problems" in ended.stdout, ended.stdout + ended.stderr[-2000:]
    assert "not reached" not in ended.stdout, ended.stdout


@pytest.mark.slow
def test_hostile_inputs_do_no_harm() -> None:
    ended = harness("fuzz.py", "--n", "120", "--seed", "1")
    assert ended.returncode == 0 and " 0 problems" in ended.stdout, ended.stdout + ended.stderr[-2000:]
