"""The resume state of a run, which carries digests of all that is in it, and the training log that goes with it."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from saerelay.errors import RunDirectoryError
from saerelay.files import finite
from saerelay.runs.documents.training import ResumeFacts
from saerelay.runs.tensors import changed_tensor, damage_named, digests, read_metadata, read_tensors, write_tensors

STATE_FILE = "state.safetensors"
_REMEDY = "delete it to start the run over"


def save_state(directory: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write the whole resume state as one file, so that it is there whole or not at all."""
    text = json.dumps({**facts, "digests": digests(tensors)})
    write_tensors(directory / STATE_FILE, tensors, {"facts": text, "digest": _digest(text)})


def state_facts(directory: Path) -> dict[str, Any] | None:
    """What the last saved state says about itself (`ResumeFacts`), without its tensors; None if there is no state."""
    path = directory / STATE_FILE
    if not path.is_file():
        return None
    metadata = read_metadata(path, _REMEDY)
    text = metadata.get("facts", "")
    with damage_named(path, _REMEDY):
        if metadata.get("digest") != _digest(text):
            raise ValueError("its facts are not those that were saved, or an older version saved them")
        return ResumeFacts.model_validate_json(text).model_dump()


def load_state(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The last saved state; None if there is none."""
    facts = state_facts(directory)
    if facts is None:
        return None
    path = directory / STATE_FILE
    tensors = read_tensors(path, _REMEDY)
    changed = changed_tensor(tensors, facts["digests"])
    if changed:
        raise RunDirectoryError(f"{path}: damaged (tensor {changed} is not the one that was saved); {_REMEDY}")
    return tensors, facts


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under `prefix`/name."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under `prefix`, without it."""
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def append_metrics(log: IO[str], cursor: int, leg_id: str, values: Mapping[str, Any]) -> None:
    """Write a line of the training log, at once: after a kill it says what loggers have been told."""
    line = {"cursor": cursor, "leg": leg_id, **values}
    log.write(json.dumps(finite(line)) + "\n")
    log.flush()


def truncate_metrics(path: Path, n_bytes: int) -> None:
    """Cut the training log back to the length that it had when the state was saved."""
    if path.is_file() and path.stat().st_size > n_bytes:
        os.truncate(path, n_bytes)


def last_ages(path: Path) -> dict[str, int]:
    """Each leg's age in its last line of the training log; what is damaged does not count, nor what comes after it."""
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
