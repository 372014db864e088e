"""Gated SAEs (Rajamanoharan et al. 2024, arXiv 2404.16014): a gate decides which latents are active, and only that.

The paper has, with one encoder W for gate and magnitude (equations 6 to 8),

    gate = W x + b_gate        z = 1[gate > 0] · relu(e^r_mag (W x) + b_mag)

and only the gate's codes relu(gate) are penalised, so that codes z do not shrink. A step has no gradient, so the gate
learns by reconstructing as well: from relu(gate), through the decoder, which is held fixed there.

Here a dictionary has W_enc = e^r_mag W, b_enc = b_mag and threshold = b_mag − e^r_mag b_gate, which makes it a JumpReLU
in all but its training:

    pre = W_enc x + b_enc        z = pre · 1[pre > threshold]        gate = (pre − threshold) e^−r_mag

These are the same functions of x, and by the chain rule they learn from the same gradients. Thresholds are kept from
falling below zero, where the gate would only let through pre-activations whose codes are zero anyway.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, final

from pydantic import Field

from saerelay.sae.architectures.architecture import (
    Architecture,
    BatchSums,
    GateGradients,
    Penalty,
    level_exceeded,
)

if TYPE_CHECKING:
    from torch import Tensor

    from saerelay.sae.dictionary import Dictionary
    from saerelay.sae.kernels.codes import Codes


@final
class Gated(Architecture):
    """Every pre-activation above its latent's threshold; a penalty on the gate's codes holds mean L0 at a target."""

    name: ClassVar[str] = "gated"
    title: ClassVar[str] = "Gated"
    l0_key: ClassVar[str | None] = "target_l0"
    has_threshold: ClassVar[bool] = True
    has_gate: ClassVar[bool] = True

    target_l0: float = Field(default=32.0, gt=0, description="active latents per token to aim for")
    gate_l1: float = Field(
        default=2.5, ge=0, description="weight of the gate's L1 penalty at target_l0; it grows as (L0 / target_l0)^4"
    )

    def match_l0(self, dictionary: Dictionary, x: Tensor, l0: float) -> Dictionary:
        """Add one number to all biases of the gate."""
        threshold = dictionary.threshold
        if threshold is None:
            threshold = dictionary.b_enc.new_zeros(dictionary.n_latents)
        r_mag = dictionary.r_mag
        scale = threshold.new_ones(1) if r_mag is None else r_mag.exp()
        pre = dictionary.pre_activations(x)
        gate = ((pre - threshold) / scale).masked_fill(pre <= 0, -math.inf)  # no gate lets these through
        threshold = (threshold + level_exceeded(gate, l0) * scale).clamp(min=0)
        return replace(dictionary, threshold=threshold)

    # --- the reference --------------------------------------------------------------------------------------------

    def training_penalty(self, pre: Tensor, z: Tensor, threshold: Tensor | None, divisor: float) -> Tensor | None:
        """gate_l1 · (L0 / target)^4 · Σ gate, divided as the squared error is; the weight has no gradient."""
        return self._weight((z > 0).to(z).sum(), len(z)) * z.sum() / divisor

    def gate_codes(self, z: Tensor, threshold: Tensor, r_mag: Tensor) -> Tensor:
        """relu(gate), which is positive where z is: (z − threshold) e^−r_mag."""
        return ((z - threshold) * (-r_mag).exp()).relu()

    # --- the sparse step ------------------------------------------------------------------------------------------

    def shift(self, threshold: Tensor | None) -> Tensor | None:
        """The threshold: a pre-activation that is still positive after the shift passes the gate."""
        return threshold

    def unshift(self, codes: Codes, shift: Tensor) -> tuple[Codes, Tensor | None]:
        """See `Architecture.unshift`."""
        above = codes.values
        true = above + shift[codes.columns]
        return codes.with_values(true * (above > 0)), None

    def penalty(self, sums: BatchSums, warmth: float | Tensor) -> Penalty | None:
        """See `training_penalty`."""
        weight = warmth * self._weight(sums.n_active, sums.n_rows) / sums.divisor
        return Penalty(weight * sums.total_code, to_z=weight)

    def gate_gradients(self, to_gate: Tensor, gate: Tensor, r_mag: Tensor) -> GateGradients:
        """See `Architecture.gate_gradients`."""
        to_z = to_gate * (gate > 0) * (-r_mag).exp()
        return GateGradients(z=to_z, threshold=-to_z, r_mag=-to_gate * gate)

    def _weight(self, n_active: Tensor, n_rows: int) -> Tensor:
        """The L1 penalty's weight: steep enough that L0 is close to its target, whatever weight that takes.

        A steeper weight would follow the noise of a batch's L0, and cost quality.
        """
        return self.gate_l1 * (n_active / n_rows / self.target_l0) ** 4
