"""A stream of activations that are held in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from saerelay.data.stream import AbstractStream, Block, shuffled
from saerelay.site import Site


class TensorStream(AbstractStream):
    """Activations held in memory, {site: (N, D)}, repeated without end."""

    def __init__(self, tensors: dict[Site, Tensor], *, block_tokens: int, batch_tokens: int, seed: int = 0) -> None:
        self.tensors = tensors
        self.block_tokens = block_tokens
        self.batch_tokens = batch_tokens
        self.seed = seed

    def block(self, number: int, sites: Sequence[Site]) -> Block:
        """See `AbstractStream.block`."""
        first = next(iter(self.tensors.values()))
        start = number * self.block_tokens
        positions = (start + shuffled(self.block_tokens, self.seed, number)) % first.shape[0]
        return Block(
            activations={site: self.tensors[site][positions] for site in sites},
            keep=torch.ones(self.block_tokens, dtype=torch.bool, device=first.device),
            batch_tokens=self.batch_tokens,
        )
