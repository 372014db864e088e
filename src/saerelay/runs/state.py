"""The resume state of a run, and the training log that is cut back to it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from saerelay.files import finite, write_text
from saerelay.runs.tensors import read_facts, read_tensors, write_tensors

STATE_FILE = "state.safetensors"
_REMEDY = "delete it to start the run over"


def save_state(directory: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write the whole resume state as one file, so that it is there whole or not at all."""
    write_tensors(directory / STATE_FILE, tensors, {"facts": json.dumps(dict(facts))})


def state_facts(directory: Path) -> dict[str, Any] | None:
    """What the last saved state says about itself, without its tensors; None if there is no state."""
    path = directory / STATE_FILE
    if not path.is_file():
        return None
    return read_facts(path, _REMEDY)


def load_state(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The last saved state; None if there is none."""
    facts = state_facts(directory)
    if facts is None:
        return None
    return read_tensors(directory / STATE_FILE, _REMEDY), facts


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


def truncate_metrics(path: Path, cursor: int) -> None:
    """Drop the lines of the training log that lie after `cursor`, and a half-written last one."""
    if not path.is_file():
        return
    kept_lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["cursor"] > cursor:
                break
        except (ValueError, KeyError):
            break
        kept_lines.append(line + "\n")
    write_text(path, "".join(kept_lines))


def last_ages(path: Path) -> dict[str, int]:
    """Each leg's age in its last line of the training log; a half-written line at the end does not count."""
    ages: dict[str, int] = {}
    if not path.is_file():
        return ages
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            ages[values["leg"]] = values["age"]
        except (ValueError, KeyError):
            break
    return ages
