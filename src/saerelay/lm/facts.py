"""Reads what a plan must know of a model from its configuration and tokenizer, without weights."""

from typing import Any

import torch

from saerelay.errors import ModelError
from saerelay.lm.ports import _count, _find_layers, _n_inputs, _port
from saerelay.lm.source import _explained, _is_causal_lm, _read_config, _skeleton
from saerelay.lm.tokens import _first_id, load_tokenizer
from saerelay.planning.facts import ModelFacts
from saerelay.planning.recipe import ModelSpec


def read_facts(spec: ModelSpec) -> ModelFacts:
    """Read what a plan must know of a model from its configuration and tokenizer, without loading weights.

    >>> facts = read_facts(ModelSpec())
    >>> facts.family, facts.n_layers, facts.d_model, facts.tokens.bos_token_id
    ('gpt_neox', 8, 192, 0)

    Raises ModelError if the model is missing, gated, unreadable or no stack of layers, or the device is absent.
    """
    device = _resolve_device(spec.device)
    with _explained(spec):
        config = _read_config(spec)
        skeleton = _skeleton(spec, config)
    text, layers = config.get_text_config(), _find_layers(skeleton, spec.name)
    bos, eos = _special_tokens(spec, text)
    projection: Any = next((port[0] for layer in layers if (port := _port(layer, "attn_z"))), None)
    return ModelFacts(
        name=spec.name,
        revision=getattr(config, "_commit_hash", None) or spec.revision,
        family=config.model_type,
        dtype=_resolve_dtype(spec.dtype, device),
        device=str(device),
        n_layers=len(layers),
        d_model=text.hidden_size,
        d_attn_z=_n_inputs(projection) if projection else 0,
        vocab_size=text.vocab_size,
        max_context=_max_context(text, skeleton),
        bos_token_id=bos,
        eos_token_id=eos,
        has_lm_head=_is_causal_lm(config),
        layer_params=_count(layers) // len(layers),
        model_params=_count(skeleton),
    )


def _special_tokens(spec: ModelSpec, config: Any) -> tuple[int | None, int | None]:
    """What starts a sequence and what ends a document, by the tokenizer if there is one, else by the configuration."""
    try:
        t = load_tokenizer(spec)
    except ModelError:
        return _first_id(config.bos_token_id), _first_id(config.eos_token_id)
    bos, eos = t.bos_token_id, t.eos_token_id
    return t.cls_token_id if bos is None else bos, t.sep_token_id if eos is None else eos


def _max_context(config: Any, model: Any) -> int:
    longest = getattr(config, "max_position_embeddings", None) or 0
    for name, module in model.base_model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            longest -= module.padding_idx + 1  # RoBERTa counts positions from there
    return longest


def _resolve_device(asked: str) -> torch.device:
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if asked == "auto":  # mps only when asked for: nobody has run it there yet
        return torch.device("cuda" if counts["cuda"] else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ModelError(f'no device "{asked}"; use "auto", "cpu", "cuda", "cuda:1" or "mps"') from None
    n = counts.get(device.type, 0)
    if (device.index or 0) >= n:
        raise ModelError(
            f'device "{asked}" is not there: torch {torch.__version__} sees {n} of type {device.type}. '
            'Use device = "auto" or "cpu", or install a torch build and a driver for it.'
        )
    return device


def _resolve_dtype(asked: str, device: torch.device) -> str:
    if asked != "auto":
        return asked
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported") if device.type == "cpu" else ()
        fast = any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return "bfloat16" if fast else "float32"
