"""The sparse training step: one dense encoder product, then work only where latents are active.

Gradients are written out by hand and equal those of autograd on `dictionaries.training_loss`; a test in float64 keeps
it so. Shapes: B tokens, D model width, F latents.
"""

from types import ModuleType

import torch
from torch import Tensor

from saerelay.dictionaries import Dictionary, Loss, error_divisor, k_aux
from saerelay.kernels import cpu, reference
from saerelay.kernels.codes import (
    Codes,
    dense_codes,
    join_codes,
    nonzero_codes,
    split_codes,
    top_codes,
    top_codes_of_batch,
)
from saerelay.recipe import DictionarySpec

__all__ = ["Codes", "dense_codes", "encode_sparse", "join_codes", "products", "sparse_step", "split_codes"]


def products(device: torch.device) -> ModuleType:
    """The module with the fastest `decode`, `transposed` and `sampled` on a device."""
    return cpu if device.type == "cpu" and cpu.available() else reference


def encode_sparse(dictionary: Dictionary, x: Tensor) -> Codes:
    """The codes of x (B, D), as `Dictionary.encode` gives them, without the zeros."""
    if dictionary.architecture == "topk":
        assert dictionary.k is not None
        return top_codes(dictionary.pre_activations(x), dictionary.k)
    return nonzero_codes(dictionary.encode(x))


def sparse_step(
    spec: DictionarySpec,
    dictionary: Dictionary,
    x: Tensor,
    *,
    dead: Tensor | None = None,
    ops: ModuleType | None = None,
) -> tuple[Loss, dict[str, Tensor]]:
    """Loss and gradients of `topk` and `batchtopk` on x (B, D) in training units, by parameter name.

    With e = x_hat − x and g = 2e/divisor: ∂W_dec = Zᵀg, ∂z = g W_decᵀ where z > 0, ∂W_enc = (∂z)ᵀx, and biases are
    sums over tokens; the dead latents' AuxK terms are added densely on their few columns.
    """
    d = dictionary
    ops = ops or products(x.device)
    pre = d.pre_activations(x)
    select = top_codes if spec.architecture == "topk" else top_codes_of_batch
    codes = select(pre, spec.k)
    residual = x - ops.decode(codes, d.W_dec) - d.b_dec
    divisor = error_divisor(spec, x)
    g = residual * (-2 / divisor)
    active = codes.values > 0
    to_values = ops.sampled(codes, g, d.W_dec) * active
    gradients = {
        "W_enc": ops.transposed(codes.with_values(to_values), x),
        "b_enc": torch.zeros_like(d.b_enc).index_add_(0, codes.columns, to_values),
        "W_dec": ops.transposed(codes, g),
        "b_dec": g.sum(dim=0),
    }
    error = residual.square().sum()
    total = error / divisor
    if dead is not None and spec.aux_weight:
        total = total + _add_aux(spec, d, x, pre, residual, error, dead, gradients)
    fired = torch.zeros(d.n_latents, dtype=torch.bool, device=x.device).index_fill_(
        0, codes.columns[active].long(), True
    )
    return Loss(total, error, active.sum(), fired), gradients


def _add_aux(
    spec: DictionarySpec,
    d: Dictionary,
    x: Tensor,
    pre: Tensor,
    residual: Tensor,
    error: Tensor,
    dead: Tensor,
    gradients: dict[str, Tensor],
) -> Tensor:
    """Add AuxK's gradients (see `dictionaries.aux_loss`) to `gradients`; the weighted loss."""
    index = dead.nonzero().squeeze(1)
    if index.numel() == 0:
        return x.new_zeros(())
    values, columns = pre[:, index].topk(k_aux(x.shape[1], index.numel()), dim=1, sorted=False)
    z = x.new_zeros(x.shape[0], index.numel()).scatter_(1, columns, values.relu())
    W = d.W_dec[index]
    missing = residual - z @ W
    scale = spec.aux_weight / error.clamp(min=1e-30)
    g = missing * (-2 * scale)
    to_z = (g @ W.T) * (z > 0)
    gradients["W_enc"].index_add_(0, index, to_z.T @ x)
    gradients["b_enc"].index_add_(0, index, to_z.sum(dim=0))
    gradients["W_dec"].index_add_(0, index, z.T @ g)
    return missing.square().sum() * scale
