"""Pieces of work side by side: the same results in the same order, errors kept, bits independent of the threads."""

import threading
import time

import pytest
import torch

from saerelay.planning.leg import Leg
from saerelay.planning.recipe import TrainSpec
from saerelay.sae.spec import DictionarySpec
from saerelay.sae.threads import alone, in_parallel
from saerelay.site import Site
from saerelay.training.cohort import Cohort
from saerelay.training.engine import Trainee
from saerelay.training.state import first_state


@pytest.fixture(params=[1, 2, 3])
def n_threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_from_threads_that_compute_alone(n_threads: int) -> None:
    def piece(i: int) -> tuple[int, int, int]:
        time.sleep(0.01 * (i % 3))
        return i, torch.get_num_threads(), threading.get_ident()

    with alone():
        found = in_parallel(piece, range(12))
    assert [i for i, _, _ in found] == list(range(12)) and {n for _, n, _ in found} == {1}
    assert len({thread for _, _, thread in found}) == n_threads
    assert torch.get_num_threads() == n_threads


def test_work_within_work_stays_in_its_thread(n_threads: int) -> None:
    def outer(i: int) -> bool:
        me = threading.get_ident()
        return set(in_parallel(lambda _: threading.get_ident(), range(5))) == {me}

    with alone():
        assert all(in_parallel(outer, range(6)))
        with alone():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1


def test_outside_alone_nothing_is_shared_out() -> None:
    assert set(in_parallel(lambda _: threading.get_ident(), range(5))) == {threading.get_ident()}


def test_an_error_in_any_piece_is_raised_and_the_pool_lives_on(n_threads: int) -> None:
    def piece(i: int) -> int:
        if i == 3:
            raise ValueError("piece 3")
        return i

    with alone():
        with pytest.raises(ValueError, match="piece 3"):
            in_parallel(piece, range(8))
        assert in_parallel(lambda i: i, range(8)) == list(range(8))
    assert torch.get_num_threads() == n_threads


def test_denormals_are_zero_only_inside() -> None:
    tiny = torch.full((64,), 1e-40)
    with alone():
        assert all(in_parallel(lambda _: float((tiny * 0.5).sum()) == 0.0, range(4)))
    assert float((tiny * 0.5).sum()) > 0


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "gated", "relu"])
def test_bits_do_not_depend_on_the_number_of_threads(architecture: str) -> None:
    """One leg by pieces, and three in lockstep of which some go to threads of their own."""
    D, F, B = 24, 1024, 600
    keys = {"architecture": architecture, "n_latents": F, "k": 4, "target_l0": 4}
    spec = DictionarySpec.parse(keys).sized(D)
    x = torch.randn(4 * B, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    legs = [
        Leg(id=f"L{i}", role="root", layer=0, module="resid_post", dictionary=spec, budget_tokens=4 * B,
            batch_tokens=B, lr=1e-2, dead_after_tokens=2 * B, seed=i)
        for i in range(3)
    ]  # fmt: skip

    def run(n: int, chosen: list[Leg]) -> dict[str, torch.Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(n)
        cohort = Cohort(B)
        for leg in chosen:
            cohort.add(Trainee(leg, TrainSpec(), first_state(leg, TrainSpec(), x)))
        for batch in x.split(B):
            cohort.step({Site(0): batch})
        torch.set_num_threads(before)
        return cohort["L0"].state.tensors()

    expected = run(1, legs[:1])
    for found in (run(2, legs[:1]), run(2, legs), run(3, legs)):
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items() if name != "seconds")
