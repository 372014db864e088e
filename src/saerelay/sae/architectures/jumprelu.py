"""JumpReLU (Rajamanoharan et al. 2024): every pre-activation above its latent's own threshold, which is trained.

Neither the step 1[pre > θ] nor the jump pre·1[pre > θ] has a gradient to θ almost everywhere. Training uses the
gradient of a rectangular window of width `bandwidth` around θ instead (equations 11 and 12 of the paper).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, final

from pydantic import Field

from saerelay.sae.architectures.architecture import (
    Architecture,
    BatchSums,
    Penalty,
    level_exceeded,
    with_common_threshold,
)

if TYPE_CHECKING:
    from torch import Tensor

    from saerelay.sae.dictionary import Dictionary
    from saerelay.sae.kernels.codes import Codes


@final
class JumpReLU(Architecture):
    """Every pre-activation above its latent's threshold; a penalty holds mean L0 at a target."""

    name: ClassVar[str] = "jumprelu"
    title: ClassVar[str] = "JumpReLU"
    l0_key: ClassVar[str | None] = "target_l0"
    has_threshold: ClassVar[bool] = True

    target_l0: float = Field(default=32.0, gt=0, description="active latents per token to aim for")
    l0_weight: float = Field(default=1.0, ge=0, description="weight of the penalty ((L0 - target) / target)^2")
    bandwidth: float = Field(default=0.3, gt=0, description="width of the straight-through window, in normalised units")

    def match_l0(self, dictionary: Dictionary, x: Tensor, l0: float) -> Dictionary:
        """Multiply all thresholds by one factor; without any above zero, give all latents a common threshold."""
        if dictionary.threshold is None or not bool(dictionary.threshold.any()):
            return with_common_threshold(dictionary, x, l0)
        relative = dictionary.pre_activations(x) / dictionary.threshold.clamp(min=1e-12)
        factor = level_exceeded(relative, l0).clamp(min=1e-3)
        return replace(dictionary, threshold=dictionary.threshold * factor)

    # --- the reference --------------------------------------------------------------------------------------------

    def training_codes(self, pre: Tensor, threshold: Tensor | None) -> Tensor:
        """See `Architecture.training_codes`."""
        from saerelay.sae.architectures.straight_through import jump  # loads torch, which reading a recipe must not

        assert threshold is not None
        return jump(pre, threshold, self.bandwidth)

    def training_penalty(self, pre: Tensor, z: Tensor, threshold: Tensor | None, divisor: float) -> Tensor | None:
        """l0_weight · ((L0 − target) / target)²."""
        from saerelay.sae.architectures.straight_through import step

        assert threshold is not None
        l0 = step(pre, threshold, self.bandwidth).sum() / pre.shape[0]
        return self.l0_weight * (l0 / self.target_l0 - 1) ** 2

    # --- the sparse step ------------------------------------------------------------------------------------------
    # Pre-activations in a latent's window get a gradient even below the threshold, so the step selects from the
    # window's lower end upwards. After the shift the window reaches from 0 to `bandwidth`, with the threshold at half
    # of that.

    def shift(self, threshold: Tensor | None) -> Tensor | None:
        """The lower end of each latent's window."""
        assert threshold is not None
        return threshold - self.bandwidth / 2

    def unshift(self, codes: Codes, shift: Tensor) -> tuple[Codes, Tensor]:
        """See `Architecture.unshift`; codes in the window but not above their threshold become zero."""
        above = codes.values
        window = (above > 0) & (above < self.bandwidth)
        true = above + shift[codes.columns]
        return codes.with_values(true * (above > self.bandwidth / 2)), window

    def penalty(self, sums: BatchSums, warmth: float | Tensor) -> Penalty | None:
        """See `training_penalty`; the gradient is the same for every step 1[pre > θ]."""
        excess = sums.n_active / sums.n_rows / self.target_l0 - 1
        weight = warmth * self.l0_weight
        to_step = weight * 2 * excess / (self.target_l0 * sums.n_rows)
        return Penalty(weight * excess**2, to_step=to_step)

    def threshold_gradient(self, to_z: Tensor, to_step: Tensor, threshold: Tensor, window: Tensor) -> Tensor:
        """See `Architecture.threshold_gradient`."""
        return (to_z * threshold + to_step) * window / -self.bandwidth
