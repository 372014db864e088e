"""Dictionaries of other tools that normalise every token before they encode it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saerelay.sae.dictionary import Dictionary, widened


@dataclass(frozen=True, eq=False)
class LayerNormed:
    """A dictionary of activations that are first normalised per token, as in OpenAI's SAEs and some of SAELens'.

    With the mean m and standard deviation s of a token's D values (s with divisor D − 1), u = (x − m)/(s + eps) is
    encoded, and x_hat = s·u_hat + m. No dictionary of raw x is equivalent; `at_scale` gives the nearest.

    >>> sae = Dictionary(architecture="relu", W_enc=torch.eye(4), b_enc=torch.zeros(4), W_dec=torch.eye(4),
    ...                  b_dec=torch.zeros(4))
    >>> LayerNormed(sae).encode(torch.tensor([10.0, 12.0, 10.0, 8.0]))
    tensor([0.0000, 1.2247, 0.0000, 0.0000])
    """

    dictionary: Dictionary
    eps: float = 1e-5

    @property
    def d_model(self) -> int:
        """Width D of the activations."""
        return self.dictionary.d_model

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return u (..., D), m and s (..., 1) for activations x (..., D); float32 if they are in half precision."""
        x = widened(x)
        mean = x.mean(dim=-1, keepdim=True)
        deviation = x.std(dim=-1, keepdim=True)
        return (x - mean) / (deviation + self.eps), mean, deviation

    def encode(self, x: Tensor) -> Tensor:
        """Codes z (..., F) of activations x (..., D)."""
        return self.dictionary.encode(self.normalise(x)[0])

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruct activations x (..., D)."""
        u, mean, deviation = self.normalise(x)
        return self.dictionary(u) * deviation + mean

    def to(self, device_or_dtype: torch.device | str | torch.dtype) -> "LayerNormed":
        """The same on another device or in another dtype."""
        return replace(self, dictionary=self.dictionary.to(device_or_dtype))

    @torch.no_grad()
    def at_scale(self, x: Tensor) -> Dictionary:
        """The dictionary of raw activations that assumes the median deviation of x (B, D) for every token.

        The mean of each token is removed exactly; the decoder adds the average of these means back to all tokens.
        """
        d = self.dictionary
        _, means, deviations = self.normalise(x)
        scale = deviations.median()
        mean = means.mean()
        W_enc = (d.W_enc - d.W_enc.mean(dim=1, keepdim=True)) / (scale + self.eps)
        return replace(d, W_enc=W_enc, W_dec=d.W_dec * scale, b_dec=d.b_dec * scale + mean)
