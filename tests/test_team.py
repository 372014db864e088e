"""Several processes that train one run: the same bits as one, whoever does what, and whatever happens to them."""

import hashlib
import json
import signal
import time
from pathlib import Path

import pytest
from team_worker import Ranks

RECIPE = """
[sites]
layers = [1, 2, 3]
[data]
context = 32
block_tokens = 2048
[dictionary]
n_latents = 96
k = 8
target_l0 = 8.0
[train]
batch_tokens = 256
checkpoint_every = 2048
[plan]
preset = "hub"
roots = [2]
fork_at = 0.5
root_tokens = 8192
transfer_tokens = 4096
moment_tokens = 2048
refit_tokens = 1024
controls = [1]
[evaluate]
tokens = 1024
"""


def digests(run: Path) -> dict[str, str]:
    """Of every published dictionary, snapshots included."""
    files = sorted(run.glob("legs/**/dictionary.safetensors"))
    assert files
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def log_lines(run: Path) -> list[tuple[int, str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sorted((line["cursor"], line["leg"], line["fvu"]) for line in lines)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("team") / "run.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def alone(recipe: Path) -> Path:
    """The run of one process, without a team."""
    out = recipe.parent / "alone"
    ranks = Ranks(0, recipe.parent, ["train", recipe, "--out", out])
    assert ranks.wait() == [0], ranks.said()
    return out


@pytest.mark.parametrize(
    "size", [1, 2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_any_number_of_ranks_gives_the_bits_of_one_process(
    recipe: Path, alone: Path, tmp_path: Path, size: int
) -> None:
    ranks = Ranks(size, tmp_path, ["train", recipe, "--out", tmp_path / "run"])
    assert ranks.wait() == [0] * size, ranks.said()
    assert digests(tmp_path / "run") == digests(alone)
    assert log_lines(tmp_path / "run") == log_lines(alone)
    assert ranks.said().count("SAEs in") == 1, "only rank 0 speaks"


def test_killed_with_two_ranks_and_resumed_with_three_gives_the_same_bits(
    recipe: Path, alone: Path, tmp_path: Path
) -> None:
    words = ["train", recipe, "--out", tmp_path / "run"]
    ranks = Ranks(2, tmp_path, words)
    wait_for(tmp_path / "run/state/state.json")
    ranks.processes[1].kill()
    began = time.monotonic()
    codes = ranks.wait(60)
    assert codes[1] == -signal.SIGKILL and codes[0] == 1, ranks.said()
    assert "stopped, since another rank did" in ranks.said() and "Traceback" not in ranks.said()
    assert time.monotonic() - began < 50

    again = Ranks(3, tmp_path, words)  # without --resume: a team goes on by itself
    assert again.wait() == [0, 0, 0], again.said()
    assert digests(tmp_path / "run") == digests(alone)
    assert log_lines(tmp_path / "run") == log_lines(alone)


def wait_for(path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.is_file():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)
