"""Reading tensors of others: nothing in a file is run, and what is wrong is said with file, tensor and shapes."""

import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from pickle import UnpicklingError
from typing import Any, TypeVar

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from saerelay.errors import FormatError
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.architectures import Architecture

T = TypeVar("T")


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a file; FormatError if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise FormatError(f"{path}: holds a JSON {type(data).__name__}, expected an object")
    return data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .npz or .pt file, or of the shards that `path`.index.json names.

    Of a .pt only the tensors are taken; `read_pickle` gives the rest.
    """
    index = path.with_name(f"{path.name}.index.json")
    if not path.is_file() and index.is_file():
        return {name: tensor for shard in _shards(index) for name, tensor in _read_safetensors(shard).items()}
    match path.suffix:
        case ".npz":
            with _damage_named(path), path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        case ".pt" | ".pth":
            return {name: value for name, value in read_pickle(path).items() if isinstance(value, Tensor)}
        case _:
            return _read_safetensors(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with _damage_named(path):
        return load_file(path)


def read_pickle(path: Path) -> dict[str, Any]:
    """What a .pt file holds: tensors and plain values. A pickle can run code: one that asks for more is refused."""
    with _damage_named(path):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict):
        raise FormatError(f"{path}: holds a {type(loaded).__name__}, expected tensors by name")
    return loaded


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except UnpicklingError:  # its text says at length how to switch the protection off
        raise FormatError(
            f"{path}: damaged, or holds Python objects beside tensors, and reading those can run code; refused. "
            "Convert it where you trust it: keep the tensors alone, with safetensors.torch.save_file"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, EOFError, AttributeError, RuntimeError, zipfile.BadZipFile,
            safetensors.SafetensorError) as error:  # fmt: skip
        raise FormatError(f"{path}: cut off or damaged, cannot be read ({' '.join(str(error).split())})") from None


def said(config: Mapping[str, Any], key: str, kind: type[T]) -> T | None:
    """What a configuration says for a key, or None if it says nothing, or something of another type.

    >>> said({"l0": 32}, "l0", float), said({"l0": "32"}, "l0", float)
    (32.0, None)
    """
    value: Any = config.get(key)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    return value if isinstance(value, kind) and isinstance(value, bool) == (kind is bool) else None


def read_number(path: Path, config: Mapping[str, Any], key: str, *, most: int | None = None) -> float:
    """The positive number that a configuration gives for a key, a whole one up to `most` if that is given.

    >>> read_number(Path("cfg.json"), {"k": 65}, "k", most=64)
    Traceback (most recent call last):
    saerelay.errors.FormatError: cfg.json: k is 65, expected a whole number from 1 to 64

    Raises FormatError if there is no such number.
    """
    value = config.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise FormatError(f"{path}: {key} is {value!r}, expected a positive number")
    if most is not None and (value % 1 or value > most):
        raise FormatError(f"{path}: {key} is {value!r}, expected a whole number from 1 to {most}")
    return value


def _shards(index: Path) -> list[Path]:
    shards = read_config(index).get("weight_map")
    if not isinstance(shards, dict):
        raise FormatError(f"{index}: weight_map is missing; it says which file has which tensor")
    for name in shards.values():
        if not isinstance(name, str) or PurePath(name).name != name or not name or "\\" in name or name == "..":
            raise FormatError(f"{index}: names {name!r}, which is not a file beside it; refused")
    return [index.with_name(name) for name in sorted(set(shards.values()))]


def shaped(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, str], **sizes: int | None) -> list[Tensor]:
    """The tensors named in `shapes`, float32, with one letter a dimension meaning the same size everywhere.

    >>> found = {"W": torch.zeros(2, 3), "b": torch.zeros(4)}
    >>> shaped(Path("a.safetensors"), found, {"W": "DF", "b": "F"})
    Traceback (most recent call last):
    saerelay.errors.FormatError: a.safetensors: tensor b has shape (4), expected (F) = (3)

    `sizes` are those that something else says of letters (a configuration, say). Raises FormatError for a tensor that
    is missing, of another shape, or not finite.
    """
    known = {letter: size for letter, size in sizes.items() if size is not None}
    taken = []
    for name, letters in shapes.items():
        if name not in tensors:
            there = ", ".join(f"{key} {tuple(value.shape)}" for key, value in tensors.items()) or "nothing"
            raise FormatError(f"{path}: tensor {name} ({', '.join(letters)}) is missing; there is {there}")
        tensor = tensors[name]
        bound = known | {
            letter: size for letter, size in zip(letters, tensor.shape, strict=False) if letter not in known
        }
        expected = tuple(bound.get(letter, -1) for letter in letters)
        if tuple(tensor.shape) != expected:
            found, wanted = ", ".join(map(str, tensor.shape)), ", ".join(map(str, expected))
            raise FormatError(
                f"{path}: tensor {name} has shape ({found}), expected ({', '.join(letters)}) = ({wanted})"
            )
        tensor = tensor.float()
        if tensor.numel() and not all(map(math.isfinite, torch.stack(tensor.aminmax()).tolist())):  # fast, sees NaN
            raise FormatError(f"{path}: tensor {name} has values that are not finite; the file is damaged")
        known = bound
        taken.append(tensor)
    return taken


def canonical(
    architecture: Architecture,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    subtracts_b_dec: bool = False,
    scale: float = 1.0,
    threshold: Tensor | None = None,
    k: int | None = None,
) -> Dictionary:
    """A dictionary of raw activations x from one that reads s·x, with b_dec subtracted first or not.

    W_enc and W_dec have one row per latent. With u = s·x: pre = (u − b_dec) W_encᵀ + b_enc and u_hat = z W_dec + b_dec
    become W_enc' = s W_enc, b_enc' = b_enc − W_enc b_dec, W_dec' = W_dec / s, b_dec' = b_dec / s; codes and thresholds
    stay as they are.
    """
    W_enc, W_dec = W_enc.contiguous(), W_dec.contiguous()
    if subtracts_b_dec:
        b_enc = (b_enc.double() - _product(W_enc, b_dec)).float()
    if scale != 1:
        W_enc, W_dec, b_dec = W_enc * scale, W_dec / scale, b_dec / scale
    return Dictionary(
        architecture=architecture,
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        threshold=threshold,
        k=k,
    )


def encoder_bias(dictionary: Dictionary) -> Tensor:
    """b_enc (F) for tools whose encoder reads x − b_dec: undoes what `canonical` does with `subtracts_b_dec`."""
    d = dictionary
    return (d.b_enc.double() + _product(d.W_enc, d.b_dec)).float()


def _product(W: Tensor, b: Tensor) -> Tensor:
    """W b (F) in float64, for W (F, D); in parts, for W has gigabytes and b, a mean, is large."""
    return torch.cat([rows.double() @ b.double() for rows in W.split(512)])


def ungated(W: Tensor, r_mag: Tensor, b_gate: Tensor, b_mag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W_enc, b_enc and threshold of the JumpReLU that a gated encoder equals; W (F, D), the others (F).

    1[W u + b_gate > 0]·relu(e^r W u + b_mag) (Rajamanoharan et al. 2024, arXiv 2404.16014, eq. 6 to 8): with
    pre = e^r W u + b_mag, the gate is open where pre > b_mag − e^r b_gate.

    >>> one = torch.ones(1)
    >>> ungated(one[None], 0 * one, -0.5 * one, 2 * one)
    (tensor([[1.]]), tensor([2.]), tensor([2.5000]))
    """
    magnitude = r_mag.exp()
    return W * magnitude[:, None], b_mag, (b_mag - magnitude * b_gate).clamp(min=0)
