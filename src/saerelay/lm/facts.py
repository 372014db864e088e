"""Reads the facts that a plan needs about a model from its configuration and tokenizer, without weights."""

import warnings
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from saerelay.errors import ModelError
from saerelay.lm.adapter import find_adapter
from saerelay.lm.ports import n_parameters
from saerelay.lm.probe import Anatomy, probe_skeleton
from saerelay.lm.source import (
    is_causal_lm,
    loading,
    locate,
    model_skeleton,
    quantisation,
    read_config,
    resolved_revision,
    without_collection,
)
from saerelay.lm.split import OWN_HEADS, check_splittable
from saerelay.lm.tokens import first_id, load_tokenizer
from saerelay.planning.facts import ModelFacts, Precision, SiteFacts, TokenFacts
from saerelay.planning.recipe import ModelSpec
from saerelay.site import MODULE_KINDS, ModuleKind, Site

_FAST_BF16_PROBES = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
"""Functions of torch.cpu that say whether this CPU multiplies bfloat16 fast; old versions of torch
lack some of them."""


def read_facts(spec: ModelSpec) -> ModelFacts:
    """Read the facts that a plan needs about a model, without loading its weights.

    >>> facts = read_facts(ModelSpec())
    >>> facts.family, facts.n_layers, facts.d_model, facts.tokens.bos_token_id
    ('gpt_neox', 8, 192, 0)

    Raises ModelError if the model is missing, gated, unreadable or not a single stack of layers,
    or if the device is not available.
    """
    facts, _ = look_at(spec)
    return facts


@without_collection()
def look_at(spec: ModelSpec) -> tuple[ModelFacts, Anatomy]:
    """Return the facts, and the anatomy that a probe finds on the way."""
    device = resolve_device(spec.device)
    adapter = find_adapter(spec)
    with loading(spec):
        spec = spec.changed(revision=resolved_revision(spec))
        config = read_config(spec)
        skeleton = model_skeleton(spec, config)
        if spec.tensor_parallel > 1:
            check_splittable(skeleton, config, spec)
        n_all = n_parameters(skeleton)
        anatomy = probe_skeleton(skeleton, spec.name)
    text_config = config.get_text_config()
    layers = skeleton.get_submodule(anatomy.layers)
    bos, eos, pad = _special_tokens(spec, text_config)
    facts = ModelFacts(
        name=spec.name,
        revision=spec.revision,
        adapter=adapter.name if adapter else "",
        quantised=quantisation(config),
        family=config.model_type,
        dtype=_resolve_dtype(spec.dtype, device, config),
        device=str(device),
        n_layers=anatomy.n_layers,
        d_model=anatomy.d_model,
        sites=_site_facts(anatomy, is_split=spec.tensor_parallel > 1),
        tokens=TokenFacts(
            vocab_size=text_config.vocab_size,
            max_context=_max_context(text_config, skeleton),
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=pad,
        ),
        has_lm_head=is_causal_lm(config),
        layer_params=n_parameters(layers) // anatomy.n_layers,
        idle_layer_params=_idle_parameters(layers, text_config) // anatomy.n_layers,
        model_params=n_all,
    )
    return facts, anatomy


def _site_facts(anatomy: Anatomy, *, is_split: bool) -> SiteFacts:
    """Widths by kind and layer, and the reasons why sites cannot be read."""
    widths: dict[ModuleKind, list[int]] = {}
    for kind in MODULE_KINDS:
        ports = [anatomy.ports.get(Site(i, kind)) for i in range(anatomy.n_layers)]
        widths[kind] = [port.width if port else 0 for port in ports]
    d_attn_z = max(widths["attn_z"])
    refusals = {str(site): reason for site, reason in anatomy.refusals.items()}
    if is_split:
        widths["attn_z"] = [0] * anatomy.n_layers
        refusals |= {str(Site(i, "attn_z")): OWN_HEADS for i in range(anatomy.n_layers)}
    return SiteFacts(d_attn_z=d_attn_z, widths=widths, refusals=refusals)


def _idle_parameters(layers: nn.Module, config: Any) -> int:
    """Number of parameters of the experts that a token is not sent to, on average; 0 if the model does not say."""
    per_token = getattr(config, "num_experts_per_tok", None)
    if not isinstance(per_token, int):
        return 0
    idle = 0
    for name, module in layers.named_modules():
        n_experts = getattr(module, "num_experts", None)
        if name.endswith(".experts") and isinstance(n_experts, int) and n_experts > per_token:
            idle += n_parameters(module) * (n_experts - per_token) // n_experts
    return idle


def _special_tokens(spec: ModelSpec, config: Any) -> tuple[int | None, int | None, int | None]:
    """The tokens that start a sequence, end a document, and pad: BOS and EOS, or an encoder's CLS and SEP.

    They come from the tokenizer, or from the configuration if there is no tokenizer; warns if there may be one that
    cannot be read. An id outside the vocabulary, as in the configuration of a model whose vocabulary was cut, counts as
    none.
    """
    start = first_id(getattr(config, "bos_token_id", None))
    end = first_id(getattr(config, "eos_token_id", None))
    pad = first_id(getattr(config, "pad_token_id", None))
    try:
        tokenizer = load_tokenizer(spec)
    except ModelError as error:
        location = locate(spec)
        if not location.is_directory or any(Path(location.name_or_path).glob("tokenizer*")):
            ids = {"BOS": start, "EOS": end, "padding": pad}
            found = ", ".join(f"{role} {'none' if token is None else token}" for role, token in ids.items())
            warnings.warn(f"special tokens ({found}) are taken from config.json: {error}", stacklevel=2)
    else:
        start = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        pad = pad if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    known = range(config.vocab_size)
    return (
        start if start in known else None,
        end if end in known else None,
        pad if pad in known else None,
    )


def _max_context(config: Any, model: Any) -> int:
    """The longest sequence that the model accepts; 0 if there is no limit."""
    longest = getattr(config, "max_position_embeddings", None) or 0
    for name, module in model.base_model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            longest -= padding + 1  # RoBERTa's first position comes after the padding token's
    return longest


def resolve_device(asked: str) -> torch.device:
    """The device of `model.device`; "auto" is a GPU if torch finds one, otherwise the CPU."""
    available = {"cuda": torch.cuda.device_count(), "cpu": 1}
    if asked == "auto":
        return torch.device("cuda" if available["cuda"] else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ModelError(f'unknown model.device "{asked}"; use "auto", "cpu", "cuda" or "cuda:1".') from None

    if device.type == "mps":
        raise ModelError(
            f'model.device "{asked}" is not supported: maps and refits are computed in float64, which MPS lacks. '
            'Use "cpu"'
        )
    n_devices = available.get(device.type, 0)
    if (device.index or 0) >= n_devices:
        raise ModelError(
            f'model.device "{asked}" is not available: '
            f"torch {torch.__version__} finds {n_devices} devices of type {device.type}. "
            'Use "auto" or "cpu", or install a torch build and a driver that support it.'
        )
    return device


def _resolve_dtype(asked: Precision | Literal["auto"], device: torch.device, config: Any) -> Precision:
    """The dtype of `model.dtype`; "auto" is bfloat16 where the hardware is fast at it.

    For a quantised model "auto" is the dtype it was saved in, which the products with its weights may need.
    """
    if asked != "auto":
        return asked
    saved = str(config.get_text_config().dtype or config.dtype).removeprefix("torch.")
    if quantisation(config) and saved in get_args(Precision):
        return cast(Precision, saved)
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        probes = [getattr(torch.cpu, name, None) for name in _FAST_BF16_PROBES]
        is_fast = any(probe() for probe in probes if probe is not None)
    else:
        is_fast = False
    return "bfloat16" if is_fast else "float32"
