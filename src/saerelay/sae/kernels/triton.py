"""Sparse products and selection on NVIDIA GPUs, in Triton: same names and shapes as `reference` and `select`.

Sums run in float32 (float64 if the codes are), results have that type, and `W`, `x` and `g` may be bfloat16. No
floating-point atomics: the same inputs give the same bits. Nothing here waits for the device. Block sizes are fixed
rather than tuned, since another block size is another order of summation: a warp reads 16 bytes per lane.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from saerelay.sae.kernels import reference, select
from saerelay.sae.kernels.adam import EPS, Adam, Triple
from saerelay.sae.kernels.codes import Codes
from saerelay.sae.kernels.select import codes_at_least as codes_at_least
from saerelay.sae.kernels.select import nonzero_codes as nonzero_codes
from saerelay.sae.kernels.select import top_codes_of_batch as top_codes_of_batch

try:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]
except ImportError:  # `available` tells
    triton: Any = None
    tl: Any = None

jit: Any = triton.jit if triton else lambda function: function

PIECE = 256
"""Most entries of one latent that one program adds up; longer ones are cut, and the pieces added afterwards."""
SLICE = 16384
"""Most pre-activations among which one program selects."""
PROGRAMS, MOST_IN_TURN = 512, 8
"""How many programs a selection has at least, if there are as many tokens; and the most tokens that one takes in turn,
each of which it searches from the bound that it found for the one before."""
CHUNK = 256
"""Most of them that it looks through at once for those to keep."""
WIDEST_EXPLAINED = 4096
"""Most columns of a token that `explain` keeps in registers."""
WIDEST_ROW = 8192
"""Most columns of a latent that `adam_rows` keeps in registers."""


def available() -> bool:
    """Whether Triton is installed and has a GPU, or its interpreter, to run on."""
    return triton is not None and (torch.cuda.is_available() or triton.knobs.runtime.interpret)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    if all(grid):
        tensor = next(a for a in arguments if isinstance(a, Tensor))
        with torch.cuda.device_of(tensor):
            kernel[grid](*arguments, **constants)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _warps(block: int) -> int:
    return min(8, max(1, block // 256))


def _columns_block(width: int) -> int:
    return min(256, max(16, _power_of_two(width)))


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
    _launch(_decode_kernel, grid, *arguments, BLOCK_N=16, BLOCK_D=block, SUBTRACT=subtract)


@jit
def _sampled_kernel(row_starts, columns, g, W, out, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0)
    low, high = tl.load(row_starts + row), tl.load(row_starts + row + 1)
    for first in range(low, high, BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        column = tl.load(columns + at, mask=at < high, other=0).to(tl.int64)
        total = tl.zeros((BLOCK_N, BLOCK_D), out.dtype.element_ty)
        for block in range(0, D, BLOCK_D):
            d = block + tl.arange(0, BLOCK_D)
            inside = (at < high)[:, None] & (d < D)[None, :]
            left = tl.load(g + row.to(tl.int64) * D + d, mask=d < D, other=0.0).to(total.dtype)
            right = tl.load(W + column[:, None] * D + d[None, :], mask=inside, other=0.0).to(total.dtype)
            total += left[None, :] * right
        tl.store(out + at, tl.sum(total, axis=1), mask=at < high)


def sampled(codes: Codes, g: Tensor, W: Tensor) -> Tensor:
    """g Wᵀ at the codes' places: (B, D), (F, D) -> (n_active,)."""
    D, g, W = W.shape[1], g.contiguous(), W.contiguous()
    out = torch.empty(codes.columns.shape, dtype=_sum_dtype(codes.values), device=W.device)
    arguments = (codes.row_starts, codes.columns, g, W, out, D)
    _launch(_sampled_kernel, (codes.n_rows,), *arguments, BLOCK_N=16, BLOCK_D=_columns_block(D))
    return out


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
    # The same rows of W again, which are still in the cache.
    for first in range(low, high, BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        column = tl.load(columns + at, mask=at < high, other=0).to(tl.int64)
        inside = (at < high)[:, None] & (d < D)[None, :]
        w = tl.load(W + column[:, None] * D + d[None, :], mask=inside, other=0.0).to(rest.dtype)
        tl.store(out + at, tl.sum(w * rest[None, :], axis=1), mask=at < high)


def explain(left: Tensor, codes: Codes, W: Tensor) -> Tensor:
    """left −= Z W, in place (B, D), and then left Wᵀ at the codes' places (n_active)."""
    D, block = W.shape[1], _power_of_two(W.shape[1])
    if block > WIDEST_EXPLAINED or not left.is_contiguous():
        subtract_decoded(left, codes, W)
        return sampled(codes, left, W)
    out = torch.empty(codes.columns.shape, dtype=_sum_dtype(codes.values), device=W.device)
    arguments = (codes.row_starts, codes.columns, codes.values, W.contiguous(), left, out, D)
    sizes = {"BLOCK_N": 2, "BLOCK_D": max(16, block), "num_warps": _warps(block)}
    _launch(_explain_kernel, (codes.n_rows,), *arguments, **sizes)
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
    _launch(_fired_kernel, (-(-n // 1024),), codes.columns, codes.values, found, n, BLOCK=1024)
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
    arguments = (codes.row_starts, codes.columns, owner, pieces_before, F, n_extra, *sums)
    _launch(_transposed_kernel, (F + n_extra, -(-D // block)), *arguments, LENGTH=PIECE, BLOCK_N=8, BLOCK_D=block)
    arguments = (owner, pieces_before, F, first_out, first_part, second_out, second_part, D)
    _launch(_join_kernel, (n_extra, -(-D // block)), *arguments, BLOCK_D=block)


# --- selection ----------------------------------------------------------------------------------------------------


@jit
def _keys(value, inside, HALF: tl.constexpr, SMALLEST: tl.constexpr):
    """Integers in the order of floats, NaN last; 16 bits are enough for bfloat16."""
    bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    key = tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    if HALF:
        key = key >> 16
    return tl.where(inside, key, SMALLEST)


@jit
def _floor_kernel(
    pre, floors, n_above, B, F, length, k,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, SMALLEST: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    low_column = tl.program_id(1) * length
    n = tl.minimum(length, F - low_column)
    at = tl.arange(0, BLOCK)
    guess = tl.zeros((), tl.int64)
    step = tl.full((), -SMALLEST, tl.int64)  # the first row is searched from end to end, the others from the last floor
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i in range(tl.minimum(ROWS, B - first)):
        row = first + i
        source = pre + row * F + low_column
        key = _keys(tl.load(source + at, mask=at < n, other=0.0), at < n, HALF, SMALLEST)
        # At least k keys reach `low`, fewer reach `high`. Steps double until they lead across, and then halve.
        low = tl.full((), SMALLEST, tl.int64)
        high = tl.full((), -SMALLEST, tl.int64)
        n_low = tl.full((), BLOCK + 1, tl.int32)
        n_high = tl.zeros((), tl.int32)
        probe = guess
        while (high - low > 1) & (n_low != k):
            reached = tl.sum((key >= probe.to(tl.int32)).to(tl.int32), axis=0)
            enough = reached >= k
            low = tl.where(enough, probe, low)
            n_low = tl.where(enough, reached, n_low)
            high = tl.where(enough, high, probe)
            n_high = tl.where(enough, n_high, reached)
            stride = tl.minimum(step, (high - low) // 2)
            probe = tl.where(enough, low + stride, high - stride)
            step = step * 2
        # Either exactly those from `low` on are the k largest, or those above `low` and some that equal it.
        place = row * tl.num_programs(1) + tl.program_id(1)
        tl.store(floors + place, tl.where(n_low == k, low - 1, low).to(tl.int32))
        tl.store(n_above + place, tl.where(n_low == k, k, n_high))
        guess = tl.maximum(low, SMALLEST + 1)
        step = tl.full((), STEP, tl.int64)


@jit
def _gather_kernel(
    pre, floors, n_above, values, columns, F, length, k,
    BLOCK: tl.constexpr, HALF: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    low_column = tl.program_id(1) * length
    n = tl.minimum(length, F - low_column)
    source = pre + tl.program_id(0).to(tl.int64) * F + low_column
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    floor, above_in_all = tl.load(floors + place), tl.load(n_above + place)
    # In order of columns, those above the floor, and after them those at the floor until there are k.
    before = tl.zeros((), tl.int32)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(source + at, mask=at < n, other=0.0)
        key = _keys(value, at < n, HALF, SMALLEST)
        above, equal = key > floor, (key == floor) & (at < n)
        marks = (above.to(tl.int32) << 16) + equal.to(tl.int32)
        running = before + tl.cumsum(marks, axis=0)
        rank = tl.where(above, running >> 16, above_in_all + (running & 0xFFFF)) - 1
        keep = (above | equal) & (rank < k)
        tl.store(values + place * k + rank, value.to(tl.float32), mask=keep)
        tl.store(columns + place * k + rank, low_column + at, mask=keep)
        before += tl.sum(marks, axis=0)


def _largest(pre: Tensor, k: int, length: int) -> tuple[Tensor, Tensor]:
    """The k largest of each `length` neighbours in a row: (B, F) -> values and int32 columns, (B, parts·k)."""
    B, F = pre.shape
    parts = -(-F // length)
    values = torch.empty(B, parts * k, dtype=torch.float32, device=pre.device)
    columns = torch.empty_like(values, dtype=torch.int32)
    floors = torch.empty(B, parts, dtype=torch.int32, device=pre.device)
    n_above = torch.empty_like(floors)
    half = pre.dtype == torch.bfloat16
    keys = {"HALF": half, "SMALLEST": -(2**15) if half else -(2**31)}
    block = max(128, _power_of_two(length))
    rows = min(MOST_IN_TURN, max(1, B // PROGRAMS))
    sizes = {"ROWS": rows, "BLOCK": block, "STEP": 2**5 if half else 2**21, "num_warps": min(8, max(1, block // 2048))}
    _launch(_floor_kernel, (-(-B // rows), parts), pre, floors, n_above, B, F, length, k, **keys, **sizes)
    sizes = {"BLOCK": min(block, CHUNK), "num_warps": 1}
    _launch(_gather_kernel, (B, parts), pre, floors, n_above, values, columns, F, length, k, **keys, **sizes)
    return values, columns


def top_codes(pre: Tensor, k: int) -> Codes:
    """The k largest pre-activations (B, F) of each row, negative ones as zero; among equals, the first columns."""
    B, F = pre.shape
    if pre.dtype not in (torch.bfloat16, torch.float32) or k > min(F, SLICE // 8) or F > 2**20:
        return select.top_codes(pre, k)
    pre, parts = pre.contiguous(), -(-F // SLICE)
    values, columns = _largest(pre, k, F if parts == 1 else -(-F // parts // 16) * 16)
    while values.shape[1] > k:  # the largest of each slice compete
        values, picked = _largest(values, k, min(values.shape[1], SLICE // k * k))
        columns = columns.gather(1, picked.long())
    row_starts = torch.arange(0, B * k + 1, k, dtype=torch.int32, device=pre.device)
    return Codes(row_starts, columns.flatten(), values.flatten().relu_(), F)


# --- Adam: a program takes a latent -------------------------------------------------------------------------------


@jit
def _one_minus_exp(x):
    """1 − eˣ for x ≤ 0, to all digits also where that is tiny."""
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5))))
    return tl.where(x > -0.1, series, 1 - tl.exp(x))


@jit
def _adam_kernel(
    parameter, mean, square, gradient, copy, rate, n_steps, shrink, failed, D, rate_share,
    beta1, complement1, log_beta1, beta2, complement2, log_beta2, eps,
    UNIT: tl.constexpr, SHRINK: tl.constexpr, COPY: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if tl.load(failed) == 0:
        d = tl.arange(0, BLOCK_D)
        at = tl.program_id(0).to(tl.int64) * D + d
        g = tl.load(gradient + at, mask=d < D, other=0.0)
        if SHRINK:
            g /= tl.load(shrink)
        m = beta1 * tl.load(mean + at, mask=d < D, other=0.0) + complement1 * g
        v = beta2 * tl.load(square + at, mask=d < D, other=0.0) + complement2 * g * g
        n = tl.load(n_steps)
        unbiased_m = m / _one_minus_exp(n * log_beta1)
        unbiased_v = v / _one_minus_exp(n * log_beta2)
        p = tl.load(parameter + at, mask=d < D, other=0.0)
        p -= rate_share * tl.load(rate) * unbiased_m / (tl.sqrt(unbiased_v) + eps)
        if UNIT:
            p /= tl.sqrt(tl.sum(p * p, axis=0))
        tl.store(parameter + at, p, mask=d < D)
        tl.store(mean + at, m, mask=d < D)
        tl.store(square + at, v, mask=d < D)
        if COPY:
            tl.store(copy + at, p, mask=d < D)


def adam_rows(
    adam: Adam, triple: Triple, gradient: Tensor, rate_share: float, *, unit: bool, copy: Tensor | None
) -> None:
    """Move the rows of a matrix (F, D), at a share of the rate; then give them `unit` norm; then let a copy follow."""
    F, D = triple[0].shape
    tensors = (*triple, gradient) if copy is None else (*triple, gradient, copy)
    is_plain = isinstance(adam.lr, Tensor) and adam.failed is not None and all(t.is_contiguous() for t in tensors)
    if not is_plain or D > WIDEST_ROW:
        reference.adam_rows(adam, triple, gradient, rate_share, unit=unit, copy=copy)
        return
    unread = adam.lr  # stands where the kernel reads nothing
    arguments = (*triple, gradient, unread if copy is None else copy)
    arguments += (adam.lr, adam.n_steps, unread if adam.shrink is None else adam.shrink, adam.failed, D, rate_share)
    for beta in adam.betas:
        arguments += (beta, 1 - beta, math.log(beta))
    marks = {"UNIT": unit, "SHRINK": adam.shrink is not None, "COPY": copy is not None}
    block = max(16, _power_of_two(D))
    _launch(_adam_kernel, (F,), *arguments, EPS, **marks, BLOCK_D=block, num_warps=_warps(block))
