"""What dictionaries have in common, and what a transfer gained: the measures of Ghilardi et al. 2024, on tensors.

Shapes: F, G latents, D width. A decoder row is the direction that a latent writes.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from saerelay.runs.documents.across_layers import MatrixCell

COSINES_AT_ONCE = 2**24
"""Cosines of decoder rows that are in memory at the same time: 64 MiB."""
FOUND_AGAIN = 0.7
"""Cosine above which two decoder rows count as the same latent."""


@torch.no_grad()
def mean_max_cosine(P: Tensor, Q: Tensor, alive_p: Tensor | None = None, alive_q: Tensor | None = None) -> float:
    """Return the mean over live rows of P (F, D) of the largest cosine with a live row of Q (G, D).

    >>> mean_max_cosine(torch.eye(3), torch.eye(3)[[2, 0, 1]])
    1.0
    >>> mean_max_cosine(torch.eye(3)[:1], torch.eye(3)), mean_max_cosine(torch.eye(3), torch.eye(3)[:1])
    (1.0, 0.3333333333333333)

    `alive_p` (F) and `alive_q` (G) are bool. Not symmetric. NaN if nothing is alive.
    """
    P = P if alive_p is None else P[alive_p]
    Q = Q if alive_q is None else Q[alive_q]
    if not len(P) or not len(Q):
        return math.nan
    return float(_largest_cosines(P, Q).double().mean())


@torch.no_grad()
def share_found_again(P: Tensor, Q: Tensor) -> float:
    """Return the share of the rows of P (F, D) that have a cosine above 0.7 with some row of Q (G, D).

    >>> share_found_again(torch.eye(4), torch.tensor([[1.0, 0, 0, 0], [0, 3, 0, 0]]))
    0.5
    """
    return float((_largest_cosines(P, Q) > FOUND_AGAIN).double().mean())


def _largest_cosines(P: Tensor, Q: Tensor) -> Tensor:
    """Return for each row of P (F, D) the largest cosine (F) with a row of Q (G, D)."""
    P = torch.nn.functional.normalize(P, dim=1)
    Q = torch.nn.functional.normalize(Q, dim=1)
    return torch.cat([(part @ Q.T).amax(dim=1) for part in P.split(max(1, COSINES_AT_ONCE // len(Q)))])


class TokenAssociations(NamedTuple):
    """Ids of the tokens associated with each latent of a dictionary, (F, 10) each; -1 where there are fewer."""

    top_logits: Tensor
    """Tokens whose logits the decoder row raises most."""
    bottom_logits: Tensor
    """Tokens whose logits the decoder row lowers most."""
    top_tokens: Tensor
    """Tokens at the positions where the latent fires most strongly; the same token may occur several times."""


def feature_transferability(source: TokenAssociations, target: TokenAssociations, alive: Tensor) -> dict[str, float]:
    """Return the shares of token ids that latents of the same index have in common, and their mean; alive: bool (F).

    >>> a = TokenAssociations(torch.tensor([[1, 2]]), torch.tensor([[3, 4]]), torch.tensor([[5, 5]]))
    >>> b = TokenAssociations(torch.tensor([[2, 1]]), torch.tensor([[3, 9]]), torch.tensor([[5, 6]]))
    >>> feature_transferability(a, b, torch.tensor([True]))["transferability"]
    0.6666666666666666

    With ten tokens of each kind, this is (shared top logits + shared bottom logits + shared tokens of highest
    activation) / 30, averaged over live latents: 30.3 % forward and 28.8 % backward in Ghilardi et al. 2024. NaN if no
    latent is alive.
    """
    shares = {}
    for name, a, b in zip(TokenAssociations._fields, source, target, strict=True):
        shares[name] = float(shared(a, b)[alive].double().mean()) / a.shape[1]
    return {"transferability": sum(shares.values()) / len(shares), **shares}


def shared(a: Tensor, b: Tensor) -> Tensor:
    """Return the number (F) of token ids that rows of a and b (F, n) share, as multisets; -1 stands for no token.

    >>> shared(torch.tensor([[7, 7, 1, -1]]), torch.tensor([[7, 2, 7, -1]])).tolist()
    [2]
    """
    # The second 7 of a row matches only the second 7 of the other: entries match if both id and occurrence do.
    same_id = (a[:, :, None] == b[:, None, :]) & (a >= 0)[:, :, None]
    same_occurrence = _occurrence(a)[:, :, None] == _occurrence(b)[:, None, :]
    return (same_id & same_occurrence).any(dim=2).sum(dim=1)


def _occurrence(ids: Tensor) -> Tensor:
    """Return for each entry (F, n) which occurrence of its id in the row it is, counting from 0."""
    return (ids[:, :, None] == ids[:, None, :]).tril(-1).sum(dim=2)


def transfer_score(transferred: float | None, zero_shot: float | None, from_scratch: float | None) -> float | None:
    """Return how far training took a transfer from zero-shot to scratch.

    >>> transfer_score(0.09, 0.2, 0.1), transfer_score(0.09, 0.1, 0.1)
    (1.1, None)

    It is (transferred − zero-shot) / (scratch − zero-shot): 0 is as good as zero-shot and 1 as good as from scratch,
    whether higher or lower values of the metric are better. But if scratch is worse than zero-shot, a score above 0 is
    worse than zero-shot, too. None if a value is unknown, or scratch equals zero-shot.
    """
    if transferred is None or zero_shot is None or from_scratch is None or from_scratch == zero_shot:
        return None
    return (transferred - zero_shot) / (from_scratch - zero_shot)


def values_by_offset(cells: Iterable[MatrixCell], metric: str, method: str) -> dict[int, list[float]]:
    """Return a metric's values in matrix cells by offset, target − source layer; offset 0 counts for any method."""
    values: dict[int, list[float]] = {}
    for cell in cells:
        offset = cell.target - cell.source
        value = getattr(cell, metric)
        if value is not None and (cell.method == method or offset == 0):
            values.setdefault(offset, []).append(value)
    return dict(sorted(values.items()))
