"""safetensors files of a run directory: written atomically, and named if they are damaged."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from saerelay.errors import RunDirectoryError
from saerelay.files import replacing


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; RunDirectoryError if the disk does not take it."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as temporary:
            save_file(contiguous, temporary, metadata)
    except (OSError, safetensors.SafetensorError) as error:
        raise RunDirectoryError(
            f"{path}: cannot be written ({error}); free disk space and continue with --resume"
        ) from None


def read_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """Read a safetensors file; RunDirectoryError names it, and what to do, if it is damaged."""
    with damage_named(path, remedy):
        return load_file(path)


def read_facts(path: Path, remedy: str) -> dict[str, Any]:
    """Read the JSON under "facts" in the metadata of a safetensors file, without its tensors."""
    with damage_named(path, remedy), safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["facts"])


@contextmanager
def damage_named(path: Path, remedy: str) -> Iterator[None]:
    """Turn whatever a damaged safetensors file raises into a RunDirectoryError that names the file and the remedy."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise RunDirectoryError(f"{path}: damaged ({error}); {remedy}") from None
