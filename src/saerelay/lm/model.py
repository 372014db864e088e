"""The language model: activations at many sites from one forward, and splicing.

In shapes: B sequences, C positions, D width of the activations at a site, V vocabulary.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from saerelay.errors import ModelError
from saerelay.lm.facts import read_facts
from saerelay.lm.ports import Port, _find_layers, _first, _port_in, intercept
from saerelay.lm.source import _auto_class, _explained, _read_config, _source
from saerelay.planning.facts import ModelFacts
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import ModelSpec
from saerelay.site import Site

_FINAL_NORMS = ("final_layer_norm", "norm", "ln_f", "final_layernorm", "decoder.final_layer_norm", "final_norm")
"""Before the unembedding: GPT-NeoX, Llama and most others, GPT-2, Phi, OPT, ModernBERT."""


_BETWEEN_LAYERS = ("resid_pre", "resid_post")


class _Stop(Exception):
    """Ends a forward after the deepest wanted site."""


@dataclass(frozen=True, eq=False)
class Forward:
    """What a whole forward of a language model left behind; see `LanguageModel.forward`."""

    tokens: Tensor
    """(B,C)."""
    logits: Tensor
    """(B,C,V), in the model's dtype."""
    activations: dict[Site, Tensor]
    """(B,C,D) at each site asked for."""
    beside: list[tuple | None]
    """What each layer returned beside the residual stream, if it returns a tuple."""


@final
class LanguageModel:
    """A frozen language model whose activations are read, and replaced, at sites.

    >>> model = LanguageModel.load(ModelSpec(device="cpu"))
    >>> found = model.harvest(torch.tensor([[0, 5, 7]]), [Site(2), Site(5, "mlp_out")])
    >>> {str(site): tuple(x.shape) for site, x in found.items()}
    {'L2': (1, 3, 192), 'L5.mlp_out': (1, 3, 192)}
    """

    def __init__(self, model: Any, facts: ModelFacts) -> None:
        self.facts = facts
        self.device = torch.device(facts.device)
        self._model = model.eval().requires_grad_(False).to(self.device)
        self._layers = _find_layers(model, facts.name)
        self._resumes = dict[int, bool]()  # whether a forward can go on behind the first n layers, where tried

    @classmethod
    def load(cls, spec: ModelSpec) -> "LanguageModel":
        """Load weights (safetensors only) onto the device; what `read_facts` raises, and ModelError for bad weights."""
        facts = read_facts(spec)
        pinned = spec.changed(revision=facts.revision)
        with _explained(spec):
            source, options = _source(pinned)
            config = _read_config(pinned)
            model, report = _auto_class(config).from_pretrained(
                source,
                config=config,
                dtype=getattr(torch, facts.dtype),
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
            missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
            if missing:
                raise ModelError(
                    f'the weights of "{spec.name}" lack {len(missing)} tensors ({missing[0]}), which would be random. '
                    "Download the model again, or save it with save_pretrained from the class it was trained as."
                )
            return cls(model, facts)

    @property
    def hf_model(self) -> Any:
        """The model itself, as transformers knows it: for `generate` and whatever else it can do."""
        return self._model

    def check_site(self, site: Site) -> None:
        """Raise PlanError if the model has no such layer, ModelError if its layers have no such module."""
        self._locate(site)

    @torch.inference_mode()
    def visit(self, tokens: Tensor, visitors: Mapping[Site, Callable[[Tensor], object]]) -> None:
        """Show each visitor the activations (B,C,D) at its site, in one forward over tokens (B,C).

        The forward ends at the deepest site: nothing behind it runs. Every position attends as in a sequence without
        padding. A visitor sees the model's own tensor, in inference mode: it copies what it wants, and neither keeps
        nor changes it. Raises what `check_site` raises.
        """
        waiting = set(visitors)

        def shown_to(site: Site) -> Callable[[Tensor], Tensor]:
            def show(x: Tensor) -> Tensor:
                visitors[site](x)
                waiting.discard(site)
                if not waiting:
                    raise _Stop
                return x

            return show

        if not visitors:
            return
        with suppress(_Stop), ExitStack() as stack:
            for site in visitors:
                stack.enter_context(self.splice(site, shown_to(site)))
            self._model.base_model(input_ids=tokens.to(self.device), use_cache=False)
        assert not waiting, f"asked for {list(visitors)}, the forward did not pass {waiting}"

    def harvest(self, tokens: Tensor, sites: Iterable[Site]) -> dict[Site, Tensor]:
        """Read activations (B,C,D) at all sites from one forward over tokens (B,C), which stops at the deepest site.

        The tensors are the caller's: plain copies that may meet autograd, in the model's dtype, on its device. See
        `visit`, which copies nothing.
        """
        found: dict[Site, Tensor] = {}

        def copy(site: Site, x: Tensor) -> None:
            with torch.inference_mode(False):
                found[site] = x.clone()

        wanted = dict.fromkeys(sites)
        self.visit(tokens, {site: partial(copy, site) for site in wanted})
        return {site: found[site] for site in wanted}

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Predict the next token at every position: float32 (B,C,V) for tokens (B,C); ModelError without an LM head."""
        return self._logits(tokens).float()

    def _logits(self, tokens: Tensor) -> Tensor:
        if not self.facts.has_lm_head:
            raise ModelError(
                f'"{self.facts.name}" ({self.facts.family}) has no language-model head. CE metrics need one: '
                "use a causal LM (`architectures` in its config.json says ...ForCausalLM), or leave CE metrics out."
            )
        return self._model(input_ids=tokens.to(self.device), use_cache=False).logits

    @torch.no_grad()
    def forward(self, tokens: Tensor, sites: Iterable[Site]) -> "Forward":
        """One whole forward over tokens (B,C), from whose middle others can go on (`resuming`).

        >>> model, tokens = LanguageModel.load(ModelSpec(device="cpu")), torch.tensor([[0, 5, 7]])
        >>> clean = model.forward(tokens, [Site(3)])
        >>> with model.resuming(clean, Site(3)) as logits_with:
        ...     changed = logits_with(2 * clean.activations[Site(3)])
        >>> changed.shape == clean.logits.shape, bool((changed == clean.logits).all())
        (True, False)

        Raises what `check_site` raises, and ModelError without an LM head.
        """
        wanted = dict.fromkeys(sites)
        residual = {site: Site(site.layer, "resid_pre") for site in wanted if site.module not in _BETWEEN_LAYERS}
        found, outputs = dict[Site, Tensor](), dict[int, Any]()

        def keep(site: Site, x: Tensor) -> Tensor:
            found[site] = x.clone()
            return x

        with ExitStack() as stack:
            for site in {**wanted, **dict.fromkeys(residual.values())}:
                stack.enter_context(self.splice(site, partial(keep, site)))
            for i, layer in enumerate(self._layers):
                hook = layer.register_forward_hook(lambda _, __, output, i=i: outputs.update({i: output}))
                stack.callback(hook.remove)
            logits = self._logits(tokens)
        beside = [tuple(outputs[i][1:]) if isinstance(outputs[i], tuple | list) else None for i in sorted(outputs)]
        return Forward(tokens, logits, found, beside)

    @contextmanager
    def resuming(self, clean: "Forward", site: Site) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function that gives the logits (B,C,V) of an earlier forward with other activations x (B,C,D) at a site.

        Gradients flow to an x that asks for them. Layers before the site do not run. Where a model passes its layers
        more than the residual stream, so that starting in the middle does not give back its own logits (tried once a
        layer), all of it runs. Threads may call the function side by side; elsewhere the model must not be used inside
        the `with` block.
        """
        n = site.layer + (site.module == "resid_post")
        if n not in self._resumes:
            self._resumes[n] = self._resumes_after(clean, n, site)
        between, given = site.module in _BETWEEN_LAYERS, threading.local()

        def logits(x: Tensor) -> Tensor:
            with torch.set_grad_enabled(x.requires_grad):
                given.x = x.to(clean.activations[site].dtype, copy=True)  # some models add to it in place
                return self._logits(clean.tokens)

        with ExitStack() as stack:
            if self._resumes[n]:
                before = None if between else clean.activations[Site(site.layer, "resid_pre")]
                stack.enter_context(self._skipping(clean, n, lambda: given.x if before is None else before.clone()))
            if not (n and between and self._resumes[n]):
                stack.enter_context(self.splice(site, lambda _: given.x))
            yield logits

    @torch.no_grad()
    def _resumes_after(self, clean: "Forward", n: int, site: Site) -> bool:
        """Whether the model's own activations behind the first n layers give its own logits."""
        own = clean.activations[site if site.module in _BETWEEN_LAYERS else Site(site.layer, "resid_pre")]
        try:
            with self._skipping(clean, n, own.clone):
                again = self._logits(clean.tokens)
        except Exception:  # whatever a model says that misses something from the layers before
            return False
        return torch.allclose(again, clean.logits, rtol=1e-2, atol=1e-2 * float(clean.logits.abs().max()))

    @contextmanager
    def _skipping(self, clean: "Forward", n: int, x: Callable[[], Tensor]) -> Iterator[None]:
        """Let the first n layers return x() (B,C,D) without running."""

        def instead(beside: tuple | None) -> Callable[..., Any]:
            return lambda *_, **__: x() if beside is None else (x(), *beside)

        skipped = list(zip(self._layers[:n], clean.beside, strict=False))
        try:
            for layer, beside in skipped:
                layer.forward = instead(beside)
            yield
        finally:
            for layer, _ in skipped:
                layer.__dict__.pop("forward", None)

    @torch.no_grad()
    def unembedding(self) -> Tensor:
        """What a direction of the last residual stream adds to each logit: float32 (V,D), with the final norm's gain.

        Of a final LayerNorm the mean is taken out too; the norm's division by the size of the stream is left out, so
        values compare within a row, not across models. Raises ModelError without an LM head.
        """
        if not self.facts.has_lm_head:
            raise ModelError(f'"{self.facts.name}" ({self.facts.family}) has no language-model head, hence no logits')
        W_U = self._model.get_output_embeddings().weight.float()
        norm = _first(self._model.base_model, _FINAL_NORMS)
        if norm is None:
            return W_U
        norm = deepcopy(norm).float()
        signs = torch.ones(W_U.shape[1]).to(W_U)  # of mean 0 and size 1, so that a norm only multiplies by its gain,
        signs[1::2] = -1  # which some keep as its distance from 1
        W_U = W_U * ((norm(signs[None]) - norm(-signs[None])) / (2 * signs))
        return W_U - W_U.mean(dim=1, keepdim=True) if isinstance(norm, nn.LayerNorm) else W_U

    @contextmanager
    def splice(self, site: Site, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Replace activations (B,C,D) at a site by `function` of them, in every forward inside the `with` block.

        >>> model, tokens = LanguageModel.load(ModelSpec(device="cpu")), torch.tensor([[0, 5, 7]])
        >>> with model.splice(Site(3), torch.zeros_like):
        ...     broken = model.logits(tokens)
        >>> bool((broken == model.logits(tokens)).all())
        False

        The function keeps the shape; its result is cast to the model's dtype. Raises what `check_site` raises.
        """
        with intercept(self._locate(site), site, function):
            yield

    def _locate(self, site: Site) -> Port:
        return _port_in(self._layers, site, self.facts.name, self.facts.family)


def load_model(plan: Plan) -> LanguageModel:
    """The model a plan was made for: same revision, same dtype, with every module the plan reads."""
    facts = plan.facts
    model = LanguageModel.load(plan.recipe.model.changed(revision=facts.revision, dtype=facts.dtype))
    for leg in plan.legs:
        model.check_site(leg.site)
        if leg.parent:
            model.check_site(plan.parent_site(leg))
    return model
