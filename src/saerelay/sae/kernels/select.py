"""Selection of active latents from dense pre-activations, without sorting them.

Latents are put into groups of 16: one pass over memory finds each group's maximum, and the few groups whose maximum
reaches a bound hold everything that does. Shapes: B tokens, F latents, G latents in a group, F/G groups.
"""

import math

import numpy as np
import torch
from torch import Tensor

from saerelay.sae.kernels.codes import Codes

GROUP = 16


def top_codes(pre: Tensor, k: int) -> Codes:
    """The k largest pre-activations (B, F) of each row, negative ones as zero (TopK).

    The k-th largest of the groups' maxima is not above the k-th largest value, and seldom far below.
    """
    B, F = pre.shape
    if pre.device.type != "cpu" or F % GROUP or F < 4 * GROUP * k:
        values, columns = pre.topk(k, dim=1, sorted=False)
    else:
        groups = _groups(pre)
        maxima, group = groups.amax(1).topk(k, dim=1, sorted=False)
        bound, group = maxima.amin(dim=1, keepdim=True), group.flatten()
        rows = torch.arange(B).repeat_interleave(k)
        values, columns = _widest(*_reaching(groups, rows, group, bound), B, k)
    row_starts = torch.arange(0, B * k + 1, k, dtype=torch.int32, device=pre.device)
    return Codes(row_starts, columns.flatten().int(), values.flatten().relu().to(_wide(pre)), F)


def top_codes_of_batch(pre: Tensor, k: int) -> Codes:
    """The k·B largest pre-activations of a batch (B, F), negative ones as zero (BatchTopK)."""
    flat = pre.flatten().topk(k * pre.shape[0], sorted=False).indices.sort().values
    row_starts = torch.zeros(pre.shape[0] + 1, dtype=torch.int32, device=pre.device)
    row_starts[1:] = torch.bincount(flat // pre.shape[1], minlength=pre.shape[0]).cumsum(0)
    values = pre.flatten()[flat].relu().to(_wide(pre))
    return Codes(row_starts, (flat % pre.shape[1]).int(), values, pre.shape[1])


def at_least(pre: Tensor, bound: Tensor) -> Codes:
    """All pre-activations (B, F) that are at least `bound`, a scalar."""
    bound = bound.expand(pre.shape[0], 1)
    if pre.shape[1] % GROUP:
        rows, columns = (pre >= bound).nonzero(as_tuple=True)
        return _codes(pre, rows, columns, pre[rows, columns])
    groups = _groups(pre)
    rows, group = (groups.amax(1) >= bound).nonzero(as_tuple=True)
    return _codes(pre, *_reaching(groups, rows, group, bound))


def _reaching(groups: Tensor, rows: Tensor, group: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and value of those members of some rows' groups that are at least the row's bound (B, 1)."""
    members = groups[rows, :, group]
    hit, member = (members >= bound[rows]).nonzero(as_tuple=True)
    return rows[hit], group[hit] + member * groups.shape[2], members[hit, member]


def _codes(pre: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> Codes:
    row_starts = torch.searchsorted(rows, torch.arange(pre.shape[0] + 1, device=pre.device), out_int32=True)
    return Codes(row_starts, columns.int(), values.to(_wide(pre)), pre.shape[1])


def bound_of_batch(pre: Tensor, k: int) -> Tensor:
    """A guess, from some rows, below the (k·B)-th largest of pre-activations (B, F); a scalar."""
    some = pre[:: max(1, pre.shape[0] // 64)]
    maxima = (_groups(some).amax(1) if pre.shape[1] % GROUP == 0 else some).flatten()
    return maxima.topk(min(maxima.shape[0], some.shape[0] * k * 5 // 4), sorted=False).values.amin()


def keep_largest(parts: list[Codes], n: int) -> tuple[list[Codes], float]:
    """The n largest entries of all parts together (the first of equal ones), and the smallest of them."""
    values = np.concatenate([part.values.numpy() for part in parts])
    if values.shape[0] <= n:
        return parts, -math.inf
    smallest = float(np.partition(values, values.shape[0] - n)[values.shape[0] - n])
    room, kept = n - int((values > smallest).sum()), []
    for part in parts:
        keep = part.values > smallest
        ties = (part.values == smallest).nonzero().squeeze(1)[:room]
        keep[ties] = True
        room -= ties.shape[0]
        before = torch.zeros(keep.shape[0] + 1, dtype=torch.int32)
        torch.cumsum(keep, 0, out=before[1:])
        starts = before[part.row_starts.long()]
        kept.append(Codes(starts, part.columns[keep], part.values[keep], part.n_latents))
    return kept, smallest


def nonzero_codes(z: Tensor) -> Codes:
    """The non-zero entries of dense codes (B, F)."""
    row_starts = torch.zeros(z.shape[0] + 1, dtype=torch.int32, device=z.device)
    row_starts[1:] = (z != 0).sum(dim=1).cumsum(0)
    rows, columns = z.nonzero(as_tuple=True)
    return Codes(row_starts, columns.int(), z[rows, columns], z.shape[1])


def _groups(pre: Tensor) -> Tensor:
    """(B, F) -> (B, G, F/G): group j is columns j, j + F/G, j + 2F/G ..., so that maxima are taken side by side."""
    return pre.view(pre.shape[0], GROUP, -1)


def _widest(rows: Tensor, columns: Tensor, values: Tensor, n_rows: int, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row's entries, which come row by row: values and columns (B, k)."""
    counts = torch.bincount(rows, minlength=n_rows)
    width = max(k, int(counts.max()))  # a row of NaN has fewer
    place = torch.arange(rows.shape[0]) + (rows * width - (counts.cumsum(0) - counts)[rows])
    spread = values.new_full((n_rows * width,), -torch.inf).index_copy_(0, place, values)
    where = columns.new_zeros(n_rows * width).index_copy_(0, place, columns)
    values, best = spread.view(n_rows, width).topk(k, dim=1, sorted=False)
    return values, where.view(n_rows, width).gather(1, best)


def _wide(pre: Tensor) -> torch.dtype:
    """What values are kept in: half-precision ones as float32."""
    return torch.float32 if pre.element_size() < 4 else pre.dtype
