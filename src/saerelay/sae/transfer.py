"""Transfer of a dictionary between sites, in closed form: fold it through a map, and `carry` it all the way.

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
from saerelay.sae.dictionary import Dictionary, match_l0, unit_decoder
from saerelay.sae.maps import AffineMap
from saerelay.sae.quality import fvu
from saerelay.sae.refit import refit, refit_skip
from saerelay.sae.reshape import Shape, reshape, revive
from saerelay.sae.units import Units

L0_ROWS = 8_192
"""Rows on which L0 is measured and set."""
REFIT_GAIN = 0.15
"""What a refit has to gain at the site that its dictionary was trained at: a tenth is won on the documents of the rows
alone, and lost on others (decision 025)."""


def fold(dictionary: Dictionary, between: AffineMap) -> Dictionary:
    """Carry a canonical dictionary of the source's activations to the target's.

    With n_j = ‖A w_j‖ for decoder row w_j: W_dec' = (W_dec Aᵀ)/n, b_dec' = A b_dec + c, W_enc' = n∘(W_enc B),
    b_enc' = n∘(b_enc + W_enc b), θ' = n∘θ. Exact for ReLU and JumpReLU under an invertible map with B = A⁻¹; TopK
    re-ranks its latents by n; BatchTopK's one threshold has to be calibrated again (`match_l0`).

    A transcoder needs two maps in one (`crossed`): its encoder goes by B and b, between what it reads here and there,
    its decoder by A and c, between what it reconstructs, and W_skip' = A W_skip B, b_dec' = A (b_dec + W_skip b) + c.

    Raises TransferError if the map does not start at the dictionary's width.
    """
    if (dictionary.d_model, dictionary.d_out) != (between.B.shape[0], between.A.shape[1]):
        raise TransferError(
            f"the dictionary reads activations of width {dictionary.d_model}, the map starts from width "
            f"{between.A.shape[1]}; a transfer needs a source and a target of the same width"
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
    """What a dictionary is revived and refitted on after a fold."""

    rows: Tensor
    """Raw activations of the target (B, D)."""
    seed: int
    target: Tensor | None = None
    """What a transcoder is to reconstruct there (B, Dy)."""
    checked: bool = False
    """Refit only if that gains REFIT_GAIN on rows it has not seen: for a dictionary that stays at its site."""

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
    """Whether its decoder was refitted: asked for, and not held back by the check."""


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

    `rows` (B, D) are raw activations of the target, on whose device the result is, and `units` those that it is trained
    in: there its decoder rows have unit norm, by which TopK ranks, and there it is reshaped and refitted. Without a map
    the dictionary stays as it is, without a shape it keeps its own, and without an L0 what decides which latents are
    active is left alone.
    """
    folded = dictionary.to(rows.device)
    if between is not None:
        folded = fold(folded, between)
    in_units = unit_decoder(units.from_canonical(folded))
    if shape:
        sample = rows if retraining is None else retraining.rows
        target = None if retraining is None else retraining.target
        if units.target and target is None and shape.n_latents > in_units.n_latents:
            raise TransferError("a transcoder that gets more latents has to be refitted; set refit = true")
        in_units = reshape(in_units, units.normalise(sample), shape, target=_normalised(units, target))
    refitted = None
    if retraining:
        refitted = revive_and_refit(in_units, retraining.normalised(units))

    # What is neither mapped nor changed keeps the norms that its decoder rows have.
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
    """A canonical dictionary with its decoder refitted on raw activations (B, D), of unit norm in training units.

    `target` (B, Dy) is what a transcoder reconstructs.
    """
    in_units = unit_decoder(units.from_canonical(dictionary))
    return units.to_canonical(refit_on(in_units, units.normalise(rows), _normalised(units, target)))


def refit_on(dictionary: Dictionary, x: Tensor, target: Tensor | None, **how: Any) -> Dictionary:
    """A dictionary with its decoder refitted on x (B, D); of a transcoder, the skip connection first.

    `how` are keywords of `refit`.
    """
    if target is None:
        return refit(dictionary, x.split(4096), **how)
    with_skip = refit_skip(dictionary, x, target)
    return refit(with_skip, x.split(4096), target=target.split(4096), **how)


def revive_and_refit(dictionary: Dictionary, on: Retraining) -> Dictionary | None:
    """A dictionary with silent latents revived and its decoder refitted, or None where the check holds it back.

    All is in training units, the rows too. The check holds back a quarter of the rows.
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
