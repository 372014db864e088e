"""Files of every kind: written whole or not at all, read only as far as they can be, and JSON without NaN."""

import contextlib
import errno
import json
import math
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_TEXT_BYTES = 2**30
"""No text file is read that is larger: it would have to fit into memory several times over."""
MAX_DEPTH = 64
"""Lists and objects within one another that JSON of other tools may have."""


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
        with contextlib.suppress(OSError):  # what went wrong first is what matters
            temporary.unlink(missing_ok=True)
        raise


def replace_directory(fresh: Path, folder: Path) -> None:
    """Put a finished directory in the place of an older one, which is renamed before it is removed.

    Killed in between, `folder` is the old directory, the new one, or missing, but never half of one.
    """
    remove_replaced(folder)
    if folder.exists():
        folder.replace(_replaced(folder))
    fresh.replace(folder)
    remove_replaced(folder)


def remove_replaced(folder: Path) -> None:
    """Remove what a process that was killed in `replace_directory` has left of the older directory."""
    remove_directory(_replaced(folder))


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def remove_directory(folder: Path) -> None:
    """Remove a directory with all that is in it, if there is one; OSError if it cannot be removed."""
    if folder.exists():
        shutil.rmtree(folder)


def appears(path: Path, seconds: float) -> bool:
    """Whether a file that another machine wrote is seen here in time: a network file system may take a while."""
    deadline = time.monotonic() + seconds
    while not path.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
        if path.parent.is_dir():
            list(path.parent.iterdir())  # has the directory read again
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any, *, indent: int | None = 1) -> None:
    """Write JSON atomically; NaN and infinities become null. Without `indent`, on one line and without blanks."""
    separators = None if indent else (",", ":")
    text = json.dumps(finite(data), indent=indent, separators=separators, allow_nan=False)
    write_text(path, text + "\n")


def read_text(path: Path) -> str:
    """The text of a regular file, in UTF-8; ValueError if it is none, OSError if it cannot be read.

    A pipe might never end, and a device has no size, so neither is opened.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > MAX_TEXT_BYTES:
        raise ValueError(f"{status.st_size / 2**30:.1f} GiB, more than any such file has")
    return path.read_text(encoding="utf-8")


def odd_file(directory: Path, *, deep: bool = False) -> Path | None:
    """A pipe, device or socket among the files of a directory, which could be read forever; None if there is none.

    With `deep`, in the directories below it as well; links to directories are not followed.
    """
    for folder, folders, names in os.walk(directory):
        if not deep:
            folders.clear()
        for name in names:
            path = Path(folder, name)
            if path.exists() and not path.is_file() and not path.is_dir():
                return path
    return None


def read_json(path: Path) -> Any:
    """The JSON in a file; ValueError if it is damaged, OSError if it cannot be read."""
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """The JSON in a text; ValueError also where it is nested too deeply for any use."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def is_deep(data: Any) -> bool:
    """Whether JSON data have more than `MAX_DEPTH` lists and objects within one another.

    >>> is_deep([[1], {"a": []}])
    False
    """
    level = [data]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                inner += part.values()
            elif isinstance(part, list):
                inner += part
        if not inner:
            return False
        level = inner
    return True


# --- errors of the operating system ----------------------------------------------------------------------------------

_REMEDIES = {
    errno.ENOSPC: "free disk space",
    errno.EDQUOT: "free disk space, or raise your quota",
    errno.EROFS: "the disk can only be read; use a copy elsewhere",
    errno.EACCES: "check who may read and write it",
    errno.EPERM: "check who may read and write it",
}


def reason(error: OSError) -> str:
    """What the operating system refused, about which file, and what helps.

    >>> reason(OSError(errno.ENOSPC, "No space left on device", "runs/a/plan.json"))
    'runs/a/plan.json: No space left on device; free disk space'
    """
    what = error.strerror or " ".join(str(error).split()) or type(error).__name__
    place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    remedy = f"; {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else ""
    return f"{place}{what}{remedy}"


# --- JSON without NaN ------------------------------------------------------------------------------------------------


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


def encodable(text: str) -> str:
    """Text with what UTF-8 cannot encode replaced.

    >>> encodable("a" + chr(0xD800))
    'a?'
    """
    return text.encode("utf-8", "replace").decode("utf-8")
