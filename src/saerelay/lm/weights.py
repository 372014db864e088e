"""Loads the weights of a language model, from safetensors or GGUF, with its adapter merged."""

from typing import Any

import torch

from saerelay.errors import ModelError
from saerelay.lm.adapter import merged
from saerelay.lm.source import locate, model_class, pinned, quantisation_options, read_config
from saerelay.lm.split import split_over_ranks
from saerelay.planning.facts import ModelFacts
from saerelay.planning.recipe import ModelSpec


def load_weights(spec: ModelSpec, facts: ModelFacts, *, split: bool) -> Any:
    """Load the transformers model that has these facts; call it within `loading`, which explains errors.

    With `split`, each group of ranks holds the model together. Raises ModelError if weights are missing.
    """
    exact = pinned(spec, facts)
    location = locate(exact)
    config = read_config(exact)
    options = location.options | quantisation_options(location, facts)
    if split:
        options |= split_over_ranks(spec)
    model, report = model_class(config).from_pretrained(
        location.name_or_path,
        config=config,
        dtype=getattr(torch, facts.dtype),
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    # A pooler is not one of the layers, and many checkpoints lack it.
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise ModelError(
            f'the weights of "{spec.name}" lack {len(missing)} tensors ({missing[0]}), which would be initialised at '
            "random. Download the model again, or save it with save_pretrained from the class it was trained as."
        )
    return merged(model, exact)
