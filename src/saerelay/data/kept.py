"""Which positions are trained and measured on: all but the leading BOS and outliers of norm.

Shapes: S sequences, C positions in a sequence (the context), P = S·C positions, D width of the activations at a site.
"""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from saerelay.errors import ModelError
from saerelay.planning.left_out import LeftOut
from saerelay.planning.plan import Plan
from saerelay.site import Site


def kept_positions(
    plan: Plan, tokens: Tensor, activations: Mapping[Site, Tensor], order: Tensor | None = None
) -> Tensor:
    """Bool (P): positions that are neither the leading BOS nor an outlier of norm at the plan's probe site.

    tokens: (S, C); activations: (P, D), including the probe site's. `order` (P) is the order of their rows, if it
    differs from that of the tokens; the result is in the order of the rows.
    """
    keep = finite_positions(plan, tokens, activations, order)
    if plan.probe_site:
        x = activations[plan.probe_site]
        norms = torch.cat([rows.float().norm(dim=1) for rows in x.split(4096)])
        median = norms[keep].nanmedian()
        keep &= norms <= plan.recipe.data.outlier_norm * median
    return keep


def finite_positions(
    plan: Plan, tokens: Tensor, activations: Mapping[Site, Tensor], order: Tensor | None = None
) -> Tensor:
    """Bool (P): positions other than the leading BOS. Raises ModelError if their activations are not all finite."""
    keep = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
    if plan.recipe.data.prepend_bos:
        keep[:, 0] = False
    keep = keep.flatten()
    if order is not None:
        keep = keep[order]
    for site, x in activations.items():
        check_finite(site, x, keep)
    return keep


class OutlierCount:
    """Counts the positions that are left out because of their norm, by token."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.n_read = 0
        self.tokens: Counter[int] = Counter()

    def add(self, tokens: Tensor, keep: Tensor) -> None:
        """Add tokens (S, C) and bool `keep` (S, C) to the counts; a BOS is not left out because of its norm."""
        left_out = ~keep
        if self.plan.recipe.data.prepend_bos:
            left_out[:, 0] = False
        self.n_read += keep.numel()
        self.tokens.update(tokens[left_out].tolist())

    def left_out(self) -> LeftOut:
        """The positions left out so far."""
        token, n_of_token = next(iter(self.tokens.most_common(1)), (None, 0))
        return LeftOut(
            site=str(self.plan.probe_site) if self.plan.probe_site else None,
            n=self.tokens.total(),
            n_read=self.n_read,
            token=token,
            n_of_token=n_of_token,
        )


def check_finite(site: Site, x: Tensor, keep: Tensor) -> None:
    """Raise ModelError if activations (P, D) are not all finite where bool `keep` (P) is true."""
    if bool(x.sum(dtype=torch.float32).isfinite()):
        return
    finite = torch.cat([rows.isfinite().all(dim=1) for rows in x.split(4096)])
    n_bad = int((keep & ~finite).sum())
    if not n_bad:
        return
    dtype = str(x.dtype).removeprefix("torch.")
    remedy = 'Set model.dtype = "bfloat16" or "float32", which have a larger range.'
    if x.dtype != torch.float16:
        remedy = "The model's weights may be damaged, or the model may not work in this dtype."
    raise ModelError(
        f"{site}: {n_bad:,} of {int(keep.sum()):,} positions have activations that are not finite in {dtype} (inf or "
        f"nan). {remedy}"
    )


def trained_on(plan: Plan, tokens: Tensor, activations: Mapping[Site, Tensor]) -> Tensor:
    """Bool (S, C): `kept_positions` of tokens (S, C), from activations (S, C, D)."""
    rows = {site: x.flatten(0, 1) for site, x in activations.items()}
    return kept_positions(plan, tokens, rows).view_as(tokens)
