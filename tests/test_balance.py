"""Balanced units: exact both ways, what is trained in them, and how a hop chooses its map."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import saerelay as sr
from saerelay.errors import TransferError
from saerelay.interop import load_dictionary, write_dictionary
from saerelay.interop.origin import Origin
from saerelay.planning.leg import Leg, Schedule
from saerelay.planning.recipe import TrainSpec
from saerelay.sae import trials as trials_module
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.initialise import initialise
from saerelay.sae.maps import affine, identity, map_between, procrustes
from saerelay.sae.moments import Moments
from saerelay.sae.quality import fvu, mean_l0
from saerelay.sae.refit import refit
from saerelay.sae.spec import DictionarySpec
from saerelay.sae.transfer import Retraining, carry, refit_on
from saerelay.sae.trials import RANDOM, best_first, try_methods
from saerelay.sae.units import Units, balance_factors
from saerelay.training.engine import Trainee
from saerelay.training.state import first_state

D, F, K = 16, 48, 4
ARCHITECTURES = ["topk", "batchtopk", "jumprelu", "gated", "relu"]


def activations(n: int, seed: int = 0) -> Tensor:
    """Sparse sums of directions, with one dimension a hundred times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(F, D, generator=torch.Generator().manual_seed(7)), dim=1)
    codes = torch.rand(n, F, generator=generator) * (torch.rand(n, F, generator=generator) < K / F)
    x = codes @ directions
    x[:, 3] = 100 * torch.randn(n, generator=generator) + 500
    return x


def random_dictionary(architecture: str, seed: int = 0) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)
    spec = DictionarySpec.parse({"architecture": architecture, "n_latents": F, "k": K, "target_l0": K}).sized(D)
    return initialise(spec, torch.randn(512, D, generator=generator), generator)


def trained(x: Tensor, balance: float, tokens: int = 40_960) -> Trainee:
    spec = TrainSpec.parse({"batch_tokens": 256, "precision": "float32", "balance": balance})
    leg = Leg(
        id="L0",
        role="root",
        layer=0,
        module="resid_post",
        dictionary=DictionarySpec.parse({"n_latents": F, "k": K}).sized(D),
        schedule=Schedule(budget_tokens=tokens, batch_tokens=256, lr=5e-3, dead_after_tokens=4096),
        seed=0,
    )
    trainee = Trainee(leg, spec, first_state(leg, spec, x[:4096]))
    for batch in x.repeat(1 + tokens // len(x), 1)[:tokens].split(256):
        trainee.step(batch)
    return trainee


# --- units ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_units_are_folded_in_and_out_exactly(architecture: str) -> None:
    x = activations(2000).double()
    units = Units.fitted_to(x, balance=0.75)
    inside = random_dictionary(architecture).to(torch.float64)
    outside = units.to_canonical(inside)
    expected = inside(units.normalise(x)) * units.scale + units.mean
    torch.testing.assert_close(outside(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(outside.encode(x), inside.encode(units.normalise(x)) * units.size)
    again = units.from_canonical(outside)
    for name, tensor in inside.tensors().items():
        torch.testing.assert_close(again.tensors()[name], tensor, rtol=1e-9, atol=1e-9)


def test_balanced_dimensions_differ_less_and_have_mean_square_1() -> None:
    x = activations(4000)
    for balance, ratio in ((0.0, 350), (0.5, 19), (1.0, 1)):
        y = Units.fitted_to(x, balance).normalise(x)
        assert y.square().mean() == pytest.approx(1, rel=1e-3)
        deviations = y.std(dim=0)
        assert deviations.max() / deviations.median() == pytest.approx(ratio, rel=0.2), balance
    assert Units.fitted_to(x, 0.0).scale.dim() == 0


def test_a_constant_dimension_does_not_blow_up() -> None:
    x = activations(1000)
    x[:, 5] = 2.0
    units = Units.fitted_to(x, balance=1.0)
    assert torch.isfinite(units.scale).all()
    assert torch.isfinite(units.normalise(x)).all()


def test_what_is_published_reconstructs_as_what_was_trained() -> None:
    x = activations(8192)
    trainee = trained(x, balance=0.75)
    state = trainee.state
    y = state.units.normalise(x[:500])
    read = y if state.whitening is None else y @ state.whitening
    z = state.dictionary.encode(read)
    expected = (z @ state.dictionary.W_dec + state.dictionary.b_dec) * state.units.scale + state.units.mean
    torch.testing.assert_close(trainee.canonical()(x[:500]), expected, rtol=1e-3, atol=1e-2)
    norms = trainee.canonical().W_dec.norm(dim=1)
    assert norms.max() > 1.5 * norms.min(), "rows of unit norm in units do not have it outside"


def test_balanced_training_serves_the_small_dimensions() -> None:
    x = activations(8192)
    unseen = activations(2000, seed=1)
    plain = trained(x, balance=0.0).canonical()
    balanced = trained(x, balance=0.75).canonical()
    assert fvu(balanced, unseen, balance=1.0) < 0.7 * fvu(plain, unseen, balance=1.0)


@pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary_learning", "saerelay"])
def test_decoder_norms_survive_every_format(format: str, tmp_path: Path) -> None:
    x = activations(2000)
    dictionary = Units.fitted_to(x, 0.75).to_canonical(random_dictionary("topk"))
    write_dictionary(tmp_path / format, dictionary, Origin(), format)
    loaded, _ = load_dictionary(tmp_path / format)
    torch.testing.assert_close(loaded(x), dictionary(x), rtol=1e-3, atol=1e-2)


# --- the measure ----------------------------------------------------------------------------------


def test_balanced_fvu_is_fvu_of_balanced_activations() -> None:
    x = activations(3000)
    dictionary = random_dictionary("topk")
    factors = balance_factors((x - x.mean(dim=0)).square().mean(dim=0), 1.0)
    error = ((x - dictionary(x)) / factors).square().sum()
    variance = ((x - x.mean(dim=0)) / factors).square().sum()
    assert fvu(dictionary, x, balance=1.0) == pytest.approx(float(error / variance), rel=1e-4)
    by_dimension = (x - dictionary(x)).square().mean(dim=0) / x.var(dim=0, correction=0)
    assert fvu(dictionary, x, balance=1.0) == pytest.approx(float(by_dimension.mean()), rel=1e-3)


# --- maps -----------------------------------------------------------------------------------------


def moments_of(source: Tensor, target: Tensor) -> Moments:
    moments = Moments.empty(D, D)
    moments.add(source, target)
    return moments


@pytest.mark.parametrize(("method", "fit"), [("affine", affine), ("procrustes", procrustes)])
def test_a_map_is_fitted_where_dimensions_are_balanced(method, fit) -> None:
    source = activations(4000)
    generator = torch.Generator().manual_seed(2)
    target = source @ (torch.eye(D) + 0.1 * torch.randn(D, D, generator=generator)) + 3
    moments = moments_of(source, target)
    s = balance_factors(moments.cov_source.diagonal(), 0.75)
    t = balance_factors(moments.cov_target.diagonal(), 0.75)
    inside = fit(moments_of(source / s.float(), target / t.float()))
    outside = map_between(method, D, moments, balance=0.75)
    x = source[:100].double()
    expected = (x / s) @ inside.A.T + inside.c
    torch.testing.assert_close(x @ outside.A.T + outside.c, expected * t, rtol=1e-4, atol=1e-2)
    back = target[:100].double()
    expected = (back / t) @ inside.B.T + inside.b
    torch.testing.assert_close(back @ outside.B.T + outside.b, expected * s, rtol=1e-4, atol=1e-2)


def trials_on(target: Tensor, source: Tensor, tokens: int = 0) -> dict[str, float]:
    parent = trained(source, balance=0.75).canonical()
    units = Units.fitted_to(target, 0.75)
    spec = DictionarySpec.parse({"n_latents": F, "k": K}).sized(D)
    on = Retraining(target, seed=0)
    trials = try_methods(parent, moments_of(source, target), on, units, spec, balance=0.75, l0=K)
    return best_first(trials, tokens)


def test_a_copy_is_tried_and_wins_where_nothing_changed() -> None:
    source = activations(8192)
    trials = trials_on(source.clone(), source)
    assert trials["identity"] == pytest.approx(trials["procrustes"], rel=0.02)
    assert next(iter(trials)) != RANDOM
    assert trials["affine"] == pytest.approx(trials["identity"], rel=0.02)


def test_a_rotation_wins_where_dimensions_are_mixed() -> None:
    source = activations(8192)
    Q, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3)))
    units = Units.fitted_to(source, 0.75)
    trials = trials_on(units.normalise(source) @ Q, source)
    assert list(trials)[0] in ("procrustes", "affine")
    assert trials["identity"] > 1.2 * trials["procrustes"]


def test_a_random_dictionary_wins_over_a_parent_that_tells_nothing_apart() -> None:
    x = activations(8192)
    units = Units.fitted_to(x, 0.75)
    inside = random_dictionary("topk")
    same = units.to_canonical(replace(inside, W_enc=inside.W_enc[:1].expand(F, D).clone()))
    spec = DictionarySpec.parse({"n_latents": F, "k": K}).sized(D)
    trials = best_first(
        try_methods(same, moments_of(x, x), Retraining(x, seed=0), units, spec, balance=0.75, l0=K), tokens=0
    )
    assert next(iter(trials)) == RANDOM


def test_a_random_dictionary_is_tried_at_the_same_l0() -> None:
    """That of a ReLU starts with half of its latents active, and so reconstructs better than any sparse one."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(16_384, 96, generator=generator) * (torch.rand(16_384, 96, generator=generator) < 0.04)
    x = codes @ torch.nn.functional.normalize(torch.randn(96, D, generator=generator), dim=1)
    parent = sr.train(x, architecture="relu", l1=2.0, n_latents=96, batch_tokens=256, progress=False, lr=5e-3)
    y = 1.5 * x + 1
    spec = DictionarySpec.parse({"architecture": "relu", "n_latents": 96}).sized(D)
    on = Retraining(y, seed=0)
    l0 = mean_l0(parent, x)
    found = best_first(
        try_methods(parent, moments_of(x, y), on, Units.fitted_to(y), spec, balance=0.0, l0=l0), tokens=0
    )
    assert next(iter(found)) != RANDOM and found["procrustes"] < 0.8 * found[RANDOM]


@pytest.mark.parametrize("balance", [0.0, 0.75])
def test_trials_weigh_dimensions_alike_where_units_are_balanced(balance: float) -> None:
    x = activations(8192)
    units = Units.fitted_to(x, balance)
    parent = units.to_canonical(random_dictionary("topk"))
    found = try_methods(parent, moments_of(x, x), Retraining(x, seed=0), units, balance=balance, l0=K)
    inside = units.normalise(x)
    carried = units.from_canonical(carry(parent, identity(D), x, units, l0=K).dictionary)
    refitted = refit_on(carried, inside[:6144], None, direct=True)
    assert found["identity"] == pytest.approx(fvu(refitted, inside[6144:], 1.0 if balance else 0.0), rel=1e-3)


@pytest.mark.parametrize(
    ("measured", "tokens", "best"),
    [
        ([0.3, 0.4, 0.102, 0.1, 0.9], 0, "procrustes"),
        ([0.3, 0.4, 0.102, 0.1, 0.9], 26_000, "procrustes"),
        ([0.3, 0.4, 0.106, 0.1, 0.9], 26_000, "affine"),
        ([0.3, 0.4, 0.102, 0.1, 0.9], 100_000, "affine"),
        ([0.3, 0.4, 0.1005, 0.1, 0.9], 100_000, "procrustes"),
    ],
)
def test_a_regression_counts_as_worse_than_it_measures_most_of_all_without_training(
    monkeypatch: pytest.MonkeyPatch, measured: list[float], tokens: int, best: str
) -> None:
    fvus = iter(measured)  # of identity, rescale, procrustes, affine, random
    monkeypatch.setattr(trials_module, "fvu", lambda *_, **__: next(fvus))
    x = activations(4096)
    found = trials_on(x, x, tokens)
    assert next(iter(found)) == best and sorted(found.values()) == sorted(measured)


def test_activations_that_are_not_finite_are_named() -> None:
    source = activations(4096)
    target = source.clone()
    target[7, 2] = float("nan")
    spec = DictionarySpec.parse({"n_latents": F, "k": K}).sized(D)
    units = Units.fitted_to(source, 0.75)
    with pytest.raises(TransferError, match="not all finite"):
        on = Retraining(target, seed=0)
        try_methods(random_dictionary("topk"), moments_of(source, source), on, units, spec, balance=0.75, l0=K)


def test_a_refit_in_units_keeps_their_norms() -> None:
    x = activations(4096)
    units = Units.fitted_to(x, 0.75)
    inside = refit(random_dictionary("topk"), units.normalise(x).split(1024))
    torch.testing.assert_close(inside.W_dec.norm(dim=1), torch.ones(F), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(units.to_canonical(inside).W_dec.norm(dim=1), torch.ones(F), atol=0.1)
    assert replace(inside, k=K).k == K


def test_dimensions_are_balanced_by_default_only_where_one_is_huge() -> None:
    huge = activations(4000)
    assert torch.equal(Units.fitted_to(huge, "auto").scale, Units.fitted_to(huge, 0.75).scale)
    even = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Units.fitted_to(even, "auto").scale, Units.fitted_to(even, 0.0).scale)
    assert TrainSpec().optimizer.balance == "auto"
    assert TrainSpec.parse({"balance": 0}).optimizer.balance == 0.0
