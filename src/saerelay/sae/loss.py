"""The loss that each architecture is trained with, by autograd on dense codes.

Written for training units (see `units`). The sparse step of `kernels` is tested against it, and devices without sparse
kernels train with it. Shapes: B tokens, D model width, F latents.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saerelay.sae.dictionary import Dictionary
from saerelay.sae.spec import AnyDictionarySpec

AUX_EVERY = 16
"""AuxK uses every 16th token of a batch, a fair sample of shuffled rows: as good, cheaper, fewer latents stay dead."""


class Loss(NamedTuple):
    """The loss of a batch and what a training log needs; all but `total` are detached."""

    total: Tensor
    squared_error: Tensor
    """Σ ‖x − x_hat‖² over the batch."""
    n_active: Tensor
    """Non-zero codes in the batch."""
    fired: Tensor
    """Bool (F): latents active on some token."""


def error_divisor(spec: AnyDictionarySpec, x: Tensor) -> float:
    """The divisor of Σ‖x − x_hat‖² in the loss: B·D in normalised units (so that the loss is close to FVU), else B.

    `x` are the activations to be reconstructed.
    """
    return float(x.numel() if spec.normalise else x.shape[0])


def training_loss(
    spec: AnyDictionarySpec,
    dictionary: Dictionary,
    x: Tensor,
    *,
    target: Tensor | None = None,
    dead: Tensor | None = None,
    warmth: float | Tensor = 1.0,
) -> Loss:
    """The training loss on x (B, D) in training units, differentiable by autograd.

    `target` (B, Dy) is what a transcoder reconstructs, if that is not x. The loss is the sum of the squared error (for
    nested dictionaries, the mean of theirs: Matryoshka, Bussmann et al. 2025), the gate's squared error if there is a
    gate, the architecture's penalty times `warmth` in [0, 1] (its warm-up), and AuxK on the latents marked in `dead`
    (F, bool; Gao et al. 2024, eq. 7) for architectures that have it.
    """
    activation = spec.activation
    y = x if target is None else target
    divisor = error_divisor(spec, y)
    pre = dictionary.pre_activations(x)
    z = activation.training_codes(pre, dictionary.threshold)
    residual = y - dictionary.decode(z, x)
    error = residual.square().sum()
    errors = [error]
    for end in spec.prefixes(dictionary.n_latents)[:-1]:
        errors.append((residual + z[:, end:] @ dictionary.W_dec[end:]).square().sum())
    total = torch.stack(errors).mean() / divisor
    penalised = z
    if activation.has_gate:
        assert dictionary.threshold is not None and dictionary.r_mag is not None
        penalised = activation.gate_codes(z, dictionary.threshold, dictionary.r_mag)
        total = total + gate_error(dictionary, penalised, x, y) / divisor
    penalty = activation.training_penalty(pre, penalised, dictionary.threshold, divisor)
    if penalty is not None:
        total = total + warmth * penalty
    if dead is not None and activation.weight_of_aux:
        sample = slice(None, None, AUX_EVERY)
        aux = aux_loss(dictionary, pre[sample], residual[sample].detach(), dead)
        total = total + activation.weight_of_aux * aux
    active = z > 0
    return Loss(total, error.detach(), active.sum().detach(), active.any(dim=0).detach())


def gate_error(dictionary: Dictionary, gate: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Σ‖y − y_hat‖² for y_hat (B, Dy) decoded from the gate's codes (B, F) by a decoder that gets no gradient from it.

    Rajamanoharan et al. 2024, arXiv 2404.16014, eq. 9.
    """
    frozen = dictionary.with_tensors({name: tensor.detach() for name, tensor in dictionary.tensors().items()})
    return (y - frozen.decode(gate, x)).square().sum()


def aux_loss(dictionary: Dictionary, pre: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
    """AuxK: the share of the residual (B, D) that the D/2 strongest dead latents of each token leave unexplained.

    Σ‖e − e_hat‖² / Σ‖e‖² with e_hat decoded without bias from the dead latents alone (Gao et al. 2024, eq. 6 and 7).
    """
    if not bool(dead.any()):
        return pre.new_zeros(())
    pre_dead = pre[:, dead]
    values, indices = pre_dead.topk(k_aux(residual.shape[1], pre_dead.shape[1]), dim=-1, sorted=False)
    z = torch.zeros_like(pre_dead).scatter(-1, indices, values.relu())
    missing = residual - z @ dictionary.W_dec[dead]
    return missing.square().sum() / residual.square().sum().clamp(min=1e-30)


def k_aux(d_model: int, n_dead: int) -> int:
    """Number of dead latents that AuxK uses per token: half the model's width, or all if there are fewer."""
    return min(max(1, d_model // 2), n_dead)
