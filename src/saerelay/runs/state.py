"""The resume state of a run, and the training log that goes with it.

    state/state.json              the contents of the state (`ResumeFacts`), with digests of all of it
    state/<n>/leg-<id>.safetensors, moments-<id>.safetensors, blocks-<id>.safetensors

Each leg's part is a file of its own, so that each rank of a team writes and reads only the files of its own legs.
Nothing in a state depends on the number of ranks. The n-th state of a run is written beside the one before it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from saerelay.errors import RunDirectoryError
from saerelay.files import finite, read_json, remove_directory, write_json
from saerelay.runs.documents.training import ResumeFacts
from saerelay.runs.tensors import changed_tensor, damage_named, digests, read_tensors, write_tensors

FACTS_FILE = "state.json"
"""Describes the saved state and names its directory: writing this file commits the state to resume from."""
_REMEDY = "delete it to start the run over"

Tensors = Mapping[str, Tensor]


def save_part(directory: Path, name: str, tensors: Tensors) -> dict[str, str]:
    """Write one leg's part of a state that is not committed yet; return the digests of its tensors."""
    write_tensors(directory / f"{name}.safetensors", tensors)
    return digests(tensors)


def commit_state(directory: Path, facts: Mapping[str, Any]) -> None:
    """Make a state whose parts are all written the one to resume from, and remove the state before it.

    If the process is killed at any instant, either the old state or the new one is complete.
    """
    checked = ResumeFacts.model_validate(facts)
    text = checked.model_dump_json()
    write_json(directory / FACTS_FILE, {"digest": _digest(text), "facts": text}, indent=None)
    for folder in directory.iterdir():
        if folder.name.isdecimal() and folder.name != str(checked.serial):
            remove_directory(folder)


def state_facts(directory: Path) -> dict[str, Any] | None:
    """Read the facts of the last saved state (`ResumeFacts`), without its tensors; None if there is no state."""
    path = directory / FACTS_FILE
    older = directory / "state.safetensors"
    if not path.is_file() and older.is_file():
        raise RunDirectoryError(
            f"{older} was saved by an older version; finish the run with that version, or delete it to start over"
        )
    if not path.is_file():
        return None
    with damage_named(path, _REMEDY):
        content = read_json(path)
        if not isinstance(content, dict) or _digest(str(content["facts"])) != content["digest"]:
            raise ValueError("its facts are not those that were saved, or an older version saved them")
        return ResumeFacts.model_validate_json(content["facts"]).model_dump()


def load_part(directory: Path, name: str, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read one part of the state with the given facts."""
    path = directory / str(facts["serial"]) / f"{name}.safetensors"
    tensors = read_tensors(path, f"delete {directory / FACTS_FILE} to start the run over")
    changed = changed_tensor(tensors, facts["digests"][name])
    if changed:
        raise RunDirectoryError(
            f"{path}: damaged (tensor {changed} is not the one that was saved); delete {directory / FACTS_FILE} to "
            "start the run over"
        )
    return tensors


def clear_state(directory: Path) -> None:
    """Remove the saved state, if there is one."""
    (directory / FACTS_FILE).unlink(missing_ok=True)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under `prefix`/name."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`/, under the rest of the name."""
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def append_metrics(log: IO[str], cursor: int, leg_id: str, values: Mapping[str, Any]) -> None:
    """Write a line of the training log, and flush: after a kill the log shows what loggers have been told."""
    line = {"cursor": cursor, "leg": leg_id, **values}
    log.write(json.dumps(finite(line)) + "\n")
    log.flush()


def truncate_metrics(path: Path, n_bytes: int) -> None:
    """Cut the training log back to its length when the state was saved."""
    if path.is_file() and path.stat().st_size > n_bytes:
        os.truncate(path, n_bytes)


def last_ages(path: Path) -> dict[str, int]:
    """Each leg's age in its last line of the training log; a damaged line and everything after it are ignored."""
    ages: dict[str, int] = {}
    if not path.is_file():
        return ages
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            ages[values["leg"]] = values["age"]
        except (ValueError, KeyError, TypeError, RecursionError):
            break
    return ages
