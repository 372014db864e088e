"""Reading other tools' files: nothing is run, and errors name the file and the tensor."""

import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from pickle import UnpicklingError
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from saerelay.errors import FormatError
from saerelay.files import is_deep, read_json, reason

T = TypeVar("T")

MAX_UNPACKED_RATIO = 20
"""Largest ratio of unpacked to packed size. Weights hardly compress: a larger ratio indicates an attack on memory."""
ALWAYS_UNPACKED_BYTES = 2**26
"""Archives that unpack to fewer bytes are unpacked whatever the ratio."""


# --- configurations ----------------------------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; FormatError if there is none."""
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read as JSON ({error})") from None
    if is_deep(data):
        raise FormatError(f"{path}: its lists and objects are nested deeper than those of any SAE")
    if not isinstance(data, dict):
        raise FormatError(f"{path}: holds a JSON {type(data).__name__}, expected an object")
    return data


def lookup(config: Mapping[str, Any], key: str, kind: type[T]) -> T | None:
    """Return the value of a key in a configuration; None if it is missing or of another type.

    >>> lookup({"l0": 32}, "l0", float), lookup({"l0": "32"}, "l0", float)
    (32.0, None)
    >>> lookup({"k": True}, "k", int) is None
    True
    """
    value: Any = config.get(key)
    is_bool = isinstance(value, bool)  # bool is a subclass of int
    if is_bool and kind is not bool:
        return None
    if kind is float and isinstance(value, int):
        value = float(value)
    return value if isinstance(value, kind) else None


def read_number(path: Path, config: Mapping[str, Any], key: str) -> float:
    """Return the positive number that a configuration gives for a key; FormatError if there is none."""
    value: Any = config.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise FormatError(f"{path}: {key} is {value!r}, expected a positive number")
    return value


def read_count(path: Path, config: Mapping[str, Any], key: str, *, most: int) -> int:
    """Return the whole number from 1 to `most` for a key; FormatError if there is none.

    >>> read_count(Path("cfg.json"), {"k": 65}, "k", most=64)
    Traceback (most recent call last):
    saerelay.errors.FormatError: cfg.json: k is 65, expected a whole number from 1 to 64
    """
    value = read_number(path, config, key)
    if value % 1 or value > most:
        raise FormatError(f"{path}: {key} is {value!r}, expected a whole number from 1 to {most}")
    return int(value)


# --- tensors -----------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors in a .safetensors, .npz or .pt file, or in the shards of an index.

    Of a .pt file, only the tensors are read; `read_pickle` reads the rest. Raises FormatError if
    a file is missing or damaged.
    """
    index = path.with_name(f"{path.name}.index.json")
    if not path.is_file() and index.is_file():
        tensors = {}
        for shard in _shards(index):
            tensors.update(_read_safetensors(shard))
        return tensors
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix in (".pt", ".pth"):
        return only_tensors(read_pickle(path))
    return _read_safetensors(path)


def only_tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors among values, by name."""
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def read_pickle(path: Path) -> dict[str, Any]:
    """Read the contents of a .pt file: tensors and plain values.

    A pickle can run code when it is read; one that asks for more than tensors and plain values is
    refused with a FormatError.
    """
    _check_unpacked_size(path)
    with _reading(path):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict):
        raise FormatError(f"{path}: holds a {type(loaded).__name__}, expected tensors by name")
    for name, tensor in _tensors_within(loaded):
        _check_plain(path, name, tensor)
    return loaded


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with _reading(path):
        return load_file(path)


def _read_npz(path: Path) -> dict[str, Tensor]:
    _check_unpacked_size(path)
    with _reading(path), path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _check_unpacked_size(path: Path) -> None:
    """Raise FormatError for a zip archive that unpacks, or claims to unpack, to far more than its size."""
    with _reading(path):
        if not zipfile.is_zipfile(path):
            return
        packed = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            claimed = max(sum(entry.file_size for entry in archive.infolist()), _sum_of_arrays(archive))
    if claimed > max(ALWAYS_UNPACKED_BYTES, MAX_UNPACKED_RATIO * packed):
        raise FormatError(
            f"{path}: has {packed:,} bytes and says that it unpacks to {claimed:,}; no SAE's weights shrink that "
            "much, so it is not unpacked"
        )


def _sum_of_arrays(archive: zipfile.ZipFile) -> int:
    """Return the bytes of the arrays in an .npz file, from their headers; 0 for other archives."""
    total = 0
    for entry in archive.infolist():
        if entry.filename.endswith(".npy"):
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            total += math.prod(shape) * dtype.itemsize
    return total


def _tensors_within(loaded: dict[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors in nested dicts and lists, looking at each list and dict once."""
    waiting: list[tuple[str, Any]] = list(loaded.items())
    seen: set[int] = set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            yield str(name), value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{name}.{key}", part) for key, part in parts]


def _check_plain(path: Path, name: str, tensor: Tensor) -> None:
    """Raise FormatError unless a tensor's values are in the file, one by one: not sparse, quantised or repeated."""
    if tensor.layout != torch.strided:
        problem = f"is sparse ({tensor.layout})"
    elif tensor.is_quantized:
        problem = f"is quantised ({tensor.dtype})"
    elif tensor.device.type != "cpu":
        problem = f"has no values (it is on the device {tensor.device})"
    elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        problem = f"repeats {tensor.untyped_storage().nbytes()} bytes to a shape of {tuple(tensor.shape)}"
    else:
        return
    raise FormatError(f"{path}: tensor {name} {problem}; save it as an ordinary tensor")


def _shards(index: Path) -> list[Path]:
    """Return the files that an index lists; each must lie next to it."""
    shards = read_config(index).get("weight_map")
    if not isinstance(shards, dict):
        raise FormatError(f"{index}: weight_map, which names the file of each tensor, is missing")
    for name in shards.values():
        if not _is_file_name(name):
            raise FormatError(f"{index}: names {name!r}, which is not a file beside it; refused")
    return [index.with_name(name) for name in sorted(set(shards.values()))]


def _is_file_name(name: Any) -> bool:
    """Whether a name is plain, so that it leads to no other directory."""
    if not isinstance(name, str) or not name or name == ".." or "\\" in name:
        return False
    return PurePath(name).name == name


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn any error in reading a file into a FormatError that names the file."""
    if path.exists() and not path.is_file():
        raise FormatError(f"{path}: is not a regular file")
    try:
        yield
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except PermissionError as error:
        raise FormatError(reason(error)) from None
    except UnpicklingError:  # its own text explains at length how to switch the protection off
        raise FormatError(
            f"{path}: damaged, or holds Python objects besides tensors, and reading such objects can run "
            "code; refused. If you trust the file, convert it: save only its tensors, with "
            "safetensors.torch.save_file"
        ) from None
    except Exception as error:  # only libraries run here, and damaged files make them raise errors of every kind
        why = " ".join(str(error).split())[:300]
        raise FormatError(f"{path}: cut off or damaged, cannot be read ({why or type(error).__name__})") from None


def take(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, str], **sizes: int | None) -> list[Tensor]:
    """Return the tensors named in `shapes`, as float32, after checking their shapes.

    >>> tensors = {"W": torch.zeros(2, 3), "b": torch.zeros(4)}
    >>> take(Path("a.safetensors"), tensors, {"W": "DF", "b": "F"})
    Traceback (most recent call last):
    saerelay.errors.FormatError: a.safetensors: tensor b has shape (4), expected (F) = (3)

    Shapes have one letter per dimension, which stands for the same size in all tensors; `sizes` are
    the sizes known from elsewhere, such as a configuration. Raises FormatError for a tensor that is
    missing, of another shape, or not finite.
    """
    bound = {letter: size for letter, size in sizes.items() if size is not None}
    taken = []
    for name, letters in shapes.items():
        if name not in tensors:
            present = ", ".join(f"{key} {tuple(value.shape)}" for key, value in tensors.items())
            raise FormatError(
                f"{path}: tensor {name} ({', '.join(letters)}) is missing; the file has {present or 'no tensors'}"
            )
        if tensors[name].is_complex():
            raise FormatError(f"{path}: tensor {name} is of type {tensors[name].dtype}, expected real numbers")
        with _reading(path):  # some dtypes hold two numbers in a byte
            tensor = tensors[name].float()
        for letter, size in zip(letters, tensor.shape, strict=False):
            bound.setdefault(letter, size)  # the first tensor with a letter decides its size
        _check(path, name, tensor, letters, bound)
        taken.append(tensor)
    return taken


def _check(path: Path, name: str, tensor: Tensor, letters: str, sizes: Mapping[str, int]) -> None:
    """Raise FormatError if a tensor's shape does not match its letters, or if it is not finite."""
    expected = [sizes.get(letter, "?") for letter in letters]
    if list(tensor.shape) != expected:
        found_sizes = ", ".join(str(size) for size in tensor.shape)
        expected_sizes = ", ".join(str(size) for size in expected)
        raise FormatError(
            f"{path}: tensor {name} has shape ({found_sizes}), expected ({', '.join(letters)}) = ({expected_sizes})"
        )
    if tensor.numel():
        extremes = torch.stack(tensor.aminmax())  # NaN anywhere gives NaN
        if not bool(extremes.isfinite().all()):
            raise FormatError(f"{path}: tensor {name} has values that are not finite; the file is damaged")
