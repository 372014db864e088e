"""Affine maps between the activations of two sites, fitted on their moments in closed form.

`map_between` fits one by the name of its method; `transfer.fold` multiplies it into a dictionary. `unexplained` and
`rate_share` say how fast to train afterwards. Shapes: S source width, T target width.
"""

import math
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from saerelay.errors import TransferError
from saerelay.sae.moments import Moments
from saerelay.sae.spec import Method
from saerelay.sae.units import Balance, balance_factors

ENOUGH_TOKENS = 250_000
"""Below this many training tokens the learning rate after a hop falls; the rate from scratch is at its upper bound."""
RIDGE = 1e-3
"""Ridge of the affine maps, relative to the mean variance of the activations that they map from."""
LEAST_RATE_SHARE = 0.03
"""Learning rate after a hop whose map leaves nothing unexplained, as a share of the rate from scratch."""


@dataclass(frozen=True, eq=False)
class AffineMap:
    """Two maps between source and target activations, fitted separately: x_t ≈ A x_s + c and x_s ≈ B x_t + b."""

    A: Tensor
    """(T, S)."""
    c: Tensor
    """(T)."""
    B: Tensor
    """(S, T)."""
    b: Tensor
    """(S)."""

    def reversed(self) -> "AffineMap":
        """The same maps with source and target exchanged."""
        return AffineMap(self.B, self.b, self.A, self.c)

    def rescaled(self, source: Tensor, target: Tensor) -> "AffineMap":
        """The map of raw activations, where this one maps activations divided by factors (S) and (T)."""
        return AffineMap(
            A=target[:, None] * self.A / source,
            c=target * self.c,
            B=source[:, None] * self.B / target,
            b=source * self.b,
        )


@dataclass(frozen=True, eq=False)
class PairedMoments:
    """The moments that a transcoder's two maps are fitted on: of its inputs, and of the activations it reconstructs."""

    inputs: Moments
    outputs: Moments

    @property
    def keeps_width(self) -> bool:
        """Whether inputs and outputs are as wide at the target as at the source."""
        return self.inputs.keeps_width and self.outputs.keeps_width


AnyMoments = Moments | PairedMoments


def crossed(inputs: AffineMap, outputs: AffineMap) -> AffineMap:
    """The map that a transcoder is folded through: B and b from the map of inputs, A and c from the map of outputs."""
    return AffineMap(outputs.A, outputs.c, inputs.B, inputs.b)


def identity(width: int) -> AffineMap:
    """The plain copy of Ghilardi et al. 2024: A = B = I, c = b = 0."""
    eye = torch.eye(width, dtype=torch.float64)
    zeros = torch.zeros(width, dtype=torch.float64)
    return AffineMap(eye, zeros, eye, zeros)


def rescale(moments: Moments) -> AffineMap:
    """Match mean and size: A = r·I with r the ratio of centred RMS norms, c = m_t − r·m_s, and the exact inverse."""
    r = (moments.cov_target.trace() / moments.cov_source.trace()).sqrt()
    eye = torch.eye(moments.n_source, dtype=torch.float64, device=r.device)
    return _through_means(moments, r * eye, eye / r)


def procrustes(moments: Moments) -> AffineMap:
    """Best rotation times scale between centred activations (Schönemann 1966), and its pseudo-inverse.

    A = r·Q with UΣVᵀ the SVD of the cross-covariance (T, S), Q = UVᵀ and r = tr Σ / tr (Q cov_s Qᵀ): onto at least as
    many dimensions Q keeps all variance, so the divisor is tr cov_s.
    """
    U, sigma, Vt = torch.linalg.svd(moments.cross, full_matrices=False)
    Q = U @ Vt
    variance = moments.cov_source.trace()
    if len(Q) < moments.n_source:
        variance = ((Q @ moments.cov_source) * Q).sum()
    r = sigma.sum() / variance
    return _through_means(moments, r * Q, Q.T / r)


def affine(moments: Moments, ridge: float = RIDGE) -> AffineMap:
    """Ridge regression each way; B is fitted by itself, never as the inverse of an ill-conditioned A.

    A = C_ts (C_ss + λI)⁻¹ with λ = `ridge` × mean variance of the source; B is the same with the roles exchanged.
    """
    A = regress(moments.cov_source, moments.cross.T, ridge).T
    B = regress(moments.cov_target, moments.cross, ridge).T
    return _through_means(moments, A, B)


def unexplained(moments: AnyMoments, balance: Balance = "auto") -> float:
    """Share of the target's variance that the affine map leaves unexplained: 1 − R², from 0 to 1, balanced.

    For a transcoder, the larger share of its two maps.
    """
    if isinstance(moments, PairedMoments):
        return max(unexplained(moments.inputs, balance), unexplained(moments.outputs, balance))
    moments = moments.scaled(*_balance_factors(moments, balance))
    A = regress(moments.cov_source, moments.cross.T, RIDGE).T
    variance = moments.cov_target.trace()
    residual = variance - 2 * (A * moments.cross).sum() + ((A @ moments.cov_source) * A).sum()
    return float((residual / variance).clamp(0, 1))


def rate_share(left: float, tokens: int, newness: float = 0.0) -> float:
    """Learning rate after a hop, as a share of the rate from scratch: the less the map leaves, the less is to learn.

    >>> [round(rate_share(0.1, tokens), 3) for tokens in (1_000_000, 90_000, 40_000)]
    [0.275, 0.165, 0.11]

    The share is 2.75·`left`, where `left` is the share of variance that the map leaves unexplained. Below ENOUGH_TOKENS
    it falls with the square root of `tokens`, since large steps would leave more noise than there is time to smooth.
    Where 0.75·`newness` is larger, it counts instead: `newness` is the number of the dictionary's own training tokens
    as a share of all tokens it will have been trained on, its parents' included, and a parent that is far from finished
    leaves much to learn as well. The result is at least LEAST_RATE_SHARE and at most 1 (decisions 019, 029 and 034).
    The sweeps had `left` from 0.03 to 0.34.
    """
    short = math.sqrt(min(1.0, tokens / ENOUGH_TOKENS))
    return min(1.0, max(2.75 * left * short, 0.75 * newness, LEAST_RATE_SHARE))


def regress(cov: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """(cov + λI)⁻¹ cross with λ = `ridge` × mean variance; cov (S, S), cross (S, T)."""
    damped = cov.clone()
    damped.diagonal().add_(ridge * cov.diagonal().mean())
    return torch.cholesky_solve(cross, torch.linalg.cholesky(damped))


def _through_means(moments: Moments, A: Tensor, B: Tensor) -> AffineMap:
    """The maps with linear parts A and B, whose offsets take the mean of one site to the mean of the other."""
    m_s = moments.mean_source
    m_t = moments.mean_target
    return AffineMap(A, m_t - A @ m_s, B, m_s - B @ m_t)


def _balance_factors(moments: Moments, balance: Balance) -> tuple[Tensor, Tensor]:
    """The divisors (S) and (T) that balance the dimensions of the two sites, each by its own deviations."""
    source = balance_factors(moments.cov_source.diagonal(), balance)
    target = balance_factors(moments.cov_target.diagonal(), balance)
    return source, target


def map_between(method: Method, width: int, moments: AnyMoments | None, balance: Balance = "auto") -> AffineMap:
    """Fit a method's map between raw activations; all methods but identity (of the given `width`) need moments.

    The fit is made on dimensions balanced by the power `balance` (see `Units`), so that a few large dimensions do not
    dominate. Raises TransferError if the two widths differ and the method cannot bridge them, if the moments are of too
    few tokens, or if they are not finite. For paired moments the two maps are crossed.
    """
    if isinstance(moments, PairedMoments):
        inputs = map_between(method, moments.inputs.n_source, moments.inputs, balance)
        return crossed(inputs, map_between(method, moments.outputs.n_source, moments.outputs, balance))
    if moments and method in ("identity", "rescale") and not moments.keeps_width:
        raise TransferError(
            f"method {method} needs a source and a target of the same width, but their widths are {moments.n_source} "
            f"and {moments.n_target}; use method affine"
        )
    if method == "identity":
        return identity(width)
    n_tokens = 0
    if moments:
        n_tokens = moments.n_tokens
        width = max(moments.n_source, moments.n_target)
    if moments is None or n_tokens <= 2 * width:
        raise TransferError(
            f"method {method} fits a {width}-dimensional map on {n_tokens} tokens; give more than {2 * width} rows "
            "(in a recipe: plan.moment_tokens)"
        )
    if not bool(torch.isfinite(moments.products).all()):
        raise TransferError(
            f"method {method}: the activations to which the map is fitted are not all finite; run the model in float32 "
            "or bfloat16, not float16"
        )
    source, target = _balance_factors(moments, balance)
    in_balance = moments.scaled(source, target)
    match method:
        case "rescale":
            between = rescale(in_balance)
        case "procrustes":
            between = procrustes(in_balance)
        case "affine":
            between = affine(in_balance)
        case unreachable:
            assert_never(unreachable)
    return between.rescaled(source, target)
