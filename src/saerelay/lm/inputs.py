"""The inputs of a forward: which tokens there are, which are padding, and at which positions they are.

A model may be called by its outermost module, by its base model or by a module around it; with a
key-value cache, with a recurrent state, or with the whole text.

Shapes: B sequences, C positions of this forward.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from saerelay.errors import ModelError
from saerelay.lm.ports import transformers_model

_STATE_NAMES = ("past", "cache", "state")
"""Parts of the names of arguments that carry the state of earlier forwards."""


def entries(model: Any, layers: str) -> Iterator[nn.Module]:
    """The modules at which a forward may enter: all that contain the list of layers, outermost first.

    `model` is a transformers model or a wrapper of one; `layers` is the list's path in the transformers model.
    """
    inner = transformers_model(model)
    prefix = next(path for path, module in model.named_modules() if module is inner)
    path = f"{prefix}.{layers}".removeprefix(".").rpartition(".")[0]
    yield model
    parts = path.split(".") if path else []
    for i in range(len(parts)):
        yield model.get_submodule(".".join(parts[: i + 1]))


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of one module; None where it was given nothing."""

    shape: tuple[int, int] | None
    """(B, C)."""
    device: torch.device
    ids: Tensor | None
    mask: Any
    """The attention mask: a tensor of two, three or four dimensions, or several masks by kind of layer."""
    states: list[Any]

    def within(self, outer: "Inputs") -> "Inputs":
        """Complete the inputs of an inner module with those that only the outer module was given.

        If the two have another shape, the outer module's token ids are those of other positions.
        """
        if self.shape is None:
            return outer
        same_positions = self.shape == outer.shape
        ids = self.ids
        if ids is None and same_positions:
            ids = outer.ids
        # A mask of two dimensions hides only padding; what the outer module makes of it may hide more.
        mask = self.mask
        outer_hides_padding_alone = isinstance(outer.mask, Tensor) and outer.mask.ndim == 2
        if mask is None or (outer_hides_padding_alone and same_positions):
            mask = outer.mask
        return replace(self, ids=ids, mask=mask, states=self.states or outer.states)

    def start(self, end: int, states: Sequence[Any]) -> int:
        """The position at which this forward begins, if the last one ended at `end` and left `states`.

        A key-value cache knows its length. A recurrent state does not: for it, the position depends on
        whether it was already in use.
        """
        assert self.shape
        for state in self.states:
            length = _length(state)
            if length is None and _continues(state, states):
                length = end
            if length is not None:
                return length
        if not self.states and isinstance(self.mask, Tensor) and self.mask.ndim == 2:
            return max(0, self.mask.shape[1] - self.shape[1])
        return 0

    def unpadded(self, start: int) -> Tensor:
        """Bool (B, C): positions that the attention mask does not hide."""
        assert self.shape
        mask = _one_mask(self.mask)
        if mask is None:
            return torch.ones(self.shape, dtype=torch.bool, device=self.device)
        if not isinstance(mask, Tensor) or mask.ndim not in (2, 3, 4):
            raise ModelError(
                f"padding cannot be read from an attention mask of type {type(mask).__name__}; call the model with a "
                "mask tensor (sequences, positions), or without a mask"
            )
        C = self.shape[1]
        if mask.ndim == 2:  # it also covers the positions in the cache, which come first
            return mask[:, -C:].to(self.device, torch.bool).expand(self.shape).clone()

        # Rows are queries, columns are keys: a token that may not attend to itself is padding.
        allowed = mask if mask.dtype == torch.bool else mask > -1.0
        allowed = allowed.flatten(1, -3)[:, 0] if mask.ndim == 4 else allowed
        first = min(start, allowed.shape[2] - C)
        itself = allowed[:, :, first:].diagonal(dim1=1, dim2=2)[:, :C]
        return itself.to(self.device).expand(self.shape).clone()


def inputs_of(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Inputs:
    """Read the inputs from the arguments of a module's call."""
    bound = signature(module.forward).bind_partial(*args, **kwargs)
    arguments = dict(bound.arguments)
    for name, parameter in signature(module.forward).parameters.items():
        if parameter.kind == Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})

    ids = arguments.get("input_ids")
    first = arguments.get("inputs_embeds") if ids is None else ids
    shape = None
    device = torch.device("cpu")
    if isinstance(first, Tensor):
        shape = (first.shape[0], first.shape[1])
        device = first.device
    states = []
    for name, value in arguments.items():
        if any(part in name for part in _STATE_NAMES) and _is_state(value):
            states.append(value)
    return Inputs(shape, device, ids, arguments.get("attention_mask"), states)


def states_in(output: Any) -> list[Any]:
    """The parts of a forward's output that may be given to the next forward as state."""
    values = output.values() if isinstance(output, Mapping) else output
    if not isinstance(output, Mapping | tuple | list):
        return []
    return [value for value in values if _is_state(value)]


def _is_state(value: Any) -> bool:
    return value is not None and not isinstance(value, Tensor | bool | int | float | str)


def _length(state: Any) -> int | None:
    """Number of positions that a cache holds; None for a state that does not know."""
    if not hasattr(state, "get_seq_length"):
        return None
    try:
        return int(state.get_seq_length())
    except ValueError:  # a cache with recurrent layers only
        return None


def _continues(state: Any, states: Sequence[Any]) -> bool:
    """Whether a recurrent state was already in use in the last forward."""
    if hasattr(state, "has_previous_state"):
        return bool(state.has_previous_state())
    return any(state is other for other in states)


def _one_mask(mask: Any) -> Any:
    """A mask; of several by kind of layer, the one that hides least."""
    if not isinstance(mask, Mapping):
        return mask
    given = [mask.get("full_attention"), *mask.values()]
    return next((one for one in given if one is not None), None)
