"""Sparse autoencoders: the trained object.

Shapes: B tokens, D model width, F latents. One row per latent: W_enc (F, D), b_enc (F), W_dec (F, D), b_dec (D),
threshold (F). Canonical form acts on raw activations, with no normalisation factor and no pre-encoder bias:

    pre = x W_encᵀ + b_enc        z = activation(pre)        x_hat = z W_dec + b_dec
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from saerelay.sae.architectures import Architecture, architecture_named

PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


@dataclass(frozen=True, eq=False, kw_only=True)
class Dictionary:
    """A sparse autoencoder in canonical form.

    >>> sae = Dictionary(architecture="topk", k=2, W_enc=torch.eye(4), b_enc=torch.zeros(4),
    ...                  W_dec=torch.eye(4), b_dec=torch.zeros(4))
    >>> z = sae.encode(torch.tensor([3.0, 1.0, 2.0, -1.0]))
    >>> z, sae.decode(z)
    (tensor([3., 0., 2., 0.]), tensor([3., 0., 2., 0.]))

    `topk` keeps the k largest pre-activations of each token if positive; `relu` all positive ones; `jumprelu` and
    `batchtopk` (at inference) those strictly above the latent's threshold and above zero.
    """

    architecture: str
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    k: int | None = None

    @cached_property
    def activation(self) -> Architecture:
        """How pre-activations become codes."""
        return architecture_named(self.architecture).of_dictionary(self.k)

    @property
    def n_latents(self) -> int:
        """Number of latents F."""
        return self.W_enc.shape[0]

    @property
    def d_model(self) -> int:
        """Width D of the activations."""
        return self.W_enc.shape[1]

    def pre_activations(self, x: Tensor) -> Tensor:
        """Pre-activations (..., F) of activations x (..., D)."""
        return torch.nn.functional.linear(x, self.W_enc, self.b_enc)

    def encode(self, x: Tensor) -> Tensor:
        """Codes z (..., F) of activations x (..., D): non-negative, mostly zero."""
        return self.activation.activate(self.pre_activations(x), self.threshold)

    def decode(self, z: Tensor) -> Tensor:
        """Reconstruction x_hat (..., D) of codes z (..., F)."""
        return z @ self.W_dec + self.b_dec

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruct activations x (..., D)."""
        return self.decode(self.encode(x))

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name."""
        tensors = {name: getattr(self, name) for name in PARAMETERS}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "Dictionary":
        """The same dictionary with other parameters, by name."""
        return replace(self, **tensors)

    def to(self, device_or_dtype: torch.device | str | torch.dtype) -> "Dictionary":
        """The same dictionary on another device or in another dtype."""
        return self.with_tensors({name: tensor.to(device_or_dtype) for name, tensor in self.tensors().items()})


@torch.no_grad()
def match_l0(dictionary: Dictionary, x: Tensor, l0: float) -> Dictionary:
    """Shift what decides which latents are active until mean L0 on activations x (B, D) is `l0`.

    BatchTopK: its one threshold. JumpReLU: all thresholds times one factor. ReLU: one number is added to all biases.
    TopK has no other L0 than k. A dictionary that does not reach `l0` with all its latents is left at what it reaches.

    >>> sae = Dictionary(architecture="relu", W_enc=torch.eye(4), b_enc=torch.ones(4), W_dec=torch.eye(4),
    ...                  b_dec=torch.zeros(4))
    >>> x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    >>> round(float((match_l0(sae, x, 1.0).encode(x) > 0).sum(dim=1).float().mean()), 2)
    1.0
    """
    return dictionary.activation.match_l0(dictionary, x, l0)


def unit_decoder(dictionary: Dictionary) -> Dictionary:
    """Move the norms of decoder rows into the encoder: ReLU and JumpReLU stay the same function, TopK re-ranks."""
    norms = dictionary.W_dec.norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    unit = replace(dictionary, W_dec=dictionary.W_dec / norms[:, None])
    return scale_latents(unit, norms)


def scale_latents(dictionary: Dictionary, factor: Tensor) -> Dictionary:
    """Multiply the codes of each latent by a positive factor (F): encoder rows, biases and thresholds."""
    threshold = dictionary.threshold
    return replace(
        dictionary,
        W_enc=dictionary.W_enc * factor[:, None],
        b_enc=dictionary.b_enc * factor,
        threshold=None if threshold is None else threshold * factor,
    )
