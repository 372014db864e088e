"""One step of Adam (Kingma and Ba 2015), on tensors that are updated part by part."""

from typing import NamedTuple

import torch
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]
"""A parameter, the running mean of its gradient, and the running mean of the squared gradient."""

EPS = 1e-8
"""Added to the root of the mean square."""


class Adam(NamedTuple):
    """One step of Adam, applied to every tensor."""

    lr: float | Tensor
    """On a GPU, a zero-dimensional float32 tensor."""
    betas: tuple[float, float]
    n_steps: Tensor
    shrink: Tensor | None
    """The divisor of gradients (for clipping)."""
    failed: Tensor | None = None
    """float32: 1 if nothing is to be updated; for devices that the host does not wait for."""

    def move(self, triple: Triple, gradient: Tensor, rate_share: float = 1.0) -> None:
        """Update a parameter and its moments, at a share of the learning rate."""
        parameter, mean, square = triple
        torch._fused_adam_(  # pyright: ignore  # what torch.optim.Adam(fused=True) calls, which cannot take parts
            [parameter],
            [gradient],
            [mean],
            [square],
            [],
            [self.n_steps],
            lr=rate_share * self.lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=0.0,
            eps=EPS,
            amsgrad=False,
            maximize=False,
            grad_scale=self.shrink,
            found_inf=self.failed,
        )
