"""The head of a language model: logits from its last hidden states, for part of the vocabulary if that is enough.

The head of a model with a large vocabulary costs more than all of its layers, and its logits take more memory than
anything else. A caller who needs the logits of two tokens at one position, or a sum over all tokens, need not hold all
logits at once.

Shapes: B sequences, C positions, D width of the residual stream, V vocabulary.
"""

import threading
from copy import copy
from typing import Any, final

import torch
from torch import Tensor, nn

from saerelay.lm.trial import trial_tokens

_ROUNDINGS = 2
"""Roundings by which logits of part of the vocabulary may differ from the full ones: another kernel may sum them."""


@final
class Head:
    """The head of a transformers model.

    How to see this: a *shadow* of the model shares all its modules, except that its base model returns hidden states
    that it is given, and its unembedding has only the rows of some tokens. Anything else between hidden states and
    logits (scaling, capping) happens in the shadow too, since it runs the model's own code. A trial on a few tokens
    checks that the shadow's logits equal the model's. If they do not, `in_parts` is false, and the model's logits take
    the place of its hidden states.
    """

    def __init__(self, model: Any, *, whole: bool = False) -> None:
        """`whole`: do not try to take the head apart, because this process holds only part of it."""
        self._model = model
        self._now = threading.local()  # every thread has its own states and tokens
        with torch.no_grad():
            tokens = trial_tokens(model)
            output = model.base_model(input_ids=tokens, use_cache=False)
            logits = model(input_ids=tokens, use_cache=False).logits
            self.n_tokens: int = logits.shape[-1]
            """V: the number of tokens that have a logit."""
            self._shadow = None if whole else _shadow_of(model, type(output), self._now)
            if self._shadow is not None and not self._gives(output[0], logits):
                self._shadow = None

    @property
    def in_parts(self) -> bool:
        """Whether the logits of part of the vocabulary can be computed without the others."""
        return self._shadow is not None

    def states(self, tokens: Tensor) -> Tensor:
        """The model's input to its head (B, C, D), for tokens (B, C).

        If the head is not `in_parts`, the logits (B, C, V) instead.
        """
        if self.in_parts:
            return self._model.base_model(input_ids=tokens, use_cache=False)[0]
        return self._model(input_ids=tokens, use_cache=False).logits

    def logits(self, states: Tensor, tokens: slice | Tensor) -> Tensor:
        """The logits (B, C, n) of n tokens, in the model's dtype, from `states` (B, C, D).

        Several threads may call this at the same time.
        """
        if self._shadow is None:
            return states[..., tokens]
        self._now.states = states
        self._now.tokens = tokens
        anything = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        try:
            return self._shadow(input_ids=anything, use_cache=False).logits
        finally:
            self._now.states = None

    def _gives(self, states: Tensor, logits: Tensor) -> bool:
        """Whether the shadow reproduces the model's logits, for half of the vocabulary and for every third token."""
        thirds = torch.arange(0, self.n_tokens, 3, device=logits.device)
        try:
            for part in (slice(0, self.n_tokens // 2), thirds):
                if not _same(self.logits(states, part), logits[..., part]):
                    return False
        except Exception:  # without the full output of its base model, a model may fail in any way
            return False
        return True


class _Given(nn.Module):
    """Stands in for a base model: returns the hidden states that its thread has set."""

    def __init__(self, output: type, now: threading.local) -> None:
        super().__init__()
        self._output = output
        self._now = now

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._output(last_hidden_state=self._now.states)


class _Rows(nn.Module):
    """Stands in for an unembedding: uses only the rows of the tokens that its thread has set."""

    def __init__(self, weight: Tensor, bias: Tensor | None, now: threading.local) -> None:
        super().__init__()
        self._whole = (weight, bias)  # in a tuple, so that they are not parameters of this module
        self._now = now

    def forward(self, states: Tensor) -> Tensor:
        weight, bias = self._whole
        if bias is not None:
            bias = bias[self._now.tokens]
        return nn.functional.linear(states, weight[self._now.tokens], bias)


def _shadow_of(model: Any, output: type, now: threading.local) -> Any:
    """A copy of a model that shares all modules but its base model and its unembedding; None if it lacks either.

    `output` is the type that the base model returns.
    """
    base = model.base_model
    unembedding = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_children()}
    if type(unembedding) is not nn.Linear or not {id(base), id(unembedding)} <= names.keys():
        return None
    shadow = copy(model)
    shadow._modules = dict(model._modules)
    shadow._modules[names[id(base)]] = _Given(output, now)
    shadow._modules[names[id(unembedding)]] = _Rows(unembedding.weight, unembedding.bias, now)
    return shadow


def _same(logits: Tensor, others: Tensor) -> bool:
    """Whether logits are the same except for rounding."""
    if logits.shape != others.shape:
        return False
    rounding = torch.finfo(others.dtype).eps * others.float().abs().max()
    difference = (logits.float() - others.float()).abs().max()
    return bool(difference <= _ROUNDINGS * rounding)
