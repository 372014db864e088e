"""The language model: read activations at many sites, or replace some of them.

Shapes: B sequences, C positions, D width of the activations at a site, V vocabulary.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from saerelay.errors import ModelError, PlanError, TeamError
from saerelay.lm.facts import look_at
from saerelay.lm.head import Head
from saerelay.lm.ports import Port, intercept, place_in, plain_skeleton
from saerelay.lm.probe import Anatomy, probe, probe_skeleton
from saerelay.lm.readout import linear_readout
from saerelay.lm.source import loading, pinned, quantisation
from saerelay.lm.tokens import checked_ids
from saerelay.lm.weights import load_weights
from saerelay.planning.facts import ModelFacts
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import ModelSpec
from saerelay.site import Site
from saerelay.team import stopping_together

_RESIDUAL_STREAM = ("resid_pre", "resid_post")
"""Kinds of sites between two layers; all other kinds lie inside a layer."""


class _Stop(Exception):
    """Ends a forward after the deepest wanted site."""


@dataclass(frozen=True, eq=False)
class Forward:
    """The results of a whole forward of a language model; see `LanguageModel.forward`."""

    tokens: Tensor
    """(B, C)."""
    states: Tensor
    """Last hidden states (B, C, D), as from `Head.states`."""
    activations: dict[Site, Tensor]
    """(B, C, D) at each requested site."""
    layer_extras: list[tuple | None]
    """The values that each layer returned after the residual stream; None for a layer that returns only the stream, or
    does not run."""


@final
class LanguageModel:
    """A frozen language model whose activations are read, and replaced, at sites.

    >>> model = LanguageModel.load(ModelSpec(device="cpu"))
    >>> activations = model.harvest(torch.tensor([[0, 5, 7]]), [Site(2), Site(5, "mlp_out")])
    >>> {str(site): tuple(x.shape) for site, x in activations.items()}
    {'L2': (1, 3, 192), 'L5.mlp_out': (1, 3, 192)}
    """

    def __init__(self, model: Any, facts: ModelFacts, *, split_anatomy: Anatomy | None = None) -> None:
        """`split_anatomy`: the probe's result for the whole model, if this rank holds only a part of it."""
        self.facts = facts
        self.device = torch.device(facts.device)
        self._model = model.eval().requires_grad_(False)
        if quantisation(self._model.config):
            # Quantised weights stay where they were loaded, and products with them may not be differentiable.
            self._anatomy = probe_skeleton(plain_skeleton(self._model), facts.name)
        else:
            self._model = self._model.to(self.device)
            self._anatomy = split_anatomy or probe(self._model, facts.name)
        self._layers: Any = self._model.get_submodule(self._anatomy.layers)
        self._can_skip = dict[int, bool]()
        """Whether a forward can start after the first n layers, for every n tried so far."""
        self.is_split = split_anatomy is not None
        """Whether several ranks hold the model together: they then run the same forwards in the same order."""

    @classmethod
    def load(cls, model: ModelSpec | str | Path, *, split: bool = False) -> "LanguageModel":
        """Load a model's weights, which must be safetensors, onto the device.

        >>> LanguageModel.load("demo").facts.n_layers
        8

        `model` is a hub id, a directory, or a recipe's whole specification of a model.

        With `split`, each group of `model.tensor_parallel` ranks holds the model together: all ranks call
        this at the same time, and from then on the ranks of a group run the same forwards.

        Raises what `read_facts` raises, and ModelError if weights are missing, damaged or of
        another shape.
        """
        spec = model if isinstance(model, ModelSpec) else ModelSpec(name=str(model))
        facts, anatomy = look_at(spec)
        with loading(spec):
            weights = load_weights(spec, facts, split=split)
            return cls(weights, facts, split_anatomy=anatomy if split else None)

    @property
    def hf_model(self) -> Any:
        """The transformers model itself, for `generate` and everything else it can do."""
        return self._model

    def check_site(self, site: Site) -> None:
        """Raise PlanError if the model lacks the layer, ModelError if it lacks the module."""
        self._port(site)

    def _port(self, site: Site) -> Port:
        if not isinstance(site, Site):
            raise PlanError(f"{site!r} is not a site; write Site({site!r}) for the residual stream after a layer")
        place = place_in(self._anatomy, site, self.facts.name)
        return Port(self._model.get_submodule(place.path), place.side)

    # --- reading activations ---

    @torch.inference_mode()
    def visit(self, tokens: Tensor | np.ndarray, visitors: Mapping[Site, Callable[[Tensor], object]]) -> None:
        """Show each visitor the activations (B, C, D) at its site, in one forward over tokens (B, C).

        The forward ends at the deepest site: nothing after it runs. Every position attends as in
        a sequence without padding. A visitor sees the model's own tensor, in inference mode: it must
        copy the values it needs, and neither keep nor change the tensor. Raises what `check_site`
        raises, and DataError for tokens that are not token ids of this model.
        """
        if not visitors:
            return
        tokens = checked_ids(tokens, self.facts)
        waiting = set(visitors)

        def show(site: Site, x: Tensor) -> Tensor:
            visitors[site](x)
            waiting.discard(site)
            if not waiting:
                raise _Stop
            return x

        with suppress(_Stop), ExitStack() as stack:
            for site in visitors:
                stack.enter_context(self.splice(site, partial(show, site)))
            stack.enter_context(self._with_other_ranks())
            self._model.base_model(input_ids=tokens.to(self.device), use_cache=False)
        assert not waiting, f"asked for {list(visitors)}, the forward did not pass {waiting}"

    def harvest(self, tokens: Tensor | np.ndarray, sites: Iterable[Site]) -> dict[Site, Tensor]:
        """Read the activations (B, C, D) at all sites from one forward over tokens (B, C), a tensor or array.

        The forward stops at the deepest site. The tensors belong to the caller: they are plain copies,
        usable with autograd, in the model's dtype and on its device. `visit` does the same without copies.
        Raises what `check_site` raises.
        """
        copies: dict[Site, Tensor] = {}

        def copy(site: Site, x: Tensor) -> None:
            with torch.inference_mode(False):
                copies[site] = x.clone()

        distinct = list(dict.fromkeys(sites))
        self.visit(tokens, {site: partial(copy, site) for site in distinct})
        return {site: copies[site] for site in distinct}

    # --- forwards with changes ---

    @contextmanager
    def splice(self, site: Site, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Replace activations x (B, C, D) at a site by function(x) in every forward.

        >>> model, tokens = LanguageModel.load(ModelSpec(device="cpu")), torch.tensor([[0, 5, 7]])
        >>> with model.splice(Site(3), torch.zeros_like):
        ...     broken = model.logits(tokens)
        >>> bool((broken == model.logits(tokens)).all())
        False

        The function must keep the shape; its result is cast to the model's dtype. Raises what
        `check_site` raises.
        """
        with intercept(self._port(site), site, function):
            yield

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Predict the next token at every position: float32 (B, C, V) for tokens (B, C).

        Raises ModelError if the model has no language-model head.
        """
        self._check_lm_head()
        with self._with_other_ranks():
            return self._model(input_ids=tokens.to(self.device), use_cache=False).logits.float()

    @cached_property
    def head(self) -> Head:
        """The head, which turns last hidden states into logits; ModelError if the model has no language-model head."""
        self._check_lm_head()
        with self._with_other_ranks():
            return Head(self._model, whole=self.is_split)

    def _states(self, tokens: Tensor) -> Tensor:
        with self._with_other_ranks():
            return self.head.states(tokens)

    def _with_other_ranks(self) -> AbstractContextManager[None]:
        """Context of a forward: if another rank of the group is gone, the error is one line."""
        return stopping_together() if self.is_split else nullcontext()

    def _check_lm_head(self) -> None:
        if not self.facts.has_lm_head:
            raise ModelError(
                f'"{self.facts.name}" ({self.facts.family}) has no language-model head, so it '
                "gives no logits. Use a causal LM (one whose config.json says ...ForCausalLM "
                "under `architectures`), or leave out the metrics that need logits (evaluate.ce = "
                "false)."
            )

    @torch.no_grad()
    def forward(self, tokens: Tensor, sites: Iterable[Site]) -> Forward:
        """Run all layers over tokens (B, C), and keep what is needed to continue from the middle (`resuming`).

        >>> model, tokens = LanguageModel.load(ModelSpec(device="cpu")), torch.tensor([[0, 5, 7]])
        >>> clean = model.forward(tokens, [Site(3)])
        >>> with model.resuming(clean, Site(3)) as states_with:
        ...     changed = states_with(2 * clean.activations[Site(3)])
        >>> changed.shape == clean.states.shape, bool((changed == clean.states).all())
        (True, False)
        >>> logits = model.head.logits(changed, torch.tensor([5, 7]))  # of two tokens
        >>> logits.shape
        torch.Size([1, 3, 2])

        Raises what `check_site` raises, and ModelError without a language-model head.
        """
        _ = self.head  # made before there are hooks, since making it runs the model
        tokens = tokens.to(self.device)
        # For a site inside a layer, `resuming` starts with the stream before that layer.
        wanted: dict[Site, None] = {}
        for site in sites:
            wanted[site] = None
            wanted[_stream_at(site)] = None

        activations: dict[Site, Tensor] = {}
        extras: dict[int, tuple] = {}

        def keep(site: Site, x: Tensor) -> Tensor:
            activations[site] = x.clone()
            return x

        def keep_extras(i: int, _: nn.Module, args: tuple, output: Any) -> None:
            if isinstance(output, tuple | list):
                extras[i] = tuple(output[1:])

        with ExitStack() as stack:
            for site in wanted:
                stack.enter_context(self.splice(site, partial(keep, site)))
            for i, layer in enumerate(self._layers):
                hook = layer.register_forward_hook(partial(keep_extras, i))
                stack.callback(hook.remove)
            states = self._states(tokens)

        layer_extras = [extras.get(i) for i in range(len(self._layers))]
        return Forward(tokens, states, activations, layer_extras)

    @contextmanager
    def resuming(self, clean: Forward, site: Site) -> Iterator[Callable[[Tensor], Tensor]]:
        """Give a function from other activations x (B, C, D) at a site to the last hidden states, for `head.logits`.

        Gradients flow to an x that requires them. Layers before the site do not run. Some models pass
        more than the residual stream from layer to layer, so that starting in the middle does not
        reproduce their own last states (this is tried once per layer): for those, all layers run.
        Threads may call the function at the same time; apart from that, the model must not be used
        inside the `with` block.
        """
        # How to see this: the first n layers are replaced by a function that returns the residual
        # stream after them. At a site between two layers, that stream is x itself. Inside a layer,
        # it is the clean stream before that layer, which then runs with x spliced in.
        n_skipped = site.layer
        if site.module == "resid_post":
            n_skipped += 1
        if n_skipped not in self._can_skip:
            self._can_skip[n_skipped] = self._reproduces_states(clean, n_skipped, site)
        can_skip = self._can_skip[n_skipped]
        is_between_layers = site.module in _RESIDUAL_STREAM

        given = threading.local()  # every thread has its own x

        def states(x: Tensor) -> Tensor:
            with torch.set_grad_enabled(x.requires_grad):
                # Copied, because some models add to the stream in place.
                given.x = x.to(clean.activations[site].dtype, copy=True)
                return self._states(clean.tokens)

        def stream() -> Tensor:
            if is_between_layers:
                return given.x
            return clean.activations[_stream_at(site)].clone()

        with ExitStack() as stack:
            if can_skip:
                stack.enter_context(self._skipping(clean, n_skipped, stream))
            is_returned_by_a_layer = can_skip and is_between_layers and n_skipped > 0
            if not is_returned_by_a_layer:
                stack.enter_context(self.splice(site, lambda _: given.x))
            yield states

    @torch.no_grad()
    def _reproduces_states(self, clean: Forward, n_skipped: int, site: Site) -> bool:
        """Whether the model reproduces its own last states, to the bit, if it starts after the first layers.

        This is tried on the first sequence. If the model does not give the same bits twice anyway (because of some
        operations on a GPU), whether it comes as close as a second run does.
        """
        few = clean if len(clean.tokens) == 1 else self.forward(clean.tokens[:1], [site])
        stream = few.activations[_stream_at(site)]
        try:
            with self._skipping(few, n_skipped, stream.clone):
                states = self._states(few.tokens)
        except TeamError:
            raise
        except Exception:  # without the extras of earlier layers, a model may fail in any way
            return False
        if torch.equal(states, few.states):
            return True
        again = self._states(few.tokens)
        return _largest_difference(states, few.states) <= 2 * _largest_difference(again, few.states)

    @contextmanager
    def _skipping(self, clean: Forward, n: int, stream: Callable[[], Tensor]) -> Iterator[None]:
        """Let the first n layers return stream() (B, C, D) and their clean extras."""

        def skip(extras: tuple | None, *_: Any, **__: Any) -> Any:
            if extras is None:
                return stream()
            return (stream(), *extras)

        skipped = self._layers[:n]
        try:
            for layer, extras in zip(skipped, clean.layer_extras, strict=False):
                layer.forward = partial(skip, extras)
            yield
        finally:
            for layer in skipped:
                layer.__dict__.pop("forward", None)  # uncovers the class's own method

    # --- weights ---

    @torch.no_grad()
    def unembedding(self) -> Tensor:
        """The matrix that maps a direction of the last residual stream to its effect on each logit: float32 (V, D).

        If the final norm removes the mean (LayerNorm), so does this matrix. The norm's division by the size
        of the stream is left out, so values can be compared within a row, but not across models. Raises ModelError
        without a language-model head, and if logits are not a linear function of the normed residual
        stream.
        """
        self._check_lm_head()
        return linear_readout(self._model, self._model.get_submodule(self._anatomy.last_layer), self.facts.name)


def _largest_difference(states: Tensor, others: Tensor) -> float:
    return float((states.float() - others.float()).abs().max())


def _stream_at(site: Site) -> Site:
    """The residual stream at a site; for a site inside a layer, before that layer."""
    if site.module in _RESIDUAL_STREAM:
        return site
    return Site(site.layer, "resid_pre")


def load_model(plan: Plan, *, split: bool = False) -> LanguageModel:
    """Load the model that a plan was made for, and check that it has every module that the plan reads.

    `split` as in `LanguageModel.load`. Raises what `LanguageModel.load` and `LanguageModel.check_site` raise.
    """
    exact = pinned(plan.recipe.model, plan.facts)
    model = LanguageModel.load(exact.changed(dtype=plan.facts.dtype), split=split)
    for leg in plan.legs:
        model.check_site(leg.site)
        model.check_site(leg.site_out)
        for site in leg.shared_sites:
            model.check_site(site)
        if leg.parent:
            source = plan.parent_site(leg)
            model.check_site(source)
            model.check_site(leg.out_at(source))
    return model
