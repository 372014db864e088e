"""A recipe that trains in seconds, for whichever small model a test has."""

from pathlib import Path
from typing import Any

import numpy as np

from saerelay.planning.recipe import Recipe


def sections(model: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A recipe for two layers, small."""
    if not (directory / "tokens.npy").exists():
        ids = np.random.default_rng(0).integers(4, 100, 20_000)
        np.save(directory / "tokens.npy", ids.astype(np.uint16))
    return {
        "model": {"dtype": "float32", "device": "cpu", **model},
        "data": {"tokens": str(directory / "tokens.npy"), "context": 16, "block_tokens": 1024},
        "sites": {"layers": [1, 2]},
        "dictionary": {"n_latents": 48, "k": 4},
        "plan": {"root_tokens": "2k", "transfer_tokens": "1k", "moment_tokens": "1k", "refit_tokens": "1k"},
        "train": {"batch_tokens": 64},
        "evaluate": {"tokens": "1k"},
    }


def recipe(model: dict[str, Any], directory: Path) -> Recipe:
    """The same as a recipe."""
    return Recipe.parse(sections(model, directory), source="test")
