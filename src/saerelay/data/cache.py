"""Activations of whole sequences on disk, for several epochs or several runs over the same text.

    <data.cache>/<model>-<digest>/<site>/<digest>.safetensors

The folder's digest covers everything that determines the activations: weights, dtype, context.
A shard holds some sequences:

    sequences (n), int64            the id of each sequence, a digest of its token ids
    activations (n, C, D), bfloat16
    crc32 (n), int64                a checksum of each sequence's activations, seeded with its id

Shards are written under a temporary name, renamed and never changed, so runs may share a cache at
the same time; any shard may be deleted. C is the context, D the width of the activations at a
site.
"""

import hashlib
import json
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saerelay.errors import DataError
from saerelay.files import replacing
from saerelay.lm.identity import weights_identity
from saerelay.planning.plan import Plan
from saerelay.site import Site

FORMAT = 1
"""Part of what determines the activations: another number means another folder."""

SHARD_TOKENS = 16_384
"""Most token positions in one shard, which is held in memory while it is written."""

_ABANDONED_AFTER_SECONDS = 86_400
"""Age at which a temporary file is assumed to be left over from a killed process."""


class ActivationCache:
    """The part of `data.cache` that belongs to a plan's model, in a directory; see `RemoteCache` for other places."""

    def __init__(self, plan: Plan) -> None:
        self.facts = plan.facts
        self.context = plan.recipe.data.context
        self.per_shard = max(1, SHARD_TOKENS // self.context)
        self._identity = {
            "format": FORMAT,
            "dtype": plan.facts.dtype,
            "context": self.context,
            **weights_identity(plan.recipe.model, plan.facts),
        }
        degree = plan.recipe.model.tensor_parallel
        if degree > 1:
            self._identity["tensor_parallel"] = degree
        self.name = f"{Path(plan.facts.name).name}-{digest(self._identity)}"
        self.folder = Path(plan.recipe.data.cache).expanduser() / self.name
        self._indexes: dict[Site, dict[int, tuple[Any, int]]] = {}

    def missing(self, site: Site, ids: np.ndarray) -> np.ndarray:
        """Bool (n): which sequences are not cached; DataError if a shard is damaged."""
        index = self._index(site)
        return np.array([sequence not in index for sequence in ids.tolist()], dtype=bool)

    def read(self, site: Site, ids: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        """Yield each sequence's position in `ids`, and its activations (C, D), bfloat16; shard by shard.

        Only the bytes of these sequences are read and checked. Raises DataError if a shard is
        damaged.
        """
        index = self._index(site)
        wanted = []
        for position, sequence in enumerate(ids.tolist()):
            path, row = index[sequence]
            wanted.append((path, row, position))

        for path, in_shard in groupby(sorted(wanted), key=itemgetter(0)):
            shard = self._open(path, site)
            activations = shard.get_slice("activations")
            checksums = shard.get_tensor("crc32").tolist()
            for _, row, position in in_shard:
                x = activations[row]
                checksum = crc32(x, int(ids[position]))
                if checksum != checksums[row]:
                    raise damaged(path, f"crc32 {checksums[row]} of sequence {row}", checksum)
                yield position, x

    def write(self, site: Site, ids: np.ndarray, x: Tensor) -> None:
        """Write a shard of sequences, x (n, C, D) bfloat16; DataError if the disk is full."""
        assert x.shape == (len(ids), self.context, self.facts.width(site)), x.shape
        assert x.dtype == torch.bfloat16, x.dtype
        sequences = ids.tolist()
        checksums = [crc32(rows, sequence) for rows, sequence in zip(x, sequences, strict=True)]
        tensors = {
            "sequences": torch.from_numpy(ids),
            "crc32": torch.tensor(checksums),
            "activations": x,
        }
        shard = self._store(site, tensors, sequences, checksums)
        index = self._index(site)
        for row, sequence in enumerate(sequences):
            index[sequence] = (shard, row)

    def check_room(self, needed: int) -> None:
        """Raise DataError unless so many bytes fit on the disk of the folder; the folder need not exist yet."""
        folder = self.folder
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise DataError(
                f"{folder}: this run adds {needed / 2**30:.1f} GiB of activations, but {free / 2**30:.1f} GiB are "
                'free; free disk space, set data.cache to another disk or to "" (activations are then computed again '
                "when needed), or read fewer tokens or layers"
            )

    def bytes_per_sequence(self, site: Site) -> int:
        """Bytes that a sequence takes on disk at one site."""
        return 2 * self.context * self.facts.width(site)

    def _store(self, site: Site, tensors: dict[str, Tensor], sequences: list[int], checksums: list[int]) -> Any:
        """Write a shard; return what the index stores of it."""
        path = self.folder / str(site) / f"{digest(sequences)}.safetensors"
        try:
            with replacing(path, several_writers=True) as temporary:
                save_file(tensors, temporary, {"about": self._about(site)})
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{path}: cannot be written ({error}); free some disk space and continue with "
                "--resume, or set data.cache to another disk in a new run"
            ) from None
        return path

    def _index(self, site: Site) -> dict[int, tuple[Any, int]]:
        """Shard and row of each sequence."""
        if site not in self._indexes:
            self._indexes[site] = self._scan(site)
        return self._indexes[site]

    def _scan(self, site: Site) -> dict[int, tuple[Any, int]]:
        """Build the index of the existing shards from their headers."""
        folder = self.folder / str(site)
        _remove_abandoned(folder)
        index: dict[int, tuple[Any, int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            sequences = self._open(path, site).get_tensor("sequences").tolist()
            for row, sequence in enumerate(sequences):
                index[sequence] = (path, row)
        return index

    def _open(self, path: Path, site: Site) -> Any:
        """Open a memory-mapped shard, and check its header."""
        try:
            shard: Any = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise DataError(
                f"{path}: was removed while this run was reading it; continue with --resume: its activations are "
                "computed again"
            ) from None
        except (OSError, SafetensorError) as error:
            raise damaged(path, "a whole safetensors file", error) from None

        found = {}
        for name in shard.keys():  # noqa: SIM118  # not a mapping
            tensor = shard.get_slice(name)
            found[name] = (tensor.get_dtype(), *tensor.get_shape())
        n = found["sequences"][-1] if "sequences" in found else 0
        expected = {
            "sequences": ("I64", n),
            "activations": ("BF16", n, self.context, self.facts.width(site)),
            "crc32": ("I64", n),
        }
        if found != expected:
            raise damaged(path, expected, found)

        about = (shard.metadata() or {}).get("about")
        if about != self._about(site):
            raise damaged(path, f"activations of {self._about(site)}", about)
        return shard

    def _about(self, site: Site) -> str:
        """The identity of a shard's activations, as written in its header."""
        return json.dumps({**self._identity, "site": str(site)}, sort_keys=True)


def sequence_ids(sequences: np.ndarray) -> np.ndarray:
    """The id of each sequence, a digest of its token ids: int64 (N) for sequences (N, C).

    >>> sequences = np.array([[1, 2], [3, 4]], np.uint16)
    >>> bool((sequence_ids(sequences) == sequence_ids(sequences.astype(np.int64))).all())
    True
    """
    digests = []
    for row in sequences:
        token_ids = row.astype("<i8").tobytes()
        digests.append(hashlib.blake2b(token_ids, digest_size=8).digest())
    return np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of processes that were killed."""
    for path in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):  # another run may rename it at any moment
            age = time.time() - path.stat().st_mtime
            if age > _ABANDONED_AFTER_SECONDS:
                path.unlink()


def digest(data: Any) -> str:
    """A digest of JSON data, short enough for a file's name."""
    text = json.dumps(data, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def crc32(x: Tensor, sequence: int) -> int:
    """Checksum of a sequence's activations together with its id, so that swapped rows count as damage."""
    return zlib.crc32(x.contiguous().view(torch.uint8).numpy().data, sequence & 0xFFFFFFFF)


def damaged(path: Path | str, expected: object, found: object) -> DataError:
    """The error for a damaged file of the cache."""
    return DataError(
        f"{path}: damaged; expected {expected}, found {found}. "
        "Delete this file and continue with --resume: its activations are computed again."
    )
