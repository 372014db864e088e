"""What the documentation shows of ours runs; what it lists is there."""

import importlib
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import pytest
import tables
import torch
import typer
from test_cli import call
from transformers import GPTNeoXForCausalLM

import saerelay as sr
from saerelay import cli
from saerelay.document import Document
from saerelay.interop import FORMATS, WRITTEN
from saerelay.planning.toml import annotated_toml
from saerelay.runs import documents
from saerelay.runs.documents.latents import LineageFacts

DOCS = Path(__file__).parent.parent / "docs"
RECIPE = """
[model]
name = "model"
dtype = "float32"
device = "cpu"
[data]
tokens = "tokens.npy"
context = 16
block_tokens = 1024
prepend_bos = false
[sites]
layers = [3, 4, 5]
[dictionary]
n_latents = 64
k = 4
[plan]
roots = [5]
root_tokens = "4k"
transfer_tokens = "2k"
moment_tokens = "2k"
refit_tokens = "1k"
[train]
batch_tokens = 64
[evaluate]
tokens = "1k"
"""
SMALLER = {"5M": "2k", "8192": "96"}
"""Numbers in commands, and what is run instead."""


def fences(page: str, title: str) -> list[tuple[str, str]]:
    """Language and text of the code blocks of a page that have a title."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf'^```(\w+) title="{title}"\n(.*?)^```', text, flags=re.M | re.S)


@pytest.fixture
def place(tmp_path: Path, save_tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a random model of 6 layers, tokens and a recipe, to work in."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(Path("model"), n_layers=6, eos_token_id=None)
    steps = np.random.default_rng(0).integers(1, 4, size=40_000).cumsum() % 100 + 1
    np.save("tokens.npy", steps.astype(np.uint16))
    Path("run.toml").write_text(RECIPE)
    return tmp_path


@pytest.mark.slow
def test_coming_from(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of ours, in order, on a tiny model."""
    model = GPTNeoXForCausalLM.from_pretrained("model")
    inputs = {"input_ids": torch.tensor([[1, 3, 5]])}
    names = {"model": model, "inputs": inputs, "x": torch.randn(10, 32)}
    blocks = fences("coming-from.md", "saerelay")
    assert len(blocks) > 7
    for language, code in blocks:
        if language == "python":
            exec(code, names)
            continue
        for line in code.splitlines():
            words = [SMALLER.get(word, word) for word in line.split()]
            exit_code, _, stderr = call(*words[1:], capsys=capsys, monkeypatch=monkeypatch)
            assert exit_code == 0, f"{line}\n{stderr}"
    assert names["z"].shape == (1, 22, 64)


@pytest.mark.slow
def test_python_examples(place: Path) -> None:
    """README.md's and docs/python.md's, in order; only the last run has another name than the first."""
    model = GPTNeoXForCausalLM.from_pretrained("model")
    layer4 = torch.randn(2048, 32)
    names = {"model": model, "inputs": {"input_ids": torch.tensor([[1, 3, 5]])}, "x": torch.randn(10, 32), "sr": sr}
    names |= {"x_layer4": layer4, "x_layer5": layer4 + 0.1 * torch.randn(2048, 32)}
    names["tokens"] = np.load("tokens.npy")
    names["ids"] = torch.from_numpy(names["tokens"][:4096].astype(np.int64)).view(-1, 16)
    recipe = sr.Recipe.from_toml("run.toml")
    sr.train_run(recipe, "runs/a")
    for page in (DOCS.parent / "README.md", DOCS / "python.md"):
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        assert blocks
        for block in blocks:
            # The model here has 64 latents, and no run is written over.
            smaller = (
                block.replace("123", "12")
                .replace("768", "32")
                .replace('train_run(recipe, "runs/a")', 'train_run(recipe, "runs/b")')
            )
            exec(smaller, names)
    assert names["hopped"].d_model == 32 and len(names["suite"]) == 3  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_page_on_transcoders(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its recipe, the code and the commands below it, in order."""
    ((_, keys),) = fences("transcoders.md", "transcoders.toml")
    recipe = tomllib.loads(RECIPE)
    for section, values in tomllib.loads(keys).items():
        recipe[section] = recipe[section] | values
    recipe["sites"]["layers"] = [0, 1]
    recipe["plan"]["roots"] = [1]
    recipe["dictionary"]["k"] = 4
    Path("transcoders.toml").write_text(annotated_toml(sr.Recipe.parse(recipe)))
    sr.train_run(sr.Recipe.from_toml("transcoders.toml"), "runs/transcoders")
    page = (DOCS / "transcoders.md").read_text(encoding="utf-8")
    names = {"sr": sr, "x": torch.randn(10, 32)}
    (block,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    exec(block, names)
    assert torch.equal(names["y_hat"], names["transcoder"](names["x"]))  # type: ignore[operator]
    commands = [line for name, line in commands_shown() if name == "transcoders.md"]
    assert len(commands) == 3
    for command in commands:
        code, _, errors = call(*shlex.split(command)[1:], capsys=capsys, monkeypatch=monkeypatch)
        assert code == 0, errors
    assert Path("transcoder-set/config.yaml").is_file() and Path("imported/dictionary.json").is_file()


def commands_shown() -> Iterator[tuple[str, str]]:
    """Every `saerelay ...` line of a code block in README.md and docs/, with its page."""
    for page in [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]:
        for block in re.findall(r"^```[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("saerelay "):
                    yield page.name, line


def test_commands_shown_are_commands() -> None:
    """Each is parsed by the program: the command, its options and their values are what it takes."""
    lines = list(commands_shown())
    assert len(lines) > 20
    group = typer.main.get_command(cli.app)
    for page, line in lines:
        name, *arguments = shlex.split(line.split(" > ")[0], comments=True)[1:]
        command = group.commands[name]  # type: ignore[attr-defined]
        try:
            command.make_context(name, arguments)
        except click.UsageError as error:
            pytest.fail(f"{page}: {line}\n{error.format_message()}")


def test_recipes_of_coming_from_are_valid() -> None:
    recipes = fences("coming-from.md", "saerelay: run.toml")
    assert len(recipes) == 2
    for _, text in recipes:
        sr.Run.parse(tomllib.loads(text))


def test_formats_are_all_listed() -> None:
    """A row for each format, in order, and it is said which are written."""
    table = next(part for part in (DOCS / "formats.md").read_text("utf-8").split("\n\n") if "| verified" in part)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    names = [re.split(r"[ :]", row[0].lower().replace("gemma scope", "gemma_scope"))[0] for row in rows]
    assert names == [format.NAME for format in FORMATS]
    assert [name for name, row in zip(names, rows, strict=True) if row[2] != "no"] == list(WRITTEN)


def test_tables_of_keys_are_those_of_the_types() -> None:
    """`python docs/tables.py --write` makes them so; every document has one, and every key a meaning."""
    page = (DOCS / "run-directory.md").read_text(encoding="utf-8")
    assert tables.render(page) == page
    described = set(re.findall(r"<!-- keys: \w+\.(\w+) -->", page))
    for path in sorted(Path(documents.__path__[0]).glob("*.py")):
        module = importlib.import_module(f"saerelay.runs.documents.{path.stem}")
        for name, kind in vars(module).items():
            is_file = isinstance(kind, type) and issubclass(kind, Document) and kind is not Document
            if is_file and kind.__module__ == module.__name__ and kind is not LineageFacts:
                assert name in described


def test_reference_lists_every_public_name() -> None:
    page = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"\[`(\w+)`\]\[saerelay\.([\w.]+)\.\w+\]", page))
    stub = (Path(sr.__file__).parent / "__init__.pyi").read_text(encoding="utf-8")
    assert listed == {name: home for home, name in re.findall(r"^from \.([\w.]+) import \w+ as (\w+)$", stub, re.M)}
    modules = {path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md")}
    for home in set(listed.values()):
        assert any(f"::: saerelay.{home}\n" in text for text in modules), home
