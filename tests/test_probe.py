"""The probe at load: what is read where is what a few tokens show, whatever a family is called."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import COMMON, GROUPED, ONE_EOS, TOKENS, spec_of
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MllamaForConditionalGeneration,
    ViTConfig,
    ViTModel,
    XLMConfig,
    XLMWithLMHeadModel,
)

from saerelay.errors import ModelError
from saerelay.lm.facts import read_facts
from saerelay.lm.model import LanguageModel
from saerelay.lm.ports import anatomy_of, other_module, port_of
from saerelay.lm.probe import probe
from saerelay.lm.trial import with_constants
from saerelay.planning.compile import compile_plan
from saerelay.planning.recipe import Recipe
from saerelay.site import Site

pytestmark = pytest.mark.usefixtures("one_thread")


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **GROUPED | changes)).eval()


def saved(directory: Path, family: str, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **GROUPED | ONE_EOS | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


class Changed(nn.Module):
    """A module whose output is changed by a function."""

    def __init__(self, module: nn.Module, function: Any) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module(*args, **kwargs))


# --- what is added to the residual stream ------------------------------------------------------


def surgery(change: str) -> Any:
    """A Llama whose second layer was changed by hand: no name of a family tells."""
    model = llama()
    layer = model.model.layers[1]
    own = layer.mlp.forward
    match change:
        case "scaled behind the module":
            forward = layer.forward
            layer.forward = lambda x, **options: x + 0.7 * (forward(x, **options) - x)
        case "a factor of 1":
            layer.mlp.forward = lambda x: own(x) * 1.0
        case "a third term":
            forward = layer.forward
            layer.forward = lambda x, **options: forward(x, **options) + model.model.norm(x)
        case "the stream is halved":
            forward = layer.forward
            layer.forward = lambda x, **options: forward(0.5 * x, **options)
    return model


@pytest.mark.parametrize("change", ["scaled behind the module", "a third term", "the stream is halved"])
def test_what_is_not_added_as_it_is_is_refused_in_the_layer_concerned(change: str) -> None:
    anatomy = probe(surgery(change), "surgery")
    for kind in ("attn_out", "mlp_out"):
        assert Site(1, kind) in anatomy.refusals and Site(0, kind) in anatomy.ports  # type: ignore[arg-type]
    assert Site(1) in anatomy.ports and Site(1, "attn_z") in anatomy.ports


def test_a_multiplier_of_one_changes_nothing() -> None:
    assert probe(surgery("a factor of 1"), "surgery").ports[Site(1, "mlp_out")].path == "model.layers.1.mlp"


@pytest.mark.parametrize("family, refused", [("minimax", True), ("bert", False)])
def test_a_norm_of_the_stream_may_follow_an_addition_and_not_come_before_it(family: str, refused: bool) -> None:
    keys = GROUPED if family == "minimax" else COMMON
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **keys | ONE_EOS))
    assert (Site(1, "mlp_out") in probe(model.eval(), family).refusals) == refused


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_residual_multiplier_is_told_with_weights_and_without(tmp_path: Path, factor: float) -> None:
    directory = saved(tmp_path, "granite", residual_multiplier=factor)
    facts = read_facts(spec_of(directory))
    model = LanguageModel.load(spec_of(directory))
    sites = [Site(1, "attn_out"), Site(1, "mlp_out")]
    if factor == 1:
        x = model.harvest(TOKENS, [Site(1), Site(1, "resid_pre"), *sites])
        total = x[Site(1, "resid_pre")] + x[sites[0]] + x[sites[1]]
        torch.testing.assert_close(total, x[Site(1)])
        return
    for site in sites:
        for ask in (facts.check_site, model.check_site):
            with pytest.raises(ModelError, match=r"Layer 1 has resid_post, resid_pre, mlp_in, attn_z\.$"):
                ask(site)


def test_a_factor_among_the_weights_is_refused_by_a_plan(tmp_path: Path) -> None:
    directory = saved(tmp_path, "gemma4_text", head_dim=8, hidden_size_per_layer_input=0, num_kv_shared_layers=0)
    said = r"scales or mixes the two\. Layer 1 has resid_post, resid_pre, mlp_in, attn_z\.$"
    with pytest.raises(ModelError, match=said):
        read_facts(spec_of(directory)).check_site(Site(1, "mlp_out"))


# --- without weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("family, changes", [("jetmoe", {"kv_channels": 8, "num_local_experts": 4}), ("llama", {})])
def test_a_plan_is_told_of_the_same_sites_as_training(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    directory = saved(tmp_path, family, **changes)  # JetMoe asks for the values of tensors
    facts = read_facts(spec_of(directory))
    x = LanguageModel.load(spec_of(directory)).harvest(TOKENS, [Site(1), Site(1, "mlp_out")])
    for site, activations in x.items():
        facts.check_site(site)
        assert facts.width(site) == activations.shape[-1]


def test_weights_that_are_all_one_number_take_no_memory() -> None:
    model = with_constants(llama())
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == 4 and parameter.device.type == "cpu"


# --- which modules are the layers --------------------------------------------------------------


def test_a_list_of_modules_that_is_not_the_residual_stream_is_refused(tmp_path: Path) -> None:
    config = XLMConfig(vocab_size=101, emb_dim=32, n_layers=3, n_heads=4, max_position_embeddings=64)
    XLMWithLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\(xlm\) is not a single stack of layers"):
        read_facts(spec_of(tmp_path))


class InAnotherOrder(nn.ModuleList):
    """Layers that a forward runs twice, or from the last to the first."""

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, slice):
            return super().__getitem__(key)
        return [*self, *self] if self.twice else list(self)[::-1]


@pytest.mark.parametrize("what", ["twice", "backwards", "between"])
def test_layers_must_run_once_in_order_each_on_what_the_last_one_returned(what: str) -> None:
    model = llama()
    if what == "between":
        for layer in model.model.layers:
            layer.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    else:
        model.model.layers = InAnotherOrder(model.model.layers)
        model.model.layers.twice = what == "twice"
    with pytest.raises(ModelError, match="is not a single stack of layers"):
        probe(model, "surgery")


def test_layers_that_do_not_run_on_text_are_left_out_and_the_others_named(tmp_path: Path) -> None:
    text = {**GROUPED, "model_type": "mllama_text_model", "num_hidden_layers": 4, "cross_attention_layers": [1]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "attention_heads": 2, "num_hidden_layers": 2,
              "num_global_layers": 1, "image_size": 16, "patch_size": 8, "max_num_tiles": 1, "vision_output_dim": 16,
              "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}  # fmt: skip
    config = AutoConfig.for_model("mllama", text_config=text, vision_config=vision)
    MllamaForConditionalGeneration(config).save_pretrained(tmp_path)
    facts = read_facts(spec_of(tmp_path))
    with pytest.raises(ModelError, match=r"does not run on text alone\. .*sites.layers = \[0, 2, 3\]\)"):
        compile_plan(Recipe.parse({"data": {"context": 16}}), facts)
    model = LanguageModel.load(spec_of(tmp_path))
    clean = model.forward(TOKENS, [Site(2)])
    with model.resuming(clean, Site(2)) as states_with:
        assert torch.equal(states_with(clean.activations[Site(2)]), clean.states)


def test_an_image_model_does_not_read_tokens(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16)
    ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\(vit\) does not read tokens; use a language model\.$"):
        read_facts(spec_of(tmp_path))


def test_several_residual_streams_are_not_one_vector(tmp_path: Path) -> None:
    saved(tmp_path, "deepseek_v4", moe_intermediate_size=48, num_key_value_heads=1, head_dim=8, q_lora_rank=16,
          o_groups=2, o_lora_rank=16, index_n_heads=2, index_head_dim=8, index_topk=4, qk_rope_head_dim=4,
          partial_rotary_factor=0.5, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, sliding_window=5,
          layer_types=None, mlp_layer_types=None)  # fmt: skip
    with pytest.raises(ModelError, match="L1 of .* 4 residual streams pass between the layers, not one vector"):
        read_facts(spec_of(tmp_path)).check_site(Site(1))


# --- widths ------------------------------------------------------------------------------------


def test_widths_are_asked_by_layer(tmp_path: Path) -> None:
    saved(
        tmp_path,
        "gemma4_text",
        head_dim=8,
        global_head_dim=16,
        sliding_window=5,
        vocab_size_per_layer_input=101,
        hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )
    facts = read_facts(spec_of(tmp_path))
    model = LanguageModel.load(spec_of(tmp_path))
    sites = [Site(layer, "attn_z") for layer in range(3)]
    found = [x.shape[2] for x in model.harvest(TOKENS, sites).values()]
    assert found == [facts.width(site) for site in sites] == [32, 32, 64]


def test_plan_and_training_refuse_the_same_layers(tmp_path: Path) -> None:
    saved(
        tmp_path,
        "bamba",
        num_hidden_layers=4,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=8,
        attn_layer_indices=[1, 3],
    )
    facts = read_facts(spec_of(tmp_path))
    model = LanguageModel.load(spec_of(tmp_path))
    for ask in (facts.check_site, model.check_site):
        ask(Site(3, "attn_z"))
        with pytest.raises(ModelError, match=r"attn_z can be read in layers \[1, 3\]"):
            ask(Site(0, "attn_z"))


# --- looking changes nothing -------------------------------------------------------------------


def test_a_model_in_use_is_not_run_by_a_probe() -> None:
    model = llama().train()
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: pytest.fail("ran"))
    module, _ = port_of(model, Site(1, "attn_out"))
    assert module is model.model.layers[1].self_attn.o_proj
    assert model.training and anatomy_of(model) is anatomy_of(model)


def test_a_module_path_is_compared_with_what_the_site_reads(tmp_path: Path) -> None:
    spec = spec_of(saved(tmp_path, "gemma2", head_dim=8))
    site = Site(1, "mlp_out")
    assert other_module(spec, site, "layers.1.mlp")
    assert not other_module(spec, site, "layers.1.post_feedforward_layernorm")
    assert not other_module(spec, site, "transformer.h.1.mlp")  # no such module: nothing can be said
    assert not other_module(spec, Site(1), "model.layers.1")


# --- the head ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, changes",
    [
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 0.01}),
        ("cohere", {"logit_scale": 5.0}),
        ("granite", {"logits_scaling": 3.0}),
    ],
)
def test_a_head_gives_logits_of_some_tokens_as_the_model_makes_them(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    model = LanguageModel.load(spec_of(saved(tmp_path, family, **changes)))
    logits = model.logits(TOKENS)
    head = model.head
    states = head.states(TOKENS)
    assert head.in_parts and head.n_tokens == logits.shape[-1] and states.shape == (*TOKENS.shape, 32)
    for part in (slice(10, 30), torch.tensor([3, 90, 4])):
        assert torch.allclose(head.logits(states, part), logits[..., part], rtol=1e-5, atol=1e-7)
    assert torch.equal(model.logits(TOKENS), logits)  # the model itself is as it was


@pytest.mark.parametrize("change", ["a head of its own", "every logit depends on all"])
def test_a_head_that_is_not_known_gives_all_logits(tmp_path: Path, change: str) -> None:
    model = LanguageModel.load(spec_of(saved(tmp_path, "llama")))
    hf_model = model.hf_model
    if change == "a head of its own":
        hf_model.lm_head = Changed(hf_model.lm_head, torch.tanh)
    else:

        class Centred(type(hf_model)):  # type: ignore[misc]
            def forward(self, **options: Any) -> Any:
                output = super().forward(**options)
                output.logits = output.logits - output.logits.mean(dim=-1, keepdim=True)
                return output

        hf_model.__class__ = Centred
    logits = model.logits(TOKENS)
    states = model.head.states(TOKENS)
    assert not model.head.in_parts and torch.equal(states, logits)
    assert torch.equal(model.head.logits(states, slice(2, 5)), logits[..., 2:5])


# --- the unembedding -----------------------------------------------------------------------------


def moves(model: LanguageModel, last: Site) -> float:
    """How well `unembedding` says how logits move with the last residual stream: a correlation."""
    x = model.harvest(TOKENS, [last])[last]
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    step -= step.mean(dim=2, keepdim=True)
    centred = x - x.mean(dim=2, keepdim=True)
    step -= (step * centred).sum(dim=2, keepdim=True) / centred.square().sum(dim=2, keepdim=True) * centred
    step *= 0.01 * x.norm() / step.norm()
    with model.splice(last, lambda _: x + step):
        up = model.logits(TOKENS)
    with model.splice(last, lambda _: x - step):
        down = model.logits(TOKENS)
    pairs = torch.stack([(up - down).flatten(0, 1), (step @ model.unembedding().T).flatten(0, 1)])
    return min(float(torch.corrcoef(pairs[:, i])[0, 1]) for i in range(pairs.shape[1]))


@pytest.mark.parametrize("family, changes", [("gemma3_text", {"head_dim": 8}), ("cohere", {}), ("granite", {})])
def test_the_unembedding_is_how_logits_move(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    model = LanguageModel.load(spec_of(saved(tmp_path, family, **changes)))
    for parameter in model.hf_model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    assert moves(model, Site(2)) > 0.99


def test_the_unembedding_behind_a_layer_norm_of_odd_width(tmp_path: Path) -> None:
    """No vector of as many ones as minus ones is so wide."""
    odd = {"vocab_size": 101, "n_embd": 9, "n_layer": 3, "n_head": 3, "n_positions": 32, "bos_token_id": 1}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **odd | ONE_EOS)).save_pretrained(tmp_path)
    model = LanguageModel.load(spec_of(tmp_path))
    norm = model.hf_model.transformer.ln_f
    norm.weight.data = torch.randn(9, generator=torch.Generator().manual_seed(0))
    W_U = model.hf_model.lm_head.weight * norm.weight
    torch.testing.assert_close(model.unembedding(), W_U - W_U.mean(dim=1, keepdim=True), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("change", ["a head of its own", "turned around", "no norm of the stream"])
def test_logits_that_are_no_linear_readout_have_no_unembedding(tmp_path: Path, change: str) -> None:
    model = LanguageModel.load(spec_of(saved(tmp_path, "llama")))
    hf_model = model.hf_model
    match change:
        case "a head of its own":
            hf_model.model.norm = nn.Sequential(hf_model.model.norm, nn.Linear(32, 32), nn.GELU())
        case "turned around":
            own = hf_model.forward
            hf_model.forward = lambda **options: negated(own(**options))
        case "no norm of the stream":
            hf_model.model.norm = Changed(nn.Linear(32, 32), torch.nn.functional.gelu)
    with pytest.raises(ModelError, match="are not a linear function of its normed residual stream"):
        model.unembedding()


def negated(output: Any) -> Any:
    output.logits = -output.logits
    return output


def test_a_prediction_head_is_no_linear_readout(tmp_path: Path) -> None:
    keys = {key: value for key, value in COMMON.items() if key != "bos_token_id"}
    torch.manual_seed(0)
    config = AutoConfig.for_model("modernbert-decoder", **keys | ONE_EOS)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="are not a linear function"):
        LanguageModel.load(spec_of(tmp_path)).unembedding()
