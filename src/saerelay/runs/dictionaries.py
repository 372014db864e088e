"""Published dictionaries: `dictionary.safetensors`, and `dictionary.json` beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saerelay.errors import RunDirectoryError
from saerelay.runs.documents.training import DictionaryInfo
from saerelay.runs.tensors import damage_named, read_tensors, write_tensors
from saerelay.sae.architectures import architecture_named
from saerelay.sae.dictionary import Dictionary

_REMEDY = DictionaryInfo.REMEDY


def publish(directory: Path, dictionary: Dictionary, info: Mapping[str, Any]) -> None:
    """Write dictionary.safetensors and then dictionary.json, whose presence says that both are whole.

    `info` are the keys of `DictionaryInfo` beyond the dictionary's shape, and any others worth keeping.
    """
    tensors = {name: tensor.cpu() for name, tensor in dictionary.tensors().items()}
    write_tensors(directory / "dictionary.safetensors", tensors)
    shape = {
        "architecture": dictionary.architecture,
        "k": dictionary.k,
        "d_model": dictionary.d_model,
        "n_latents": dictionary.n_latents,
    }
    document = DictionaryInfo.from_data({**info, **shape}, source=str(directory))
    document.save(directory / "dictionary.json")


def read_dictionary(directory: Path) -> tuple[Dictionary, DictionaryInfo]:
    """Read a published dictionary and what its JSON says about it."""
    if not (directory / "dictionary.json").is_file():
        raise RunDirectoryError(
            f"{directory}: no dictionary here (dictionary.json is missing); give a directory such as runs/a/legs/L3"
        )
    info = read_info(directory)
    path = directory / "dictionary.safetensors"
    tensors = read_tensors(path, _REMEDY)
    with damage_named(path, _REMEDY):
        architecture_named(info.architecture)
        dictionary = Dictionary(architecture=info.architecture, k=info.k, **tensors)  # type: ignore[arg-type]
    _check_shapes(dictionary, info, path)
    return dictionary, info


def read_info(directory: Path) -> DictionaryInfo:
    """What is known about a published dictionary, without its weights."""
    return DictionaryInfo.load(directory / "dictionary.json")


def _check_shapes(dictionary: Dictionary, info: DictionaryInfo, path: Path) -> None:
    F = info.n_latents
    D = info.d_model
    expected = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,), "threshold": (F,)}
    for name, tensor in dictionary.tensors().items():
        shape = tuple(tensor.shape)
        if shape != expected[name]:
            raise RunDirectoryError(f"{path}: {name} has shape {shape}, expected {expected[name]}")
