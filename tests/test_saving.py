"""When states are saved, and that what is written is what was there."""

import weakref
from pathlib import Path

import pytest
import torch
from fake_cuda import fake_cuda

from saerelay.planning.recipe import TrainSpec
from saerelay.runs.state import commit_state, load_part, state_facts
from saerelay.training import saving
from saerelay.training.saving import SavingTimes, StateWriter

FACTS = {
    "cursor": 1,
    "failures": {},
    "hops": {},
    "seconds": {},
    "positions": {},
    "live": [],
    "moments": [],
    "machine": {},
    "log_bytes": 0,
    "legs": {},
    "serial": 1,
}


def test_a_state_is_due_after_five_minutes_or_after_the_tokens_that_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    by_time = SavingTimes(TrainSpec(), cursor=0)
    by_tokens = SavingTimes(TrainSpec(checkpoint_every=4096), cursor=512)
    assert not by_time.due(10**9) and not by_tokens.due(4096) and by_tokens.due(4608)
    now += 301
    assert by_time.due(1) and not by_tokens.due(4096)
    by_time.saved(1)
    assert not by_time.due(10**9)


def test_what_a_gpu_changes_after_the_call_is_not_written(tmp_path: Path) -> None:
    with fake_cuda():
        x = torch.arange(4.0).to("cuda")
        writer = StateWriter()
        for serial, expected in ((1, [0, 1, 2, 3]), (2, [9, 9, 9, 9])):
            writer.write(tmp_path / str(serial), {"leg-a": {"x": x, "age": torch.tensor(serial)}})
            x.fill_(9.0)
            commit_state(tmp_path, FACTS | {"serial": serial, "digests": writer.wait()})
            facts = state_facts(tmp_path)
            assert facts and facts["serial"] == serial
            found = load_part(tmp_path, "leg-a", facts)
            assert found["x"].tolist() == expected and int(found["age"]) == serial
        assert not (tmp_path / "1").exists()


def test_memory_for_copies_is_used_again_and_let_go_with_its_leg(tmp_path: Path) -> None:
    with fake_cuda():
        writer = StateWriter()
        x = torch.zeros(4, device="cuda")
        writer.write(tmp_path / "1", {"leg-a": {"x": x}, "leg-b": {"x": x}})
        of_a = weakref.ref(writer._pinned["leg-a"]["x"])
        of_b = weakref.ref(writer._pinned["leg-b"]["x"])
        writer.write(tmp_path / "2", {"leg-b": {"x": x}})
        writer.wait()
        assert of_a() is None
        assert of_b() is writer._pinned["leg-b"]["x"]


def test_a_state_that_cannot_be_written_is_told_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    with fake_cuda():
        writer = StateWriter()
        monkeypatch.setattr(saving, "save_part", full)
        writer.write(tmp_path, {"leg-a": {"x": torch.zeros(1, device="cuda")}})
        with pytest.raises(OSError, match="no space left"):
            writer.wait()
        writer.wait()
