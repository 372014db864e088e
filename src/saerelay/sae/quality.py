"""How well a dictionary reconstructs activations, and how sparsely.

Hops, goals and surveys decide by these numbers; the metrics of an evaluation are in `analysis.sums`.
"""

import torch
from torch import Tensor

from saerelay.sae.dictionary import ROWS_AT_ONCE, Dictionary, check_rows
from saerelay.sae.kernels import reconstruct
from saerelay.sae.units import Balance, balance_factors

MEASURE_BALANCE = 1.0
"""Power of the deviations in the balanced FVU that is reported (decision 031)."""


@torch.no_grad()
def fvu(dictionary: Dictionary, x: Tensor, balance: Balance = 0.0, *, target: Tensor | None = None) -> float:
    """Fraction of the variance of activations x (B, D) that a canonical dictionary leaves unexplained.

    >>> nothing = Dictionary(architecture="relu", W_enc=torch.zeros(1, 2), b_enc=torch.zeros(1),
    ...                      W_dec=torch.zeros(1, 2), b_dec=torch.tensor([2.0, 3.0]))
    >>> fvu(nothing, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    1.0

    FVU = Σ‖x − x_hat‖² / Σ‖x − mean of x‖². 0 is perfect, 1 no better than always predicting the mean, above 1 worse.
    With `balance` each dimension is divided by its standard deviation to that power first: where a few dimensions are a
    hundred times as large as the others, plain FVU measures these few alone, but the model's loss depends on the others
    too (decision 031). For a transcoder, it is the fraction of the variance of `target` (B, Dy) that is left.
    """
    check_rows(x, "fvu")
    y = dictionary.goal_of(x, target)
    errors = torch.zeros(y.shape[1], dtype=torch.float64, device=y.device)
    for part, goal in zip(x.split(ROWS_AT_ONCE), y.split(ROWS_AT_ONCE), strict=True):
        _, y_hat = reconstruct(dictionary, part)
        errors += (goal - y_hat).square().sum(dim=0, dtype=torch.float64)
    return balanced_ratio(errors, (y - y.mean(dim=0)).square().sum(dim=0, dtype=torch.float64), balance)


def balanced_ratio(errors: Tensor, variances: Tensor, balance: Balance) -> float:
    """FVU from the squared errors and the variances of all dimensions (D), both summed or both averaged."""
    weights = balance_factors(variances, balance).square().reciprocal()
    return float((weights * errors).sum() / (weights * variances).sum())


@torch.no_grad()
def mean_l0(dictionary: Dictionary, x: Tensor) -> float:
    """Mean number of active latents on activations x (B, D)."""
    n_active = sum(int((dictionary.encode(part) > 0).sum()) for part in x.split(1024))
    return n_active / max(1, len(x))
