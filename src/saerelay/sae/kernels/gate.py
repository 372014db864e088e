"""A gate in the sparse step: its codes also reconstruct, through the decoder, which gets no gradient from them.

See `loss.gate_error`. Shapes: B tokens, D model width, F latents, n_active the non-zero codes of a batch.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from saerelay.sae.architectures.architecture import GateGradients, Penalty
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.kernels.codes import Codes, joined


class GatePart(NamedTuple):
    """The gate on one piece of tokens, or on a whole batch."""

    codes: Tensor
    """(n_active): the gate's codes, at the positions of the codes."""
    to_gate: Tensor
    """(n_active): ∂(squared error)/∂gate, up to the factor on residuals."""
    error: Tensor
    """Σ error²."""

    @classmethod
    def of(cls, codes: Codes, goal: Tensor, dictionary: Dictionary, ops: ModuleType) -> "GatePart":
        """The gate of codes (rows, F) that are to reconstruct `goal` (rows, D), which is overwritten."""
        assert dictionary.threshold is not None and dictionary.r_mag is not None
        columns = codes.columns
        values = dictionary.activation.gate_codes(
            codes.values, dictionary.threshold[columns], dictionary.r_mag[columns]
        )
        gate = codes.with_values(values)
        to_gate = ops.explain(goal, gate, dictionary.W_dec)
        return cls(values, to_gate, torch.linalg.vector_norm(goal).square())


def gradients_of_gates(
    parts: list[GatePart], codes: Codes, dictionary: Dictionary, to_x_hat: float, penalty: Penalty | None
) -> GateGradients:
    """Carry the gradients of a batch's gate, joined from its pieces, back to z, threshold and r_mag, where codes are.

    `to_x_hat` is the factor on residuals.
    """
    assert dictionary.r_mag is not None
    gate = joined([part.codes for part in parts])
    to_gate = joined([part.to_gate for part in parts]) * to_x_hat
    if penalty is not None and penalty.to_z is not None:
        to_gate = to_gate + penalty.to_z
    return dictionary.activation.gate_gradients(to_gate, gate, dictionary.r_mag[codes.columns])
