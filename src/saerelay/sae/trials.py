"""The choice of the map for a hop: try each map, refit the decoder roughly, and measure on unseen rows.

No map is the best between all layers (decision 032): a copy fails where the size of a huge dimension jumps, a
regression shrinks directions that it explains badly, a rotation assumes that nothing is lost on the way.
"""

from typing import get_args

import torch

from saerelay.errors import TransferError
from saerelay.sae.dictionary import Dictionary, match_l0
from saerelay.sae.initialise import initialise
from saerelay.sae.maps import AnyMoments, map_between
from saerelay.sae.quality import MEASURE_BALANCE, fvu
from saerelay.sae.spec import L0_ROWS, TRIAL, TRIAL_ROWS, Method, SizedDictionarySpec
from saerelay.sae.transfer import Retraining, carry, refit_on
from saerelay.sae.units import Balance, Units

RANDOM = "random"
"""The name of a random dictionary among the trials."""
REGRESSION_HANDICAP = 1.05
"""Factor on a regression's FVU where methods are compared: a regression shrinks what it explains badly towards the
mean, which costs the model more than FVU says. Where rotation and regression were this close, the rotation always had
the lower ΔCE before training (decision 032)."""
ENOUGH_TRAINING = 100_000
"""Training tokens after a hop from which on the handicap is smaller: after 102k tokens the regression had the lower ΔCE
at nearly all pairs of layers of a real model; after 26k it had not (decision 032)."""
HANDICAP_WITH_TRAINING = 1.01
"""The factor then: of two maps that are about equal, the rotation is the safer choice."""


@torch.no_grad()
def try_methods(
    dictionary: Dictionary,
    moments: AnyMoments,
    on: Retraining,
    units: Units,
    fresh: SizedDictionarySpec | None = None,
    *,
    balance: Balance,
    l0: float,
) -> dict[str, float]:
    """Carry a dictionary by each method, refit it, and return each FVU on unseen rows (`best_first` orders them).

    It is the balanced FVU where training units are balanced, and else FVU (decision 032), measured at one mean L0 for
    all, `l0`: the dictionary's at its own site.

    `on` holds raw activations of the target. If `fresh` is given, a random dictionary of that size, refitted on the
    same rows, is added under the name `RANDOM`: a hop that is no better has nothing to offer. Raises TransferError for
    activations that are not finite.
    """
    on = on.at(slice(0, TRIAL_ROWS))
    rows = on.rows
    if not bool(torch.isfinite(rows).all()):
        raise TransferError(
            "the activations on which the maps are compared are not all finite; run the model in float32 or bfloat16, "
            "not float16"
        )
    n_fitted = 3 * len(rows) // 4
    in_units = on.normalised(units)
    fitted = in_units.at(slice(0, n_fitted))
    unseen = in_units.at(slice(n_fitted, None))
    direct = dictionary.n_latents <= TRIAL.direct_latents
    measure_balance = MEASURE_BALANCE if units.out.is_balanced else 0.0

    def fvu_once_refitted(candidate: Dictionary) -> float:
        how = {"direct": direct, "tolerance": TRIAL.tolerance, "max_iterations": TRIAL.iterations}
        refitted = refit_on(candidate, fitted.rows, fitted.target, **how)
        return fvu(refitted, unseen.rows, measure_balance, target=unseen.target)

    trials: dict[str, float] = {}
    for method in get_args(Method) if moments.keeps_width else ("procrustes", "affine"):
        between = map_between(method, dictionary.d_model, moments, balance)
        carried = carry(dictionary, between, rows, units, l0=l0).dictionary
        trials[method] = fvu_once_refitted(units.from_canonical(carried))
    if fresh:
        generator = torch.Generator().manual_seed(0)
        random = initialise(fresh, fitted.rows, generator, fitted.target)
        trials[RANDOM] = fvu_once_refitted(match_l0(random, in_units.rows[:L0_ROWS], l0))
    return trials


def best_first(trials: dict[str, float], tokens: int) -> dict[str, float]:
    """Order what `try_methods` measured, for a hop that is followed by some `tokens` of training.

    >>> close = {"procrustes": 0.100, "affine": 0.097}
    >>> list(best_first(close, tokens=0)), list(best_first(close, tokens=200_000))
    (['procrustes', 'affine'], ['affine', 'procrustes'])

    The FVU decides, except that a regression counts as worse than it measures.
    """
    handicap = HANDICAP_WITH_TRAINING if tokens >= ENOUGH_TRAINING else REGRESSION_HANDICAP

    def weighed(method: str) -> float:
        return trials[method] * (handicap if method == "affine" else 1.0)

    return {method: trials[method] for method in sorted(trials, key=weighed)}
