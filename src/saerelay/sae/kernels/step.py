"""The sparse training step: one dense encoder product, then work only where latents are active.

Gradients are written out by hand and equal those of autograd on `loss.training_loss`, as a test in float64 checks.
With e = x_hat − x and g = 2e / divisor:

    ∂W_dec = Zᵀg        ∂pre = g W_decᵀ where z > 0        ∂W_enc = (∂pre)ᵀ x        biases: sums over tokens

On a CPU the batch is cut into pieces of tokens whose pre-activations stay in the cache (`Forward`), the results of the
pieces are joined (`Step`), and gradients are computed for pieces of latents (see `pieces`).
Shapes: B tokens, D model width, F latents, N dead latents, n_active the non-zero codes of a batch.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from saerelay.sae.architectures.architecture import BatchSums, Penalty
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.kernels.auxk import Aux, AuxPart, DeadLatents
from saerelay.sae.kernels.codes import Codes, added_up, join_codes, joined, row_sums
from saerelay.sae.kernels.encode import products
from saerelay.sae.kernels.gate import GatePart, gradients_of_gates
from saerelay.sae.kernels.pieces import row_pieces
from saerelay.sae.loss import AUX_EVERY, Loss, error_divisor
from saerelay.sae.spec import AnyDictionarySpec
from saerelay.sae.threads import in_parallel
from saerelay.sae.units import Units

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
        first = 0
        for end, residuals in zip(self.prefixes, self.residuals, strict=True):
            own = slice(max(first, latents.start), min(end, latents.stop))
            if own.start < own.stop:
                rows = slice(own.start - latents.start, own.stop - latents.start)
                self._gradients_of(own, residuals, {name: tensor[rows] for name, tensor in into.items()})
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


class Sums(NamedTuple):
    """Sums over a piece of tokens, or over a whole batch; each is a scalar tensor."""

    error: Tensor
    """Σ‖y − y_hat‖²."""
    error_in_loss: Tensor
    """Σ of squared errors as it counts in the loss: the mean over nested dictionaries, plus the gate's."""
    square: Tensor
    """Σ‖y‖²."""
    n_active: Tensor
    """Number of codes above zero."""
    total_code: Tensor
    """Σ of the codes that are penalised: z, or the gate's codes."""


class Part(NamedTuple):
    """The result of one piece of tokens."""

    codes: Codes
    to_z: Tensor
    """∂(squared error)/∂z at the codes' positions."""
    window: Tensor | None
    """Which positions are in the straight-through window of their threshold, for architectures with such a window."""
    sums: Sums
    target_sum: Tensor
    """(Dy): Σ y of the activations that are reconstructed."""
    residual_sum: Tensor
    """(Dy): Σ of the shortest prefix's `Step.residuals`, since b_dec is in all prefixes as well."""
    aux: AuxPart | None
    gate: GatePart | None
    n_selected: Tensor | None
    """As in `Step`."""


class Explained(NamedTuple):
    """A piece of tokens after its codes have explained what they can."""

    residual: Tensor
    """(rows, Dy): target minus reconstruction by all latents."""
    to_z: Tensor
    """(n_active): ∂(squared error)/∂z at the codes' positions, up to the factor `to_x_hat`."""
    error: Tensor
    """Σ‖residual‖²."""
    mean_error: Tensor
    """The mean of this over the nested dictionaries."""


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

    How to see this: a piece goes through `pre_activations`, selection and `part` on its own thread, writes its rows of
    the batch's buffers (`inputs`, `targets`, `encoded`, `residuals`), and returns everything that must be summed over
    pieces as a `Part`. `joined` sums always in the same order, so that the bits do not depend on the threads.
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
        units = self.reading.units
        inputs = self.inputs[rows]
        _put(self.x[rows], units, inputs)
        if self.reading.target is not None:
            _put(self.reading.target[rows], None if units is None else units.out, self.targets[rows])
        read = inputs.to(self.encoder.dtype)
        if self.reading.whitening is not None:
            read = read @ self.reading.whitening.to(self.encoder.dtype)
            self.encoded[rows] = read
        return torch.nn.functional.linear(read, self.encoder, self.bias)

    def selected_part(self, rows: slice) -> Part:
        """Take one piece all the way, for architectures that select token by token."""
        pre = self.pre_activations(rows)
        if self.reading.room is None:
            return self.part(rows, pre, self.activation.select(pre, self.ops))
        codes, n_selected = self.ops.positive_codes(pre, self.reading.room)
        return self.part(rows, pre, codes, n_selected)

    def part(self, rows: slice, pre: Tensor, codes: Codes, n_selected: Tensor | None = None) -> Part:
        """One piece from its selected codes on: its residual, the gradient to the codes, and its sums."""
        window = None
        if self.shift is not None:
            codes, window = self.activation.unshift(codes, self.shift)
        targets = self.targets[rows]
        unexplained = self._without_latents(rows)
        gate = None
        if self.activation.has_gate:
            gate = GatePart.of(codes, unexplained.clone(), self.dictionary, self.ops)
        if len(self.prefixes) == 1:
            explained = self._explained(unexplained, codes)
        else:
            explained = self._explained_by_prefixes(rows, codes)
        penalised = codes
        error_in_loss = explained.mean_error
        if gate is not None:
            penalised = codes.with_values(gate.codes)
            error_in_loss = error_in_loss + gate.error
        return Part(
            codes=codes,
            to_z=explained.to_z.mul_(self.to_x_hat),
            window=window,
            sums=Sums(
                error=explained.error,
                error_in_loss=error_in_loss,
                square=torch.linalg.vector_norm(targets).square(),
                n_active=(codes.values > 0).sum().to(explained.error),
                total_code=_total(penalised),
            ),
            target_sum=targets.sum(dim=0),
            residual_sum=self.residuals[0][rows].sum(dim=0),
            aux=self._aux(rows, pre, explained.residual),
            gate=gate,
            n_selected=n_selected,
        )

    def _without_latents(self, rows: slice) -> Tensor:
        """Write the targets (rows, Dy) minus b_dec and the skip connection into the longest prefix's residuals."""
        unexplained = torch.sub(self.targets[rows], self.dictionary.b_dec, out=self.residuals[-1][rows])
        if self.dictionary.W_skip is not None:
            unexplained.addmm_(self.inputs[rows], self.dictionary.W_skip.T, alpha=-1)
        return unexplained

    def _explained(self, residual: Tensor, codes: Codes) -> Explained:
        """Subtract from `residual`, in place, what the codes explain."""
        to_z = self.ops.explain(residual, codes, self.dictionary.W_dec)
        error = torch.linalg.vector_norm(residual).square()
        return Explained(residual, to_z, error, mean_error=error)

    def _explained_by_prefixes(self, rows: slice, codes: Codes) -> Explained:
        """The same for nested dictionaries; fills the rows of all `residuals`.

        How to see this: a latent is in its own prefix and in all longer ones, and it is to reduce the mean of their
        residuals. So the first loop computes the residual of each prefix, from the shortest to the longest; the second,
        from the longest to the shortest, their running sum.
        """
        W_dec = self.dictionary.W_dec
        n = len(self.prefixes)
        residual = self.residuals[-1][rows].clone()
        errors = residual.new_zeros(())
        groups: list[tuple[Codes, Tensor]] = []
        first = 0
        for end, kept in zip(self.prefixes, self.residuals, strict=True):
            group, places = codes.between(first, end)
            self.ops.subtract_decoded(residual, group, W_dec)
            kept[rows] = residual
            errors = errors + torch.linalg.vector_norm(residual).square()
            groups.append((group, places))
            first = end

        to_z = torch.empty_like(codes.values)
        running = torch.zeros_like(residual)
        for (group, places), kept in zip(reversed(groups), reversed(self.residuals), strict=True):
            running += kept[rows] / n
            kept[rows] = running
            to_z[places] = self.ops.sampled(group, running, W_dec)
        return Explained(residual, to_z, torch.linalg.vector_norm(residual).square(), mean_error=errors / n)

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
        sums = Sums(*added_up([torch.stack(part.sums) for part in parts]))
        target_sum = added_up([part.target_sum for part in parts])
        residual_sum = added_up([part.residual_sum for part in parts])
        n_rows = self.x.shape[0]

        loss = sums.error_in_loss / self.divisor
        penalty = self.activation.penalty(BatchSums(n_rows, sums.n_active, sums.total_code, self.divisor), warmth)
        if penalty is not None:
            loss = loss + penalty.loss
            if penalty.to_z is not None and not self.activation.has_gate:
                to_z = to_z + penalty.to_z
        to_pre, to_numbers = self._carried_back(codes, to_z, penalty, parts)
        aux = None
        aux_parts = [part.aux for part in parts if part.aux is not None]
        if aux_parts and self.dead is not None:
            aux = Aux.of(self.dead, aux_parts, self.activation.weight_of_aux)
            loss = loss + aux.loss
        return Step(
            ops=self.ops,
            loss=Loss(loss, sums.error, sums.n_active.long(), self.ops.fired(codes)),
            x=self.encoded,
            prefixes=self.prefixes,
            residuals=self.residuals,
            to_x_hat=self.to_x_hat,
            codes=codes,
            to_pre=to_pre * (codes.values > 0),
            to_numbers=to_numbers,
            variance=sums.square - target_sum.square().sum() / n_rows,
            b_dec=residual_sum * self.to_x_hat,
            aux=aux,
            n_selected=parts[0].n_selected,
        )

    def _carried_back(
        self, codes: Codes, to_z: Tensor, penalty: Penalty | None, parts: list[Part]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Carry ∂loss/∂z back to the pre-activations, and to thresholds (by window or gate) and r_mag, where codes are.

        The second result is `Step.to_numbers`.
        """
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


def _total(codes: Codes) -> Tensor:
    """Σ of all codes; on a GPU by rows, since the last bits of a plain sum would depend on the number of places."""
    if codes.values.is_cpu:
        return codes.values.sum()
    return row_sums(codes).sum()


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
        parts = in_parallel(lambda i: forward.part(rows[i], pres[i], codes[i]), range(len(rows)))
    else:
        parts = in_parallel(forward.selected_part, rows)
    return forward.joined(parts, warmth)
