"""Training: schedules, lockstep, state, failure."""

from typing import Any

import pytest
import torch

from saerelay.planning.leg import Leg
from saerelay.planning.recipe import OptimizerSpec, TrainSpec
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.spec import DictionarySpec, SizedDictionarySpec
from saerelay.site import Site
from saerelay.training.cohort import Cohort
from saerelay.training.engine import Trainee
from saerelay.training.schedule import learning_rate, penalty_warmth
from saerelay.training.state import TraineeState, first_state

D, F, B = 12, 64, 64
SPEC = TrainSpec(batch_tokens=B)


def train_spec(**optimizer: float) -> TrainSpec:
    return TrainSpec(batch_tokens=B, optimizer=OptimizerSpec(**optimizer))  # type: ignore[arg-type]


def leg(leg_id: str = "L0", architecture: str = "topk", **changes: Any) -> Leg:
    keys: dict[str, Any] = dict(
        id=leg_id, role="root", layer=0, module="resid_post", dictionary=dictionary(architecture=architecture),
        budget_tokens=40 * B, batch_tokens=B, lr=1e-2, dead_after_tokens=6 * B, seed=0,
    )  # fmt: skip
    return Leg.parse(keys | changes)


def dictionary(**changes: Any) -> SizedDictionarySpec:
    keys = {"n_latents": F, "k": 4, "target_l0": 4, "l1": 0.1}
    return DictionarySpec.parse(keys | changes).sized(D)


def begun(
    the_leg: Leg, x: torch.Tensor, inherited: Dictionary | None = None, spec: TrainSpec = SPEC, **options: Any
) -> Trainee:
    """A trainee at age 0."""
    lr_share = options.pop("lr_share", 1.0)
    return Trainee(the_leg, spec, first_state(the_leg, spec, x, inherited, lr_share=lr_share), **options)


def data(n: int = 64 * B, seed: int = 0) -> torch.Tensor:
    """Sparse combinations of 40 directions, around a mean, with some noise."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, D, generator=torch.Generator().manual_seed(99))
    weights = torch.rand(n, 40, generator=g) * (torch.rand(n, 40, generator=g) < 0.08)
    return weights @ directions * 20 + 50 + 0.1 * torch.randn(n, D, generator=g)


def trained(the_leg: Leg, x: torch.Tensor, **options: Any) -> Trainee:
    trainee = begun(the_leg, x, **options)
    for batch in x.split(B):
        if not trainee.done:
            trainee.step(batch)
    return trainee


def fvu(trainee: Trainee, x: torch.Tensor) -> float:
    error = (x - trainee.canonical(x)(x)).square().sum()
    return float(error / (x - x.mean(dim=0)).square().sum())


def same(a: Trainee, b: Trainee) -> bool:
    left, right = a.state.tensors(), b.state.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left if k != "seconds")


def test_learning_rate_rises_holds_and_falls_to_zero() -> None:
    optimizer = OptimizerSpec(warmup=0.1, decay=0.2)
    rates = [learning_rate(leg(), optimizer, 40 * B, age) for age in range(0, 40 * B, B)]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert set(rates[4:33]) == {0.01} and rates[-1] == pytest.approx(0.01 / 8)


def test_sparsity_penalty_warms_up() -> None:
    weights = [penalty_warmth(OptimizerSpec(sparsity_warmup=0.25), 40 * B, age) for age in range(0, 20 * B, 5 * B)]
    assert weights == [0.0, 0.5, 1.0, 1.0]
    assert penalty_warmth(OptimizerSpec(sparsity_warmup=0), 40 * B, 0) == 1.0


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "gated", "relu"])
def test_training_learns(architecture: str) -> None:
    x = data()
    start, end = begun(leg(architecture=architecture), x), trained(leg(architecture=architecture), x)
    assert fvu(end, data(seed=1)) < 0.7 * fvu(start, data(seed=1))
    assert torch.allclose(end.state.dictionary.W_dec.norm(dim=1), torch.ones(F))


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "gated", "relu"])
def test_sparse_and_dense_training_agree(architecture: str) -> None:
    x = data()
    sparse, dense = trained(leg(architecture=architecture), x), trained(leg(architecture=architecture), x, dense=True)
    assert fvu(sparse, x) == pytest.approx(fvu(dense, x), rel=0.02)


@pytest.mark.parametrize("architecture", ["jumprelu", "gated"])
def test_a_penalty_goes_to_its_target_l0(architecture: str) -> None:
    x = data(256 * B)
    end = trained(leg(architecture=architecture, budget_tokens=256 * B), x)
    assert bool(torch.isfinite(end.canonical()(x)).all())
    l0 = float((end.canonical().encode(x) > 0).sum(dim=1).float().mean())
    assert l0 == pytest.approx(4, rel=0.15)


def test_units_make_training_independent_of_the_models_scale() -> None:
    x = data()
    one, other = trained(leg(), x), trained(leg(), 1000 * x - 7)
    assert fvu(one, x) == pytest.approx(fvu(other, 1000 * x - 7), rel=0.05)


def test_many_in_lockstep_equal_each_alone() -> None:
    x, y = data(), data(seed=5)
    legs = [
        leg("a"),
        leg("b", architecture="batchtopk", seed=1),
        leg("c", layer=1, budget_tokens=10 * B),
        leg("d", batch_tokens=B // 4, lr=3e-3),
        leg("e", architecture="jumprelu", layer=1),
    ]
    cohort = Cohort(B)
    for one in legs:
        cohort.add(begun(one, y if one.layer else x))
    for bx, by in zip(x.split(B), y.split(B), strict=True):
        cohort.step({Site(0): bx, Site(1): by})
    assert cohort.live == []
    for one in legs:
        alone = Cohort(B)
        alone.add(begun(one, y if one.layer else x))
        for batch in (y if one.layer else x).split(B):
            alone.step({one.site: batch})
        assert same(alone[one.id], cohort[one.id]), one.id
    assert [cohort[i].state.age for i in "abcde"] == [40 * B, 40 * B, 10 * B, 40 * B, 40 * B]


def test_a_half_precision_product_learns_as_much() -> None:
    x = data()
    half = begun(leg(), x, spec=TrainSpec(batch_tokens=B, precision="bfloat16"))
    single = begun(leg(), x, spec=TrainSpec(batch_tokens=B, precision="float32"))
    for batch in x.split(B)[:40]:
        half.step(batch)
        single.step(batch)
    assert half.half_encoder is not None and torch.equal(half.half_encoder, half.state.dictionary.W_enc.bfloat16())
    assert single.half_encoder is None and not torch.equal(half.state.dictionary.W_enc, single.state.dictionary.W_enc)
    assert fvu(half, data(seed=1)) == pytest.approx(fvu(single, data(seed=1)), rel=0.02)


def test_precision_follows_the_activations_unless_given() -> None:
    x = data()[:B]
    for precision, dtype, expected in [
        ("auto", torch.float32, False),
        ("auto", torch.bfloat16, True),
        ("float32", torch.bfloat16, False),
        ("bfloat16", torch.float32, True),
    ]:
        trainee = begun(leg(), x, spec=TrainSpec(batch_tokens=B, precision=precision))  # type: ignore[arg-type]
        trainee.step(x.to(dtype))
        assert (trainee.half_encoder is not None) == expected, (precision, dtype)
        assert all(tensor.dtype != torch.bfloat16 for tensor in trainee.state.tensors().values())


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "gated", "relu"])
def test_training_without_mkl_learns_the_same(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = data()
    with_mkl = trained(leg(architecture=architecture), x)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    without = trained(leg(architecture=architecture), x)
    assert fvu(without, x) == pytest.approx(fvu(with_mkl, x), rel=0.02)


def test_two_widths_in_turn_do_not_share_room_for_gradients() -> None:
    x = data()
    wide = leg("wide", dictionary=dictionary(n_latents=2 * F))
    alone, in_turn, other = begun(leg(), x), begun(leg(), x), begun(wide, x)
    for batch in x.split(B)[:10]:
        alone.step(batch)
    for batch in x.split(B)[:10]:
        in_turn.step(batch)
        other.step(batch)
    assert same(alone, in_turn)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "gated", "relu"])
@pytest.mark.parametrize("pause", [1, 3, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_state_continues_to_the_same_bits(architecture: str, pause: int, dtype: torch.dtype) -> None:
    x = data().to(dtype)
    the_leg = leg(architecture=architecture, parent="p", method="identity")
    parent = trained(leg(architecture=architecture), x).canonical(x.float())
    whole, paused = begun(the_leg, x, parent), begun(the_leg, x, parent)
    batches = x.split(B)
    for batch in batches[:pause]:
        paused.step(batch)
    saved = {name: tensor.clone() for name, tensor in paused.state.tensors().items()}
    resumed = Trainee(the_leg, SPEC, TraineeState.restore(the_leg, saved))
    for batch in batches[pause:40]:
        resumed.step(batch)
    for batch in batches[:40]:
        whole.step(batch)
    assert same(whole, resumed) and whole.done


def test_looking_changes_nothing() -> None:
    x = data()
    watched, unwatched = begun(leg(), x), begun(leg(), x)
    for i, batch in enumerate(x.split(B)[:30]):
        watched.step(batch)
        unwatched.step(batch)
        if i % 3 == 0:
            progress = watched.look()
            assert progress is not None and progress.l0 <= 4 and 0 < progress.fvu < 2
            watched.canonical(x)
    assert same(watched, unwatched)
    assert begun(leg(), x).look() is None


def test_a_non_finite_loss_stops_the_leg_before_it_spoils_the_weights() -> None:
    x = data()
    cohort = Cohort(B)
    cohort.add(begun(leg("bad"), x))
    cohort.add(begun(leg("good", layer=1), x))
    for i, batch in enumerate(x.split(B)):
        poisoned = torch.full_like(batch, torch.inf) if i == 5 else batch
        cohort.step({Site(0): poisoned, Site(1): batch})
    assert cohort["bad"].state.age == 5 * B and "the loss became" in cohort["bad"].state.failure
    assert all(torch.isfinite(t).all() for t in cohort["bad"].canonical().tensors().values())
    assert cohort["good"].state.age == 40 * B and not cohort["good"].state.failure


def test_dead_latents_are_counted_by_tokens_and_revived_by_aux_loss() -> None:
    x = data(256 * B)
    killed = begun(leg(budget_tokens=256 * B), x).canonical()
    for tensor in (killed.W_enc, killed.b_enc):
        tensor[:40] *= 1e-3  # never among the largest, but often positive: what AuxK looks at

    def ending(aux_weight: float) -> Trainee:
        spec = dictionary(aux_weight=aux_weight)
        return trained(leg(parent="p", method="identity", dictionary=spec, budget_tokens=256 * B), x, inherited=killed)

    without, with_aux = ending(0.0), ending(1.0)
    assert int(without.dead().sum()) >= 40
    assert int(begun(leg(), x, killed).dead().sum()) == 0
    assert int(with_aux.dead().sum()) <= int(without.dead().sum()) - 5


def test_an_empty_batch_only_ages() -> None:
    trainee = begun(leg(), data())
    before = trainee.state.dictionary.W_enc.detach().clone()
    trainee.step(data()[:0])
    assert trainee.state.age == B and torch.equal(trainee.state.dictionary.W_enc, before)


def test_from_scratch_depends_on_seed_and_site_only() -> None:
    x = data()
    assert same(begun(leg("a"), x), begun(leg("b"), x))
    assert not same(begun(leg("a"), x), begun(leg("a", seed=1), x))
    assert not same(begun(leg("a"), x), begun(leg("a", layer=3), x))


def test_raw_units_when_not_normalised() -> None:
    x = data()
    spec = dictionary(architecture="relu", normalise=False, l1=1.0)
    trainee = trained(leg(dictionary=spec, lr=1e-3), x)
    assert float(trainee.state.units.scale) == 1 and not trainee.state.units.mean.any()
    assert fvu(trainee, x) < 1


def test_whitening_changes_how_a_leg_learns_not_what_it_is() -> None:
    x = data() * torch.linspace(0.1, 3, D)
    parent = trained(leg(), x).canonical()
    as_it_is, whitened = (begun(leg(), x, parent, train_spec(whitening=w)) for w in (0.0, 0.25))
    assert as_it_is.state.whitening is None and whitened.state.whitening is not None
    for name, tensor in as_it_is.canonical().tensors().items():
        assert torch.allclose(whitened.canonical().tensors()[name], tensor, rtol=1e-4, atol=1e-4), name
    for batch in x.split(B)[:10]:
        as_it_is.step(batch)
        whitened.step(batch)
    assert not torch.allclose(as_it_is.canonical().W_enc, whitened.canonical().W_enc, rtol=1e-3)
    raw = dictionary(architecture="relu", normalise=False)
    assert begun(leg(dictionary=raw), x).state.whitening is None


@pytest.mark.parametrize(("given", "bias"), [({}, 8**0.5 / 5), ({"encoder_lr": 1.0, "bias_lr": 3.0}, 3.0)])
def test_every_parameter_learns_at_its_own_rate(given: dict[str, float], bias: float) -> None:
    """Adam's first step moves each entry that has a gradient by the rate itself, whatever the gradient."""
    spec = train_spec(warmup=0.0, whitening=0.0, clip=0.0, **given)
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    trainee = begun(leg(architecture="relu"), x, spec=spec)
    before = {name: t.clone() for name, t in trainee.state.dictionary.tensors().items()}
    trainee.step(x[:64])
    lr, moved = (
        trainee.leg.schedule.lr,
        {n: (t - before[n]).abs() for n, t in trainee.state.dictionary.tensors().items()},
    )
    shares = {"W_enc": given.get("encoder_lr", 0.5), "b_enc": bias, "b_dec": 1.0}
    for name, share in shares.items():
        assert moved[name].max() == pytest.approx(share * lr, rel=1e-3), name
    assert 0 < moved["W_dec"].max() < 2 * lr  # rows are made of unit norm again


def test_a_share_of_the_rate_is_kept_over_a_restart() -> None:
    trainee = begun(leg(), data(), lr_share=0.5)
    resumed = Trainee(leg(), SPEC, TraineeState.restore(leg(), trainee.state.tensors()))
    whole_rate = learning_rate(leg(), SPEC.optimizer, 40 * B, 20 * B)
    assert resumed.learning_rate(20 * B) == trainee.learning_rate(20 * B) == 0.5 * whole_rate
