"""Whole suites from a script: a model, text, and the recipe's keys as keyword arguments."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor

from saerelay.analysis.suite import Suite
from saerelay.errors import ModelError, RecipeError
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import Recipe
from saerelay.workflows.keys import sectioned
from saerelay.workflows.launch import train_run
from saerelay.workflows.settle import check_data, plan_run

Text = str | Path | Sequence[str | Path] | None


def recipe(model: str | Path = "demo", text: Text = None, **keys: Any) -> Recipe:
    """Make a recipe in Python from the keys of `run.toml`, whatever their section.

    >>> run = recipe("demo", layers=[3, 4, 5], k=24, root_tokens="1M", controls=[4])
    >>> run.sites.layers, run.dictionary.activation.k, run.plan.root_tokens
    ([3, 4, 5], 24, 1000000)

    `text` names text files or directories of text files. A key that several sections have is given by section:
    `data={"tokens": "ids.npy"}`. Raises RecipeError for unknown keys and impossible values.
    """
    sections = sectioned(keys, Recipe.model_fields)
    if text is not None:
        paths = [text] if isinstance(text, str | Path) else text
        sections.setdefault("data", {})["text"] = [str(path) for path in paths]
    sections.setdefault("model", {})["name"] = str(model)
    return Recipe.parse(sections, source="recipe")


def plan(model: str | Path = "demo", text: Text = None, **keys: Any) -> Plan:
    """Return the plan of such a recipe: each SAE, its parent, and its tokens; trains nothing.

    >>> [leg.id for leg in plan("demo", layers=[4, 5], roots=[5]).legs]
    ['L5', 'L4-from-L5']
    """
    asked = recipe(model, text, **keys)
    check_data(asked)
    return plan_run(asked)


def train_suite(
    model: Any,
    text: Text | np.ndarray | Tensor = None,
    *,
    out: str | Path,
    tokenizer: Any = None,
    resume: bool = False,
    progress: bool = True,
    **keys: Any,
) -> Suite:
    """Train SAEs for the layers of a language model: one from scratch, the others transferred from it.

        suite = sr.train_suite("EleutherAI/pythia-70m", "notes/", out="runs/a", k=32, root_tokens="5M")
        suite[sr.Site(3)].encode(x)

    `model` is a name, a directory, or a loaded transformers model, which is used as it is: its weights (and the
    `tokenizer`, if given) are written to `out/model`, where the run reads them. `text` names text files, or is an array
    of token ids. `keys` are the keys of a recipe (see `recipe`). `resume` continues an interrupted run. The result and
    the errors raised are those of `train_run`.
    """
    out = Path(out)
    if not isinstance(model, str | Path):
        model = _written(model, tokenizer, out / "model")
    elif tokenizer is not None:
        raise RecipeError("train_suite: a tokenizer belongs to a model that is already loaded; a named one has its own")
    if isinstance(text, np.ndarray | Tensor):
        ids = np.asarray(text)
        path = out / "model" / "ids.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, ids.astype(np.uint16 if int(ids.max()) < 2**16 else np.uint32))
        keys["data"] = {**keys.get("data", {}), "tokens": str(path)}
        text = None
    run = recipe(model, text, **keys)
    return train_run(run, out, resume=resume, console=Console(stderr=True) if progress else None)


def _written(model: Any, tokenizer: Any, directory: Path) -> Path:
    """Write a loaded model to a directory, unless it is there from an earlier call; returns the directory."""
    if not hasattr(model, "save_pretrained"):
        raise ModelError(f"train_suite: {type(model).__name__} is not a transformers model, nor the name of one")
    if (directory / "config.json").is_file():
        return directory
    model.save_pretrained(directory)
    if tokenizer is None:
        tokenizer = _own_tokenizer(model)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return directory


def _own_tokenizer(model: Any) -> Any:
    """Return the tokenizer of the place that a model was loaded from; None if there is none."""
    from transformers import AutoTokenizer

    name = model.config.name_or_path
    try:
        return AutoTokenizer.from_pretrained(name) if name else None
    except (OSError, ValueError):
        return None
