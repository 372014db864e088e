"""Published dictionaries."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file

from saerelay.errors import RunDirectoryError
from saerelay.planning.plan import SCHEMA_VERSION
from saerelay.runs.files import read_json, write_json, write_tensors
from saerelay.sae.architectures import architecture_named
from saerelay.sae.dictionary import Dictionary


def publish(directory: Path, dictionary: Dictionary, info: Mapping[str, Any]) -> None:
    """Write dictionary.safetensors and then dictionary.json, whose presence says that both are whole."""
    write_tensors(directory / "dictionary.safetensors", {n: t.cpu() for n, t in dictionary.tensors().items()})
    own = {
        "schema_version": SCHEMA_VERSION,
        "architecture": dictionary.architecture,
        "k": dictionary.k,
        "d_model": dictionary.d_model,
        "n_latents": dictionary.n_latents,
    }
    write_json(directory / "dictionary.json", own | dict(info) | own)


def read_dictionary(directory: Path) -> tuple[Dictionary, dict[str, Any]]:
    """Read a published dictionary and what its JSON says of it."""
    if not (directory / "dictionary.json").is_file():
        raise RunDirectoryError(
            f"{directory}: no dictionary here (dictionary.json is missing); give a directory such as runs/a/legs/L3"
        )
    info = read_json(directory / "dictionary.json")
    path = directory / "dictionary.safetensors"
    try:
        tensors = load_file(path)
        if info["schema_version"] != SCHEMA_VERSION:
            raise RunDirectoryError(
                f"{directory}: schema {info['schema_version']}, this program reads {SCHEMA_VERSION}"
            )
        architecture_named(info["architecture"])
        dictionary = Dictionary(architecture=info["architecture"], k=info["k"], **tensors)
        _check_shapes(dictionary, info["n_latents"], info["d_model"], path)
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise RunDirectoryError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
    return dictionary, info


def _check_shapes(dictionary: Dictionary, n_latents: int, d_model: int, path: Path) -> None:
    F, D = n_latents, d_model
    expected = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,), "threshold": (F,)}
    for name, tensor in dictionary.tensors().items():
        if tuple(tensor.shape) != expected[name]:
            raise RunDirectoryError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {expected[name]}")
