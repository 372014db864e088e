"""The only map from a site to a module of a Hugging Face model.

A *port* is a module and one of its sides: the activations of `L3` are the output of the fourth
layer, and those of `L3.attn_z` the input of its attention's output projection.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from saerelay.errors import ModelError, PlanError
from saerelay.lm.probe import Anatomy, PortPlace, Side, probe, probe_skeleton
from saerelay.lm.source import loading, model_skeleton, quantisation, read_config
from saerelay.lm.trial import read_stream, without_weights
from saerelay.planning.facts import explain_refusal
from saerelay.planning.recipe import ModelSpec
from saerelay.site import Site


class Port(NamedTuple):
    """A module, and the side of it at which the activations of a site pass."""

    module: nn.Module
    side: Side


# --- from a site to its port -------------------------------------------------------------------

_ANATOMIES: WeakKeyDictionary[Any, Anatomy] = WeakKeyDictionary()
"""The anatomies found so far of models that are in use."""


def port_of(model: Any, site: Site) -> Port:
    """The port at which the activations of a site pass in a transformers model.

    >>> from saerelay.lm.model import LanguageModel
    >>> module, side = port_of(LanguageModel.load(ModelSpec(device="cpu")).hf_model, Site(3, "attn_z"))
    >>> type(module).__name__, side
    ('Linear', 'input')

    Raises PlanError if the model has no such layer, ModelError if the site cannot be read there.
    """
    place = place_in(anatomy_of(model), site, model_name(model))
    return Port(transformers_model(model).get_submodule(place.path), place.side)


def place_in(anatomy: Anatomy, site: Site, name: str) -> PortPlace:
    """The path and the side of a site's port, and its width; `name` is the model's name, for errors."""
    if site.layer >= anatomy.n_layers:
        raise PlanError(f'{site}: "{name}" has {anatomy.n_layers} layers; layers go from 0 to {anatomy.n_layers - 1}')
    if site not in anatomy.ports:
        raise ModelError(explain_refusal(site, name, anatomy.refusals[site], anatomy.ports))
    return anatomy.ports[site]


def anatomy_of(model: Any) -> Anatomy:
    """The anatomy that a probe finds in a transformers model; the model is not changed."""
    hf_model = transformers_model(model)
    if hf_model not in _ANATOMIES:
        _ANATOMIES[hf_model] = _probed(hf_model, model_name(model))
    return _ANATOMIES[hf_model]


def _probed(hf_model: Any, name: str) -> Anatomy:
    """The anatomy of a copy without weights or, if that cannot be made or run, of the model itself."""
    if quantisation(hf_model.config):
        return probe_skeleton(plain_skeleton(hf_model), name)
    try:
        return probe_skeleton(without_weights(hf_model), name)
    except Exception:  # a model may hold anything, and copying it may fail in any way
        return probe(hf_model, name)


def plain_skeleton(hf_model: Any) -> Any:
    """The skeleton of a quantised model as if its weights were plain: the modules are in the same places."""
    config = deepcopy(hf_model.config)
    del config.quantization_config
    with torch.device("meta"):
        return type(hf_model)(config)


def transformers_model(model: Any) -> Any:
    """The transformers model itself, which may be wrapped in another module, as by `peft`."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return model
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ModelError(f"{type(model).__name__} is neither a transformers model nor a wrapper of one.")


def model_name(model: Any) -> str:
    """A model's name; if it has none, the name of its class."""
    hf_model = transformers_model(model)
    return hf_model.config.name_or_path or type(hf_model).__name__


def module_paths(spec: ModelSpec, sites: Iterable[Site]) -> dict[Site, str]:
    """The path of the module that is read at each site, such as "gpt_neox.layers.3"; loads no weights.

    >>> module_paths(ModelSpec(), [Site(3), Site(3, "attn_z")])[Site(3)]
    'gpt_neox.layers.3'

    If the module's input is read, the name ends in ".input". Sites that the model does not have
    are left out. Raises what `read_facts` raises.
    """
    anatomy = read_anatomy(spec)
    paths = {}
    for site in sites:
        if site in anatomy.ports:
            place = anatomy.ports[site]
            paths[site] = place.path + (".input" if place.side == "input" else "")
    return paths


def other_module(spec: ModelSpec, site: Site, module_path: str) -> bool:
    """Whether a path leads to a module of the model other than the one that gives a site's activations.

    >>> other_module(ModelSpec(), Site(3), "layers.3"), other_module(ModelSpec(), Site(3), "gpt_neox.layers.4")
    (False, True)
    >>> other_module(ModelSpec(), Site(3, "attn_z"), "layers.3.attention.dense.input")
    False

    Also False if the model has no such module: then nothing can be said.
    """
    anatomy = read_anatomy(spec)
    if site not in anatomy.ports:
        return False
    port = anatomy.ports[site]
    path, _, side = module_path.rpartition(".")
    if side not in ("input", "output"):
        path, side = module_path, "output"
    named = [other for other in anatomy.outputs if f".{other}".endswith(f".{path}")]
    if not named:
        return False
    if side == "input":
        return port.side != "input" or port.path not in named
    return port.path not in named and all(anatomy.outputs[other] != site for other in named)


def read_anatomy(spec: ModelSpec) -> Anatomy:
    """The anatomy that a probe finds in a model without its weights."""
    with loading(spec):
        return probe_skeleton(model_skeleton(spec, read_config(spec)), spec.name)


# --- sizes -------------------------------------------------------------------------------------


def shape_of(model: Any) -> tuple[int, int]:
    """Number of layers, and width D of the residual stream, of a transformers model."""
    anatomy = anatomy_of(model)
    return anatomy.n_layers, anatomy.d_model


def width_at(model: Any, site: Site) -> int:
    """Width D of the activations at a site; raises what `port_of` raises."""
    return place_in(anatomy_of(model), site, model_name(model)).width


def n_parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


# --- interception ------------------------------------------------------------------------------


@contextmanager
def intercept(port: Port, site: Site, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the activations x (B, C, D) that pass a port by function(x).

    The result is cast to the dtype of x; `site` is named in the error if its shape differs.
    """

    def replace(x: Tensor) -> Tensor:
        y = function(x)
        assert y.shape == x.shape, f"{site}: spliced {tuple(y.shape)} into {tuple(x.shape)}"
        return y.to(x.dtype)

    def on_input(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        key = read_stream(args, kwargs)
        assert key is not None, f"{site}: {type(module).__name__} was given no activations"
        if isinstance(key, int):
            return (*args[:key], replace(args[key]), *args[key + 1 :]), kwargs
        return args, {**kwargs, key: replace(kwargs[key])}

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
