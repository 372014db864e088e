"""Files of every kind: written whole or not at all, and JSON without NaN."""

import json
import math
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saerelay.errors import RunDirectoryError


@contextmanager
def replacing(path: Path, *, several_writers: bool = False) -> Iterator[Path]:
    """Give a temporary path to write to, which replaces `path` when the block ends, and is removed if it fails.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with replacing(folder / "a.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> [file.name for file in folder.iterdir()]
    ['a.txt']

    A reader sees the old file or the new one, never half of it, even after a power cut. With `several_writers` each
    process writes to a name of its own; the last to finish wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = f".{uuid.uuid4().hex}.tmp" if several_writers else ".tmp"
    temporary = path.with_name(f".{path.name}{suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any, *, indent: int | None = 1) -> None:
    """Write JSON atomically; NaN and infinities become null. Without `indent`, on one line and without blanks."""
    separators = None if indent else (",", ":")
    text = json.dumps(finite(data), indent=indent, separators=separators, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; RunDirectoryError names the file if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path}: cannot be read ({error})") from None


def finite(data: Any) -> Any:
    """The same data with None for NaN and infinities, which JSON does not have."""
    return leafwise(_finite_leaf, data)


def _finite_leaf(leaf: Any) -> Any:
    if isinstance(leaf, float) and not math.isfinite(leaf):
        return None
    return leaf


def leafwise(function: Callable[[Any], Any], data: Any) -> Any:
    """JSON data with a function applied to each of its leaves.

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
