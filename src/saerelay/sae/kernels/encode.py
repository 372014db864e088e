"""Sparse codes and reconstructions of activations, by the fastest kernels of their device.

Shapes: B tokens, D model width, F latents.
"""

from types import ModuleType

import torch
from torch import Tensor

from saerelay.sae.dictionary import Dictionary
from saerelay.sae.kernels import cpu, reference
from saerelay.sae.kernels.codes import Codes
from saerelay.sae.spec import takes_sparse_step


def products(device: torch.device) -> ModuleType:
    """The module with the fastest sparse products on a device."""
    if device.type == "cuda" and takes_sparse_step("cuda"):
        from saerelay.sae.kernels import triton

        return triton
    return cpu if device.type == "cpu" and cpu.available() else reference


def encode_sparse(dictionary: Dictionary, x: Tensor) -> Codes:
    """The codes of x (B, D), as from `Dictionary.encode`, without the zeros."""
    pre = dictionary.pre_activations(x)
    return dictionary.activation.encode_sparse(pre, dictionary.threshold, products(x.device))


def reconstruct(dictionary: Dictionary, x: Tensor) -> tuple[Codes, Tensor]:
    """Sparse codes and reconstruction (B, D) of activations x (B, D): `dictionary(x)` without a dense code."""
    codes = encode_sparse(dictionary, x)
    x_hat = products(x.device).decode(codes, dictionary.W_dec.to(codes.values.dtype)) + dictionary.b_dec
    if dictionary.W_skip is not None:
        x_hat = x_hat + x.to(dictionary.W_skip.dtype) @ dictionary.W_skip.T
    return codes, x_hat
