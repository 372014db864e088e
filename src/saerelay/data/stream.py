"""The seam between training and the outside: activations of many sites, block by block, in a fixed random order.

A block is a run of raw token positions: sequences drawn from the whole corpus without replacement. Which it holds, the
order positions are shuffled in, and which of them are left out (BOS, outlier norms) depend on the seed and the block's
number alone, never on which sites are open: rows do not shift when legs come and go, and a stream has no state to save.
"""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from saerelay.data.cache import ActivationCache, sequence_ids
from saerelay.lm.model import LanguageModel
from saerelay.planning.plan import Plan
from saerelay.site import Site
from saerelay.spec import seed_from

LM_BATCH_TOKENS = 4096
"""Tokens in one forward pass of the language model; a constant, since bits depend on it."""


@dataclass(frozen=True, eq=False)
class Block:
    """Activations of one block, in shuffled order; valid until its stream is asked for the next. P positions, D width.

    What it gives may be views of the stream's buffers: to be read, not written to.
    """

    activations: dict[Site, Tensor]
    """(P, D) for each open site, in the dtype the model has there."""
    keep: Tensor
    """bool (P): rows that are trained on."""
    batch_tokens: int

    @property
    def n_batches(self) -> int:
        """Batches in this block."""
        return self.keep.shape[0] // self.batch_tokens

    def batch(self, index: int) -> dict[Site, Tensor]:
        """The kept rows (at most batch_tokens, D) of one batch, as stored, the same positions at every site."""
        return self._kept(self.activations, index * self.batch_tokens, (index + 1) * self.batch_tokens)

    def again(self, index: int, times: int) -> dict[Site, Tensor]:
        """The batch that legs train on besides batch `index`: each is so once for every number of `times`."""
        return self.batch((index + times * max(1, self.n_batches * 5 // 13)) % self.n_batches)

    def chunks(self, sites: Iterable[Site], n: int = 4096) -> Iterator[dict[Site, Tensor]]:
        """All kept rows of some sites, float32, in shuffled order, from n positions at a time."""
        for start in range(0, self.keep.shape[0], n):
            yield {site: x.float() for site, x in self._kept(sites, start, start + n).items()}

    def rows(self, site: Site, n: int = 32_768) -> Tensor:
        """The first n kept rows (at most n, D) of a site, float32, in shuffled order."""
        return self.activations[site].index_select(0, self.keep.nonzero()[:n, 0]).float()

    def _kept(self, sites: Iterable[Site], start: int, stop: int) -> dict[Site, Tensor]:
        """Kept rows in [start, stop), copied only where some are left out."""
        slices = {site: self.activations[site][start:stop] for site in sites}
        keep = self.keep[start:stop]
        if not bool(keep.all()):
            positions = keep.nonzero()[:, 0]
            slices = {site: x.index_select(0, positions) for site, x in slices.items()}
        return slices


class AbstractStream(ABC):
    """Gives block `number` with the activations of the sites asked for; the same call gives the same bits.

    A block may be gone once the next is asked for.
    """

    @abstractmethod
    def block(self, number: int, sites: Sequence[Site]) -> Block:
        """Positions [number·P, (number + 1)·P) of the axis."""


def shuffled(n: int, seed: int, number: int) -> Tensor:
    """The order of a block's n positions, from seed and block number."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_from("shuffle", seed, number)))


class TensorStream(AbstractStream):
    """Activations held in memory, {site: (N, D)}; past the end it starts again. For tests and for one's own tensors."""

    def __init__(self, tensors: dict[Site, Tensor], *, block_tokens: int, batch_tokens: int, seed: int = 0) -> None:
        self.tensors, self.block_tokens, self.batch_tokens, self.seed = tensors, block_tokens, batch_tokens, seed

    def block(self, number: int, sites: Sequence[Site]) -> Block:
        """See `AbstractStream.block`."""
        n = next(iter(self.tensors.values())).shape[0]
        positions = (number * self.block_tokens + shuffled(self.block_tokens, self.seed, number)) % n
        return Block(
            activations={site: self.tensors[site][positions] for site in sites},
            keep=torch.ones(self.block_tokens, dtype=torch.bool),
            batch_tokens=self.batch_tokens,
        )


class LiveStream(AbstractStream):
    """Activations computed by the language model as they are needed, from sequences (N, context) of token ids.

    Each open site has one buffer (P, D), which all blocks share: the model's activations go from its forward straight
    to their shuffled place. With a cache they are rounded to bfloat16, read from it where it has them and added to it
    where not; `model` may be None if it has them all.
    """

    def __init__(
        self, model: LanguageModel | None, sequences: np.ndarray, plan: Plan, cache: ActivationCache | None = None
    ) -> None:
        self.model, self.sequences, self.plan, self.cache = model, sequences, plan, cache
        self.ids = sequence_ids(sequences) if cache else np.empty(0, dtype=np.int64)
        self.buffers: dict[Site, Tensor] = {}
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    @property
    def device(self) -> torch.device:
        """Where blocks are."""
        return self.model.device if self.model else torch.device(self.plan.facts.device)

    def block(self, number: int, sites: Sequence[Site]) -> Block:
        """See `AbstractStream.block`."""
        plan, index = self.plan, self.sequences_of(number)
        tokens = torch.from_numpy(self.sequences[index].astype(np.int64))
        if self.device.type == "cuda":  # one transfer a block, which no forward waits for
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        order = shuffled(plan.block_tokens, plan.recipe.train.seed, number).to(self.device)
        slots = order.argsort().view(tokens.shape)  # where each position goes
        for closed in self.buffers.keys() - set(sites):
            del self.buffers[closed]
        if self.cache:
            self._read_or_compute(self.cache, self.ids[index], tokens, slots, sites)
        else:
            self._compute(tokens, slots, sites)
        return Block(
            activations=self.buffers,
            keep=kept_positions(plan, tokens, self.buffers, order),
            batch_tokens=plan.recipe.train.batch_tokens,
        )

    def _compute(self, tokens: Tensor, slots: Tensor, sites: Sequence[Site], lacking: np.ndarray | None = None) -> None:
        """Run the model over tokens (S, context) into slots (S, context), without batches that lack no sequence."""
        size = max(1, LM_BATCH_TOKENS // self.plan.recipe.data.context)
        for start in range(0, tokens.shape[0], size):
            part = slice(start, start + size)
            if lacking is None or lacking[part].any():
                assert self.model, "everything was in the cache when the run began"
                self.model.visit(tokens[part], {site: partial(self._put, site, slots[part]) for site in sites})

    def _put(self, site: Site, slots: Tensor, x: Tensor) -> None:
        """Copy activations (..., D) to their slots (...) of a site's buffer."""
        x = (x.bfloat16() if self.cache else x).flatten(0, -2).contiguous()
        if site not in self.buffers:
            with torch.inference_mode(False):  # rows of it may meet autograd
                self.buffers[site] = x.new_empty(self.plan.block_tokens, x.shape[1])
        buffer = self.buffers[site]
        if x.device.type == "cpu" and all(n * x.itemsize % 16 == 0 for n in (x.shape[1], x.storage_offset())):
            buffer, x = buffer.view(torch.complex128), x.view(torch.complex128)  # wide words: half the time
        buffer.index_copy_(0, slots.flatten(), x)

    def _read_or_compute(
        self, cache: ActivationCache, ids: np.ndarray, tokens: Tensor, slots: Tensor, sites: Sequence[Site]
    ) -> None:
        """Fill the buffers from the cache; where it lacks sequences at a site, from the model, and add them to it."""
        lacking = {site: cache.lacking(site, ids) for site in sites}
        computed = [site for site in sites if lacking[site].any()]
        if computed:
            self._compute(tokens, slots, computed, np.any([lacking[site] for site in computed], axis=0))
        for site in sites:
            known = np.flatnonzero(~lacking[site])
            for position, x in cache.read(site, ids[known]):
                self._put(site, slots[known[position]], x.to(self.device))
            new = np.flatnonzero(lacking[site])
            for start in range(0, len(new), cache.per_shard):
                part = new[start : start + cache.per_shard]
                rows = self.buffers[site].index_select(0, slots[part].flatten())
                cache.write(site, ids[part], rows.view(*slots[part].shape, -1).cpu())

    def uncached_bytes(self) -> int:
        """Bytes that the whole plan, read through, would add to the cache."""
        assert self.cache
        plan, found = self.plan, defaultdict[Site, set[int]](set)
        for start in range(0, plan.n_tokens, plan.block_tokens):
            ids = self.ids[self.sequences_of(start // plan.block_tokens)]
            for site in plan.open_sites(start, start + plan.block_tokens):
                found[site].update(ids[self.cache.lacking(site, ids)].tolist())
        return sum(len(ids) * self.cache.bytes_per_sequence(site) for site, ids in found.items())

    def sequences_of(self, number: int) -> np.ndarray:
        """Which sequences block `number` holds: int64 (P / context)."""
        per_block = self.plan.block_tokens // self.plan.recipe.data.context
        return self.read_order(number * per_block, per_block)

    def read_order(self, first: int, n: int) -> np.ndarray:
        """Which sequences are read as the first-th and the n - 1 after it: a new permutation of all in every epoch.

        Long documents fill many sequences in a row; without this a short leg would see only a few of them.
        """
        total, parts = len(self.sequences), []
        for epoch in range(first // total, (first + n - 1) // total + 1):
            if epoch != self.epoch:
                generator = np.random.default_rng(seed_from("order", self.plan.recipe.train.seed, epoch))
                self.epoch, self.order = epoch, generator.permutation(total)
            parts.append(self.order[max(0, first - epoch * total) : first + n - epoch * total])
        return np.concatenate(parts)


def kept_positions(plan: Plan, tokens: Tensor, activations: dict[Site, Tensor], order: Tensor | None = None) -> Tensor:
    """bool (P): not the BOS in front, no outlier of norm at the plan's probe site; tokens: (P / context, context).

    `order` (P) is that of the activations' rows, if they are not in the tokens' order; the result has the same.
    """
    keep = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
    if plan.recipe.data.prepend_bos:
        keep[:, 0] = False
    keep = keep.flatten() if order is None else keep.flatten()[order]
    if plan.probe_site:
        norms = torch.cat([x.float().norm(dim=1) for x in activations[plan.probe_site].split(4096)])
        keep &= norms <= plan.recipe.data.outlier_norm * norms[keep].nanmedian()
    return keep


def trained_on(plan: Plan, tokens: Tensor, activations: Mapping[Site, Tensor]) -> Tensor:
    """bool (B, C): `kept_positions` of tokens (B, C), from activations (B, C, D) with those of the probe site."""
    flat = {site: x.flatten(0, 1) for site, x in activations.items()}
    return kept_positions(plan, tokens, flat).view_as(tokens)


def gather_rows(plan: Plan, stream: AbstractStream, n: int) -> tuple[dict[Site, Tensor], int]:
    """At least n rows (n, D) of every site, from the first blocks; and how many positions were read for them."""
    found = {site: list[Tensor]() for site in plan.sites}
    n_blocks = math.ceil(n / plan.block_tokens)
    for number in range(n_blocks):
        block = stream.block(number, plan.sites)
        for site, parts in found.items():
            parts.append(block.rows(site, n))
    return {site: torch.cat(parts)[:n] for site, parts in found.items()}, n_blocks * plan.block_tokens
