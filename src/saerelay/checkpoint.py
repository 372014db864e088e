"""Files of a run directory: paths, atomic writes, published dictionaries, resume state.

    run.toml  plan.json  metrics.jsonl  tokens/  legs/<id>/  eval/<id>.json  state/  summary.json  report/

See docs/run-directory.md. safetensors, JSON and TOML only; everything is written under a temporary name and renamed.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import filelock
import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from saerelay.dictionaries import Dictionary
from saerelay.errors import RunDirectoryError
from saerelay.plan import SCHEMA_VERSION, Leg, Plan
from saerelay.recipe import Architecture


@dataclass(frozen=True)
class RunDirectory:
    """The paths of a run."""

    root: Path

    @property
    def recipe(self) -> Path:
        """What was asked for."""
        return self.root / "run.toml"

    @property
    def plan(self) -> Path:
        """What it was compiled to."""
        return self.root / "plan.json"

    @property
    def survey(self) -> Path:
        """What the survey behind preset = "auto" measured; its own run is in `survey/` while it lasts."""
        return self.root / "survey.json"

    @property
    def metrics(self) -> Path:
        """The training log."""
        return self.root / "metrics.jsonl"

    @property
    def cost(self) -> Path:
        """What the run took."""
        return self.root / "cost.json"

    @property
    def tokens(self) -> Path:
        """The corpus, tokenised and split."""
        return self.root / "tokens"

    @property
    def state(self) -> Path:
        """Resume state, the lock, and counters."""
        return self.root / "state"

    def leg(self, leg_id: str) -> Path:
        """A published leg."""
        return self.root / "legs" / leg_id

    def snapshot(self, leg_id: str, age: int) -> Path:
        """A published snapshot of a leg."""
        return self.leg(leg_id) / "snapshots" / str(age)

    def ages(self, leg: Leg) -> list[int]:
        """Ages of a leg's published snapshots."""
        return [age for age in leg.snapshots if self.snapshot(leg.id, age).is_dir()]

    def evaluation(self, leg_id: str) -> Path:
        """The quality of a leg."""
        return self.root / "eval" / f"{leg_id}.json"

    @property
    def matrix(self) -> Path:
        """Every dictionary on every layer."""
        return self.root / "matrix.json"

    @property
    def measures(self) -> Path:
        """What dictionaries have in common: the measures of Ghilardi et al. 2024."""
        return self.root / "measures.json"

    @property
    def lineage(self) -> Path:
        """What became of each latent across layers."""
        return self.root / "lineage.json"

    def features(self, leg_id: str) -> Path:
        """What each latent of a leg means."""
        return self.root / "features" / f"{leg_id}.safetensors"

    def circuits(self, task: str) -> Path:
        """The latents that a task rests on."""
        return self.root / "circuits" / f"{task}.json"

    def interpretation(self, leg_id: str) -> Path:
        """What a language model makes of some latents of a leg."""
        return self.root / "interpret" / f"{leg_id}.json"

    @property
    def answers(self) -> Path:
        """Every answer that was paid for."""
        return self.root / "interpret" / "answers.jsonl"

    @property
    def judging(self) -> Path:
        """Pages for judges, their keys, and what judges said."""
        return self.root / "judging"

    @property
    def report(self) -> Path:
        """The page that shows all of it."""
        return self.root / "report"


# --- atomic writes ----------------------------------------------------------------------------------------------


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


# --- published dictionaries -------------------------------------------------------------------------------------


def publish(directory: Path, dictionary: Dictionary, info: Mapping[str, Any]) -> None:
    """Write dictionary.safetensors and then dictionary.json, whose presence says that both are whole."""
    write_tensors(directory / "dictionary.safetensors", {n: t.cpu() for n, t in dictionary.tensors().items()})
    own = {
        "schema_version": SCHEMA_VERSION,
        "architecture": dictionary.architecture,
        "k": dictionary.k,
        "d_model": dictionary.d_model,
        "n_latents": dictionary.n_latents,
    }
    write_json(directory / "dictionary.json", own | dict(info) | own)


def read_dictionary(directory: Path) -> tuple[Dictionary, dict[str, Any]]:
    """Read a published dictionary and what its JSON says of it."""
    if not (directory / "dictionary.json").is_file():
        raise RunDirectoryError(
            f"{directory}: no dictionary here (dictionary.json is missing); give a directory such as runs/a/legs/L3"
        )
    info = read_json(directory / "dictionary.json")
    path = directory / "dictionary.safetensors"
    try:
        tensors = load_file(path)
        if info["schema_version"] != SCHEMA_VERSION:
            raise RunDirectoryError(
                f"{directory}: schema {info['schema_version']}, this program reads {SCHEMA_VERSION}"
            )
        if info["architecture"] not in get_args(Architecture):
            raise RunDirectoryError(f'{directory}: unknown architecture "{info["architecture"]}"')
        dictionary = Dictionary(architecture=info["architecture"], k=info["k"], **tensors)
        _check_shapes(dictionary, info["n_latents"], info["d_model"], path)
    except (OSError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise RunDirectoryError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
    return dictionary, info


def _check_shapes(dictionary: Dictionary, n_latents: int, d_model: int, path: Path) -> None:
    F, D = n_latents, d_model
    expected = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,), "threshold": (F,)}
    for name, tensor in dictionary.tensors().items():
        if tuple(tensor.shape) != expected[name]:
            raise RunDirectoryError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {expected[name]}")


# --- resume state -----------------------------------------------------------------------------------------------

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


@contextmanager
def sole_writer(root: Path) -> Iterator[None]:
    """Hold the run's lock: a second process on the same run is refused."""
    try:
        (root / "state").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"{root}: cannot be made ({error.strerror}); choose another --out") from None
    lock = filelock.FileLock(root / "state" / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise RunDirectoryError(
            f"{root}: another process is training this run; wait for it or stop it, or choose another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


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


def read_plan(directory: Path) -> Plan:
    """The plan of a run directory."""
    paths = RunDirectory(directory)
    if not paths.plan.is_file():
        raise RunDirectoryError(
            f"{directory}: no run here (plan.json is missing); `saerelay train --out {directory}` makes one"
        )
    data = read_json(paths.plan)
    if data.get("schema_version") != SCHEMA_VERSION:
        raise RunDirectoryError(
            f"{paths.plan}: schema {data.get('schema_version')}, this program reads {SCHEMA_VERSION}"
        )
    return Plan.parse(data, source=str(paths.plan))
