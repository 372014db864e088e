"""Whole suites from a script: a model, text, and the recipe's keys as keyword arguments.

`sr.recipe`, `sr.plan` and `sr.train_suite`; the work is done by `settle` and `launch`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor

from saerelay.analysis.suite import Suite
from saerelay.errors import DataError, ModelError, RecipeError
from saerelay.files import read_json, replacing, write_json
from saerelay.lm.tokens import has_vocabulary
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import Recipe
from saerelay.rank import in_team
from saerelay.runs.directory import RunDirectory
from saerelay.runs.tensors import digests
from saerelay.team import Team
from saerelay.workflows.keys import sectioned
from saerelay.workflows.launch import train_run
from saerelay.workflows.settle import check_data, check_directory, plan_run

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
    `tokenizer`, if given, else that of where it came from) are written to `out/model`, where the run reads them;
    ModelError if another model is there from an earlier call. Give the tokenizer of a model that was loaded from a
    revision on the hub: it may not know which. `text` names text files, or is an array of token ids, (tokens) or
    (documents, tokens); DataError if the run was begun with other ids. `keys` are the keys of a recipe (see `recipe`).
    `resume` continues an interrupted run. The result and the errors raised are those of `train_run`.
    """
    is_named = isinstance(model, str | Path)
    if is_named and tokenizer is not None:
        raise RecipeError("train_suite: a tokenizer belongs to a model that is already loaded; a named one has its own")
    out = Path(out)
    ids = None
    ids_file = out / "model" / "ids.npy"
    if isinstance(text, np.ndarray | Tensor):
        ids = _token_ids(text)
        keys["data"] = {**keys.get("data", {}), "tokens": str(ids_file)}
        text = None
    run = recipe(model if is_named else out / "model", text, **keys)

    def write_inputs() -> None:
        """Write what the run reads from files, unless it is there: rank 0 does this before the others begin."""
        check_directory(RunDirectory(out), resume=resume or in_team())
        if not is_named:
            _write_model(model, tokenizer, out / "model")
        if ids is not None:
            _write_ids(ids, ids_file, RunDirectory(out))

    if ids is not None or not is_named:
        Team.joined().once(write_inputs)
    return train_run(run, out, resume=resume, console=Console(stderr=True) if progress else None)


def _token_ids(given: np.ndarray | Tensor) -> np.ndarray:
    """Return token ids in the smallest type that a file of tokens may have; DataError for what is no token id."""
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        given = given.float().numpy() if given.is_floating_point() else given.numpy()
    if given.dtype.kind not in "iu" or given.ndim not in (1, 2) or not given.size:
        raise DataError(
            f"train_suite: token ids are whole numbers, (tokens) or (documents, tokens); found {given.dtype} of the "
            f"shape {given.shape}"
        )
    smallest = int(given.min())
    largest = int(given.max())
    if smallest < 0 or largest >= 2**32:
        wrong = smallest if smallest < 0 else largest
        raise DataError(f"train_suite: {wrong} is no token id; ids are from 0 to 2**32 - 1, padding included")
    return given.astype(np.uint16 if largest < 2**16 else np.uint32)


def _write_ids(ids: np.ndarray, path: Path, paths: RunDirectory) -> None:
    """Write token ids to a file; DataError if a run was begun with others."""
    if (paths.plan.is_file() or paths.is_surveyed) and path.is_file():
        if not np.array_equal(np.load(path, mmap_mode="r"), ids):
            raise DataError(f"train_suite: the run in {paths.root} was begun with other token ids; choose another out")
        return
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, ids)


def _write_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write a loaded model to a directory, unless an earlier call did; ModelError if that was another model.

    The digests of the weights are written last, so that they tell a complete model, and which one it is.
    """
    if not hasattr(model, "save_pretrained"):
        raise ModelError(f"train_suite: {type(model).__name__} is not a transformers model, nor the name of one")
    written = directory / "weights.json"
    weights = {"model_type": model.config.model_type, "digests": digests(model.state_dict())}
    if (directory / "config.json").is_file():
        if not written.is_file() or read_json(written) != weights:
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
    write_json(written, weights)


def _own_tokenizer(model: Any) -> Any:
    """Return the tokenizer of the place that a model was loaded from; None if there is none.

    It is that of the model's commit if the model knows it, as with transformers 5.0; newer releases do not tell.
    """
    from transformers import AutoTokenizer

    name = model.config.name_or_path
    commit = getattr(model.config, "_commit_hash", None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=commit) if name else None
    except (OSError, ValueError):
        return None
    return tokenizer if tokenizer is not None and has_vocabulary(tokenizer) else None
