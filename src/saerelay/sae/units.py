"""Training units: a leg trains on (x − mean) / scale, and is published for raw x.

Both conversions are exact, so neither training nor readers need to know the scale of a model's activations. In most
language models a few dimensions are a hundred times as large as the others; units may also balance them (`balance`).
Shapes: B tokens, D width.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from saerelay.sae.dictionary import ROWS_AT_ONCE, Dictionary

Balance = float | Literal["auto"]
"""Power of the standard deviations that dimensions are divided by; "auto" decides by the data (see `power_for`)."""
BALANCE = 0.75
"""The power used where some dimension is huge (decision 031)."""
HUGE_DIMENSION = 0.05
"""A dimension with more of the variance is huge; the largest share: 0.13 to 0.78 in Gemma 3 270M, 0.02 in the demo."""


@dataclass(frozen=True, eq=False)
class Units:
    """The offset and scale that activations are expressed in.

    >>> x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    >>> units = Units.fitted_to(x)
    >>> units.mean, units.scale
    (tensor([2., 5.]), tensor(0.7071))
    >>> x = torch.randn(4096, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([100.0, 1.0])
    >>> Units.fitted_to(x, balance=1.0).normalise(x).std(dim=0).round(decimals=2)
    tensor([1., 1.])
    """

    mean: Tensor
    """(D)."""
    scale: Tensor
    """Scalar, or (D) where dimensions are balanced."""
    target: "Units | None" = None
    """Units of the activations that a transcoder reconstructs; None if it reconstructs what it reads."""

    @classmethod
    def fitted_to(cls, x: Tensor, balance: Balance = 0.0) -> Self:
        """Return units in which activations x (B, D) have mean 0 and mean square 1, averaged over all dimensions.

        Each dimension is also divided by its standard deviation to the power `balance`: with 0 dimensions keep their
        proportions, with 1 all have the same variance.
        """
        parts = x.split(ROWS_AT_ONCE)
        mean = torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0) / len(x)
        squares = torch.stack([(part.double() - mean).square().sum(dim=0) for part in parts])
        variance = squares.sum(dim=0) / len(x)
        power = power_for(variance, balance)
        if not power:
            square = torch.stack([(part.double() - mean).square().sum() for part in parts]).sum() / x.numel()
            return cls(mean.to(x), square.sqrt().clamp(min=1e-12).to(x))
        factors = balance_factors(variance, power)
        rms = (variance / factors.square()).mean().sqrt().clamp(min=1e-12)
        return cls(mean.to(x), (rms * factors).to(x))

    @classmethod
    def raw(cls, x: Tensor) -> Self:
        """Return units that leave activations x (B, D) as they are."""
        return cls(torch.zeros_like(x[0]), torch.ones_like(x[0, 0]))

    @property
    def out(self) -> "Units":
        """Units of the reconstructed activations."""
        return self.target or self

    @property
    def is_balanced(self) -> bool:
        """Whether each dimension has a scale of its own."""
        return self.scale.dim() > 0

    @property
    def size(self) -> Tensor:
        """The scale of a typical dimension: the geometric mean. Codes are multiplied by it when published."""
        return self.scale.log().mean().exp() if self.is_balanced else self.scale

    def normalise(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """(x − mean) / scale of activations x (B, D), into `out` if given."""
        if out is None:
            return (x - self.mean) / self.scale
        return torch.sub(x, self.mean, out=out).div_(self.scale)

    def from_canonical(self, dictionary: Dictionary) -> Dictionary:
        """Rewrite a dictionary of raw x as one of (x − mean) / scale, exactly; codes are divided by `out.size`."""
        threshold = dictionary.threshold
        out = self.out
        b_dec = dictionary.b_dec
        W_skip = dictionary.W_skip
        if W_skip is not None:
            b_dec = b_dec + W_skip @ self.mean
            W_skip = W_skip * self.scale / out.scale.view(-1, 1)
        return replace(
            dictionary,
            W_enc=dictionary.W_enc * (self.scale / out.size),
            b_enc=(dictionary.b_enc + dictionary.W_enc @ self.mean) / out.size,
            W_dec=dictionary.W_dec / (out.scale / out.size),
            b_dec=(b_dec - out.mean) / out.scale,
            threshold=None if threshold is None else threshold / out.size,
            W_skip=W_skip,
        )

    def to_canonical(self, dictionary: Dictionary) -> Dictionary:
        """Undo `from_canonical`: a dictionary of (x − mean) / scale becomes one of raw x.

        Where dimensions are balanced, decoder rows that had unit norm no longer have it. They must not be normalised:
        TopK would rank its latents differently.
        """
        threshold = dictionary.threshold
        out = self.out
        W_enc = dictionary.W_enc / (self.scale / out.size)
        b_dec = dictionary.b_dec * out.scale + out.mean
        W_skip = dictionary.W_skip
        if W_skip is not None:
            W_skip = W_skip * out.scale.view(-1, 1) / self.scale
            b_dec = b_dec - W_skip @ self.mean
        return replace(
            dictionary,
            W_enc=W_enc,
            b_enc=dictionary.b_enc * out.size - W_enc @ self.mean,
            W_dec=dictionary.W_dec * (out.scale / out.size),
            b_dec=b_dec,
            threshold=None if threshold is None else threshold * out.size,
            W_skip=W_skip,
        )


def power_for(variance: Tensor, balance: Balance) -> float:
    """The power that balances dimensions of variances (D): "auto" means BALANCE, or 0 where no dimension is huge.

    >>> power_for(torch.tensor([90.0, 5.0, 5.0]), "auto"), power_for(torch.ones(100), "auto")
    (0.75, 0.0)
    """
    if balance != "auto":
        return balance
    share = float(variance.max() / variance.sum().clamp(min=1e-30))
    return BALANCE if share > HUGE_DIMENSION else 0.0


def balance_factors(variance: Tensor, balance: Balance) -> Tensor:
    """Divisors that balance dimensions of variances (D): deviation^power, with geometric mean 1.

    A dimension that is constant, or nearly so, is treated as if its variance were a millionth of the mean variance.
    """
    damped = variance.clamp(min=1e-6 * float(variance.mean())).clamp(min=1e-30)
    logarithms = 0.5 * power_for(variance, balance) * damped.log()
    return (logarithms - logarithms.mean()).exp()
