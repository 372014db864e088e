"""A slice of the latents of a dictionary in training: their gradients, and their updates.

A `Trainee` has one for each piece of its latents, so that the pieces of a step run in parallel.
"""

from typing import Protocol

import torch
from torch import Tensor

from saerelay.sae.kernels import products
from saerelay.sae.kernels.adam import Adam, Triple


class Backward(Protocol):
    """A batch after its forward pass, which gives the gradients of any latents."""

    def gradients(self, latents: slice, into: dict[str, Tensor]) -> None:
        """Write the gradients of some latents, by parameter name, into the tensors given."""
        ...


class LatentPart:
    """A slice of the latents of a dictionary in training; parts are processed in parallel."""

    def __init__(self, latents: slice, triples: dict[str, Triple]) -> None:
        self.latents = latents
        self.ops = products(triples["W_dec"][0].device)
        self.triples: dict[str, Triple] = {}
        for name, (parameter, mean, square) in triples.items():
            self.triples[name] = (parameter[latents], mean[latents], square[latents])

    def differentiate(self, step: Backward, gradients: dict[str, Tensor]) -> Tensor:
        """Write the gradients of these latents; return the sum of their squares."""
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
        """Update these latents, each parameter at its share of the rate; `encoder` follows W_enc.

        Decoder rows keep unit norm; thresholds stay at or above zero.
        """
        for name, triple in self.triples.items():
            gradient = gradients[name][self.latents]
            if name in ("W_enc", "W_dec"):
                copy = encoder[self.latents] if name == "W_enc" and encoder is not None else None
                self.ops.adam_rows(adam, triple, gradient, rate_shares[name], unit=name == "W_dec", copy=copy)
            else:
                adam.move(triple, gradient, rate_shares[name])
        if "threshold" in self.triples:
            self.triples["threshold"][0].clamp_(min=0)
