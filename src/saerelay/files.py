"""Files: written completely or not at all, read only if regular and not too large, and JSON without NaN."""

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
"""Size of the largest text file that is read: a larger file would have to fit into memory several times over."""
MAX_DEPTH = 64
"""Greatest depth to which lists and objects may be nested in JSON from other tools."""


@contextmanager
def replacing(path: Path, *, several_writers: bool = False) -> Iterator[Path]:
    """Give a temporary path to write to; it replaces `path` when the block ends, and is removed if the block fails.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with replacing(folder / "a.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> [file.name for file in folder.iterdir()]
    ['a.txt']

    A reader sees the old file or the new one, never half of it, even after a power cut. With `several_writers` each
    process writes to a temporary name of its own; the last process to finish wins.
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
        with contextlib.suppress(OSError):  # the first error is the one that matters
            temporary.unlink(missing_ok=True)
        raise


def replace_directory(fresh: Path, folder: Path) -> None:
    """Replace an older directory by a finished one; the older directory is renamed before it is removed.

    If the process is killed in between, `folder` is the old directory, the new one, or missing, but never half of one.
    """
    remove_replaced(folder)
    if folder.exists():
        folder.replace(_replaced(folder))
    fresh.replace(folder)
    remove_replaced(folder)


def restore_replaced(folder: Path) -> None:
    """Put the older directory back if a process was killed in `replace_directory` before the new one took its place."""
    if _replaced(folder).exists() and not folder.exists():
        _replaced(folder).replace(folder)


def remove_replaced(folder: Path) -> None:
    """Remove the older directory that a process killed in `replace_directory` has left behind."""
    remove_directory(_replaced(folder))


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def remove_directory(folder: Path) -> None:
    """Remove a directory and its contents, if it exists; OSError if it cannot be removed."""
    if folder.exists():
        shutil.rmtree(folder)


def appears(path: Path, seconds: float) -> bool:
    """Whether a file that another machine wrote becomes visible in time: network file systems may take a while."""
    deadline = time.monotonic() + seconds
    while not path.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
        if path.parent.is_dir():
            list(path.parent.iterdir())  # makes the file system read the directory again
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any, *, indent: int | None = 1) -> None:
    """Write JSON atomically; NaN and infinities become null. Without `indent`, on one line and without spaces."""
    separators = None if indent else (",", ":")
    text = json.dumps(finite(data), indent=indent, separators=separators, allow_nan=False)
    write_text(path, text + "\n")


def read_text(path: Path) -> str:
    """The text of a regular file, in UTF-8; ValueError if it is not regular or too large, OSError if unreadable.

    A pipe might never end, and a device has no size, so neither is opened.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > MAX_TEXT_BYTES:
        raise ValueError(f"{status.st_size / 2**30:.1f} GiB, larger than any file of this kind")
    return path.read_text(encoding="utf-8")


def odd_file(directory: Path, *, deep: bool = False) -> Path | None:
    """Return a pipe, device or socket in a directory (reading one might never end); None if there is none.

    With `deep`, subdirectories are searched as well; links to directories are not followed.
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
    """The JSON in a text; ValueError also if it is nested too deeply to be parsed."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def is_deep(data: Any) -> bool:
    """Whether JSON data nest lists and objects more than `MAX_DEPTH` deep.

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
    errno.EROFS: "the disk is read-only; use a copy elsewhere",
    errno.EACCES: "check who may read and write it",
    errno.EPERM: "check who may read and write it",
}


def reason(error: OSError) -> str:
    """Say what the operating system refused, for which file, and what helps.

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
    """Return text with every character that UTF-8 cannot encode replaced by a question mark.

    >>> encodable("a" + chr(0xD800))
    'a?'
    """
    return text.encode("utf-8", "replace").decode("utf-8")
