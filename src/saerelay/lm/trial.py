"""A forward over a few tokens, with weights or without, with a record of all module calls.

On torch's meta device there are shapes, and the graph that autograd records, but no numbers.

Shapes: B sequences, C positions, D width of the activations at a site.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from saerelay.errors import ModelError
from saerelay.lm.graph import Place, place_of

TRIAL_SHAPE = (2, 7)
"""B and C of the trial tokens: two different numbers, neither of them likely to be a width."""

_CONSTANT = 0.02
"""Value of every weight in the stand-in for a model whose weights are not available."""


@dataclass(eq=False)
class Call:
    """One call of a module: the places and shapes of its input stream and of its output stream."""

    path: str
    number: int
    read: Place | None = None
    read_shape: tuple[int, ...] = ()
    made: Place | None = None
    made_shape: tuple[int, ...] = ()


@dataclass(eq=False)
class Record:
    """All module calls of a forward."""

    modules: dict[str, nn.Module]
    calls: dict[str, list[Call]] = field(default_factory=dict)
    n_calls: int = 0

    def only(self, path: str) -> Call | None:
        """The call of a module, if it was called exactly once."""
        calls = self.calls.get(path, [])
        return calls[0] if len(calls) == 1 else None


def read_stream(args: tuple, kwargs: Mapping[str, Any]) -> int | str | None:
    """Which argument of a module holds the activations: its position, or its name.

    It is the first floating-point tensor; among arguments given by name, `hidden_states` comes first.
    """
    for i, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return i
    for name in ("hidden_states", *kwargs):
        value = kwargs.get(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            return name
    return None


def made_stream(output: Any) -> Tensor | None:
    """The activations in a module's output: the tensor itself, or the first of several."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


def trial_tokens(model: Any) -> Tensor:
    """A few token ids (B, C) for a trial, on the model's device; ModelError if the model has no vocabulary."""
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    parameter = next(iter(model.parameters()), None)
    if not vocabulary or parameter is None:
        name = model.config.name_or_path or type(model).__name__
        raise ModelError(f'"{name}" ({model.config.model_type}) does not read tokens; use a language model.')
    B, C = TRIAL_SHAPE
    return ((5 + 7 * torch.arange(B * C)) % vocabulary).view(B, C).to(parameter.device)


def trial(model: Any, where: str) -> Record:
    """Run a forward over a few tokens, and record all module calls."""
    ids = trial_tokens(model)
    answers = _PlausibleValues() if ids.is_meta else nullcontext()
    with _recording(model) as record, _with_gradients(model), answers:
        try:
            model.base_model(input_ids=ids, use_cache=False)
        except ModelError:
            raise
        except Exception as error:  # a forward may fail in any way
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"{where} does not run on token ids alone ({type(error).__name__}: {reason}). "
                "Use a decoder-only or encoder-only language model."
            ) from error
    return record


@contextmanager
def _recording(model: Any) -> Iterator[Record]:
    """Record every call of every module."""
    modules = dict(model.named_modules())
    record = Record(modules)
    open_calls: dict[str, list[Call]] = {}

    def begin(path: str, _: nn.Module, args: tuple, kwargs: dict) -> None:
        call = Call(path, record.n_calls)
        record.n_calls += 1
        key = read_stream(args, kwargs)
        if key is not None:
            x = args[key] if isinstance(key, int) else kwargs[key]
            call.read = place_of(x)
            call.read_shape = tuple(x.shape)
        open_calls.setdefault(path, []).append(call)
        record.calls.setdefault(path, []).append(call)

    def end(path: str, _: nn.Module, __: tuple, output: Any) -> None:
        call = open_calls[path].pop()
        x = made_stream(output)
        if x is not None and x.is_floating_point():
            call.made = place_of(x)
            call.made_shape = tuple(x.shape)

    with ExitStack() as stack:
        for path, module in modules.items():
            handle = module.register_forward_pre_hook(partial(begin, path), with_kwargs=True)
            stack.callback(handle.remove)
            handle = module.register_forward_hook(partial(end, path))
            stack.callback(handle.remove)
        yield record


@contextmanager
def _with_gradients(model: Any) -> Iterator[None]:
    """Let autograd record everything; nothing is ever differentiated."""
    frozen = []
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.requires_grad:
            frozen.append(parameter)
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


class _PlausibleValues(TorchDispatchMode):
    """Provides values if a forward on the meta device asks for one, to choose a branch or a size.

    The branch hardly matters for what is examined here: it concerns masks, and which expert gets which
    token.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        first = args[0] if args else None
        if func._schema.name == "aten::_local_scalar_dense" and not isinstance(first, Tensor):
            return first  # a Python number in a product
        if isinstance(first, Tensor) and first.is_meta:
            match func._schema.name:
                case "aten::_local_scalar_dense":
                    return True if first.dtype == torch.bool else 0
                case "aten::nonzero":
                    return torch.empty((1, first.ndim), dtype=torch.long, device="meta")
                case "aten::equal":
                    return True
        return func(*args, **(kwargs or {}))


def without_weights(model: Any) -> Any:
    """A copy of a model on the meta device, which takes no memory and has none of the model's hooks."""
    return _with_tensors(model, lambda tensor: torch.empty_like(tensor, device="meta"))


def with_constants(model: Any) -> Any:
    """A copy of a model on the CPU that takes next to no memory: every weight is the same number.

    For models that do not run on the meta device because they ask for the values of tensors, for
    example to divide tokens among experts.
    """

    def constant(tensor: Tensor) -> Tensor:
        value = _CONSTANT if tensor.is_floating_point() else 0
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        if isinstance(tensor, nn.Parameter):
            return torch.full((), value, dtype=dtype).expand(tensor.shape)
        return torch.full(tensor.shape, value, dtype=dtype)  # some models write into their buffers

    return _with_tensors(model, constant)


def _with_tensors(model: Any, stand_in: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a model with other parameters and buffers, and without its hooks."""
    stand_ins: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        other = stand_in(tensor)
        if isinstance(tensor, nn.Parameter):
            other = nn.Parameter(other, requires_grad=tensor.is_floating_point())
        stand_ins[id(tensor)] = other
    copy = deepcopy(model, stand_ins)
    for module in copy.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return copy
