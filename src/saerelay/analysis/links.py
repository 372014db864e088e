"""What became of one leg's latents in another leg: partners, how alike they are, and a status for each.

Two legs that descend from one root have the same latents at the same index, since a transfer never permutes them.
Latents of other legs are matched one to one by decoder cosine (optimal assignment). Before anything is compared, the
source is folded through the affine map between the two layers, because their raw spaces are not comparable.

The status of a latent and its partner: `k`ept (both fire, decoder cosine above KEPT_ABOVE), `d`rifted (the cosine is
not above it), `r`eplaced (below REPLACED_BELOW: the index has another meaning now), `x` died (the partner does not
fire), `b`orn (only the partner fires), `-` silent in both.

Shapes: F latents of the source, G of the target, B kept positions of a batch, D width.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from saerelay.analysis.features import most_similar
from saerelay.files import finite
from saerelay.planning.leg import Leg
from saerelay.runs.documents.latents import STATUSES, LineageLink
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.kernels import Codes, add_at, split_codes

KEPT_ABOVE = 0.7
"""Decoder cosine above which a latent counts as the same. On the demo run, the cosines of latents with the same index
have two modes: above 0.7 the partner is the most similar latent of all in more than 99 % of cases, below 0.3 never
(latents that were silent after the hop got another meaning). Between them lie 1 % of the latents, in the first layers
up to 22 %."""
REPLACED_BELOW = 0.3
ALIVE_ABOVE = 0
"""A latent is alive if it fires more often than this on the held-out tokens: the rule of `frac_alive`."""
EXACT_LATENTS = 4_096
"""Up to this many latents, assignments are optimal over all pairs; beyond, over each latent's CANDIDATES most similar
latents, or none. That takes a ninth of the time at 8192 latents (1 s instead of 9). For the demo's controls it changes
a tenth of the partners, and 2 to 3 % of those with a cosine above 0.5."""
CANDIDATES = 32

Kind = Literal["hop", "depth", "control"]
"""hop: parent to child; depth: a layer's leg to the next layer's; control: a leg to its from-scratch control."""


@dataclass(frozen=True, eq=False)
class Link:
    """What became of a leg's latents in another leg; tensors have one entry per latent of the source."""

    kind: Kind
    source: str
    target: str
    source_layer: int
    target_layer: int
    partner: Tensor | None
    """int64 (F): latents of the target, -1 for none; None if latents have kept their index."""
    decoder_cosine: Tensor
    """(F): cosine of the folded source with the partner; NaN without a partner."""
    encoder_cosine: Tensor
    correlation: Tensor
    """(F): Pearson's correlation of the activations on the same tokens; NaN if either never fires."""
    status: str
    """One letter per latent: k, d, r, x, b or -."""

    def forward(self, latent: int) -> int | None:
        """Return the partner of a latent of the source, or None."""
        partner = latent if self.partner is None else int(self.partner[latent])
        return None if partner < 0 else partner

    def backward(self, latent: int) -> int | None:
        """Return the latent of the source whose partner is `latent`, or None."""
        if self.partner is None:
            return latent
        sources = (self.partner == latent).nonzero()
        return int(sources[0, 0]) if len(sources) else None

    def shares(self) -> dict[str, float]:
        """Return the share of the source's latents with each status; the shares sum to 1."""
        counts = Counter(self.status)
        return {name: counts[letter] / len(self.status) for letter, name in STATUSES.items()}

    def to_document(self) -> LineageLink:
        """Return the link as written to lineage.json."""
        return LineageLink(
            kind=self.kind,
            source=self.source,
            target=self.target,
            source_layer=self.source_layer,
            target_layer=self.target_layer,
            by="index" if self.partner is None else "assignment",
            partner=None if self.partner is None else self.partner.tolist(),
            decoder_cosine=_rounded(self.decoder_cosine),
            encoder_cosine=_rounded(self.encoder_cosine),
            correlation=_rounded(self.correlation),
            status=self.status,
        )

    @classmethod
    def from_document(cls, link: LineageLink) -> "Link":
        """Read a link of lineage.json."""
        return cls(
            kind=link.kind,
            source=link.source,
            target=link.target,
            source_layer=link.source_layer,
            target_layer=link.target_layer,
            partner=None if link.partner is None else torch.tensor(link.partner),
            decoder_cosine=_with_nan(link.decoder_cosine),
            encoder_cosine=_with_nan(link.encoder_cosine),
            correlation=_with_nan(link.correlation),
            status=link.status,
        )


def _rounded(values: Tensor) -> list[float | None]:
    return finite([round(value, 4) for value in values.tolist()])


def _with_nan(values: list[float | None]) -> Tensor:
    return torch.tensor([torch.nan if value is None else value for value in values])


# --- partners and cosines -------------------------------------------------------------------------------------------


def assign(source: Tensor, target: Tensor) -> Tensor:
    """Match decoder rows (F, D) with rows (G, D), one to one, for the largest sum of cosines: int64 (F), -1 for none.

    >>> rows = torch.eye(4)
    >>> assign(rows, rows[[2, 0, 3, 1]]).tolist()
    [1, 3, 0, 2]

    Exact up to EXACT_LATENTS; beyond, only among each row's CANDIDATES most similar rows (see EXACT_LATENTS).
    """
    exact = max(len(source), len(target)) <= EXACT_LATENTS
    rows, columns = _assign_exactly(source, target) if exact else _assign_among_candidates(source, target)
    partner = torch.full((len(source),), -1)
    partner[rows.long()] = columns.long()
    return partner


def _assign_exactly(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matched rows and columns, over all pairs."""
    cosines = _unit(source) @ _unit(target).T
    rows, columns = linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
    return torch.from_numpy(rows), torch.from_numpy(columns)


def _assign_among_candidates(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matched rows and columns, over each row's most similar columns.

    The solver needs a full matching of all rows, so each row also gets a column of its own, at the highest cost, which
    stands for having no partner. Costs are positive: 2 − cosine, and 3 without a partner.
    """
    F = len(source)
    G = len(target)
    latents, cosines = most_similar(source, target, CANDIDATES)
    all_rows = torch.arange(F)
    row = torch.cat([all_rows.repeat_interleave(latents.shape[1]), all_rows])
    column = torch.cat([latents.cpu().flatten(), G + all_rows])
    cost = torch.cat([2 - cosines.cpu().flatten(), torch.full((F,), 3.0)]).double()
    graph = csr_matrix((cost.numpy(), (row.numpy(), column.numpy())), shape=(F, G + F))
    rows, columns = min_weight_full_bipartite_matching(graph)
    has_partner = columns < G
    return torch.from_numpy(rows[has_partner]), torch.from_numpy(columns[has_partner])


def paired_cosine(source: Tensor, target: Tensor, partner: Tensor | None) -> Tensor:
    """Return the cosine (F) of each row (F, D) with its partner among rows (G, D); NaN without a partner."""
    if partner is None:
        return (_unit(source) * _unit(target)).sum(dim=1)
    cosines = (_unit(source) * _unit(target)[partner.to(target.device)]).sum(dim=1)
    return cosines.masked_fill((partner < 0).to(target.device), torch.nan)


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def status(decoder_cosine: Tensor, source_alive: Tensor, target_alive: Tensor) -> str:
    """Return one letter per latent (see the top of this file); all tensors (F), `target_alive` about its partner.

    >>> before, after = torch.tensor([1, 1, 1, 1, 0, 0]).bool(), torch.tensor([1, 1, 1, 0, 1, 0]).bool()
    >>> status(torch.tensor([0.9, 0.5, 0.1, 0.9, 0.9, 0.9]), before, after)
    'kdrxb-'
    """
    rows = zip(decoder_cosine.tolist(), source_alive.tolist(), target_alive.tolist(), strict=True)
    return "".join(_status_letter(*row) for row in rows)


def _status_letter(cosine: float, source_alive: bool, target_alive: bool) -> str:
    if not source_alive:
        return "b" if target_alive else "-"
    if not target_alive:
        return "x"
    if cosine > KEPT_ABOVE:
        return "k"
    return "r" if cosine < REPLACED_BELOW else "d"


# --- activations on the same tokens ---------------------------------------------------------------------------------


class Firing:
    """Sums over tokens of a dictionary's codes: the number of firings, Σz and Σz² of each latent, in float64."""

    def __init__(self, n_latents: int, device: torch.device) -> None:
        self.count = torch.zeros(n_latents, dtype=torch.long, device=device)
        self.total = torch.zeros(n_latents, dtype=torch.float64, device=device)
        self.squares = torch.zeros(n_latents, dtype=torch.float64, device=device)

    def add(self, codes: Codes) -> None:
        """Add a batch."""
        latents = codes.columns.long()
        values = codes.values.double()
        self.count.index_add_(0, latents, (values > 0).long())
        add_at(self.total, latents, values)
        add_at(self.squares, latents, values.square())


@dataclass(frozen=True)
class LegPair:
    """Two legs to compare."""

    kind: Kind
    source: Leg
    target: Leg


class Comparison:
    """Two legs while their codes are read: partners and cosines from the start, and Σ z·z' (F) of partners so far."""

    def __init__(self, pair: LegPair, folded: Dictionary, other: Dictionary, by_index: bool) -> None:
        self.pair = pair
        self.partner = None if by_index else assign(folded.W_dec, other.W_dec).to(other.W_dec.device)
        self.decoder_cosine = paired_cosine(folded.W_dec, other.W_dec, self.partner)
        self.encoder_cosine = paired_cosine(folded.W_enc, other.W_enc, self.partner)
        self.products = torch.zeros_like(self.decoder_cosine, dtype=torch.float64)

    def add(self, source: Codes, target: Codes, scratch: Tensor) -> None:
        """Add the codes of a batch; `scratch` (at least G numbers) is zero before and after.

        A few rows of the target's codes at a time are laid out densely in `scratch`; each entry of the source's codes
        then looks up its partner's activation on the same token. An entry without a partner looks up an arbitrary one;
        `link` leaves such latents out.
        """
        G = target.n_latents
        n_rows = len(scratch) // G
        for z, other in zip(split_codes(source, n_rows), split_codes(target, n_rows), strict=True):
            filled = other.rows() * G + other.columns
            scratch[filled] = other.values
            latents = z.columns.long()
            partners = latents if self.partner is None else self.partner[latents]
            partner_values = scratch[z.rows() * G + partners.clamp(min=0)]
            add_at(self.products, latents, (z.values * partner_values).double())
            scratch[filled] = 0

    def link(self, source: Firing, target: Firing, n_tokens: int) -> Link:
        """Return the link, from the sums of both dictionaries over all tokens."""
        partner = self.partner
        if partner is None:
            partner = torch.arange(len(self.products), device=self.products.device)
        has_partner = partner >= 0
        count = torch.where(has_partner, target.count[partner], 0)
        total = torch.where(has_partner, target.total[partner], 0)
        squares = torch.where(has_partner, target.squares[partner], 0)

        covariance = self.products - source.total * total / n_tokens
        source_variance = source.squares - source.total.square() / n_tokens
        target_variance = squares - total.square() / n_tokens
        correlation = covariance / (source_variance * target_variance).sqrt()
        correlation = correlation.masked_fill((source.count == 0) | (count == 0), torch.nan)
        return Link(
            kind=self.pair.kind,
            source=self.pair.source.id,
            target=self.pair.target.id,
            source_layer=self.pair.source.layer,
            target_layer=self.pair.target.layer,
            partner=None if self.partner is None else self.partner.cpu(),
            decoder_cosine=self.decoder_cosine.cpu(),
            encoder_cosine=self.encoder_cosine.cpu(),
            correlation=correlation.float().cpu(),
            status=status(self.decoder_cosine, source.count > ALIVE_ABOVE, count > ALIVE_ABOVE),
        )
