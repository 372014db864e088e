"""The activation cache: same bits whatever is in it, damage is named, and the disk it needs is known beforehand."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import saerelay as sr
from saerelay.data.cache import ActivationCache, sequence_ids
from saerelay.data.stream import LiveStream
from saerelay.errors import DataError
from saerelay.lm.model import LanguageModel
from saerelay.planning.cost import plan_cost
from saerelay.planning.plan import LM_BATCH_TOKENS, Plan
from saerelay.planning.recipe import Recipe
from saerelay.site import Site
from saerelay.views.tables.plan import plan_facts
from saerelay.workflows import activations
from saerelay.workflows.settle import plan_run

torch.set_num_threads(1)
SITES = [Site(0), Site(1), Site(2)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A tiny model, and documents that fill one sequence each, so that other splits have the same sequences."""
    root = tmp_path_factory.mktemp("cache")
    shutil.copytree(tiny_model, root / "model")
    tokens = np.random.default_rng(0).integers(1, 101, size=(480, 15)).astype(np.uint16)
    np.save(root / "tokens.npy", tokens)
    return root


def recipe(place: Path, cache: Path | str, dtype: str = "float32", seed: int = 0, **plan: Any) -> Recipe:
    sections = {
        "model": {"name": str(place / "model"), "dtype": dtype, "device": "cpu"},
        "data": {"tokens": str(place / "tokens.npy"), "context": 16, "block_tokens": 1024, "prepend_bos": False},
        "dictionary": {"n_latents": 64, "k": 4},
        "plan": {"preset": "hub", "root_tokens": 6144, "transfer_tokens": 2048, "moment_tokens": 1024} | plan,
        "train": {"batch_tokens": 64, "checkpoint_every": 2048, "seed": seed},
        "evaluate": {"tokens": 256},
    }
    sections["data"] |= {"epochs": 3, "cache": str(cache)}
    return Recipe.parse(sections, source="test")


def weights(suite: sr.Suite) -> dict[tuple[str, str], torch.Tensor]:
    return {(leg, name): x for leg in suite for name, x in suite[leg].tensors().items()}


def same(a: sr.Suite, b: sr.Suite) -> bool:
    left, right = weights(a), weights(b)
    assert left and left.keys() == right.keys()
    return all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each forward of the language model read."""
    counts: list[int] = []
    visit = LanguageModel.visit

    def counted(self: LanguageModel, tokens: torch.Tensor, visitors: Any) -> None:
        counts.append(len(tokens))
        visit(self, tokens, visitors)

    monkeypatch.setattr(LanguageModel, "visit", counted)
    return counts


def files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_second_run_reads_all_of_it_and_gets_the_same_bits(
    place: Path, tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sr.train_run(recipe(place, tmp_path / "cache"), tmp_path / "a")
    assert read
    before = {path: path.stat().st_mtime_ns for path in files(tmp_path / "cache")}
    read.clear()
    monkeypatch.setattr(activations, "load_model", lambda plan: pytest.fail("there is nothing to compute"))
    second = sr.train_run(recipe(place, tmp_path / "cache"), tmp_path / "b")
    assert same(first, second) and not read
    assert {path: path.stat().st_mtime_ns for path in files(tmp_path / "cache")} == before


@pytest.mark.slow
def test_rows_are_rounded_whether_read_or_not(place: Path, tmp_path: Path) -> None:
    for dtype, equal in (("float32", False), ("bfloat16", True)):
        plain = sr.train_run(recipe(place, "", dtype), tmp_path / f"plain-{dtype}")
        cached = sr.train_run(recipe(place, tmp_path / "cache", dtype), tmp_path / f"cached-{dtype}")
        assert same(plain, cached) == equal
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [0, 1, 4, 11])
def test_killed_while_writing_and_resumed_gives_the_same_bits(
    place: Path, tmp_path: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sr.train_run(recipe(place, tmp_path / "one"), tmp_path / "a")
    write, calls = ActivationCache.write, []

    def dying(self: ActivationCache, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) > killed_at:
            raise MemoryError("killed")
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationCache, "write", dying)
        with pytest.raises(MemoryError):
            sr.train_run(recipe(place, tmp_path / "two"), tmp_path / "b")
    assert same(whole, sr.train_run(recipe(place, tmp_path / "two"), tmp_path / "b", resume=True))


@pytest.mark.slow
def test_the_second_epoch_runs_no_forward(place: Path, tmp_path: Path, read: list[int]) -> None:
    run = recipe(place, tmp_path / "cache", preset="scratch", root_tokens=12_288)
    suite = sr.train_run(run, tmp_path / "a")
    stored = len(np.load(tmp_path / "a/tokens/train.npy"))
    assert suite.plan.n_tokens // 16 > 1.5 * stored
    n_blocks = -(-stored // 64)
    assert len(read) == n_blocks and sum(read) == 64 * n_blocks
    read.clear()
    plain = sr.train_run(recipe(place, "", preset="scratch", root_tokens=12_288), tmp_path / "plain")
    assert sum(read) == plain.plan.n_tokens // 16


@pytest.mark.slow
def test_another_seed_reads_the_same_sequences_in_another_order(place: Path, tmp_path: Path, read: list[int]) -> None:
    alone = sr.train_run(recipe(place, tmp_path / "one", seed=1), tmp_path / "a")
    cold = sum(read)
    sr.train_run(recipe(place, tmp_path / "two", seed=0, preset="scratch", root_tokens=12_288), tmp_path / "b")
    read.clear()
    shared = sr.train_run(recipe(place, tmp_path / "two", seed=1), tmp_path / "c")
    assert same(alone, shared) and 0 < sum(read) <= cold
    read.clear()
    again = sr.train_run(recipe(place, tmp_path / "two", seed=1), tmp_path / "d")
    assert same(alone, again) and not read


def test_a_resumed_run_needs_only_what_it_has_not_read(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies before the saved cursor needs no disk and no language model, even if it is in no cache any more."""
    run = recipe(place, tmp_path / "cache", preset="scratch", root_tokens=6144)
    needed: list[int] = []
    monkeypatch.setattr(ActivationCache, "check_room", lambda self, n_bytes: needed.append(n_bytes))

    write = ActivationCache.write

    def dying(self: ActivationCache, *arguments: Any) -> None:
        if len(files(self.folder)) == 4 * len(SITES):
            raise MemoryError("killed")
        write(self, *arguments)

    with monkeypatch.context() as patch:  # in the fifth block of six: the state was saved after the fourth
        patch.setattr(ActivationCache, "write", dying)
        with pytest.raises(MemoryError):
            sr.train_run(run, tmp_path / "a")
    shutil.rmtree(tmp_path / "cache")
    sr.train_run(run, tmp_path / "a", resume=True)
    assert needed[0] == 3 * needed[1] > 0
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(activations, "load_model", lambda plan: pytest.fail("there is nothing to compute"))
    sr.train_run(run, tmp_path / "a", resume=True)
    assert needed[2] == 0


# --- streams, without training ----------------------------------------------------------------------------------


@pytest.fixture
def plan(place: Path, tmp_path: Path) -> Plan:
    return plan_run(recipe(place, tmp_path / "cache", preset="scratch"))


@pytest.fixture(scope="module")
def sequences() -> np.ndarray:
    return np.random.default_rng(1).integers(1, 101, size=(200, 16)).astype(np.uint16)


@pytest.fixture
def opened(plan: Plan, sequences: np.ndarray) -> Callable[[], LiveStream]:
    model = LanguageModel.load(plan.recipe.model)
    return lambda: LiveStream(model, sequences, plan, ActivationCache(plan))


def rows(stream: LiveStream, number: int, sites: list[Site] = SITES) -> torch.Tensor:
    block = stream.block(number, sites)
    assert all(x.dtype == torch.bfloat16 for x in block.activations.values())
    return torch.cat([block.rows(site) for site in sites])


def test_sites_and_sequences_that_are_missing_are_added(opened: Callable[[], LiveStream], read: list[int]) -> None:
    alone = rows(opened(), 0)
    shutil.rmtree(opened().cache.folder)
    read.clear()
    rows(opened(), 0, [Site(1)])
    assert torch.equal(rows(opened(), 0), alone) and read == [64, 64]
    assert torch.equal(rows(opened(), 0), alone) and read == [64, 64]


def test_only_batches_that_lack_a_sequence_are_computed(
    place: Path, tmp_path: Path, sequences: np.ndarray, read: list[int]
) -> None:
    run = recipe(place, tmp_path / "cache", preset="scratch")
    plan = plan_run(run).changed(block_tokens=2 * LM_BATCH_TOKENS)
    model, more = LanguageModel.load(run.model), np.concatenate([sequences + i for i in range(5)]) % 101

    def whole() -> torch.Tensor:
        stream = LiveStream(model, more, plan, ActivationCache(plan))
        stream.cache.per_shard = LM_BATCH_TOKENS // 16
        return rows(stream, 0, [Site(1)])

    alone = whole()
    assert read == [256, 256]
    files(tmp_path / "cache")[1].unlink()
    assert torch.equal(whole(), alone) and read == [256, 256, 256]


def test_two_runs_at_once_do_not_disturb_each_other(opened: Callable[[], LiveStream], read: list[int]) -> None:
    alone = [rows(opened(), n) for n in range(3)]
    shutil.rmtree(opened().cache.folder)
    first, second = opened(), opened()
    read.clear()
    for number in range(3):
        assert torch.equal(rows(first, number), alone[number]) and torch.equal(rows(second, number), alone[number])
    n_shards, n_read = len(files(first.cache.folder)), len(read)
    for number in range(3):
        assert torch.equal(rows(opened(), number), alone[number])
    assert len(files(first.cache.folder)) == n_shards == 9 and len(read) == n_read


def test_a_shard_that_is_removed_during_a_run_is_not_called_damaged(opened: Callable[[], LiveStream]) -> None:
    stream = opened()
    stream.block(0, SITES)
    removed = files(stream.cache.folder)[0]  # type: ignore[union-attr]
    removed.unlink()
    with pytest.raises(DataError, match=rf"^{re.escape(str(removed))}: was removed .* continue with --resume"):
        stream.block(0, SITES)
    opened().block(0, SITES)


def test_a_write_that_fails_leaves_nothing(opened: Callable[[], LiveStream], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    stream = opened()
    with monkeypatch.context() as patch:
        patch.setattr("saerelay.data.cache.save_file", full)
        with pytest.raises(DataError, match="cannot be written .*No space left.*; free some disk space and continue"):
            stream.block(0, SITES)
    assert files(stream.cache.folder) == []


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def rewritten(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file(change(dict(load_file(path))), path, metadata)

    return rewrite


def swap(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"sequences": tensors["sequences"].flip(0)}


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "expected a whole safetensors file, found"),
    "empty": (lambda path: path.write_bytes(b""), "expected a whole safetensors file, found"),
    "flipped": (flipped, r"expected crc32 \d+ of sequence \d+, found \d+"),
    "other sequences": (rewritten(swap), r"expected crc32 \d+ of sequence \d+, found \d+"),
    "narrow": (
        rewritten(lambda t: t | {"activations": t["activations"][..., 1:].contiguous()}),
        r"expected .*'BF16', 64, 16, 32\).*, found .*'BF16', 64, 16, 31\)",
    ),
    "short": (rewritten(lambda t: t | {"sequences": t["sequences"][1:]}), r"expected .*63.*, found .*64"),
    "float32": (rewritten(lambda t: t | {"activations": t["activations"].float()}), "expected .*BF16.*, found .*F32"),
    "lacking": (rewritten(lambda t: {"activations": t["activations"]}), "expected .*crc32.*, found"),
    "of another site": (
        lambda path: shutil.copy(next((path.parents[1] / "L2").iterdir()), path),
        'expected activations of .*"L1".*found .*"L2"',
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_refused_and_may_be_deleted(opened: Callable[[], LiveStream], damage: str) -> None:
    alone = rows(opened(), 0)
    (path,) = (opened().cache.folder / "L1").iterdir()
    harm, told = DAMAGES[damage]
    harm(path)
    with pytest.raises(DataError, match=rf"(?s)^{re.escape(str(path))}: damaged; {told}.*Delete this file") as caught:
        opened().block(0, SITES)
    assert caught.value.exit_code == 2
    path.unlink()
    assert torch.equal(rows(opened(), 0), alone)


def test_only_what_is_asked_for_is_read(opened: Callable[[], LiveStream]) -> None:
    stream = opened()
    stream.block(0, [Site(1)])
    (path,) = (stream.cache.folder / "L1").iterdir()
    flipped(path)
    ids = stream.ids[stream.sequences_of(0)]
    cache = opened().cache
    assert [i for i, _ in cache.read(Site(1), ids[:-1])] == list(range(63))
    with pytest.raises(DataError, match="of sequence 63"):
        list(cache.read(Site(1), ids[-1:]))


def test_what_a_killed_process_left_goes_after_a_day(opened: Callable[[], LiveStream]) -> None:
    stream = opened()
    folder = stream.cache.folder / "L1"
    folder.mkdir(parents=True)
    for name, age in (("old", 90_000), ("new", 60)):
        path = folder / f".{name}.safetensors.0.tmp"
        path.write_bytes(b"half")
        os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
    stream.block(0, [Site(1)])
    assert [path.name for path in folder.glob(".*")] == [".new.safetensors.0.tmp"]


def test_a_file_that_another_run_has_just_renamed_is_passed_over(opened: Callable[[], LiveStream]) -> None:
    stream = opened()
    folder = stream.cache.folder / "L1"
    folder.mkdir(parents=True)
    (folder / ".a.safetensors.0.tmp").symlink_to("nowhere")  # listed, but not there any more
    assert stream.block(0, [Site(1)]).activations.keys() >= {Site(1)}


def test_whatever_fixes_the_activations_has_its_own_folder(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    run = recipe(place, tmp_path / "cache")

    def folder(section: str, **changes: Any) -> Path:
        changed = run.changed(**{section: getattr(run, section).changed(**changes)})
        return ActivationCache(plan_run(changed)).folder

    base = folder("train", seed=5)
    assert base == folder("dictionary", k=3) == folder("data", epochs=1) and base.parent == tmp_path / "cache"
    assert folder("model", name=str(tmp_path / "model")) == base  # a copy that kept the time of the last change
    others = [folder("model", dtype="bfloat16"), folder("data", context=32)]
    weight_file = tmp_path / "model/model.safetensors"
    os.utime(weight_file, (0, 0))
    others.append(folder("model", name=str(tmp_path / "model")))
    (tmp_path / "model/modeling_mine.py").write_text("")
    others.append(folder("model", name=str(tmp_path / "model")))
    assert len({base, *others}) == 5


def test_sequences_are_known_by_their_tokens() -> None:
    a = np.array([[1, 2, 3], [1, 2, 4], [3, 2, 1]], dtype=np.uint16)
    ids = sequence_ids(a)
    assert ids.dtype == np.int64 and len(set(ids.tolist())) == 3
    assert (sequence_ids(a[::-1].astype(np.uint32)) == ids[::-1]).all()


@pytest.mark.slow
def test_disk_need_is_known_shown_and_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, run = tmp_path / "cache", recipe(place, tmp_path / "cache")
    plan = plan_run(run)
    console = Console(width=300, file=(tmp_path / "shown").open("w"))
    console.print(plan_facts(plan, plan_cost(plan), None))
    console.file.close()
    assert re.search(r"cache +up to 0.00 GiB of activations in ", (tmp_path / "shown").read_text())
    assert plan_cost(plan_run(recipe(place, ""))).cache_bytes == 0

    cache.mkdir()
    real = shutil.disk_usage
    free = {"bytes": 1000}
    fake = lambda path: type("Usage", (), {"free": free["bytes"]}) if Path(path) == cache else real(path)  # noqa: E731
    monkeypatch.setattr("shutil.disk_usage", fake)
    told = r"cache.*: this run adds [\d.]+ GiB of activations, but 0.0 GiB are free; free disk space, set data.cache to"
    with pytest.raises(DataError, match=told) as caught:
        sr.train_run(run, tmp_path / "a")
    assert caught.value.exit_code == 2 and not (tmp_path / "a").exists() and not files(cache)
    free["bytes"] = 10**12
    sr.train_run(run, tmp_path / "a")
    stored = sum(path.stat().st_size for path in files(cache))
    corpus = np.load(tmp_path / "a/tokens/train.npy")
    before = LiveStream(None, corpus, plan, ActivationCache(plan.changed(recipe=recipe(place, tmp_path))))
    needed = before.uncached_bytes()
    assert needed <= stored < 1.1 * needed and needed <= plan_cost(plan).cache_bytes
    assert LiveStream(None, corpus, plan, ActivationCache(plan)).uncached_bytes() == 0
    free["bytes"] = 0
    shutil.rmtree(tmp_path / "a")
    sr.train_run(run, tmp_path / "a")  # adds nothing
