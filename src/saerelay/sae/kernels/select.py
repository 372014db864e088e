"""Selection of active latents from dense pre-activations, without sorting them.

Latents are put into groups of 16: one pass over memory finds each group's maximum, and the few groups whose maximum
reaches a bound hold all values that reach it. Shapes: B tokens, F latents, G latents in a group, F/G groups.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from saerelay.sae.dictionary import widened
from saerelay.sae.kernels.codes import Codes
from saerelay.sae.threads import in_parallel

GROUP = 16


# --- the k largest of each token ----------------------------------------------------------------------------------


def top_codes(pre: Tensor, k: int) -> Codes:
    """The k largest pre-activations (B, F) of each row, negative ones as zero (TopK)."""
    B, F = pre.shape
    if pre.device.type != "cpu" or F % GROUP or F < 4 * GROUP * k:
        values, columns = pre.topk(k, dim=1, sorted=False)
    else:
        values, columns = _top_by_groups(pre, k)
    row_starts = torch.arange(0, B * k + 1, k, dtype=torch.int32, device=pre.device)
    return Codes(row_starts, columns.flatten().int(), widened(values.flatten().relu()), F)


def _top_by_groups(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns (B, k) of the k largest of each row, in no order.

    The k-th largest of a row's group maxima is a bound: k values reach it, so the k largest do. It is seldom far below
    the k-th largest value, so few other values reach it, and all of them are in the k groups with the largest maxima.
    """
    groups = _groups(pre)
    maxima, group = groups.amax(1).topk(k, dim=1, sorted=False)
    bound = maxima.amin(dim=1, keepdim=True)
    row = torch.arange(pre.shape[0]).repeat_interleave(k)
    candidates = _reaching(groups, row, group.flatten(), bound)
    return _largest_of_ragged(*candidates, pre.shape[0], k)


def _largest_of_ragged(rows: Tensor, columns: Tensor, values: Tensor, n_rows: int, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns (B, k) of the k largest of each row's entries, which are given row by row.

    Entries are laid out in a table as wide as the longest row; shorter rows are filled up with −∞.
    """
    counts = torch.bincount(rows, minlength=n_rows)
    width = max(k, int(counts.max()))  # a row of NaN has fewer than k entries
    first_of_row = counts.cumsum(0) - counts
    place_in_row = torch.arange(rows.shape[0]) - first_of_row[rows]
    position = rows * width + place_in_row
    table = values.new_full((n_rows * width,), -torch.inf).index_copy_(0, position, values)
    table_columns = columns.new_zeros(n_rows * width).index_copy_(0, position, columns)
    top, index = table.view(n_rows, width).topk(k, dim=1, sorted=False)
    return top, table_columns.view(n_rows, width).gather(1, index)


# --- the largest of a batch ---------------------------------------------------------------------------------------


def top_codes_of_batch(pres: Sequence[Tensor], n: int) -> list[Codes]:
    """The n largest of all pre-activations of a batch, given in pieces (rows, F), negative ones as zero (BatchTopK).

    Each piece is searched above a bound that is guessed from some of its rows. Where the guess was too high, the piece
    may hold more of the largest values: it is searched again, above the lowest bound of all.
    """
    if pres[0].device.type != "cpu":
        return [_top_of_all(pre, n) for pre in pres]  # one piece: an accelerator takes the whole batch
    n_rows = sum(pre.shape[0] for pre in pres)
    bounds = in_parallel(lambda pre: _guessed_bound(pre, n // n_rows), pres)
    candidates = in_parallel(lambda i: codes_at_least(pres[i], bounds[i]), range(len(pres)))
    kept, smallest = _keep_largest(candidates, n)
    missed = [i for i, bound in enumerate(bounds) if float(bound) > smallest]
    if missed:
        lowest = min(smallest, *(float(bound) for bound in bounds))
        for i in missed:
            candidates[i] = codes_at_least(pres[i], torch.full_like(bounds[i], lowest))
        kept, _ = _keep_largest(candidates, n)
    return [codes.with_values(codes.values.relu()) for codes in kept]


def _top_of_all(pre: Tensor, n: int) -> Codes:
    """The n largest of pre-activations (B, F), negative ones as zero."""
    B, F = pre.shape
    largest = pre.flatten().topk(n, sorted=False).indices.sort().values
    first_of_row = torch.arange(0, (B + 1) * F, F, device=pre.device)
    row_starts = torch.searchsorted(largest, first_of_row, out_int32=True)
    values = widened(pre.flatten()[largest].relu())
    return Codes(row_starts, (largest % F).int(), values, F)


def _guessed_bound(pre: Tensor, k: int) -> Tensor:
    """A guess, from some rows, of a bound below the (k·B)-th largest of pre-activations (B, F); a scalar."""
    sample = pre[:: max(1, pre.shape[0] // 64)]
    maxima = _groups(sample).amax(1) if pre.shape[1] % GROUP == 0 else sample
    n = min(maxima.numel(), sample.shape[0] * k * 5 // 4)
    return maxima.flatten().topk(n, sorted=False).values.amin()


def _keep_largest(parts: list[Codes], n: int) -> tuple[list[Codes], float]:
    """The n largest entries of all parts together (the first of equal ones), and the smallest of them.

    How to see this: everything above the n-th largest value is kept; the remaining room goes to entries equal to that
    value, part by part from the first on. A part's new row starts are the numbers of entries kept before its old ones.
    """
    values = np.concatenate([part.values.numpy() for part in parts])
    if values.shape[0] <= n:
        return parts, -math.inf
    smallest = float(np.partition(values, values.shape[0] - n)[values.shape[0] - n])
    room_for_ties = n - int((values > smallest).sum())
    kept = []
    for part in parts:
        keep = part.values > smallest
        ties = (part.values == smallest).nonzero().squeeze(1)[:room_for_ties]
        keep[ties] = True
        room_for_ties -= ties.shape[0]
        kept_before = torch.zeros(keep.shape[0] + 1, dtype=torch.int32)
        torch.cumsum(keep, 0, out=kept_before[1:])
        row_starts = kept_before[part.row_starts.long()]
        kept.append(Codes(row_starts, part.columns[keep], part.values[keep], part.n_latents))
    return kept, smallest


# --- all above a bound --------------------------------------------------------------------------------------------


def codes_at_least(pre: Tensor, bound: Tensor) -> Codes:
    """All pre-activations (B, F) that are at least `bound`, a scalar."""
    bound = bound.expand(pre.shape[0], 1)
    if pre.shape[1] % GROUP or pre.device.type != "cpu":
        rows, columns = (pre >= bound).nonzero(as_tuple=True)
        return _row_by_row(pre, rows, columns, pre[rows, columns])
    groups = _groups(pre)
    rows, group = (groups.amax(1) >= bound).nonzero(as_tuple=True)
    return _row_by_row(pre, *_reaching(groups, rows, group, bound))


def positive_codes(pre: Tensor, room: int) -> tuple[Codes, Tensor]:
    """All positive pre-activations (B, F), and their number (int64), without waiting to know it.

    The codes have `room` places. If there are more of them, the last ones are left out. NaN counts as positive, so that
    it is not overlooked.

    >>> codes, n = positive_codes(torch.tensor([[0.0, 2.0, -1.0], [3.0, 0.0, 4.0]]), room=5)
    >>> int(n), codes.row_starts.tolist(), codes.columns.tolist(), codes.values.tolist()
    (3, [0, 1, 3], [1, 0, 2, 0, 0], [2.0, 3.0, 4.0, 0.0, 0.0])
    """
    B, F = pre.shape
    positive = ~(pre <= 0)
    ends = positive.sum(dim=1).cumsum(0)
    row_starts = torch.zeros(B + 1, dtype=torch.int32, device=pre.device)
    row_starts[1:] = ends.clamp(max=room)
    place = positive.flatten().cumsum(0) - 1
    place = torch.where(positive.flatten(), place, room).clamp_(max=room)  # the place after the last is thrown away
    columns = torch.zeros(room + 1, dtype=torch.int32, device=pre.device)
    columns.scatter_(0, place, torch.arange(F, dtype=torch.int32, device=pre.device).repeat(B))
    wide = widened(pre.flatten())
    values = wide.new_zeros(room + 1).scatter_(0, place, wide)
    return Codes(row_starts, columns[:room], values[:room], F, is_padded=True), ends[-1]


def nonzero_codes(z: Tensor) -> Codes:
    """The non-zero entries of dense codes (B, F)."""
    rows, columns = z.nonzero(as_tuple=True)
    return _row_by_row(z, rows, columns, z[rows, columns])


# --- groups -------------------------------------------------------------------------------------------------------


def _groups(pre: Tensor) -> Tensor:
    """(B, F) -> (B, G, F/G): group j is columns j, j + F/G, j + 2F/G ..., so that maxima are computed side by side."""
    return pre.view(pre.shape[0], GROUP, -1)


def _reaching(groups: Tensor, rows: Tensor, group: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and value of those members of the given groups that are at least their row's bound (B, 1)."""
    members = groups[rows, :, group]
    hit, member = (members >= bound[rows]).nonzero(as_tuple=True)
    columns = group[hit] + member * groups.shape[2]
    return rows[hit], columns, members[hit, member]


def _row_by_row(pre: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> Codes:
    """Codes from entries of pre-activations (B, F) that are given row by row."""
    all_rows = torch.arange(pre.shape[0] + 1, device=pre.device)
    row_starts = torch.searchsorted(rows, all_rows, out_int32=True)
    return Codes(row_starts, columns.int(), widened(values), pre.shape[1])
