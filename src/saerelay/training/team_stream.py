"""One block of activations by all ranks: each forwards some micro-batches, and gets from all the sites of its legs.

Whole micro-batches are distributed, so the model's results do not depend on the rank that computes them, and rows go to
the same shuffled places as in a single process. So every rank has, at its sites, the bits that a single process would
have.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from saerelay.data.kept import finite_positions, kept_positions
from saerelay.data.stream import LiveStream
from saerelay.planning.ranks import deal, needed_sites, owners, peers, prober
from saerelay.site import Site
from saerelay.spec import rounded_up
from saerelay.team import Team

MAX_OUTBOX_BYTES = 2**31 - 2**24
"""The most that a rank sends at once: a larger share of a block is sent in several rounds."""
ALIGNMENT = 16
"""Bytes that each site's rows are aligned to, so that they may be viewed in any dtype and copied in words."""
MicroBatch = tuple[Tensor, Tensor]
"""Tokens (s, C) of some sequences, and the row of the block for each position."""


class TeamStream(LiveStream):
    """A `LiveStream` whose forward passes are spread over a team; all ranks ask for the same blocks."""

    def __init__(self, stream: LiveStream, team: Team) -> None:
        plan = stream.plan
        super().__init__(stream.model, stream.sequences, plan, stream.cache, stream.grown_from)
        self.team = team
        self.degree = plan.recipe.model.tensor_parallel
        self.owner = owners(plan, team.size)
        self.needs: list[list[Site]] = []
        """The sites that each rank needs of the current block."""
        sites = plan.with_probe(plan.sites_read)
        self._dtypes = dict.fromkeys(sites, torch.bfloat16)
        if self.model and not self.cache:
            found = self.model.harvest(torch.zeros(1, 2, dtype=torch.long), sites)
            self._dtypes = {site: x.dtype for site, x in found.items()}
        self._row_bytes = {site: plan.facts.width(site) * dtype.itemsize for site, dtype in self._dtypes.items()}

    def _sites(self, number: int, sites: Sequence[Site]) -> list[Site]:
        """The open sites that this rank needs."""
        self.needs = needed_sites(self.plan, self.owner, self.team.size, number, sites)
        return self.needs[self.team.rank]

    def _keep(self, tokens: Tensor, order: Tensor) -> Tensor:
        """Look for outlier norms on one rank, and tell the others."""
        if self.plan.probe_site is None:
            return finite_positions(self.plan, tokens, self.buffers, order)
        source = prober(self.needs, self.plan.probe_site)
        found = None
        if self.team.rank == source:
            found = kept_positions(self.plan, tokens, self.buffers, order).cpu()
        else:
            finite_positions(self.plan, tokens, self.buffers, order)  # raises an error if some are not
        keep = self.team.gather(found)[source]
        assert keep is not None
        return keep.to(self.device)

    def _compute(self, tokens: Tensor, rows: Tensor, sites: Sequence[Site], needed: np.ndarray | None = None) -> None:
        """Run the model over this rank's share of tokens (S, C), and exchange activations with the others.

        Ranks decide together what the cache lacks; a sequence that any rank needs is forwarded by the one it falls to.
        """
        wanted = self.needs
        if needed is not None:
            words = self.team.gather((list(sites), needed))
            wanted = [lacking for lacking, _ in words]
            needed = np.logical_or.reduce([mask for _, mask in words])
        batches = [(tokens[batch], rows[batch]) for batch in self._batches(tokens, needed)]
        shares = deal(len(batches), self.team.busy, self.team.seconds_per_batch, self.degree)

        batch_bytes = sum(self._bytes(self.plan.lm_batch_tokens, sites) for sites in wanted)
        per_round = max(1, MAX_OUTBOX_BYTES // max(1, batch_bytes))
        for start in range(0, max(len(share) for share in shares), per_round):
            dealt = [batches[share.start : share.stop][start : start + per_round] for share in shares]
            self._round(wanted, dealt)

    def _round(self, wanted: Sequence[Sequence[Site]], dealt: Sequence[Sequence[MicroBatch]]) -> None:
        """Forward this rank's micro-batches of `dealt`, send each rank the sites it wants, and place what is received.

        How to see this: the outbox is one piece of memory, cut by rank, then by site; so is the inbox. Both ends know
        all sizes, so nothing but activations is sent. Activations that this rank forwards for itself go straight to
        their places.
        """
        me = self.team.rank
        ranks = range(self.team.size)
        n_tokens = [sum(rows.numel() for _, rows in batches) for batches in dealt]
        others = peers(me, self.team.size, self.degree)
        for_others = [list(wanted[rank]) if rank in others else [] for rank in ranks]
        for_me = [list(wanted[me]) if rank in others else [] for rank in ranks]

        sent = [self._bytes(n_tokens[me], for_others[rank]) for rank in ranks]
        outbox = torch.empty(sum(sent), dtype=torch.uint8, device=self.device)
        parcels = [self._cut(part, n_tokens[me], for_others[rank]) for rank, part in enumerate(outbox.split(sent))]
        self._forward(dealt[me], wanted, parcels)

        received = [self._bytes(n_tokens[rank], for_me[rank]) for rank in ranks]
        inbox = self.team.exchange(outbox, sent, received)
        for rank, part in enumerate(inbox.split(received)):
            if len(part):
                places = torch.cat([rows.flatten() for _, rows in dealt[rank]])
                for site, x in self._cut(part, n_tokens[rank], for_me[rank]).items():
                    self._put(site, places, x)

    def _forward(
        self, batches: Sequence[MicroBatch], wanted: Sequence[Sequence[Site]], parcels: Sequence[Mapping[Site, Tensor]]
    ) -> None:
        """Run the model over some micro-batches; write activations to their rows of a block, and into parcels.

        Every rank runs to the deepest site that any rank wants: ranks that hold the model together must.
        """
        mine = wanted[self.team.rank]
        sites = sorted({site for of_rank in wanted for site in of_rank})
        began = time.perf_counter()
        start = 0
        for tokens, rows in batches:
            assert self.model, "everything was in the cache when the run began"
            stop = start + rows.numel()
            visitors = {}
            for site in sites:
                copies = [parcel[site][start:stop] for parcel in parcels if site in parcel]
                visitors[site] = partial(self._hand_out, site, rows if site in mine else None, copies)
            self.model.visit(tokens, visitors)
            start = stop
        if batches:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.team.own_seconds_per_batch = (time.perf_counter() - began) / len(batches)

    def _hand_out(self, site: Site, rows: Tensor | None, copies: Sequence[Tensor], x: Tensor) -> None:
        """Write activations (..., D) to their rows of the block, if this rank needs them, and to copies (n, D)."""
        if rows is not None:
            self._put(site, rows, x)
        for copy in copies:
            copy.copy_(x.flatten(0, -2))

    def _bytes(self, n_tokens: int, sites: Sequence[Site]) -> int:
        """Number of bytes that the activations of some sites take in a box."""
        return sum(rounded_up(n_tokens * self._row_bytes[site], ALIGNMENT) for site in sites)

    def _cut(self, box: Tensor, n_tokens: int, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """The activations (n_tokens, D) of some sites that lie one after the other in a box (uint8)."""
        parts = box.split([self._bytes(n_tokens, [site]) for site in sites])
        views = {}
        for site, part in zip(sites, parts, strict=True):
            activations = part[: n_tokens * self._row_bytes[site]].view(self._dtypes[site])
            views[site] = activations.view(n_tokens, self.plan.facts.width(site))
        return views
