"""How a language model's logits follow from its last residual stream: found by a trial, then checked.

In shapes: B sequences, C positions, D width of the residual stream, V vocabulary, N = B·C.
"""

from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from typing import Any

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
    """The matrix that maps a direction of the last residual stream to its effect on each logit: float32 (V,D).

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
    stream, norms, reading, scores, logits = _tail(model, last_layer, head)
    if reading is None or scores is None or reading.shape != stream.shape:
        raise _not_linear(name, "its unembedding does not read a vector of the residual stream's width")
    if not _same_order(scores, logits):
        raise _not_linear(name, "something between its unembedding and the logits changes their order")

    W_U = weight.float()
    if _is_multiple(reading, stream):
        return W_U
    for norm, output in norms:
        if _is_multiple(reading, output):
            return _through_norm(W_U, deepcopy(norm).float(), stream.float().flatten(0, 1), name)
    raise _not_linear(name, "its unembedding does not read the norm of the last layer's output")


def _tail(
    model: Any, last_layer: nn.Module, head: nn.Module
) -> tuple[Tensor, list[tuple[nn.Module, Tensor]], Tensor | None, Tensor | None, Tensor]:
    """Record the end of a forward over a few tokens.

    Returns the last layer's output (B,C,D); the modules that read it and return a tensor of its shape,
    each with its output; the input and the output of the unembedding; and the logits.
    """
    streams: list[Tensor] = []
    readers: list[tuple[nn.Module, Tensor]] = []
    at_head: list[tuple[Tensor, Tensor]] = []

    def leaves_layers(_: nn.Module, __: tuple, output: Any) -> None:
        stream = made_stream(output)
        assert stream is not None
        streams.append(stream.clone())

    def passes(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        key = read_stream(args, kwargs)
        made = made_stream(output)
        if not streams or key is None or made is None:
            return
        x = args[key] if isinstance(key, int) else kwargs[key]
        if module is head:
            at_head.append((x.clone(), made.clone()))
        elif x.shape == made.shape == streams[-1].shape and torch.equal(x, streams[-1]):
            readers.append((module, made.clone()))

    with ExitStack() as stack:
        stack.callback(last_layer.register_forward_hook(leaves_layers).remove)
        for module in model.modules():
            stack.callback(module.register_forward_hook(partial(passes), with_kwargs=True).remove)
        logits = model(input_ids=trial_tokens(model), use_cache=False).logits
    reading, scores = at_head[-1] if len(at_head) == 1 else (None, None)
    return streams[-1], readers, reading, scores, logits


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
    """An unembedding (V,D) with the norm before it folded in, checked by finite differences around rows x (N,D).

    The gain is measured, since some norms store its distance from 1. A vector of signs has mean 0 and
    size 1 (or is made so, if the width is odd), so a norm only multiplies it by the gain and adds the
    bias; half of norm(s) − norm(−s) is free of the bias. Adding a mean to the input shows whether the
    norm removes the mean.
    """
    signs = torch.ones(x.shape[1]).to(x)
    signs[1::2] = -1
    signs -= signs.mean()
    signs /= signs.square().mean().sqrt()
    gain = (norm(signs[None]) - norm(-signs[None])) / (2 * signs)
    centres = torch.allclose(norm(signs[None] + 1), norm(signs[None]), rtol=1e-3, atol=1e-3 * float(gain.abs().max()))
    readout = W_U * gain
    if centres:
        readout = readout - readout.mean(dim=1, keepdim=True)

    # A step orthogonal to x and to the mean changes nothing that a norm divides by.
    centred = x - x.mean(dim=1, keepdim=True)
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    step -= step.mean(dim=1, keepdim=True)
    step -= (step * centred).sum(dim=1, keepdim=True) / centred.square().sum(dim=1, keepdim=True) * centred
    step *= 0.01 * x.norm(dim=1, keepdim=True) / step.norm(dim=1, keepdim=True)
    moved = (norm(x + step) - norm(x - step)) @ W_U.T
    if _correlation(moved, step @ readout.T) < _LEAST_CORRELATION:
        raise _not_linear(name, "the norm before its unembedding does more than scale each direction")
    return readout


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
