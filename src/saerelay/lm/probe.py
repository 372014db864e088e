"""Facts about a language model, found by running a few tokens through it.

Nothing is decided by the name of a family. Which modules are the layers, whether the output of a
layer is the input of the next, how wide activations are, and whether attention and MLP are added to
the residual stream as they are: all of this is visible in a forward over a few tokens, and in the
graph that autograd records of it. Shapes and graph exist on torch's meta device as well, so a plan
learns the same as a training run, without loading weights.

Shapes: B sequences, C positions, D width of the activations at a site.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from saerelay.errors import ModelError
from saerelay.lm.graph import Place, Sum, ancestors
from saerelay.lm.trial import TRIAL_SHAPE, Call, Record, trial, with_constants
from saerelay.module_names import MLP_INPUTS, MLPS, PROJECTIONS
from saerelay.site import MODULE_KINDS, ModuleKind, Site

Side = Literal["input", "output"]


class PortPlace(NamedTuple):
    """The place where the activations of a site pass."""

    path: str
    """Path of the module in the model."""
    side: Side
    width: int


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The facts that a probe finds about a model."""

    layers: str
    """Path of the list of layers."""
    n_layers: int
    d_model: int
    ports: dict[Site, PortPlace]
    refusals: dict[Site, str]
    """The reasons why the other sites cannot be read."""
    outputs: dict[str, Site | None]
    """The paths of all modules within layers, with the site whose activations the module returns, if any."""

    @property
    def last_layer(self) -> str:
        """Path of the last layer that runs."""
        return f"{self.layers}.{max((site.layer for site in self.ports), default=self.n_layers - 1)}"


def probe(model: Any, name: str) -> Anatomy:
    """Run a few tokens through a transformers model and find where each site is read.

    Its parameters may be on the meta device. Raises ModelError if the model needs more than tokens, or
    is not a single stack of layers.
    """
    where = f'"{name}" ({model.config.model_type})'
    if model.config.is_encoder_decoder:
        raise ModelError(_not_a_stack(where))
    record = trial(model, where)
    layers = _find_stack(record, where)
    return _anatomy(record, layers)


def probe_skeleton(model: Any, name: str) -> Anatomy:
    """`probe` of a model whose parameters are on the meta device; their dtype may change.

    Some kernels need bfloat16, others float32. A model that does not run on the meta device, because it
    asks for the values of tensors, runs on the CPU with the same number for all weights. Raises what
    `probe` raises.
    """
    model.eval()
    for variant in (lambda: model.to(torch.bfloat16), lambda: model.float()):
        with suppress(ModelError):
            return probe(variant(), name)
    return probe(with_constants(model), name)


# --- which modules are the layers ----------------------------------------------------------------


def _find_stack(record: Record, where: str) -> str:
    """Path of the list of layers: the list in which each layer reads what the layer before it returns.

    Lists inside a layer of another list do not count. Raises ModelError if there is no such list, or
    more than one.
    """
    stacks = {}
    for path, module in record.modules.items():
        if isinstance(module, nn.ModuleList) and len(module):
            links = _n_links(record, path, len(module))
            if links is not None:
                stacks[path] = links
    outermost = []
    for path in stacks:
        if not any(path.startswith(f"{other}.") for other in stacks):
            outermost.append(path)
    longest = max((stacks[path] for path in outermost), default=0)
    best = [path for path in outermost if stacks[path] == longest]
    if len(best) != 1:
        raise ModelError(_not_a_stack(where))
    return best[0]


def _not_a_stack(where: str) -> str:
    return (
        f"{where} is not a single stack of layers that every token passes through, each reading "
        "the output of the layer before it. Use a decoder-only or encoder-only language model."
    )


def _n_links(record: Record, path: str, n: int) -> int | None:
    """How many layers of a list read the output of the layer before them; None if the list is not a stack.

    In a stack each layer is called at most once, in order, and reads what the last one returned.
    Layers that are not called do not count (some run only if there are images).
    """
    calls = []
    for i in range(n):
        found = record.calls.get(f"{path}.{i}", [])
        if len(found) > 1:
            return None
        calls += found
    numbers = [call.number for call in calls]
    if not calls or numbers != sorted(numbers):
        return None
    if any(call.made is None or not _is_of_tokens(call.made_shape) for call in calls):
        return None
    links = sum(1 for before, call in zip(calls, calls[1:], strict=False) if call.read == before.made)
    if links < len(calls) - 1:
        return None
    return links + 1


def _is_of_tokens(shape: tuple[int, ...]) -> bool:
    """Whether a tensor has one vector, or several, per token: (B, C, D), (B, C, n, D) or (n, B, C, D)."""
    return len(shape) in (3, 4) and TRIAL_SHAPE in (shape[:2], shape[-3:-1])


# --- what can be read in a layer -----------------------------------------------------------------


def _anatomy(record: Record, layers: str) -> Anatomy:
    """The ports of all sites that can be read, and why the other sites have none."""
    n_layers = len(record.modules[layers])  # type: ignore[arg-type]
    ports: dict[Site, PortPlace] = {}
    refusals: dict[Site, str] = {}
    for i in range(n_layers):
        call = record.only(f"{layers}.{i}")
        found: dict[ModuleKind, PortPlace | str]
        if call is None:
            found = dict.fromkeys(MODULE_KINDS, "the layer does not run on text alone")
        else:
            found = _stream_ports(call) | _inner_ports(record, call)
        for kind, port in found.items():
            if isinstance(port, str):
                refusals[Site(i, kind)] = port
            else:
                ports[Site(i, kind)] = port
    widths = [port.width for site, port in ports.items() if site.module == "resid_post"]
    if not widths:
        calls = [call for i in range(n_layers) if (call := record.only(f"{layers}.{i}"))]
        widths = [call.made_shape[-1] for call in calls]
    return Anatomy(
        layers=layers,
        n_layers=n_layers,
        d_model=widths[0],
        ports=ports,
        refusals=refusals,
        outputs=_outputs(record, layers, ports),
    )


def _outputs(record: Record, layers: str, ports: dict[Site, PortPlace]) -> dict[str, Site | None]:
    """The module paths in layers, with the site whose port returns the same numbers."""
    sites: dict[Place | None, Site] = {}
    for site, port in ports.items():
        call = record.only(port.path)
        if call and port.side == "output":
            sites[call.made] = site
    found = {}
    for path in record.modules:
        call = record.only(path)
        if call and call.made and path.startswith(f"{layers}."):
            found[path] = sites.get(call.made)
    return found


def _stream_ports(call: Call) -> dict[ModuleKind, PortPlace | str]:
    """The ports of the residual stream before and after a layer."""
    found: dict[ModuleKind, PortPlace | str] = {}
    sides: tuple[tuple[ModuleKind, Side, tuple[int, ...]], ...] = (
        ("resid_pre", "input", call.read_shape),
        ("resid_post", "output", call.made_shape),
    )
    for kind, side, shape in sides:
        if len(shape) == 4:
            n = shape[2] if shape[:2] == TRIAL_SHAPE else shape[0]
            found[kind] = f"{n} residual streams pass between the layers, not one vector for each token"
        elif shape[:-1] != TRIAL_SHAPE:
            found[kind] = "the layers do not pass one vector for each token to each other"
        else:
            found[kind] = PortPlace(call.path, side, shape[-1])
    return found


def _inner_ports(record: Record, call: Call) -> dict[ModuleKind, PortPlace | str]:
    """The ports of the terms that attention and MLP add to the residual stream, and of the inputs of both."""
    projection = _named(record, call.path, PROJECTIONS)
    mlps = [_named(record, call.path, [path]) for path in MLPS]
    added = _added(record, call, projection, [mlp for mlp in mlps if mlp])
    attn_z = _input_port(
        projection,
        lacking="the layer has no attention with an output projection that is known",
        uneven="attention's output projection does not read one vector for each token",
    )
    mlp_in = _input_port(
        _named(record, call.path, MLP_INPUTS),
        lacking="the layer has no module that is known to be an MLP",
        uneven="the MLP does not read one vector for each token",
    )
    return {"attn_z": attn_z, "mlp_in": mlp_in, **added}


def _named(record: Record, layer: str, paths: Iterable[str]) -> Call | None:
    """The call of the first module that a layer has at one of the given paths."""
    for path in paths:
        if f"{layer}.{path}" in record.modules:
            return record.only(f"{layer}.{path}")
    return None


def _input_port(call: Call | None, *, lacking: str, uneven: str) -> PortPlace | str:
    """The port of a module's input, or why there is none: no such module, or its input is not one vector per token."""
    if call is None:
        return lacking
    if call.read_shape[:-1] != TRIAL_SHAPE:
        return uneven
    return PortPlace(call.path, "input", call.read_shape[-1])


def _added(record: Record, call: Call, projection: Call | None, mlps: list[Call]) -> dict[ModuleKind, PortPlace | str]:
    """The ports of the terms that attention and MLP add to the residual stream.

    How to see this: the graph gives a layer's output as a sum: its input, and some terms. The term
    that is computed from attention's projection is attention's, and the term computed from the MLP is
    the MLP's. The search stops at the residual stream, because all later terms are computed from
    earlier ones through it. The port is the module that returns the term.
    """
    if call.read is None or call.made is None:
        return _refused("autograd records nothing of the layer")
    whole = _Whole.of(record, call)
    if whole is None:
        return _refused("the layer does not simply add it to the residual stream, but scales or mixes the two")

    attention = whole.terms_from([projection] if projection else [])
    mlp = whole.terms_from(mlps)
    others = [term for term in whole.sum.terms if term not in attention + mlp]
    from_modules = [module for module in whole.modules if module.made in others]
    has_loose_terms = not set(others) <= {module.made for module in from_modules}
    if attention and mlp and (has_loose_terms or set(attention) & set(mlp)):
        return _refused("the layer adds more than attention and MLP to the residual stream")
    found: dict[ModuleKind, PortPlace | str] = {
        "attn_out": whole.port(attention, [projection] if projection else [], "attention"),
        "mlp_out": whole.port(mlp, mlps, "an MLP"),
    }
    inputs = {module.read for module in from_modules}
    if any(mlp.read in inputs for mlp in mlps):
        found["mlp_out"] = (
            "the layer also adds the output of another module that reads the MLP's input, such as shared experts"
        )
    return found


def _refused(reason: str) -> dict[ModuleKind, PortPlace | str]:
    return {"attn_out": reason, "mlp_out": reason}


def _is_norm(module: nn.Module) -> bool:
    """Whether all of a module's parameters are gains and biases, as in norms."""
    parameters = list(module.parameters())
    return bool(parameters) and all(parameter.ndim == 1 for parameter in parameters)


@dataclass(frozen=True, eq=False)
class _Whole:
    """A layer's output as a sum, and the modules that return the terms."""

    sum: Sum
    modules: list[Call]

    @classmethod
    def of(cls, record: Record, call: Call) -> "_Whole | None":
        """The sum that makes up a layer's output; None unless the layer's input occurs in it once, unscaled."""
        inside = []
        norms = {}
        for path, module in record.modules.items():
            inner = record.only(path) if path.startswith(f"{call.path}.") else None
            if inner is None or inner.made is None or inner.made == inner.read:
                continue  # called not exactly once, or an inactive dropout
            inside.append(inner)
            if inner.read and inner.read_shape == inner.made_shape and _is_norm(module):
                norms[inner.made] = inner.read
        assert call.read and call.made
        parts = {inner.made for inner in inside if inner.made}
        whole = Sum(call.made, call.read, parts, norms)
        return cls(whole, inside) if whole.n_starts == 1 else None

    def terms_from(self, calls: list[Call]) -> list[Place]:
        """The terms that are computed from the outputs of some modules."""
        nodes = {call.made[0] for call in calls if call.made}
        found = []
        for term in self.sum.terms:
            if term is not None and nodes & ancestors(term, until=self.sum.stream):
                found.append(term)
        return found

    def port(self, terms: list[Place], named: list[Call], what: str) -> PortPlace | str:
        """The module that returns a term: the one known by name, or else the outermost."""
        if not named:
            return f"the layer has no module that is known to be {what}"
        if not terms:
            return f"the output of the module of {what} is not added to the residual stream unchanged"
        if len(terms) > 1:
            return f"the layer adds {len(terms)} outputs of {what}"
        for module in (*named, *self.modules):
            if module.made == terms[0] and module.made_shape[:-1] == TRIAL_SHAPE:
                return PortPlace(module.path, "output", module.made_shape[-1])
        return f"no module returns what {what} adds to the residual stream"
