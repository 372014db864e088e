"""Selection of pre-activations: the largest of each token (TopK) or of a whole batch (BatchTopK), or all above zero."""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saerelay.sae.kernels import select
from saerelay.sae.kernels.codes import Codes
from saerelay.sae.kernels.triton.launching import jit, launch, power_of_two, tl

SLICE = 16384
"""The most pre-activations that one program selects from."""
PROGRAMS, MOST_IN_TURN = 512, 8
"""The smallest number of programs that a selection is spread over, if there are that many tokens; and the most tokens
that one program searches in turn, each from the bound that it found for the token before."""
CHUNK = 256
"""How many pre-activations a warp inspects at once for the ones to keep."""
MANY_SLICES = 4096
"""From this number of slices on, one warp per slice is enough to fill a GPU; below it, eight warps share a slice."""
COUNTED, LOOPS = 2048, 32
"""How many pre-activations a program counts at once when selecting from a whole batch, and how often it does so (fewer
than 256 times, since its counters are bytes)."""


@jit
def _keys(value, inside, HALF: tl.constexpr, SMALLEST: tl.constexpr):
    """Return integers that are ordered as the floats are, with NaN last; 16 bits are enough for bfloat16."""
    bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    key = tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    if HALF:
        key = key >> 16
    return tl.where(inside, key, SMALLEST)


@jit
def _floor_kernel(
    pre, floors, room, B, F, length, k,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, SMALLEST: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    low_column = tl.program_id(1) * length
    n = tl.minimum(length, F - low_column)
    at = tl.arange(0, BLOCK)
    guess = tl.zeros((), tl.int64)
    step = tl.full((), -SMALLEST, tl.int64)  # the first row is searched over its whole range
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i in range(tl.minimum(ROWS, B - first)):
        row = first + i
        source = pre + row * F + low_column
        key = _keys(tl.load(source + at, mask=at < n, other=0.0), at < n, HALF, SMALLEST)
        # Invariant: at least k keys are >= low, and fewer than k are >= high. Starting from a guess, the stride doubles
        # until the k-th largest key lies between low and high; from there on the interval is halved.
        low = tl.full((), SMALLEST, tl.int64)
        high = tl.full((), -SMALLEST, tl.int64)
        n_low = tl.full((), BLOCK + 1, tl.int32)
        n_high = tl.zeros((), tl.int32)
        probe = guess
        while (high - low > 1) & (n_low != k):
            if HALF:  # each key below the probe adds −1: two instructions instead of three
                reached = BLOCK + tl.sum((key - probe.to(tl.int32)) >> 31, axis=0)
            else:
                reached = tl.sum((key >= probe.to(tl.int32)).to(tl.int32), axis=0)
            enough = reached >= k
            low = tl.where(enough, probe, low)
            n_low = tl.where(enough, reached, n_low)
            high = tl.where(enough, high, probe)
            n_high = tl.where(enough, n_high, reached)
            stride = tl.minimum(step, (high - low) // 2)
            probe = tl.where(enough, low + stride, high - stride)
            step = tl.minimum(step * 2, -2 * SMALLEST)
        # The k largest are either exactly the keys >= low, or the keys above low and some of those equal to it.
        slice_at = row * tl.num_programs(1) + tl.program_id(1)
        tl.store(floors + slice_at, tl.where(n_low == k, low - 1, low).to(tl.int32))
        tl.store(room + slice_at, tl.where(n_low == k, 0, k - n_high))
        guess = tl.maximum(low, SMALLEST + 1)
        step = tl.full((), STEP, tl.int64)


@jit
def _gather_kernel(
    pre, starts, floors, room, values, columns, n_places, F, length,
    BLOCK: tl.constexpr, HALF: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    low_column = tl.program_id(1) * length
    n = tl.minimum(length, F - low_column)
    source = pre + tl.program_id(0).to(tl.int64) * F + low_column
    slice_at = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    start, floor, room_at_floor = tl.load(starts + slice_at), tl.load(floors + slice_at), tl.load(room + slice_at)
    before = tl.zeros((), tl.int32)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(source + at, mask=at < n, other=0.0)
        key = _keys(value, at < n, HALF, SMALLEST)
        if tl.max(key, axis=0) >= floor:  # many stretches hold nothing to keep
            above, equal = key > floor, (key == floor) & (at < n)
            marks = (above.to(tl.int32) << 16) + equal.to(tl.int32)  # two counters in one integer
            running = before + tl.cumsum(marks, axis=0)
            n_above, n_equal = (running >> 16) & 0xFFFF, running & 0xFFFF
            place = start + n_above + tl.minimum(n_equal, room_at_floor) - 1
            keep = (above | (equal & (n_equal <= room_at_floor))) & (place < n_places)
            tl.store(values + place, value.to(tl.float32), mask=keep)
            tl.store(columns + place, low_column + at, mask=keep)
            before += tl.sum(marks, axis=0)


def _gather(
    pre: Tensor, starts: Tensor, floors: Tensor, room: Tensor, n: int, length: int, *, fill: bool = False
) -> tuple[Tensor, Tensor]:
    """Collect the values and int32 columns (n) of the selected pre-activations, in order of columns.

    If more than n are selected, the last ones are left out; if fewer may be, `fill` puts zeros into the other places.

    Rows of `pre` (B, F) are cut into slices of `length`. For each slice, row by row, `floors` has the key above which
    all are selected, `room` the number of those equal to it that are selected too (the first ones), and `starts` the
    place of the slice's first value in the result.
    """
    B, F = pre.shape
    make = torch.zeros if fill else torch.empty
    values = make(n, dtype=torch.float32, device=pre.device)
    columns = make(n, dtype=torch.int32, device=pre.device)
    grid = (B, -(-F // length))
    warps = 1 if grid[0] * grid[1] >= MANY_SLICES else 8
    sizes = {"BLOCK": warps * CHUNK, "num_warps": warps}
    launch(_gather_kernel, grid, pre, starts, floors, room, values, columns, n, F, length, **_order(pre), **sizes)
    return values, columns


def _order(pre: Tensor) -> dict[str, Any]:
    """Return the constants by which `_keys` orders pre-activations of this dtype."""
    half = pre.dtype == torch.bfloat16
    return {"HALF": half, "SMALLEST": -(2**15) if half else -(2**31)}


def _largest(pre: Tensor, k: int, length: int) -> tuple[Tensor, Tensor]:
    """Select the k largest in each slice of `length` columns: (B, F) -> values and int32 columns, (B, parts·k)."""
    B, F = pre.shape
    parts = -(-F // length)
    floors = torch.empty(B, parts, dtype=torch.int32, device=pre.device)
    room = torch.empty_like(floors)
    rows = min(MOST_IN_TURN, max(1, B // PROGRAMS))
    block = max(128, power_of_two(length))
    step = 2**5 if pre.dtype == torch.bfloat16 else 2**21  # a quarter of an octave
    sizes = {"ROWS": rows, "BLOCK": block, "STEP": step, "num_warps": min(8, max(1, block // 2048))}
    grid = (-(-B // rows), parts)
    launch(_floor_kernel, grid, pre, floors, room, B, F, length, k, **_order(pre), **sizes)
    starts = torch.arange(0, B * parts * k, k, device=pre.device)
    values, columns = _gather(pre, starts, floors, room, B * parts * k, length)
    return values.view(B, parts * k), columns.view(B, parts * k)


def top_codes(pre: Tensor, k: int) -> Codes:
    """Select the k largest pre-activations (B, F) of each row, negative ones as zero; of equal ones, the first."""
    B, F = pre.shape
    if pre.dtype not in (torch.bfloat16, torch.float32) or k > min(F, SLICE // 8) or F > 2**20:
        return select.top_codes(pre, k)
    pre, parts = pre.contiguous(), -(-F // SLICE)
    values, columns = _largest(pre, k, F if parts == 1 else -(-F // parts // 16) * 16)
    while values.shape[1] > k:  # select among the largest of each slice
        values, picked = _largest(values, k, min(values.shape[1], SLICE // k * k))
        columns = columns.gather(1, picked.long())
    row_starts = torch.arange(0, B * k + 1, k, dtype=torch.int32, device=pre.device)
    return Codes(row_starts, columns.flatten(), values.flatten().relu_(), F)


@jit
def _digits_kernel(
    pre, search, found, n,
    LOOPS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, SMALLEST: tl.constexpr,
    SHIFT: tl.constexpr, DIGITS: tl.constexpr,
):  # fmt: skip
    low = tl.load(search)
    counts = tl.zeros((BLOCK,), tl.int64)  # eight one-byte counters in each number
    for i in range(LOOPS):
        at = (tl.program_id(0).to(tl.int64) * LOOPS + i) * BLOCK + tl.arange(0, BLOCK)
        key = _keys(tl.load(pre + at, mask=at < n, other=0.0), at < n, HALF, SMALLEST)
        above_low = key - low.to(tl.int32) if HALF else key.to(tl.int64) - low
        digit = above_low >> SHIFT
        inside = (digit >= 0) & (digit < DIGITS) & (at < n)
        counts += tl.where(inside, tl.full((), 1, tl.int64) << (8 * (digit & 7)).to(tl.int64), 0)
    for digit in tl.static_range(8):
        tl.store(found + tl.program_id(0) * 8 + digit, tl.sum(((counts >> (8 * digit)) & 255).to(tl.int32), axis=0))


@jit
def _narrow_kernel(found, search, n_wanted, n_programs, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    digit = tl.arange(0, 8)
    counts = tl.zeros((8,), tl.int64)
    for first in range(0, n_programs, BLOCK):
        program = first + tl.arange(0, BLOCK)
        inside = (program < n_programs)[:, None]
        part = tl.load(found + program[:, None] * 8 + digit[None, :], mask=inside, other=0)
        counts += tl.sum(part.to(tl.int64), axis=0)
    low, n_above = tl.load(search), tl.load(search + 1)
    reached = (
        n_above + tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
    )  # number of keys with this digit or a larger one, or above them all
    chosen = tl.maximum(tl.sum((reached >= n_wanted).to(tl.int32), axis=0) - 1, 0)
    tl.store(search, low + (chosen.to(tl.int64) << SHIFT))
    tl.store(search + 1, n_above + tl.sum(tl.where(digit > chosen, counts, 0), axis=0))


@jit
def _row_counts_kernel(
    pre, search, above, equal, F, BLOCK: tl.constexpr, HALF: tl.constexpr, SMALLEST: tl.constexpr
):  # fmt: skip
    source = pre + tl.program_id(0).to(tl.int64) * F
    floor = tl.load(search).to(tl.int32)
    n_above = tl.zeros((BLOCK,), tl.int32)
    n_equal = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, F, BLOCK):
        at = first + tl.arange(0, BLOCK)
        key = _keys(tl.load(source + at, mask=at < F, other=0.0), at < F, HALF, SMALLEST)
        n_above += (key > floor).to(tl.int32)
        n_equal += ((key == floor) & (at < F)).to(tl.int32)
    tl.store(above + tl.program_id(0), tl.sum(n_above, axis=0))
    tl.store(equal + tl.program_id(0), tl.sum(n_equal, axis=0))


def _floor_of_all(pre: Tensor, n: int) -> Tensor:
    """Return the key of the n-th largest of all pre-activations (B, F), and the number of keys above it: int64 (2).

    A radix search: three bits at a time, from the highest, it counts the remaining candidates by their next digit and
    keeps those with the digit in which the n-th largest lies.
    """
    bits = 16 if pre.dtype == torch.bfloat16 else 32
    search = torch.zeros(2, dtype=torch.int64, device=pre.device)
    search[0].fill_(-(2 ** (bits - 1)))
    n_programs = -(-pre.numel() // (COUNTED * LOOPS))
    found = torch.empty(n_programs, 8, dtype=torch.int32, device=pre.device)
    while bits:
        taken = min(3, bits)
        bits -= taken
        digits = {"SHIFT": bits, "DIGITS": 2**taken}
        sizes = {"LOOPS": LOOPS, "BLOCK": COUNTED}
        launch(_digits_kernel, (n_programs,), pre, search, found, pre.numel(), **sizes, **_order(pre), **digits)
        launch(_narrow_kernel, (1,), found, search, n, n_programs, BLOCK=128, SHIFT=bits)
    return search


def top_codes_of_batch(pres: Sequence[Tensor], n: int) -> list[Codes]:
    """Select the n largest of all pre-activations of a batch, negative ones as zero; among equals, the first ones.

    `pres` holds the batch (B, F) as a single piece.
    """
    (pre,) = pres
    B, F = pre.shape
    if pre.dtype not in (torch.bfloat16, torch.float32) or F >= 2**16 or not 0 < n < pre.numel():
        return select.top_codes_of_batch([pre], n)
    pre = pre.contiguous()
    search = _floor_of_all(pre, n)
    above = torch.empty(B, dtype=torch.int32, device=pre.device)
    equal = torch.empty_like(above)
    launch(_row_counts_kernel, (B,), pre, search, above, equal, F, BLOCK=COUNTED, **_order(pre))

    # Values equal to the floor are selected from the first rows on, until there are n in all.
    equal_before = equal.cumsum(0) - equal
    room = (n - search[1] - equal_before).clamp(min=0).int()
    row_starts = torch.zeros(B + 1, dtype=torch.int32, device=pre.device)
    torch.cumsum(above + torch.minimum(equal, room), 0, dtype=torch.int32, out=row_starts[1:])
    values, columns = _gather(pre, row_starts, search[0].int().expand(B).contiguous(), room, n, F)
    return [Codes(row_starts, columns, values.relu_(), F)]


def positive_codes(pre: Tensor, room: int) -> tuple[Codes, Tensor]:
    """Select all positive pre-activations (B, F): see `select.positive_codes`."""
    B, F = pre.shape
    if pre.dtype not in (torch.bfloat16, torch.float32) or F >= 2**16:
        return select.positive_codes(pre, room)
    pre = pre.contiguous()
    zero = torch.zeros(B, dtype=torch.int32, device=pre.device)  # the key of 0.0
    above, equal = torch.empty_like(zero), torch.empty_like(zero)
    launch(_row_counts_kernel, (B,), pre, zero, above, equal, F, BLOCK=COUNTED, **_order(pre))
    ends = above.cumsum(0)
    row_starts = torch.zeros(B + 1, dtype=torch.int32, device=pre.device)
    row_starts[1:] = ends.clamp(max=room)
    values, columns = _gather(pre, row_starts, zero, zero, room, F, fill=True)
    return Codes(row_starts, columns, values, F, is_padded=True), ends[-1]
