"""How a language model's logits follow from its last residual stream: found by a trial, then checked.

Shapes: B sequences, C positions, D width of the residual stream, V vocabulary, N = B·C.
"""

from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saerelay.errors import ModelError
from saerelay.lm.trial import made_stream, read_stream, trial_tokens

_CLOSE = 0.02
"""Relative difference below which two tensors computed in bfloat16 are taken to be the same."""

_LEAST_CORRELATION = 0.99
"""Least correlation between the measured changes of logits and those that the unembedding predicts."""


@torch.no_grad()
def linear_readout(model: Any, last_layer: nn.Module, name: str) -> Tensor:
    """The matrix that maps a direction of the last residual stream to its effect on each logit: float32 (V, D).

    Raises ModelError if logits are not a linear function of the normed residual stream, for example
    because a head has layers of its own in between.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is not None and hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()  # this rank holds a part of it
    if weight is None or weight.ndim != 2:
        raise _not_linear(name, "it has no unembedding matrix")
    if not weight.is_floating_point() or weight.element_size() == 1:
        raise _not_linear(name, "its unembedding is quantised")
    end = _end_of_forward(model, last_layer, head)
    if len(end.unembedded) != 1 or end.unembedded[0].read.shape != end.stream.shape:
        raise _not_linear(name, "its unembedding does not read a vector of the residual stream's width")
    unembedded = end.unembedded[0]
    if not _same_order(unembedded.made, end.logits):
        raise _not_linear(name, "something between its unembedding and the logits changes their order")

    W_U = weight.float()
    if _is_multiple(unembedded.read, end.stream):
        return W_U  # there is no norm in between
    for reader in end.readers:
        if _is_multiple(unembedded.read, reader.made):
            norm = deepcopy(reader.module).float()
            rows = end.stream.float().flatten(0, 1)
            return _through_norm(W_U, norm, rows, name)
    raise _not_linear(name, "its unembedding does not read the norm of the last layer's output")


class _Passed(NamedTuple):
    """A call of a module."""

    module: nn.Module
    read: Tensor
    made: Tensor


@dataclass(frozen=True, eq=False)
class _EndOfForward:
    """What a forward does between its last layer and its logits."""

    stream: Tensor
    """The last layer's output (B, C, D)."""
    readers: list[_Passed]
    """The modules that read exactly this output and make a tensor of its shape; the last norm is one of them."""
    unembedded: list[_Passed]
    """The calls of the unembedding."""
    logits: Tensor


def _end_of_forward(model: Any, last_layer: nn.Module, head: nn.Module) -> _EndOfForward:
    """Run a forward over a few tokens, and record its end."""
    streams: list[Tensor] = []
    readers: list[_Passed] = []
    unembedded: list[_Passed] = []

    def after_last_layer(_: nn.Module, __: tuple, output: Any) -> None:
        stream = made_stream(output)
        assert stream is not None
        streams.append(stream.clone())

    def after_any_module(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        argument = read_stream(args, kwargs)
        made = made_stream(output)
        if not streams or argument is None or made is None:
            return  # before the end of the last layer, or a module that handles no activations
        stream = streams[-1]
        read = args[argument] if isinstance(argument, int) else kwargs[argument]
        if module is head:
            unembedded.append(_Passed(module, read.clone(), made.clone()))
        elif read.shape == made.shape == stream.shape and torch.equal(read, stream):
            readers.append(_Passed(module, stream, made.clone()))

    with ExitStack() as hooks:
        hooks.callback(last_layer.register_forward_hook(after_last_layer).remove)
        for module in model.modules():
            hooks.callback(module.register_forward_hook(after_any_module, with_kwargs=True).remove)
        logits = model(input_ids=trial_tokens(model), use_cache=False).logits
    return _EndOfForward(streams[-1], readers, unembedded, logits)


def _is_multiple(x: Tensor, y: Tensor) -> bool:
    """Whether one tensor is a positive multiple of another, as far as bfloat16 can tell."""
    x = x.double()
    y = y.double()
    factor = (x * y).sum() / y.square().sum()
    return bool(factor > 0) and bool((x - factor * y).norm() <= _CLOSE * x.norm())


def _same_order(scores: Tensor, logits: Tensor) -> bool:
    """Whether the logits of most positions are largest where the unembedding's output is."""
    if scores.shape[:2] != logits.shape[:2] or scores.shape[-1] < logits.shape[-1]:
        return False
    best = scores[..., : logits.shape[-1]].argmax(dim=-1)
    reached = logits.gather(-1, best[..., None])[..., 0]
    return bool((reached >= logits.amax(dim=-1) - _CLOSE * logits.std(dim=-1)).all())


def _through_norm(W_U: Tensor, norm: nn.Module, x: Tensor, name: str) -> Tensor:
    """An unembedding (V, D) with the norm before it folded in, checked by finite differences around rows x (N, D)."""
    signs = _signs(x)
    gain = (norm(signs) - norm(-signs)) / (2 * signs)  # half of the difference is free of the norm's bias
    without_mean = norm(signs)
    with_mean = norm(signs + 1)
    removes_mean = torch.allclose(with_mean, without_mean, rtol=1e-3, atol=1e-3 * float(gain.abs().max()))
    readout = W_U * gain
    if removes_mean:
        readout = readout - readout.mean(dim=1, keepdim=True)

    step = _small_steps(x)
    measured = (norm(x + step) - norm(x - step)) @ W_U.T
    predicted = step @ readout.T  # up to the factor by which the norm divides each row
    if _correlation(measured, predicted) < _LEAST_CORRELATION:
        raise _not_linear(name, "the norm before its unembedding does more than scale each direction")
    return readout


def _signs(x: Tensor) -> Tensor:
    """A row (1, D) of alternating signs, with mean 0 and root mean square 1 (also if the width is odd).

    A norm only multiplies it by its gain and adds its bias. So the gain can be measured, which is safer than to read
    it from the norm's weights: some norms store its distance from 1.
    """
    signs = torch.ones(x.shape[1]).to(x)
    signs[1::2] = -1
    signs -= signs.mean()
    signs /= signs.square().mean().sqrt()
    return signs[None]


def _small_steps(x: Tensor) -> Tensor:
    """A small random step (N, D) from each row x (N, D), orthogonal to it and to the mean.

    It changes nothing that a norm divides by.
    """
    centred = x - x.mean(dim=1, keepdim=True)
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    step -= step.mean(dim=1, keepdim=True)
    along_x = (step * centred).sum(dim=1, keepdim=True) / centred.square().sum(dim=1, keepdim=True)
    step -= along_x * centred
    step *= 0.01 * x.norm(dim=1, keepdim=True) / step.norm(dim=1, keepdim=True)
    return step


def _correlation(x: Tensor, y: Tensor) -> float:
    """The mean correlation of two tensors' rows."""
    x = (x - x.mean(dim=1, keepdim=True)).double()
    y = (y - y.mean(dim=1, keepdim=True)).double()
    return float(((x * y).sum(dim=1) / (x.norm(dim=1) * y.norm(dim=1))).mean())


def _not_linear(name: str, reason: str) -> ModelError:
    return ModelError(
        f'the logits of "{name}" are not a linear function of its normed residual stream ({reason}), so the '
        "tokens that a latent promotes cannot be determined."
    )
