"""Closed-form transfer of a dictionary between sites: `fold` it through a map, or `carry` it all the way.

Works on plain tensors; no language model is needed:

>>> import torch
>>> from saerelay.sae.maps import affine
>>> from saerelay.sae.moments import Moments
>>> x_source = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
>>> x_target = 2 * x_source + 1
>>> moments = Moments.empty(8, 8)
>>> moments.add(x_source, x_target)
>>> sae = Dictionary(architecture="relu", W_enc=torch.eye(8), b_enc=torch.zeros(8), W_dec=torch.eye(8),
...                  b_dec=torch.zeros(8))
>>> hopped = fold(sae, affine(moments))
>>> bool((hopped(x_target) - (2 * sae(x_source) + 1)).abs().max() < 0.05)
True

Shapes: S source width, T target width, F latents, B tokens.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from saerelay.errors import TransferError
from saerelay.sae.dictionary import ROWS_AT_ONCE, Dictionary, match_l0, unit_decoder
from saerelay.sae.maps import AffineMap
from saerelay.sae.quality import fvu
from saerelay.sae.refit import refit, refit_skip
from saerelay.sae.reshape import Shape, reshape, revive
from saerelay.sae.spec import L0_ROWS
from saerelay.sae.units import Units

REFIT_GAIN = 0.15
"""The least share of FVU that a refit must gain at the site its dictionary was trained at: a gain of a tenth holds only
for the documents of the rows, and is lost on others (decision 025)."""


def fold(dictionary: Dictionary, between: AffineMap) -> Dictionary:
    """Carry a canonical dictionary of the source's activations to the target's.

    With n_j = ‖A w_j‖ for decoder row w_j: W_dec' = (W_dec Aᵀ)/n, b_dec' = A b_dec + c, W_enc' = n∘(W_enc B),
    b_enc' = n∘(b_enc + W_enc b), θ' = n∘θ. Exact for ReLU and JumpReLU under an invertible map with B = A⁻¹; TopK
    re-ranks its latents by n; BatchTopK's one threshold has to be calibrated again (`match_l0`).

    A transcoder needs two maps in one (`crossed`): B and b map its inputs between the sites and carry the encoder, A
    and c map the activations it reconstructs and carry the decoder; W_skip' = A W_skip B, b_dec' = A (b_dec + W_skip b)
    + c.

    Raises TransferError if the map does not start at the dictionary's widths.
    """
    if between.B.shape[0] != dictionary.d_model:
        raise TransferError(
            f"the dictionary reads activations of width {dictionary.d_model}, but the map starts from width "
            f"{between.B.shape[0]}; fit it on activations of the dictionary's site"
        )
    if between.A.shape[1] != dictionary.d_out:
        raise TransferError(
            f"the dictionary reconstructs activations of width {dictionary.d_out}, but the map of these starts from "
            f"width {between.A.shape[1]}; a transcoder needs a second map, of the activations that it reconstructs"
        )
    W_enc = dictionary.W_enc.double()
    W_dec = dictionary.W_dec.double()
    b_dec = dictionary.b_dec.double()
    threshold = dictionary.threshold
    W_skip = dictionary.W_skip
    A, B, c, b = (t.to(W_enc) for t in (between.A, between.B, between.c, between.b))
    if W_skip is not None:
        b_dec = b_dec + W_skip.double() @ b
        W_skip = A @ W_skip.double() @ B
    carried = replace(
        dictionary,
        W_enc=W_enc @ B,
        b_enc=dictionary.b_enc.double() + W_enc @ b,
        W_dec=W_dec @ A.T,
        b_dec=A @ b_dec + c,
        threshold=None if threshold is None else threshold.double(),
        W_skip=W_skip,
    )
    return unit_decoder(carried).to(dictionary.W_enc.dtype)


@dataclass(frozen=True, eq=False)
class Retraining:
    """The activations that a dictionary is revived and refitted on after a fold."""

    rows: Tensor
    """Raw activations of the target (B, D)."""
    seed: int
    target: Tensor | None = None
    """Activations of the target that a transcoder is to reconstruct (B, Dy)."""
    checked: bool = False
    """Refit only if this gains REFIT_GAIN on unseen rows: for a dictionary that stays at its site."""

    def normalised(self, units: Units) -> "Retraining":
        """The same rows in training units."""
        return replace(self, rows=units.normalise(self.rows), target=_normalised(units, self.target))

    def at(self, rows: slice) -> "Retraining":
        """Some of the rows."""
        target = None if self.target is None else self.target[rows]
        return replace(self, rows=self.rows[rows], target=target)


class Carried(NamedTuple):
    """A dictionary at another site."""

    dictionary: Dictionary
    refitted: bool
    """Whether its decoder was refitted: a refit was asked for, and the check did not reject it."""


def carry(
    dictionary: Dictionary,
    between: AffineMap | None,
    rows: Tensor,
    units: Units,
    *,
    l0: float | None = None,
    shape: Shape | None = None,
    retraining: Retraining | None = None,
) -> Carried:
    """Bring a dictionary to a site: fold, reshape, revive and refit, at the mean L0 that is asked for.

    `rows` (B, D) are raw activations of the target; the result is on their device. `units` are the training units of
    the target: in them the dictionary is reshaped and refitted, and its decoder rows have unit norm, on which TopK's
    ranking depends. Without a map the dictionary is not folded, without a shape it keeps its own, and without an L0 its
    thresholds and biases are left alone.
    """
    folded = dictionary.to(rows.device)
    if between is not None:
        folded = fold(folded, between)
    in_units = unit_decoder(units.from_canonical(folded))
    if shape:
        sample = rows if retraining is None else retraining.rows
        target = None if retraining is None else retraining.target
        is_fitted = shape.n_latents > in_units.n_latents or (shape.skip_connection and in_units.W_skip is None)
        if units.target and target is None and is_fitted:
            raise TransferError(
                "a transcoder that gets more latents, or a skip connection, must be refitted; set refit = true"
            )
        in_units = reshape(in_units, units.normalise(sample), shape, target=_normalised(units, target))
    elif l0 and retraining:
        # The decoder is refitted on codes that are as sparse as those of the result.
        in_units = match_l0(in_units, units.normalise(rows[:L0_ROWS]), l0)
    refitted = None
    if retraining:
        refitted = revive_and_refit(in_units, retraining.normalised(units))

    # A dictionary that is neither mapped nor changed keeps the norms of its decoder rows.
    if refitted is not None:
        result = units.to_canonical(refitted)
    elif between is None and not shape:
        result = folded
    else:
        result = units.to_canonical(in_units)
    if l0:
        result = match_l0(result, rows[:L0_ROWS], l0)
    return Carried(result, refitted is not None)


def _normalised(units: Units, target: Tensor | None) -> Tensor | None:
    return None if target is None else units.out.normalise(target)


def refit_in(units: Units, dictionary: Dictionary, rows: Tensor, target: Tensor | None = None) -> Dictionary:
    """Return a canonical dictionary with its decoder refitted on raw activations (B, D).

    In training units its decoder rows have unit norm. `target` (B, Dy) is what a transcoder reconstructs.
    """
    in_units = unit_decoder(units.from_canonical(dictionary))
    return units.to_canonical(refit_on(in_units, units.normalise(rows), _normalised(units, target)))


def refit_on(dictionary: Dictionary, x: Tensor, target: Tensor | None, **how: Any) -> Dictionary:
    """Return a dictionary with its decoder refitted on x (B, D); of a transcoder, the skip connection first.

    `how` are keywords of `refit`.
    """
    if target is None:
        return refit(dictionary, x.split(ROWS_AT_ONCE), **how)
    dictionary = refit_skip(dictionary, x, target)
    return refit(dictionary, x.split(ROWS_AT_ONCE), target=target.split(ROWS_AT_ONCE), **how)


def revive_and_refit(dictionary: Dictionary, on: Retraining) -> Dictionary | None:
    """Revive silent latents and refit the decoder; return None where the check rejects the refit.

    The dictionary and the rows are in training units. The check holds out a quarter of the rows.
    """
    n_fitted = 3 * len(on.rows) // 4 if on.checked else len(on.rows)
    fitted = on.at(slice(0, n_fitted))
    revived = revive(dictionary, fitted.rows, on.seed, target=fitted.target)
    better = refit_on(revived, fitted.rows, fitted.target)
    if on.checked:
        unseen = on.at(slice(n_fitted, None))
        before = fvu(dictionary, unseen.rows, target=unseen.target)
        if fvu(better, unseen.rows, target=unseen.target) > (1 - REFIT_GAIN) * before:
            return None
    return better
