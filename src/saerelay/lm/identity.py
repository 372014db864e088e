"""Whether a language model is still the one that a run was begun with."""

import hashlib
from pathlib import Path

from saerelay.errors import ModelError
from saerelay.files import read_json, write_json
from saerelay.lm.source import locate
from saerelay.planning.recipe import ModelSpec

_WHOLE = ("config.json", "tokenizer.json", "tokenizer_config.json")
"""Files that are read whole."""
_N_SAMPLES = 64
_SAMPLE_BYTES = 2**16
"""Of weights as many samples of this size, spread evenly: whatever trains a model changes nearly all of it."""


def model_digest(spec: ModelSpec) -> str:
    """A digest of a local model's weights, configuration and tokenizer, wherever they lie; "" for one from the hub.

    A hub model is known by its commit.
    """
    location = locate(spec)
    if not location.is_directory:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(location.name_or_path).iterdir()):
        if path.name in _WHOLE:
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            digest.update(path.name.encode() + _samples(path))
    return digest.hexdigest()


def _samples(path: Path) -> bytes:
    """The size of a file, its beginning, where the names and shapes of tensors are, and samples of the rest."""
    size = path.stat().st_size
    content = str(size).encode()
    with path.open("rb") as file:
        for i in range(_N_SAMPLES):
            file.seek(i * max(0, size - _SAMPLE_BYTES) // (_N_SAMPLES - 1))
            content += file.read(_SAMPLE_BYTES)
    return content


def check_same_model(spec: ModelSpec, path: Path, *, begin: bool = False) -> None:
    """Raise ModelError unless a model is the one whose digest is in a file; `begin` writes the file if there is none.

    A run of an older version has no such file, and is not checked.
    """
    if path.is_file():
        expected = _read(path)
        if expected != model_digest(spec):
            raise ModelError(
                f"{spec.name}: its weights, configuration or tokenizer are not those that this run was begun with "
                f"({path}); put them back, or begin a new run with the model as it is now"
            )
    elif begin:
        write_json(path, {"digest": model_digest(spec)})


def _read(path: Path) -> str:
    try:
        return str(read_json(path)["digest"])
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{path}: damaged; delete it if the model is the one that the run was begun with") from None
