"""The only map from a site to a module of a Hugging Face model."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, Literal

from torch import Tensor, nn

from saerelay.errors import ModelError, PlanError
from saerelay.lm.source import _explained, _read_config, _skeleton
from saerelay.planning.recipe import ModelSpec
from saerelay.site import MODULE_KINDS, ModuleKind, Site

PROJECTIONS = (  # of attention, onto the residual stream
    *("self_attn.o_proj", "attention.dense", "attn.c_proj"),  # Llama and most others, GPT-NeoX, GPT-2
    *("attention.output.dense", "attention.out_lin", "attn.Wo"),  # BERT, DistilBERT, ModernBERT
    *("self_attn.out_proj", "self_attn.dense", "self_attention.dense"),  # OPT, Phi, Falcon and BLOOM
    *("attn.attention.out_proj", "attn.out_proj"),  # GPT-Neo, GPT-J and MPT
)


MLPS = (
    *("mlp.dense_4h_to_h", "mlp"),  # BLOOM, whose `mlp` adds the residual stream itself; most others
    *("output.dense", "ffn.lin2", "ffn.down_proj"),  # BERT, DistilBERT, MPT
)


_POST_NORMS = (  # pairs of norms between a block and the residual stream; one without the other means something else
    ("post_attention_layernorm", "post_feedforward_layernorm"),  # Gemma 2 and 3, OLMo 2
    ("post_self_attn_layernorm", "post_mlp_layernorm"),  # GLM 4
)


_RESCALING = ("Afmoe", "Beam", "Doge", "GPTNeoXJapanese", "HyperCLOVAX", "Inkling", "MiniMaxDecoder")
"""Beginnings of the class names of layers that scale, norm or shift what a block returns before they add it."""


Port = tuple[nn.Module, Literal["input", "output"]]
"""A module, and the side of it at which the activations of a site pass."""


def module_paths(spec: ModelSpec, sites: Iterable[Site]) -> dict[Site, str]:
    """The dotted name, in the Hugging Face model, of the module whose output is read at each site; no weights.

    >>> module_paths(ModelSpec(), [Site(3), Site(3, "attn_z")])[Site(3)]
    'gpt_neox.layers.3'

    Where its input is read, the name ends in ".input". A site that the model has not is left out; raises what
    `read_facts` raises.
    """
    with _explained(spec):
        skeleton = _skeleton(spec, _read_config(spec))
    names, layers = {module: name for name, module in skeleton.named_modules()}, _find_layers(skeleton, spec.name)
    ports = {site: _port(layers[site.layer], site.module) for site in sites if site.layer < len(layers)}
    return {
        site: names[port[0]] + (".input" if port[1] == "input" else "")
        for site, port in ports.items()
        if port is not None
    }


def port_of(model: Any, site: Site) -> Port:
    """Where the activations of a site pass in a transformers model; raises what `LanguageModel.check_site` raises.

    >>> from saerelay.lm.model import LanguageModel
    >>> module, side = port_of(LanguageModel.load(ModelSpec(device="cpu")).hf_model, Site(3, "attn_z"))
    >>> type(module).__name__, side
    ('Linear', 'input')
    """
    name = model.config.name_or_path or type(model).__name__
    return _port_in(_find_layers(model, name), site, name, model.config.model_type)


def shape_of(model: Any) -> tuple[int, int]:
    """Number of layers, and width D of the residual stream, of a transformers model."""
    return len(_find_layers(model, type(model).__name__)), model.config.get_text_config().hidden_size


def width_at(model: Any, site: Site) -> int:
    """Width D of the activations at a site of a transformers model."""
    projection = port_of(model, site)[0]
    return _n_inputs(projection) if site.module == "attn_z" else shape_of(model)[1]


@contextmanager
def intercept(port: Port, site: Site, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace activations (B,C,D) at a port by `function` of them while the `with` block lasts; see `splice`."""
    module, side = port

    def replace(x: Tensor) -> Tensor:
        y = function(x)
        assert y.shape == x.shape, f"{site}: spliced {tuple(y.shape)} into {tuple(x.shape)}"
        return y.to(x.dtype)

    def on_input(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (replace(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": replace(kwargs["hidden_states"])}

    def on_output(_: nn.Module, args: tuple, output: Any) -> Any:
        return (replace(output[0]), *output[1:]) if isinstance(output, tuple | list) else replace(output)

    if side == "input":
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


def _port_in(layers: nn.ModuleList, site: Site, name: str, family: str) -> Port:
    if site.layer >= len(layers):
        raise PlanError(f'{site}: "{name}" has {len(layers)} layers; layers go from 0 to {len(layers) - 1}')
    layer = layers[site.layer]
    port = _port(layer, site.module)
    if port is None:
        working = ", ".join(kind for kind in MODULE_KINDS if _port(layer, kind))
        paths = ", ".join(MLPS if site.module == "mlp_out" else PROJECTIONS)
        raise ModelError(
            f"{site}: no {site.module} is known in layer {site.layer} ({type(layer).__name__}) of {family}. "
            f"Looked for {paths}, in a layer that adds what they return unscaled. These work there: {working}."
        )
    return port


def _port(layer: nn.Module, kind: ModuleKind) -> Port | None:
    """The module of a layer, and its side, at which activations of a kind pass: the only map from sites to modules."""
    if kind == "resid_post":
        return layer, "output"
    if kind == "resid_pre":
        return layer, "input"
    projection = _first(layer, PROJECTIONS)
    if kind == "attn_z":
        return (projection, "input") if projection else None
    if type(layer).__name__.startswith(_RESCALING) or getattr(layer, "residual_multiplier", 1) != 1:  # Granite's
        return None
    block = projection if kind == "attn_out" else _first(layer, MLPS)
    for after_attention, after_mlp in _POST_NORMS:
        if hasattr(layer, after_attention) and hasattr(layer, after_mlp):
            block = getattr(layer, after_attention if kind == "attn_out" else after_mlp)
    return (block, "output") if block else None


def _n_inputs(projection: Any) -> int:
    return getattr(projection, "in_features", None) or projection.weight.shape[0]  # GPT-2's stores its transpose


def _first(layer: nn.Module, paths: Iterable[str]) -> nn.Module | None:
    for path in paths:
        try:
            return attrgetter(path)(layer)
        except AttributeError:
            continue
    return None


def _find_layers(model: Any, name: str) -> nn.ModuleList:
    """The model's layers: the module list as long as the configuration says; of several, the one with most weights."""
    n = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == n]
    if model.config.is_encoder_decoder or not lists:
        raise ModelError(
            f'"{name}" ({model.config.model_type}) is not one stack of layers that all tokens pass. '
            "Use a decoder-only or encoder-only language model."
        )
    return max(lists, key=_count)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
