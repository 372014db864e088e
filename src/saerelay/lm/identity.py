"""Checks that a language model is still the one that a run was begun with."""

import hashlib
from pathlib import Path
from typing import Any

from saerelay.errors import ModelError
from saerelay.files import read_json, write_json
from saerelay.lm.adapter import find_adapter
from saerelay.lm.source import locate, pinned
from saerelay.planning.facts import ModelFacts
from saerelay.planning.recipe import ModelSpec

_WHOLE = ("config.json", "tokenizer.json", "tokenizer_config.json")
"""Files that are read completely."""
_N_SAMPLES = 64
_SAMPLE_BYTES = 2**16
"""Of weights, as many samples of this size are read, spread evenly: any training changes nearly all of a file."""


def model_digest(spec: ModelSpec) -> str:
    """A digest of a local model's weights, configuration, tokenizer and adapter, wherever they lie.

    Parts from the hub are identified by their commit, and left out: the digest is "" if nothing is local.
    """
    location = locate(spec)
    paths = _files(Path(location.name_or_path), location.weights) if location.is_directory else []
    adapter = find_adapter(spec)
    if adapter and adapter.is_local:
        paths += adapter.files
    if not paths:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        content = path.read_bytes() if path.suffix == ".json" else _samples(path)
        digest.update(path.name.encode() + content)
    return digest.hexdigest()


def _files(directory: Path, weights: list[Path]) -> list[Path]:
    """The files of a local model: its weights and, if these are safetensors, the configuration and tokenizer."""
    if any(path.suffix == ".gguf" for path in weights):
        return weights  # a GGUF file holds everything
    beside = [directory / name for name in _WHOLE]
    return sorted([*weights, *(path for path in beside if path.is_file())])


def _samples(path: Path) -> bytes:
    """A file's size, its beginning (with the names and shapes of tensors), and samples of the rest."""
    size = path.stat().st_size
    content = str(size).encode()
    with path.open("rb") as file:
        for i in range(_N_SAMPLES):
            file.seek(i * max(0, size - _SAMPLE_BYTES) // (_N_SAMPLES - 1))
            content += file.read(_SAMPLE_BYTES)
    return content


def check_same_model(spec: ModelSpec, path: Path, *, begin: bool = False) -> None:
    """Raise ModelError unless a model has the digest stored in a file; `begin` writes the file if there is none.

    A run of an older version has no such file, and is not checked.
    """
    if path.is_file():
        expected = _read(path)
        if expected != model_digest(spec):
            raise ModelError(
                f"{spec.name}: its weights, configuration, tokenizer or adapter have changed since this run began "
                f"({path}); restore them, or begin a new run with the model as it is now"
            )
    elif begin:
        write_json(path, {"digest": model_digest(spec)})


def _read(path: Path) -> str:
    try:
        return str(read_json(path)["digest"])
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{path}: damaged; delete it if the model has not changed since the run began") from None


def weights_identity(spec: ModelSpec, facts: ModelFacts) -> dict[str, Any]:
    """The facts that distinguish a model's weights and code from all others, as JSON data.

    >>> from saerelay.lm.facts import read_facts
    >>> sorted(weights_identity(ModelSpec(), read_facts(ModelSpec())))
    ['config', 'files']

    For a model from the hub, its commit; for a directory, the configuration's digest and the names, sizes
    and modification times of the files with weights and code. The adapter is identified in the same way.
    """
    location = locate(spec)
    adapter = _adapter_identity(pinned(spec, facts))
    if not location.is_directory:
        return {"name": facts.name, "revision": facts.revision, **adapter}

    directory = Path(location.name_or_path)
    files = _states(sorted([*location.weights, *directory.glob("*.py")]))
    config = b"" if location.gguf else (directory / "config.json").read_bytes()
    return {"config": hashlib.sha256(config).hexdigest(), "files": files, **adapter}


def _adapter_identity(spec: ModelSpec) -> dict[str, Any]:
    """An adapter's commit, or its files; {} if there is none."""
    adapter = find_adapter(spec)
    if adapter is None:
        return {}
    return {"adapter": _states(adapter.files) if adapter.is_local else adapter.name}


def _states(paths: list[Path]) -> list[list[Any]]:
    """Names, sizes and modification times of files."""
    states = []
    for path in paths:
        status = path.stat()
        states.append([path.name, status.st_size, status.st_mtime_ns])
    return states
