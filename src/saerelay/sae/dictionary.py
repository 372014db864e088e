"""Sparse autoencoders: the trained object.

Shapes: B tokens, D model width, F latents. One row per latent: W_enc (F, D), b_enc (F), W_dec (F, D), b_dec (D),
threshold (F), r_mag (F). Canonical form acts on raw activations, with no normalisation factor and no pre-encoder bias:

    pre = x W_encᵀ + b_enc        z = activation(pre)        x_hat = z W_dec + b_dec

A transcoder (Dunefsky et al. 2024) is the same object: it reads x and reconstructs other activations y that the model
computes from x, such as an MLP's output from its input. Then b_dec and the rows of W_dec have y's width Dy, and there
may be a skip connection W_skip (Dy, D), an affine path beside the latents (Paulo et al. 2025): y_hat = z W_dec + b_dec
+ x W_skipᵀ.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from saerelay.errors import DataError, TransferError
from saerelay.sae.architectures import Architecture, architecture_named

ROWS_AT_ONCE = 4_096
"""Rows of activations that closed forms and measurements process together; more might not fit in memory.

The last bits of a sum depend on this number.
"""
LATENT_PARAMETERS = ("W_enc", "b_enc", "W_dec", "threshold", "r_mag")
"""Parameters with an entry for each latent."""
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "r_mag", "W_skip")


@dataclass(frozen=True, eq=False, kw_only=True)
class Dictionary:
    """A sparse autoencoder, or a transcoder, in canonical form.

    >>> sae = Dictionary(architecture="topk", k=2, W_enc=torch.eye(4), b_enc=torch.zeros(4),
    ...                  W_dec=torch.eye(4), b_dec=torch.zeros(4))
    >>> z = sae.encode(torch.tensor([3.0, 1.0, 2.0, -1.0]))
    >>> z, sae.decode(z)
    (tensor([3., 0., 2., 0.]), tensor([3., 0., 2., 0.]))

    `topk` keeps the k largest pre-activations of each token if positive; `relu` all positive ones; `jumprelu`, `gated`
    and `batchtopk` (at inference) those strictly above the latent's threshold and above zero.
    """

    architecture: str
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    r_mag: Tensor | None = None
    """The logarithm of the factor that turns a latent's gate into its magnitude; only training uses it."""
    k: int | None = None
    W_skip: Tensor | None = None
    """(Dy, D): the skip connection of a transcoder."""

    def __repr__(self) -> str:
        k = f", k={self.k}" if self.k else ""
        width = f"{self.d_model}" if self.d_out == self.d_model else f"{self.d_model} to {self.d_out}"
        skip = ", skip connection" if self.W_skip is not None else ""
        return f"Dictionary({self.architecture}{k}, {self.n_latents} latents, width {width}{skip})"

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
        """Width D of the activations that it reads."""
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        """Width Dy of the activations that it reconstructs; for an SAE, D."""
        return self.W_dec.shape[1]

    def pre_activations(self, x: Tensor) -> Tensor:
        """Pre-activations (..., F) of activations x (..., D), in any dtype; DataError for another width."""
        if x.shape[-1] != self.d_model:
            raise DataError(f"the activations are {x.shape[-1]} wide, but this SAE reads {self.d_model} dimensions")
        return torch.nn.functional.linear(x.to(self.W_enc.dtype), self.W_enc, self.b_enc)

    def encode(self, x: Tensor) -> Tensor:
        """Codes z (..., F) of activations x (..., D): non-negative, mostly zero."""
        return self.activation.activate(self.pre_activations(x), self.threshold)

    def decode(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """Reconstruction (..., Dy) of codes z (..., F); a skip connection also needs the activations x (..., D)."""
        x_hat = z @ self.W_dec + self.b_dec
        if self.W_skip is None:
            return x_hat
        if x is None:
            raise TransferError("this transcoder has a skip connection: decode also needs its input; call decode(z, x)")
        return x_hat + x.to(self.W_skip.dtype) @ self.W_skip.T

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruct activations x (..., D); a transcoder reconstructs its target (..., Dy) from them."""
        return self.decode(self.encode(x), x)

    def goal_of(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """What is to be reconstructed from activations x (..., D): the `target` (..., Dy), or x itself without one.

        Half precision becomes float32, since squares and sums would overflow or be rounded in it. Raises DataError for
        a target of another width, and without a target for what can only be a transcoder: with a skip connection, or
        with outputs of another width than its inputs.
        """
        if target is None:
            if self.W_skip is not None or self.d_out != self.d_model:
                raise DataError("this is a transcoder: give the activations that it reconstructs, too, as the target")
            return widened(x)
        if target.shape[-1] != self.d_out:
            raise DataError(f"the target is {target.shape[-1]} wide, but this SAE reconstructs {self.d_out} dimensions")
        return widened(target)

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
    """Adjust thresholds or biases so that mean L0 on activations x (B, D) is `l0`.

    BatchTopK: the common threshold is set. JumpReLU: all thresholds are multiplied by one factor. ReLU: one number is
    added to all biases; Gated: to all biases of the gate. TopK stays as it is, since its L0 is k. A dictionary that
    cannot reach `l0` even with all its latents comes as close as it can.

    >>> sae = Dictionary(architecture="relu", W_enc=torch.eye(4), b_enc=torch.ones(4), W_dec=torch.eye(4),
    ...                  b_dec=torch.zeros(4))
    >>> x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    >>> round(float((match_l0(sae, x, 1.0).encode(x) > 0).sum(dim=1).float().mean()), 2)
    1.0
    """
    check_rows(x, "match_l0")
    if not len(x):
        raise DataError("match_l0: there are no activations to count active latents on")
    return dictionary.activation.match_l0(dictionary, x, l0)


def check_rows(x: Tensor, caller: str) -> None:
    """Raise DataError unless activations are rows (B, D), over which a caller may take means."""
    if x.dim() != 2:
        raise DataError(
            f"{caller}: activations of the shape {tuple(x.shape)}; give rows (tokens, width), as x.flatten(0, -2) does"
        )


def widened(x: Tensor) -> Tensor:
    """The same numbers, in float32 if they were in half precision."""
    return x.float() if x.element_size() < 4 else x


def unit_decoder(dictionary: Dictionary) -> Dictionary:
    """Move the norms of decoder rows into the encoder; the function stays the same, except for TopK, which re-ranks."""
    norms = dictionary.W_dec.norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    unit = replace(dictionary, W_dec=dictionary.W_dec / norms[:, None])
    return scale_latents(unit, norms)


def scale_latents(dictionary: Dictionary, factor: Tensor) -> Dictionary:
    """Multiply the codes of each latent by a positive factor (F): encoder rows, biases and thresholds.

    The gate's codes are multiplied as well, so r_mag stays.
    """
    threshold = dictionary.threshold
    return replace(
        dictionary,
        W_enc=dictionary.W_enc * factor[:, None],
        b_enc=dictionary.b_enc * factor,
        threshold=None if threshold is None else threshold * factor,
    )
