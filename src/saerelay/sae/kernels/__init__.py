"""Sparse encoding, decoding and training, with which a step costs little more than its encoder product."""

from saerelay.sae.kernels.codes import Codes, add_at, dense_codes, join_codes, latent_sums, split_codes
from saerelay.sae.kernels.encode import encode_sparse, products, reconstruct
from saerelay.sae.kernels.pieces import latent_pieces
from saerelay.sae.kernels.step import Reading, Step, sparse_step

__all__ = [
    "Codes",
    "Reading",
    "Step",
    "add_at",
    "dense_codes",
    "encode_sparse",
    "join_codes",
    "latent_pieces",
    "latent_sums",
    "products",
    "reconstruct",
    "sparse_step",
    "split_codes",
]
