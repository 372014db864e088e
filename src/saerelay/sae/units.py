"""Training units: a leg trains on (x − mean) / scale, and is published for raw x.

Both ways are exact, so that nothing that is trained or read needs to know the scale of a model's activations.
Shapes: B tokens, D width.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from saerelay.sae.dictionary import Dictionary


@dataclass(frozen=True, eq=False)
class Units:
    """What activations are measured in.

    >>> units = Units.fitted_to(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    >>> units.mean, units.scale
    (tensor([2., 5.]), tensor(0.7071))
    """

    mean: Tensor
    """(D)."""
    scale: Tensor
    """Scalar."""

    @classmethod
    def fitted_to(cls, x: Tensor) -> Self:
        """Those in which activations x (B, D) have mean 0 and, over all dimensions, mean square 1."""
        parts = x.split(4096)
        mean = torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0) / len(x)
        square = torch.stack([(part.double() - mean).square().sum() for part in parts]).sum() / x.numel()
        return cls(mean.to(x), square.sqrt().clamp(min=1e-12).to(x))

    @classmethod
    def raw(cls, x: Tensor) -> Self:
        """Those in which activations x (B, D) are as they are."""
        return cls(torch.zeros_like(x[0]), torch.ones_like(x[0, 0]))

    def normalise(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """(x − mean) / scale of activations x (B, D), into `out` if given."""
        if out is None:
            return (x - self.mean) / self.scale
        return torch.sub(x, self.mean, out=out).div_(self.scale)

    def from_canonical(self, dictionary: Dictionary) -> Dictionary:
        """Rewrite a dictionary of raw x as one of (x − mean) / scale, exactly; codes are divided by `scale`."""
        threshold = dictionary.threshold
        return replace(
            dictionary,
            b_enc=(dictionary.b_enc + dictionary.W_enc @ self.mean) / self.scale,
            b_dec=(dictionary.b_dec - self.mean) / self.scale,
            threshold=None if threshold is None else threshold / self.scale,
        )

    def to_canonical(self, dictionary: Dictionary) -> Dictionary:
        """Undo `from_canonical`: a dictionary of (x − mean) / scale becomes one of raw x."""
        threshold = dictionary.threshold
        return replace(
            dictionary,
            b_enc=dictionary.b_enc * self.scale - dictionary.W_enc @ self.mean,
            b_dec=dictionary.b_dec * self.scale + self.mean,
            threshold=None if threshold is None else threshold * self.scale,
        )
