"""safetensors files of a run directory: written atomically; errors name the file if it is damaged."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saerelay.errors import RunDirectoryError
from saerelay.files import parse_json, reason, replacing


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; OSError if the disk does not accept it."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as temporary:
            save_file(contiguous, temporary, metadata)
    except safetensors.SafetensorError as error:  # holds the operating system's error number only in its text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(f"{path}: cannot be written ({error})") from None
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def read_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """Read a safetensors file; if it is damaged, RunDirectoryError names the file and the remedy."""
    with damage_named(path, remedy):
        return load_file(path)


def read_shapes(path: Path, remedy: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype ("F32") and shape of each tensor of a safetensors file, from its header; no tensor is read."""
    with damage_named(path, remedy), safetensors.safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def read_facts(path: Path, remedy: str) -> dict[str, Any]:
    """Read the JSON under "facts" in the metadata of a safetensors file, without its tensors."""
    text = read_metadata(path, remedy).get("facts", "")
    with damage_named(path, remedy):
        facts = parse_json(text)
        if not isinstance(facts, dict):
            raise ValueError("its facts are not a JSON object")
        return facts


def read_metadata(path: Path, remedy: str) -> dict[str, str]:
    """Read the metadata of a safetensors file, without its tensors."""
    with damage_named(path, remedy), safetensors.safe_open(path, framework="pt") as file:
        return file.metadata() or {}


@contextmanager
def damage_named(path: Path, remedy: str) -> Iterator[None]:
    """Turn any error from a damaged safetensors file into a RunDirectoryError that names the file and the remedy.

    A file that the operating system refuses to read may be intact, so the error does not advise deleting it.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise RunDirectoryError(f"{path}: not a regular file; {remedy}")
    try:
        with path.open("rb"):
            pass
        yield
    except OSError as error:
        if error.filename is None:  # raised by a library that read something unexpected
            raise RunDirectoryError(f"{path}: damaged ({error}); {remedy}") from None
        raise RunDirectoryError(reason(error)) from None
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise RunDirectoryError(f"{path}: damaged ({error}); {remedy}") from None


# --- digests ---------------------------------------------------------------------------------------------------------


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A digest of each tensor: its dtype, shape and bytes.

    >>> one = digests({"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2, 1)})
    >>> one["a"] == one["b"], one["a"] == one["c"]
    (True, False)
    """
    with ThreadPoolExecutor() as threads:  # hashing lets other threads run
        return dict(zip(tensors, threads.map(_digest, tensors.values()), strict=True))


def _digest(tensor: Tensor) -> str:
    what = f"{tensor.dtype} {tuple(tensor.shape)}"
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(content.data, digest_size=8, key=what.encode()).hexdigest()


def changed_tensor(tensors: Mapping[str, Tensor], expected: Mapping[str, str]) -> str:
    """The name of a tensor that is missing or does not match its digest; "" if all match."""
    found = digests(tensors)
    names = sorted({*found, *expected})
    return next((name for name in names if found.get(name) != expected.get(name)), "")
