"""Training units: a leg trains on (x − mean) / scale, and is published for raw x.

Both ways are exact, so that nothing that is trained or read needs to know the scale of a model's activations.
"""

from dataclasses import replace

from torch import Tensor

from saerelay.sae.dictionary import Dictionary


def to_training_units(dictionary: Dictionary, mean: Tensor, scale: Tensor) -> Dictionary:
    """Rewrite a dictionary of raw x as one of (x − mean)/scale, exactly; codes are divided by `scale` (a scalar)."""
    d = dictionary
    return replace(
        d,
        b_enc=(d.b_enc + d.W_enc @ mean) / scale,
        b_dec=(d.b_dec - mean) / scale,
        threshold=None if d.threshold is None else d.threshold / scale,
    )


def to_canonical(dictionary: Dictionary, mean: Tensor, scale: Tensor) -> Dictionary:
    """Undo `to_training_units`: a dictionary of (x − mean)/scale becomes one of raw x."""
    d = dictionary
    return replace(
        d,
        b_enc=d.b_enc * scale - d.W_enc @ mean,
        b_dec=d.b_dec * scale + mean,
        threshold=None if d.threshold is None else d.threshold * scale,
    )
