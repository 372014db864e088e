"""ReLU with an L1 penalty (Bricken et al. 2023): every positive pre-activation."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, final

from pydantic import Field

from saerelay.sae.architectures.architecture import (
    Architecture,
    BatchSums,
    Penalty,
    level_exceeded,
)

if TYPE_CHECKING:
    from torch import Tensor

    from saerelay.sae.dictionary import Dictionary


@final
class ReLU(Architecture):
    """Every positive pre-activation; sparsity comes from an L1 penalty on codes, with decoder rows of unit norm."""

    name: ClassVar[str] = "relu"
    title: ClassVar[str] = "ReLU"

    l1: float = Field(default=4.0, ge=0, description="weight of the L1 penalty, in normalised units")

    def match_l0(self, dictionary: Dictionary, x: Tensor, l0: float) -> Dictionary:
        """Add one number to all biases."""
        level = level_exceeded(dictionary.pre_activations(x), l0)
        return replace(dictionary, b_enc=dictionary.b_enc - level)

    def training_penalty(self, pre: Tensor, z: Tensor, threshold: Tensor | None, divisor: float) -> Tensor | None:
        """l1 · Σ z, divided as the squared error is."""
        return self.l1 * z.sum() / divisor

    def penalty(self, sums: BatchSums, warmth: float | Tensor) -> Penalty | None:
        """`training_penalty` with its gradient."""
        weight = warmth * self.l1 / sums.divisor
        return Penalty(weight * sums.total_code, to_z=weight)
