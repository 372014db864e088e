"""Files written under a temporary name and renamed; JSON without NaN."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from saerelay.errors import RunDirectoryError


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically; NaN and infinities become null."""
    write_text(path, json.dumps(finite(data), indent=1, allow_nan=False) + "\n")


def finite(data: Any) -> Any:
    """The same data with NaN and infinities, which JSON does not know, as None."""
    return leafwise(lambda leaf: None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf, data)


def leafwise(function: Callable[[Any], Any], data: Any) -> Any:
    """JSON with a function of each of its leaves in their place.

    >>> leafwise(str, {"a": [1, None]})
    {'a': ['1', 'None']}
    """
    match data:
        case dict():
            return {key: leafwise(function, value) for key, value in data.items()}
        case list() | tuple():
            return [leafwise(function, value) for value in data]
        case _:
            return function(data)


def read_json(path: Path) -> Any:
    """Read JSON, or say which file is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path}: cannot be read ({error})") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors atomically; RunDirectoryError if the disk does not take them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    except (OSError, safetensors.SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise RunDirectoryError(
            f"{path}: cannot be written ({error}); free disk space and continue with --resume"
        ) from None
    temporary.replace(path)
