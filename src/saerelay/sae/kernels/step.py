"""The sparse training step: one dense encoder product, then work only where latents are active.

Gradients are written out by hand and equal those of autograd on `loss.training_loss`, as a test in float64 checks.
With e = x_hat − x and g = 2e / divisor:

    ∂W_dec = Zᵀg        ∂pre = g W_decᵀ where z > 0        ∂W_enc = (∂pre)ᵀ x        biases: sums over tokens

On a CPU the batch is cut into pieces of tokens whose pre-activations stay in the cache (`Forward`), the results of the
pieces are joined (`Step`), and gradients are computed for pieces of latents. Pieces are cut by shapes alone.
Shapes: B tokens, D model width, F latents, N dead latents, n_active the non-zero codes of a batch.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from saerelay.sae.architectures.architecture import BatchSums, Penalty
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.kernels import cpu, reference
from saerelay.sae.kernels.auxk import Aux, AuxPart, DeadLatents
from saerelay.sae.kernels.codes import Codes, added_up, join_codes, joined, row_sums
from saerelay.sae.kernels.gate import GatePart, gradients_of_gates
from saerelay.sae.loss import AUX_EVERY, Loss, error_divisor
from saerelay.sae.spec import AnyDictionarySpec, takes_sparse_step
from saerelay.sae.threads import in_parallel
from saerelay.sae.units import Units

ROWS = 256
"""Tokens per piece; a batch of 65 to 256 tokens makes two pieces."""
NUMBERS, MAX_PIECES = 2**18, 16
"""Numbers per piece of the weights, unless that makes more than MAX_PIECES."""


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


# --- pieces -------------------------------------------------------------------------------------------------------


def pieces(n: int, n_pieces: int, device: torch.device) -> list[slice]:
    """Cut n rows into slices of about equal size, by shapes alone; one slice on an accelerator."""
    size = -(-n // n_pieces) if device.type == "cpu" else n
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]


def latent_pieces(d: Dictionary) -> list[slice]:
    """The latents of a dictionary, piece by piece."""
    n_pieces = min(MAX_PIECES, max(1, d.n_latents * d.d_model // NUMBERS))
    return pieces(d.n_latents, n_pieces, d.W_dec.device)


def row_pieces(x: Tensor) -> list[slice]:
    """The tokens of a batch x (B, D), piece by piece."""
    n_rows = x.shape[0]
    at_least_two = min(2, -(-n_rows // 64))  # for a batch of more than 64 rows
    return pieces(n_rows, max(-(-n_rows // ROWS), at_least_two), x.device)


# --- the result of a batch ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Step:
    """A batch after the forward pass: its loss, and all that gradients are computed from."""

    ops: ModuleType
    loss: Loss
    x: Tensor
    """Input of the encoder (B, D)."""
    prefixes: list[int]
    """Number of latents of each nested dictionary; a dictionary that is not nested is one prefix."""
    residuals: list[Tensor]
    """For each prefix, what its own latents are to reduce (B, Dy), in training units: the residual (target minus
    reconstruction), averaged over this prefix and all longer ones."""
    to_x_hat: float
    """∂loss/∂x_hat is this factor times the residuals."""
    codes: Codes
    to_pre: Tensor
    """∂loss/∂pre-activation at the codes' positions (n_active)."""
    to_numbers: dict[str, Tensor]
    """∂loss/∂p for each parameter p with one number per latent, at the codes' positions (n_active), by name."""
    variance: Tensor
    """Σ‖y − mean of the batch‖² of the activations y that are reconstructed."""
    b_dec: Tensor
    """∂loss/∂b_dec (Dy)."""
    aux: Aux | None
    n_selected: Tensor | None
    """Number of codes (int64), where there was only so much room for them; if there were more, the step is void."""

    def gradients(self, latents: slice, into: dict[str, Tensor]) -> None:
        """Write the gradients of some latents, by parameter name, into the tensors given."""
        if len(self.prefixes) == 1:
            self._gradients_of(latents, self.residuals[0], into)
        else:
            first = 0
            for end, residuals in zip(self.prefixes, self.residuals, strict=True):
                own = slice(max(first, latents.start), min(end, latents.stop))
                if own.start < own.stop:
                    places = slice(own.start - latents.start, own.stop - latents.start)
                    self._gradients_of(own, residuals, {name: tensor[places] for name, tensor in into.items()})
                first = end
        if self.aux is not None:
            self.aux.add(latents, self.x, into)

    def _gradients_of(self, latents: slice, residuals: Tensor, into: dict[str, Tensor]) -> None:
        """Write the gradients of latents that share the same residuals, without AuxK."""
        z, order = self.codes.transposed(latents)
        to_pre = self.to_pre.index_select(0, order)
        to_row = z.values * self.to_x_hat
        self.ops.decode_pair(z, to_pre, self.x, to_row, residuals, into["W_enc"], into["W_dec"])
        into["b_enc"].copy_(row_sums(z.with_values(to_pre)))
        for name, to_number in self.to_numbers.items():
            into[name].copy_(row_sums(z.with_values(to_number[order])))


class Part(NamedTuple):
    """The result of one piece of tokens."""

    codes: Codes
    to_z: Tensor
    """∂(squared error)/∂z at the codes' positions."""
    window: Tensor | None
    """Which positions are in the straight-through window of their threshold, for architectures with such a window."""
    numbers: Tensor
    """(5): Σ error², number active, Σ y², Σ of the penalised codes, and Σ error² as it counts in the loss: the mean
    over nested dictionaries, plus the gate's."""
    x_sum: Tensor
    """(Dy): Σ y of the activations that are reconstructed."""
    residual_sum: Tensor
    """(Dy)."""
    aux: AuxPart | None
    gate: GatePart | None
    n_selected: Tensor | None


# --- forward ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reading:
    """How the encoder reads a batch of raw activations."""

    units: Units | None = None
    """None if the batch is already in training units."""
    encoder: Tensor | None = None
    """A copy of W_enc (F, D) in the dtype of the product with it."""
    whitening: Tensor | None = None
    """(D, D): the matrix that activations are multiplied by before the encoder."""
    target: Tensor | None = None
    """(B, Dy): activations that a transcoder reconstructs, in the batch's units; None if it is the batch itself."""
    room: int | None = None
    """On a GPU, the number of places for codes, for architectures that do not select a fixed number of them: without
    it, the host waits to learn how many there are."""


class Forward:
    """The forward pass of one batch, piece by piece of its tokens.

    How to see this: a piece goes through `pre_activations`, selection and `backward` on its own thread, writes its rows
    of the batch's buffers (`inputs`, `residuals`, `encoded`), and returns everything that must be summed over pieces as
    a `Part`. `joined` sums always in the same order, so that the bits do not depend on the threads.
    """

    def __init__(
        self,
        spec: AnyDictionarySpec,
        dictionary: Dictionary,
        x: Tensor,
        reading: Reading,
        dead: Tensor | None,
        ops: ModuleType,
    ) -> None:
        self.activation = spec.activation
        self.dictionary = dictionary
        self.x = x
        self.reading = reading
        self.ops = ops
        self.divisor = error_divisor(spec, x if reading.target is None else reading.target)
        self.to_x_hat = -2 / self.divisor
        self.encoder = dictionary.W_enc if reading.encoder is None else reading.encoder
        self.shift = self.activation.shift(dictionary.threshold)
        bias = dictionary.b_enc if self.shift is None else dictionary.b_enc - self.shift
        self.bias = bias.to(self.encoder)

        # Buffers of the batch; each piece writes its rows.
        self.inputs = x.new_empty(x.shape, dtype=dictionary.W_dec.dtype)
        self.targets = self.inputs
        if reading.target is not None:
            self.targets = x.new_empty(reading.target.shape, dtype=dictionary.W_dec.dtype)
        self.prefixes = spec.prefixes(dictionary.n_latents)
        self.residuals = [torch.empty_like(self.targets) for _ in self.prefixes]
        self.encoded = self.inputs if reading.whitening is None else torch.empty_like(self.inputs)

        self.dead: DeadLatents | None = None
        if dead is not None and self.activation.weight_of_aux:
            self.dead = DeadLatents.among(dead)
        self.W_dead = None if self.dead is None else dictionary.W_dec[self.dead.latents]

    def pre_activations(self, rows: slice) -> Tensor:
        """Pre-activations (rows, F) minus the architecture's shift."""
        inputs = self.inputs[rows]
        _put(self.x[rows], self.reading.units, inputs)
        if self.reading.target is not None:
            units = self.reading.units
            _put(self.reading.target[rows], units and units.out, self.targets[rows])
        read = inputs.to(self.encoder.dtype)
        if self.reading.whitening is not None:
            read = read @ self.reading.whitening.to(self.encoder.dtype)
            self.encoded[rows] = read
        return torch.nn.functional.linear(read, self.encoder, self.bias)

    def whole(self, rows: slice) -> Part:
        """Process one piece of tokens, for architectures that select token by token."""
        pre = self.pre_activations(rows)
        if self.reading.room is None:
            return self.backward(rows, pre, self.activation.select(pre, self.ops))
        codes, n_selected = self.ops.positive_codes(pre, self.reading.room)
        return self.backward(rows, pre, codes, n_selected)

    def backward(self, rows: slice, pre: Tensor, codes: Codes, n_selected: Tensor | None = None) -> Part:
        """Compute the residual of one piece and its gradient to the selected codes."""
        window = None
        if self.shift is not None:
            codes, window = self.activation.unshift(codes, self.shift)
        targets = self.targets[rows]
        residual = torch.sub(targets, self.dictionary.b_dec, out=self.residuals[-1][rows])
        if self.dictionary.W_skip is not None:
            residual.addmm_(self.inputs[rows], self.dictionary.W_skip.T, alpha=-1)
        gate = None
        if self.activation.has_gate:
            gate = GatePart.of(codes, residual.clone(), self.dictionary, self.ops)
        if len(self.prefixes) == 1:
            to_z = self.ops.explain(residual, codes, self.dictionary.W_dec)
            error = mean_error = torch.linalg.vector_norm(residual).square()
        else:
            to_z, residual, mean_error = self._nested(rows, codes)
            error = torch.linalg.vector_norm(residual).square()
        penalised = codes.values
        if gate is not None:
            penalised = gate.codes
            mean_error = mean_error + gate.error
        n_active = (codes.values > 0).sum().to(error)
        # On a GPU codes may be padded: a sum over all places would depend on their number in its last bits.
        total_code = penalised.sum() if penalised.is_cpu else row_sums(codes.with_values(penalised)).sum()
        square = torch.linalg.vector_norm(targets).square()
        return Part(
            codes=codes,
            to_z=to_z.mul_(self.to_x_hat),
            window=window,
            numbers=torch.stack([error, n_active, square, total_code, mean_error]),
            x_sum=targets.sum(dim=0),
            residual_sum=self.residuals[0][rows].sum(dim=0),
            aux=self._aux(rows, pre, residual),
            gate=gate,
            n_selected=n_selected,
        )

    def _nested(self, rows: slice, codes: Codes) -> tuple[Tensor, Tensor, Tensor]:
        """Nested dictionaries: the gradient to codes (up to the factor `to_x_hat`), the whole residual, the mean error.

        How to see this: a latent is in its own prefix and in all longer ones, and it is to reduce the mean of their
        residuals. So the first loop computes the residual of each prefix, from the shortest to the longest; the second,
        from the longest to the shortest, their running sum.
        """
        W_dec = self.dictionary.W_dec
        n = len(self.prefixes)
        residual = self.residuals[-1][rows].clone()
        error = residual.new_zeros(())
        groups: list[tuple[Codes, Tensor]] = []
        first = 0
        for end, kept in zip(self.prefixes, self.residuals, strict=True):
            group, places = codes.between(first, end)
            self.ops.subtract_decoded(residual, group, W_dec)
            kept[rows] = residual
            error = error + torch.linalg.vector_norm(residual).square()
            groups.append((group, places))
            first = end

        to_z = torch.empty_like(codes.values)
        running = torch.zeros_like(residual)
        for (group, places), kept in zip(reversed(groups), reversed(self.residuals), strict=True):
            running += kept[rows] / n
            kept[rows] = running
            to_z[places] = self.ops.sampled(group, running, W_dec)
        return to_z, residual, error / n

    def _aux(self, rows: slice, pre: Tensor, residual: Tensor) -> AuxPart | None:
        """AuxK on those tokens of a piece that are every 16th of the batch."""
        if self.dead is None or self.W_dead is None:
            return None
        sample = slice(-rows.start % AUX_EVERY, None, AUX_EVERY)
        return AuxPart.of(self.dead, self.W_dead, pre[sample], residual[sample])

    def joined(self, parts: list[Part], warmth: float | Tensor) -> Step:
        """Join the parts of the batch, and add the terms of the architecture and of AuxK to loss and gradients."""
        codes = join_codes([part.codes for part in parts])
        to_z = joined([part.to_z for part in parts])
        error, n_active, square, total_code, mean_error = added_up([part.numbers for part in parts])
        x_sum = added_up([part.x_sum for part in parts])
        residual_sum = added_up([part.residual_sum for part in parts])
        n_rows = self.x.shape[0]

        loss = mean_error / self.divisor
        penalty = self.activation.penalty(BatchSums(n_rows, n_active, total_code, self.divisor), warmth)
        if penalty is not None:
            loss = loss + penalty.loss
            if penalty.to_z is not None and not self.activation.has_gate:
                to_z = to_z + penalty.to_z
        to_pre, to_numbers = self._beside(codes, to_z, penalty, parts)
        aux = None
        aux_parts = [part.aux for part in parts if part.aux is not None]
        if aux_parts and self.dead is not None:
            aux = Aux.of(self.dead, aux_parts, self.activation.weight_of_aux)
            loss = loss + aux.loss
        return Step(
            ops=self.ops,
            loss=Loss(loss, error, n_active.long(), self.ops.fired(codes)),
            x=self.encoded,
            prefixes=self.prefixes,
            residuals=self.residuals,
            to_x_hat=self.to_x_hat,
            codes=codes,
            to_pre=to_pre * (codes.values > 0),
            to_numbers=to_numbers,
            variance=square - x_sum.square().sum() / n_rows,
            b_dec=residual_sum * self.to_x_hat,
            aux=aux,
            n_selected=parts[0].n_selected,
        )

    def _beside(
        self, codes: Codes, to_z: Tensor, penalty: Penalty | None, parts: list[Part]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """∂loss/∂pre, and the gradients of thresholds (by window or gate) and of r_mag, all at the codes' positions."""
        threshold = self.dictionary.threshold
        gates = [part.gate for part in parts if part.gate is not None]
        if gates:
            to = gradients_of_gates(gates, codes, self.dictionary, self.to_x_hat, penalty)
            return to_z + to.z, {"threshold": to.threshold, "r_mag": to.r_mag}

        windows = [part.window for part in parts if part.window is not None]
        if threshold is None or penalty is None or penalty.to_step is None or not windows:
            return to_z, {}
        window = joined(windows)
        to_threshold = self.activation.threshold_gradient(to_z, penalty.to_step, threshold[codes.columns], window)
        return to_z, {"threshold": to_threshold}


def _put(x: Tensor, units: Units | None, out: Tensor) -> None:
    """Write activations (rows, D) into `out`, converted to units unless these are None."""
    if units is None:
        out.copy_(x)
    else:
        units.normalise(x, out=out)


@torch.no_grad()
def sparse_step(
    spec: AnyDictionarySpec,
    dictionary: Dictionary,
    x: Tensor,
    *,
    reading: Reading | None = None,
    dead: Tensor | None = None,
    warmth: float | Tensor = 1.0,
    ops: ModuleType | None = None,
) -> Step:
    """Take a batch of activations x (B, D) through the forward pass; `Step.gradients` is the backward pass.

    `dead` (F, bool) marks the latents that AuxK considers, `warmth` in [0, 1] is the share of the penalty's weight in
    force, and `ops` are the kernels, by default the fastest of x's device.
    """
    forward = Forward(spec, dictionary, x, reading or Reading(), dead, ops or products(x.device))
    rows = row_pieces(x)
    if forward.activation.selects_over_batch:
        pres = in_parallel(forward.pre_activations, rows)
        codes = forward.activation.select_over_batch(pres, forward.ops)
        parts = in_parallel(lambda i: forward.backward(rows[i], pres[i], codes[i]), range(len(rows)))
    else:
        parts = in_parallel(forward.whole, rows)
    return forward.joined(parts, warmth)
