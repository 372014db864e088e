"""Runs to damage, and the command line within this process."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from world import build

from saerelay.cli import main


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """A function that runs a command line: its exit code and all that it printed."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["saerelay", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 0
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, tokens and recipes, and a finished run in `trained`."""
    import saerelay as sr

    place = tmp_path_factory.mktemp("world")
    build(place)
    sr.train_run(sr.Recipe.from_toml(place / "r.toml"), place / "trained")
    return place


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Path:
    """A finished run of one's own."""
    return shutil.copytree(world / "trained", tmp_path / "run")
