"""Transfer of a dictionary between sites by closed form: affine maps, `fold`, and the decoder refit.

Works on plain tensors; no language model is needed:

>>> import torch
>>> from saerelay.sae.dictionary import Dictionary
>>> from saerelay.sae.moments import Moments
>>> x_source = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
>>> x_target = 2 * x_source + 1
>>> moments = Moments.empty(8, 8)
>>> moments.add(x_source, x_target)
>>> sae = Dictionary(architecture="relu", W_enc=torch.eye(8), b_enc=torch.zeros(8), W_dec=torch.eye(8),
...                  b_dec=torch.zeros(8))
>>> hopped = fold(sae, affine(moments))
>>> bool((hopped(x_target) - (2 * sae(x_source) + 1)).abs().max() < 0.05)
True

Shapes: S source width, T target width, F latents, K active ones, B tokens.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import assert_never

import torch
from torch import Tensor

from saerelay.errors import TransferError
from saerelay.sae.dictionary import Dictionary, match_l0, unit_decoder
from saerelay.sae.architectures.architecture import with_common_threshold
from saerelay.sae.kernels import join_codes, products, reconstruct
from saerelay.sae.moments import Moments
from saerelay.sae.architectures import Architecture
from saerelay.sae.spec import Method

__all__ = ["AffineMap", "affine", "fold", "identity", "map_between", "procrustes", "rate_share", "refit",
           "rescale", "reshape", "revive", "unexplained"]  # fmt: skip

DIRECT_LATENTS = 16_384
"""Refits of no more latents factor their normal equations (1 GiB); larger ones iterate."""
LEAST_RATE_SHARE = 0.03
"""Learning rate after a hop that left nothing to explain, as a share of the rate from scratch."""
SAMPLE_ROWS = 8_192
"""Tokens on which revived latents are set to fire as often as they should."""
GROWN_OFTEN = 0.1
"""How often latents that are added to a dictionary fire at first, against the mean latent: at a third they displace too
much (docs/log.md)."""
RIDGE = 1e-3
"""Ridge of the affine maps, relative to the mean variance of the activations mapped from."""


@dataclass(frozen=True, eq=False)
class AffineMap:
    """Two maps between the activations of a source and a target, fitted apart: x_t ≈ A x_s + c and x_s ≈ B x_t + b."""

    A: Tensor
    """(T, S)."""
    c: Tensor
    """(T)."""
    B: Tensor
    """(S, T)."""
    b: Tensor
    """(S)."""

    def reversed(self) -> "AffineMap":
        """The same, from the target to the source."""
        return AffineMap(self.B, self.b, self.A, self.c)


def identity(width: int) -> AffineMap:
    """The plain copy of Ghilardi et al. 2024: A = B = I, c = b = 0."""
    eye, zeros = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    return AffineMap(eye, zeros, eye, zeros)


def rescale(moments: Moments) -> AffineMap:
    """Match mean and size: A = r·I with r the ratio of centred RMS norms, c = m_t − r·m_s, and the exact inverse."""
    r = (moments.cov_target.trace() / moments.cov_source.trace()).sqrt()
    eye = torch.eye(moments.n_source, dtype=torch.float64)
    return _through_means(moments, r * eye, eye / r)


def procrustes(moments: Moments) -> AffineMap:
    """Best rotation times scale between centred activations (Schönemann 1966), and its exact inverse.

    A = r·Q with UΣVᵀ the SVD of the cross-covariance (T, S), Q = UVᵀ and r = tr Σ / tr cov_s.
    """
    U, sigma, Vt = torch.linalg.svd(moments.cross, full_matrices=False)
    Q, r = U @ Vt, sigma.sum() / moments.cov_source.trace()
    return _through_means(moments, r * Q, Q.T / r)


def affine(moments: Moments, ridge: float = RIDGE) -> AffineMap:
    """Ridge regression each way; B is fitted for itself, never the inverse of an ill-conditioned A.

    A = C_ts (C_ss + λI)⁻¹ with λ = `ridge` × mean variance of the source; B likewise with the roles exchanged.
    """
    A = _regress(moments.cov_source, moments.cross.T, ridge).T
    B = _regress(moments.cov_target, moments.cross, ridge).T
    return _through_means(moments, A, B)


def unexplained(moments: Moments, ridge: float = RIDGE) -> float:
    """Share of the target's variance that the affine map from the source leaves: 1 − R², 0 to 1."""
    A = _regress(moments.cov_source, moments.cross.T, ridge).T
    left = moments.cov_target.trace() - 2 * (A * moments.cross).sum() + ((A @ moments.cov_source) * A).sum()
    return float((left / moments.cov_target.trace()).clamp(0, 1))


def rate_share(moments: Moments, new: float = 0.0) -> float:
    """Learning rate after a hop, as a share of the rate from scratch: the less the map explains, the more is to learn.

    2.75·(1 − R²), between LEAST_RATE_SHARE and 1; or .75·`new`, if that is more, where `new` is the share of its own
    tokens in all that the dictionary will have been trained on, its parents' included: a parent that is far from
    finished leaves much to learn, too. From the sweeps in docs/log.md, where 1 − R² went from .03 to .17.
    """
    return min(max(2.75 * unexplained(moments), 0.75 * new, LEAST_RATE_SHARE), 1.0)


def _regress(cov: Tensor, cross: Tensor, ridge: float) -> Tensor:
    damped = cov.clone()
    damped.diagonal().add_(ridge * cov.diagonal().mean())
    return torch.cholesky_solve(cross, torch.linalg.cholesky(damped))


def _through_means(moments: Moments, A: Tensor, B: Tensor) -> AffineMap:
    m_s, m_t = moments.mean_source, moments.mean_target
    return AffineMap(A, m_t - A @ m_s, B, m_s - B @ m_t)


def map_between(method: Method, width: int, moments: Moments | None) -> AffineMap:
    """The map of a method; all but identity need moments."""
    if moments and method in ("identity", "rescale") and moments.n_source != len(moments.mean_target):
        raise TransferError(
            f"method {method} needs a source and a target of the same width, these are {moments.n_source} and "
            f"{len(moments.mean_target)} wide; use affine"
        )
    if method == "identity":
        return identity(width)
    if moments is None or moments.n_tokens <= 2 * width:
        seen = 0 if moments is None else moments.n_tokens
        raise TransferError(
            f"method {method} fits a {width}-dimensional map on {seen} tokens; "
            f"raise plan.moment_tokens over {2 * width}"
        )
    if not bool(torch.isfinite(moments.products).all()):
        raise TransferError(f"method {method}: the activations it was to be fitted on are not all finite")
    match method:
        case "rescale":
            return rescale(moments)
        case "procrustes":
            return procrustes(moments)
        case "affine":
            return affine(moments)
        case unreachable:
            assert_never(unreachable)


def fold(dictionary: Dictionary, between: AffineMap) -> Dictionary:
    """Carry a canonical dictionary of the source's activations to the target's.

    With n_j = ‖A w_j‖ for decoder row w_j: W_dec' = (W_dec Aᵀ)/n, b_dec' = A b_dec + c, W_enc' = n∘(W_enc B),
    b_enc' = n∘(b_enc + W_enc b), θ' = n∘θ. Exact for ReLU and JumpReLU under an invertible map with B = A⁻¹; TopK
    re-ranks its latents by n; BatchTopK's one threshold has to be calibrated again (`calibrate_threshold`).
    """
    d, m = dictionary, between
    if d.d_model != m.A.shape[1]:
        raise TransferError(
            f"the dictionary reads activations of width {d.d_model}, the map starts from width {m.A.shape[1]}; "
            "a transfer needs a source and a target of the same width"
        )
    W_enc, W_dec = d.W_enc.double(), d.W_dec.double()
    A, B, c, b = (t.to(W_enc) for t in (m.A, m.B, m.c, m.b))
    carried = replace(
        d,
        W_enc=W_enc @ B,
        b_enc=d.b_enc.double() + W_enc @ b,
        W_dec=W_dec @ A.T,
        b_dec=A @ d.b_dec.double() + c,
        threshold=None if d.threshold is None else d.threshold.double(),
    )
    return unit_decoder(carried).to(d.W_enc.dtype)


@torch.no_grad()
def revive(dictionary: Dictionary, x: Tensor, seed: int = 0, often: float = 1 / 3) -> Dictionary:
    """Give latents that are silent on activations x (B, D) something of x to stand for; others stay as they are.

    Silent is what fires on less than one token in 16,384. Each takes up the residual r of a token drawn with
    probability ∝ ‖r‖², like Bricken et al. 2023, but its encoder is the matched filter for r in what x is otherwise,
    C⁻¹r / rᵀC⁻¹r with C the covariance of x (Capon 1969), and its bias lets it fire about `often` times as often as the
    mean latent. The decoder is best refitted after this.
    """
    d, few = dictionary, x[:SAMPLE_ROWS]
    counts, residuals = torch.zeros_like(d.b_enc), []
    for part in x.split(4096):
        codes, x_hat = reconstruct(d, part)
        counts += torch.bincount(codes.columns[codes.values > 0].long(), minlength=d.n_latents)
        residuals.append(part - x_hat)
    silent = (counts * 16_384 < len(x)).nonzero()[:, 0]
    if not len(silent):
        return d
    residual = torch.cat(residuals)
    chances = residual.square().sum(dim=1).double().cpu()
    if not bool(chances.sum() > 0) or not bool(torch.isfinite(chances).all()):
        return d
    drawn = torch.multinomial(chances, len(silent), replacement=True, generator=torch.Generator().manual_seed(seed))
    directions = torch.nn.functional.normalize(residual[drawn.to(x.device)], dim=1)
    mean = x.mean(dim=0)
    cov = (x - mean).T.double() @ (x - mean).double() / len(x)
    filters = _regress(cov, directions.T.double(), RIDGE).T
    filters = (filters / (filters * directions).sum(dim=1, keepdim=True)).to(x)
    n_firing = max(1, round(often * float(counts.sum()) / len(x) / d.n_latents * len(few)))
    passed = torch.cat(
        [((few - mean) @ part.T).topk(n_firing, dim=0).values[-1] for part in filters.split(1024)]
    )  # what each filter gives on the `n_firing`-th of the tokens it answers to most
    if d.architecture == "topk":
        assert d.k is not None
        bar = torch.cat([d.pre_activations(part).topk(d.k, dim=1).values[:, -1] for part in few.split(1024)]).mean()
    else:
        bar = torch.zeros(()).to(x) if d.threshold is None else d.threshold[silent]
    return replace(
        d,
        W_enc=d.W_enc.index_copy(0, silent, filters),
        b_enc=d.b_enc.index_copy(0, silent, bar - passed - filters @ mean),
        W_dec=d.W_dec.index_copy(0, silent, directions),
    )


@torch.no_grad()
def reshape(
    dictionary: Dictionary, x: Tensor, architecture: Architecture, n_latents: int, l0: float | None, seed: int = 0
) -> Dictionary:
    """Give a dictionary another architecture, number of latents, or mean number of active ones on activations x (B, D).

    With fewer latents those stay, in their order, that put most into reconstructions, by Σ z²‖w‖²; new ones are added
    behind the others and revived (see `revive`). Other weights stay; `l0` sets k, thresholds or (ReLU) biases, and may
    be None where none of these are new.

    >>> sae = Dictionary(architecture="topk", k=1, W_enc=torch.eye(4), b_enc=torch.zeros(4), W_dec=torch.eye(4),
    ...                  b_dec=torch.zeros(4))
    >>> x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 2.0, 0.1])
    >>> smaller = reshape(sae, x, "jumprelu", 2, 0.5)
    >>> smaller.W_dec.argmax(dim=1).tolist(), float((smaller.encode(x) > 0).sum(dim=1).float().mean())
    ([1, 2], 0.5)
    """
    d, F = dictionary, dictionary.n_latents
    if n_latents < F:
        parts = torch.zeros_like(d.b_enc)
        for part in x.split(4096):
            codes = reconstruct(d, part)[0]
            parts.index_add_(0, codes.columns.long(), codes.values.square())
        best = (parts * d.W_dec.square().sum(dim=1)).topk(n_latents).indices.sort().values
        d = replace(d, **{name: t if name == "b_dec" else t[best] for name, t in d.tensors().items()})
    few, threshold = x[:SAMPLE_ROWS], d.threshold if architecture in ("jumprelu", "batchtopk") else None
    k = (max(1, round(l0)) if l0 else d.k) if architecture in ("topk", "batchtopk") else None
    d = replace(d, architecture=architecture, k=k, threshold=threshold)
    if l0:
        d = (
            calibrate_threshold(d, few, l0)
            if architecture == "jumprelu" and threshold is None
            else match_l0(d, few, l0)
        )
    if n_latents > F:
        new = {name: t.new_zeros(n_latents - F, *t.shape[1:]) for name, t in d.tensors().items() if name != "b_dec"}
        if d.threshold is not None:
            new["threshold"] += d.threshold.median()
        d = revive(
            replace(d, **{name: torch.cat([getattr(d, name), rows]) for name, rows in new.items()}),
            x,
            seed,
            GROWN_OFTEN,
        )
        d = match_l0(d, few, l0) if l0 else d
    return d


@torch.no_grad()
def refit(
    dictionary: Dictionary,
    x: Iterable[Tensor],
    ridge: float = 0.1,
    *,
    direct: bool | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 200,
) -> Dictionary:
    """Refit a dictionary's decoder on activations x, batches (B, D), by ridge towards the decoder it has.

    Minimises Σ‖x − b_dec − W_decᵀ z‖² + λ Σ_j g_j ‖w_j − w_j⁰‖² over W_dec and b_dec, with codes z fixed, g_j = Σ z_j²
    plus its mean (so that a rare latent moves little and one that never fires not at all) and λ = `ridge`. Codes are
    kept, sparse; activations are not. `direct` factors the (F, F) matrix, the default up to 16384 latents; above,
    conjugate gradients never form it. Rows of the new decoder have unit norm: their norms go into the encoder.

    >>> sae = Dictionary(architecture="relu", W_enc=torch.eye(2), b_enc=torch.zeros(2), W_dec=torch.eye(2),
    ...                  b_dec=torch.zeros(2))
    >>> x = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0))
    >>> better = refit(sae, [3 * x, 3 * x + 1])
    >>> bool((better(3 * x) - 3 * x).norm() < 1e-3 * x.norm())
    True

    Raises TransferError if activations are not finite.
    """
    d, kept = dictionary, []
    ops = products(d.W_dec.device)
    target, residual_sum = torch.zeros_like(d.W_dec), torch.zeros_like(d.b_dec)
    for batch in x:
        codes, x_hat = reconstruct(d, batch)
        residual = batch - x_hat
        target += ops.decode(codes.transposed()[0], residual)
        residual_sum += residual.sum(dim=0)
        kept.append(codes)
    if not kept:
        return d
    if not bool(torch.isfinite(residual_sum).all()):
        raise TransferError("the decoder refit met activations that are not finite")
    codes = join_codes(kept)
    n = codes.n_rows
    squares = torch.zeros_like(d.b_enc).index_add_(0, codes.columns, codes.values.square())
    mean = torch.zeros_like(d.b_enc).index_add_(0, codes.columns, codes.values) / n
    damping = (ridge * (squares + squares.mean())).clamp(min=1e-12)
    goal = target - torch.outer(mean, residual_sum)

    def normal(W: Tensor) -> Tensor:
        """(ZᵀZ − n·mean·meanᵀ + damping) W: the bias is eliminated."""
        product = ops.decode(codes.transposed()[0], ops.decode(codes, W))
        return product + damping[:, None] * W - n * torch.outer(mean, mean @ W)

    if d.n_latents <= DIRECT_LATENTS if direct is None else direct:
        matrix = codes.gram().addr_(mean, mean, alpha=-n)
        matrix.diagonal().add_(damping)
        change = torch.cholesky_solve(goal, torch.linalg.cholesky(matrix))
    else:
        diagonal = (squares - n * mean.square() + damping).clamp(min=1e-12)
        change = conjugate_gradients(normal, goal, diagonal, tolerance, max_iterations)
    return unit_decoder(replace(d, W_dec=d.W_dec + change, b_dec=d.b_dec + residual_sum / n - mean @ change))


def conjugate_gradients(
    normal: Callable[[Tensor], Tensor], goal: Tensor, diagonal: Tensor, tolerance: float, max_iterations: int
) -> Tensor:
    """Solve normal(X) = goal for X (F, D), column by column side by side, preconditioned by `diagonal` (F).

    `normal` is symmetric and positive definite; stops when ‖residual‖ ≤ tolerance·‖goal‖ in every column
    (Hestenes and Stiefel 1952).
    """
    X = torch.zeros_like(goal)
    R = goal.clone()
    Z = R / diagonal[:, None]
    P = Z.clone()
    rz = (R * Z).sum(dim=0)
    enough = (tolerance * goal.norm(dim=0)).clamp(min=1e-30)
    for _ in range(max_iterations):
        if bool((R.norm(dim=0) <= enough).all()):
            break
        Q = normal(P)
        step = rz / (P * Q).sum(dim=0).clamp(min=1e-30)
        X += step * P
        R -= step * Q
        Z = R / diagonal[:, None]
        rz_next = (R * Z).sum(dim=0)
        P = Z + (rz_next / rz.clamp(min=1e-30)) * P
        rz = rz_next
    return X


def carry(dictionary: Dictionary, between: AffineMap, rows: Tensor, l0: float | None) -> Dictionary:
    """A dictionary folded through a map, at an L0 (None: as it comes) on rows (B, D) of the target."""
    folded = fold(dictionary.to(rows.device), between)
    return match_l0(folded, rows[:8192], l0) if l0 else folded
