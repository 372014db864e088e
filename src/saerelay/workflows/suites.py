"""Whole suites from a script: a model, text, and the recipe's keys as keyword arguments."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from saerelay.analysis.suite import Suite
from saerelay.errors import ModelError, RecipeError
from saerelay.files import read_json
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
    `tokenizer`, if given) are written to `out/model`, where the run reads them; ModelError if another model is there
    from an earlier call. `text` names text files, or is an array of token ids. `keys` are the keys of a recipe (see
    `recipe`). `resume` continues an interrupted run. The result and the errors raised are those of `train_run`.
    """
    is_named = isinstance(model, str | Path)
    if is_named and tokenizer is not None:
        raise RecipeError("train_suite: a tokenizer belongs to a model that is already loaded; a named one has its own")
    out = Path(out)
    ids = None
    ids_file = out / "model" / "ids.npy"
    if isinstance(text, np.ndarray | Tensor):
        ids = np.asarray(text)
        keys["data"] = {**keys.get("data", {}), "tokens": str(ids_file)}
        text = None
    run = recipe(model if is_named else out / "model", text, **keys)
    if not is_named:
        _write_model(model, tokenizer, out / "model")
    if ids is not None:
        ids_file.parent.mkdir(parents=True, exist_ok=True)
        np.save(ids_file, ids.astype(np.uint16 if int(ids.max()) < 2**16 else np.uint32))
    return train_run(run, out, resume=resume, console=Console(stderr=True) if progress else None)


def _write_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write a loaded model to a directory, unless an earlier call did; ModelError if that was another model."""
    if not hasattr(model, "save_pretrained"):
        raise ModelError(f"train_suite: {type(model).__name__} is not a transformers model, nor the name of one")
    if (directory / "config.json").is_file():
        if not _has_weights_of(model, directory):
            raise ModelError(
                f"train_suite: {directory} holds another model than the one given, or an incomplete one; choose "
                f"another out, or, if no run was begun there, remove {directory.parent}"
            )
        return
    model.save_pretrained(directory)
    if tokenizer is None:
        tokenizer = _own_tokenizer(model)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _has_weights_of(model: Any, directory: Path) -> bool:
    """Whether a directory holds a model of this kind with exactly these weights."""
    try:
        if read_json(directory / "config.json")["model_type"] != model.config.model_type:
            return False
        written = type(model).from_pretrained(directory, dtype="auto").state_dict()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # it is damaged or incomplete
        return False
    given = model.state_dict()
    if given.keys() != written.keys():
        return False
    return all(torch.equal(given[name].to(tensor), tensor) for name, tensor in written.items())


def _own_tokenizer(model: Any) -> Any:
    """Return the tokenizer of the place that a model was loaded from; None if there is none."""
    from transformers import AutoTokenizer

    name = model.config.name_or_path
    try:
        return AutoTokenizer.from_pretrained(name) if name else None
    except (OSError, ValueError):
        return None
