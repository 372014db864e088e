"""The clean logits of a batch, and what changed ones lose against them: cross-entropy and KL divergence.

Shapes: B sequences of C positions, V vocabulary.
"""

import torch
from torch import Tensor

ROWS_BYTES = 2**20
"""Size of the parts in which logits are compared on a CPU, so that they stay in its cache."""
ROUNDING = 4
"""Logits that differ by as many roundings of the largest one count as the same."""


class CleanLogits:
    """The clean logits of one batch, and comparisons with changed ones; (B, C, V) for tokens (B, C).

    >>> tokens = torch.tensor([[0, 1, 2]])
    >>> logits = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    >>> clean = CleanLogits(logits, tokens, keep=torch.ones(1, 3, dtype=torch.bool))
    >>> ce, kl = clean.compare(logits)
    >>> bool((ce == clean.ce).all()), bool((kl.abs() < 1e-6).all())
    (True, True)

    Of changed logits s only log Σ exp s, Σ p s with the clean probabilities p, and s of the next token are needed:
    CE = log Σ exp s − s_next, KL(clean ‖ changed) = Σ p log p − Σ p s + log Σ exp s.
    """

    def __init__(self, logits: Tensor, tokens: Tensor, keep: Tensor) -> None:
        self.keep = keep.view_as(tokens)
        self._next = tokens[:, 1:, None]
        self._p = torch.empty(logits.flatten(0, 1).shape, device=logits.device)
        total, product = self._sums(logits, are_clean=True)
        self._negative_entropy = product - total
        self.ce = self._ce(logits, total)

    def compare(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """CE (B, C − 1) of each next token and KL from the clean logits (B, C); zero where a position is not kept."""
        total, product = self._sums(logits)
        return self._ce(logits, total), self._kl(total, product)

    def compare_same(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """`compare` for logits (V), float32, that are the same at every position."""
        total = row.logsumexp(dim=-1).expand_as(self.keep)
        product = (self._p @ row).view_as(self.keep)
        ce = total[:, :-1] - row[self._next.squeeze(-1)]
        return ce * self.keep[:, :-1], self._kl(total, product)

    def delta_ce(self, ce: Tensor) -> Tensor:
        """By how much CE (B, C − 1) rose, as the mean of each sequence that has positions to count: float64."""
        n_kept = self.keep[:, :-1].sum(dim=1)
        delta_ce = (ce - self.ce).sum(dim=1) / n_kept.clamp(min=1)
        return delta_ce[n_kept > 0].double().cpu()

    def _ce(self, logits: Tensor, total: Tensor) -> Tensor:
        next_logit = logits[:, :-1].gather(-1, self._next).squeeze(-1)
        return (total[:, :-1] - next_logit) * self.keep[:, :-1]

    def _kl(self, total: Tensor, product: Tensor) -> Tensor:
        return (self._negative_entropy - product + total) * self.keep

    def _sums(self, logits: Tensor, *, are_clean: bool = False) -> tuple[Tensor, Tensor]:
        """log Σ exp s and Σ p s, (B, C) each; of the clean logits, after setting p.

        How to see this: a pass over the whole vocabulary costs more than the language model's layers, so each part
        stays in the processor's cache from the first to the last operation, in the same two buffers.
        """
        rows = logits.flatten(0, 1)
        n_rows, n_tokens = rows.shape
        step = n_rows
        if rows.device.type == "cpu":
            step = max(1, min(n_rows, ROWS_BYTES // (4 * n_tokens)))
        values = torch.empty(step, n_tokens, device=rows.device)
        scratch = torch.empty_like(values)
        total = torch.empty(n_rows, device=rows.device)
        product = torch.empty_like(total)

        for start in range(0, n_rows, step):
            part = slice(start, min(start + step, n_rows))
            s = values[: part.stop - start].copy_(rows[part])
            work = scratch[: part.stop - start]

            largest = s.amax(dim=1, keepdim=True)
            exponentials = torch.sub(s, largest, out=work).exp_()
            denominator = exponentials.sum(dim=1, keepdim=True)
            total[part] = (largest + denominator.log()).squeeze(1)
            if are_clean:
                torch.div(exponentials, denominator, out=self._p[part])
            product[part] = torch.mul(self._p[part], s, out=work).sum(dim=1)

        return total.view_as(self.keep), product.view_as(self.keep)


def same_everywhere(logits: Tensor) -> Tensor | None:
    """The one row (V), float32, that logits (B, C, V) are at every position but for rounding, or None.

    >>> same_everywhere(torch.ones(1, 2, 3))
    tensor([1., 1., 1.])
    >>> same_everywhere(torch.arange(6.0).view(1, 2, 3)) is None
    True
    """
    row = logits[0, 0]
    tolerance = ROUNDING * torch.finfo(logits.dtype).eps * float(row.abs().max())
    if float((logits - row).abs().max()) <= tolerance:
        return row.float()
    return None
