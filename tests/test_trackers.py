"""Loggers: TensorBoard and Weights & Biases get every point of the training log once, and are closed."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import saerelay as sr
from saerelay.errors import RecipeError
from saerelay.training.trackers import SHOWN

pytestmark = pytest.mark.slow

Points = dict[tuple[str, int], dict[str, float]]
"""Values by leg and age."""


class FakeRun:
    """Stands for one session with Weights & Biases; `killed_after` points, the process dies."""

    def __init__(self, killed_after: int | None) -> None:
        self.logged: list[dict[str, Any]] = []
        self.killed_after = killed_after
        self.n_finished = 0

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)
        if len(self.logged) == self.killed_after:
            raise KeyboardInterrupt

    def finish(self) -> None:
        self.n_finished += 1


class FakeWandb(ModuleType):
    """The module `wandb`, as far as it is used: it remembers what it was told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.sessions: list[dict[str, Any]] = []
        self.runs: list[FakeRun] = []
        self.killed_after: int | None = None

    def init(self, **arguments: Any) -> FakeRun:
        self.sessions.append(arguments)
        self.runs.append(FakeRun(self.killed_after))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    """A module `wandb` that sends nothing."""
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> sr.Recipe:
    """A root and a transfer over six blocks; the state is saved at every other block."""
    steps = np.random.default_rng(0).integers(1, 4, size=60_000).cumsum() % 100 + 1
    np.save(tmp_path / "tokens.npy", steps.astype(np.uint16))
    sections: dict[str, Any] = {
        "model": {"name": str(tiny_model), "dtype": "float32", "device": "cpu"},
        "sites": {"layers": [0, 1]},
        "data": {"tokens": str(tmp_path / "tokens.npy"), "context": 16, "block_tokens": 1024},
        "dictionary": {"n_latents": 64, "k": 4},
        "plan": {"preset": "forward", "root_tokens": 4096, "transfer_tokens": 1500, "moment_tokens": 1024},
        "train": {"batch_tokens": 64, "checkpoint_every": 2048, "loggers": ["wandb"]},
    }
    return sr.Recipe.parse(sections, source="test")


def training_log(run: Path) -> Points:
    """All points of metrics.jsonl."""
    points: Points = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        points[values["leg"], values["age"]] = {name: values[name] for name in SHOWN}
    return points


def sent(runs: list[FakeRun]) -> list[tuple[str, int]]:
    """Leg and age of every point that was sent, in order."""
    points = []
    for run in runs:
        for values in run.logged:
            (key,) = [key for key in values if key.startswith("age/")]
            points.append((key.removeprefix("age/"), values[key]))
    return points


def test_wandb_gets_every_point_and_is_finished(recipe: sr.Recipe, wandb: FakeWandb, tmp_path: Path) -> None:
    suite = sr.train_run(recipe, tmp_path / "run")
    (session,), (run,) = wandb.sessions, wandb.runs
    assert session.pop("config") == recipe.model_dump(mode="json")
    assert session.pop("id").startswith("run-")
    assert session == {"project": "saerelay", "name": "run", "dir": str(tmp_path / "run"), "resume": "allow"}
    log = training_log(tmp_path / "run")
    assert sent([run]) == list(log)
    for (leg, age), values in log.items():
        told = run.logged[list(log).index((leg, age))]
        assert {name: told[f"{name}/{leg}"] for name in SHOWN} == values
    for leg in suite.legs:
        assert (leg.id, leg.budget_tokens) in log, "the last point, too"
    assert run.n_finished == 1


def test_after_a_kill_wandb_gets_no_point_twice_and_none_is_missing(
    recipe: sr.Recipe, wandb: FakeWandb, tmp_path: Path
) -> None:
    wandb.killed_after = 3  # one block after a state was saved
    with pytest.raises(KeyboardInterrupt):
        sr.train_run(recipe, tmp_path / "run")
    wandb.killed_after = None
    sr.train_run(recipe, tmp_path / "run", resume=True)
    first, second = wandb.sessions
    assert first["id"] == second["id"]
    assert [run.n_finished for run in wandb.runs] == [1, 1]
    assert len(wandb.runs[0].logged) == 3
    assert sent(wandb.runs) == list(training_log(tmp_path / "run"))


def test_a_logger_that_fails_does_not_end_the_run(recipe: sr.Recipe, wandb: FakeWandb, tmp_path: Path) -> None:
    def fail(_: FakeRun, *__: object) -> None:
        raise ConnectionError("no network")

    plain = sr.train_run(recipe.changed(train=recipe.train.changed(loggers=[])), tmp_path / "plain")
    for name in ("log", "finish"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeRun, name, fail)
            with pytest.warns(UserWarning, match="WandB failed .ConnectionError: no network"):
                suite = sr.train_run(recipe, tmp_path / name)
        assert training_log(tmp_path / name) == training_log(tmp_path / "plain")
        assert suite["L1-from-L0"].W_enc.equal(plain["L1-from-L0"].W_enc)


def test_a_logger_that_cannot_be_opened_is_one_message(
    recipe: sr.Recipe, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("no api key")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(RecipeError, match=r"wandb cannot be opened \(RuntimeError: no api key\)"):
        sr.train_run(recipe, tmp_path / "run")


def test_tensorboard_gets_every_point_and_changes_no_weight(recipe: sr.Recipe, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watched = recipe.changed(train=recipe.train.changed(loggers=["tensorboard"]))
    unwatched = recipe.changed(train=recipe.train.changed(loggers=[]))
    suite = sr.train_run(watched, tmp_path / "run")
    plain = sr.train_run(unwatched, tmp_path / "plain")
    for leg_id in plain:
        assert plain[leg_id].W_enc.equal(suite[leg_id].W_enc)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    for leg in suite.legs:
        told = [(event.step, event.value) for event in events.Scalars(f"fvu/{leg.id}")]
        log = training_log(tmp_path / "run")
        ages = [age for leg_id, age in log if leg_id == leg.id]
        assert told == [(age, pytest.approx(log[leg.id, age]["fvu"])) for age in ages]
        assert ages[-1] == leg.budget_tokens
