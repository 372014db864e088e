"""One step of Adam (Kingma and Ba 2015), on tensors that are moved part by part."""

from typing import NamedTuple

import torch
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]
"""A parameter, the running mean of its gradient and that of its square."""

EPS = 1e-8
"""What is added to the root of the mean square."""


class Adam(NamedTuple):
    """What a step of Adam does to every tensor."""

    lr: float | Tensor
    """On a GPU a single-number tensor of float32."""
    betas: tuple[float, float]
    n_steps: Tensor
    shrink: Tensor | None
    """What gradients are divided by."""
    failed: Tensor | None = None
    """float32: 1 where nothing is to move, on devices that the host does not wait for."""

    def move(self, triple: Triple, gradient: Tensor, rate_share: float = 1.0) -> None:
        """Move a parameter and its moments, at a share of the rate."""
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
