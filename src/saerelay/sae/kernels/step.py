"""The sparse training step: one dense encoder product, then work only where latents are active.

Gradients are written out by hand and equal those of autograd on `dictionaries.training_loss`; a test in float64 keeps
it so. On a CPU the batch is cut into pieces of tokens whose pre-activations stay in the cache, and gradients are made
for pieces of latents. Shapes: B tokens, D model width, F latents, N dead latents.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from saerelay.sae.loss import AUX_EVERY, Loss, error_divisor, k_aux

from saerelay.sae.dictionary import Dictionary
from saerelay.sae.kernels import cpu, reference
from saerelay.sae.kernels.codes import Codes, join_codes
from saerelay.sae.kernels.select import (
    codes_at_least,
    bound_of_batch,
    keep_largest,
    nonzero_codes,
    top_codes,
    top_codes_of_batch,
)
from saerelay.sae.spec import DictionarySpec, takes_sparse_step
from saerelay.sae.threads import in_parallel

ROWS = 256
"""Tokens in a piece, or half of a batch that has fewer than two."""
NUMBERS, MAX_PIECES = 2**18, 16
"""Numbers in a piece of the weights, if that does not make too many pieces."""


def products(device: torch.device) -> ModuleType:
    """The module with the fastest sparse products on a device."""
    if device.type == "cuda" and takes_sparse_step("cuda"):
        from saerelay.sae.kernels import triton

        return triton
    return cpu if device.type == "cpu" and cpu.available() else reference


def encode_sparse(dictionary: Dictionary, x: Tensor) -> Codes:
    """The codes of x (B, D), as `Dictionary.encode` gives them, without the zeros."""
    if dictionary.architecture == "topk":
        assert dictionary.k is not None
        return top_codes(dictionary.pre_activations(x), dictionary.k)
    return nonzero_codes(dictionary.encode(x))


def reconstruct(dictionary: Dictionary, x: Tensor) -> tuple[Codes, Tensor]:
    """Sparse codes and reconstruction (B, D) of activations x (B, D): `dictionary(x)` without a dense code."""
    codes = encode_sparse(dictionary, x)
    return codes, products(x.device).decode(codes, dictionary.W_dec) + dictionary.b_dec


def pieces(n: int, n_pieces: int, device: torch.device) -> list[slice]:
    """Cut n rows into about equal slices, by shapes alone; one slice on an accelerator."""
    size = -(-n // n_pieces) if device.type == "cpu" else n
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]


def latent_pieces(d: Dictionary) -> list[slice]:
    """The latents of a dictionary, piece by piece."""
    n_pieces = min(MAX_PIECES, max(1, d.n_latents * d.d_model // NUMBERS))
    return pieces(d.n_latents, n_pieces, d.W_dec.device)


@dataclass(eq=False)
class Step:
    """A batch that went forward: its loss, and what the gradients are made of."""

    spec: DictionarySpec
    dictionary: Dictionary
    ops: ModuleType
    loss: Loss
    x: Tensor
    """What the encoder read (B, D)."""
    residuals: Tensor
    """x − x_hat (B, D), in training units."""
    to_x_hat: float
    """∂loss/∂x_hat as a multiple of the residuals."""
    codes: Codes
    to_pre: Tensor
    """∂loss/∂pre-activation at the codes' places (n_active)."""
    to_threshold: Tensor | None
    """JumpReLU: ∂loss/∂threshold at the codes' places (n_active)."""
    variance: Tensor
    """Σ‖x − mean of the batch‖²."""
    b_dec: Tensor
    """∂loss/∂b_dec (D)."""
    aux: "Aux | None"

    def gradients(self, latents: slice, into: dict[str, Tensor]) -> None:
        """Write the gradients of some latents, by parameter name, into the tensors given."""
        z, places = self.codes.transposed(latents)
        to_pre, values = self.to_pre.index_select(0, places), z.values * self.to_x_hat
        self.ops.decode_pair(z, to_pre, self.x, values, self.residuals, into["W_enc"], into["W_dec"])
        into["b_enc"].copy_(row_sums(z.with_values(to_pre)))
        if self.to_threshold is not None:
            into["threshold"].copy_(row_sums(z.with_values(self.to_threshold[places])))
        if self.aux is not None:
            self.aux.add(latents, self.x, into)


class Aux(NamedTuple):
    """AuxK's part of a step, on every 16th token (see `dictionaries.aux_loss`)."""

    dead: Tensor
    """int64 (N)."""
    z: Tensor
    """(rows, N)."""
    to_z: Tensor
    """(rows, N), not scaled."""
    g: Tensor
    """(rows, D), not scaled."""
    scale: Tensor

    def add(self, latents: slice, x: Tensor, gradients: dict[str, Tensor]) -> None:
        """Add to the gradients of some latents."""
        ends = torch.tensor([latents.start, latents.stop], device=self.dead.device)
        low, high = torch.searchsorted(self.dead, ends).tolist()
        if low == high:
            return
        mine, z, to_z = self.dead[low:high] - latents.start, self.z[:, low:high], self.to_z[:, low:high]
        to_W_enc = to_z.T @ x[::AUX_EVERY]
        for name, gradient in (("W_enc", to_W_enc), ("b_enc", to_z.sum(dim=0)), ("W_dec", z.T @ self.g)):
            gradients[name].index_add_(0, mine, gradient * self.scale)


def row_sums(codes: Codes) -> Tensor:
    """Σ of each row's values (B)."""
    return torch.segment_reduce(codes.values, "sum", offsets=codes.row_starts)


class _Part(NamedTuple):
    """What one piece of tokens leaves behind."""

    codes: Codes
    to_z: Tensor
    """∂loss/∂z at the codes' places."""
    window: Tensor | None
    """JumpReLU: which places are in the straight-through window of their threshold."""
    sums: list[Tensor]
    """Σ error², number active, Σ x², Σ z; then Σ x and Σ residual, (D) each."""
    aux: tuple[Tensor, ...] | None
    """z, to_z, g, Σ missing² and Σ error² of the rows that AuxK looks at."""


@torch.no_grad()
def sparse_step(
    spec: DictionarySpec,
    dictionary: Dictionary,
    x: Tensor,
    *,
    units: tuple[Tensor, Tensor] | None = None,
    dead: Tensor | None = None,
    sparsity: float = 1.0,
    encoder: Tensor | None = None,
    whitening: Tensor | None = None,
    ops: ModuleType | None = None,
) -> Step:
    """Take a batch x (B, D) forward, raw if `units` (mean, scale) are given, else in training units.

    With e = x_hat − x and g = 2e/divisor: ∂W_dec = Zᵀg, ∂pre = g W_decᵀ where z > 0, ∂W_enc = (∂pre)ᵀx, and biases are
    sums over tokens. `encoder` is a copy of W_enc in the dtype that the product with it runs in; with `whitening`
    (D, D), the encoder reads x times it.
    """
    d, ops = dictionary, ops or products(x.device)
    low = d.W_enc if encoder is None else encoder
    B, architecture = x.shape[0], spec.architecture
    shift = None  # where JumpReLU's windows begin
    if architecture == "jumprelu":
        assert d.threshold is not None
        shift = d.threshold - spec.bandwidth / 2
    bias = (d.b_enc if shift is None else d.b_enc - shift).to(low)
    inputs, residuals = (x.new_empty(x.shape, dtype=d.W_dec.dtype) for _ in range(2))
    encoded = inputs if whitening is None else torch.empty_like(inputs)
    divisor = error_divisor(spec, x)
    index = dead.nonzero().squeeze(1) if dead is not None and spec.aux_weight else None
    W_dead = None if index is None or index.numel() == 0 else d.W_dec[index]

    def pre_activations(rows: slice) -> Tensor:
        """(rows, F), less `shift`."""
        if units is None:
            inputs[rows] = x[rows]
        else:
            torch.sub(x[rows].to(inputs.dtype), units[0], out=inputs[rows]).div_(units[1])
        read = inputs[rows].to(low.dtype)
        if whitening is not None:
            read = read @ whitening.to(low.dtype)
            encoded[rows] = read
        return torch.nn.functional.linear(read, low, bias)

    def backward(rows: slice, pre: Tensor, codes: Codes) -> _Part:
        window = None
        if shift is not None:
            above = codes.values
            window = (above > 0) & (above < spec.bandwidth)
            codes = codes.with_values((above + shift[codes.columns]) * (above > spec.bandwidth / 2))
        residual = torch.sub(inputs[rows], d.b_dec, out=residuals[rows])
        ops.subtract_decoded(residual, codes, d.W_dec)
        to_z = ops.sampled(codes, residual, d.W_dec).mul_(-2 / divisor)
        error, square = torch.linalg.vector_norm(residual).square(), torch.linalg.vector_norm(inputs[rows]).square()
        numbers = torch.stack([error, (codes.values > 0).sum().to(error), square, codes.values.sum()])
        sums = [numbers, inputs[rows].sum(dim=0), residual.sum(dim=0)]
        some = slice(-rows.start % AUX_EVERY, None, AUX_EVERY)
        aux = None if W_dead is None else aux_part(pre[some], residual[some])
        return _Part(codes, to_z, window, sums, aux)

    def aux_part(pre: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        assert index is not None and W_dead is not None
        values, columns = pre[:, index].to(W_dead).topk(k_aux(x.shape[1], index.numel()), dim=1, sorted=False)
        z = W_dead.new_zeros(pre.shape[0], index.numel()).scatter_(1, columns, values.relu())
        missing = residual - z @ W_dead  # not in bf16: oneDNN would keep a compiled kernel for each number of dead
        aux_g = -2 * missing
        return z, (aux_g @ W_dead.T) * (z > 0), aux_g, missing.square().sum(), residual.square().sum()

    def whole(rows: slice) -> _Part:
        pre = pre_activations(rows)
        codes = ops.top_codes(pre, spec.k) if architecture == "topk" else at_least(pre, pre.new_zeros(1, 1))
        return backward(rows, pre, codes)

    row_pieces = pieces(B, max(-(-B // ROWS), min(2, -(-B // 64))), x.device)
    if architecture == "batchtopk":
        pres = in_parallel(pre_activations, row_pieces)
        chosen = codes_of_batch(pres, spec.k * B)
        parts = in_parallel(lambda i: backward(row_pieces[i], pres[i], chosen[i]), range(len(row_pieces)))
    else:
        parts = in_parallel(whole, row_pieces)
    return _assemble(spec, d, ops, encoded, residuals, divisor, sparsity, index, parts)


def codes_of_batch(pres: list[Tensor], n: int) -> list[Codes]:
    """The n largest of all pre-activations, given in pieces (rows, F), negative ones as zero."""
    if pres[0].device.type != "cpu":
        return [top_codes_of_batch(pres[0], n // pres[0].shape[0])]
    n_rows = sum(pre.shape[0] for pre in pres)
    bounds = in_parallel(lambda pre: bound_of_batch(pre, n // n_rows), pres)
    found = in_parallel(lambda i: at_least(pres[i], bounds[i]), range(len(pres)))
    kept, smallest = keep_largest(found, n)
    missed = [i for i, bound in enumerate(bounds) if float(bound) > smallest]
    if missed:  # these pieces may hold more: take all of theirs that could be among the largest
        smallest = min(smallest, *(float(bound) for bound in bounds))
        for i in missed:
            found[i] = at_least(pres[i], torch.full_like(bounds[i], smallest))
        kept, _ = keep_largest(found, n)
    return [codes.with_values(codes.values.relu()) for codes in kept]


def _assemble(
    spec: DictionarySpec,
    d: Dictionary,
    ops: ModuleType,
    x: Tensor,
    residuals: Tensor,
    divisor: float,
    sparsity: float,
    index: Tensor | None,
    parts: list[_Part],
) -> Step:
    codes = join_codes([part.codes for part in parts])
    to_z = torch.cat([part.to_z for part in parts])
    numbers, x_sum, residual_sum = (torch.stack([part.sums[i] for part in parts]).sum(dim=0) for i in range(3))
    error, n_active, square, z_sum = numbers
    total, active, to_threshold = error / divisor, codes.values > 0, None
    if spec.architecture == "relu":
        weight = sparsity * spec.l1 / divisor
        total, to_z = total + weight * z_sum, to_z + weight
    elif spec.architecture == "jumprelu":
        assert d.threshold is not None
        excess = n_active / len(x) / spec.target_l0 - 1
        total = total + sparsity * spec.l0_weight * excess**2
        to_step = sparsity * spec.l0_weight * 2 * excess / (spec.target_l0 * len(x))
        window = torch.cat([part.window for part in parts if part.window is not None])
        to_threshold = (to_z * d.threshold[codes.columns] + to_step) * window / -spec.bandwidth
    aux = None
    auxes = [part.aux for part in parts if part.aux is not None]
    if auxes:
        assert index is not None
        z, aux_to_z, aux_g = (torch.cat([aux[i] for aux in auxes]) for i in range(3))
        missing, explained = (torch.stack([aux[i] for aux in auxes]).sum() for i in (3, 4))
        scale = spec.aux_weight / explained.clamp(min=1e-30)
        total = total + scale * missing
        aux = Aux(index, z, aux_to_z, aux_g, scale)
    fired = d.b_enc.new_zeros(d.n_latents).scatter_reduce_(0, codes.columns.long(), codes.values, "amax") > 0
    return Step(
        spec, d, ops, Loss(total, error, n_active.long(), fired), x, residuals, -2 / divisor, codes, to_z * active,
        to_threshold, square - x_sum.square().sum() / len(x), residual_sum * (-2 / divisor), aux,
    )  # fmt: skip
