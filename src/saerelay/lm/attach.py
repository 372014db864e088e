"""SAEs at work inside a language model: read its latents, or change them, while it runs or generates.

    with suite.attach(model) as attached:        # or attach(model, {Site(3): sae}) for dictionaries without a run
        attached[3].ablate(123)
        model.generate(**inputs)
    z = attached[3].latents()

In shapes: B sequences, C positions, D width of the activations at a site, F latents, N positions that are touched, J
latents that are edited.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from saerelay.errors import ModelError
from saerelay.lm.model import LanguageModel
from saerelay.lm.ports import intercept, port_of, width_at
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.layer_normed import LayerNormed
from saerelay.site import Site

ROWS_AT_ONCE = 1024
"""Codes are dense only for so many positions at a time."""


@contextmanager
def attach(
    model: Any,
    dictionaries: Mapping[Site, Dictionary | LayerNormed],
    *,
    replace: bool = False,
    leave_alone: Collection[int] | None = None,
) -> "Iterator[Attachment]":
    """Put SAEs to work in a language model while the `with` block lasts: they record, and may change, what passes.

    >>> from saerelay.planning.recipe import ModelSpec
    >>> sae = Dictionary(architecture="topk", k=2, W_enc=torch.eye(192), b_enc=torch.zeros(192),
    ...                  W_dec=torch.eye(192), b_dec=torch.zeros(192))
    >>> model = LanguageModel.load(ModelSpec(device="cpu")).hf_model
    >>> with attach(model, {Site(3): sae}) as attached:
    ...     _ = model.generate(torch.tensor([[0, 5, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    >>> z = attached[3].latents()
    >>> z.shape, (z > 0).sum(dim=2)
    (torch.Size([1, 6, 192]), tensor([[0, 2, 2, 2, 2, 2]]))

    `model` is any transformers model (a stack of layers), or a `LanguageModel`; each site has its SAE, in any of our
    architectures. Without edits the model computes what it always does, to the bit. `replace` puts each
    reconstruction in the place of the activations; without it an edit (`Tap.ablate`, `set`, `steer`) adds what the
    change of the code decodes to, x + Σ Δz_j w_j, so that what the SAE fails to explain stays.

    Positions hidden by a two-dimensional attention mask (padding) and those of the tokens in `leave_alone` are neither
    changed nor recorded: their codes are zero. By default these tokens are the model's BOS, on which SAEs are not
    trained; `()` touches it, too. Where a forward gets no token ids (`inputs_embeds`), nothing is known of its tokens.

    SAEs keep their dtype (float32) and go to the model's device; what they put in the place of activations is cast to
    the dtype of these. Recorded codes are detached, hence a backward through the model is what it was; through
    replaced or edited activations it follows the formula above. Blocks may be nested, on the same sites, too: the
    inner one reads what the outer one made. Raises PlanError or ModelError for sites that the model does not have or
    whose width is another.
    """
    if isinstance(model, LanguageModel):
        model, bos = model.hf_model, model.facts.tokens.bos_token_id
    else:
        bos = model.config.get_text_config().bos_token_id
    if leave_alone is None:
        leave_alone = bos if isinstance(bos, list) else [] if bos is None else [bos]
    taps = {site: Tap(site, dictionaries[site], replace) for site in sorted(dictionaries)}
    for site, tap in taps.items():
        if width_at(model, site) != tap.d_model:
            raise ModelError(
                f"{site}: the SAE reads activations {tap.d_model} wide, the model's ({type(model).__name__}) are "
                f"{width_at(model, site)} wide there. Attach it to the model it was trained on, or one fine-tuned "
                "from that; `saerelay hop --from-model` carries an SAE to another model"
            )
    attached = Attachment(taps, leave_alone)
    with ExitStack() as stack:
        handle = model.base_model.register_forward_pre_hook(attached._begin, with_kwargs=True)
        stack.callback(handle.remove)
        for site, tap in taps.items():
            stack.enter_context(intercept(port_of(model, site), site, tap._pass))
        yield attached


class Attachment:
    """The SAEs attached to a model, by site or by layer; what they recorded stays when the `with` block has ended."""

    def __init__(self, taps: "Mapping[Site, Tap]", leave_alone: Collection[int]) -> None:
        self._taps, self._leave_alone, self._tokens = taps, list(leave_alone), dict[int, Tensor]()

    def __getitem__(self, key: Site | int) -> "Tap":
        """The tap at a site, or at the one of a layer."""
        found = [tap for site, tap in self._taps.items() if key in (site, site.layer)]
        if len(found) != 1:
            there = ", ".join(map(str, self._taps))
            raise ModelError(f"{'several sites' if found else 'no SAE'} at {key}; SAEs are attached at: {there}")
        return found[0]

    @property
    def sites(self) -> list[Site]:
        """Where SAEs are attached, in order."""
        return list(self._taps)

    @property
    def tokens(self) -> Tensor:
        """The token ids (B,C) that the recorded codes belong to; ModelError if none were given."""
        return _joined(self._tokens, "token ids came by")

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note where in its sequences a forward begins, and which of its positions (B,C) are touched."""
        given = signature(module.forward).bind_partial(*args, **kwargs).arguments
        ids, mask, cache = (given.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
        start = 0 if cache is None else int(cache.get_seq_length())
        shown = given["inputs_embeds"] if ids is None else ids
        touched = torch.ones(shown.shape[:2], dtype=torch.bool, device=shown.device)
        _cut(self._tokens, start)
        if ids is not None:
            self._tokens[start] = ids.clone()
            touched &= ~torch.isin(ids, torch.tensor(self._leave_alone, dtype=ids.dtype, device=ids.device))
        if isinstance(mask, Tensor) and mask.ndim == 2:
            touched &= mask[:, -touched.shape[1] :].to(touched)
        for tap in self._taps.values():
            tap._begin(start, touched)


class Tap:
    """One attached SAE: the codes it records, and the edits made to them."""

    def __init__(self, site: Site, sae: Dictionary | LayerNormed, replace: bool) -> None:
        self.site, self._sae, self._replace = site, sae, replace
        self._edits = dict[int, tuple[float, float]]()  # latent: (factor, addend) of its code
        self._codes = dict[int, Tensor]()  # where in the sequence they begin: sparse (B,C,F)

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
        return self._sae.dictionary if isinstance(self._sae, LayerNormed) else self._sae

    def ablate(self, *latents: int) -> None:
        """Set the codes of latents to zero."""
        for latent in latents:
            self.set(latent, 0.0)

    def set(self, latent: int, value: float) -> None:
        """Clamp the code of a latent to a value, at every position that is touched."""
        self._edits[self._checked(latent)] = (0.0, value)

    def steer(self, latent: int, amount: float) -> None:
        """Add an amount to the code of a latent, at every position that is touched; after `set`, to that value."""
        factor, addend = self._edits.get(self._checked(latent), (1.0, 0.0))
        self._edits[latent] = (factor, addend + amount)

    def reset(self) -> None:
        """Take all edits back."""
        self._edits.clear()

    def latents(self, *some: int) -> Tensor:
        """The recorded codes (B,C,F), or (B,C,n) of n latents: what the SAE made of the activations, before edits.

        They are those of the sequences that passed last: a forward that continues a key-value cache goes on behind
        what that holds, any other begins anew. Hence `generate` gives prompt and generated tokens, all but the last
        (which no forward has read), with a cache or without; a row of beam search is the beam that stood there at each
        step. ModelError if nothing passed.
        """
        if not some:
            return self.codes().to_dense()
        index = torch.tensor([self._checked(latent) for latent in some])
        codes = self.codes()
        return codes.index_select(2, index.to(codes.device)).to_dense()

    def codes(self) -> Tensor:
        """The same as a sparse COO tensor (B,C,F), as it is kept: large models and long texts stay small."""
        return _joined(self._codes, f"activations passed {self.site}").coalesce()

    def _checked(self, latent: int) -> int:
        if not 0 <= latent < self.n_latents:
            raise ModelError(f"{self.site}: no latent {latent}; they are numbered 0 to {self.n_latents - 1}")
        return latent

    def _begin(self, start: int, touched: Tensor) -> None:
        self._start, self._touched = start, touched
        _cut(self._codes, start)

    def _pass(self, x: Tensor) -> Tensor:
        """Record the codes of activations (B,C,D), and give what goes on in their place."""
        touched, changes = self._touched.to(x.device), self._replace or bool(self._edits)
        with torch.set_grad_enabled(changes and torch.is_grad_enabled()):
            parts = [self._changed(rows) for rows in x[touched].split(ROWS_AT_ONCE)]
        codes = torch.cat([z for _, z in parts]).coalesce()
        rows, latents = codes.indices()
        places = torch.stack([*touched.nonzero()[rows].T, latents])
        shape = (*touched.shape, self.n_latents)
        self._codes[self._start] = torch.sparse_coo_tensor(
            places, codes.values(), shape, is_coalesced=True, check_invariants=False
        )
        return x.index_put((touched,), torch.cat([y for y, _ in parts]).to(x.dtype)) if changes else x

    def _changed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is put in the place of activations (N,D), and their codes (N,F), sparse and detached."""
        self._sae = self._sae.to(x.device)
        sae = self._inner
        x = x.to(sae.W_enc.dtype)
        u, mean, scale = self._sae.normalise(x) if isinstance(self._sae, LayerNormed) else (x, 0.0, 1.0)
        z = sae.encode(u)
        J = torch.tensor([*self._edits], dtype=torch.long, device=x.device)
        factor, addend = torch.tensor([*self._edits.values()]).reshape(-1, 2).to(z).T
        change = z[:, J] * (factor - 1) + addend  # (N,J)
        if self._replace:
            y = sae.decode(z.index_add(1, J, change)) * scale + mean
        else:
            y = x + (change @ sae.W_dec[J]) * scale
        return y, z.detach().to_sparse()


def _cut(pieces: dict[int, Tensor], end: int) -> None:
    """Drop what lies behind a position: another sequence, or what has been cut off the cache since."""
    while pieces and next(reversed(pieces)) >= end:
        pieces.popitem()
    if pieces:
        start, piece = pieces.popitem()
        pieces[start] = piece.narrow_copy(1, 0, end - start) if start + piece.shape[1] > end else piece


def _joined(pieces: dict[int, Tensor], what: str) -> Tensor:
    if not pieces:
        raise ModelError(f"no {what} yet; run the model inside the `with` block")
    return torch.cat(list(pieces.values()), dim=1)
