"""What dictionaries have in common, and what a transfer brought: the measures of Ghilardi et al. 2024, on tensors.

Shapes: F, G latents, D width. A decoder row is what a latent writes.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from saerelay.runs.documents.across_layers import MatrixCell

DENSE = 2**24
"""Numbers in a block of cosines or attributions: 64 MiB."""
FOUND_AGAIN = 0.7
"""Cosine from which on a decoder row counts as the same latent's."""


@torch.no_grad()
def mean_max_cosine(P: Tensor, Q: Tensor, alive_p: Tensor | None = None, alive_q: Tensor | None = None) -> float:
    """Mean over rows of P (F, D) of the largest cosine with a row of Q (G, D), of those that are alive (bool F, G).

    >>> mean_max_cosine(torch.eye(3), torch.eye(3)[[2, 0, 1]])
    1.0
    >>> mean_max_cosine(torch.eye(3)[:1], torch.eye(3)), mean_max_cosine(torch.eye(3), torch.eye(3)[:1])
    (1.0, 0.3333333333333333)

    Not symmetric. NaN if nothing is alive.
    """
    P = P if alive_p is None else P[alive_p]
    Q = Q if alive_q is None else Q[alive_q]
    if not len(P) or not len(Q):
        return math.nan
    return float(_largest_cosines(P, Q).double().mean())


@torch.no_grad()
def share_found_again(P: Tensor, Q: Tensor) -> float:
    """Share of the rows of P (F, D) that have a cosine above 0.7 with some row of Q (G, D).

    >>> share_found_again(torch.eye(4), torch.tensor([[1.0, 0, 0, 0], [0, 3, 0, 0]]))
    0.5
    """
    return float((_largest_cosines(P, Q) > FOUND_AGAIN).double().mean())


def _largest_cosines(P: Tensor, Q: Tensor) -> Tensor:
    """Of each row of P (F, D) the largest cosine with a row of Q (G, D): (F)."""
    P = torch.nn.functional.normalize(P, dim=1)
    Q = torch.nn.functional.normalize(Q, dim=1)
    return torch.cat([(part @ Q.T).amax(dim=1) for part in P.split(max(1, DENSE // len(Q)))])


class TokenAssociations(NamedTuple):
    """Ids of the tokens that each latent of a dictionary stands for, (F, 10) each; -1 where there are fewer."""

    top_logits: Tensor
    """Those whose logits the decoder row raises most."""
    bottom_logits: Tensor
    """Those it lowers most."""
    top_tokens: Tensor
    """Those at the positions it fires most strongly on; the same token may come several times."""


def feature_transferability(source: TokenAssociations, target: TokenAssociations, alive: Tensor) -> dict[str, float]:
    """Shares of token ids that latents have in common with those of the same index, and their mean; alive: bool (F).

    >>> a = TokenAssociations(torch.tensor([[1, 2]]), torch.tensor([[3, 4]]), torch.tensor([[5, 5]]))
    >>> b = TokenAssociations(torch.tensor([[2, 1]]), torch.tensor([[3, 9]]), torch.tensor([[5, 6]]))
    >>> feature_transferability(a, b, torch.tensor([True]))["transferability"]
    0.6666666666666666

    With ten of each, (shared top logits + shared bottom logits + shared tokens of highest activation) / 30, mean over
    alive latents: 30.3 % forward and 28.8 % backward in Ghilardi et al. 2024. NaN if none is alive.
    """
    shares = {}
    for name, a, b in zip(TokenAssociations._fields, source, target, strict=True):
        shares[name] = float(shared(a, b)[alive].double().mean()) / a.shape[1]
    return {"transferability": sum(shares.values()) / len(shares), **shares}


def shared(a: Tensor, b: Tensor) -> Tensor:
    """Number of token ids that the rows of a and b (F, n) have in common (F), as multisets; -1 stands for no token.

    >>> shared(torch.tensor([[7, 7, 1, -1]]), torch.tensor([[7, 2, 7, -1]])).tolist()
    [2]
    """
    # The second 7 of a row is only equal to the second 7 of another: entries match if id and occurrence do.
    same_id = (a[:, :, None] == b[:, None, :]) & (a >= 0)[:, :, None]
    same_occurrence = _occurrence(a)[:, :, None] == _occurrence(b)[:, None, :]
    return (same_id & same_occurrence).any(dim=2).sum(dim=1)


def _occurrence(ids: Tensor) -> Tensor:
    """Which occurrence of its id in the row each entry (F, n) is, from 0."""
    return (ids[:, :, None] == ids[:, None, :]).tril(-1).sum(dim=2)


def transfer_score(transferred: float | None, zero_shot: float | None, from_scratch: float | None) -> float | None:
    """How far training brought a transfer from zero-shot to scratch: (transferred − zero-shot) / (scratch − zero-shot).

    >>> transfer_score(0.09, 0.2, 0.1), transfer_score(0.09, 0.1, 0.1)
    (1.1, None)

    0 is as good as zero-shot, 1 as good as from scratch, whichever way the metric runs; but where scratch is worse than
    zero-shot, so is a score over 0. None if one is unknown, or scratch equals zero-shot.
    """
    if transferred is None or zero_shot is None or from_scratch is None or from_scratch == zero_shot:
        return None
    return (transferred - zero_shot) / (from_scratch - zero_shot)


def values_by_offset(cells: Iterable[MatrixCell], metric: str, method: str) -> dict[int, list[float]]:
    """The values of a metric in matrix cells by offset, target − source layer; cells at home have any method."""
    values: dict[int, list[float]] = {}
    for cell in cells:
        offset = cell.target - cell.source
        value = getattr(cell, metric)
        if value is not None and (cell.method == method or offset == 0):
            values.setdefault(offset, []).append(value)
    return dict(sorted(values.items()))
