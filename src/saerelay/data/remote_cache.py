"""The activation cache in an object store, or anywhere else that fsspec reads and writes: s3://, gs://, ...

    <data.cache>/<model>-<digest>/<site>/<digest>.safetensors     a shard, as in a directory on disk
    <data.cache>/<model>-<digest>/<site>/<digest>.json            the shard's manifest, written after it

A shard without a manifest counts as missing, so a half-written shard is never read. The digest is that of the shard's
content: two writers of the same sequences write either the same bytes or different files. Of a shard, only the bytes of
the requested sequences are read. C is the context, D the width of the activations at a site.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from fsspec.core import url_to_fs
from safetensors.torch import save
from torch import Tensor

from saerelay.data.cache import ActivationCache, crc32, damaged, digest
from saerelay.errors import DataError, SaeRelayError
from saerelay.planning.plan import Plan
from saerelay.site import Site
from saerelay.spec import Spec

SHARD_BYTES = 2**27
"""Largest size of a shard: with small files, reading speed depends on their number."""
SEQUENCES_AT_ONCE = 256
"""Number of sequences that are requested together."""


class Manifest(Spec):
    """The content of a shard, and its position in the file."""

    about: str
    """The identity of the activations, as in the shard's own header."""
    offset: int
    """Position in the shard where the activations of the first sequence begin."""
    sequences: list[int]
    """The id of each sequence, in order."""
    crc32: list[int]
    """A checksum of each sequence's activations, seeded with its id."""


class Shard(NamedTuple):
    """A shard in the store, as the index has it."""

    path: str
    manifest: Manifest


class RemoteCache(ActivationCache):
    """The part of `data.cache` that belongs to a plan's model, at an address such as s3://bucket/folder."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.address = plan.recipe.data.cache
        with self._reaching():
            self.files, root = url_to_fs(self.address)
        self.root = f"{root.rstrip('/')}/{self.name}"
        widest = max(self.bytes_per_sequence(site) for site in plan.with_probe(plan.sites_read))
        self.per_shard = max(1, SHARD_BYTES // widest)

    def read(self, site: Site, ids: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        """See `ActivationCache.read`."""
        index = self._index(site)
        places = [index[sequence] for sequence in ids.tolist()]
        n_bytes = self.bytes_per_sequence(site)
        for start in range(0, len(places), SEQUENCES_AT_ONCE):
            asked = places[start : start + SEQUENCES_AT_ONCE]
            paths = [shard.path for shard, _ in asked]
            begins = [shard.manifest.offset + row * n_bytes for shard, row in asked]
            ends = [begin + n_bytes for begin in begins]
            with self._reaching():
                parts = self.files.cat_ranges(paths, begins, ends, on_error="raise")
            for position, part in enumerate(parts, start):
                shard, row = places[position]
                if len(part) != n_bytes:
                    raise damaged(shard.path, f"{n_bytes} bytes of sequence {row}", len(part))
                x = torch.frombuffer(bytearray(part), dtype=torch.bfloat16).view(self.context, -1)
                checksum = crc32(x, int(ids[position]))
                expected = shard.manifest.crc32[row]
                if checksum != expected:
                    raise damaged(shard.path, f"crc32 {expected} of sequence {row}", checksum)
                yield position, x

    def check_room(self, needed: int) -> None:
        """Raise DataError if bytes are needed but nothing can be written here: no such bucket, or no right to write.

        A store does not tell how much room it has. What is written, `about.json`, says what determines the activations.
        """
        if not needed:
            return
        with self._reaching():
            try:
                self._put(f"{self.root}/about.json", json.dumps(self._identity, indent=1).encode())
            except FileNotFoundError:
                raise FileNotFoundError(f"there is no bucket or folder {self._first_folder}") from None

    def _store(self, site: Site, tensors: dict[str, Tensor], sequences: list[int], checksums: list[int]) -> Any:
        """See `ActivationCache._store`: first the shard, then its manifest."""
        about = self._about(site)
        content = save(tensors, {"about": about})
        path = f"{self.root}/{site}/{digest([sequences, checksums])}.safetensors"
        manifest = Manifest(about=about, offset=_offset(content), sequences=sequences, crc32=checksums)
        with self._reaching():
            self._put(path, content)
            self._put(_manifest_path(path), manifest.model_dump_json().encode())
        return Shard(path, manifest)

    def _put(self, path: str, content: bytes) -> None:
        """Write a file that appears as a whole or not at all, if the store supports this."""
        if self._makes_folders:
            self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        with self.files.transaction:
            self.files.pipe_file(path, content)

    @property
    def _first_folder(self) -> str:
        """The bucket, in a store that has some; "" where an address is a path from a root, such as sftp's."""
        return self.root.partition("/")[0]

    @cached_property
    def _makes_folders(self) -> bool:
        """Whether to make folders: not in a bucket that cannot be seen, since some libraries would create it.

        It may still be written to: a role that may only read and write objects may not ask about their bucket.
        """
        return not self._first_folder or self.files.exists(self._first_folder)

    def _scan(self, site: Site) -> dict[int, tuple[Any, int]]:
        """Shard and row of each sequence, from all manifests."""
        with self._reaching():
            self.files.invalidate_cache()
            paths = self.files.glob(f"{self.root}/{site}/*.json")
            found: dict[str, bytes] = self.files.cat(paths, on_error="raise") if paths else {}
        index: dict[int, tuple[Any, int]] = {}
        for path, content in sorted(found.items()):
            shard = Shard(_shard_path(path), self._manifest(path, content, site))
            for row, sequence in enumerate(shard.manifest.sequences):
                index[sequence] = (shard, row)
        return index

    def _manifest(self, path: str, content: bytes, site: Site) -> Manifest:
        try:
            manifest = Manifest.model_validate_json(content)
        except ValueError as error:
            raise damaged(path, "a manifest", error) from None
        if manifest.about != self._about(site):
            raise damaged(path, f"activations of {self._about(site)}", manifest.about)
        if len(manifest.sequences) != len(manifest.crc32):
            raise damaged(path, f"{len(manifest.sequences)} checksums", len(manifest.crc32))
        return manifest

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn any error of a store's own library into one line."""
        try:
            yield
        except SaeRelayError:
            raise
        except Exception as error:  # each store has its own errors
            detail = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(
                f"data.cache = {self.address}: cannot be used ({detail[:300]}); check the address, the credentials and "
                "that the package for this kind of store is installed, or set data.cache to a directory"
            ) from None


def _offset(content: bytes) -> int:
    """Position in a shard where the activations begin: after its header, which gives its own length."""
    n_header = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n_header])
    return 8 + n_header + header["activations"]["data_offsets"][0]


def _manifest_path(path: str) -> str:
    return f"{path.removesuffix('.safetensors')}.json"


def _shard_path(path: str) -> str:
    return f"{path.removesuffix('.json')}.safetensors"


def open_cache(plan: Plan) -> ActivationCache:
    """The cache of a plan: in a directory, or at an address."""
    return RemoteCache(plan) if "://" in plan.recipe.data.cache else ActivationCache(plan)
