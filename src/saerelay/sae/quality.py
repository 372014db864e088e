"""How well a dictionary reconstructs activations, and how sparsely."""

import torch
from torch import Tensor

from saerelay.sae.dictionary import Dictionary
from saerelay.sae.kernels import reconstruct


@torch.no_grad()
def fvu(dictionary: Dictionary, x: Tensor) -> float:
    """Fraction of the variance of activations x (B, D) that a canonical dictionary leaves unexplained.

    >>> nothing = Dictionary(architecture="relu", W_enc=torch.zeros(1, 2), b_enc=torch.zeros(1),
    ...                      W_dec=torch.zeros(1, 2), b_dec=torch.tensor([2.0, 3.0]))
    >>> fvu(nothing, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    1.0

    FVU = Σ‖x − x_hat‖² / Σ‖x − mean of x‖². 0 is perfect, 1 no better than always predicting the mean, above 1 worse.
    """
    error = 0.0
    for part in x.split(4096):
        _, x_hat = reconstruct(dictionary, part)
        error += float((part - x_hat).square().sum(dtype=torch.float64))
    return error / float((x - x.mean(dim=0)).square().sum(dtype=torch.float64))


@torch.no_grad()
def mean_l0(dictionary: Dictionary, x: Tensor) -> float:
    """Mean number of active latents on activations x (B, D)."""
    n_active = sum(int((dictionary.encode(part) > 0).sum()) for part in x.split(1024))
    return n_active / max(1, len(x))
