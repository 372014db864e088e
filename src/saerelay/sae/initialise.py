"""A fresh dictionary: what a leg from scratch begins with, and the random dictionary that hops are compared with."""

from dataclasses import replace

import torch
from torch import Tensor

from saerelay.sae.architectures.architecture import with_common_threshold
from saerelay.sae.dictionary import Dictionary, scale_latents
from saerelay.sae.refit import affine_part
from saerelay.sae.spec import SizedDictionarySpec

INITIAL_ROWS = 1_024
"""Number of rows on which a fresh dictionary's scale and thresholds are set."""


@torch.no_grad()
def initialise(
    spec: SizedDictionarySpec, x: Tensor, generator: torch.Generator, target: Tensor | None = None
) -> Dictionary:
    """A fresh dictionary in training units: random unit decoder rows, encoder tied to them at the best common scale.

    Of the activations `x` (B, D), in training units, the first INITIAL_ROWS are used. The scale α minimises
    ‖x − α x_hat‖² in closed form, and thresholds start where L0 is what the spec asks for. A transcoder, which
    reconstructs `target` (B, Dy), has no encoder to tie: see `_aimed`.
    """
    if target is not None:
        return _aimed(spec, x, generator, target)
    x = x[:INITIAL_ROWS]
    dictionary = _untrained(spec, x, generator)
    return _at_best_scale(dictionary, x, dictionary(x))


def _aimed(spec: SizedDictionarySpec, x: Tensor, generator: torch.Generator, target: Tensor) -> Dictionary:
    """A fresh transcoder: random encoder rows; each decoder row is the target's mean direction where its latent fires.

    A skip connection is fitted first, by ridge regression of the target on x over all rows given; the decoder rows then
    aim at its residual.
    """
    W_skip = None
    b_dec = torch.zeros_like(target[0])
    if spec.skip_connection:
        W_skip, b_dec = affine_part(x, target)
    x = x[:INITIAL_ROWS]
    residual = target[:INITIAL_ROWS] - b_dec
    if W_skip is not None:
        residual = residual - x @ W_skip.T
    dictionary = _untrained(spec, x, generator)
    z = dictionary.encode(x)

    # A latent that fires on none of these rows gets the residual of one of them.
    rows = z.T @ residual
    silent = rows.norm(dim=1) == 0
    drawn = torch.randint(len(x), (spec.n_latents,), generator=generator).to(x.device)
    rows = torch.where(silent[:, None], residual[drawn], rows)
    W_dec = torch.nn.functional.normalize(rows, dim=1)

    aimed = replace(dictionary, W_dec=W_dec, b_dec=b_dec, W_skip=W_skip)
    return _at_best_scale(aimed, residual, z @ W_dec)


def _at_best_scale(dictionary: Dictionary, goal: Tensor, reached: Tensor) -> Dictionary:
    """Multiply all codes by the α that minimises ‖goal − α·reached‖²: they reconstruct `reached`, and ought `goal`."""
    scale = ((goal * reached).sum() / (reached * reached).sum()).clamp(min=1e-3)
    return scale_latents(dictionary, scale.expand(dictionary.n_latents))


def _untrained(spec: SizedDictionarySpec, x: Tensor, generator: torch.Generator) -> Dictionary:
    """Random unit rows as encoder and decoder, at the L0 that the spec asks for on x (B, D)."""
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
    if activation.has_gate:
        dictionary = replace(dictionary, r_mag=torch.zeros_like(dictionary.b_enc))
    return dictionary
