"""The resume state of a run, and the training log that is cut back to it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from saerelay.errors import RunDirectoryError
from saerelay.runs.files import finite, write_tensors, write_text

STATE_FILE = "state.safetensors"


def save_state(directory: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write the whole resume state as one file, so that it is there whole or not at all."""
    write_tensors(directory / STATE_FILE, tensors, {"facts": json.dumps(dict(facts))})


def state_facts(directory: Path) -> dict[str, Any] | None:
    """What the last saved state says of itself, without its tensors, or None if there is none."""
    path = directory / STATE_FILE
    if not path.is_file():
        return None
    with _damage_named(path), safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["facts"])


def load_state(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The last saved state, or None if there is none."""
    facts = state_facts(directory)
    if facts is None:
        return None
    with _damage_named(directory / STATE_FILE):
        return load_file(directory / STATE_FILE), facts


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise RunDirectoryError(f"{path}: damaged ({error}); delete it to start the run over") from None


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under `prefix`/name."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under `prefix`, without it."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def append_metrics(log: IO[str], cursor: int, leg_id: str, values: Mapping[str, Any]) -> None:
    """Write a line of the training log."""
    line = {"cursor": cursor, "leg": leg_id, **values}
    log.write(json.dumps(finite(line)) + "\n")


def truncate_metrics(path: Path, cursor: int) -> None:
    """Drop the lines of the training log that lie after `cursor`, and a half-written last one."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["cursor"] > cursor:
                break
        except (ValueError, KeyError):
            break
        kept.append(line + "\n")
    write_text(path, "".join(kept))
