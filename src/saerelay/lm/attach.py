"""SAEs at work in a language model: read its latents, or change them, while it runs.

    with suite.attach(model) as attached:        # or attach(model, {Site(3): sae}), without a run
        attached[3].ablate(123)
        model.generate(**inputs)
    z = attached[3].latents()

Shapes: B sequences, C positions, D width of the activations at a site, F latents, N positions
that are touched (neither padding nor left alone), J latents that are edited.
"""

import operator
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saerelay.errors import ModelError
from saerelay.lm.inputs import Inputs, entries, inputs_of, states_in
from saerelay.lm.model import LanguageModel
from saerelay.lm.ports import anatomy_of, intercept, port_of, transformers_model, width_at
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.layer_normed import LayerNormed
from saerelay.site import Site

ROWS_AT_ONCE = 1024
"""Positions that are encoded together: the dense codes (N, F) of more positions would not fit in memory."""


@contextmanager
def attach(
    model: Any,
    dictionaries: Mapping[Site, Dictionary | LayerNormed],
    *,
    replace: bool = False,
    leave_alone: Collection[int] | None = None,
) -> "Iterator[Attachment]":
    """Let SAEs record, and change, the activations of a language model while the `with` block lasts.

    >>> from saerelay.planning.recipe import ModelSpec
    >>> sae = Dictionary(architecture="topk", k=2, W_enc=torch.eye(192), b_enc=torch.zeros(192),
    ...                  W_dec=torch.eye(192), b_dec=torch.zeros(192))
    >>> model = LanguageModel.load(ModelSpec(device="cpu")).hf_model
    >>> with attach(model, {Site(3): sae}) as attached:
    ...     _ = model.generate(torch.tensor([[0, 5, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    >>> z = attached[3].latents()
    >>> z.shape, (z > 0).sum(dim=2)
    (torch.Size([1, 6, 192]), tensor([[0, 2, 2, 2, 2, 2]]))

    `model` is any transformers model that is one stack of layers, or a `LanguageModel`; each site
    has its SAE, of any of our architectures. Without edits the model computes exactly what it
    always does. With `replace`, reconstructions take the place of activations; without it, an edit
    (`Tap.ablate`, `set`, `steer`) adds the decoded change of the code, x + Σ Δz_j w_j, so that the
    part of x that the SAE fails to explain is kept.

    `model` may be called at any of its entries, alone or within another module (as with `peft`).

    Positions hidden by the attention mask (padding), and positions of the tokens in `leave_alone`,
    are neither changed nor recorded: their codes are zero. By default `leave_alone` is the model's
    BOS, on which SAEs are not trained; pass `()` to include it. If a forward gets no token ids
    (`inputs_embeds`), every position counts.

    SAEs keep their dtype (float32) and move to the model's device; the activations they return are
    cast to the model's dtype. Recorded codes are detached, so gradients through the model are
    unchanged; through replaced or edited activations, gradients follow the formula above.
    Blocks may be nested, even on the same sites: the inner block reads what the outer one returns.
    Raises PlanError or ModelError for sites that the model does not have, or whose width is not
    the SAE's.
    """
    if leave_alone is None:
        leave_alone = _bos_ids(model)
    if isinstance(model, LanguageModel):
        model = model.hf_model
    hf_model = transformers_model(model)
    taps = {site: Tap(site, dictionaries[site], replace) for site in sorted(dictionaries)}
    for site, tap in taps.items():
        _check_width(hf_model, site, tap)

    attached = Attachment(taps, leave_alone)
    with ExitStack() as stack:
        for module in entries(model, anatomy_of(hf_model).layers):
            handle = module.register_forward_pre_hook(attached._enter, with_kwargs=True)
            stack.callback(handle.remove)
            handle = module.register_forward_hook(attached._leave, always_call=True)
            stack.callback(handle.remove)
        for site, tap in taps.items():
            stack.enter_context(intercept(port_of(hf_model, site), site, tap._pass))
        yield attached


def _bos_ids(model: Any) -> list[int]:
    """The ids of a model's BOS token: none, one or several."""
    if isinstance(model, LanguageModel):
        bos = model.facts.tokens.bos_token_id
    else:
        bos = getattr(transformers_model(model).config.get_text_config(), "bos_token_id", None)
    if bos is None:
        return []
    if isinstance(bos, list):
        return bos
    return [bos]


def _check_width(model: Any, site: Site, tap: "Tap") -> None:
    width = width_at(model, site)
    if width != tap.d_model:
        raise ModelError(
            f"{site}: this SAE reads activations {tap.d_model} wide, but in this model "
            f"({type(model).__name__}) they are {width} wide. Attach it to the model it was "
            "trained on, or to one fine-tuned from that; `saerelay hop --from-model` carries an "
            "SAE to another model."
        )


class Attachment:
    """The SAEs attached to a model; the codes they recorded outlive the `with` block."""

    def __init__(self, taps: "Mapping[Site, Tap]", leave_alone: Collection[int]) -> None:
        self._taps = taps
        self._leave_alone = list(leave_alone)
        self._tokens = dict[int, Tensor]()
        """Token ids (B, C), by the position in the sequence at which they begin."""
        self._forwards: list[Inputs] = []
        """Inputs of the current forward: the outermost module's first."""
        self._end = 0
        """Position at which the last forward ended in its sequences."""
        self._states: list[Any] = []
        """The states that the last forward was given, and those it returned."""

    def __getitem__(self, key: Site | int) -> "Tap":
        """The tap at a site, or at a layer's only site; ModelError unless there is exactly one."""
        matching = [tap for site, tap in self._taps.items() if key in (site, site.layer)]
        if len(matching) != 1:
            problem = "several SAEs are" if matching else "no SAE is"
            sites = ", ".join(str(site) for site in self._taps)
            raise ModelError(f"{problem} attached at {key}; SAEs are attached at: {sites}")
        return matching[0]

    @property
    def sites(self) -> list[Site]:
        """The sites of attached SAEs, in order."""
        return list(self._taps)

    @property
    def tokens(self) -> Tensor:
        """The token ids (B, C) of the recorded codes; ModelError if the model was given none."""
        return _joined(self._tokens, "token ids were recorded")

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note where a forward begins in its sequences, and which positions (B, C) are touched.

        An inner module is called with inputs that the outer module has processed: the inner one knows
        best which positions there are, the outer one which tokens they are.
        """
        inputs = inputs_of(module, args, kwargs)
        if self._forwards:
            inputs = inputs.within(self._forwards[-1])
        self._forwards.append(inputs)
        if inputs.shape is None:
            return
        start = inputs.start(self._end, self._states)
        touched = inputs.unpadded(start)
        _cut(self._tokens, start)
        if inputs.ids is not None:
            self._tokens[start] = inputs.ids.clone()
            left_alone = torch.tensor(self._leave_alone, dtype=inputs.ids.dtype, device=inputs.ids.device)
            touched &= ~torch.isin(inputs.ids, left_alone)
        for tap in self._taps.values():
            tap._begin(start, touched)

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Note where a forward ended, and the state that it left for the next one."""
        inputs = self._forwards.pop()
        if self._forwards or inputs.shape is None:
            return
        self._end = inputs.start(self._end, self._states) + inputs.shape[1]
        self._states = [*inputs.states, *states_in(output)]


class Tap:
    """One attached SAE: the codes it records, and the edits made to them."""

    def __init__(self, site: Site, sae: Dictionary | LayerNormed, replace: bool) -> None:
        self.site = site
        self._sae = sae
        self._replace = replace
        self._edits = dict[int, tuple[float, float]]()
        """A factor and an addend for the code of each edited latent."""
        self._codes = dict[int, Tensor]()
        """Sparse codes (B, C, F), by the position in the sequence at which they begin."""
        self._start = 0
        self._touched: Tensor | None = None

    @property
    def d_model(self) -> int:
        """Width D of the activations."""
        return self._inner.d_model

    @property
    def n_latents(self) -> int:
        """Number of latents F."""
        return self._inner.n_latents

    @property
    def _inner(self) -> Dictionary:
        """The dictionary itself: under a layer norm, it reads normalised activations."""
        return self._sae.dictionary if isinstance(self._sae, LayerNormed) else self._sae

    def ablate(self, *latents: int) -> None:
        """Set the codes of latents to zero."""
        for latent in latents:
            self.set(latent, 0.0)

    def set(self, latent: int, value: float) -> None:
        """Clamp the code of a latent to a value, at every touched position."""
        self._edits[self._checked(latent)] = (0.0, value)

    def steer(self, latent: int, amount: float) -> None:
        """Add an amount to the code of a latent, or to the value it was `set` to, at every touched position."""
        latent = self._checked(latent)
        factor, addend = self._edits.get(latent, (1.0, 0.0))
        self._edits[latent] = (factor, addend + amount)

    def reset(self) -> None:
        """Undo all edits."""
        self._edits.clear()

    def latents(self, *latents: int) -> Tensor:
        """The recorded codes (B, C, F), or (B, C, n) of n latents, as they were before edits.

        The codes are those of the last sequences. A forward that continues a key-value cache appends to
        the codes recorded for it; any other forward starts anew. So `generate`, with or without a cache,
        leaves the codes of the prompt and of all generated tokens but the last (which no forward has
        read). With beam search, a row holds the beam that was there at each step. Raises ModelError if
        nothing was recorded.
        """
        codes = self.codes()
        if not latents:
            return codes.to_dense()
        index = torch.tensor([self._checked(latent) for latent in latents], device=codes.device)
        return codes.index_select(2, index).to_dense()

    def codes(self) -> Tensor:
        """The recorded codes as a sparse COO tensor (B, C, F), which takes little memory."""
        return _joined(self._codes, f"activations have passed {self.site}").coalesce()

    def _checked(self, latent: int) -> int:
        try:
            index = operator.index(latent)
        except TypeError:
            index = -1
        if not 0 <= index < self.n_latents:
            raise ModelError(f"{self.site}: no latent {latent!r}; latents are numbered 0 to {self.n_latents - 1}")
        return index

    def _begin(self, start: int, touched: Tensor) -> None:
        """Prepare for a forward that begins at `start` and touches some positions, bool (B, C)."""
        self._start = start
        self._touched = touched
        _cut(self._codes, start)

    def _pass(self, x: Tensor) -> Tensor:
        """Record the codes of activations (B, C, D), and return the activations that take their place."""
        if self._touched is None or x.shape[:2] != self._touched.shape:
            raise ModelError(
                f"{self.site}: activations of the shape {tuple(x.shape)} passed here, but the arguments of the model's "
                "call do not show to which tokens they belong. Call the model itself, or its base model, with "
                "input_ids or inputs_embeds."
            )
        touched = self._touched.to(x.device)
        changes = self._replace or bool(self._edits)
        outputs = []
        codes = []
        with torch.set_grad_enabled(changes and torch.is_grad_enabled()):
            for rows in x[touched].split(ROWS_AT_ONCE):
                y, z = self._apply(rows)
                outputs.append(y)
                codes.append(z)
        self._codes[self._start] = self._spread(torch.cat(codes).coalesce(), touched)
        if not changes:
            return x
        return x.index_put((touched,), torch.cat(outputs).to(x.dtype))

    def _apply(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the activations that take the place of x (N, D), and the sparse, detached codes (N, F) of x."""
        self._sae = self._sae.to(x.device)
        sae = self._inner
        x = x.to(sae.W_enc.dtype)
        if isinstance(self._sae, LayerNormed):
            u, mean, scale = self._sae.normalise(x)
        else:
            u, mean, scale = x, 0.0, 1.0
        z = sae.encode(u)

        # An edit turns a code z into factor·z + addend, a change of (factor − 1)·z + addend.
        edited = torch.tensor(list(self._edits), dtype=torch.long, device=x.device)
        factor, addend = torch.tensor(list(self._edits.values())).reshape(-1, 2).to(z).T
        change = z[:, edited] * (factor - 1) + addend  # (N, J)
        if self._replace:
            y = sae.decode(z.index_add(1, edited, change)) * scale + mean
        else:
            y = x + (change @ sae.W_dec[edited]) * scale
        return y, z.detach().to_sparse()

    def _spread(self, codes: Tensor, touched: Tensor) -> Tensor:
        """Turn sparse codes (N, F) of the touched positions into sparse codes (B, C, F) of all positions."""
        rows, latents = codes.indices()
        sequences, positions = touched.nonzero()[rows].T
        return torch.sparse_coo_tensor(
            torch.stack([sequences, positions, latents]),
            codes.values(),
            (*touched.shape, self.n_latents),
            is_coalesced=True,
            check_invariants=False,
        )


def _cut(pieces: dict[int, Tensor], end: int) -> None:
    """Drop everything recorded from a position on: other text, or tokens withdrawn since.

    `pieces` are tensors (B, C, ...) by the position at which they begin, in order.
    """
    while pieces and next(reversed(pieces)) >= end:
        pieces.popitem()
    if pieces:
        start, piece = pieces.popitem()
        if start + piece.shape[1] > end:
            piece = piece.narrow_copy(1, 0, end - start)
        pieces[start] = piece


def _joined(pieces: dict[int, Tensor], what: str) -> Tensor:
    if not pieces:
        raise ModelError(f"no {what} yet; run the model inside the `with` block")
    return torch.cat(list(pieces.values()), dim=1)
