"""SAEs in a running model: against hooks written by hand, the definition of each edit, and a greedy loop."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import saerelay as sr
from saerelay.errors import ModelError, PlanError, RunDirectoryError
from saerelay.interop.origin import Origin
from saerelay.interop.own import as_info
from saerelay.lm.model import LanguageModel
from saerelay.planning.recipe import ModelSpec
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.layer_normed import LayerNormed
from saerelay.site import MODULE_KINDS, Site

BOS, F = 1, 40
SMALL = {"vocab_size": 101, "bos_token_id": BOS, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
                        "num_key_value_heads": 2, "head_dim": 16}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
}  # fmt: skip
PROMPT = torch.tensor([[BOS, 5, 9, 17], [BOS, 44, 8, 3]])
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
HOOKS: dict[str, dict[str, tuple[str, str]]] = {  # module and side, by hand
    "llama": {"resid_post": ("model.layers.1", "output"), "resid_pre": ("model.layers.1", "input"),
              "mlp_in": ("model.layers.1.mlp", "input"), "mlp_out": ("model.layers.1.mlp", "output"),
              "attn_out": ("model.layers.1.self_attn.o_proj", "output"),
              "attn_z": ("model.layers.1.self_attn.o_proj", "input")},
    "gpt2": {"resid_post": ("transformer.h.1", "output"), "resid_pre": ("transformer.h.1", "input"),
             "mlp_in": ("transformer.h.1.mlp", "input"), "mlp_out": ("transformer.h.1.mlp", "output"),
             "attn_out": ("transformer.h.1.attn.c_proj", "output"),
             "attn_z": ("transformer.h.1.attn.c_proj", "input")},
}  # fmt: skip


def build(family: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(CONFIGS[family][0], **SMALL | CONFIGS[family][1]))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def random_sae(width: int = 32, architecture: Any = "topk", seed: int = 0) -> Dictionary:
    draw = torch.Generator().manual_seed(seed)
    return Dictionary(
        architecture=architecture,
        W_enc=torch.randn(F, width, generator=draw),
        b_enc=torch.randn(F, generator=draw),
        W_dec=0.2 * torch.randn(F, width, generator=draw),
        b_dec=torch.randn(width, generator=draw),
        threshold=torch.rand(F, generator=draw) if architecture in ("jumprelu", "gated", "batchtopk") else None,
        k=5 if architecture in ("topk", "batchtopk") else None,
    )


@contextmanager
def hooked(model: Any, path: str, side: str, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    module = model.get_submodule(path)
    if side == "input":

        def before(_: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (function(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": function(kwargs["hidden_states"])}

        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(
            lambda _, __, out: (function(out[0]), *out[1:]) if isinstance(out, tuple) else function(out)
        )
    yield
    handle.remove()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="module", params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: build(name) for name in CONFIGS}


@pytest.fixture
def model(family: str, models: dict[str, Any]) -> Iterator[Any]:
    """A model, which no test may leave changed."""
    yield models[family]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in models[family].modules())


@pytest.fixture
def llama(models: dict[str, Any]) -> Any:
    return models["llama"]


def width(kind: str, family: str) -> int:
    return 64 if (kind, family) == ("attn_z", "llama") else 32


def logits_of(model: Any, tokens: Tensor = PROMPT, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, **options).logits


def not_bos(tokens: Tensor) -> Tensor:
    return (tokens != BOS)[..., None]


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_recording_changes_no_bit_and_gives_the_codes(model: Any, family: str, kind: Any) -> None:
    sae, seen = random_sae(width(kind, family)), []
    with hooked(model, *HOOKS[family][kind], lambda x: seen.append(x.detach().clone()) or x):
        clean = logits_of(model)
    with sr.attach(model, {Site(1, kind): sae}) as attached:
        assert torch.equal(logits_of(model), clean)
    tap = attached[Site(1, kind)]
    assert_close(tap.latents(), sae.encode(seen[0]) * not_bos(PROMPT), rtol=0, atol=1e-5)
    assert tap.codes().is_sparse and tap.codes().shape == (2, 4, F)
    assert tap.codes().values().numel() <= 2 * 3 * 5 < tap.latents().numel()
    assert torch.equal(tap.latents(7, 3), tap.latents()[..., [7, 3]])
    assert torch.equal(attached.tokens, PROMPT) and attached.sites == [Site(1, kind)]


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu", "gated", "batchtopk"])
@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_edits_are_their_definition(model: Any, family: str, kind: Any, architecture: Any) -> None:
    sae = random_sae(width(kind, family), architecture)

    def edited(z: Tensor) -> Tensor:
        z = z.clone()
        z[..., [3, 8]] = 0
        z[..., 11] = 2.5
        z[..., 20] += -1.5
        return z

    def keeping_the_error(x: Tensor) -> Tensor:
        z = sae.encode(x)
        error = x - sae.decode(z)
        return torch.where(not_bos(PROMPT), sae.decode(edited(z)) + error, x)

    def replacing(x: Tensor) -> Tensor:
        return torch.where(not_bos(PROMPT), sae.decode(edited(sae.encode(x))), x)

    def reconstructing(x: Tensor) -> Tensor:
        return torch.where(not_bos(PROMPT), sae(x), x)

    clean = logits_of(model)
    for replacement, edits, function in (
        (False, True, keeping_the_error),
        (True, True, replacing),
        (True, False, reconstructing),
    ):
        with hooked(model, *HOOKS[family][kind], function):
            expected = logits_of(model)
        with sr.attach(model, {Site(1, kind): sae}, replace=replacement) as attached:
            if edits:
                attached[1].ablate(3, 8)
                attached[1].set(11, 2.5)
                attached[1].steer(20, -1.0)
                attached[1].steer(20, -0.5)
            assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(expected, clean, rtol=1e-3, atol=1e-3)
            attached[1].reset()
            if not replacement:
                assert torch.equal(logits_of(model), clean)


def test_an_ablated_latent_changes_only_where_it_was_active_and_what_comes_later(llama: Any) -> None:
    sae = random_sae()
    with sr.attach(llama, {Site(2): sae}) as attached:
        clean = logits_of(llama)
        z = attached[2].latents()
        latent = next(j for j in range(F) if 0 < (z[..., j] > 0).sum() < 5)
        attached[2].ablate(latent)
        changed = (logits_of(llama) != clean).any(dim=2)
    assert torch.equal(changed, z[..., latent] > 0)  # the last layer's: no position reads another's


def test_an_sae_with_a_layer_norm_is_edited_in_units_of_its_deviation(llama: Any) -> None:
    sae = LayerNormed(random_sae())

    def edited(x: Tensor) -> Tensor:
        u, mean, deviation = sae.normalise(x)
        z = sae.dictionary.encode(u)
        w = sae.dictionary.W_dec[4]
        return torch.where(not_bos(PROMPT), x + deviation * (3 - z[..., 4:5]) * w, x)

    for replacement, function in ((False, edited), (True, lambda x: torch.where(not_bos(PROMPT), sae(x), x))):
        with hooked(llama, "model.layers.1", "output", function):
            expected = logits_of(llama)
        with sr.attach(llama, {Site(1): sae}, replace=replacement) as attached:
            if not replacement:
                attached[1].set(4, 3.0)
            assert_close(logits_of(llama), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("replacement", [True, False])
def test_generate_is_a_greedy_loop(model: Any, family: str, use_cache: bool, replacement: bool) -> None:
    sae, tokens = random_sae(), PROMPT
    for _ in range(12):  # by hand: all of the text anew for each token

        def edited(x: Tensor, tokens: Tensor = tokens) -> Tensor:
            z = sae.encode(x)
            y = sae.decode(z) if replacement else x
            return torch.where(not_bos(tokens), y - z[..., 3:4] * sae.W_dec[3] + 4.0 * sae.W_dec[9], x)

        seen: list[Tensor] = []
        with (
            hooked(model, *HOOKS[family]["resid_post"], lambda x, seen=seen: seen.append(x) or x),
            hooked(model, *HOOKS[family]["resid_post"], edited),
        ):
            tokens = torch.cat([tokens, logits_of(model, tokens)[:, -1:].argmax(dim=2)], dim=1)
    with sr.attach(model, {Site(1): sae}, replace=replacement) as attached:
        attached[1].ablate(3)
        attached[1].steer(9, 4.0)
        found = model.generate(PROMPT, max_new_tokens=12, use_cache=use_cache, **GREEDY)
    assert torch.equal(found, tokens)
    assert not torch.equal(found, model.generate(PROMPT, max_new_tokens=12, **GREEDY))
    assert torch.equal(attached.tokens, tokens[:, :-1])
    expected = sae.encode(seen[0]) * not_bos(tokens[:, :-1])
    assert_close(attached[1].latents(), expected, rtol=1e-4, atol=1e-4)


def test_left_padding_is_neither_changed_nor_recorded(model: Any) -> None:
    padded = torch.tensor([[0, 0, BOS, 5, 9], [BOS, 44, 8, 3, 7]])
    mask = (padded != 0).long()
    sae = random_sae()
    with sr.attach(model, {Site(1): sae}) as attached:
        attached[1].steer(9, 2.0)
        alone = model.generate(padded[:1, 2:], max_new_tokens=6, **GREEDY)
        codes_alone = attached[1].latents()
        both = model.generate(padded, attention_mask=mask, max_new_tokens=6, **GREEDY)
    assert torch.equal(both[0, 2:], alone[0])
    z = attached[1].latents()
    assert not z[0, :3].any() and not z[1, 0].any() and (z > 0).any(dim=2)[:, 3:].all()
    assert_close(z[0, 2:], codes_alone[0], rtol=1e-4, atol=1e-4)


def test_bos_is_touched_on_request(llama: Any) -> None:
    sae = random_sae()
    with sr.attach(llama, {Site(1): sae}, leave_alone=()) as attached:
        logits_of(llama)
        assert (attached[1].latents() > 0).any(dim=2).all()
        logits_of(llama, tokens=None, inputs_embeds=torch.randn(1, 3, 32))
        assert attached[1].latents().shape == (1, 3, F)
        with pytest.raises(ModelError, match="no token ids were recorded yet"):
            attached.tokens  # noqa: B018
    with sr.attach(llama, {Site(1): sae}, leave_alone=[5, 3]) as attached:
        logits_of(llama)
    assert torch.equal((attached[1].latents() > 0).any(dim=2), (PROMPT != 5) & (PROMPT != 3))


def test_a_cropped_cache_crops_the_record(llama: Any) -> None:
    """Assisted generation reads tokens that it then takes back."""
    sae, torch_state = random_sae(), torch.get_rng_state()
    torch.manual_seed(1)
    assistant = build("llama")
    for parameter in assistant.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    torch.set_rng_state(torch_state)
    with sr.attach(llama, {Site(1): sae}) as attached:
        plain = llama.generate(PROMPT[:1], max_new_tokens=12, **GREEDY)
        expected = attached[1].latents()
        found = llama.generate(PROMPT[:1], max_new_tokens=12, assistant_model=assistant, **GREEDY)
    assert torch.equal(found, plain)
    n = expected.shape[1]
    assert torch.equal(attached.tokens[:, :n], plain[:, :n])
    assert_close(attached[1].latents()[:, :n], expected, rtol=1e-4, atol=1e-4)


def test_samples_are_recorded_as_they_were_read(model: Any, family: str) -> None:
    sae = random_sae()
    with sr.attach(model, {Site(1): sae}) as attached:
        sampled = {**GREEDY, "do_sample": True, "num_return_sequences": 2}
        texts = model.generate(PROMPT, max_new_tokens=5, **sampled)
    assert texts.shape == (4, 9) and torch.equal(attached.tokens, texts[:, :-1])
    seen: list[Tensor] = []
    with hooked(model, *HOOKS[family]["resid_post"], lambda x: seen.append(x) or x):
        logits_of(model, texts[:, :-1])
    expected = sae.encode(seen[0]) * not_bos(texts[:, :-1])
    assert_close(attached[1].latents(), expected, rtol=1e-4, atol=1e-4)


def test_beams_have_a_row_each(model: Any) -> None:
    with sr.attach(model, {Site(1): random_sae()}, replace=True) as attached:
        attached[1].ablate(2)
        model.generate(PROMPT, max_new_tokens=5, num_beams=3, **GREEDY)
    z = attached[1].latents()
    assert z.shape == (6, 8, F) and attached.tokens.shape == (6, 8)
    assert torch.equal((z > 0).any(dim=2), attached.tokens != BOS)


def test_in_a_bfloat16_model_codes_are_those_of_its_activations() -> None:
    model = build("llama").bfloat16()
    sae, seen = random_sae(), []
    with hooked(model, "model.layers.1", "output", lambda x: seen.append(x.clone()) or x):
        clean = logits_of(model)
    with sr.attach(model, {Site(1): sae}) as attached:
        assert torch.equal(logits_of(model), clean) and clean.dtype == torch.bfloat16
    assert torch.equal(attached[1].latents(), sae.encode(seen[0].float()) * not_bos(PROMPT))
    with sr.attach(model, {Site(1): sae}, replace=True):
        assert logits_of(model).dtype == torch.bfloat16


def test_gradients_are_unchanged_by_recording_and_follow_the_formula_of_edits(llama: Any) -> None:
    """Recording leaves them as they are; edits are differentiated as their formula."""

    def gradient() -> Tensor:
        x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        llama(inputs_embeds=x).logits[0, -1, 7].backward()
        llama.zero_grad()
        assert x.grad is not None
        return x.grad

    sae, clean = random_sae(architecture="relu"), gradient()
    with sr.attach(llama, {Site(1): sae}) as attached:
        assert torch.equal(gradient(), clean) and not attached[1].latents().requires_grad
        attached[1].ablate(3, 5)
        found = gradient()
        assert not attached[1].latents().requires_grad
    with hooked(llama, "model.layers.1", "output", lambda x: x - sae.encode(x)[..., [3, 5]] @ sae.W_dec[[3, 5]]):
        assert_close(found, gradient(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, clean, rtol=1e-3)


def test_layers_that_run_twice_are_recorded_once() -> None:
    model = build("llama").train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    passed = []
    recorded = hooked(model, "model.layers.1.self_attn.o_proj", "input", lambda x: passed.append(x) or x)
    with sr.attach(model, {Site(1, "attn_z"): random_sae(64)}) as attached, recorded:
        model(PROMPT).logits.sum().backward()
    assert len(passed) == 2 and attached[1].latents().shape == (2, 4, F)


def test_nothing_stays_behind_and_blocks_may_be_nested(model: Any) -> None:
    sae, other = random_sae(), random_sae(seed=1)
    clean = logits_of(model)
    with pytest.raises(KeyboardInterrupt), sr.attach(model, {Site(0): sae, Site(1): sae}, replace=True):
        raise KeyboardInterrupt
    assert torch.equal(logits_of(model), clean)
    with sr.attach(model, {Site(1): sae}, replace=True) as outer:
        alone = logits_of(model)
        with sr.attach(model, {Site(1): other, Site(2): other}) as inner:
            assert torch.equal(logits_of(model), alone)
        assert torch.equal(logits_of(model), alone)
    assert outer[1].latents().any() and inner.sites == [Site(1), Site(2)]
    seen: list[Tensor] = []
    next_layer = "transformer.h.2" if hasattr(model, "transformer") else "model.layers.2"
    recorded = hooked(model, next_layer, "input", lambda x: seen.append(x) or x)
    with sr.attach(model, {Site(1): sae}, replace=True), sr.attach(model, {Site(1): other}) as inner, recorded:
        logits_of(model)
    assert_close(inner[1].latents(), other.encode(seen[0]) * not_bos(PROMPT), rtol=0, atol=1e-5)


def test_a_model_that_cannot_be_copied_is_attached_to() -> None:
    model = build("llama")
    model.lock = threading.Lock()
    with sr.attach(model, {Site(1): random_sae()}) as attached:
        logits_of(model)
    assert attached[1].latents().shape == (2, 4, F)


def test_many_rows_are_encoded_in_parts(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, found = random_sae(), []
    for rows in (1024, 4):
        monkeypatch.setattr("saerelay.lm.attach.ROWS_AT_ONCE", rows)
        with sr.attach(llama, {Site(1): sae}, replace=True) as attached:
            found.append((logits_of(llama), attached[1].latents()))
    assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_an_encoder_is_read_without_bos_and_padding() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", **SMALL, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                                  intermediate_size=48)  # fmt: skip
    bert = AutoModel.from_config(config).eval()
    padded = torch.tensor([[BOS, 5, 9, 17], [BOS, 44, 0, 0]])
    with torch.no_grad(), sr.attach(bert, {Site(2, "mlp_out"): random_sae()}, replace=True) as attached:
        bert(padded, attention_mask=(padded != 0).long())
    assert torch.equal((attached[2].latents() > 0).any(dim=2), padded > BOS)


def test_sites_widths_and_latents_that_do_not_exist_are_refused(llama: Any) -> None:
    sae = random_sae()
    out_of_range = pytest.raises(PlanError, match='L7: "LlamaForCausalLM" has 3 layers; layers go from 0 to 2')
    with out_of_range, sr.attach(llama, {Site(7): sae}):
        pass
    too_narrow = pytest.raises(ModelError, match=r"L1.attn_z: this SAE reads activations 32 wide, .* are 64 wide. Att")
    with too_narrow, sr.attach(llama, {Site(1, "attn_z"): sae}):
        pass
    with sr.attach(llama, {Site(1): sae, Site(1, "mlp_out"): sae}) as attached:
        with pytest.raises(ModelError, match="no SAE is attached at 0; SAEs are attached at: L1.mlp_out, L1"):
            attached[0]
        with pytest.raises(ModelError, match="several SAEs are attached at 1"):
            attached[1]
        with pytest.raises(ModelError, match="no activations have passed L1 yet"):
            attached[Site(1)].latents()
        for wrong in (-1, F, "3"):
            with pytest.raises(ModelError, match=f"L1: no latent {wrong!r}; latents are numbered 0 to {F - 1}"):
                attached[Site(1)].ablate(wrong)


class Wrapper(torch.nn.Module):
    """What `peft` does: the model stands in a module of a module."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model = torch.nn.ModuleDict({"model": model})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model["model"](*args, **kwargs)


def test_a_forward_may_enter_by_any_module(llama: Any) -> None:
    """The model, its base model, a wrapper; and OPT, which does not call its base model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("opt", **SMALL, hidden_size=32, ffn_dim=48, num_hidden_layers=3,
                                  num_attention_heads=4,
                                  word_embed_proj_dim=32)  # fmt: skip
    opt = AutoModelForCausalLM.from_config(config).eval()
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    for model, entered in ((opt, (opt, opt.model, opt.model.decoder)), (llama, (llama, llama.model, Wrapper(llama)))):
        found = []
        for entry in entered:
            with (
                torch.no_grad(),
                sr.attach(entry if isinstance(entry, Wrapper) else model, {Site(1): random_sae()}) as attached,
            ):
                entry(input_ids=PROMPT, attention_mask=mask)
            found.append(attached[1].latents())
            assert torch.equal(attached.tokens, PROMPT)
        assert found[0].any() and not found[0][:, 0].any()
        for z in found[1:]:
            assert_close(z, found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mamba", "rwkv", "bamba"])
def test_a_recurrent_state_continues_what_was_recorded(family: str) -> None:
    torch.manual_seed(0)
    keys: dict[str, Any] = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48}
    match family:
        case "mamba":
            keys |= {"state_size": 4}
        case "rwkv":
            keys |= {"attention_hidden_size": 32}
        case "bamba":
            keys |= {"num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 8, "mamba_d_head": 8,
                     "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8,
                     "attn_layer_indices": [1]}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **keys)).eval()
    prompt = torch.tensor([[5, 6, 7]])
    with sr.attach(model, {Site(1): random_sae()}, leave_alone=()) as attached:
        for _ in range(2):  # a second text starts anew
            tokens = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, **GREEDY)
            z = attached[1].latents()
            assert torch.equal(attached.tokens, tokens[:, :-1])
        logits_of(model, tokens[:, :-1])
    assert_close(z, attached[1].latents(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padding_is_seen_whatever_the_cache_makes_of_the_mask(llama: Any, cache: str) -> None:
    padded = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 0, 11, 12, 13]])
    options = {
        **GREEDY,
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "cache_implementation": cache,
        "disable_compile": True,
    }
    with sr.attach(llama, {Site(1): random_sae()}, leave_alone=()) as attached:
        llama.generate(padded, attention_mask=(padded != 0).long(), **options)
    fires = (attached[1].latents() > 0).any(dim=2)
    assert fires.shape == (2, 8) and not fires[1, :3].any() and fires[0].all() and fires[1, 3:].all()


def test_what_cannot_be_told_apart_is_an_error_and_not_lost(llama: Any) -> None:
    with sr.attach(llama, {Site(1): random_sae()}):
        with pytest.raises(ModelError, match=r"L1: activations of the shape \(1, 4, 32\) passed here"):
            x = torch.randn(1, 4, 32)
            llama.model.layers[1](x, position_embeddings=llama.model.rotary_emb(x, torch.arange(4)[None]))
        with pytest.raises(ModelError, match="padding cannot be read from an attention mask of type str"):
            llama(input_ids=PROMPT, attention_mask="all")


# --- suites -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> sr.Suite:
    """Two layers of the demo model, random: only where they are attached matters here."""
    from saerelay.files import write_text
    from saerelay.lm.facts import read_facts
    from saerelay.planning.compile import compile_plan
    from saerelay.runs.dictionaries import publish
    from saerelay.runs.directory import RunDirectory

    root = tmp_path_factory.mktemp("suite")
    recipe = {"sites": {"layers": [2, 5]}, "dictionary": {"n_latents": F, "k": 4}, "model": {"device": "cpu"},
              "plan": {"root_tokens": 8192, "transfer_tokens": 2048, "controls": [2]}}  # fmt: skip
    run = sr.Run.parse(recipe, source="test")
    plan = compile_plan(run, read_facts(run.model))
    write_text(root / "plan.json", plan.to_json())
    for seed, leg in enumerate(plan.legs):
        publish(RunDirectory(root).leg(leg.id), random_sae(192, seed=seed), as_info(Origin(site=leg.site)))
    return sr.load(root)


@pytest.fixture(scope="module")
def demo() -> LanguageModel:
    return LanguageModel.load(ModelSpec(device="cpu", dtype="float32"))


def test_a_suite_attached_to_its_model_is_its_dictionaries(suite: sr.Suite, demo: LanguageModel) -> None:
    tokens = torch.tensor([[0, 5, 7, 9, 300]])
    clean = demo.logits(tokens)
    x = demo.harvest(tokens, [Site(2), Site(5)])
    with suite.attach(demo) as attached:
        assert torch.equal(demo.logits(tokens), clean) and attached.sites == [Site(2), Site(5)]
    for site in attached.sites:
        assert_close(attached[site].latents()[:, 1:], suite[site].encode(x[site])[:, 1:], rtol=1e-4, atol=1e-3)
        assert not attached[site].latents()[:, 0].any()
    with suite.attach(demo.hf_model, layers=[5], replace=True) as attached:
        assert attached.sites == [Site(5)]
        found = demo.logits(tokens)
    with demo.splice(Site(5), lambda x: torch.cat([x[:, :1], suite[Site(5)](x[:, 1:])], dim=1)):
        assert_close(found, demo.logits(tokens), rtol=1e-4, atol=1e-3)


def test_a_suite_is_attached_to_another_model_only_if_it_has_the_same_shape(suite: sr.Suite, llama: Any) -> None:
    with pytest.raises(ModelError, match=r"trained on demo \(8 layers, 192 wide\); this model .* 3 layers, 32 wide"):
        suite.attach(llama)
    with pytest.raises(RunDirectoryError, match="no dictionary at L4; the run has dictionaries at: L2, L5"):
        suite.attach(LanguageModel.load(ModelSpec(device="cpu")), layers=[4])
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", **SMALL, n_embd=192, n_layer=8, n_head=4, n_positions=64)
    same_shape = AutoModelForCausalLM.from_config(config).eval()
    with suite.attach(same_shape) as attached:
        logits_of(same_shape)
    assert attached[5].latents().shape == (2, 4, F)
