"""Every model family against transformers' own hidden states and the sum of the parts; errors and their remedies."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from logging import Handler, getLogger
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from saerelay.errors import ModelError, PlanError
from saerelay.lm.facts import read_facts
from saerelay.lm.model import LanguageModel
from saerelay.lm.tokens import load_tokenizer
from saerelay.planning.recipe import ModelSpec
from saerelay.sae.threads import alone, in_parallel
from saerelay.site import MODULE_KINDS, ModuleKind, Site

SMALL = {"vocab_size": 101, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}
COMMON = SMALL | {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = COMMON | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 16}  # 4 heads x 16 = 64, twice the model's width
ONE_EOS = {"eos_token_id": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "neox_parallel": ("gpt_neox", COMMON | ONE_EOS | {"use_parallel_residual": True}),
    "neox_sequential": ("gpt_neox", COMMON | ONE_EOS | {"use_parallel_residual": False}),
    "gpt2": ("gpt2", SMALL | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32, "eos_token_id": 2}),
    "llama": ("llama", GROUPED),
    "mistral": ("mistral", GROUPED | ONE_EOS | {"sliding_window": None}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", WIDE),
    "gemma": ("gemma", WIDE),
    "gemma2": ("gemma2", WIDE),
    "gemma3": ("gemma3_text", WIDE),
    "bert": ("bert", COMMON | ONE_EOS),
    "falcon": (
        "falcon",
        COMMON | {"parallel_attn": True, "num_kv_heads": 4},
    ),  # layers return tuples, and add to mlp_out in place
}
POST_NORM = {"gemma2", "gemma3"}
TOKENS = torch.arange(3, 17).reshape(2, 7)
ALL = [Site(layer, kind) for layer in range(3) for kind in MODULE_KINDS]


def build(directory: Path, family: str, **changes: Any) -> Path:
    """A random model, all of whose weights (norms and biases too) matter, saved as transformers saves it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(FAMILIES[family][0], **FAMILIES[family][1] | changes)
    model = (AutoModel if family == "bert" else AutoModelForCausalLM).from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory


def spec_of(directory: Path, **changes: Any) -> ModelSpec:
    return ModelSpec(**{"name": str(directory), "dtype": "float32", "device": "cpu"} | changes)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are so small that threads would only wait for each other."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: build(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


@pytest.fixture(scope="session")
def model(family: str, directories: dict[str, Path]) -> LanguageModel:
    return LanguageModel.load(spec_of(directories[family]))


@pytest.fixture(scope="session")
def llama(directories: dict[str, Path]) -> LanguageModel:
    return LanguageModel.load(spec_of(directories["llama"]))


@pytest.fixture(scope="session")
def found(model: LanguageModel) -> dict[Site, Tensor]:
    return model.harvest(TOKENS, ALL)


@pytest.fixture(scope="session")
def reference(family: str, directories: dict[str, Path]) -> Any:
    return AutoModel.from_pretrained(directories[family]).eval()


def last_norm(reference: Any) -> Any:
    names = ("norm", "ln_f", "final_layer_norm")
    return next((getattr(reference, name) for name in names if hasattr(reference, name)), torch.nn.Identity())


def test_residual_stream_is_transformers_hidden_states(found: dict[Site, Tensor], reference: Any) -> None:
    with torch.no_grad():
        output = reference(input_ids=TOKENS, output_hidden_states=True)
        for layer in range(3):
            assert_close(found[Site(layer, "resid_pre")], output.hidden_states[layer], rtol=0, atol=0)
        for layer in range(2):
            assert_close(found[Site(layer)], output.hidden_states[layer + 1], rtol=0, atol=0)
        assert_close(last_norm(reference)(found[Site(2)]), output.last_hidden_state, rtol=0, atol=0)


def test_a_layer_adds_what_attention_and_mlp_give(family: str, found: dict[Site, Tensor], reference: Any) -> None:
    for i in range(3):
        pre, attention, mlp = (found[Site(i, kind)] for kind in ("resid_pre", "attn_out", "mlp_out"))
        total = pre + attention + mlp
        if family == "bert":  # norms after each addition
            layer = reference.encoder.layer[i]
            total = layer.output.LayerNorm(layer.attention.output.LayerNorm(pre + attention) + mlp).detach()
        assert_close(found[Site(i)], total, rtol=1e-5, atol=1e-5)


def test_attention_out_and_mlp_out_are_told_apart(family: str, found: dict[Site, Tensor], reference: Any) -> None:
    """Their sum does not say which is which; what the output projection makes of attn_z does."""
    paths = ("layers.1", "h.1", "encoder.layer.1")
    layer = next(m for name, m in reference.named_modules() if name in paths)
    names = ("self_attn.o_proj", "attention.dense", "attn.c_proj", "attention.output.dense", "self_attention.dense")
    projection = next(m for name, m in layer.named_modules() if name in names)
    with torch.no_grad():
        out = projection(found[Site(1, "attn_z")])
        if family in POST_NORM:
            out = layer.post_attention_layernorm(out)
    assert_close(found[Site(1, "attn_out")], out, rtol=1e-5, atol=1e-5)


def test_facts(family: str, model: LanguageModel, reference: Any) -> None:
    facts = model.facts
    assert (facts.family, facts.n_layers, facts.d_model) == (FAMILIES[family][0], 3, 32)
    assert facts.d_attn_z == (64 if "head_dim" in FAMILIES[family][1] else 32)
    assert (facts.tokens.vocab_size, facts.tokens.bos_token_id, facts.tokens.eos_token_id) == (101, 1, 2)
    assert facts.tokens.max_context == 32
    assert facts.has_lm_head == (family != "bert")
    parameters = dict(model._model.named_parameters())
    assert facts.model_params == sum(p.numel() for p in parameters.values())
    in_layer_1 = sum(p.numel() for name, p in parameters.items() if ".1." in name)
    assert facts.layer_params == in_layer_1
    assert not any(p.requires_grad for p in parameters.values()) and not model._model.training


def test_harvested_tensors_are_plain_copies(model: LanguageModel, found: dict[Site, Tensor]) -> None:
    assert list(found) == ALL
    for site, x in found.items():
        assert x.shape == (2, 7, model.facts.width(site)) and x.dtype == torch.float32
        assert not x.is_inference() and not x.requires_grad
    assert len({x.data_ptr() for x in found.values()}) == len(ALL)
    weight = torch.ones(32, requires_grad=True)
    (found[Site(0)] @ weight).sum().backward()  # an inference tensor could not be saved for backward
    for site in (Site(1), Site(2, "mlp_out")):
        assert torch.equal(model.harvest(TOKENS, [site, site])[site], found[site])


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
        module, side = model._locate(Site(layer, kind))
        n = whole.index(("begin" if side == "input" else "end", module)) + 1
        sites = [Site(0, "resid_pre"), Site(layer, kind)]
        assert passage(model, partial(model.harvest, TOKENS, sites)) == whole[:n]
        assert n < len(whole)
    assert passage(model, lambda: model.harvest(TOKENS, [])) == [] and model.harvest(TOKENS, []) == {}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model._layers.modules())


def test_visitors_see_what_harvest_copies(model: LanguageModel, found: dict[Site, Tensor]) -> None:
    seen: dict[Site, Tensor] = {}
    kept = {site: torch.empty_like(x) for site, x in found.items()}

    def look(site: Site, x: Tensor) -> None:
        assert x.is_inference() and torch.is_inference_mode_enabled()
        kept[site].copy_(x)
        seen[site] = x

    model.visit(TOKENS, {site: partial(look, site) for site in ALL})
    for site in ALL:
        assert torch.equal(kept[site], found[site]) and not kept[site].is_inference()
    assert seen.keys() == found.keys() and not torch.is_inference_mode_enabled()


def test_splice(family: str, model: LanguageModel, found: dict[Site, Tensor]) -> None:
    if family == "bert":
        with pytest.raises(ModelError, match=r"\(bert\) has no language-model head. CE metrics need one"):
            model.logits(TOKENS)
        return
    logits = model.logits(TOKENS)
    assert logits.shape == (2, 7, 101) and logits.dtype == torch.float32
    for site in ALL:
        with model.splice(site, lambda x: x):
            assert torch.equal(model.logits(TOKENS), logits), site
        with model.splice(site, lambda x, site=site: found[site].double()):
            assert torch.equal(model.logits(TOKENS), logits), site
        with model.splice(site, torch.zeros_like):
            assert not torch.allclose(model.logits(TOKENS), logits), site
            assert not model.harvest(TOKENS, [site])[site].any()
    others = TOKENS.flip(0, 1)
    there = model.harvest(others, [Site(2)])[Site(2)]
    with model.splice(Site(2), lambda _: there):
        assert torch.equal(model.logits(TOKENS), model.logits(others))
    assert torch.equal(model.logits(TOKENS), logits)


def test_resuming_in_the_middle_is_splicing(family: str, model: LanguageModel, found: dict[Site, Tensor]) -> None:
    if family == "bert":
        with pytest.raises(ModelError, match=r"\(bert\) has no language-model head. CE metrics need one"):
            model.forward(TOKENS, ALL)
        return
    clean, calls = model.forward(TOKENS, ALL), []
    assert torch.equal(clean.logits, model.logits(TOKENS))
    for site in ALL:
        assert torch.equal(clean.activations[site], found[site]), site
        x = torch.randn(found[site].shape, generator=torch.Generator().manual_seed(1))
        with model.splice(site, lambda _, x=x: x.clone()):
            expected = model.logits(TOKENS)
        with model.resuming(clean, site) as logits_with:  # tries whether the model can
            counter = register_module_forward_hook(lambda module, *_: calls.append(type(module).__name__))
            assert torch.equal(logits_with(x), expected), site
            counter.remove()
            with alone():
                own, others = in_parallel(logits_with, [found[site], x])
        assert torch.equal(own, clean.logits) and torch.equal(others, expected), site
        n_mlps = sum(name.endswith("MLP") for name in calls)
        assert n_mlps == 3 - site.layer - (site.module == "resid_post"), (site, calls)
        calls.clear()
    assert torch.equal(model.logits(TOKENS), clean.logits)


def test_a_model_that_cannot_resume_runs_whole(directories: dict[str, Path]) -> None:
    model = LanguageModel.load(spec_of(directories["llama"]))
    first, last = model._layers[0], model._layers[2]
    run, memory = last.forward, {}
    first.mlp.register_forward_hook(lambda _, __, output: memory.update(x=output))
    last.forward = lambda x, **options: run(x + memory.pop("x"), **options)  # what later layers of Gemma 3n do
    clean = model.forward(TOKENS, [Site(1)])
    x = torch.randn(clean.activations[Site(1)].shape, generator=torch.Generator().manual_seed(1))
    with model.splice(Site(1), lambda _: x):
        expected = model.logits(TOKENS)
    with model.resuming(clean, Site(1)) as logits_with:
        assert torch.equal(logits_with(x), expected) and model._resumes == {2: False}


def test_splice_goes_when_its_block_fails(llama: LanguageModel) -> None:
    logits = llama.logits(TOKENS)
    with pytest.raises(AssertionError, match=r"L1: spliced \(2, 7, 31\) into \(2, 7, 32\)"):
        with llama.splice(Site(1), lambda x: x[..., 1:]):
            llama.logits(TOKENS)
    assert torch.equal(llama.logits(TOKENS), logits)


def test_bfloat16(directories: dict[str, Path]) -> None:
    model = LanguageModel.load(spec_of(directories["llama"], dtype="bfloat16"))
    assert model.harvest(TOKENS, [Site(1)])[Site(1)].dtype == torch.bfloat16
    with model.splice(Site(1), lambda x: x.float()):
        assert model.logits(TOKENS).dtype == torch.float32


def test_sites_that_are_not_there(llama: LanguageModel, tmp_path: Path) -> None:
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
    told = r"L1.mlp_out: .*of mamba\. Looked for mlp.dense_4h_to_h, mlp, .*These work there: resid_post, resid_pre\."
    with pytest.raises(ModelError, match=told):
        mamba.check_site(Site(1, "mlp_out"))


@pytest.mark.parametrize("name, changes", [("granite", {"residual_multiplier": 0.5}), ("doge", {})])
def test_blocks_that_are_rescaled_are_refused(tmp_path: Path, name: str, changes: dict[str, float]) -> None:
    config = AutoConfig.for_model(name, **GROUPED | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = LanguageModel.load(spec_of(tmp_path))
    model.check_site(Site(0, "attn_z"))
    for kind in ("attn_out", "mlp_out"):
        with pytest.raises(ModelError, match="These work there: resid_post, resid_pre, attn_z"):
            model.check_site(Site(0, kind))


def test_a_backbone_without_its_head_has_none(directories: dict[str, Path], tmp_path: Path) -> None:
    backbone = AutoModel.from_pretrained(directories["llama"])
    backbone.save_pretrained(tmp_path)
    model = LanguageModel.load(spec_of(tmp_path))
    assert not model.facts.has_lm_head
    tokens = LanguageModel.load(spec_of(directories["llama"])).harvest(TOKENS, [Site(2)])[Site(2)]
    assert torch.equal(model.harvest(TOKENS, [Site(2)])[Site(2)], tokens)


def test_missing_weights_are_an_error(directories: dict[str, Path], tmp_path: Path) -> None:
    AutoModel.from_pretrained(directories["llama"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ModelError, match=r"lack 1 tensors \(lm_head.weight\), which would be random"):
        LanguageModel.load(spec_of(tmp_path))


def test_the_demo_model_and_its_tokenizer() -> None:
    facts, tokenizer = read_facts(ModelSpec()), load_tokenizer(ModelSpec())
    assert (facts.name, facts.tokens.max_context, facts.has_lm_head, facts.tokens.vocab_size) == (
        "demo",
        512,
        True,
        4096,
    )
    assert (facts.tokens.bos_token_id, facts.tokens.eos_token_id) == (0, 0)
    assert tokenizer.is_fast and len(tokenizer) == 4096
    assert (tokenizer.bos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert facts.dtype in ("float32", "bfloat16")


def test_models_without_tokenizer(family: str, directories: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="has no fast tokenizer. Put a tokenizer.json beside its config.json, or give"):
        load_tokenizer(spec_of(directories[family]))


def test_a_slow_tokenizer_is_refused(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    slow = transformers.ByT5Tokenizer()
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: slow)
    with pytest.raises(ModelError, match="has no fast tokenizer"):
        load_tokenizer(spec_of(directories["llama"]))


def test_tokenizer_decides_on_special_tokens(tmp_path: Path) -> None:
    build(tmp_path, "bert")
    words = {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "hi": 3}
    tokenizer = transformers.BertTokenizerFast(
        vocab=words, cls_token="[CLS]", sep_token="[SEP]", pad_token="[UNK]", mask_token="[UNK]"
    )
    tokenizer.save_pretrained(tmp_path)
    facts = read_facts(spec_of(tmp_path))
    assert (facts.tokens.bos_token_id, facts.tokens.eos_token_id) == (0, 1)


@pytest.mark.parametrize("name, text, head", [("gemma3", "gemma3_text", True), ("llava", "llama", False)])
def test_models_that_also_see(tmp_path: Path, name: str, text: str, head: bool) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = AutoConfig.for_model(
        name,
        text_config=GROUPED | {"model_type": text, "head_dim": 8},
        vision_config=vision | {"model_type": "siglip_vision_model", "num_hidden_layers": 3},
    )
    (AutoModelForCausalLM if head else AutoModelForImageTextToText).from_config(config).save_pretrained(tmp_path)
    model = LanguageModel.load(spec_of(tmp_path))
    assert (model.facts.n_layers, model.facts.d_model, model.facts.has_lm_head) == (3, 32, head)
    assert model.harvest(TOKENS, ALL)[Site(2)].shape == (2, 7, 32)


def test_roberta_positions_start_after_padding(tmp_path: Path) -> None:
    config = AutoConfig.for_model("roberta", **COMMON | {"pad_token_id": 1, "max_position_embeddings": 34})
    AutoModel.from_config(config).save_pretrained(tmp_path)
    model = LanguageModel.load(spec_of(tmp_path))
    assert model.facts.tokens.max_context == 32
    model.harvest(torch.full((1, 32), 5), [Site(0)])
    with pytest.raises((IndexError, RuntimeError)):
        model.harvest(torch.full((1, 33), 5), [Site(0)])


def raising(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let every download fail, as late as possible, so that transformers wraps the error as it does."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(transformers.utils.hub, name, fail)


def http_error(kind: type[hub.HfHubHTTPError]) -> Exception:
    error = kind.__new__(kind, "denied")
    Exception.__init__(error, "denied")
    return error


@pytest.mark.parametrize(
    "error, told",
    [
        (
            http_error(hub.GatedRepoError),
            '"no/x" is gated: accept the licence at https://huggingface.co/no/x and run `hf auth login`.',
        ),
        (http_error(hub.RepositoryNotFoundError), '"no/x" is not on the hub. Check the name'),
        (http_error(hub.RevisionNotFoundError), '"no/x" has no revision "v9"'),
        (http_error(hub.HfHubHTTPError), "Check the name, the network, or pass a local directory."),
        (hub.LocalEntryNotFoundError("away"), "Check the name, the network, or pass a local directory."),
        (hub.OfflineModeIsEnabled("off"), "Check the name, the network, or pass a local directory."),
        (hub.HTTPError("no route"), "Check the name, the network, or pass a local directory."),
        (OSError("disk on fire"), "cannot be loaded. Check its files, .*disk on fire"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, error: Exception, told: str) -> None:
    raising(monkeypatch, error)
    for function in (read_facts, load_tokenizer, LanguageModel.load):
        with pytest.raises(ModelError, match=told) as caught:
            function(ModelSpec(name="no/x", revision="v9"))
        assert caught.value.__suppress_context__ and caught.value.__cause__ is None and "\n" not in str(caught.value)


def test_malformed_names_are_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def online(*_: object, **__: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr("huggingface_hub.file_download._request_wrapper", online, raising=False)
    monkeypatch.setattr("huggingface_hub.utils._http.get_session", online)
    for name in ("bad name!!", "a/b/c"):
        with pytest.raises(ModelError, match="is neither a directory nor a possible hub id"):
            read_facts(ModelSpec(name=name))


def test_hub_commit_is_the_revision(monkeypatch: pytest.MonkeyPatch, directories: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(directories["llama"])
    config._commit_hash = "c0ffee"
    asked = set()

    def pretend(source: str, **options: Any) -> Any:
        asked.add((source, options.get("revision"), options.get("local_files_only", False)))
        return config

    monkeypatch.setattr(AutoConfig, "from_pretrained", pretend)
    raising(monkeypatch, OSError("no file"))
    assert read_facts(ModelSpec(name="some/llama", revision="main")).revision == "c0ffee"
    assert asked == {("some/llama", "main", False)}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", pretend)
    with pytest.raises(ModelError, match="too many values to unpack"):  # a configuration is no (model, report)
        LanguageModel.load(ModelSpec(name="some/llama", revision="main"))
    assert asked == {("some/llama", "main", False), ("some/llama", "c0ffee", False)}
    asked.clear()
    read_facts(spec_of(directories["gpt2"]))
    assert asked == {(str(directories["gpt2"]), None, True)}


def test_local_directories(tmp_path: Path, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for name in ("./gone", "/no/where", "~/no/where", "file"):
        with pytest.raises(ModelError, match="no such directory. Pass one with a config.json"):
            read_facts(ModelSpec(name=name))
    with pytest.raises(ModelError, match="has no config.json, so it holds no Hugging Face model"):
        read_facts(spec_of(tmp_path))
    for text in ("{bad", "{}", '{"model_type": "nosuch"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match="cannot be loaded. Check its files, and that transformers knows"):
            read_facts(spec_of(tmp_path))
    (tmp_path / "here").symlink_to(directories["llama"])
    assert read_facts(spec_of(Path("here"))).family == "llama"


def test_bad_weights(tmp_path: Path, directories: dict[str, Path]) -> None:
    (tmp_path / "config.json").write_text((directories["llama"] / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="no weights as safetensors. If it has pickled ones .*, convert them once"):
        LanguageModel.load(spec_of(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"rubbish" * 10)
    with pytest.raises(ModelError, match="cannot be loaded.*header"):
        LanguageModel.load(spec_of(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((directories["mistral"] / "model.safetensors").read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        LanguageModel.load(spec_of(tmp_path))


def test_encoder_decoders_and_foreign_code_are_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("t5", vocab_size=101, d_model=32, num_layers=2, num_heads=2, d_ff=16, d_kv=8)
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\(t5\) is not one stack of layers that all tokens pass"):
        read_facts(spec_of(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}))
    with pytest.raises(ModelError, match="needs Python code of its own.*set model.trust_remote_code = true"):
        read_facts(spec_of(tmp_path))


def test_devices_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "cuda:1", "mps"):
        with pytest.raises(ModelError, match=f'device "{device}" is not there: .* Use device = "auto" or "cpu"'):
            read_facts(ModelSpec(device=device))
    with pytest.raises(ModelError, match='no device "gpu"; use "auto", "cpu", "cuda", "cuda:1" or "mps"'):
        read_facts(ModelSpec(device="gpu"))
    assert read_facts(ModelSpec()).device == "cpu"
    for amx, avx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert read_facts(ModelSpec()).dtype == ("bfloat16" if amx or avx else "float32")
    assert read_facts(ModelSpec(dtype="float16")).dtype == "float16"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    facts = read_facts(ModelSpec())
    assert (facts.device, facts.dtype) == ("cuda", "bfloat16")


def test_loading_is_silent_and_leaves_settings_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    def settings() -> tuple[bool, bool, int]:
        return logging.is_progress_bar_enabled(), are_progress_bars_disabled(), logging.get_verbosity()

    before, records, handler = settings(), [], Handler()
    handler.emit = records.append
    getLogger("transformers").addHandler(handler)
    config = AutoConfig.for_model("bert", **COMMON | ONE_EOS)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)  # its head is left over, its pooler is missing
    capfd.readouterr()
    try:
        logging.set_verbosity_info()
        for change in (logging.disable_progress_bar, logging.enable_progress_bar, disable_progress_bars):
            change()
            changed = settings()
            LanguageModel.load(spec_of(tmp_path))
            assert settings() == changed
    finally:
        getLogger("transformers").removeHandler(handler)
        logging.set_verbosity(before[2])
        if before[0]:
            logging.enable_progress_bar()
        if before[1]:
            disable_progress_bars()
    assert capfd.readouterr() == ("", "") and not [r for r in records if "Loading" in r.msg or "LOAD" in r.msg]


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
