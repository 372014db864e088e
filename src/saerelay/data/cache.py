"""Activations of whole sequences on disk, for several epochs or several runs over the same text.

    <data.cache>/<model>-<digest>/<site>/<digest>.safetensors

The folder's digest is of all that fixes the activations: weights, dtype, context. A shard holds some sequences:
`sequences (n)` int64, each the digest of its token ids; `activations (n, context, D)` bfloat16; `crc32 (n)` of a
sequence's activations, begun with its id. Shards are written under a temporary name, renamed and never changed, so that
runs may share a cache at the same time; any of them may be deleted.
"""

import hashlib
import json
import time
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saerelay.errors import DataError
from saerelay.files import replacing
from saerelay.lm.source import weights_identity
from saerelay.planning.plan import Plan
from saerelay.site import Site

FORMAT = 1
SHARD_TOKENS = 16_384
"""Token positions in one shard, at most: what writing one takes in memory."""
_DAY = 86_400


@final
class ActivationCache:
    """What is in `data.cache` for a plan's model. C context, D width of the activations at a site."""

    def __init__(self, plan: Plan) -> None:
        self.facts, self.context = plan.facts, plan.recipe.data.context
        self.per_shard = max(1, SHARD_TOKENS // self.context)
        identity = weights_identity(plan.recipe.model, plan.facts)
        self.about = {"format": FORMAT, "dtype": plan.facts.dtype, "context": self.context} | identity
        self.folder = Path(plan.recipe.data.cache).expanduser() / f"{Path(plan.facts.name).name}-{_digest(self.about)}"
        self._index: dict[Site, dict[int, tuple[Path, int]]] = {}

    def lacking(self, site: Site, ids: np.ndarray) -> np.ndarray:
        """bool (n): which of the sequences are not there; DataError if a shard of this site is damaged."""
        index = self._where(site)
        return np.array([i not in index for i in ids.tolist()], dtype=bool)

    def read(self, site: Site, ids: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        """Shard by shard, each sequence's position in `ids` and its activations (C, D), bfloat16.

        DataError if a shard is damaged; only the bytes of these sequences are read and checked.
        """
        index = self._where(site)
        wanted = sorted((*index[i], position) for position, i in enumerate(ids.tolist()))
        for path, rows in groupby(wanted, key=lambda row: row[0]):
            shard = self._open(path, site)
            activations, checks = shard.get_slice("activations"), shard.get_tensor("crc32").tolist()
            for _, row, position in rows:
                x = activations[row]
                found = _crc32(x, int(ids[position]))
                if found != checks[row]:
                    raise _damaged(path, f"crc32 {checks[row]} of sequence {row}", found)
                yield position, x

    def write(self, site: Site, ids: np.ndarray, x: Tensor) -> None:
        """Add a shard of sequences, x: (n, C, D) bfloat16; DataError if the disk will not take it."""
        assert x.shape == (len(ids), self.context, self.facts.width(site)) and x.dtype == torch.bfloat16, x.shape
        path = self.folder / str(site) / f"{_digest(ids.tolist())}.safetensors"
        checks = [_crc32(rows, i) for rows, i in zip(x, ids.tolist(), strict=True)]
        tensors = {"sequences": torch.from_numpy(ids), "crc32": torch.tensor(checks), "activations": x}
        try:
            with replacing(path, several_writers=True) as temporary:
                save_file(tensors, temporary, {"about": self._about(site)})
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{path}: cannot be written ({error}); free disk space and continue with --resume, or set data.cache "
                "to another disk in a new run"
            ) from None
        self._where(site).update({i: (path, row) for row, i in enumerate(ids.tolist())})

    def bytes_per_sequence(self, site: Site) -> int:
        """On disk, at one site."""
        return 2 * self.context * self.facts.width(site)

    def _where(self, site: Site) -> dict[int, tuple[Path, int]]:
        """Shard and row of each sequence; the first time, all headers of the site are read and checked."""
        if site not in self._index:
            folder = self.folder / str(site)
            for path in folder.glob(".*.tmp"):
                if time.time() - path.stat().st_mtime > _DAY:  # of a process that was killed
                    path.unlink(missing_ok=True)
            self._index[site] = {}
            for path in sorted(folder.glob("*.safetensors")):
                ids = self._open(path, site).get_tensor("sequences").tolist()
                self._index[site] |= {i: (path, row) for row, i in enumerate(ids)}
        return self._index[site]

    def _open(self, path: Path, site: Site) -> Any:
        """A memory-mapped shard whose header is as it should be."""
        try:
            shard: Any = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise _damaged(path, "a whole safetensors file", error) from None
        slices = {name: shard.get_slice(name) for name in shard.keys()}
        found = {name: (x.get_dtype(), *x.get_shape()) for name, x in slices.items()}
        n = found.get("sequences", ("I64", 0))[1]
        rows = ("BF16", n, self.context, self.facts.width(site))
        expected = {"activations": rows, "crc32": ("I64", n), "sequences": ("I64", n)}
        if found != expected:
            raise _damaged(path, expected, found)
        about = (shard.metadata() or {}).get("about")
        if about != self._about(site):
            raise _damaged(path, f"activations of {self._about(site)}", about)
        return shard

    def _about(self, site: Site) -> str:
        return json.dumps(self.about | {"site": str(site)}, sort_keys=True)


def sequence_ids(sequences: np.ndarray) -> np.ndarray:
    """int64 (N): what a sequence is known by, the digest of its token ids; sequences: (N, context).

    >>> bool((sequence_ids(np.array([[1, 2], [3, 4]], np.uint16)) == sequence_ids(np.array([[1, 2], [3, 4]]))).all())
    True
    """
    digests = [hashlib.blake2b(row.astype("<i8").tobytes(), digest_size=8).digest() for row in sequences]
    return np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)


def _digest(data: Any) -> str:
    return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=8).hexdigest()


def _crc32(x: Tensor, start: int) -> int:
    return zlib.crc32(x.contiguous().view(torch.uint8).numpy().data, start & 0xFFFFFFFF)


def _damaged(path: Path, expected: object, found: object) -> DataError:
    return DataError(
        f"{path}: damaged; expected {expected}, found {found}. Delete this file and go on with --resume: what was in "
        "it is computed again."
    )
