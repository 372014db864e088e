"""Losses of changed hidden states of a language model against its clean ones: cross-entropy and KL divergence.

Of the logits s, only log Σ exp s, Σ p s with the clean probabilities p, and s of the next token are needed:
CE = log Σ exp s − s_next, KL(clean ‖ changed) = Σ p log p − Σ p s + log Σ exp s.

The logits of all tokens are never in memory at once. The vocabulary is cut into parts. For each part, the clean logits
are computed, and then those of all changed states, which are summed while they are in the CPU's cache; then the sums of
all parts are joined. Rows are cut as well. Cuts follow from shapes alone, so that the bits of a result depend neither
on the number of threads nor on what else is measured.

Shapes: B sequences of C positions, D width, V vocabulary; n rows (positions of all sequences), v tokens of a part,
L kinds of logits, the clean ones first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from saerelay.lm.head import Head
from saerelay.sae.threads import side_by_side

ROWS = 2048
"""Rows whose logits are computed at once, all with the same part of the weights in the cache."""
PART = 2048
"""Tokens in a part of the vocabulary."""
STRIPE = 64
"""Rows that are summed at once on a CPU."""
PARTS = 16
"""Parts that a thread handles, one after another."""
ON_GPU = 4
"""Factor by which more rows and tokens are taken at once on a GPU, which fewer would not keep busy."""
ROUNDING = 4
"""States count as the same if they differ by at most this many rounding errors (eps) of the largest number."""


class Loss(NamedTuple):
    """Losses of hidden states, in nats, float64; 0 at positions that are not kept."""

    ce: Tensor
    """Cross-entropy of each next token (B, C − 1)."""
    kl: Tensor
    """KL divergence from the clean states' logits (B, C)."""


@dataclass(frozen=True, eq=False)
class CleanStates:
    """The clean last hidden states of a batch, to be compared with changed ones.

    >>> from saerelay.lm.model import LanguageModel
    >>> from saerelay.planning.recipe import ModelSpec
    >>> model, tokens = LanguageModel.load(ModelSpec(device="cpu")), torch.tensor([[0, 5, 7]])
    >>> states = model.head.states(tokens)
    >>> clean = CleanStates(model.head, states, tokens, keep=torch.ones(1, 3, dtype=torch.bool))
    >>> own, other = clean.losses([2 * states])
    >>> bool((own.kl == 0).all()), bool((other.kl > 0).all())
    (True, True)
    """

    head: Head
    states: Tensor
    """(B, C, D), as from `head.states`."""
    tokens: Tensor
    """(B, C)."""
    keep: Tensor
    """bool (B, C)."""

    @torch.no_grad()
    def losses(self, changed: Sequence[Tensor], uniform: Sequence[Tensor] = ()) -> list[Loss]:
        """Return the loss of the clean states, then of each of the changed states (B, C, D), then of each of `uniform`.

        The entries of `uniform` are logits (V), float32, that are the same at every position.
        """
        following = torch.zeros_like(self.tokens)
        following[:, :-1] = self.tokens[:, 1:]  # the entry at the last position is not used
        states = [one.flatten(0, 1) for one in (self.states, *changed)]
        sums = self._all_sums(states, uniform, following.flatten())

        log_sum = sums.largest + sums.exponentials.log()
        mean = sums.products / sums.exponentials[0]
        negative_entropy = mean[0] - log_sum[0]
        ce = (log_sum - sums.following).view(-1, *self.tokens.shape)[..., :-1] * self.keep[:, :-1]
        kl = (negative_entropy - mean + log_sum).view(-1, *self.tokens.shape) * self.keep
        return [Loss(*of_one) for of_one in zip(ce, kl, strict=True)]

    def _all_sums(self, states: Sequence[Tensor], uniform: Sequence[Tensor], following: Tensor) -> "_Sums":
        """Return the sums over the whole vocabulary, for all rows."""
        times = 1 if following.device.type == "cpu" else ON_GPU
        row_ranges = _cut(0, len(following), times * ROWS)
        pieces = _cut(0, self.head.n_tokens, times * PARTS * PART)
        jobs = []
        for rows in row_ranges:
            batch = _Rows(self.head, [one[rows] for one in states], uniform, following[rows])
            jobs += [(batch, piece) for piece in pieces]

        def of_piece(job: tuple[_Rows, slice]) -> _Sums:
            batch, piece = job
            return reduce(_joined, map(batch.sums, _cut(piece.start, piece.stop, times * PART)))

        found = side_by_side(of_piece, jobs, following.device)
        by_rows = [reduce(_joined, found[i : i + len(pieces)]) for i in range(0, len(found), len(pieces))]
        return _Sums(*(torch.cat(columns, dim=1) for columns in zip(*by_rows, strict=True)))


def same_everywhere(states: Tensor) -> bool:
    """Whether states (B, C, D) are the same at every position, up to rounding.

    >>> same_everywhere(torch.ones(1, 2, 3)), same_everywhere(torch.arange(6.0).view(1, 2, 3))
    (True, False)
    """
    first = states[0, 0]
    tolerance = ROUNDING * torch.finfo(states.dtype).eps * float(first.abs().max())
    return float((states - first).abs().max()) <= tolerance


def one_row(head: Head, states: Tensor) -> Tensor:
    """Return the logits (V), float32, of states (B, C, D) that are the same everywhere.

    They are computed part by part, and for several rows, because a product of one row with a large vocabulary is slow
    in bfloat16.
    """
    parts = [head.logits(states[:1, :16], part)[0, 0] for part in _cut(0, head.n_tokens, PART)]
    return torch.cat(parts).float()


# --- sums over the vocabulary -----------------------------------------------------------------------------------------


class _Sums(NamedTuple):
    """Sums over some tokens, (L, n) each, float64."""

    largest: Tensor
    """max s."""
    exponentials: Tensor
    """Σ exp(s − max s)."""
    products: Tensor
    """Σ exp(c − max c) s, with the clean logits c."""
    following: Tensor
    """s of the next token; 0 if it is not among these tokens."""


def _joined(a: _Sums, b: _Sums) -> _Sums:
    """Return the sums over the tokens of both."""
    largest = torch.maximum(a.largest, b.largest)
    times_a = (a.largest - largest).exp()
    times_b = (b.largest - largest).exp()
    return _Sums(
        largest=largest,
        exponentials=a.exponentials * times_a + b.exponentials * times_b,
        products=a.products * times_a[0] + b.products * times_b[0],
        following=a.following + b.following,
    )


class _Rows(NamedTuple):
    """Some rows of a batch."""

    head: Head
    states: list[Tensor]
    """(n, D) each, the clean states first."""
    uniform: Sequence[Tensor]
    """Logits (V) that are the same for all rows."""
    following: Tensor
    """The next token of each row (n)."""

    def sums(self, part: slice) -> _Sums:
        """Return the sums over a part of the vocabulary."""
        n = len(self.following)
        device = self.following.device
        v = part.stop - part.start
        where = (self.following - part.start).clamp(0, v - 1)[:, None]
        is_here = (self.following >= part.start) & (self.following < part.stop)
        clean = torch.empty(n, v, device=device)  # exp(c − max c)
        at_once = STRIPE if device.type == "cpu" else n
        space = torch.empty(2, min(n, at_once), v, device=device)

        columns = []
        for i, states in enumerate(self.states):
            logits = self.head.logits(states[None], part)[0]
            stripes = []
            for rows in _cut(0, n, space.shape[1]):
                some = space[:, : rows.stop - rows.start]
                stripes.append(_stripe(logits[rows], clean[rows], some, is_clean=i == 0))
            following = logits.gather(1, where)[:, 0] * is_here
            columns.append([*torch.cat(stripes, dim=1), following])
        for row in self.uniform:
            s = row[part]
            largest = s.max()
            exponentials = (s - largest).exp().sum()
            following = s[where[:, 0]] * is_here
            columns.append([largest.expand(n), exponentials.expand(n), clean @ s, following])
        return _Sums(*(torch.stack(column).double() for column in zip(*columns, strict=True)))


def _stripe(logits: Tensor, clean: Tensor, space: Tensor, *, is_clean: bool) -> Tensor:
    """Return (3, n): largest logits, Σ exp(s − largest) and Σ s · clean of some rows; clean rows set `clean` first."""
    s, work = space
    s.copy_(logits)
    largest = s.amax(dim=1)
    exponentials = torch.sub(s, largest[:, None], out=clean if is_clean else work).exp_().sum(dim=1)
    products = torch.mul(s, clean, out=work).sum(dim=1)
    return torch.stack([largest, exponentials, products])


def _cut(start: int, stop: int, size: int) -> list[slice]:
    """Cut a range into parts of one size; the last may be smaller."""
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]
