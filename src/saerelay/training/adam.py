"""Adam on some latents of a dictionary at a time, in one pass over memory."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]
"""A parameter, the running mean of its gradient and that of its square."""


class Backward(Protocol):
    """A batch that went forward, and gives the gradients of any latents."""

    def gradients(self, latents: slice, into: dict[str, Tensor]) -> None:
        """Write the gradients of some latents, by parameter name, into the tensors given."""
        ...


class Adam(NamedTuple):
    """One step of Adam (Kingma and Ba 2015)."""

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
            eps=1e-8,
            amsgrad=False,
            maximize=False,
            grad_scale=self.shrink,
            found_inf=self.failed,
        )


class LatentPart:
    """Some latents of a dictionary in training; parts are worked on side by side."""

    def __init__(self, latents: slice, triples: dict[str, Triple]) -> None:
        self.latents = latents
        self.triples: dict[str, Triple] = {}
        for name, (parameter, mean, square) in triples.items():
            self.triples[name] = (parameter[latents], mean[latents], square[latents])

    def differentiate(self, step: Backward, gradients: dict[str, Tensor]) -> Tensor:
        """Write the gradients of these latents; Σ of their squares."""
        own = {name: gradient[self.latents] for name, gradient in gradients.items()}
        step.gradients(self.latents, own)
        norms = [torch.linalg.vector_norm(gradient) for gradient in own.values()]
        return torch.stack(norms).square().sum()

    def update(
        self,
        gradients: dict[str, Tensor],
        adam: Adam,
        rate_shares: dict[str, float],
        encoder: Tensor | None,
    ) -> None:
        """Move these latents, each parameter at its share of the rate; `encoder` follows W_enc.

        Decoder rows keep unit norm, thresholds stay positive.
        """
        for name, triple in self.triples.items():
            adam.move(triple, gradients[name][self.latents], rate_shares[name])
        W_dec = self.triples["W_dec"][0]
        norms = torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)
        if adam.failed is not None:
            norms = norms.masked_fill(adam.failed > 0, 1.0)  # even a division by almost 1 would move it
        W_dec.div_(norms)
        if "threshold" in self.triples:
            self.triples["threshold"][0].clamp_(min=0)
        if encoder is not None:
            encoder[self.latents].copy_(self.triples["W_enc"][0])
