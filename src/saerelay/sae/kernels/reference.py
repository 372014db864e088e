"""Sparse products in plain torch: runs everywhere, and is the reference for tests of the fast versions."""

import torch
from torch import Tensor

from saerelay.sae.kernels.adam import Adam, Triple
from saerelay.sae.kernels.codes import Codes
from saerelay.sae.kernels.select import codes_at_least as codes_at_least
from saerelay.sae.kernels.select import nonzero_codes as nonzero_codes
from saerelay.sae.kernels.select import positive_codes as positive_codes
from saerelay.sae.kernels.select import top_codes as top_codes
from saerelay.sae.kernels.select import top_codes_of_batch as top_codes_of_batch


def decode(codes: Codes, W: Tensor, out: Tensor | None = None) -> Tensor:
    """Z W: (B, F) sparse times (F, D) -> (B, D), into `out` if given."""
    out = W.new_empty(codes.n_rows, W.shape[1]) if out is None else out
    return out.zero_().index_add_(0, codes.rows(), codes.values[:, None] * W[codes.columns.long()])


def subtract_decoded(x: Tensor, codes: Codes, W: Tensor) -> None:
    """x −= Z W, in place: (B, D)."""
    x -= decode(codes, W)


def decode_pair(
    codes: Codes, first: Tensor, x: Tensor, second: Tensor, g: Tensor, first_out: Tensor, second_out: Tensor
) -> None:
    """Zᵀx and Zᵀg of codes (F, B), with `first` and `second` (n_active) as values, into two (F, D); x, g (B, D)."""
    decode(codes.with_values(first), x, out=first_out)
    decode(codes.with_values(second), g, out=second_out)


def sampled(codes: Codes, g: Tensor, W: Tensor) -> Tensor:
    """g Wᵀ at the codes' positions: (B, D), (F, D) -> (n_active,)."""
    return torch.linalg.vecdot(g[codes.rows()], W[codes.columns.long()])


def explain(left: Tensor, codes: Codes, W: Tensor) -> Tensor:
    """left −= Z W, in place (B, D), and then left Wᵀ at the codes' positions (n_active)."""
    subtract_decoded(left, codes, W)
    return sampled(codes, left, W)


def fired(codes: Codes) -> Tensor:
    """Bool (F): latents with a positive code on some token."""
    largest = codes.values.new_zeros(codes.n_latents)
    return largest.scatter_reduce_(0, codes.columns.long(), codes.values, "amax") > 0


def adam_rows(
    adam: Adam, triple: Triple, gradient: Tensor, rate_share: float, *, unit: bool, copy: Tensor | None
) -> None:
    """Update the rows of a matrix (F, D) at a share of the rate, give them `unit` norm, and write them to a copy.

    A row of zeros has no direction, and stays as it is.
    """
    adam.move(triple, gradient, rate_share)
    parameter = triple[0]
    if unit:
        norms = torch.linalg.vector_norm(parameter, dim=1, keepdim=True)
        norms.masked_fill_(norms == 0, 1.0)
        if adam.failed is not None:
            norms.masked_fill_(adam.failed > 0, 1.0)  # even a division by almost 1 would change the rows
        parameter.div_(norms)
    if copy is not None:
        copy.copy_(parameter)
