"""Learning curves behind `preset = "auto"`, fitted to a survey.

Four laws with few free parameters, found on the data of decision 030:

    hub        FVU(n) = floor + slope · n ^ −DECLINE                           after n tokens from scratch
    scratch    FVU(l, n) = FVU(l, n₀) · (FVU(hub, n) / FVU(hub, n₀)) ^ power(l)     at any layer
    hop        FVU(p → t) = FVU(t, n) + gap(p, t)            map and refit, from a parent worth n tokens
    child      FVU = FVU(t, n + m) + gap(p, t) / (1 + m / half)                after m tokens of its own

A gap does not depend on how well the parent is trained. A dictionary is worth the number of tokens from scratch that
reaches its FVU, so that a child's child starts from what the child is worth.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean

import numpy as np

from saerelay.planning.survey import Survey

DECLINE = 0.55
"""Exponent with which a curve falls to its floor; lies between the values of two models (decision 030)."""
GAP_GROWTH = 1.3
"""Gap after a finished parent over the gap after a pilot; the gap's other estimate is (1 − R²) / 3 (decision 030)."""
HALF_PER_LATENT = 40
"""Tokens per latent after which half of a gap is closed."""
LEAST_FALL = 0.01
"""Least share by which the hub's FVU falls from its short pilot to its long one, even if noise hides it."""
POWER_RANGE = (0.25, 4.0)
"""Range of the powers of the first and the last layer, beyond which only noise can have brought them."""


@dataclass(frozen=True)
class Curves:
    """The laws above, fitted to a survey."""

    floor: float
    slope: float
    pilot_tokens: int
    """n₀."""
    pilot: dict[int, float]
    """FVU(l, n₀)."""
    power: dict[int, float]
    gap: dict[tuple[int, int], float]
    """FVU that a hop from one layer to another adds, for the pairs surveyed."""
    half: float
    """Tokens that close half of a gap."""

    def hub(self, tokens: float) -> float:
        """Return the FVU at the hub after some tokens from scratch."""
        return self.floor + self.slope * tokens**-DECLINE

    def scratch(self, layer: int, tokens: float) -> float:
        """Return the FVU at a layer after some tokens from scratch."""
        return self.pilot[layer] * (self.hub(tokens) / self.hub(self.pilot_tokens)) ** self.power[layer]

    def tokens_from_scratch(self, layer: int, fvu: float) -> float:
        """Return the tokens from scratch that reach an FVU at a layer; infinity if no number does."""
        at_hub = self.hub(self.pilot_tokens) * (fvu / self.pilot[layer]) ** (1 / self.power[layer])
        if at_hub <= self.floor:
            return math.inf
        return (self.slope / (at_hub - self.floor)) ** (1 / DECLINE)

    def child(self, parent: int, layer: int, parent_tokens: float, tokens: float) -> float:
        """Return the FVU, after some tokens, of a child whose parent is worth `parent_tokens` from scratch."""
        return self.scratch(layer, parent_tokens + tokens) + self.gap[parent, layer] / (1 + tokens / self.half)

    def child_tokens(self, parent: int, layer: int, parent_tokens: float, fvu: float) -> float:
        """Return the tokens after which a child has an FVU, by bisection; infinity if scratch would need fewer."""
        low = 0.0
        high = self.tokens_from_scratch(layer, fvu)
        if not high < math.inf or self.child(parent, layer, parent_tokens, high) > fvu:
            return math.inf
        while high - low > 256:
            middle = (low + high) / 2
            if self.child(parent, layer, parent_tokens, middle) <= fvu:
                high = middle
            else:
                low = middle
        return 0.0 if self.child(parent, layer, parent_tokens, 0) <= fvu else high


def fit_curves(survey: Survey) -> Curves:
    """Fit the laws to a survey.

    The hub's curve goes through its two pilots, and so do the curves of the first and the last layer. A gap is the
    geometric mean of two estimates: the gap of the pilots times GAP_GROWTH, and a third of what the map leaves
    unexplained.
    """
    pilot = {layer.layer: layer.fvu for layer in survey.layers}
    refitted = {layer.layer: layer.refitted for layer in survey.layers}
    short_power = survey.pilot_tokens**-DECLINE
    long_power = survey.long.long_tokens**-DECLINE
    fall = max(LEAST_FALL * pilot[survey.hub], pilot[survey.hub] - survey.long.long_fvu)
    slope = fall / (short_power - long_power)
    slope = min(slope, pilot[survey.hub] * survey.pilot_tokens**DECLINE)
    gaps = dict[tuple[int, int], float]()
    for hop in survey.hops:
        measured = GAP_GROWTH * max(hop.refitted - refitted[hop.target], 1e-4)
        gaps[hop.source, hop.target] = math.sqrt(measured * max((1 - hop.r2) / 3, 1e-4))
    return Curves(
        floor=pilot[survey.hub] - slope * short_power,
        slope=slope,
        pilot_tokens=survey.pilot_tokens,
        pilot=pilot,
        power=_fit_powers(survey, pilot, refitted),
        gap=gaps,
        half=HALF_PER_LATENT * survey.n_latents,
    )


def _fit_powers(survey: Survey, pilot: dict[int, float], refitted: dict[int, float]) -> dict[int, float]:
    """Return how much faster than the hub's each layer's curve falls, as a power.

    For the hub, the first and the last layer, the power follows from their long pilots. Another layer's power is the
    geometric mean of three rough estimates: from the FVU of the hub's long pilot carried to the layer, less the gap,
    over that of the layer's own pilot; from the gains of the two layers in the decay; and by interpolation between the
    powers of the layers that have a long pilot.
    """
    hub = survey.hub
    decay = {layer.layer: math.log(layer.decay_gain - 1e-9) for layer in survey.layers}
    rise = log_ratio(survey.long.long_fvu, pilot[hub])
    refitted_rise = log_ratio(survey.long.long_refitted, refitted[hub])
    powers = {hub: 1.0}
    for layer, fvu in survey.long.ends.items():
        powers[layer] = float(np.clip(log_ratio(fvu, pilot[layer]) / rise, *POWER_RANGE))
    measured = sorted(powers)
    for hop in survey.hops:
        layer = hop.target
        if hop.source != hub or layer in measured:
            continue
        gap = hop.refitted - refitted[layer]
        carried = max(survey.long.long_hops[layer] - gap, 0.1 * refitted[layer])
        estimates = (
            log_ratio(carried, refitted[layer]) / refitted_rise,
            decay[layer] / decay[hub],
            _interpolated(layer, measured, powers),
        )
        powers[layer] = geometric_mean(np.clip(estimates, 0.5, 3.0))
    return powers


def _interpolated(layer: int, measured: Sequence[int], powers: dict[int, float]) -> float:
    """Interpolate between the powers of the measured layers, in logarithms."""
    logs = [math.log(powers[other]) for other in measured]
    return math.exp(np.interp(layer, measured, logs))


def log_ratio(fvu: float, of: float) -> float:
    """Return the logarithm of an FVU over another that it has fallen from; negative even if noise says otherwise."""
    return min(-1e-9, math.log(fvu / of))
