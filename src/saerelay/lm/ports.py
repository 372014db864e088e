"""The only map from a site to a module of a Hugging Face model.

A *port* is a module and one of its sides: the activations of `L3` pass at the output of the fourth
layer, those of `L3.attn_z` at the input of its attention's output projection.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from saerelay.errors import ModelError, PlanError
from saerelay.lm.source import loading, model_skeleton, read_config
from saerelay.module_names import MLPS, PROJECTIONS
from saerelay.planning.recipe import ModelSpec
from saerelay.site import MODULE_KINDS, ModuleKind, Site

_POST_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),  # Gemma 2 and 3, OLMo 2
    ("post_self_attn_layernorm", "post_mlp_layernorm"),  # GLM 4
)
"""Norms of what attention and MLP return, before it is added to the residual stream. Both must
exist: Llama has a post_attention_layernorm as well, which is the norm before its MLP."""

_RESCALING = (
    "Afmoe",
    "Beam",
    "Doge",
    "GPTNeoXJapanese",
    "HyperCLOVAX",
    "Inkling",
    "MiniMaxDecoder",
)
"""Beginnings of the class names of layers that scale, norm or shift what attention or MLP returns
before they add it."""


class Port(NamedTuple):
    """A module, and the side of it at which the activations of a site pass."""

    module: nn.Module
    side: Literal["input", "output"]


# --- from a site to its port -------------------------------------------------------------------


def port_of(model: Any, site: Site) -> Port:
    """Where the activations of a site pass in a transformers model.

    >>> from saerelay.lm.model import LanguageModel
    >>> module, side = port_of(LanguageModel.load(ModelSpec(device="cpu")).hf_model, Site(3, "attn_z"))
    >>> type(module).__name__, side
    ('Linear', 'input')

    Raises PlanError if the model has no such layer, ModelError if its layers have no such module.
    """
    name = model.config.name_or_path or type(model).__name__
    return port_in(find_layers(model, name), site, name=name, family=model.config.model_type)


def port_in(layers: nn.ModuleList, site: Site, *, name: str, family: str) -> Port:
    """The port of a site in a model's layers; name and family are for the errors."""
    if site.layer >= len(layers):
        raise PlanError(f'{site}: "{name}" has {len(layers)} layers; layers go from 0 to {len(layers) - 1}')
    layer = layers[site.layer]
    port = find_port(layer, site.module)
    if port is None:
        supported = [kind for kind in MODULE_KINDS if find_port(layer, kind)]
        paths = MLPS if site.module == "mlp_out" else PROJECTIONS
        raise ModelError(
            f"{site}: cannot find {site.module} in layer {site.layer} ({type(layer).__name__}) of "
            f"{family}. Looked for {', '.join(paths)}, in a layer that adds their output "
            f"unscaled. Supported there: {', '.join(supported)}."
        )
    return port


def find_port(layer: nn.Module, kind: ModuleKind) -> Port | None:
    """Where in a layer the activations of a kind pass, or None where that is unknown."""
    if kind == "resid_pre":
        return Port(layer, "input")
    if kind == "resid_post":
        return Port(layer, "output")

    projection = first_module(layer, PROJECTIONS)
    if kind == "attn_z":
        return Port(projection, "input") if projection else None

    # attn_out and mlp_out are what is added to the residual stream. Where a layer scales it first,
    # no module has it.
    granite_multiplier = getattr(layer, "residual_multiplier", 1)
    if type(layer).__name__.startswith(_RESCALING) or granite_multiplier != 1:
        return None

    block = projection if kind == "attn_out" else first_module(layer, MLPS)
    for after_attention, after_mlp in _POST_NORMS:
        if hasattr(layer, after_attention) and hasattr(layer, after_mlp):
            block = getattr(layer, after_attention if kind == "attn_out" else after_mlp)
    return Port(block, "output") if block else None


def first_module(module: nn.Module, paths: Iterable[str]) -> nn.Module | None:
    """The first of some paths below a module that leads to one."""
    for path in paths:
        try:
            return attrgetter(path)(module)
        except AttributeError:
            continue
    return None


def module_paths(spec: ModelSpec, sites: Iterable[Site]) -> dict[Site, str]:
    """The path of the module that is read at each site, "gpt_neox.layers.3"; loads no weights.

    >>> module_paths(ModelSpec(), [Site(3), Site(3, "attn_z")])[Site(3)]
    'gpt_neox.layers.3'

    Where the module's input is read, the name ends in ".input". Sites that the model does not have
    are left out. Raises what `read_facts` raises.
    """
    with loading(spec):
        skeleton = model_skeleton(spec, read_config(spec))
    layers = find_layers(skeleton, spec.name)
    names = {module: name for name, module in skeleton.named_modules()}

    paths = {}
    for site in sites:
        port = find_port(layers[site.layer], site.module) if site.layer < len(layers) else None
        if port is not None:
            suffix = ".input" if port.side == "input" else ""
            paths[site] = names[port.module] + suffix
    return paths


# --- sizes -------------------------------------------------------------------------------------


def find_layers(model: Any, name: str) -> nn.ModuleList:
    """The model's layers: the list of modules whose length is num_hidden_layers.

    Of several such lists (a vision tower may have as many), the one with the most parameters.
    Raises ModelError for encoder-decoders and other models that are not one stack.
    """
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = []
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            lists.append(module)
    if model.config.is_encoder_decoder or not lists:
        raise ModelError(
            f'"{name}" ({model.config.model_type}) is not a single stack of layers that every '
            "token passes through. Use a decoder-only or encoder-only language model."
        )
    return max(lists, key=n_parameters)


def shape_of(model: Any) -> tuple[int, int]:
    """Number of layers, and width D of the residual stream, of a transformers model."""
    layers = find_layers(model, type(model).__name__)
    return len(layers), model.config.get_text_config().hidden_size


def width_at(model: Any, site: Site) -> int:
    """Width D of the activations at a site; raises what `port_of` raises."""
    port = port_of(model, site)
    if site.module == "attn_z":
        return n_inputs(port.module)
    _, d_model = shape_of(model)
    return d_model


def n_inputs(projection: Any) -> int:
    """Width of what a projection reads."""
    if hasattr(projection, "in_features"):
        return projection.in_features
    return projection.weight.shape[0]  # GPT-2's Conv1D, which stores the transpose of a Linear's weight


def n_parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


# --- interception ------------------------------------------------------------------------------


@contextmanager
def intercept(port: Port, site: Site, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the activations (B,C,D) that pass a port by `function` of them.

    The result is cast to their dtype; `site` is for the error if its shape is another.
    """

    def replace(x: Tensor) -> Tensor:
        y = function(x)
        assert y.shape == x.shape, f"{site}: spliced {tuple(y.shape)} into {tuple(x.shape)}"
        return y.to(x.dtype)

    # Most layers get the residual stream as their first argument, some by name.
    def on_input(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (replace(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": replace(kwargs["hidden_states"])}

    # Some modules return a tensor, others a tuple that begins with it.
    def on_output(_: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return (replace(output[0]), *output[1:])
        return replace(output)

    if port.side == "input":
        handle = port.module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = port.module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()
