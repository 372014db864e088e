"""The activation cache at an address that fsspec knows: the same bits, and nothing half written is ever read."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem
from test_cache import SITES, place, read, recipe, rows, sequences  # noqa: F401  # fixtures among them

from saerelay.data.cache import digest
from saerelay.data.remote_cache import RemoteCache, open_cache
from saerelay.data.stream import LiveStream
from saerelay.errors import DataError
from saerelay.lm.model import LanguageModel
from saerelay.planning.plan import Plan
from saerelay.workflows.settle import plan_run

torch.set_num_threads(1)
MEMORY = "memory://saerelay-test"


@pytest.fixture(autouse=True)
def store() -> Iterator[Any]:
    """An empty store in memory."""
    files = fsspec.filesystem("memory")
    yield files
    if files.exists("/saerelay-test"):
        files.rm("/saerelay-test", recursive=True)


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadedMotoServer]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3(server: ThreadedMotoServer, monkeypatch: pytest.MonkeyPatch) -> S3FileSystem:
    """An S3 store, which moto plays on this machine: real requests by a real client."""
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    return S3FileSystem(skip_instance_cache=True)


@pytest.fixture(params=["memory", "file", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return MEMORY
    if request.param == "file":
        return f"file://{tmp_path}/remote"
    bucket = digest(str(tmp_path))  # the server outlives a test
    request.getfixturevalue("s3").mkdir(bucket)
    return f"s3://{bucket}/remote"


Opener = Callable[[str], LiveStream]


@pytest.fixture
def opened(place: Path, sequences: np.ndarray) -> Opener:  # noqa: F811
    model: list[LanguageModel] = []

    def stream(address: str) -> LiveStream:
        plan: Plan = plan_run(recipe(place, address, preset="scratch"))
        if not model:
            model.append(LanguageModel.load(plan.recipe.model))
        return LiveStream(model[0], sequences, plan, open_cache(plan))

    return stream


def test_what_was_written_is_read_with_the_bits_of_a_directory(
    opened: Opener,
    address: str,
    tmp_path: Path,
    read: list[int],  # noqa: F811
) -> None:
    in_directory = rows(opened(f"{tmp_path}/cache"), 0)
    read.clear()
    assert torch.equal(rows(opened(address), 0), in_directory) and read == [64]
    again = opened(address)
    assert isinstance(again.cache, RemoteCache) and again.uncached_bytes() > 0
    again.cache.check_room(again.uncached_bytes())
    assert torch.equal(rows(again, 0), in_directory) and read == [64], "nothing is computed again"
    assert torch.equal(rows(opened(address), 0, [SITES[1]]), in_directory[1024:2048])


def test_only_the_bytes_of_wanted_sequences_are_asked_for(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    rows(opened(MEMORY), 0)
    stream = opened(MEMORY)
    assert isinstance(stream.cache, RemoteCache)
    asked = []
    cat_ranges = stream.cache.files.cat_ranges

    def counted(paths: list[str], starts: list[int], ends: list[int], **options: Any) -> list[bytes]:
        asked.append(sum(ends) - sum(starts))
        return cat_ranges(paths, starts, ends, **options)

    monkeypatch.setattr(type(stream.cache.files), "cat_ranges", staticmethod(counted))
    ids = stream.ids[stream.sequences_of(0)]
    found = [i for i, _ in stream.cache.read(SITES[1], ids[[5, 9, 3]])]
    assert found == [0, 1, 2] and asked == [3 * stream.cache.bytes_per_sequence(SITES[1])]


@pytest.mark.parametrize("ending", [".safetensors", ".json"])
def test_killed_inside_a_write_what_is_there_does_not_count(
    opened: Opener,
    address: str,
    ending: str,
    read: list[int],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = rows(opened(MEMORY + "-whole"), 0)
    fsspec.filesystem("memory").rm("/saerelay-test-whole", recursive=True)
    put = RemoteCache._put

    def dying(self: RemoteCache, path: str, content: bytes) -> None:
        if path.endswith(ending):
            if ending == ".safetensors":
                self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
                self.files.pipe_file(path, content[: len(content) // 2])  # a store that cannot write as a whole
            raise MemoryError("killed")
        put(self, path, content)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteCache, "_put", dying)
        with pytest.raises((DataError, MemoryError), match="killed"):
            rows(opened(address), 0)
    read.clear()
    assert torch.equal(rows(opened(address), 0), whole) and read == [64]
    assert torch.equal(rows(opened(address), 0), whole) and read == [64]


def test_other_bits_of_the_same_sequences_are_another_file(opened: Opener, store: Any) -> None:
    stream = opened(MEMORY)
    cache, ids = stream.cache, stream.ids[:2]
    assert cache
    x = torch.randn(2, 16, 32).bfloat16()
    cache.write(SITES[0], ids, x)
    first = store.glob("/saerelay-test/*/L0/*.safetensors")
    opened(MEMORY).cache.write(SITES[0], ids, x)  # pyright: ignore[reportOptionalMemberAccess]
    assert store.glob("/saerelay-test/*/L0/*.safetensors") == first
    opened(MEMORY).cache.write(SITES[0], ids, x + 1)  # pyright: ignore[reportOptionalMemberAccess]
    assert len(store.glob("/saerelay-test/*/L0/*.safetensors")) == 2
    (_, one), (_, two) = opened(MEMORY).cache.read(SITES[0], ids)  # pyright: ignore[reportOptionalMemberAccess]
    assert torch.equal(torch.stack([one, two]), x) or torch.equal(torch.stack([one, two]), x + 1)


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "flipped": (".safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1]), "expected crc32 .* found"),
    "cut": (".safetensors", lambda content: content[:-100], r"expected 1024 bytes of sequence \d+, found"),
    "no manifest": (".json", lambda content: content[:-5], "expected a manifest, found"),
    "of another site": (".json", lambda content: content.replace(b"L1", b"L2"), 'expected activations of .*"L1"'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_and_may_be_deleted(opened: Opener, store: Any, damage: str) -> None:
    alone = rows(opened(MEMORY), 0)
    ending, harm, told = DAMAGES[damage]
    (path,) = store.glob(f"/saerelay-test/*/L1/*{ending}")
    store.pipe_file(path, harm(store.cat_file(path)))
    with pytest.raises(DataError, match=rf"(?s)^{re.escape(path)}: damaged; {told}.*Delete this file"):
        opened(MEMORY).block(0, SITES)
    store.rm(str(Path(path).parent), recursive=True)
    assert torch.equal(rows(opened(MEMORY), 0), alone)


@pytest.mark.parametrize("address", ["nosuch://bucket/x", "http://127.0.0.1:9/x"])
def test_an_address_that_cannot_be_used_is_one_message(opened: Opener, address: str) -> None:
    with pytest.raises(DataError, match=r"^data.cache = .*: cannot be used \(.*set data.cache to a directory"):
        opened(address).block(0, SITES)


def test_a_shard_of_the_store_is_one_of_a_directory(opened: Opener, tmp_path: Path) -> None:
    alone = rows(opened(f"file://{tmp_path}/remote"), 0)
    shutil.copytree(tmp_path / "remote", tmp_path / "local")
    assert torch.equal(rows(opened(f"{tmp_path}/local"), 0), alone)


def test_a_bucket_that_is_not_there_is_refused_before_anything_is_computed(
    place: Path,  # noqa: F811
    s3: S3FileSystem,
) -> None:
    cache = open_cache(plan_run(recipe(place, "s3://mistyped/activations")))
    with pytest.raises(DataError, match=r"s3://mistyped/activations: .*there is no bucket or folder mistyped"):
        cache.check_room(1)
    assert not s3.exists("mistyped")


def test_a_bucket_that_one_may_write_to_but_not_ask_about_is_used(
    place: Path,  # noqa: F811
    s3: S3FileSystem,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3.mkdir("private")
    cache = open_cache(plan_run(recipe(place, "s3://private/activations")))
    assert isinstance(cache, RemoteCache)
    monkeypatch.setattr(cache.files, "exists", lambda path: False)
    monkeypatch.setattr(cache.files, "makedirs", lambda path, exist_ok: pytest.fail("it would create a bucket"))
    cache.check_room(1)
    assert s3.glob("private/activations/*/about.json")
