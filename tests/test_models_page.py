"""The page of models says what the probe finds: a sample of its families, all of them by one command."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"
SAMPLE = (
    "bert",
    "falcon",
    "gemma2",
    "gemma3n_text",
    "gpt2",
    "granitemoeshared",
    "jamba",
    "jetmoe",
    "llama",
    "mamba",
    "minicpm3",
    "mllama",
    "modernbert-decoder",
    "opt",
    "xlm",
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("models_page", DOCS / "models.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", SAMPLE)
def test_a_row_is_what_the_probe_finds(family: str, script: ModuleType) -> None:
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| {family} \|.*$", page, re.M)
    assert row and script.row(family) == row[0]


@pytest.mark.slow
def test_every_family_of_this_transformers_has_its_row(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    for row in script.rows():
        assert row in page
    assert "llama" in capsys.readouterr().err and sys.modules["transformers"]
