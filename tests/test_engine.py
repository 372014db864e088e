"""Training: schedules, lockstep, state, failure."""

from typing import Any

import pytest
import torch

from saerelay.planning.plan import Leg
from saerelay.planning.recipe import TrainSpec
from saerelay.sae.spec import DictionarySpec
from saerelay.site import Site
from saerelay.training.engine import Cohort, Trainee
from saerelay.training.schedule import learning_rate, penalty_warmth

D, F, B = 12, 64, 64
SPEC = TrainSpec(batch_tokens=B)


def leg(leg_id: str = "L0", architecture: str = "topk", **changes: Any) -> Leg:
    dictionary = DictionarySpec(architecture=architecture, n_latents=F, k=4, target_l0=4, l1=0.1)  # type: ignore[arg-type]
    defaults: dict[str, Any] = dict(
        id=leg_id, role="root", layer=0, module="resid_post", dictionary=dictionary, budget_tokens=40 * B,
        batch_tokens=B, lr=1e-2, dead_after_tokens=6 * B, seed=0,
    )  # fmt: skip
    return Leg(**(defaults | changes))


def data(n: int = 64 * B, seed: int = 0) -> torch.Tensor:
    """Sparse combinations of 40 directions, around a mean, with some noise."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, D, generator=torch.Generator().manual_seed(99))
    weights = torch.rand(n, 40, generator=g) * (torch.rand(n, 40, generator=g) < 0.08)
    return weights @ directions * 20 + 50 + 0.1 * torch.randn(n, D, generator=g)


def trained(the_leg: Leg, x: torch.Tensor, **options: Any) -> Trainee:
    trainee = Trainee(the_leg, SPEC, x, **options)
    for batch in x.split(B):
        if not trainee.done:
            trainee.step(batch)
    return trainee


def fvu(trainee: Trainee, x: torch.Tensor) -> float:
    error = (x - trainee.canonical(x)(x)).square().sum()
    return float(error / (x - x.mean(dim=0)).square().sum())


def same(a: Trainee, b: Trainee) -> bool:
    left, right = a.state(), b.state()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left if k != "seconds")


def test_learning_rate_rises_holds_and_falls_to_zero() -> None:
    spec = TrainSpec(warmup=0.1, decay=0.2)
    rates = [learning_rate(leg(), spec, age) for age in range(0, 40 * B, B)]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert set(rates[4:33]) == {0.01} and rates[-1] == pytest.approx(0.01 / 8)


def test_sparsity_penalty_warms_up() -> None:
    weights = [sparsity_weight(leg(), TrainSpec(sparsity_warmup=0.25), age) for age in range(0, 20 * B, 5 * B)]
    assert weights == [0.0, 0.5, 1.0, 1.0]
    assert sparsity_weight(leg(), TrainSpec(sparsity_warmup=0), 0) == 1.0


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "relu"])
def test_training_learns(architecture: str) -> None:
    x = data()
    start, end = Trainee(leg(architecture=architecture), SPEC, x), trained(leg(architecture=architecture), x)
    assert fvu(end, data(seed=1)) < 0.7 * fvu(start, data(seed=1))
    assert torch.allclose(end.dictionary.W_dec.norm(dim=1), torch.ones(F))


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "relu"])
def test_sparse_and_dense_training_agree(architecture: str) -> None:
    x = data()
    sparse, dense = trained(leg(architecture=architecture), x), trained(leg(architecture=architecture), x, dense=True)
    assert fvu(sparse, x) == pytest.approx(fvu(dense, x), rel=0.02)


def test_jumprelu_goes_to_its_target_l0() -> None:
    x = data(256 * B)
    end = trained(leg(architecture="jumprelu", budget_tokens=256 * B), x)
    assert float((end.canonical()(x) * 0 + 1).sum()) > 0
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
        cohort.add(Trainee(one, SPEC, y if one.layer else x))
    for bx, by in zip(x.split(B), y.split(B), strict=True):
        cohort.step({Site(0): bx, Site(1): by})
    assert cohort.live == []
    for one in legs:
        alone = Cohort(B)
        alone.add(Trainee(one, SPEC, y if one.layer else x))
        for batch in (y if one.layer else x).split(B):
            alone.step({one.site: batch})
        assert same(alone[one.id], cohort[one.id]), one.id
    assert [cohort[i].age for i in "abcde"] == [40 * B, 40 * B, 10 * B, 40 * B, 40 * B]


def test_a_half_precision_product_learns_as_much() -> None:
    x = data()
    half = Trainee(leg(), TrainSpec(batch_tokens=B, precision="bfloat16"), x)
    single = Trainee(leg(), TrainSpec(batch_tokens=B, precision="float32"), x)
    for batch in x.split(B)[:40]:
        half.step(batch)
        single.step(batch)
    assert half.encoder is not None and torch.equal(half.encoder, half.dictionary.W_enc.bfloat16())
    assert single.encoder is None and not torch.equal(half.dictionary.W_enc, single.dictionary.W_enc)
    assert fvu(half, data(seed=1)) == pytest.approx(fvu(single, data(seed=1)), rel=0.02)


def test_precision_follows_the_activations_unless_given() -> None:
    x = data()[:B]
    for precision, dtype, expected in [
        ("auto", torch.float32, False),
        ("auto", torch.bfloat16, True),
        ("float32", torch.bfloat16, False),
        ("bfloat16", torch.float32, True),
    ]:
        trainee = Trainee(leg(), TrainSpec(batch_tokens=B, precision=precision), x)  # type: ignore[arg-type]
        trainee.step(x.to(dtype))
        assert (trainee.encoder is not None) == expected, (precision, dtype)
        assert all(tensor.dtype != torch.bfloat16 for tensor in trainee.state().values())


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "relu"])
def test_training_without_mkl_learns_the_same(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = data()
    with_mkl = trained(leg(architecture=architecture), x)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    without = trained(leg(architecture=architecture), x)
    assert fvu(without, x) == pytest.approx(fvu(with_mkl, x), rel=0.02)


def test_two_widths_in_turn_do_not_share_room_for_gradients() -> None:
    x = data()
    wide = leg("wide", dictionary=DictionarySpec(n_latents=2 * F, k=4))
    alone, in_turn, other = Trainee(leg(), SPEC, x), Trainee(leg(), SPEC, x), Trainee(wide, SPEC, x)
    for batch in x.split(B)[:10]:
        alone.step(batch)
    for batch in x.split(B)[:10]:
        in_turn.step(batch)
        other.step(batch)
    assert same(alone, in_turn)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "relu"])
@pytest.mark.parametrize("pause", [1, 3, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_state_continues_to_the_same_bits(architecture: str, pause: int, dtype: torch.dtype) -> None:
    x = data().to(dtype)
    the_leg = leg(architecture=architecture, parent="p")
    parent = trained(leg(architecture=architecture), x).canonical(x.float())
    whole, paused = Trainee(the_leg, SPEC, x, parent), Trainee(the_leg, SPEC, x, parent)
    batches = x.split(B)
    for batch in batches[:pause]:
        paused.step(batch)
    saved = {name: tensor.clone() for name, tensor in paused.state().items()}
    resumed = Trainee.restore(the_leg, SPEC, saved)
    for batch in batches[pause:40]:
        resumed.step(batch)
    for batch in batches[:40]:
        whole.step(batch)
    assert same(whole, resumed) and whole.done


def test_looking_changes_nothing() -> None:
    x = data()
    watched, unwatched = Trainee(leg(), SPEC, x), Trainee(leg(), SPEC, x)
    for i, batch in enumerate(x.split(B)[:30]):
        watched.step(batch)
        unwatched.step(batch)
        if i % 3 == 0:
            progress = watched.look()
            assert progress is not None and progress.l0 <= 4 and 0 < progress.fvu < 2
            watched.canonical(x)
    assert same(watched, unwatched)
    assert Trainee(leg(), SPEC, x).look() is None


def test_a_non_finite_loss_stops_the_leg_before_it_spoils_the_weights() -> None:
    x = data()
    cohort = Cohort(B)
    cohort.add(Trainee(leg("bad"), SPEC, x))
    cohort.add(Trainee(leg("good", layer=1), SPEC, x))
    for i, batch in enumerate(x.split(B)):
        poisoned = torch.full_like(batch, torch.inf) if i == 5 else batch
        cohort.step({Site(0): poisoned, Site(1): batch})
    assert cohort["bad"].age == 5 * B and "the loss became" in cohort["bad"].failure
    assert all(torch.isfinite(t).all() for t in cohort["bad"].canonical().tensors().values())
    assert cohort["good"].age == 40 * B and not cohort["good"].failure


def test_dead_latents_are_counted_by_tokens_and_revived_by_aux_loss() -> None:
    x = data(256 * B)
    killed = Trainee(leg(budget_tokens=256 * B), SPEC, x).canonical()
    killed.b_enc[:40] -= 40 * killed.b_enc.abs().max() + 1000

    def ending(aux_weight: float) -> Trainee:
        spec = DictionarySpec(n_latents=F, k=4, aux_weight=aux_weight)
        return trained(leg(parent="p", dictionary=spec, budget_tokens=256 * B), x, inherited=killed)

    without, with_aux = ending(0.0), ending(1.0)
    assert int(without.dead().sum()) >= 40
    assert int(Trainee(leg(), SPEC, x, killed).dead().sum()) == 0
    assert int(with_aux.dead().sum()) <= int(without.dead().sum())


def test_an_empty_batch_only_ages() -> None:
    trainee = Trainee(leg(), SPEC, data())
    before = trainee.dictionary.W_enc.detach().clone()
    trainee.step(data()[:0])
    assert trainee.age == B and torch.equal(trainee.dictionary.W_enc, before)


def test_from_scratch_depends_on_seed_and_site_only() -> None:
    x = data()
    assert same(Trainee(leg("a"), SPEC, x), Trainee(leg("b"), SPEC, x))
    assert not same(Trainee(leg("a"), SPEC, x), Trainee(leg("a", seed=1), SPEC, x))
    assert not same(Trainee(leg("a"), SPEC, x), Trainee(leg("a", layer=3), SPEC, x))


def test_raw_units_when_not_normalised() -> None:
    x = data()
    spec = DictionarySpec(architecture="relu", n_latents=F, normalise=False, l1=1.0)
    trainee = trained(leg(dictionary=spec, lr=1e-3), x)
    assert float(trainee.scale) == 1 and not trainee.mean.any()
    assert fvu(trainee, x) < 1


def test_whitening_changes_how_a_leg_learns_not_what_it_is() -> None:
    x = data() * torch.linspace(0.1, 3, D)
    parent = trained(leg(), x).canonical()
    as_it_is, whitened = (Trainee(leg(), TrainSpec(whitening=w), x, parent) for w in (0.0, 0.25))
    assert as_it_is.whitening is None and whitened.whitening is not None
    for name, tensor in as_it_is.canonical().tensors().items():
        assert torch.allclose(whitened.canonical().tensors()[name], tensor, rtol=1e-4, atol=1e-4), name
    for batch in x.split(B)[:10]:
        as_it_is.step(batch)
        whitened.step(batch)
    assert not torch.allclose(as_it_is.canonical().W_enc, whitened.canonical().W_enc, rtol=1e-3)
    raw = DictionarySpec(architecture="relu", n_latents=F, normalise=False)
    assert Trainee(leg(dictionary=raw), TrainSpec(), x).whitening is None


@pytest.mark.parametrize(("given", "bias"), [({}, 8**0.5 / 5), ({"encoder_lr": 1.0, "bias_lr": 3.0}, 3.0)])
def test_every_parameter_learns_at_its_own_rate(given: dict[str, float], bias: float) -> None:
    """Adam's first step moves each entry that has a gradient by the rate itself, whatever the gradient."""
    spec = TrainSpec(warmup=0.0, whitening=0.0, clip=0.0, **given)
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    trainee = Trainee(leg(architecture="relu"), spec, x)
    before = {name: t.clone() for name, t in trainee.dictionary.tensors().items()}
    trainee.step(x[:64])
    lr, moved = trainee.leg.lr, {n: (t - before[n]).abs() for n, t in trainee.dictionary.tensors().items()}
    shares = {"W_enc": given.get("encoder_lr", 0.5), "b_enc": bias, "b_dec": 1.0}
    for name, share in shares.items():
        assert moved[name].max() == pytest.approx(share * lr, rel=1e-3), name
    assert 0 < moved["W_dec"].max() < 2 * lr  # rows are made of unit norm again


def test_a_share_of_the_rate_is_kept_over_a_restart() -> None:
    trainee = Trainee(leg(lr=1e-2), SPEC, data(), lr_share=0.5)
    again = Trainee.restore(leg(lr=1e-2), SPEC, trainee.state())
    assert (
        again.learning_rate(20 * B) == trainee.learning_rate(20 * B) == 0.5 * learning_rate(leg(lr=1e-2), SPEC, 20 * B)
    )
