"""Sparse products by MKL, through torch's compressed-row tensors: x86 processors, float32 and float64.

Measured at D=192, F=3072, 24 active, 512 tokens, two cores: 0.10, 0.19 and 0.15 ms, where a dense product takes 1.8.
"""

import warnings

import torch
from torch import Tensor

from saerelay.kernels.codes import Codes


def available() -> bool:
    """Whether this build of torch has MKL."""
    return torch.backends.mkl.is_available()


def _compressed(row_starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():  # "Sparse CSR tensor support is in beta state"
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(row_starts, columns, values, shape, check_invariants=False)


def decode(codes: Codes, W: Tensor) -> Tensor:
    """Z W: (B, F) sparse times (F, D) -> (B, D)."""
    return _compressed(codes.row_starts, codes.columns, codes.values, (codes.n_rows, codes.n_latents)) @ W


def transposed(codes: Codes, g: Tensor) -> Tensor:
    """Zᵀ g: (F, B) sparse times (B, D) -> (F, D)."""
    starts, columns, order = codes.transpose()
    return _compressed(starts, columns, codes.values[order], (codes.n_latents, codes.n_rows)) @ g


def sampled(codes: Codes, g: Tensor, W: Tensor) -> Tensor:
    """g Wᵀ at the codes' places: (B, D), (F, D) -> (n_active,)."""
    places = _compressed(codes.row_starts, codes.columns, codes.values, (codes.n_rows, codes.n_latents))
    return torch.sparse.sampled_addmm(places, g, W.T, beta=0.0).values()
