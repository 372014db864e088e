"""Convert the SAEs of other tools to dictionaries of raw activations, without a bias to subtract first."""

from dataclasses import replace

import torch
from torch import Tensor

from saerelay.sae.dictionary import Dictionary


def canonical(dictionary: Dictionary, *, subtracts_b_dec: bool = False, scale: float = 1.0) -> Dictionary:
    """Return a dictionary of raw activations x from a dictionary of s·x, with b_dec subtracted first or not.

    With u = s·x: pre = (u − b_dec) W_encᵀ + b_enc and u_hat = z W_dec + b_dec become
    W_enc' = s W_enc, b_enc' = b_enc − W_enc b_dec, W_dec' = W_dec / s, b_dec' = b_dec / s; codes
    and thresholds stay as they are.

    >>> one = torch.ones(1)
    >>> sae = Dictionary(architecture="relu", W_enc=one[None], b_enc=one, W_dec=one[None], b_dec=3 * one)
    >>> canonical(sae, subtracts_b_dec=True).b_enc
    tensor([-2.])
    """
    W_enc = dictionary.W_enc.contiguous()
    W_dec = dictionary.W_dec.contiguous()
    b_enc = dictionary.b_enc
    b_dec = dictionary.b_dec
    if subtracts_b_dec:
        b_enc = (b_enc.double() - _product(W_enc, b_dec)).float()
    if scale != 1:
        W_enc = W_enc * scale
        W_dec = W_dec / scale
        b_dec = b_dec / scale
    return replace(dictionary, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec)


def encoder_bias(dictionary: Dictionary) -> Tensor:
    """Return b_enc (F) for tools whose encoder reads x − b_dec: undoes `subtracts_b_dec`."""
    return (dictionary.b_enc.double() + _product(dictionary.W_enc, dictionary.b_dec)).float()


def _product(W: Tensor, b: Tensor) -> Tensor:
    """Return W b (F), for W (F, D), in float64, since b is a large mean, and in parts, since W may have gigabytes."""
    return torch.cat([rows.double() @ b.double() for rows in W.split(512)])


def from_gate(W: Tensor, *, r_mag: Tensor, b_gate: Tensor, b_mag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return W_enc, b_enc and threshold of a gated encoder that is given by the weights of its gate.

    W has shape (F, D), the others (F).

    1[W u + b_gate > 0]·relu(e^r W u + b_mag) (Rajamanoharan et al. 2024, arXiv 2404.16014, eq. 6
    to 8): with pre = e^r W u + b_mag, the gate is open where pre > b_mag − e^r b_gate.

    >>> one = torch.ones(1)
    >>> from_gate(one[None], r_mag=0 * one, b_gate=-0.5 * one, b_mag=2 * one)
    (tensor([[1.]]), tensor([2.]), tensor([2.5000]))
    """
    magnitude = r_mag.exp()
    threshold = (b_mag - magnitude * b_gate).clamp(min=0)
    return W * magnitude[:, None], b_mag, threshold


def to_gate(dictionary: Dictionary, b_mag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Undo `from_gate`: W, b_gate and r_mag of a gated dictionary's gate, for b_mag (F).

    >>> one = torch.ones(1)
    >>> sae = Dictionary(architecture="gated", W_enc=one[None], b_enc=2 * one, W_dec=one[None], b_dec=one,
    ...                  threshold=2.5 * one, r_mag=0 * one)
    >>> to_gate(sae, sae.b_enc)
    (tensor([[1.]]), tensor([-0.5000]), tensor([0.]))
    """
    assert dictionary.threshold is not None and dictionary.r_mag is not None
    scale = (-dictionary.r_mag).exp()
    b_gate = (b_mag - dictionary.threshold) * scale
    return dictionary.W_enc * scale[:, None], b_gate, dictionary.r_mag
