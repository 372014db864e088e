"""Published dictionaries: `dictionary.safetensors`, and `dictionary.json` beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from saerelay.errors import RunDirectoryError
from saerelay.runs.documents.training import DictionaryInfo
from saerelay.runs.tensors import changed_tensor, damage_named, digests, read_shapes, read_tensors, write_tensors
from saerelay.sae.architectures import architecture_named
from saerelay.sae.dictionary import Dictionary

_REMEDY = DictionaryInfo.REMEDY


def publish(directory: Path, dictionary: Dictionary, info: Mapping[str, Any]) -> None:
    """Write dictionary.safetensors and then dictionary.json, whose presence means that both are complete.

    `info` holds the keys of `DictionaryInfo` beyond the dictionary's shape, and any others worth keeping.
    """
    tensors = {name: tensor.cpu() for name, tensor in dictionary.tensors().items()}
    write_tensors(directory / "dictionary.safetensors", tensors)
    shape = {
        "architecture": dictionary.architecture,
        "k": dictionary.k,
        "d_model": dictionary.d_model,
        "n_latents": dictionary.n_latents,
        "digests": digests(tensors),
    }
    if dictionary.d_out != dictionary.d_model:
        shape["d_out"] = dictionary.d_out
    if dictionary.W_skip is not None:
        shape["skip_connection"] = True
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
    _check_header(info, path)
    tensors = read_tensors(path, _REMEDY)
    changed = changed_tensor(tensors, info.digests) if info.digests else ""
    if changed:
        raise RunDirectoryError(
            f"{path}: damaged (tensor {changed} is not the one that dictionary.json was written for); {_REMEDY}"
        )
    with damage_named(path, _REMEDY):
        for name, tensor in tensors.items():
            if not bool(torch.stack(tensor.aminmax()).isfinite().all()):  # NaN anywhere gives NaN
                raise ValueError(f"{name} has values that are not finite")
        dictionary = Dictionary(architecture=info.architecture, k=info.k, **tensors)  # type: ignore[arg-type]
    return dictionary, info


def read_info(directory: Path) -> DictionaryInfo:
    """Read the facts about a published dictionary, without its weights."""
    return DictionaryInfo.load(directory / "dictionary.json")


def _check_header(info: DictionaryInfo, path: Path) -> None:
    """Raise RunDirectoryError, before any tensor is read, unless kind, k, names, dtypes and shapes are right."""
    F = info.n_latents
    D = info.d_model
    D_out = info.d_out or D
    with damage_named(path.parent / "dictionary.json", _REMEDY):
        kind = architecture_named(info.architecture)
    lacks_k = kind.l0_key == "k" and info.k is None
    if lacks_k or (info.k is not None and not 1 <= info.k <= F):
        raise RunDirectoryError(f"{path.parent}: k is {info.k}, expected a whole number from 1 to {F}")
    expected = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, D_out), "b_dec": (D_out,), "threshold": (F,)}
    if kind.has_gate:
        expected["r_mag"] = (F,)
    if info.skip_connection:
        expected["W_skip"] = (D_out, D)
    found = read_shapes(path, _REMEDY)
    unknown = sorted(found.keys() - expected.keys())
    if unknown:
        raise RunDirectoryError(f"{path}: has a tensor {unknown[0]}, which no dictionary has; {_REMEDY}")
    optional = set() if kind.has_threshold else {"threshold"}
    missing = sorted(expected.keys() - found.keys() - optional)
    if missing:
        raise RunDirectoryError(f"{path}: damaged (tensor {missing[0]} is missing); {_REMEDY}")
    for name, expected_shape in expected.items():
        if name not in found:
            continue
        dtype, shape = found[name]
        if shape != expected_shape:
            raise RunDirectoryError(f"{path}: {name} has shape {shape}, expected {expected_shape}")
        if dtype != "F32":
            raise RunDirectoryError(f"{path}: {name} is of type {dtype}, expected F32; {_REMEDY}")
