"""Several processes that train one run: the same bits as one, whoever does what, and whatever happens to them."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from team_worker import Ranks

from saerelay.planning.ranks import owners
from saerelay.runs.directory import read_plan
from saerelay.runs.documents.training import RunCost
from saerelay.runs.state import state_facts
from saerelay.training.run_state import slowest

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
moment_tokens = 4096
refit_tokens = 3000
reuse = 2
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
    cost = RunCost.load(tmp_path / "run/cost.json")
    assert cost.ranks == size and cost.seconds.processor


def test_a_phase_takes_the_time_of_the_slowest_rank_and_processors_that_of_all() -> None:
    ranks = [{"total": 3.0, "processor": 2.0, "lm": 1.0}, {"total": 3.5, "processor": 3.0, "lm": 0.5}]
    assert slowest(ranks) == {"total": 3.5, "processor": 5.0, "lm": 1.0}


@pytest.mark.slow
def test_layers_that_share_a_leg_reach_the_rank_that_trains_it(tmp_path: Path) -> None:
    recipe = tmp_path / "shared.toml"
    recipe.write_text(RECIPE.replace('"hub"', '"shared"').replace("fork_at = 0.5\n", ""))
    alone = Ranks(0, tmp_path, ["train", recipe, "--out", tmp_path / "alone"])
    assert alone.wait() == [0], alone.said()
    ranks = Ranks(3, tmp_path, ["train", recipe, "--out", tmp_path / "run"])
    assert ranks.wait() == [0, 0, 0], ranks.said()
    assert (tmp_path / "alone/legs/L2-shared").is_dir()
    assert digests(tmp_path / "run") == digests(tmp_path / "alone")


@pytest.mark.slow
def test_sites_without_a_leg_of_their_own_are_read_by_a_team(tmp_path: Path) -> None:
    """Layers that share a leg, and the layer of a parent outside the plan."""
    head, _ = RECIPE.replace("[1, 2, 3]", "[2]").split("[plan]")
    head += "[evaluate]\ntokens = 1024\n[plan]\nmoment_tokens = 2048\nrefit_tokens = 1024\n"
    shared = tmp_path / "shared.toml"
    shared.write_text(
        head
        + '[[plan.legs]]\nid = "shared"\nlayer = 2\ntokens = 4096\nshared_layers = [1, 3]\n'
        + '[[plan.legs]]\nid = "own"\nlayer = 2\ntokens = 2048\n'
    )
    hop = tmp_path / "hop.toml"
    hop.write_text(
        head
        + f'[[plan.legs]]\nid = "child"\nlayer = 1\ntokens = 2048\nparent = "{tmp_path}/shared-0/legs/own"\n'
        + '[[plan.legs]]\nid = "beside"\nlayer = 1\ntokens = 2048\n'
    )
    for recipe in (shared, hop):
        for size in (0, 2):
            ranks = Ranks(size, tmp_path, ["train", recipe, "--out", tmp_path / f"{recipe.stem}-{size}"])
            assert ranks.wait() == [0] * max(1, size), ranks.said()
        assert digests(tmp_path / f"{recipe.stem}-0") == digests(tmp_path / f"{recipe.stem}-2")


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
    assert "stopped because another rank stopped" in ranks.said() and "Traceback" not in ranks.said()
    assert time.monotonic() - began < 50

    again = Ranks(3, tmp_path, words)  # without --resume: a team goes on by itself
    assert again.wait() == [0, 0, 0], again.said()
    assert digests(tmp_path / "run") == digests(alone)
    assert log_lines(tmp_path / "run") == log_lines(alone)


def reverse_placement(rank: int) -> None:
    """Give every leg, and every micro-batch, to another rank than usual."""
    from saerelay.planning import ranks
    from saerelay.training import run_state, team_stream

    def owners(plan: Any, n_ranks: int) -> dict[str, int]:
        return {leg: n_ranks - 1 - owner for leg, owner in ranks.owners(plan, n_ranks).items()}

    def deal(n_parts: int, busy: list[float], seconds: float, degree: int) -> list[range]:
        return ranks.deal(n_parts, [0.0, *(3 * seconds for _ in busy[1:])], seconds, degree)

    run_state.owners = team_stream.owners = owners
    team_stream.deal = deal


@pytest.mark.slow
def test_who_does_what_changes_no_bit(recipe: Path, alone: Path, tmp_path: Path) -> None:
    ranks = Ranks(2, tmp_path, ["train", recipe, "--out", tmp_path / "run"], reverse_placement)
    assert ranks.wait() == [0, 0], ranks.said()
    assert digests(tmp_path / "run") == digests(alone)


def test_sigterm_to_one_rank_stops_all_at_one_cursor(recipe: Path, alone: Path, tmp_path: Path) -> None:
    words = ["train", recipe, "--out", tmp_path / "run"]
    ranks = Ranks(2, tmp_path, words)
    wait_for(tmp_path / "run/state/state.json")
    pid = ranks.processes[1].pid
    assert pid
    os.kill(pid, signal.SIGTERM)
    assert ranks.wait() == [130, 130], ranks.said()
    assert ranks.said().count("stopped; the state is saved") == 1
    facts = state_facts(tmp_path / "run/state")
    assert facts and facts["cursor"] % 2048 == 0 and facts["cursor"] < read_plan(tmp_path / "run").n_tokens
    alone_again = Ranks(0, tmp_path, [*words, "--resume"])
    assert alone_again.wait() == [0], alone_again.said()
    assert digests(tmp_path / "run") == digests(alone)


def poison(rank: int) -> None:
    """Let the loss of one leg that rank 1 trains be NaN from a certain age on."""
    from saerelay.training.engine import Trainee

    step = Trainee.step

    def poisoned(self: Trainee, x: Any, target: Any = None) -> None:
        if self.leg.id == "L1-scratch-full" and self.state.age >= 3072:
            x = x * math.nan
        step(self, x, target)

    Trainee.step = poisoned


def test_a_leg_that_fails_on_another_rank_stops_alone_and_is_named(recipe: Path, alone: Path, tmp_path: Path) -> None:
    owner = owners(read_plan(alone), 2)
    assert owner["L1-scratch-full"] == 1, "else this shows nothing"
    ranks = Ranks(2, tmp_path, ["train", recipe, "--out", tmp_path / "run"], poison)
    assert ranks.wait() == [1, 1], ranks.said()
    assert ranks.said().count("leg L1-scratch-full stopped: the loss became nan at age 3072 tokens") == 1
    expected = digests(alone)
    del expected["legs/L1-scratch-full/dictionary.safetensors"]
    found = digests(tmp_path / "run")
    assert {name: found[name] for name in expected} == expected


def test_an_error_on_rank_0_before_the_start_stops_all(recipe: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(recipe.read_text().replace("layers = [1, 2, 3]", "layers = [99]"))
    ranks = Ranks(2, tmp_path, ["train", wrong, "--out", tmp_path / "run"])
    assert ranks.wait(60) == [2, 1], ranks.said()
    assert "layer 99 is out of range" in ranks.said() and "Traceback" not in ranks.said()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_measuring_is_dealt_to_ranks_and_gives_the_same_documents(alone: Path, tmp_path: Path) -> None:
    for size in (0, 2):
        run = shutil.copytree(alone, tmp_path / str(size))
        for command in ("eval", "matrix"):
            ranks = Ranks(size, tmp_path, [command, run, "--json"])
            assert set(ranks.wait()) == {0}, ranks.said()
    for name in ("matrix.json", "eval/L2.json", "eval/L1-from-L2.json", "summary.json"):
        one, two = (json.loads((tmp_path / size / name).read_text()) for size in ("0", "2"))
        assert without_seconds(one) == without_seconds(two), name


def make_features(run: Path, rank: int) -> None:
    """Make a run's features, as a script does that torchrun started, and say of how many legs."""
    from saerelay.analysis import features
    from saerelay.analysis.suite import load

    collect = features.collect

    def told(plan: Any, model: Any, sequences: Any, dictionaries: Any, **options: Any) -> Any:
        print(f"features of {len(dictionaries)} legs", flush=True)
        return collect(plan, model, sequences, dictionaries, **options)

    features.collect = told
    features.features_run(load(run))


@pytest.mark.slow
def test_features_are_dealt_to_ranks_and_give_the_same_files(alone: Path, tmp_path: Path) -> None:
    for size in (0, 2):
        run = shutil.copytree(alone, tmp_path / str(size))
        ranks = Ranks(size, tmp_path, ["eval", run, "--json"], partial(make_features, run))
        assert set(ranks.wait()) == {0}, ranks.said()
        assert re.findall(r"features of (\d) legs", ranks.said()) == (["2", "3"] if size else ["5"])
    names = [path.name for path in (tmp_path / "0/features").iterdir()]
    assert len(names) == 5
    for name in names:
        assert (tmp_path / "0/features" / name).read_bytes() == (tmp_path / "2/features" / name).read_bytes()


def without_seconds(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: without_seconds(value) for key, value in data.items() if "seconds" not in key}
    if isinstance(data, list):
        return [without_seconds(value) for value in data]
    return data


@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "ending"), [("", "safetensors"), ("file://", "json")])
def test_what_the_cache_lacks_is_decided_together(recipe: Path, tmp_path: Path, protocol: str, ending: str) -> None:
    cached = tmp_path / "cached.toml"
    cached.write_text(recipe.read_text().replace("[data]", f'[data]\ncache = "{protocol}{tmp_path}/cache"'))
    found = []
    for size, name in ((2, "written"), (2, "read"), (0, "alone")):
        ranks = Ranks(size, tmp_path, ["train", cached, "--out", tmp_path / name])
        assert set(ranks.wait()) == {0}, ranks.said()
        found.append(digests(tmp_path / name))
        shards = sorted((tmp_path / "cache").rglob(f"*.{ending}"))
        if name == "written":
            shards[0].unlink()  # of one site, whose owner alone lacks it now
    assert found[0] == found[1] == found[2]


def die_in_save(rank: int) -> None:
    """Let rank 1 be killed in the middle of its second state."""
    from saerelay.training import saving

    save_part = saving.save_part

    def killed(directory: Path, name: str, tensors: Any) -> dict[str, str]:
        if rank == 1 and directory.name == "2":
            (directory / f"{name}.safetensors").parent.mkdir(parents=True, exist_ok=True)
            (directory / f"{name}.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return save_part(directory, name, tensors)

    saving.save_part = killed


@pytest.mark.slow
def test_killed_inside_a_save_the_state_before_it_is_whole(recipe: Path, alone: Path, tmp_path: Path) -> None:
    words = ["train", recipe, "--out", tmp_path / "run"]
    ranks = Ranks(2, tmp_path, words, die_in_save)
    assert ranks.wait() == [1, -signal.SIGKILL], ranks.said()
    facts = state_facts(tmp_path / "run/state")
    assert facts and facts["serial"] == 1 and (tmp_path / "run/state/2").is_dir()
    again = Ranks(3, tmp_path, words)
    assert again.wait() == [0, 0, 0], again.said()
    assert digests(tmp_path / "run") == digests(alone)


def look_elsewhere(rank: int) -> None:
    """Let rank 1 see another directory than rank 0, as on a machine that does not share the disk."""
    from saerelay import team

    team.SECONDS_TO_SEE_A_FILE = 1.0
    appears = team.appears
    team.appears = lambda path, seconds: appears(path.with_name("elsewhere") if rank else path, seconds)


def test_a_rank_that_does_not_see_the_directory_is_named(recipe: Path, tmp_path: Path) -> None:
    ranks = Ranks(2, tmp_path, ["train", recipe, "--out", tmp_path / "run"], look_elsewhere)
    assert ranks.wait(60) == [2, 2], ranks.said()
    assert "rank 1 on host" in ranks.said() and "does not see" in ranks.said()
    assert not list((tmp_path / "run").glob(".team-*"))


@pytest.mark.slow
def test_torchrun_restarts_a_team_that_lost_a_rank(recipe: Path, alone: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys, threading, time\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from saerelay.cli import main\n"
        "from saerelay.planning import placing\n"
        "placing.LM_BATCH_TOKENS = 512\n"
        f"state = Path({str(tmp_path / 'run/state/state.json')!r})\n"
        "def die():\n"
        "    while not state.is_file():\n"
        "        time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if os.environ['RANK'] == '1' and not state.is_file():\n"
        "    threading.Thread(target=die, daemon=True).start()\n"
        "main()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", str(script), "train", str(recipe), "--out", str(tmp_path / "run")]
    environment = os.environ | {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert digests(tmp_path / "run") == digests(alone)


@pytest.fixture
def two_machines() -> Iterator[list[tuple[str, str, str]]]:
    """Two network namespaces with a cable between them: the name of each, its address, and its end of the cable."""
    machines = [("saerelay-a", "10.77.0.1", "sr-veth-a"), ("saerelay-b", "10.77.0.2", "sr-veth-b")]
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root, and the command ip")

    def ip(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ip", *words], capture_output=True, text=True)

    try:
        for name, _, _ in machines:
            made = ip("netns", "add", name)
            if made.returncode:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        made = ip("link", "add", machines[0][2], "type", "veth", "peer", "name", machines[1][2])
        if made.returncode:
            pytest.skip(f"no virtual cables here: {made.stderr.strip()}")
        for name, address, cable in machines:
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield machines
    finally:
        for name, _, _ in machines:
            ip("netns", "delete", name)


@pytest.mark.slow
def test_two_machines_give_the_bits_of_one(
    recipe: Path, tmp_path: Path, two_machines: list[tuple[str, str, str]]
) -> None:
    common = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    common += ["--rdzv-backend", "c10d", "--rdzv-id", "test", "--rdzv-endpoint", f"{two_machines[0][1]}:29500"]
    command = ["-m", "saerelay", "train", str(recipe), "--out", str(tmp_path / "run")]
    processes = []
    for i, (name, address, cable) in enumerate(two_machines):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": cable}
        environment |= {"RES_OPTIONS": "timeout:1 attempts:1"}  # there is no name server
        own = ["--local-addr", address, "--rdzv-conf", f"is_host={int(i == 0)}"]
        words = ["ip", "netns", "exec", name, *common, *own, *command]
        processes.append(subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, stderr = process.communicate(timeout=400)
        assert process.returncode == 0, stderr[-3000:]
    alone = Ranks(0, tmp_path, ["train", recipe, "--out", tmp_path / "alone"], usual_batches)
    assert alone.wait() == [0], alone.said()
    assert digests(tmp_path / "run") == digests(tmp_path / "alone")


def usual_batches(rank: int) -> None:
    """Undo what `team_worker` makes of the language model's batches."""
    from saerelay.planning import placing

    placing.LM_BATCH_TOKENS = 4096


def wait_for(path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.is_file():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)
