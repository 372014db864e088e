"""The interface between training and the outside: blocks of activations at many sites.

A block is a stretch of raw token positions: sequences drawn from the whole corpus without
replacement. The sequences of a block, the order in which their positions are shuffled, and the
positions that are left out (BOS, outlier norms) depend only on the seed and the block's number,
never on which sites are open: rows do not shift when legs come and go, and a stream has no state
to save.

Shapes: P positions in a block, S sequences in a block, C positions in a sequence (the context),
D width of the activations at a site.
"""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from saerelay.data.cache import ActivationCache, sequence_ids
from saerelay.data.kept import OutlierCount, kept_positions
from saerelay.lm.model import LanguageModel
from saerelay.planning.leg import Leg
from saerelay.planning.plan import Plan
from saerelay.site import Site
from saerelay.spec import seed_from


@dataclass(frozen=True, eq=False)
class Block:
    """Activations of one block, in shuffled order; valid until the next block is asked for.

    The tensors returned may be views of the stream's buffers: read them, do not write to them.

    On a CPU a batch consists of the kept rows of its own stretch of positions. On a GPU, where every
    batch should have the same shape and nothing should wait for the device, batches are cut from the
    sequence of all kept rows of the block, and the last batches are filled up from its first rows.
    """

    activations: dict[Site, Tensor]
    """(P, D) for each open site, in the model's dtype at that site."""
    keep: Tensor
    """Bool (P): rows that are trained on."""
    batch_tokens: int

    @property
    def n_batches(self) -> int:
        """Number of batches in this block."""
        return self.keep.shape[0] // self.batch_tokens

    def batch(self, index: int) -> dict[Site, Tensor]:
        """The kept rows (at most batch_tokens, D) of one batch, the same at every site."""
        start = index * self.batch_tokens
        stop = start + self.batch_tokens
        if self.keep.device.type == "cpu":
            return self._kept(self.activations, start, stop)
        rows = self._filled_up[start:stop]
        return {site: x.index_select(0, rows) for site, x in self.activations.items()}

    def copy(self, sites: Iterable[Site]) -> "Block":
        """A copy of this block at some sites, which stays valid when the next block is asked for."""
        return replace(self, activations={site: self.activations[site].clone() for site in sites})

    def repeated(self, index: int, repetition: int) -> dict[Site, Tensor]:
        """The batch for legs with `reuse` after batch `index`, in a repetition of the block; 0 gives the batch itself.

        It lies `repetition` strides of 5/13 of the block further on, cyclically: as `index` runs through all batches,
        so does the batch returned.
        """
        stride = max(1, self.n_batches * 5 // 13)
        return self.batch((index + repetition * stride) % self.n_batches)

    def chunks(self, sites: Iterable[Site], n: int = 4096) -> Iterator[dict[Site, Tensor]]:
        """Yield all kept rows of some sites, float32, from n positions at a time."""
        if self.keep.device.type != "cpu":
            for kept in self.kept_rows.split(n):
                yield {site: self.activations[site].index_select(0, kept).float() for site in sites}
            return
        for start in range(0, self.keep.shape[0], n):
            rows = self._kept(sites, start, start + n)
            yield {site: x.float() for site, x in rows.items()}

    def target(self, leg: Leg, n: int) -> Tensor | None:
        """The first n kept rows of the activations that a leg reconstructs, if it is a transcoder."""
        return self.rows(leg.site_out, n) if leg.is_transcoder else None

    def rows(self, site: Site, n: int = 32_768) -> Tensor:
        """The first n kept rows (at most n, D) of a site, float32, in shuffled order."""
        return self.activations[site].index_select(0, self.kept_rows[:n]).float()

    @cached_property
    def kept_rows(self) -> Tensor:
        """int64: indices of the kept rows, in order."""
        return self.keep.nonzero()[:, 0]

    @cached_property
    def _filled_up(self) -> Tensor:
        """int64 (P): indices of the kept rows, repeated from the first one up to P."""
        kept = self.kept_rows
        if not len(kept):
            return kept
        return kept[torch.arange(len(self.keep), device=kept.device) % len(kept)]

    def _kept(self, sites: Iterable[Site], start: int, stop: int) -> dict[Site, Tensor]:
        """Kept rows in [start, stop): views if all rows are kept, else copies."""
        slices = {site: self.activations[site][start:stop] for site in sites}
        keep = self.keep[start:stop]
        if bool(keep.all()):
            return slices
        positions = keep.nonzero()[:, 0]
        return {site: x.index_select(0, positions) for site, x in slices.items()}


class AbstractStream(ABC):
    """Gives activations block by block; the same call gives the same bits.

    A block may become invalid once the next one is asked for.
    """

    @abstractmethod
    def block(self, number: int, sites: Sequence[Site]) -> Block:
        """Positions [number·P, (number + 1)·P) of the token axis, at some sites."""


def shuffled(n: int, seed: int, number: int) -> Tensor:
    """The order of a block's n positions, which follows from the seed and the block's number."""
    generator = torch.Generator().manual_seed(seed_from("shuffle", seed, number))
    return torch.randperm(n, generator=generator)


class LiveStream(AbstractStream):
    """Activations computed by the language model, from sequences (N, C) of token ids.

    Each open site has one buffer (P, D), which all blocks share: activations go from the model's
    forward straight to their shuffled rows. With a cache, activations are rounded to bfloat16; cached
    ones are read, the others are computed and added to the cache. `model` may be None if the cache
    holds everything that will be read. `grown_from` are the numbers of sequences that there were before
    more were added.
    """

    def __init__(
        self,
        model: LanguageModel | None,
        sequences: np.ndarray,
        plan: Plan,
        cache: ActivationCache | None = None,
        grown_from: Sequence[int] = (),
    ) -> None:
        self.model = model
        self.sequences = sequences
        self.plan = plan
        self.cache = cache
        self.is_cached = False
        """Whether the cache is known to hold everything that is still to be read, so that no model has to run."""
        self.grown_from = grown_from
        self.ids = sequence_ids(sequences) if cache else np.empty(0, dtype=np.int64)
        self.buffers: dict[Site, Tensor] = {}
        self.outliers = OutlierCount(plan)
        self._epoch = -1
        self._epoch_order = np.empty(0, dtype=np.int64)

    @property
    def device(self) -> torch.device:
        """The device that blocks are on."""
        return self.model.device if self.model else torch.device(self.plan.facts.device)

    def block(self, number: int, sites: Sequence[Site]) -> Block:
        """See `AbstractStream.block`; the plan's probe site is open in every block."""
        sites = self._sites(number, sites)
        index = self.sequences_of(number)
        tokens = torch.from_numpy(self.sequences[index].astype(np.int64))
        if self.device.type == "cuda":  # one transfer per block, for which no forward waits
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)

        # Row i of the block is position order[i]; the inverse permutation gives the row of each
        # position.
        order = shuffled(self.plan.block_tokens, self.plan.recipe.train.seed, number).to(self.device)
        rows = order.argsort().view(tokens.shape)
        for closed in self.buffers.keys() - set(sites):
            del self.buffers[closed]
        if self.cache:
            self._read_or_compute(self.cache, self.ids[index], tokens, rows, sites)
        else:
            self._compute(tokens, rows, sites)
        keep = self._keep(tokens, order)
        in_order = torch.empty_like(keep)
        in_order[order] = keep
        self.outliers.add(tokens, in_order.view_as(tokens))
        return Block(
            activations=self.buffers,
            keep=keep,
            batch_tokens=self.plan.batch_tokens,
        )

    def _sites(self, number: int, sites: Sequence[Site]) -> list[Site]:
        """The sites to read of a block: the open sites, and the plan's probe site."""
        return self.plan.with_probe(sites)

    def _keep(self, tokens: Tensor, order: Tensor) -> Tensor:
        """Bool (P): which rows of the block are trained on."""
        return kept_positions(self.plan, tokens, self.buffers, order)

    def _compute(self, tokens: Tensor, rows: Tensor, sites: Sequence[Site], needed: np.ndarray | None = None) -> None:
        """Run the model over tokens (S, C); each position has its row of the block in `rows`.

        Batches without a sequence that is `needed`, bool (S), are skipped.
        """
        for batch in self._batches(tokens, needed):
            assert self.model, "everything was in the cache when the run began"
            visitors = {site: partial(self._put, site, rows[batch]) for site in sites}
            self.model.visit(tokens[batch], visitors)

    def _batches(self, tokens: Tensor, needed: np.ndarray | None) -> list[slice]:
        """The batches of tokens (S, C) that the model runs over, as slices of sequences."""
        size = max(1, self.plan.lm_batch_tokens // self.plan.recipe.data.context)
        batches = [slice(start, start + size) for start in range(0, tokens.shape[0], size)]
        if needed is None:
            return batches
        return [batch for batch in batches if needed[batch].any()]

    def _put(self, site: Site, rows: Tensor, x: Tensor) -> None:
        """Copy activations (..., D) to their rows (...) of a site's buffer."""
        if self.cache:
            x = x.bfloat16()
        x = x.flatten(0, -2).contiguous()
        if site not in self.buffers:
            with torch.inference_mode(False):  # autograd may use views of the buffer
                self.buffers[site] = x.new_empty(self.plan.block_tokens, x.shape[1])
        buffer = self.buffers[site]

        # On a CPU, index_copy_ copies element by element; with elements of 16 bytes it takes half the time.
        row_bytes = x.shape[1] * x.itemsize
        offset_bytes = x.storage_offset() * x.itemsize
        if x.device.type == "cpu" and row_bytes % 16 == 0 and offset_bytes % 16 == 0:
            buffer = buffer.view(torch.complex128)
            x = x.view(torch.complex128)
        buffer.index_copy_(0, rows.flatten(), x)

    def _read_or_compute(
        self, cache: ActivationCache, ids: np.ndarray, tokens: Tensor, rows: Tensor, sites: Sequence[Site]
    ) -> None:
        """Fill the buffers from the cache; missing activations are computed by the model and added to the cache.

        ids: int64 (S); tokens and rows: (S, C).
        """
        missing = {site: cache.missing(site, ids) for site in sites}
        to_compute = [site for site in sites if missing[site].any()]
        missing_somewhere = np.zeros(len(ids), dtype=bool)
        for site in to_compute:
            missing_somewhere |= missing[site]
        self._compute(tokens, rows, to_compute, needed=missing_somewhere)

        for site in sites:
            # Cached activations replace those that the model has just computed along with missing ones.
            stored = np.flatnonzero(~missing[site])
            for i, x in cache.read(site, ids[stored]):
                self._put(site, rows[stored[i]], x.to(self.device))

            new = np.flatnonzero(missing[site])
            for start in range(0, len(new), cache.per_shard):
                shard = new[start : start + cache.per_shard]
                x = self.buffers[site].index_select(0, rows[shard].flatten())
                cache.write(site, ids[shard], x.view(*rows[shard].shape, -1).cpu())

    def uncached_bytes(self, cursor: int = 0) -> int:
        """Bytes that reading the plan from the cursor's block to its end would add to the cache."""
        assert self.cache
        block_tokens = self.plan.block_tokens
        uncached = defaultdict[Site, set[int]](set)
        for start in range(cursor // block_tokens * block_tokens, self.plan.n_tokens, block_tokens):
            ids = self.ids[self.sequences_of(start // block_tokens)]
            for site in self.plan.open_sites(start, start + block_tokens):
                missing = self.cache.missing(site, ids)
                uncached[site].update(ids[missing].tolist())
        return sum(len(ids) * self.cache.bytes_per_sequence(site) for site, ids in uncached.items())

    def sequences_of(self, number: int) -> np.ndarray:
        """The sequences in block `number`: int64 (S)."""
        per_block = self.plan.block_tokens // self.plan.recipe.data.context
        return self.read_order(number * per_block, per_block)

    def read_order(self, first: int, n: int) -> np.ndarray:
        """The n sequences read from `first` on: every epoch reads all sequences, in a new order.

        A document can fill several sequences in a row; in the original order, a short leg would see fewer
        documents. Sequences added later follow those that were there before, in an order of their own.
        """
        total = len(self.sequences)
        parts = []
        first_epoch = first // total
        last_epoch = (first + n - 1) // total
        for epoch in range(first_epoch, last_epoch + 1):
            begin = max(0, first - epoch * total)
            end = first + n - epoch * total
            parts.append(self._order_of(epoch)[begin:end])
        return np.concatenate(parts)

    def _order_of(self, epoch: int) -> np.ndarray:
        """The order in which an epoch reads all sequences: int64 (N); that of the last epoch asked for is kept."""
        if epoch != self._epoch:
            generator = np.random.default_rng(seed_from("order", self.plan.recipe.train.seed, epoch))
            orders = []
            begin = 0
            for end in (*self.grown_from, len(self.sequences)):
                orders.append(begin + generator.permutation(end - begin))
                begin = end
            self._epoch = epoch
            self._epoch_order = np.concatenate(orders)
        return self._epoch_order


def gather_rows(plan: Plan, stream: AbstractStream, n: int) -> tuple[dict[Site, Tensor], int]:
    """The first n kept rows (n, D) of every site, float32, and the number of positions read for them."""
    n_blocks = math.ceil(n / plan.block_tokens)
    parts: dict[Site, list[Tensor]] = {site: [] for site in plan.sites}
    for number in range(n_blocks):
        block = stream.block(number, plan.sites)
        for site in plan.sites:
            parts[site].append(block.rows(site, n))
    rows = {site: torch.cat(parts[site])[:n] for site in plan.sites}
    return rows, n_blocks * plan.block_tokens
