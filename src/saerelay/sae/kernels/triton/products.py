"""Sparse products; each program computes a block of columns for one token or one latent."""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import torch
from torch import Tensor

from saerelay.sae.kernels.codes import Codes
from saerelay.sae.kernels.triton.launching import jit, launch, power_of_two, tl, warps_for

PIECE = 256
"""The most entries of one latent that one program adds up; longer lists are cut, and their partial sums added up."""
CACHE_BYTES = 40 * 10**6
"""Matrices up to this size stay in the L2 cache while all tokens read their rows (an H100 has 50 MB)."""
WIDEST = 4096
"""The most columns of a token that `explain` keeps in registers."""


def _fits_in_cache(W: Tensor) -> bool:
    return W.numel() * W.element_size() <= CACHE_BYTES


def _columns_block(width: int) -> int:
    return min(256, max(16, power_of_two(width)))


def _sum_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


# --- rows of Z: a program takes a token and a block of columns ----------------------------------------------------


@jit
def _decode_kernel(
    row_starts, columns, values, W, out, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SUBTRACT: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    low, high = tl.load(row_starts + row), tl.load(row_starts + row + 1)
    total = tl.zeros((BLOCK_N, BLOCK_D), out.dtype.element_ty)
    for first in range(low, high, BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        column = tl.load(columns + at, mask=at < high, other=0).to(tl.int64)
        value = tl.load(values + at, mask=at < high, other=0.0).to(total.dtype)
        inside = (at < high)[:, None] & (d < D)[None, :]
        total += value[:, None] * tl.load(W + column[:, None] * D + d[None, :], mask=inside, other=0.0).to(total.dtype)
    result = tl.sum(total, axis=0)
    place = row.to(tl.int64) * D + d
    if SUBTRACT:
        result = tl.load(out + place, mask=d < D, other=0.0) - result
    tl.store(out + place, result, mask=d < D)


def decode(codes: Codes, W: Tensor, out: Tensor | None = None) -> Tensor:
    """Z W: (B, F) sparse times (F, D) -> (B, D), into `out` if given."""
    if out is None:
        out = torch.empty(codes.n_rows, W.shape[1], dtype=_sum_dtype(codes.values), device=W.device)
    _decode(codes, W, out, subtract=False)
    return out


def subtract_decoded(x: Tensor, codes: Codes, W: Tensor) -> None:
    """x −= Z W, in place: (B, D)."""
    _decode(codes, W, x, subtract=True)


def _decode(codes: Codes, W: Tensor, out: Tensor, *, subtract: bool) -> None:
    D, block = W.shape[1], _columns_block(W.shape[1])
    arguments = (codes.row_starts, codes.columns, codes.values, W.contiguous(), out, D)
    grid = (codes.n_rows, -(-D // block))
    launch(_decode_kernel, grid, *arguments, BLOCK_N=16, BLOCK_D=block, SUBTRACT=subtract)


@jit
def _sampled_kernel(
    row_starts, columns, g, W, out, D, slab, n_active, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    low, high = tl.load(row_starts + row), tl.load(row_starts + row + 1)
    own = out + tl.program_id(1).to(tl.int64) * n_active
    begin = tl.program_id(1) * slab
    end = tl.minimum(begin + slab, D)
    for first in range(low, high, BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        column = tl.load(columns + at, mask=at < high, other=0).to(tl.int64)
        total = tl.zeros((BLOCK_N, BLOCK_D), out.dtype.element_ty)
        for block in range(begin, end, BLOCK_D):
            d = block + tl.arange(0, BLOCK_D)
            inside = (at < high)[:, None] & (d < end)[None, :]
            left = tl.load(g + row.to(tl.int64) * D + d, mask=d < end, other=0.0).to(total.dtype)
            right = tl.load(W + column[:, None] * D + d[None, :], mask=inside, other=0.0).to(total.dtype)
            total += left[None, :] * right
        tl.store(own + at, tl.sum(total, axis=1), mask=at < high)


def sampled(codes: Codes, g: Tensor, W: Tensor) -> Tensor:
    """g Wᵀ at the codes' positions: (B, D), (F, D) -> (n_active,)."""
    D, g, W = W.shape[1], g.contiguous(), W.contiguous()
    n_active = codes.columns.shape[0]
    block = _columns_block(D)
    slab = D if _fits_in_cache(W) else block  # all tokens read one slab of W before the next slab
    n_slabs = -(-D // slab)
    out = torch.empty(n_slabs, n_active, dtype=_sum_dtype(codes.values), device=W.device)
    arguments = (codes.row_starts, codes.columns, g, W, out, D, slab, n_active)
    launch(_sampled_kernel, (codes.n_rows, n_slabs), *arguments, BLOCK_N=16, BLOCK_D=block)
    return out[0] if n_slabs == 1 else out.sum(dim=0)


@jit
def _explain_kernel(row_starts, columns, values, W, left, out, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    low, high = tl.load(row_starts + row), tl.load(row_starts + row + 1)
    place = left + row.to(tl.int64) * D + d
    rest = tl.load(place, mask=d < D, other=0.0)
    for first in range(low, high, BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        column = tl.load(columns + at, mask=at < high, other=0).to(tl.int64)
        value = tl.load(values + at, mask=at < high, other=0.0).to(rest.dtype)
        inside = (at < high)[:, None] & (d < D)[None, :]
        w = tl.load(W + column[:, None] * D + d[None, :], mask=inside, other=0.0).to(rest.dtype)
        rest -= tl.sum(value[:, None] * w, axis=0)
    tl.store(place, rest, mask=d < D)
    # This reads the same rows of W again. They are still in the cache, since `explain` is used only if W fits there.
    for first in range(low, high, BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        column = tl.load(columns + at, mask=at < high, other=0).to(tl.int64)
        inside = (at < high)[:, None] & (d < D)[None, :]
        w = tl.load(W + column[:, None] * D + d[None, :], mask=inside, other=0.0).to(rest.dtype)
        tl.store(out + at, tl.sum(w * rest[None, :], axis=1), mask=at < high)


def explain(left: Tensor, codes: Codes, W: Tensor) -> Tensor:
    """left −= Z W, in place (B, D), and then left Wᵀ at the codes' positions (n_active)."""
    D, block = W.shape[1], power_of_two(W.shape[1])
    if block > WIDEST or not _fits_in_cache(W) or not left.is_contiguous():
        subtract_decoded(left, codes, W)
        return sampled(codes, left, W)
    out = torch.empty(codes.columns.shape, dtype=_sum_dtype(codes.values), device=W.device)
    arguments = (codes.row_starts, codes.columns, codes.values, W.contiguous(), left, out, D)
    sizes = {"BLOCK_N": 2, "BLOCK_D": max(16, block), "num_warps": warps_for(block)}
    launch(_explain_kernel, (codes.n_rows,), *arguments, **sizes)
    return out


@jit
def _fired_kernel(columns, values, fired, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + at, mask=at < n, other=0.0)
    tl.store(fired + tl.load(columns + at, mask=at < n, other=0), 1, mask=(at < n) & (value > 0))


def fired(codes: Codes) -> Tensor:
    """Bool (F): latents with a positive code on some token."""
    found = torch.zeros(codes.n_latents, dtype=torch.int8, device=codes.values.device)
    n = codes.columns.shape[0]
    launch(_fired_kernel, (-(-n // 1024),), codes.columns, codes.values, found, n, BLOCK=1024)
    return found.view(torch.bool)


# --- rows of Zᵀ: a program takes a piece of a latent's tokens and a block of columns ------------------------------


@jit
def _transposed_kernel(
    starts, rows, owner, pieces_before, n_latents, n_extra,
    first, x, first_out, first_part, second, g, second_out, second_part, D,
    LENGTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_extra = place < n_extra  # long latents' further pieces come first, full ones among the short
    latent, piece = place - n_extra, place * 0
    if is_extra:
        latent = tl.load(owner + place)
        piece = 1 + place - tl.load(pieces_before + latent)
    exists = latent < n_latents
    low = tl.load(starts + latent, mask=exists, other=0) + piece * LENGTH
    high = tl.minimum(tl.load(starts + latent + 1, mask=exists, other=0), low + LENGTH)
    first_sum = tl.zeros((BLOCK_N, BLOCK_D), first_out.dtype.element_ty)
    second_sum = tl.zeros((BLOCK_N, BLOCK_D), first_out.dtype.element_ty)
    for begin in range(low, high, BLOCK_N):
        at = begin + tl.arange(0, BLOCK_N)
        row = tl.load(rows + at, mask=at < high, other=0).to(tl.int64)
        inside = (at < high)[:, None] & (d < D)[None, :]
        source = row[:, None] * D + d[None, :]
        value = tl.load(first + at, mask=at < high, other=0.0).to(first_sum.dtype)
        first_sum += value[:, None] * tl.load(x + source, mask=inside, other=0.0).to(first_sum.dtype)
        value = tl.load(second + at, mask=at < high, other=0.0).to(second_sum.dtype)
        second_sum += value[:, None] * tl.load(g + source, mask=inside, other=0.0).to(second_sum.dtype)
    if is_extra:
        target = place.to(tl.int64) * D + d
        tl.store(first_part + target, tl.sum(first_sum, axis=0), mask=exists & (d < D))
        tl.store(second_part + target, tl.sum(second_sum, axis=0), mask=exists & (d < D))
    else:
        target = latent.to(tl.int64) * D + d
        tl.store(first_out + target, tl.sum(first_sum, axis=0), mask=d < D)
        tl.store(second_out + target, tl.sum(second_sum, axis=0), mask=d < D)


@jit
def _join_kernel(
    owner, pieces_before, n_latents, first_out, first_part, second_out, second_part, D, BLOCK_D: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    latent = tl.load(owner + place)
    leads = (latent < n_latents) & (place == tl.load(pieces_before + latent))
    if leads:
        target = latent.to(tl.int64) * D + d
        first_sum = tl.load(first_out + target, mask=d < D, other=0.0)
        second_sum = tl.load(second_out + target, mask=d < D, other=0.0)
        for piece in range(place, tl.load(pieces_before + latent + 1)):
            source = piece * tl.full((), 1, tl.int64) * D + d
            first_sum += tl.load(first_part + source, mask=d < D, other=0.0)
            second_sum += tl.load(second_part + source, mask=d < D, other=0.0)
        tl.store(first_out + target, first_sum, mask=d < D)
        tl.store(second_out + target, second_sum, mask=d < D)


def decode_pair(
    codes: Codes, first: Tensor, x: Tensor, second: Tensor, g: Tensor, first_out: Tensor, second_out: Tensor
) -> None:
    """Zᵀx and Zᵀg of codes (F, B), with `first` and `second` (n_active) as values, into two (F, D); x, g (B, D)."""
    if x.shape[1] != g.shape[1]:  # a transcoder between two widths
        decode(codes.with_values(first), x, out=first_out)
        decode(codes.with_values(second), g, out=second_out)
        return
    F, D, device = codes.n_rows, x.shape[1], codes.columns.device
    n_extra = codes.columns.shape[0] // PIECE  # no more pieces beyond the latents' first ones
    pieces_before = torch.zeros(F + 1, dtype=torch.int32, device=device)
    torch.cumsum(codes.row_starts.diff() // PIECE, 0, dtype=torch.int32, out=pieces_before[1:])
    place = torch.arange(n_extra, dtype=torch.int32, device=device)
    owner = torch.searchsorted(pieces_before[1:], place, right=True, out_int32=True)  # F: no such piece
    first_part, second_part = first_out.new_empty(n_extra, D), second_out.new_empty(n_extra, D)
    sums = (first, x.contiguous(), first_out, first_part, second, g.contiguous(), second_out, second_part, D)
    block = _columns_block(D)  # two sums of 8 rows take 64 registers, of 16 rows 128
    if x.shape[0] > 16_384:
        block = min(block, 128)  # so that a block of columns of x and g fits in the cache
    arguments = (codes.row_starts, codes.columns, owner, pieces_before, F, n_extra, *sums)
    launch(_transposed_kernel, (F + n_extra, -(-D // block)), *arguments, LENGTH=PIECE, BLOCK_N=8, BLOCK_D=block)
    arguments = (owner, pieces_before, F, first_out, first_part, second_out, second_part, D)
    launch(_join_kernel, (n_extra, -(-D // block)), *arguments, BLOCK_D=block)
