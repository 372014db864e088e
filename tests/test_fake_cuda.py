"""All that runs on a GPU, on one that is not there (`fake_cuda`): no mixed devices, no waits but those stated."""

import io
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, OnCuda, Waits, fake_cuda
from rich.console import Console
from tensor_stream import TensorStream

import saerelay as sr
from saerelay.analysis.interpret.pieces import subjects_of
from saerelay.analysis.session import Session
from saerelay.cli import main
from saerelay.errors import Interrupted
from saerelay.planning.recipe import Recipe
from saerelay.runs.directory import RunDirectory
from saerelay.training.cohort import Cohort
from saerelay.training.run_state import Journal, Training
from saerelay.training.trackers import Several
from saerelay.training.train import train_plan
from saerelay.workflows.settle import plan_run
from saerelay.workflows.watching import watching

pytestmark = pytest.mark.slow
RECIPE = """
[model]
name = "{folder}/model"
dtype = "float32"
device = "cuda"
[data]
tokens = "{folder}/tokens.npy"
context = 16
block_tokens = 1024
[dictionary]
architecture = "{kind}"
n_latents = 64
k = 4
target_l0 = 4.0
l1 = 0.5
[plan]
root_tokens = 4096
transfer_tokens = 2048
moment_tokens = 2048
refit_tokens = 1024
{plan}
[train]
batch_tokens = 128
dead_after = 512
checkpoint_every = 1024
[evaluate]
tokens = 512
"""


@pytest.fixture(autouse=True)
def device() -> Iterator[Waits]:
    """The device, and how often the host waited for it."""
    with fake_cuda() as waits:
        yield waits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A tiny model and tokens for it."""
    root = tmp_path_factory.mktemp("cuda")
    shutil.copytree(tiny_model, root / "model")
    steps = np.random.default_rng(0).integers(1, 4, size=60_000)
    np.save(root / "tokens.npy", (steps.cumsum() % 100 + 1).astype(np.uint16))
    return root


def recipe(folder: Path, plan: str = 'preset = "hub"', kind: str = "topk", *more: str) -> Path:
    """A recipe's file; `more` are lines in front, such as keys of another section."""
    text = RECIPE.format(folder=folder, plan=plan, kind=kind)
    for change in more:
        old, _, new = change.partition(" -> ")
        assert old in text
        text = text.replace(old, new)
    path = folder / f"recipe-{abs(hash(text))}.toml"
    path.write_text(text)
    return path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run the program in this process; it must succeed."""
    monkeypatch.setattr(sys, "argv", ["saerelay", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code


@pytest.fixture
def saerelay(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program."""
    return lambda *arguments: command(monkeypatch, *arguments)


# --- the device itself ----------------------------------------------------------------------------


def test_the_device_refuses_what_cuda_refuses() -> None:
    x = torch.zeros(3, device="cuda")
    assert x.device == CUDA and isinstance(x, OnCuda) and isinstance(x + 1, OnCuda)
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.zeros(3)
    with pytest.raises(RuntimeError, match="same device"):
        x.index_select(0, torch.tensor([1]))
    with pytest.raises(RuntimeError, match="same device"):
        torch.eye(3) * x.sum()
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, generator=torch.Generator(), device="cuda")


def test_the_device_counts_waits(device: Waits) -> None:
    x = torch.arange(3.0).to("cuda", non_blocking=True)
    y = 2 * x[1:] + torch.tensor(1.0)
    assert device.n == 0
    assert y.tolist() == [3.0, 5.0] and float(x.sum()) == 3.0
    assert x[x > 0].shape == (2,) and x.cpu().sum() == 3
    assert device.n == 4


def test_a_graph_computes_again_what_it_captured() -> None:
    x = torch.ones(4, device="cuda")
    total = torch.zeros((), device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total.add_((x * 2).sum())
    assert total.item() == 0
    x.fill_(3.0)
    graph.replay()
    assert total.item() == 24
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(graph):
        x.sum().item()


# --- commands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu", "gated", "relu"])
def test_training_and_evaluation_of_every_kind(folder: Path, tmp_path: Path, saerelay: Any, kind: str) -> None:
    saerelay("train", recipe(folder, 'preset = "hub"\ncontrols = [0]', kind), "--out", tmp_path / "run")
    saerelay("eval", tmp_path / "run")
    suite = sr.load(tmp_path / "run")
    assert all(0 < (leg.fvu or 0) < 1.5 for leg in suite.evaluate().legs)


PLANS = {
    "scratch": 'preset = "scratch"',
    "shared": 'preset = "shared"',
    "forward": 'preset = "forward"',
    "backward": 'preset = "backward"',
    "alternate": 'preset = "alternate"',
    "paper": 'preset = "paper"',
    "auto": 'preset = "auto"\nfvu_ratio = 1.3\nsurvey_tokens = 2048',
    "identity": 'preset = "hub"\nmethod = "identity"',
    "rescale": 'preset = "hub"\nmethod = "rescale"',
    "procrustes": 'preset = "hub"\nmethod = "procrustes"',
    "zero-shot": 'preset = "hub"\ntransfer_tokens = 0',
    "forked, with reuse": 'preset = "hub"\nfork_at = 0.5\nreuse = 2',
}


@pytest.mark.parametrize("name", PLANS)
def test_every_preset_and_method(folder: Path, tmp_path: Path, saerelay: Any, name: str) -> None:
    plan = PLANS[name]
    path = recipe(folder, plan)
    if "transfer_tokens = 0" in plan:
        path.write_text(path.read_text().replace("transfer_tokens = 2048\n", ""))
    saerelay("train", path, "--out", tmp_path / "run")
    assert list(sr.load(tmp_path / "run"))


def test_a_run_is_cached_interrupted_and_resumed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(folder, 'preset = "hub"\ncontrols = [0]', "topk", f"[data] -> [data]\ncache = '{tmp_path}/cache'")
    command(monkeypatch, "train", path, "--out", tmp_path / "whole")
    tick = "saerelay.training.progress.PlainLog.tick"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(tick, lambda log, cursor: signal.raise_signal(signal.SIGINT) if cursor == 3200 else None)
        sr.train_run(Recipe.from_toml(path), tmp_path / "stopped", console=Console(file=io.StringIO()))
    command(monkeypatch, "train", path, "--out", tmp_path / "stopped", "--resume")
    whole = sr.load(tmp_path / "whole")
    resumed = sr.load(tmp_path / "stopped")
    for leg_id in whole:
        for name, tensor in whole[leg_id].tensors().items():
            assert torch.equal(resumed[leg_id].tensors()[name], tensor), (leg_id, name)


def test_a_run_that_was_begun_on_a_gpu_goes_on_without_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(folder, 'preset = "shared"', "topk", 'device = "cuda" -> device = "auto"')
    tick = "saerelay.training.progress.PlainLog.tick"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(tick, lambda log, cursor: signal.raise_signal(signal.SIGINT) if cursor == 3200 else None)
        sr.train_run(Recipe.from_toml(path), tmp_path / "run", console=Console(file=io.StringIO()))
    assert sr.load(tmp_path / "run").plan.facts.device == "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    shown = io.StringIO()
    suite = sr.train_run(Recipe.from_toml(path), tmp_path / "run", resume=True, console=Console(file=shown, width=1000))
    assert suite.plan.facts.device == "cpu" and list(suite) == [leg.id for leg in suite.plan.legs]
    assert "this run was begun with" in shown.getvalue()


def test_a_run_that_goes_on_on_another_gpu_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_run(Recipe.from_toml(recipe(folder)))
    paths = RunDirectory(tmp_path)
    training = Training(plan, Cohort(128))
    training.save(paths, training.meet(Journal(None, None)))  # type: ignore[arg-type]
    training.commit(paths)
    shown = io.StringIO()
    with watching(plan, paths, Console(file=shown)):
        assert shown.getvalue() == ""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "another")
    with watching(plan, paths, Console(file=shown, width=400)):
        assert "'gpu': 'another'" in shown.getvalue() and "will not be bitwise" in shown.getvalue()


GOALS = """
[[plan.legs]]
id = "a"
layer = 1
tokens = 6144
goal_fvu = 0.9
[[plan.legs]]
id = "b"
layer = 0
parent = "a"
tokens = 2048
predicted_fvu = 0.5
goal_fvu = 1e-4
"""


def test_legs_with_goals(folder: Path, tmp_path: Path, saerelay: Any) -> None:
    saerelay("train", recipe(folder, GOALS), "--out", tmp_path / "run")
    suite = sr.load(tmp_path / "run")
    assert suite.info(suite.leg("a")).tokens < 6144


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A finished run."""
    with fake_cuda():
        path = recipe(folder, 'preset = "hub"\ncontrols = [0]', "topk", "[evaluate] -> snapshots = [0.5]\n[evaluate]")
        sr.train_run(Recipe.from_toml(path), folder / "run")
    return folder / "run"


HOPS: dict[str, tuple[int, list[str]]] = {
    "as it is": (2, []),
    "untrained": (2, ["--tokens", "0"]),
    "home, only measured": (1, ["--tokens", "0"]),
    "home, trained": (1, ["--tokens", "512"]),
    "wider": (2, ["--tokens", "0", "--n-latents", "96"]),
    "pruned": (2, ["--tokens", "0", "--n-latents", "40", "--k", "3"]),
    "to batchtopk": (0, ["--tokens", "0", "--architecture", "batchtopk"]),
    "to jumprelu": (0, ["--tokens", "0", "--architecture", "jumprelu"]),
    "to relu": (0, ["--tokens", "0", "--architecture", "relu"]),
    "from another model": (2, ["--tokens", "0", "--from-model", "MODEL"]),
}


@pytest.mark.parametrize("name", HOPS)
def test_hops(folder: Path, run: Path, tmp_path: Path, saerelay: Any, name: str) -> None:
    layer, options = HOPS[name]
    options = [str(folder / "model") if option == "MODEL" else option for option in options]
    source = ["--from", run / "legs/L1", "--to-layer", layer, "--recipe", recipe(folder)]
    saerelay("hop", *source, "--out", tmp_path / "out", *options)
    assert len(sr.load(tmp_path / "out")) == 1


def test_analyses(folder: Path, run: Path, tmp_path: Path, saerelay: Any) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": [1 + i, 3 + i, 5 + i], "right": 7 + i, "wrong": 40 - i} for i in range(12)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    saerelay("eval", run)
    saerelay("matrix", run, "--methods", "identity,affine,procrustes,affine+refit", "--snapshots")
    saerelay("measures", run, "--prompts", prompts)
    saerelay("report", run)
    suite = sr.load(run)
    assert suite.lineage() and suite.features("L1")


def test_circuits(folder: Path, run: Path, tmp_path: Path, saerelay: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saerelay.analysis.circuits.ACCURACY", 0.0)
    monkeypatch.setattr("saerelay.analysis.circuits.CLEAR", -1e9)  # a random model can do nothing
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": [1 + i, 3 + i, 5 + i], "right": 7 + i, "wrong": 40 - i} for i in range(16)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for method in ("attribution", "integrated-gradients"):
        saerelay("circuits", run, "--task", prompts, "--k", "2", "--method", method)


def test_attached_saes_read_and_steer_while_text_is_generated(run: Path) -> None:
    suite = sr.load(run)
    session = Session(suite)
    ids = torch.tensor([[0, 5, 7, 11]], device="cuda")
    with suite.attach(session.model, replace=True) as attached:
        attached[1].ablate(1)
        attached[2].steer(2, 3.0)
        session.model.hf_model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert attached[1].latents().shape == (1, 6, 64) and attached[1].latents(1, 2).shape == (1, 6, 2)


def test_what_an_interpretation_is_about_is_collected(run: Path) -> None:
    subjects = subjects_of(Session(sr.load(run)), {"L1": [0, 1, 2]}, seed=0)
    assert len(subjects["L1"]) == 3


def test_rows_of_two_devices_meet_on_one() -> None:
    x = torch.randn(2048, 16, generator=torch.Generator().manual_seed(0))
    keys: dict[str, Any] = {"k": 4, "n_latents": 64, "batch_tokens": 64, "progress": False}
    transcoder = sr.train(x.to("cuda"), target=2 * x, **keys)
    assert transcoder.W_enc.device == CUDA and (sr.evaluate(transcoder, x.to("cuda"), target=2 * x).fvu or 1) < 1
    for there in ("cuda", "cpu"):
        here = "cpu" if there == "cuda" else "cuda"
        hopped = sr.hop(transcoder, x.to(here), x.to(there), target=(2 * x, 3 * x), tokens=0)
        assert hopped.W_enc.device.type == there


def test_ones_own_tensors_of_the_device_are_trained_on(folder: Path, tmp_path: Path) -> None:
    plan = plan_run(Recipe.from_toml(recipe(folder, 'preset = "forward"')))
    x = torch.randn(8192, 32, generator=torch.Generator().manual_seed(0)).to("cuda")
    tensors = {site: x + site.layer for site in plan.sites}
    stream = TensorStream(tensors, block_tokens=plan.block_tokens, batch_tokens=plan.recipe.train.batch_tokens)
    plan.save(RunDirectory(tmp_path).plan)
    train_plan(plan, RunDirectory(tmp_path), stream, Several([]), torch.device("cuda"))
    assert len(sr.load(tmp_path)) == 3
