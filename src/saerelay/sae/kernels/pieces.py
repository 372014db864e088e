"""How a training step is cut into pieces, by shapes alone: the tokens of a batch, and the latents of a dictionary.

On a CPU each piece is computed by one thread (see `threads`); on an accelerator there is one piece.
"""

import math

import torch
from torch import Tensor

from saerelay.sae.dictionary import Dictionary

ROWS = 256
"""The most tokens per piece."""
WORTH_CUTTING = 64
"""A batch of more tokens makes at least two pieces."""
NUMBERS, MAX_PIECES = 2**18, 16
"""Numbers per piece of the weights, unless that makes more than MAX_PIECES."""


def pieces(n: int, n_pieces: int, device: torch.device) -> list[slice]:
    """Cut n rows into slices of about equal size, or into one slice on an accelerator."""
    size = math.ceil(n / n_pieces) if device.type == "cpu" else n
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]


def latent_pieces(d: Dictionary) -> list[slice]:
    """The latents of a dictionary, piece by piece."""
    n_pieces = min(MAX_PIECES, max(1, d.n_latents * d.d_model // NUMBERS))
    return pieces(d.n_latents, n_pieces, d.W_dec.device)


def row_pieces(x: Tensor) -> list[slice]:
    """The tokens of a batch x (B, D), piece by piece."""
    n_rows = x.shape[0]
    n_pieces = math.ceil(n_rows / ROWS)
    if n_rows > WORTH_CUTTING:
        n_pieces = max(2, n_pieces)
    return pieces(n_rows, n_pieces, x.device)
