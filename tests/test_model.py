"""Every model family against transformers' own hidden states and the sum of the parts."""

import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_families import ALL_SITES, FAMILIES, GROUPED, TOKENS, spec_of
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from saerelay.errors import DataError, ModelError, PlanError
from saerelay.lm.facts import read_facts
from saerelay.lm.model import LanguageModel
from saerelay.planning.recipe import ModelSpec
from saerelay.sae.threads import alone, in_parallel
from saerelay.site import MODULE_KINDS, ModuleKind, Site

POST_NORMS = {
    "gemma2": "post_attention_layernorm",
    "gemma3": "post_attention_layernorm",
    "glm4": "post_self_attn_layernorm",
}
"""Norms of what attention returns, before it is added."""
NO_HEAD = r"\(bert\) has no language-model head, so it gives no logits"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def model(family: str, family_directory: Callable[[str], Path]) -> LanguageModel:
    return LanguageModel.load(spec_of(family_directory(family)))


@pytest.fixture(scope="session")
def llama(family_directory: Callable[[str], Path]) -> LanguageModel:
    return LanguageModel.load(spec_of(family_directory("llama")))


@pytest.fixture(scope="session")
def activations(model: LanguageModel) -> dict[Site, Tensor]:
    """What is harvested at all sites of a model."""
    return model.harvest(TOKENS, ALL_SITES)


@pytest.fixture(scope="session")
def reference(family: str, family_directory: Callable[[str], Path]) -> Any:
    """The model as transformers loads it."""
    return AutoModel.from_pretrained(family_directory(family)).eval()


def last_norm(reference: Any) -> Any:
    names = ("norm", "ln_f", "final_layer_norm")
    return next((getattr(reference, name) for name in names if hasattr(reference, name)), torch.nn.Identity())


def test_residual_stream_is_transformers_hidden_states(activations: dict[Site, Tensor], reference: Any) -> None:
    with torch.no_grad():
        output = reference(input_ids=TOKENS, output_hidden_states=True)
        for layer in range(3):
            assert_close(activations[Site(layer, "resid_pre")], output.hidden_states[layer], rtol=0, atol=0)
        for layer in range(2):
            assert_close(activations[Site(layer)], output.hidden_states[layer + 1], rtol=0, atol=0)
        assert_close(last_norm(reference)(activations[Site(2)]), output.last_hidden_state, rtol=0, atol=0)


def test_a_layer_adds_what_attention_and_mlp_give(family: str, activations: dict[Site, Tensor], reference: Any) -> None:
    for i in range(3):
        pre, attention, mlp = (activations[Site(i, kind)] for kind in ("resid_pre", "attn_out", "mlp_out"))
        total = pre + attention + mlp
        if family == "bert":  # norms after each addition
            layer = reference.encoder.layer[i]
            total = layer.output.LayerNorm(layer.attention.output.LayerNorm(pre + attention) + mlp).detach()
        assert_close(activations[Site(i)], total, rtol=1e-5, atol=1e-5)


def test_attention_out_and_mlp_out_are_told_apart(family: str, activations: dict[Site, Tensor], reference: Any) -> None:
    """Their sum does not say which is which; what the output projection makes of attn_z does."""
    paths = ("layers.1", "h.1", "encoder.layer.1")
    layer = next(m for name, m in reference.named_modules() if name in paths)
    names = ("self_attn.o_proj", "attention.dense", "attn.c_proj", "attention.output.dense", "self_attention.dense")
    projection = next(m for name, m in layer.named_modules() if name in names)
    with torch.no_grad():
        out = projection(activations[Site(1, "attn_z")])
        if family in POST_NORMS:
            out = getattr(layer, POST_NORMS[family])(out)
    assert_close(activations[Site(1, "attn_out")], out, rtol=1e-5, atol=1e-5)


def test_harvested_tensors_are_plain_copies(model: LanguageModel, activations: dict[Site, Tensor]) -> None:
    assert list(activations) == ALL_SITES
    for site, x in activations.items():
        assert x.shape == (2, 7, model.facts.width(site)) and x.dtype == torch.float32
        assert not x.is_inference() and not x.requires_grad
    assert len({x.data_ptr() for x in activations.values()}) == len(ALL_SITES)
    weight = torch.ones(32, requires_grad=True)
    (activations[Site(0)] @ weight).sum().backward()  # an inference tensor could not be saved for backward
    for site in (Site(1), Site(2, "mlp_out")):
        assert torch.equal(model.harvest(TOKENS, [site, site])[site], activations[site])
    stored = TOKENS.numpy().astype(np.uint16)  # as in tokens/test.npy
    for ids in (stored, torch.from_numpy(stored), stored.astype(np.int64)):
        assert torch.equal(model.harvest(ids, [Site(1)])[Site(1)], activations[Site(1)])


def passage(model: LanguageModel, run: Callable[[], object]) -> list[tuple[str, nn.Module]]:
    """Every beginning and end of a module's call, in order."""
    events: list[tuple[str, nn.Module]] = []
    ours = set(model._model.modules())
    handles = [
        register_module_forward_pre_hook(lambda m, _: events.append(("begin", m)) if m in ours else None),
        register_module_forward_hook(lambda m, *_: events.append(("end", m)) if m in ours else None),
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return events


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_harvest_runs_nothing_behind_the_deepest_site(model: LanguageModel, kind: ModuleKind) -> None:
    """Its calls are those of a whole forward up to the site's module: no attention, MLP, norm or head after it."""
    with torch.no_grad():
        whole = passage(model, lambda: model._model.base_model(input_ids=TOKENS, use_cache=False))
    for layer in range(3):
        module, side = model._port(Site(layer, kind))
        n = whole.index(("begin" if side == "input" else "end", module)) + 1
        sites = [Site(0, "resid_pre"), Site(layer, kind)]
        assert passage(model, partial(model.harvest, TOKENS, sites)) == whole[:n]
        assert n < len(whole)
    assert passage(model, lambda: model.harvest(TOKENS, [])) == [] and model.harvest(TOKENS, []) == {}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model._layers.modules())


def test_visitors_see_what_harvest_copies(model: LanguageModel, activations: dict[Site, Tensor]) -> None:
    seen: dict[Site, Tensor] = {}
    kept = {site: torch.empty_like(x) for site, x in activations.items()}

    def look(site: Site, x: Tensor) -> None:
        assert x.is_inference() and torch.is_inference_mode_enabled()
        kept[site].copy_(x)
        seen[site] = x

    model.visit(TOKENS, {site: partial(look, site) for site in ALL_SITES})
    for site in ALL_SITES:
        assert torch.equal(kept[site], activations[site]) and not kept[site].is_inference()
    assert seen.keys() == activations.keys() and not torch.is_inference_mode_enabled()


def test_a_spliced_forward_goes_on_with_what_was_spliced_in(
    family: str, model: LanguageModel, activations: dict[Site, Tensor]
) -> None:
    if family == "bert":
        with pytest.raises(ModelError, match=NO_HEAD):
            model.logits(TOKENS)
        return
    logits = model.logits(TOKENS)
    assert logits.shape == (2, 7, 101) and logits.dtype == torch.float32
    for site in ALL_SITES:
        with model.splice(site, lambda x: x):
            assert torch.equal(model.logits(TOKENS), logits), site
        with model.splice(site, lambda x, site=site: activations[site].double()):
            assert torch.equal(model.logits(TOKENS), logits), site
        with model.splice(site, torch.zeros_like):
            assert not torch.allclose(model.logits(TOKENS), logits), site
            assert not model.harvest(TOKENS, [site])[site].any()
    others = TOKENS.flip(0, 1)
    there = model.harvest(others, [Site(2)])[Site(2)]
    with model.splice(Site(2), lambda _: there):
        assert torch.equal(model.logits(TOKENS), model.logits(others))
    assert torch.equal(model.logits(TOKENS), logits)


def logits_of(model: LanguageModel, states: Tensor) -> Tensor:
    """The logits of all tokens, from last hidden states."""
    return model.head.logits(states, slice(0, model.head.n_tokens))


def test_resuming_in_the_middle_is_splicing(family: str, model: LanguageModel, activations: dict[Site, Tensor]) -> None:
    if family == "bert":
        with pytest.raises(ModelError, match=NO_HEAD):
            model.forward(TOKENS, ALL_SITES)
        return
    clean, calls = model.forward(TOKENS, ALL_SITES), []
    assert model.head.in_parts and torch.equal(logits_of(model, clean.states), model.logits(TOKENS))
    for site in ALL_SITES:
        assert torch.equal(clean.activations[site], activations[site]), site
        x = torch.randn(activations[site].shape, generator=torch.Generator().manual_seed(1))
        with model.splice(site, lambda _, x=x: x.clone()):
            expected = model.logits(TOKENS)
        with model.resuming(clean, site) as states_with:  # tries whether the model can
            counter = register_module_forward_hook(lambda module, *_: calls.append(type(module).__name__))
            assert torch.equal(logits_of(model, states_with(x)), expected), site
            counter.remove()
            with alone():
                own, others = in_parallel(states_with, [activations[site], x])
        assert torch.equal(own, clean.states) and torch.equal(logits_of(model, others), expected), site
        n_mlps = sum(name.endswith("MLP") for name in calls)
        assert n_mlps == 3 - site.layer - (site.module == "resid_post"), (site, calls)
        calls.clear()
    assert torch.equal(model.logits(TOKENS), logits_of(model, clean.states))


@pytest.mark.parametrize("share", [1.0, 1e-4])
def test_a_model_that_cannot_resume_runs_whole(family_directory: Callable[[str], Path], share: float) -> None:
    model = LanguageModel.load(spec_of(family_directory("llama")))
    first, last = model._layers[0], model._layers[2]
    run, memory = last.forward, {}
    first.mlp.register_forward_hook(lambda _, __, output: memory.update(x=output))
    # what later layers of Gemma 3n do
    last.forward = lambda x, **options: run(x + share * memory.pop("x", 0), **options)
    clean = model.forward(TOKENS, [Site(1)])
    x = torch.randn(clean.activations[Site(1)].shape, generator=torch.Generator().manual_seed(1))
    with model.splice(Site(1), lambda _: x):
        expected = model.logits(TOKENS)
    with model.resuming(clean, Site(1)) as states_with:
        assert torch.equal(logits_of(model, states_with(x)), expected) and model._can_skip == {2: False}


def test_a_whole_forward_keeps_no_stream_that_was_not_asked_for(llama: LanguageModel) -> None:
    """On a GPU, the streams of all layers of a large batch would be most of the memory."""
    first, _, last = llama.hf_model.model.layers
    streams: list[weakref.ref[Tensor]] = []
    alive: list[Tensor | None] = []
    made = first.register_forward_hook(lambda _, __, x: streams.append(weakref.ref(x)))
    over = last.register_forward_hook(lambda *_: alive.append(streams[-1]()))
    llama.forward(TOKENS, [Site(1, "mlp_out")])
    made.remove()
    over.remove()
    assert alive[-1] is None


def test_what_is_no_site_and_what_are_no_token_ids_say_so(llama: LanguageModel) -> None:
    with pytest.raises(PlanError, match=r"^1 is not a site; write Site\(1\)"):
        llama.harvest(TOKENS, [1])  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"found shape \(7,\)"):
        llama.harvest(TOKENS[0], [Site(1)])
    with pytest.raises(DataError, match="found .*ndarray"):
        llama.harvest(TOKENS.numpy() / 1, [Site(1)])
    with pytest.raises(DataError, match=r"from \d+ to 101, but .* knows only 0 to 100"):
        llama.harvest(TOKENS.clone().fill_(101).index_fill_(1, torch.tensor([0]), 0), [Site(1)])


def test_splice_goes_when_its_block_fails(llama: LanguageModel) -> None:
    logits = llama.logits(TOKENS)
    too_narrow = pytest.raises(AssertionError, match=r"L1: spliced \(2, 7, 31\) into \(2, 7, 32\)")
    with too_narrow, llama.splice(Site(1), lambda x: x[..., 1:]):
        llama.logits(TOKENS)
    assert torch.equal(llama.logits(TOKENS), logits)


def test_a_bfloat16_model_gives_bfloat16_activations_and_float32_logits(
    family_directory: Callable[[str], Path],
) -> None:
    model = LanguageModel.load(spec_of(family_directory("llama"), dtype="bfloat16"))
    assert model.harvest(TOKENS, [Site(1)])[Site(1)].dtype == torch.bfloat16
    with model.splice(Site(1), lambda x: x.float()):
        assert model.logits(TOKENS).dtype == torch.float32


def test_sites_that_a_model_does_not_have_are_refused(llama: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"^L3.attn_z: .* has 3 layers; layers go from 0 to 2$"):
        llama.check_site(Site(3, "attn_z"))
    with pytest.raises(PlanError, match="layers go from 0 to 2"):
        llama.harvest(TOKENS, [Site(0), Site(3)])
    with pytest.raises(PlanError, match="layers go from 0 to 2"), llama.splice(Site(7), lambda x: x):
        pass
    config = AutoConfig.for_model("mamba", vocab_size=101, hidden_size=32, num_hidden_layers=3, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    facts = read_facts(spec_of(tmp_path))
    assert (facts.n_layers, facts.d_attn_z, facts.tokens.max_context) == (3, 0, 0)
    mamba = LanguageModel.load(spec_of(tmp_path))
    mamba.check_site(Site(1))
    told = (
        r"L1.mlp_out of .* cannot be read: .* no module that is known to be an MLP. Layer 1 has resid_post, resid_pre"
    )
    with pytest.raises(ModelError, match=told):
        mamba.check_site(Site(1, "mlp_out"))


@pytest.mark.parametrize("name, changes", [("granite", {"residual_multiplier": 0.5}), ("doge", {})])
def test_blocks_that_are_rescaled_are_refused(tmp_path: Path, name: str, changes: dict[str, float]) -> None:
    config = AutoConfig.for_model(name, **GROUPED | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = LanguageModel.load(spec_of(tmp_path))
    model.check_site(Site(0, "attn_z"))
    for kind in ("attn_out", "mlp_out"):
        with pytest.raises(ModelError, match="cannot be read: .* Layer 0 has resid_post, resid_pre, mlp_in, attn_z"):
            model.check_site(Site(0, kind))


def test_unembedding_is_the_gradient_of_a_logit_up_to_the_norms_size(tiny_model: Path) -> None:
    spec = ModelSpec(name=str(tiny_model), dtype="float32", device="cpu")
    model = LanguageModel.load(spec)
    norm = model._model.base_model.final_layer_norm
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(1))
    head = model._model.get_output_embeddings()
    x, direction = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    centred = x - x.mean()
    direction -= (direction @ centred) / (centred @ centred) * centred  # so that the size of x stays
    _, change = torch.func.jvp(lambda x: head(norm(x)), (x,), (direction,))
    assert_close(change * x.std(correction=0), model.unembedding() @ direction, atol=1e-4, rtol=1e-4)
