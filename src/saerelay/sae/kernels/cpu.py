"""Sparse products by MKL, through torch's compressed-row tensors: x86 CPUs, float32 and float64.

Measured at D=192, F=3072, 24 active, 512 tokens, two cores: 0.10, 0.19 and 0.15 ms; a dense product takes 1.8 ms.
"""

import warnings

import torch
from torch import Tensor

from saerelay.sae.kernels.codes import Codes
from saerelay.sae.kernels.reference import adam_rows as adam_rows
from saerelay.sae.kernels.reference import fired as fired
from saerelay.sae.kernels.select import codes_at_least as codes_at_least
from saerelay.sae.kernels.select import nonzero_codes as nonzero_codes
from saerelay.sae.kernels.select import positive_codes as positive_codes
from saerelay.sae.kernels.select import top_codes as top_codes
from saerelay.sae.kernels.select import top_codes_of_batch as top_codes_of_batch


def available() -> bool:
    """Whether this build of torch has MKL."""
    return torch.backends.mkl.is_available()


def decode(codes: Codes, W: Tensor, out: Tensor | None = None) -> Tensor:
    """Z W: (B, F) sparse times (F, D) -> (B, D), into `out` if given."""
    return _compressed(codes) @ W if out is None else torch.addmm(out, _compressed(codes), W, beta=0, out=out)


def subtract_decoded(x: Tensor, codes: Codes, W: Tensor) -> None:
    """x −= Z W, in place: (B, D)."""
    torch.addmm(x, _compressed(codes), W, alpha=-1, out=x)


def decode_pair(
    codes: Codes, first: Tensor, x: Tensor, second: Tensor, g: Tensor, first_out: Tensor, second_out: Tensor
) -> None:
    """Zᵀx and Zᵀg of codes (F, B), with `first` and `second` (n_active) as values, into two (F, D); x, g (B, D)."""
    decode(codes.with_values(first), x, out=first_out)
    decode(codes.with_values(second), g, out=second_out)


def sampled(codes: Codes, g: Tensor, W: Tensor) -> Tensor:
    """g Wᵀ at the codes' positions: (B, D), (F, D) -> (n_active,)."""
    return torch.sparse.sampled_addmm(_compressed(codes), g, W.T, beta=0.0).values()


def explain(left: Tensor, codes: Codes, W: Tensor) -> Tensor:
    """left −= Z W, in place (B, D), and then left Wᵀ at the codes' positions (n_active)."""
    subtract_decoded(left, codes, W)
    return sampled(codes, left, W)


def _compressed(codes: Codes) -> Tensor:
    shape = (codes.n_rows, codes.n_latents)
    return torch.sparse_csr_tensor(codes.row_starts, codes.columns, codes.values, shape, check_invariants=False)


with warnings.catch_warnings():  # torch warns once that these tensors are in beta: get this over here, unseen
    warnings.simplefilter("ignore", UserWarning)
    _compressed(Codes(torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0), 1))
