"""The blocks that a hop keeps: its map was fitted on them, and its refit and second passes use them again.

A leg that trains on each block several times (`plan.reuse`) makes its first repetitions on these blocks, which it has
not trained on yet, instead of on the same block again. This costs memory, not tokens (docs/log.md, "Hops on many
documents").
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from saerelay.data.stream import Block
from saerelay.planning.leg import Leg
from saerelay.site import Site
from saerelay.training.run_state import Training


def keep_block(now: Training, block: Block) -> None:
    """Copy a block, at the sites that they train on, for the upcoming hops that will use it again."""
    block_tokens = now.plan.block_tokens
    for leg in now.plan.legs:
        first_kept = leg.fold_at - leg.n_kept_blocks(block_tokens) * block_tokens
        if now.trains(leg) and first_kept <= now.cursor < leg.fold_at:
            now.kept_blocks.setdefault(leg.id, []).append(block.copy({leg.site, leg.site_out}))


def block_for_refit(now: Training, leg: Leg, block: Block, n: int) -> Block:
    """A block with the last n tokens before a leg's hop: `block`, the last one, or so many kept blocks in one."""
    n_blocks = math.ceil(n / now.plan.block_tokens)
    kept = now.kept_blocks.get(leg.id, [])[-n_blocks:]
    if len(kept) <= 1:
        return block
    activations = {site: torch.cat([part.activations[site] for part in kept]) for site in kept[0].activations}
    return replace(block, activations=activations, keep=torch.cat([part.keep for part in kept]))


def batches_of_kept_blocks(now: Training, number: int, index: int, repetition: int) -> dict[str, Mapping[Site, Tensor]]:
    """The batches of kept blocks, by leg, that legs train on in a repetition of batch `index` of block `number`.

    A leg takes a batch from each of its kept blocks in turn, so that it sees text of all of them up to its end. Legs
    that have none left repeat the block itself.
    """
    batches: dict[str, Mapping[Site, Tensor]] = {}
    if repetition != 1:
        return batches
    for leg_id, kept in now.kept_blocks.items():
        n_since_hop = number - now.plan.leg(leg_id).fold_at // now.plan.block_tokens
        if n_since_hop >= 0:
            n_taken = n_since_hop * kept[0].n_batches + index
            batch, which = divmod(n_taken, len(kept))
            if batch < kept[0].n_batches:
                batches[leg_id] = kept[which].batch(batch)
    return batches


def forget_blocks(now: Training) -> None:
    """Forget, at the end of a block, the kept blocks of legs that will not use them again."""
    for leg_id, kept in list(now.kept_blocks.items()):
        leg = now.plan.leg(leg_id)
        if now.cursor < leg.fold_at:
            continue
        n_used = len(kept) if leg.schedule.reuse == 1 else (now.cursor - leg.fold_at) // now.plan.block_tokens
        if n_used >= len(kept) or leg_id not in now.cohort:
            del now.kept_blocks[leg_id]
