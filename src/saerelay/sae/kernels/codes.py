"""Sparse codes of a batch, in compressed row form: what selection returns, and sparse products and refits take."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Codes:
    """The non-zero codes Z (B, F) of a batch, row by row.

    The entries of row i are `columns[row_starts[i]:row_starts[i + 1]]`, with `values` beside them. Selected entries
    whose value is zero may be kept: they contribute nothing. `columns` and `values` may be longer than the rows
    together, if they were allocated before anyone knew how many entries there would be (`is_padded`).
    """

    row_starts: Tensor
    """int32 (B + 1)."""
    columns: Tensor
    """int32 (n_active)."""
    values: Tensor
    """(n_active)."""
    n_latents: int
    is_padded: bool = False
    """Whether there are places beyond the last row, with the value 0 at column 0."""
    _transpose: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list, repr=False)
    """The result of `transpose`, once it was asked for; all codes at the same positions share it (`with_values`)."""

    @property
    def n_rows(self) -> int:
        """Number of tokens B."""
        return self.row_starts.shape[0] - 1

    def rows(self) -> Tensor:
        """Row of each entry, int64 (n_active); of places beyond the last row, the last row."""
        if self.is_padded:
            places = torch.arange(self.columns.shape[0], dtype=torch.int32, device=self.columns.device)
            return torch.searchsorted(self.row_starts[1:], places, right=True).clamp_(max=self.n_rows - 1)
        counts = (self.row_starts[1:] - self.row_starts[:-1]).long()
        return torch.repeat_interleave(counts, output_size=self.columns.shape[0])

    def with_values(self, values: Tensor) -> "Codes":
        """The same positions with other values."""
        return replace(self, values=values)

    def transpose(self) -> tuple[Tensor, Tensor, Tensor]:
        """Zᵀ's row starts (F + 1), columns (n_active), and the order that brings `values` there; computed once."""
        if not self._transpose:
            self._transpose.append(self._by_counting() if self.columns.device.type == "cpu" else self._by_sorting())
        return self._transpose[0]

    def transposed(self, latents: slice = slice(None)) -> tuple["Codes", Tensor]:
        """Some rows of Zᵀ (F, B), and where their values are in `values`."""
        starts, rows, order = self.transpose()
        if latents != slice(None) and (latents.start, latents.stop) != (0, self.n_latents):
            low, high = int(starts[latents.start]), int(starts[latents.stop])
            starts, rows, order = starts[latents.start : latents.stop + 1] - low, rows[low:high], order[low:high]
        return Codes(starts, rows, self.values.index_select(0, order), self.n_rows, self.is_padded), order

    def between(self, first: int, last: int) -> tuple["Codes", Tensor]:
        """The codes of latents first ≤ j < last, at their own columns, and where their values are in `values`."""
        places = ((self.columns >= first) & (self.columns < last)).nonzero().squeeze(1)
        rows = torch.arange(self.n_rows + 1, device=self.columns.device)
        starts = torch.searchsorted(self.rows()[places], rows, out_int32=True)
        return Codes(starts, self.columns[places], self.values[places], self.n_latents), places

    def gram(self) -> Tensor:
        """ZᵀZ (F, F), dense; made from the pairs of latents active together, so K² operations per token (on a CPU)."""
        total = self.values.new_zeros(self.n_latents, self.n_latents)
        if total.device.type != "cpu":
            with tensor_cores():
                for part in split_codes(self, 4096):
                    z = dense_codes(part)
                    total.addmm_(z.T, z)
            return total
        z = self._scipy(self.values.numpy())
        z_t = z.T.tocsr()
        for first in range(0, self.n_latents, 2048):
            rows = slice(first, first + 2048)
            total[rows] = torch.from_numpy((z_t[rows] @ z).toarray())
        return total

    def _scipy(self, values: np.ndarray) -> csr_matrix:
        shape = (self.n_rows, self.n_latents)
        return csr_matrix((values, self.columns.numpy(), self.row_starts.numpy()), shape=shape, copy=False)

    def _by_counting(self) -> tuple[Tensor, Tensor, Tensor]:
        z = self._scipy(np.arange(self.columns.shape[0], dtype=np.int32)).tocsc()
        return torch.from_numpy(z.indptr), torch.from_numpy(z.indices), torch.from_numpy(z.data)

    def _by_sorting(self) -> tuple[Tensor, Tensor, Tensor]:
        # Where 16 bits are enough for a latent, a radix sort takes half as many passes.
        key_type = torch.int16 if self.n_latents < 2**15 else torch.int32
        keys = self.columns.to(key_type)
        if self.is_padded:  # what lies beyond the last row belongs to no latent
            places = torch.arange(keys.shape[0], dtype=torch.int32, device=keys.device)
            keys = torch.where(places < self.row_starts[-1], keys, self.n_latents)
        columns, order = keys.sort(stable=True)
        latents = torch.arange(self.n_latents + 1, dtype=key_type, device=columns.device)
        return torch.searchsorted(columns, latents, out_int32=True), self.rows()[order].int(), order


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Let float32 products on a GPU round their operands to TF32 (10 bits), which is several times as fast.

    Accurate enough for systems that are damped, such as the normal equations of a refit, and for AuxK, which is a
    small part of the gradient.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def row_sums(codes: Codes) -> Tensor:
    """Σ of each row's values (B)."""
    return torch.segment_reduce(codes.values, "sum", offsets=codes.row_starts)


def latent_sums(codes: Codes) -> Tensor:
    """Σ of each latent's values (F), in the order of rows: the same bits each time, also on a GPU.

    >>> codes = Codes(torch.tensor([0, 1, 3]), torch.tensor([1, 0, 1]), torch.tensor([1.0, 2.0, 4.0]), n_latents=3)
    >>> latent_sums(codes)
    tensor([2., 5., 0.])
    """
    return row_sums(codes.transposed()[0])


def add_at(total: Tensor, index: Tensor, values: Tensor) -> None:
    """total[index] += values, for (n) indices that may repeat: the same bits each time, also on a GPU.

    On a GPU, `index_add_` adds atomically, in arbitrary order; here equal indices are brought together first.
    """
    if total.device.type == "cpu":
        total.index_add_(0, index, values)
        return
    places, order = index.sort(stable=True)
    ends = torch.arange(total.shape[0] + 1, device=index.device)
    starts = torch.searchsorted(places, ends)
    total += torch.segment_reduce(values[order], "sum", offsets=starts)


def joined(parts: list[Tensor]) -> Tensor:
    """The rows of all parts of a batch; a single part (on a GPU there is only one) is returned without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def added_up(parts: list[Tensor]) -> Tensor:
    """Σ over the parts of a batch, in their order."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)


def join_codes(parts: list[Codes]) -> Codes:
    """Join the codes of several batches into those of one batch."""
    if len(parts) == 1:
        return parts[0]
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + part.columns.shape[0])
    starts = [part.row_starts[:-1] + end for part, end in zip(parts, ends, strict=False)]
    last = torch.tensor([ends[-1]], dtype=torch.int32, device=parts[0].columns.device)
    columns = torch.cat([part.columns for part in parts])
    values = torch.cat([part.values for part in parts])
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
    places = (codes.rows(), codes.columns.long())
    return z.index_put_(places, codes.values, accumulate=codes.is_padded)  # zeros beyond the last row replace nothing
