"""Sparse codes of a batch, in compressed row form."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Codes:
    """The non-zero codes Z (B, F) of a batch, row by row.

    Row i's entries are `columns[row_starts[i]:row_starts[i + 1]]`, with `values` beside them. Entries that a rule
    selected but whose value is zero may be kept: they contribute nothing.
    """

    row_starts: Tensor
    """int32 (B + 1)."""
    columns: Tensor
    """int32 (n_active)."""
    values: Tensor
    """(n_active)."""
    n_latents: int
    _transpose: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list, repr=False)

    @property
    def n_rows(self) -> int:
        """Number of tokens B."""
        return self.row_starts.shape[0] - 1

    def rows(self) -> Tensor:
        """Row of each entry, int64 (n_active)."""
        counts = (self.row_starts[1:] - self.row_starts[:-1]).long()
        return torch.repeat_interleave(counts, output_size=self.columns.shape[0])

    def with_values(self, values: Tensor) -> "Codes":
        """The same places with other values."""
        return Codes(self.row_starts, self.columns, values, self.n_latents, self._transpose)

    def transpose(self) -> tuple[Tensor, Tensor, Tensor]:
        """Zᵀ's row starts (F + 1), columns (n_active), and the order that takes `values` there; found once."""
        if not self._transpose:
            narrow = np.uint16 if self.n_latents <= 2**16 else np.uint32  # 16-bit keys get numpy's radix sort
            order = torch.from_numpy(np.argsort(self.columns.cpu().numpy().astype(narrow), kind="stable"))
            order = order.to(self.columns.device)
            starts = torch.zeros(self.n_latents + 1, dtype=torch.int32, device=self.columns.device)
            starts[1:] = torch.bincount(self.columns, minlength=self.n_latents).cumsum(0)
            self._transpose.append((starts, self.rows()[order].int(), order))
        return self._transpose[0]


def top_codes(pre: Tensor, k: int) -> Codes:
    """The k largest pre-activations (B, F) of each row, negative ones as zero (TopK)."""
    values, columns = pre.topk(k, dim=1, sorted=False)
    row_starts = torch.arange(0, columns.numel() + 1, k, dtype=torch.int32, device=pre.device)
    return Codes(row_starts, columns.flatten().int(), values.flatten().relu(), pre.shape[1])


def top_codes_of_batch(pre: Tensor, k: int) -> Codes:
    """The k·B largest pre-activations of a batch (B, F), negative ones as zero (BatchTopK)."""
    flat = pre.flatten().topk(k * pre.shape[0], sorted=False).indices.sort().values
    row_starts = torch.zeros(pre.shape[0] + 1, dtype=torch.int32, device=pre.device)
    row_starts[1:] = torch.bincount(flat // pre.shape[1], minlength=pre.shape[0]).cumsum(0)
    return Codes(row_starts, (flat % pre.shape[1]).int(), pre.flatten()[flat].relu(), pre.shape[1])


def nonzero_codes(z: Tensor) -> Codes:
    """The non-zero entries of dense codes (B, F)."""
    row_starts = torch.zeros(z.shape[0] + 1, dtype=torch.int32, device=z.device)
    row_starts[1:] = (z != 0).sum(dim=1).cumsum(0)
    rows, columns = z.nonzero(as_tuple=True)
    return Codes(row_starts, columns.int(), z[rows, columns], z.shape[1])


def join_codes(parts: list[Codes]) -> Codes:
    """The codes of several batches as those of one."""
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + part.columns.shape[0])
    starts = [part.row_starts[:-1] + end for part, end in zip(parts, ends, strict=False)]
    last = torch.tensor([ends[-1]], dtype=torch.int32, device=parts[0].columns.device)
    columns, values = torch.cat([p.columns for p in parts]), torch.cat([p.values for p in parts])
    return Codes(torch.cat([*starts, last]), columns, values, parts[0].n_latents)


def split_codes(codes: Codes, n_rows: int) -> list[Codes]:
    """The codes of a batch, cut into batches of at most `n_rows` tokens."""
    parts = []
    for first in range(0, codes.n_rows, n_rows):
        starts = codes.row_starts[first : first + n_rows + 1]
        low, high = int(starts[0]), int(starts[-1])
        parts.append(Codes(starts - low, codes.columns[low:high], codes.values[low:high], codes.n_latents))
    return parts


def dense_codes(codes: Codes) -> Tensor:
    """Z itself, (B, F)."""
    z = codes.values.new_zeros(codes.n_rows, codes.n_latents)
    return z.index_put_((codes.rows(), codes.columns.long()), codes.values)
