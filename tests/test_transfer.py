"""Moments, the four maps, fold and refit, each against its definition."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dictionaries import ARCHITECTURES, B, D, F, activations, random_dictionary

from saerelay.errors import TransferError
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.kernels import Codes, encode_sparse, join_codes
from saerelay.sae.maps import (
    ENOUGH_TOKENS,
    AffineMap,
    affine,
    identity,
    map_between,
    procrustes,
    rate_share,
    rescale,
    unexplained,
)
from saerelay.sae.moments import Moments
from saerelay.sae.quality import fvu
from saerelay.sae.refit import conjugate_gradients, refit, refit_skip
from saerelay.sae.reshape import Shape, reshape, revive
from saerelay.sae.spec import Method
from saerelay.sae.transfer import Retraining, carry, fold
from saerelay.sae.units import Units


def pair(n: int = 4000, seed: int = 0, offset: float = 5.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=g) * torch.linspace(0.2, 3, D) + offset
    y = x @ torch.randn(D, D, generator=g) / D**0.5 + 0.3 * torch.randn(n, D, generator=g) - 2 * offset
    return x, y


def moments_of(x: torch.Tensor, y: torch.Tensor) -> Moments:
    moments = Moments.empty(x.shape[1], y.shape[1])
    for part_x, part_y in zip(x.split(700), y.split(700), strict=True):
        moments.add(part_x, part_y)
    return moments


def test_moments_are_mean_and_covariance_even_with_a_large_offset() -> None:
    x, y = pair(offset=500.0)
    moments = moments_of(x, y)
    joint = torch.cat([x, y], dim=1).double()
    assert torch.allclose(moments.mean, joint.mean(dim=0), rtol=1e-9)
    expected = torch.cov(joint.T, correction=0)
    assert (moments.covariance - expected).abs().max() < 1e-5 * expected.diagonal().max()
    assert torch.allclose(moments.cross, moments.covariance[D:, :D])
    again = Moments.restore(moments.state())
    assert torch.equal(again.covariance, moments.covariance) and again.n_tokens == 4000


def test_affine_is_least_squares_both_ways() -> None:
    x, y = pair()
    m = affine(moments_of(x, y), ridge=0.0)
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    for source, target, A, c in ((x, y, m.A, m.c), (y, x, m.B, m.b)):
        solution = torch.linalg.lstsq(torch.cat([source.double(), ones], dim=1), target.double()).solution
        assert torch.allclose(A, solution[:-1].T, atol=1e-5) and torch.allclose(c, solution[-1], atol=1e-4)


def test_ridge_shrinks_the_map() -> None:
    moments = moments_of(*pair())
    assert affine(moments, ridge=1.0).A.norm() < affine(moments).A.norm()


def test_regression_stays_on_the_device_of_its_moments() -> None:
    """The meta device, like CUDA, refuses operands from the CPU; a hop on a GPU crashed here."""
    m = moments_of(*pair())
    elsewhere = Moments(m.n_source, m.n_tokens, m.shift.to("meta"), m.total.to("meta"), m.products.to("meta"))
    assert affine(elsewhere).A.device.type == "meta"


def test_rescale_matches_mean_and_size_and_inverts() -> None:
    x, y = pair()
    m = rescale(moments_of(x, y))
    mapped = x.double() @ m.A.T + m.c
    assert torch.allclose(mapped.mean(dim=0), y.double().mean(dim=0), atol=1e-4)
    assert torch.allclose(mapped.var(dim=0).sum(), y.double().var(dim=0).sum(), rtol=1e-4)
    assert torch.allclose(mapped @ m.B.T + m.b, x.double(), atol=1e-6)


def test_procrustes_recovers_a_rotation_and_beats_any_other() -> None:
    g = torch.Generator().manual_seed(3)
    Q = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64)).Q
    x = torch.randn(3000, D, generator=g)
    m = procrustes(moments_of(x, (2.5 * x.double() @ Q.T + 1).float()))
    assert torch.allclose(m.A, 2.5 * Q, atol=1e-5) and torch.allclose(m.A @ m.B, torch.eye(D).double(), atol=1e-9)
    x, y = pair()
    m = procrustes(moments_of(x, y))
    best = (y.double() - x.double() @ m.A.T - m.c).square().sum()
    for _ in range(20):
        turn = torch.matrix_exp(0.05 * (S := torch.randn(D, D, generator=g, dtype=torch.float64)) - 0.05 * S.T)
        A = m.A @ turn
        c = y.double().mean(dim=0) - A @ x.double().mean(dim=0)
        assert (y.double() - x.double() @ A.T - c).square().sum() >= best


def test_procrustes_onto_fewer_dimensions_keeps_the_scale() -> None:
    x = pair()[0]
    turned = x @ torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3))).Q
    narrower = turned[:, : D // 2]
    m = procrustes(moments_of(x, narrower))
    best = (narrower.double() - x.double() @ m.A.T - m.c).square().sum()
    for factor in (0.95, 1.05):
        A = factor * m.A
        c = narrower.double().mean(dim=0) - A @ x.double().mean(dim=0)
        assert (narrower.double() - x.double() @ A.T - c).square().sum() >= best


def test_methods_fit_better_and_better() -> None:
    x, y = pair()
    moments = moments_of(x, y)
    errors = []
    for method in get_args(Method):
        m = map_between(method, D, moments)
        errors.append(float((y.double() - x.double() @ m.A.T - m.c).square().mean()))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_fold_is_exact_under_an_invertible_map(architecture: str, seed: int) -> None:
    """decode'(encode'(A x + c)) = A decode(encode(x)) + c, with random invertible A and B = A⁻¹."""
    g = torch.Generator().manual_seed(seed)
    A = torch.eye(D).double() + 0.3 * torch.randn(D, D, generator=g, dtype=torch.float64)
    c = torch.randn(D, generator=g, dtype=torch.float64)
    B_ = torch.linalg.inv(A)
    d, x = random_dictionary(architecture, seed), activations(seed + 1)
    hopped = fold(d, AffineMap(A, c, B_, -B_ @ c))
    scale = 1 + float(torch.linalg.cond(A)) * x.abs().max()
    assert torch.allclose(hopped(x @ A.T + c), d(x) @ A.T + c, atol=1e-9 * float(scale))
    assert torch.allclose(hopped.W_dec.norm(dim=1), torch.ones(F).double())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fold_is_the_formula_of_the_design(architecture: str) -> None:
    d = random_dictionary(architecture)
    g = torch.Generator().manual_seed(1)
    m = AffineMap(*(torch.randn(*s, generator=g, dtype=torch.float64) for s in ((D, D), (D,), (D, D), (D,))))
    n = torch.stack([(m.A @ w).norm() for w in d.W_dec])
    f = fold(d, m)
    assert torch.allclose(f.W_dec, torch.stack([m.A @ w for w in d.W_dec]) / n[:, None])
    assert torch.allclose(f.b_dec, m.A @ d.b_dec + m.c)
    assert torch.allclose(f.W_enc, n[:, None] * (d.W_enc @ m.B))
    assert torch.allclose(f.b_enc, n * (d.b_enc + d.W_enc @ m.b))
    if d.threshold is not None and f.threshold is not None:
        assert torch.allclose(f.threshold, n * d.threshold)


def test_identity_on_unit_rows_changes_nothing() -> None:
    d = random_dictionary("topk")
    d.W_dec.div_(d.W_dec.norm(dim=1, keepdim=True))
    f = fold(d, identity(D))
    for name, tensor in d.tensors().items():
        assert torch.allclose(f.tensors()[name], tensor, atol=1e-14), name


def test_fold_refuses_another_width() -> None:
    with pytest.raises(TransferError, match="reads activations of width 10, but the map starts from width 7"):
        fold(random_dictionary("topk"), identity(7))
    wider = replace(random_dictionary("topk"), W_dec=torch.zeros(F, 12), b_dec=torch.zeros(12))
    with pytest.raises(TransferError, match="reconstructs activations of width 12, but the map of these starts from"):
        fold(wider, identity(D))


def test_a_map_needs_enough_tokens() -> None:
    x, y = pair(n=15)
    with pytest.raises(TransferError, match="fits a 10-dimensional map on 15 tokens; give more than 20 rows"):
        map_between("affine", D, moments_of(x, y))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("direct", [True, False])
def test_refit_is_the_ridge_solution(architecture: str, direct: bool) -> None:
    """Against the normal equations, solved densely with the bias as one more column."""
    d, x = random_dictionary(architecture), activations()
    z = d.encode(x)
    squares = z.square().sum(dim=0)
    damping = 0.05 * (squares + squares.mean())
    design = torch.cat([z, torch.ones(B, 1, dtype=torch.float64)], dim=1)
    penalty = torch.cat([damping, torch.zeros(1, dtype=torch.float64)]).diag()
    change = torch.linalg.solve(design.T @ design + penalty, design.T @ (x - d(x)))
    W, b = d.W_dec + change[:-1], d.b_dec + change[-1]
    solved = refit(d, x.split(17), ridge=0.05, direct=direct, tolerance=1e-12, max_iterations=2000)
    norms = W.norm(dim=1)
    assert torch.allclose(solved.W_dec * norms[:, None], W, atol=1e-8)
    assert torch.allclose(solved.b_dec, b, atol=1e-7)
    assert torch.allclose(solved.W_enc, d.W_enc * norms[:, None], atol=1e-8)


def test_refit_lowers_the_error_of_its_own_codes_and_leaves_silent_latents() -> None:
    d, x = random_dictionary("relu"), activations()
    d.b_enc[5] = -1e6
    solved = refit(d, [x])
    assert (x - solved(x)).square().sum() < (x - d(x)).square().sum()
    assert torch.allclose(solved.W_dec[5], d.W_dec[5] / d.W_dec[5].norm())


def test_refit_of_nothing_is_the_dictionary() -> None:
    d = random_dictionary("topk")
    assert torch.equal(refit(d, []).W_dec, d.W_dec)
    assert torch.equal(refit(d, [activations()[:0]]).W_dec, d.W_dec)


def test_refit_leaves_a_silent_dictionary_and_refuses_infinities() -> None:
    d, x = random_dictionary("relu"), activations()
    silent = replace(d, b_enc=d.b_enc - 1e6)
    norms = d.W_dec.norm(dim=1, keepdim=True)
    assert torch.allclose(refit(silent, [x]).W_dec * norms, d.W_dec)
    with pytest.raises(TransferError, match="not all finite"):
        refit(d, [torch.full_like(x, torch.inf)])


def test_conjugate_gradients_solve() -> None:
    g = torch.Generator().manual_seed(0)
    root = torch.randn(30, 30, generator=g, dtype=torch.float64)
    M, goal = root @ root.T + torch.eye(30).double(), torch.randn(30, 4, generator=g, dtype=torch.float64)
    X = conjugate_gradients(lambda P: M @ P, goal, M.diagonal(), 1e-12, 500)
    assert torch.allclose(M @ X, goal, atol=1e-8)


def test_join_of_codes_from_batches_is_the_codes_of_all() -> None:
    d, x = random_dictionary("topk"), activations()
    parts: list[Codes] = [encode_sparse(d, part) for part in x.split(9)]
    joined, whole = join_codes(parts), encode_sparse(d, x)
    assert torch.equal(joined.row_starts, whole.row_starts) and torch.equal(joined.columns, whole.columns)


def test_unexplained_is_one_minus_r_squared_of_the_map() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, D, generator=g, dtype=torch.float64)
    y = x @ torch.randn(D, D, generator=g, dtype=torch.float64) + 2 * torch.randn(4000, D, generator=g) + 5
    moments = moments_of(x, y)
    m = affine(moments)
    left = (y - x @ m.A.T - m.c).square().sum() / (y - y.mean(dim=0)).square().sum()
    assert unexplained(moments, balance=0) == pytest.approx(float(left), rel=1e-4)
    assert unexplained(moments_of(x, 3 * x + 1)) == pytest.approx(0, abs=1e-4)


def test_the_rate_after_a_hop_follows_what_is_left_and_how_much_time_there_is() -> None:
    long = 10**6
    assert rate_share(0.2, long) == rate_share(0.2, ENOUGH_TOKENS) == pytest.approx(0.55)
    assert rate_share(0.2, ENOUGH_TOKENS // 4) == pytest.approx(0.275)
    assert rate_share(0.9, long) == 1 and rate_share(0.001, long) == rate_share(0.2, 0) == 0.03
    assert rate_share(0.001, long, newness=0.2) == pytest.approx(0.15)
    assert rate_share(0.001, 1000, newness=0.2) == pytest.approx(0.15), "an unfinished parent needs its rate"
    assert rate_share(0.2, long, newness=0.01) == rate_share(0.2, long)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_revived_latents_fire_and_others_stay(architecture: str) -> None:
    d = random_dictionary(architecture)
    x = torch.randn(2000, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    d.b_enc[[3, 8, 20]] = -1e6
    again = revive(d, x)
    others = torch.ones(F, dtype=torch.bool)
    others[(d.encode(x) > 0).sum(dim=0) == 0] = False
    assert not others[[3, 8, 20]].any()
    assert ((again.encode(x) > 0).sum(dim=0)[~others] > 0).all()
    assert torch.equal(again.W_enc[others], d.W_enc[others]) and torch.equal(again.W_dec[others], d.W_dec[others])
    assert torch.allclose(again.W_dec[~others].norm(dim=1), torch.ones(1, dtype=torch.float64))
    assert torch.equal(revive(d, x).W_enc, again.W_enc) and not torch.equal(revive(d, x, 1).W_enc, again.W_enc)


@pytest.mark.parametrize("of_dictionary", [torch.float32, torch.float64, torch.bfloat16])
def test_latents_are_revived_on_half_precision(of_dictionary: torch.dtype) -> None:
    d = random_dictionary("relu")
    silent = replace(d, b_enc=d.b_enc.index_fill(0, torch.tensor([3, 8]), -1e6)).to(of_dictionary)
    x = activations().bfloat16()
    revived = revive(silent, x)
    assert revived.W_enc.dtype == of_dictionary
    assert bool((revived.encode(x)[:, [3, 8]] > 0).any(dim=0).all())


def test_a_skip_connection_is_refitted_as_well_on_half_precision() -> None:
    x = (activations() - 7).bfloat16()
    d = replace(random_dictionary("relu").to(torch.float32), W_skip=torch.zeros(D, D))
    in_half, in_float = (refit_skip(d, rows, rows.float()) for rows in (x, x.float()))
    assert in_half.W_skip is not None and in_float.W_skip is not None
    assert torch.allclose(in_half.W_skip, in_float.W_skip, atol=1e-6)


def test_nothing_is_revived_where_nothing_is_silent() -> None:
    x = torch.randn(20_000, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    d = Dictionary(
        architecture="relu",
        W_enc=torch.eye(D).double(),
        b_enc=torch.zeros(D).double(),
        W_dec=torch.eye(D).double(),
        b_dec=torch.zeros(D).double(),
    )
    assert revive(d, x) is d


def normal(n: int) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pruning_keeps_what_explains_most_in_its_order(architecture: str) -> None:
    d, x = random_dictionary(architecture), 3 * normal(2000)
    parts = d.encode(x).square().sum(dim=0) * d.W_dec.square().sum(dim=1)
    kept = parts.argsort(descending=True)[: F // 2].sort().values
    smaller = reshape(d, x, Shape(d.architecture, F // 2, None))
    for name in ("W_enc", "b_enc", "W_dec"):
        assert torch.equal(getattr(smaller, name), getattr(d, name)[kept])
    assert torch.equal(smaller.b_dec, d.b_dec)
    if d.threshold is not None:
        assert smaller.threshold is not None and torch.equal(smaller.threshold, d.threshold[kept])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_growth_leaves_the_old_latents_and_wakes_the_new(architecture: str) -> None:
    d, x = random_dictionary(architecture), 3 * normal(20_000)
    d.b_enc[5] = -1e6  # an old latent that is silent stays as well
    larger = reshape(d, x, Shape(d.architecture, F + 8, d.k, seed=3))
    for name, tensor in d.tensors().items():
        if name not in ("b_dec", "threshold"):
            assert torch.equal(getattr(larger, name)[:F], tensor), name
    assert larger.n_latents == F + 8 and int((larger.encode(x) > 0).any(dim=0)[F:].sum()) >= 7
    assert (larger(x) - x).square().sum() < 1.2 * (d(x) - x).square().sum()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_decoder_is_refitted_on_codes_of_the_l0_asked_for(architecture: str) -> None:
    d, (x, y) = random_dictionary(architecture), pair()
    x, y = x.double(), y.double()
    between = procrustes(moments_of(x, y))
    units = Units.fitted_to(y)
    on = Retraining(y, seed=0)
    together = carry(d, between, y, units, l0=3.0, retraining=on).dictionary
    matched = carry(d, between, y, units, l0=3.0).dictionary
    expected = carry(matched, None, y, units, l0=3.0, retraining=on).dictionary
    assert fvu(together, y) == pytest.approx(fvu(expected, y), rel=1e-3)


@pytest.mark.parametrize("source", ARCHITECTURES)
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_another_architecture_is_as_sparse_as_asked_and_keeps_the_weights(source: str, target: str) -> None:
    d, x = random_dictionary(source), 3 * normal(4000)
    other = reshape(d, x, Shape(target, F, 3.0))
    assert (other.architecture, other.k) == (target, 3 if target in ("topk", "batchtopk") else None)
    assert float((other.encode(x) > 0).sum(dim=1).float().mean()) == pytest.approx(3, abs=0.05)
    assert torch.equal(other.W_enc, d.W_enc) and torch.equal(other.W_dec, d.W_dec)
    if (source, target) == ("jumprelu", "jumprelu"):
        assert d.threshold is not None and other.threshold is not None
        ratio = other.threshold / d.threshold
        assert torch.allclose(ratio, ratio[0])  # thresholds keep their proportions
