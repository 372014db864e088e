"""Activations in an S3 store, which moto plays on this machine: real requests by a real client, and nobody's bucket."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem
from test_cache import SITES, place, recipe, rows, sequences  # noqa: F401  # fixtures among them

from saerelay.data.remote_cache import RemoteCache, open_cache
from saerelay.data.stream import LiveStream
from saerelay.errors import DataError
from saerelay.lm.model import LanguageModel
from saerelay.workflows.settle import plan_run

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadedMotoServer]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def store(server: ThreadedMotoServer, monkeypatch: pytest.MonkeyPatch) -> S3FileSystem:
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    return S3FileSystem(skip_instance_cache=True)


def stream(place: Path, sequences: np.ndarray, cache: str, *, with_model: bool = True) -> LiveStream:  # noqa: F811
    plan = plan_run(recipe(place, cache, preset="scratch"))
    model = LanguageModel.load(plan.recipe.model) if with_model else None
    return LiveStream(model, sequences, plan, open_cache(plan))


def test_a_store_keeps_the_bits_of_a_directory(
    place: Path,  # noqa: F811
    sequences: np.ndarray,  # noqa: F811
    store: S3FileSystem,
    tmp_path: Path,
) -> None:
    store.mkdir("kept")
    in_directory = rows(stream(place, sequences, str(tmp_path / "cache")), 0)
    first = stream(place, sequences, "s3://kept/activations")
    assert first.cache
    first.cache.check_room(first.uncached_bytes())
    assert torch.equal(rows(first, 0), in_directory)
    again = stream(place, sequences, "s3://kept/activations", with_model=False)
    assert torch.equal(rows(again, 0, SITES), in_directory)
    assert len(store.glob("kept/activations/*/L1/*.safetensors")) > 0


def test_a_bucket_that_is_not_there_is_refused_before_anything_is_computed(
    place: Path,  # noqa: F811
    store: S3FileSystem,
) -> None:
    cache = open_cache(plan_run(recipe(place, "s3://mistyped/activations")))
    with pytest.raises(DataError, match=r"s3://mistyped/activations: .*there is no bucket or folder mistyped"):
        cache.check_room(1)
    assert not store.exists("mistyped")


def test_a_bucket_that_one_may_write_to_but_not_ask_about_is_used(
    place: Path,  # noqa: F811
    store: S3FileSystem,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store.mkdir("private")
    cache = open_cache(plan_run(recipe(place, "s3://private/activations")))
    assert isinstance(cache, RemoteCache)
    monkeypatch.setattr(cache.files, "exists", lambda path: False)
    monkeypatch.setattr(cache.files, "makedirs", lambda path, exist_ok: pytest.fail("it would create a bucket"))
    cache.check_room(1)
    assert store.glob("private/activations/*/about.json")
