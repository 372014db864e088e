"""The language model: its facts, its tokenizer, its activations at many sites from one forward, and splicing.

Whatever depends on how Hugging Face models are built is here, and the map from a site to a module is `_port` alone.
In shapes: B sequences, C positions, D width of the activations at a site, V vocabulary.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from saerelay.errors import ModelError, PlanError
from saerelay.plan import ModelFacts
from saerelay.recipe import ModelSpec
from saerelay.site import MODULE_KINDS, ModuleKind, Site

_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
PROJECTIONS = (  # of attention, onto the residual stream
    *("self_attn.o_proj", "attention.dense", "attn.c_proj"),  # Llama and most others, GPT-NeoX, GPT-2
    *("attention.output.dense", "attention.out_lin", "attn.Wo"),  # BERT, DistilBERT, ModernBERT
    *("self_attn.out_proj", "self_attn.dense", "self_attention.dense"),  # OPT, Phi, Falcon and BLOOM
    *("attn.attention.out_proj", "attn.out_proj"),  # GPT-Neo, GPT-J and MPT
)
MLPS = (
    *("mlp.dense_4h_to_h", "mlp"),  # BLOOM, whose `mlp` adds the residual stream itself; most others
    *("output.dense", "ffn.lin2", "ffn.down_proj"),  # BERT, DistilBERT, MPT
)
_POST_NORMS = (  # pairs of norms between a block and the residual stream; one without the other means something else
    ("post_attention_layernorm", "post_feedforward_layernorm"),  # Gemma 2 and 3, OLMo 2
    ("post_self_attn_layernorm", "post_mlp_layernorm"),  # GLM 4
)
_FINAL_NORMS = ("final_layer_norm", "norm", "ln_f", "final_layernorm", "decoder.final_layer_norm", "final_norm")
"""Before the unembedding: GPT-NeoX, Llama and most others, GPT-2, Phi, OPT, ModernBERT."""
_RESCALING = ("Afmoe", "Beam", "Doge", "GPTNeoXJapanese", "HyperCLOVAX", "Inkling", "MiniMaxDecoder")
"""Beginnings of the class names of layers that scale, norm or shift what a block returns before they add it."""
_NO_TOKENIZER = (
    "has no fast tokenizer. Put a tokenizer.json beside its config.json, "
    "or give token ids (`data.tokens`) instead of text."
)
_BETWEEN_LAYERS = ("resid_pre", "resid_post")
Port = tuple[nn.Module, Literal["input", "output"]]
"""A module, and the side of it at which the activations of a site pass."""


class _Stop(Exception):
    """Ends a forward after the deepest wanted site."""


def read_facts(spec: ModelSpec) -> ModelFacts:
    """Read what a plan must know of a model from its configuration and tokenizer, without loading weights.

    >>> facts = read_facts(ModelSpec())
    >>> facts.family, facts.n_layers, facts.d_model, facts.bos_token_id
    ('gpt_neox', 8, 192, 0)

    Raises ModelError if the model is missing, gated, unreadable or no stack of layers, or the device is absent.
    """
    device = _resolve_device(spec.device)
    with _explained(spec):
        config = _read_config(spec)
        skeleton = _skeleton(spec, config)
    text, layers = config.get_text_config(), _find_layers(skeleton, spec.name)
    bos, eos = _special_tokens(spec, text)
    projection: Any = next((port[0] for layer in layers if (port := _port(layer, "attn_z"))), None)
    return ModelFacts(
        name=spec.name,
        revision=getattr(config, "_commit_hash", None) or spec.revision,
        family=config.model_type,
        dtype=_resolve_dtype(spec.dtype, device),
        device=str(device),
        n_layers=len(layers),
        d_model=text.hidden_size,
        d_attn_z=_n_inputs(projection) if projection else 0,
        vocab_size=text.vocab_size,
        max_context=_max_context(text, skeleton),
        bos_token_id=bos,
        eos_token_id=eos,
        has_lm_head=_is_causal_lm(config),
        layer_params=_count(layers) // len(layers),
        model_params=_count(skeleton),
    )


def module_paths(spec: ModelSpec, sites: Iterable[Site]) -> dict[Site, str]:
    """The dotted name, in the Hugging Face model, of the module whose output is read at each site; no weights.

    >>> module_paths(ModelSpec(), [Site(3), Site(3, "attn_z")])[Site(3)]
    'gpt_neox.layers.3'

    Where its input is read, the name ends in ".input". A site that the model has not is left out; raises what
    `read_facts` raises.
    """
    with _explained(spec):
        skeleton = _skeleton(spec, _read_config(spec))
    names, layers = {module: name for name, module in skeleton.named_modules()}, _find_layers(skeleton, spec.name)
    ports = {site: _port(layers[site.layer], site.module) for site in sites if site.layer < len(layers)}
    return {
        site: names[port[0]] + (".input" if port[1] == "input" else "")
        for site, port in ports.items()
        if port is not None
    }


def load_tokenizer(spec: ModelSpec) -> Any:
    """Load the model's fast tokenizer.

    >>> tokenizer = load_tokenizer(ModelSpec())
    >>> tokenizer.decode(tokenizer.encode("def f(x):"))
    'def f(x):'

    Raises ModelError if the model has none, or only a slow one.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with _explained(spec):
        source, options = _source(spec)
        file = Path(source) / "tokenizer.json"
        if file.is_file() and not file.with_name("tokenizer_config.json").is_file():
            # AutoTokenizer would add its family's default tokens, with ids the model does not have
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
            config = _read_config(spec).get_text_config()
            for role in ("bos", "eos"):
                i = _first_id(getattr(config, f"{role}_token_id"))
                setattr(tokenizer, f"{role}_token", None if i is None else tokenizer.convert_ids_to_tokens(i))
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder) or not tokenizer.is_fast:
        # without files AutoTokenizer makes an empty one
        raise ModelError(f'"{spec.name}" {_NO_TOKENIZER}')
    return tokenizer


def token_text(tokenizer: Any, token: int) -> str:
    """The text that one token stands for, "<7>" where the tokenizer has no token 7.

    >>> tokenizer = load_tokenizer(ModelSpec())
    >>> [token_text(tokenizer, token) for token in (*tokenizer.encode("if x:"), 10**6)]
    ['if', ' x', ':', '<1000000>']
    """
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return f"<{token}>"
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text  # SentencePiece drops the first


def weights_identity(spec: ModelSpec, facts: ModelFacts) -> dict[str, Any]:
    """What tells a model's weights and code from others', as JSON: a hub revision, or the files of a directory.

    >>> sorted(weights_identity(ModelSpec(), read_facts(ModelSpec())))
    ['config', 'files']
    """
    source, options = _source(spec)
    if "local_files_only" not in options:
        return {"name": facts.name, "revision": facts.revision}
    files = [path for path in sorted(Path(source).iterdir()) if path.suffix in (".safetensors", ".py")]
    return {
        "config": hashlib.sha256((Path(source) / "config.json").read_bytes()).hexdigest(),
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }


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
        pinned = spec.model_copy(update={"revision": facts.revision})
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


def port_of(model: Any, site: Site) -> Port:
    """Where the activations of a site pass in a transformers model; raises what `LanguageModel.check_site` raises.

    >>> module, side = port_of(LanguageModel.load(ModelSpec(device="cpu")).hf_model, Site(3, "attn_z"))
    >>> type(module).__name__, side
    ('Linear', 'input')
    """
    name = model.config.name_or_path or type(model).__name__
    return _port_in(_find_layers(model, name), site, name, model.config.model_type)


def shape_of(model: Any) -> tuple[int, int]:
    """Number of layers, and width D of the residual stream, of a transformers model."""
    return len(_find_layers(model, type(model).__name__)), model.config.get_text_config().hidden_size


def width_at(model: Any, site: Site) -> int:
    """Width D of the activations at a site of a transformers model."""
    projection = port_of(model, site)[0]
    return _n_inputs(projection) if site.module == "attn_z" else shape_of(model)[1]


@contextmanager
def intercept(port: Port, site: Site, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace activations (B,C,D) at a port by `function` of them while the `with` block lasts; see `splice`."""
    module, side = port

    def replace(x: Tensor) -> Tensor:
        y = function(x)
        assert y.shape == x.shape, f"{site}: spliced {tuple(y.shape)} into {tuple(x.shape)}"
        return y.to(x.dtype)

    def on_input(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (replace(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": replace(kwargs["hidden_states"])}

    def on_output(_: nn.Module, args: tuple, output: Any) -> Any:
        return (replace(output[0]), *output[1:]) if isinstance(output, tuple | list) else replace(output)

    if side == "input":
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


def _port_in(layers: nn.ModuleList, site: Site, name: str, family: str) -> Port:
    if site.layer >= len(layers):
        raise PlanError(f'{site}: "{name}" has {len(layers)} layers; layers go from 0 to {len(layers) - 1}')
    layer = layers[site.layer]
    port = _port(layer, site.module)
    if port is None:
        working = ", ".join(kind for kind in MODULE_KINDS if _port(layer, kind))
        paths = ", ".join(MLPS if site.module == "mlp_out" else PROJECTIONS)
        raise ModelError(
            f"{site}: no {site.module} is known in layer {site.layer} ({type(layer).__name__}) of {family}. "
            f"Looked for {paths}, in a layer that adds what they return unscaled. These work there: {working}."
        )
    return port


def _port(layer: nn.Module, kind: ModuleKind) -> Port | None:
    """The module of a layer, and its side, at which activations of a kind pass: the only map from sites to modules."""
    if kind == "resid_post":
        return layer, "output"
    if kind == "resid_pre":
        return layer, "input"
    projection = _first(layer, PROJECTIONS)
    if kind == "attn_z":
        return (projection, "input") if projection else None
    if type(layer).__name__.startswith(_RESCALING) or getattr(layer, "residual_multiplier", 1) != 1:  # Granite's
        return None
    block = projection if kind == "attn_out" else _first(layer, MLPS)
    for after_attention, after_mlp in _POST_NORMS:
        if hasattr(layer, after_attention) and hasattr(layer, after_mlp):
            block = getattr(layer, after_attention if kind == "attn_out" else after_mlp)
    return (block, "output") if block else None


def _n_inputs(projection: Any) -> int:
    return getattr(projection, "in_features", None) or projection.weight.shape[0]  # GPT-2's stores its transpose


def _first(layer: nn.Module, paths: Iterable[str]) -> nn.Module | None:
    for path in paths:
        try:
            return attrgetter(path)(layer)
        except AttributeError:
            continue
    return None


def _find_layers(model: Any, name: str) -> nn.ModuleList:
    """The model's layers: the module list as long as the configuration says; of several, the one with most weights."""
    n = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == n]
    if model.config.is_encoder_decoder or not lists:
        raise ModelError(
            f'"{name}" ({model.config.model_type}) is not one stack of layers that all tokens pass. '
            "Use a decoder-only or encoder-only language model."
        )
    return max(lists, key=_count)


def _is_causal_lm(config: Any) -> bool:
    """Whether the weights include an LM head that predicts the next token, as the saved class says, not the family."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    return known and any(name.endswith(_CAUSAL_ENDINGS) for name in config.architectures or ())


def _skeleton(spec: ModelSpec, config: Any) -> Any:
    """The model without weights."""
    with torch.device("meta"):
        return _auto_class(config).from_config(config, trust_remote_code=spec.trust_remote_code)


def _auto_class(config: Any) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    return AutoModelForCausalLM if _is_causal_lm(config) else AutoModel


def _source(spec: ModelSpec) -> tuple[str, dict[str, Any]]:
    """What to pass to `from_pretrained`: a directory, never looking at the hub, or a hub id and its revision."""
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    path = Path(__file__).parent / "demo" if spec.name == "demo" else Path(spec.name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path}: this directory has no config.json, so it holds no Hugging Face model.")
        return str(path), {**options, "local_files_only": True}
    if path.exists() or spec.name.startswith(("/", ".", "~")):
        raise ModelError(
            f"{path}: no such directory. Pass one with a config.json, or a hub id like EleutherAI/pythia-70m."
        )
    return spec.name, {**options, "revision": spec.revision or None}


def _read_config(spec: ModelSpec) -> Any:
    from transformers import AutoConfig

    source, options = _source(spec)
    return AutoConfig.from_pretrained(source, **options)


def _special_tokens(spec: ModelSpec, config: Any) -> tuple[int | None, int | None]:
    """What starts a sequence and what ends a document, by the tokenizer if there is one, else by the configuration."""
    try:
        t = load_tokenizer(spec)
    except ModelError:
        return _first_id(config.bos_token_id), _first_id(config.eos_token_id)
    bos, eos = t.bos_token_id, t.eos_token_id
    return t.cls_token_id if bos is None else bos, t.sep_token_id if eos is None else eos


def _first_id(ids: int | list[int] | None) -> int | None:
    return ids[0] if isinstance(ids, list) else ids


def _max_context(config: Any, model: Any) -> int:
    longest = getattr(config, "max_position_embeddings", None) or 0
    for name, module in model.base_model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            longest -= module.padding_idx + 1  # RoBERTa counts positions from there
    return longest


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _resolve_device(asked: str) -> torch.device:
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if asked == "auto":  # mps only when asked for: nobody has run it there yet
        return torch.device("cuda" if counts["cuda"] else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ModelError(f'no device "{asked}"; use "auto", "cpu", "cuda", "cuda:1" or "mps"') from None
    n = counts.get(device.type, 0)
    if (device.index or 0) >= n:
        raise ModelError(
            f'device "{asked}" is not there: torch {torch.__version__} sees {n} of type {device.type}. '
            'Use device = "auto" or "cpu", or install a torch build and a driver for it.'
        )
    return device


def _resolve_dtype(asked: str, device: torch.device) -> str:
    if asked != "auto":
        return asked
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported") if device.type == "cpu" else ()
        fast = any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return "bfloat16" if fast else "float32"


@contextmanager
def _explained(spec: ModelSpec) -> Iterator[None]:
    """Turn what transformers and the hub raise into a ModelError with the remedy, without load reports and bars."""
    from huggingface_hub.errors import HTTPError, StrictDataclassError  # pyright: ignore  # re-exported: httpx or httpx2
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from safetensors import SafetensorError
    from transformers.utils import logging

    builtin = (OSError, ValueError, KeyError, RuntimeError, ImportError)
    bars, quiet_hub, verbosity = (
        logging.is_progress_bar_enabled(),
        are_progress_bars_disabled(),
        logging.get_verbosity(),
    )
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()  # these are the hub's too, whose downloads should be seen
        if not quiet_hub:
            enable_progress_bars()
    try:
        yield
    except (*builtin, HTTPError, StrictDataclassError, SafetensorError) as error:
        raise ModelError(_explain(spec, error)) from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
            if quiet_hub:
                disable_progress_bars()


def _explain(spec: ModelSpec, error: BaseException) -> str:
    name, text = spec.name, " ".join(str(error).split())
    if said := explain_hub(name, spec.revision, error):
        return said
    if "trust_remote_code" in text:
        return f'"{name}" needs Python code of its own. If you trust its authors, set model.trust_remote_code = true.'
    if "tokenizer" in text:
        return f'"{name}" {_NO_TOKENIZER} ({text})'
    if isinstance(error, OSError) and ".safetensors" in text:
        return (
            f'"{name}" has no weights as safetensors. If it has pickled ones (pytorch_model.bin), convert them once: '
            f'`AutoModelForCausalLM.from_pretrained("{name}").save_pretrained("DIR")`, and pass DIR. ({text})'
        )
    return f'"{name}" cannot be loaded. Check its files, and that transformers knows the family. ({text})'


def explain_hub(name: str, revision: str, error: BaseException) -> str:
    """What the hub's refusal of a repository means, and the remedy; "" if the hub has nothing to do with the error."""
    from huggingface_hub import errors as hub

    text = " ".join(str(error).split())
    offline = (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, hub.HTTPError)  # pyright: ignore  # as above
    remedies = (
        (hub.GatedRepoError, f"is gated: accept the licence at https://huggingface.co/{name} and run `hf auth login`."),
        (hub.RepositoryNotFoundError, "is not on the hub. Check the name; if it is private, run `hf auth login`."),
        (hub.RevisionNotFoundError, f'has no revision "{revision}"; see https://huggingface.co/{name}/tree/main.'),
        (hub.HFValidationError, "is neither a directory nor a possible hub id; write EleutherAI/pythia-70m or ./mine."),
        (offline, f"did not come from the hub. Check the name, the network, or pass a local directory. ({text})"),
    )
    chain, link = [error], error
    while (link := link.__cause__ or link.__context__) and link not in chain:
        chain.append(link)
    return next((f'"{name}" {remedy}' for kind, remedy in remedies if any(isinstance(e, kind) for e in chain)), "")
