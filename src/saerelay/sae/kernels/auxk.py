"""AuxK in the sparse step: dead latents learn to reconstruct the others' residual (Gao et al. 2024, eq. 6 and 7).

Shapes: B tokens, D model width, F latents, N dead latents.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saerelay.sae.kernels.codes import added_up, joined, tensor_cores
from saerelay.sae.loss import AUX_EVERY, k_aux

LISTED_SHARE = 4
"""On a GPU, AuxK considers at most F / LISTED_SHARE dead latents: a quarter of all."""


class DeadLatents(NamedTuple):
    """The latents that AuxK considers."""

    latents: Tensor
    """int64 (N), without repetitions."""
    are_dead: Tensor | None
    """Bool (N): which of the latents are dead; None if all are."""

    @classmethod
    def among(cls, dead: Tensor) -> "DeadLatents | None":
        """The latents marked in `dead` (F, bool), or None if there are none.

        On a GPU the list has a fixed length, so that the host need not wait for it: the dead latents, up to a share of
        all, then living latents to fill it up.
        """
        if dead.device.type == "cpu":
            latents = dead.nonzero().squeeze(1)
            return cls(latents, None) if latents.numel() else None
        n = -(-dead.shape[0] // LISTED_SHARE)
        marks, latents = dead.to(torch.uint8).sort(descending=True, stable=True)
        return cls(latents[:n], marks[:n] > 0)


class AuxPart(NamedTuple):
    """AuxK on the sampled rows of one piece of tokens (see `loss.aux_loss`); gradients are not scaled yet."""

    z: Tensor
    """(rows, N): codes of the dead latents."""
    to_z: Tensor
    """(rows, N)."""
    g: Tensor
    """(rows, D): gradient to the reconstruction by dead latents."""
    missing: Tensor
    """Σ‖e − e_hat‖²."""
    error: Tensor
    """Σ‖e‖²."""

    @classmethod
    def of(cls, dead: DeadLatents, W_dead: Tensor, pre: Tensor, residual: Tensor) -> "AuxPart":
        """AuxK on pre-activations (rows, F) and the residuals e (rows, D) of the same tokens; W_dead (N, D)."""
        # Not in bf16: oneDNN would keep a compiled kernel for each number of dead latents.
        pre_dead = pre[:, dead.latents].to(W_dead)
        if dead.are_dead is not None:
            pre_dead = pre_dead.masked_fill(~dead.are_dead, -torch.inf)
        n_used = k_aux(residual.shape[1], len(dead.latents))
        values, columns = pre_dead.topk(n_used, dim=1, sorted=False)
        z = torch.zeros_like(pre_dead).scatter_(1, columns, values.relu())
        with tensor_cores():
            missing = residual - z @ W_dead
            g = -2 * missing
            to_z = (g @ W_dead.T) * (z > 0)
        return cls(z, to_z, g, missing.square().sum(), residual.square().sum())


class Aux(NamedTuple):
    """AuxK of a whole batch."""

    dead: DeadLatents
    z: Tensor
    to_z: Tensor
    g: Tensor
    """As in `AuxPart`, for all rows."""
    scale: Tensor
    """Factor on the gradients."""
    loss: Tensor

    @classmethod
    def of(cls, dead: DeadLatents, parts: list[AuxPart], weight: float) -> "Aux":
        """Join the parts of a batch."""
        missing = added_up([part.missing for part in parts])
        error = added_up([part.error for part in parts])
        scale = weight / error.clamp(min=1e-30)
        if dead.are_dead is not None:
            scale = scale * dead.are_dead.any()
        return cls(
            dead=dead,
            z=joined([part.z for part in parts]),
            to_z=joined([part.to_z for part in parts]),
            g=joined([part.g for part in parts]),
            scale=scale,
            loss=scale * missing,
        )

    def add(self, latents: slice, x: Tensor, gradients: dict[str, Tensor]) -> None:
        """Add to the gradients of some latents; x (B, D) is what the encoder read."""
        low, high = self._listed(latents)
        if low == high:
            return
        rows = self.dead.latents[low:high] - latents.start
        z = self.z[:, low:high]
        to_z = self.to_z[:, low:high]
        with tensor_cores():
            own = {
                "W_enc": to_z.T @ x[::AUX_EVERY],
                "b_enc": to_z.sum(dim=0),
                "W_dec": z.T @ self.g,
            }
        for name, gradient in own.items():
            gradients[name].index_add_(0, rows, gradient * self.scale)

    def _listed(self, latents: slice) -> tuple[int, int]:
        """Where in the list some latents begin and end; on a GPU, where latents are not cut, the whole list."""
        listed = self.dead.latents
        if self.dead.are_dead is not None:
            return 0, len(listed)
        low, high = torch.searchsorted(listed, torch.tensor([latents.start, latents.stop])).tolist()
        return low, high
