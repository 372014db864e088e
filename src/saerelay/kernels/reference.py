"""Sparse products in plain torch: runs everywhere, and is what the fast versions are tested against."""

import torch
from torch import Tensor

from saerelay.kernels.codes import Codes


def decode(codes: Codes, W: Tensor) -> Tensor:
    """Z W: (B, F) sparse times (F, D) -> (B, D)."""
    products = codes.values[:, None] * W[codes.columns.long()]
    return W.new_zeros(codes.n_rows, W.shape[1]).index_add_(0, codes.rows(), products)


def transposed(codes: Codes, g: Tensor) -> Tensor:
    """Zᵀ g: (F, B) sparse times (B, D) -> (F, D)."""
    products = codes.values[:, None] * g[codes.rows()]
    return g.new_zeros(codes.n_latents, g.shape[1]).index_add_(0, codes.columns.long(), products)


def sampled(codes: Codes, g: Tensor, W: Tensor) -> Tensor:
    """g Wᵀ at the codes' places: (B, D), (F, D) -> (n_active,)."""
    return torch.linalg.vecdot(g[codes.rows()], W[codes.columns.long()])
