"""The seam between training and the outside: activations of many sites, block by block, in a fixed random order.

A block is a run of raw token positions: sequences drawn from the whole corpus without replacement. Which it holds, the
order positions are shuffled in, and which of them are left out (BOS, outlier norms) depend on the seed and the block's
number alone, never on which sites are open: rows do not shift when legs come and go, and a stream has no state to save.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saerelay.model import LanguageModel
from saerelay.plan import Plan
from saerelay.site import Site
from saerelay.spec import seed_from

LM_BATCH_TOKENS = 4096
"""Tokens in one forward pass of the language model; a constant, since bits depend on it."""


@dataclass(frozen=True, eq=False)
class Block:
    """Activations of one block. P positions, D model width."""

    activations: dict[Site, Tensor]
    """(P, D) for each open site, in the model's dtype, in corpus order."""
    keep: Tensor
    """bool (P): positions that are trained on."""
    order: Tensor
    """int64 (P): the shuffled order."""
    batch_tokens: int

    @property
    def n_batches(self) -> int:
        """Batches in this block."""
        return self.order.shape[0] // self.batch_tokens

    def batch(self, index: int) -> dict[Site, Tensor]:
        """The kept rows (at most batch_tokens, D) of one batch, float32, the same positions at every site."""
        positions = self.order[index * self.batch_tokens : (index + 1) * self.batch_tokens]
        positions = positions[self.keep[positions]]
        return {site: x[positions].float() for site, x in self.activations.items()}

    def rows(self, site: Site) -> Tensor:
        """All kept rows (≤ P, D) of a site, float32, in shuffled order."""
        return self.activations[site][self.order[self.keep[self.order]]].float()


class AbstractStream(ABC):
    """Gives block `number` with the activations of the sites asked for; the same call gives the same bits."""

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
        positions = torch.arange(number * self.block_tokens, (number + 1) * self.block_tokens) % n
        return Block(
            activations={site: self.tensors[site][positions] for site in sites},
            keep=torch.ones(self.block_tokens, dtype=torch.bool),
            order=shuffled(self.block_tokens, self.seed, number),
            batch_tokens=self.batch_tokens,
        )


class LiveStream(AbstractStream):
    """Activations computed by the language model as they are needed, from sequences (N, context) of token ids."""

    def __init__(self, model: LanguageModel, sequences: np.ndarray, plan: Plan) -> None:
        self.model, self.sequences, self.plan = model, sequences, plan
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def block(self, number: int, sites: Sequence[Site]) -> Block:
        """See `AbstractStream.block`."""
        plan = self.plan
        per_block = plan.block_tokens // plan.run.data.context
        index = self.read_order(number * per_block, per_block)
        tokens = torch.from_numpy(self.sequences[index].astype(np.int64))
        harvested: dict[Site, list[Tensor]] = {site: [] for site in sites}
        for part in tokens.split(max(1, LM_BATCH_TOKENS // plan.run.data.context)):
            for site, x in self.model.harvest(part.to(self.model.device), sites).items():
                harvested[site].append(x.flatten(0, 1))
        activations = {site: torch.cat(parts) for site, parts in harvested.items()}
        return Block(
            activations=activations,
            keep=kept_positions(plan, tokens.to(self.model.device), activations),
            order=shuffled(plan.block_tokens, plan.run.train.seed, number).to(self.model.device),
            batch_tokens=plan.run.train.batch_tokens,
        )

    def read_order(self, first: int, n: int) -> np.ndarray:
        """Which sequences are read as the first-th and the n - 1 after it: a new permutation of all in every epoch.

        Long documents fill many sequences in a row; without this a short leg would see only a few of them.
        """
        total, parts = len(self.sequences), []
        for epoch in range(first // total, (first + n - 1) // total + 1):
            if epoch != self.epoch:
                generator = np.random.default_rng(seed_from("order", self.plan.run.train.seed, epoch))
                self.epoch, self.order = epoch, generator.permutation(total)
            parts.append(self.order[max(0, first - epoch * total) : first + n - epoch * total])
        return np.concatenate(parts)


def kept_positions(plan: Plan, tokens: Tensor, activations: dict[Site, Tensor]) -> Tensor:
    """bool (P): not the BOS in front, no outlier of norm at the plan's probe site; tokens: (P / context, context)."""
    keep = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
    if plan.run.data.prepend_bos:
        keep[:, 0] = False
    keep = keep.flatten()
    if plan.probe_site:
        norms = activations[plan.probe_site].float().norm(dim=1)
        keep &= norms <= plan.run.data.outlier_norm * norms[keep].nanmedian()
    return keep


def load_model(plan: Plan) -> LanguageModel:
    """The model a plan was made for: same revision, same dtype, with every module the plan reads."""
    facts = plan.facts
    model = LanguageModel.load(plan.run.model.model_copy(update={"revision": facts.revision, "dtype": facts.dtype}))
    for leg in plan.legs:
        model.check_site(leg.site)
        if leg.parent:
            model.check_site(plan.parent_site(leg))
    return model
