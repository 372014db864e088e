"""The decoder refit: a new decoder in closed form, for the codes that the dictionary has.

`transfer.carry` refits after a fold and `trials` before it measures; a skip connection is fitted here as well.
Shapes: B tokens, D model width, F latents.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saerelay.errors import DataError, TransferError
from saerelay.sae.dictionary import ROWS_AT_ONCE, Dictionary, unit_decoder
from saerelay.sae.kernels import Codes, join_codes, latent_sums, products, reconstruct
from saerelay.sae.maps import affine
from saerelay.sae.moments import Moments
from saerelay.sae.spec import REFIT


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """The equations of a change ΔW (F, D) of the decoder: (ZᵀZ − n·mean·meanᵀ + damping) ΔW = goal.

    The change of b_dec is eliminated; it follows from ΔW.
    """

    codes: Codes
    """Z (B, F)."""
    mean: Tensor
    """(F): mean codes."""
    squares: Tensor
    """(F): Σ z²."""
    damping: Tensor
    """(F)."""
    goal: Tensor
    """(F, D): Zᵀ(residuals), centred."""

    def solve_directly(self) -> Tensor:
        """Solve by factoring the (F, F) matrix (Cholesky)."""
        matrix = self.codes.gram().addr_(self.mean, self.mean, alpha=-self.codes.n_rows)
        matrix.diagonal().add_(self.damping)
        return torch.cholesky_solve(self.goal, torch.linalg.cholesky(matrix))

    def solve_iteratively(self, tolerance: float, max_iterations: int) -> Tensor:
        """Solve by conjugate gradients, which never form the matrix."""
        n = self.codes.n_rows
        diagonal = (self.squares - n * self.mean.square() + self.damping).clamp(min=1e-12)
        return conjugate_gradients(self.times, self.goal, diagonal, tolerance, max_iterations)

    def times(self, W: Tensor) -> Tensor:
        """The matrix times W (F, D)."""
        ops = products(W.device)
        product = ops.decode(self.codes.transposed()[0], ops.decode(self.codes, W))
        product = product + self.damping[:, None] * W
        return product - self.codes.n_rows * torch.outer(self.mean, W.T @ self.mean)


@torch.no_grad()
def refit(
    dictionary: Dictionary,
    x: Iterable[Tensor],
    ridge: float = 0.1,
    *,
    target: Iterable[Tensor] | None = None,
    direct: bool | None = None,
    tolerance: float = REFIT.tolerance,
    max_iterations: int = REFIT.iterations,
) -> Dictionary:
    """Refit a dictionary's decoder on activations x, batches (B, D), by ridge towards the decoder it has.

    Minimises Σ‖x − b_dec − W_decᵀ z‖² + λ Σ_j g_j ‖w_j − w_j⁰‖² over W_dec and b_dec, with codes z fixed, λ = `ridge`,
    and g_j = Σ z_j² plus the mean of this sum over latents (so that a rare latent moves little, and a latent that never
    fires does not move). Codes are kept, sparse; activations are not. With `direct`, the default up to 16384 latents,
    the (F, F) matrix is factored; otherwise conjugate gradients never form it. Rows of the new decoder have unit norm:
    their norms go into the encoder. A transcoder reconstructs `target`, batches (B, Dy) of the same tokens; its skip
    connection stays (see `refit_skip`).

    >>> sae = Dictionary(architecture="relu", W_enc=torch.eye(2), b_enc=torch.zeros(2), W_dec=torch.eye(2),
    ...                  b_dec=torch.zeros(2))
    >>> x = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0))
    >>> better = refit(sae, [3 * x, 3 * x + 1])
    >>> bool((better(3 * x) - 3 * x).norm() < 1e-3 * x.norm())
    True

    Raises TransferError if activations are not finite, and DataError for a transcoder's activations without a target.
    """
    ops = products(dictionary.W_dec.device)
    products_sum = torch.zeros_like(dictionary.W_dec)
    residual_sum = torch.zeros_like(dictionary.b_dec)
    batches: list[Codes] = []
    pairs = ((batch, None) for batch in x) if target is None else zip(x, target, strict=True)
    for batch, y in pairs:
        if batch.dim() != 2:
            raise DataError(
                f"refit: a batch of the shape {tuple(batch.shape)}; give batches (tokens, width), as in [x]"
            )
        if not len(batch):
            continue
        goal = dictionary.goal_of(batch, y)
        codes, y_hat = reconstruct(dictionary, batch)
        residual = goal - y_hat
        products_sum += ops.decode(codes.transposed()[0], residual)
        residual_sum += residual.sum(dim=0)
        batches.append(codes)
    if not batches:
        return dictionary
    if not bool(torch.isfinite(residual_sum).all()):
        raise TransferError(
            "the activations on which the decoder is refitted are not all finite; run the model in float32 or "
            "bfloat16, not float16"
        )

    equations = _normal_equations(join_codes(batches), products_sum, residual_sum, ridge)
    if direct is None:
        direct = dictionary.n_latents <= REFIT.direct_latents
    change = equations.solve_directly() if direct else equations.solve_iteratively(tolerance, max_iterations)
    changed = replace(
        dictionary,
        W_dec=dictionary.W_dec + change,
        b_dec=dictionary.b_dec + residual_sum / equations.codes.n_rows - equations.mean @ change,
    )
    return unit_decoder(changed)


@torch.no_grad()
def refit_skip(dictionary: Dictionary, x: Tensor, target: Tensor) -> Dictionary:
    """Return a transcoder with the best skip connection and b_dec for the codes it has on activations x (B, D).

    A ridge regression on x of the residual of `target` (B, Dy) is added to W_skip and b_dec. A transcoder without a
    skip connection is returned as it is.
    """
    if dictionary.W_skip is None:
        return dictionary
    pairs = zip(x.split(ROWS_AT_ONCE), target.split(ROWS_AT_ONCE), strict=True)
    residuals = [y - reconstruct(dictionary, part)[1] for part, y in pairs]
    A, c = affine_part(x, torch.cat(residuals))
    return replace(dictionary, W_skip=dictionary.W_skip + A, b_dec=dictionary.b_dec + c)


def with_skip(dictionary: Dictionary, x: Tensor, target: Tensor) -> Dictionary:
    """Give a transcoder that has no skip connection one that is fitted on x (B, D) and `target` (B, Dy)."""
    empty = dictionary.W_enc.new_zeros(dictionary.d_out, dictionary.d_model)
    return refit_skip(replace(dictionary, W_skip=empty), x, target)


def without_skip(dictionary: Dictionary, x: Tensor) -> Dictionary:
    """Return a transcoder without its skip connection, whose mean output on x (B, D) goes into b_dec."""
    if dictionary.W_skip is None:
        return dictionary
    return replace(
        dictionary, W_skip=None, b_dec=dictionary.b_dec + dictionary.W_skip @ x.mean(dim=0).to(dictionary.b_dec)
    )


def affine_part(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return A (Dy, D) and c (Dy) of the ridge regression y ≈ A x + c, for activations x (B, D) and y (B, Dy)."""
    moments = Moments.empty(x.shape[1], y.shape[1], x.device)
    moments.add(x, y)
    regression = affine(moments)
    return regression.A.to(y), regression.c.to(y)


def _normal_equations(codes: Codes, products_sum: Tensor, residual_sum: Tensor, ridge: float) -> NormalEquations:
    """The normal equations of a refit, from the codes of all tokens, Zᵀ(residuals) (F, D) and Σ residuals (D)."""
    squares = latent_sums(codes.with_values(codes.values.square()))
    mean = latent_sums(codes) / codes.n_rows
    damping = (ridge * (squares + squares.mean())).clamp(min=1e-12)
    goal = products_sum - torch.outer(mean, residual_sum)
    return NormalEquations(codes=codes, mean=mean, squares=squares, damping=damping, goal=goal)


def conjugate_gradients(
    normal: Callable[[Tensor], Tensor], goal: Tensor, diagonal: Tensor, tolerance: float, max_iterations: int
) -> Tensor:
    """Solve normal(X) = goal for X (F, D), all columns side by side, preconditioned by `diagonal` (F).

    `normal` is symmetric and positive definite; the iteration stops when ‖residual‖ ≤ tolerance·‖goal‖ in every column
    (Hestenes and Stiefel 1952).
    """
    X = torch.zeros_like(goal)
    R = goal.clone()
    Z = R / diagonal[:, None]
    P = Z.clone()
    rz = (R * Z).sum(dim=0)
    small = (tolerance * goal.norm(dim=0)).clamp(min=1e-30)
    for _ in range(max_iterations):
        if bool((R.norm(dim=0) <= small).all()):
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
