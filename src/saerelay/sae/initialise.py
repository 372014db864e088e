"""A fresh dictionary, to be trained from scratch."""

import torch
from torch import Tensor

from saerelay.sae.architectures.architecture import with_common_threshold
from saerelay.sae.dictionary import Dictionary, scale_latents
from saerelay.sae.spec import SizedDictionarySpec

INITIAL_ROWS = 1_024
"""Rows that a fresh dictionary's scale and thresholds are set on."""


@torch.no_grad()
def initialise(spec: SizedDictionarySpec, x: Tensor, generator: torch.Generator) -> Dictionary:
    """A fresh dictionary in training units: random unit decoder rows, encoder tied to them at the best common scale.

    `x` (B, D) are activations in training units; the scale α minimises ‖x − α x_hat‖² in closed form, and thresholds
    start where L0 is what is asked for.
    """
    activation = spec.activation
    rows = torch.randn(spec.n_latents, x.shape[1], generator=generator, dtype=torch.float32).to(x)
    W_dec = torch.nn.functional.normalize(rows, dim=1)
    dictionary = Dictionary(
        architecture=activation.name,
        W_enc=W_dec.clone(),
        b_enc=torch.zeros(spec.n_latents).to(x),
        W_dec=W_dec,
        b_dec=torch.zeros(x.shape[1]).to(x),
        k=activation.published_k,
    )
    if activation.has_threshold:
        assert activation.l0 is not None
        dictionary = with_common_threshold(dictionary, x, activation.l0)
    x_hat = dictionary(x)
    scale = ((x * x_hat).sum() / (x_hat * x_hat).sum()).clamp(min=1e-3)
    return scale_latents(dictionary, scale.expand(spec.n_latents))
