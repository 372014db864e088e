"""Steps on a GPU, on one that is not there: they wait for nothing, and compute what a processor does."""

import gc
import time
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from fake_cuda import Graph, Waits, fake_cuda
from test_engine import SPEC, B, D, F, begun, data, leg

from saerelay.data.stream import Block
from saerelay.sae.kernels import Reading, sparse_step
from saerelay.sae.maps import affine
from saerelay.sae.moments import Moments
from saerelay.sae.transfer import Retraining, carry
from saerelay.sae.units import Units
from saerelay.site import Site
from saerelay.team import Team
from saerelay.training.cohort import Cohort
from saerelay.training.device import Launcher
from saerelay.training.engine import Trainee
from saerelay.training.state import TraineeState

KINDS = ["topk", "batchtopk", "jumprelu", "gated", "relu"]


@pytest.fixture(autouse=True)
def device() -> Iterator[Waits]:
    with fake_cuda() as waits:
        yield waits


def stepped(trainee: Trainee, batches: list[torch.Tensor]) -> Trainee:
    for batch in batches:
        trainee.step(batch)
    trainee.settle()
    return trainee


def differences(a: Trainee, b: Trainee) -> dict[str, float]:
    """How far the tensors of two states are apart, by name."""
    left = a.state.tensors()
    right = b.state.tensors()
    assert left.keys() == right.keys()
    return {name: float((left[name].cpu() - right[name].cpu()).abs().max()) for name in left if name != "seconds"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_does_not_wait_for_the_device(kind: str, device: Waits) -> None:
    x = data().to("cuda")
    trainee = begun(leg(architecture=kind), x)
    batches = list(x.split(B)[:8])
    stepped(trainee, batches[:5])
    device.places.clear()
    for batch in batches[5:]:
        trainee.step(batch)
    assert device.n == 0, device.places


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_trains_as_a_processor_does(kind: str) -> None:
    x = data()
    on_cpu = stepped(begun(leg(architecture=kind), x), list(x.split(B)[:12]))
    on_gpu = stepped(begun(leg(architecture=kind), x.to("cuda")), list(x.to("cuda").split(B)[:12]))
    assert on_gpu.state.age == 12 * B
    assert max(differences(on_cpu, on_gpu).values()) < 1e-5
    seen, expected = on_gpu.look(), on_cpu.look()
    assert seen and expected and seen.fvu == pytest.approx(expected.fvu, rel=1e-3) and seen.seconds > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_equals_one_that_is_launched(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = data().to("cuda")
    replays = []
    replay = Graph.replay
    monkeypatch.setattr(Graph, "replay", lambda graph: replays.append(graph) or replay(graph))
    replayed = stepped(begun(leg(architecture=kind), x), list(x.split(B)[:12]))
    assert len(set(replays)) == 1
    assert len(replays) == 9 if replayed.leg.dictionary.activation.selects_fixed_number else 8
    launched = stepped(without_recording(begun(leg(architecture=kind), x)), list(x.split(B)[:12]))
    assert set(differences(replayed, launched).values()) == {0.0}


@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_a_leg_that_has_ended_frees_its_memory_at_once(kind: str) -> None:
    """Python would find a trainee that refers to itself only when it looks for garbage, which may be never."""
    x = data().to("cuda")
    trainee = stepped(begun(leg(architecture=kind), x), list(x.split(B)[:8]))
    ended = weakref.ref(trainee)
    gc.collect()
    gc.disable()
    try:
        del trainee
        assert ended() is None
    finally:
        gc.enable()


def without_recording(trainee: Trainee) -> Trainee:
    """The trainee, with steps that are launched one by one, and with as much memory as their codes turn out to need."""
    assert trainee._launched
    trainee._launched.limits_room = False
    trainee._launched.recordings = None
    return trainee


@pytest.mark.parametrize("kind", ["jumprelu", "gated", "relu"])
def test_steps_whose_codes_find_too_little_room_are_repeated(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = data().to("cuda")
    batches = list(x.split(B)[:14])
    batches[8] = 9 * batches[8]
    repeated = []
    start_again = Launcher.start_again
    monkeypatch.setattr(
        Launcher, "start_again", lambda self, verdict, n: repeated.append(n) or start_again(self, verdict, n)
    )
    found = stepped(begun(leg(architecture=kind), x), batches[:4])
    assert found._launched and found._launched.room and not repeated
    found._launched.make_room(2)
    stepped(stepped(found, batches[4:12]), batches[12:])
    assert repeated[0] == 8
    expected = stepped(without_recording(begun(leg(architecture=kind), x)), batches)
    assert found.state.age == expected.state.age == 14 * B
    assert set(differences(found, expected).values()) == {0.0}
    seen, wanted = found.look(), expected.look()
    assert seen and wanted and seen.l0 == wanted.l0 and seen.loss == pytest.approx(wanted.loss)


@pytest.mark.parametrize("kind", ["jumprelu", "gated", "relu"])
def test_with_and_without_limited_room_the_same_codes_are_selected(kind: str) -> None:
    """Only a first step has no limit, also the first one after a restart: its bits must be the same."""
    x = data().to("cuda")
    the_leg = leg(architecture=kind)
    d = begun(the_leg, x).state.dictionary
    d.W_enc[3] = 0.0  # this latent's pre-activation is zero at every token, after the architecture's shift
    d.b_enc[3] = 0.0
    if d.threshold is not None:
        d.threshold[3] = getattr(the_leg.dictionary.activation, "bandwidth", 0.0) / 2
    readings = (Reading(), Reading(room=F * len(x)))
    free, limited = (sparse_step(the_leg.dictionary, d, x, reading=reading) for reading in readings)
    assert torch.equal(free.codes.row_starts, limited.codes.row_starts)
    assert torch.equal(free.codes.columns, limited.codes.columns[: len(free.codes.columns)])
    assert torch.equal(free.loss.total, limited.loss.total)


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
@pytest.mark.parametrize("at", [1, 5])
def test_a_loss_that_is_not_finite_leaves_the_last_good_state(at: int, kind: str) -> None:
    x = data().to("cuda")
    batches = list(x.split(B)[:12])
    good = stepped(begun(leg(architecture=kind), x), batches[:at])
    bad = stepped(
        begun(leg(architecture=kind), x), [*batches[:at], torch.full_like(batches[0], torch.inf), *batches[at:]]
    )
    assert bad.state.failure == f"the loss became nan at age {at * B} tokens" and bad.done
    assert set(differences(good, bad).values()) == {0.0}
    seen, expected = bad.look(), good.look()
    assert seen and expected and seen.loss == pytest.approx(expected.loss) and seen.l0 == expected.l0


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_is_restored_goes_on_to_the_same_bits(kind: str) -> None:
    x = data().to("cuda")
    the_leg = leg(architecture=kind)
    batches = list(x.split(B)[:14])
    whole = stepped(begun(the_leg, x), batches)
    paused = stepped(begun(the_leg, x), batches[:6])
    saved = {name: tensor.cpu().to("cuda") for name, tensor in paused.state.tensors().items()}
    resumed = Trainee(the_leg, SPEC, TraineeState.restore(the_leg, saved))
    resumed.take_up(paused.unreported())
    stepped(resumed, batches[6:])
    assert set(differences(whole, resumed).values()) == {0.0}
    seen, expected = resumed.look(), whole.look()
    assert seen and expected and seen.loss == expected.loss


@pytest.mark.parametrize("n_dead", [0, 1, 9, F // 4])
def test_aux_loss_on_a_list_of_fixed_length_is_that_on_the_dead_alone(n_dead: int) -> None:
    x = data()[: 4 * B]
    spec = leg().dictionary.changed(aux_weight=1.0)
    state = begun(leg(dictionary=spec), x).state
    dead = torch.zeros(F, dtype=torch.bool)
    dead[torch.randperm(F, generator=torch.Generator().manual_seed(0))[:n_dead]] = True
    found = []
    for where in ("cpu", "cuda"):
        dictionary = state.dictionary.to(where)
        step = sparse_step(spec, dictionary, state.units.normalise(x).to(where), dead=dead.to(where))
        gradients = {name: torch.empty_like(dictionary.tensors()[name]) for name in ("W_enc", "b_enc", "W_dec")}
        step.gradients(slice(0, F), gradients)
        found.append({"loss": step.loss.total.cpu()} | {name: g.cpu() for name, g in gradients.items()})
    for name, tensor in found[0].items():
        assert torch.allclose(found[1][name], tensor, rtol=1e-4, atol=1e-7), name


def test_an_empty_batch_only_ages() -> None:
    x = data().to("cuda")
    batches = list(x.split(B)[:6])
    on_cpu = stepped(begun(leg(), data()), [*data().split(B)[:2], data()[:0], *data().split(B)[2:6]])
    on_gpu = stepped(begun(leg(), x), [*batches[:2], x[:0], *batches[2:]])
    assert on_gpu.state.age == on_cpu.state.age == 7 * B
    assert max(differences(on_cpu, on_gpu).values()) < 1e-5


def test_every_batch_of_a_block_is_full() -> None:
    keep = torch.arange(96) % 5 > 0
    x = torch.arange(96.0)[:, None]
    on_cpu = Block({Site(0): x}, keep, 32)
    on_gpu = Block({Site(0): x.to("cuda")}, keep.to("cuda"), 32)
    kept = x[keep][:, 0].tolist()
    rows = [row for i in range(3) for row in on_gpu.batch(i)[Site(0)][:, 0].tolist()]
    assert rows == (kept + kept)[:96]
    assert [len(on_cpu.batch(i)[Site(0)]) for i in range(3)] == [25, 26, 25]
    assert torch.equal(on_gpu.rows(Site(0), 50).cpu(), on_cpu.rows(Site(0), 50))
    chunks = [chunk[Site(0)][:, 0].tolist() for chunk in on_gpu.chunks([Site(0)], 30)]
    assert [len(chunk) for chunk in chunks] == [30, 30, 16] and sum(chunks, []) == kept


def test_the_fits_of_a_hop_stay_on_the_device_and_are_those_of_a_processor() -> None:
    x = data()
    y = 2 * x.roll(1, dims=1) + 0.1 * x.square()
    parent = begun(leg(), x).canonical()
    results = []
    for where in ("cpu", "cuda"):
        moments = Moments.empty(D, D, where)
        moments.add(x.to(where), y.to(where))
        between = affine(moments)
        assert moments.covariance is moments.covariance and between.A.device.type == where
        rows = y.to(where)
        carried = carry(
            parent, between, rows, Units.fitted_to(rows, 0.75), l0=4, retraining=Retraining(rows, seed=0)
        ).dictionary
        assert carried.W_dec.device.type == where
        results.append({name: tensor.cpu() for name, tensor in carried.tensors().items()})
    for name, tensor in results[0].items():
        assert torch.allclose(results[1][name], tensor, rtol=1e-3, atol=1e-3), name


def test_an_exchange_takes_until_the_device_has_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_to_all_single", lambda *_, **__: None)  # as NCCL's, which returns at once
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: time.sleep(0.01))
    team = Team(rank=0, size=2)
    team.control, team.data = object(), object()
    team.exchange(torch.zeros(4, dtype=torch.uint8, device="cuda"), sent=[0, 4], received=[0, 4])
    assert team.seconds_exchanging >= 0.01


def test_a_cohort_reads_a_block_without_waiting_but_once(device: Waits) -> None:
    x = data().to("cuda")
    cohort = Cohort(B)
    cohort.add(begun(leg("a"), x))
    cohort.add(begun(leg("b", batch_tokens=B // 4), x))
    keep = torch.ones(len(x), dtype=torch.bool, device="cuda")
    block = Block({Site(0): x}, keep, B)
    device.places.clear()
    for i in range(6):
        cohort.step(block.batch(i))
    assert device.n == 1, device.places  # which rows are kept
    cohort.settle()
    assert cohort["a"].state.age == cohort["b"].state.age == 6 * B
