"""GGUF files, adapters and quantised models: what is read from them, whole runs on them, and what is refused."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants as hub_constants
from model_families import ALL_SITES, TOKENS, build, spec_of
from model_formats import add_quantisation, write_adapter, write_fp8, write_gguf, write_int8
from small_recipe import recipe

from saerelay.analysis.suite import load
from saerelay.errors import ModelError
from saerelay.interop import own
from saerelay.lm import source
from saerelay.lm.attach import attach
from saerelay.lm.facts import read_facts
from saerelay.lm.identity import model_digest, weights_identity
from saerelay.lm.model import LanguageModel, load_model
from saerelay.lm.tokens import load_tokenizer
from saerelay.planning.recipe import ModelSpec
from saerelay.sae.dictionary import Dictionary
from saerelay.site import Site
from saerelay.workflows import share
from saerelay.workflows.launch import train_run
from saerelay.workflows.placeless import placeless_plan
from saerelay.workflows.settle import plan_run

pytestmark = pytest.mark.usefixtures("one_thread")
needs_gguf = pytest.mark.skipif(
    source.find_spec("gguf") is None or source.find_spec("accelerate") is None,
    reason='needs gguf and accelerate: pip install -e ".[dev]"',
)
needs_accelerate = pytest.mark.skipif(
    source.find_spec("accelerate") is None, reason='needs accelerate: pip install -e ".[dev]"'
)
needs_peft = pytest.mark.skipif(source.find_spec("peft") is None, reason='needs peft: pip install -e ".[dev]"')


@pytest.fixture(scope="module")
def llama(family_directory: Callable[[str], Path]) -> Path:
    return family_directory("llama")


@pytest.fixture
def gguf(llama: Path, tmp_path: Path) -> Path:
    """A GGUF file; beside it, in `tiny`, a model with the same rounding."""
    (tmp_path / "files").mkdir()
    write_gguf(tmp_path / "files" / "tiny.gguf", llama)
    return tmp_path / "files" / "tiny.gguf"


def same(found: LanguageModel, expected: LanguageModel, *, atol: float = 1e-5) -> None:
    """Equal activations at every site, and equal logits."""
    ours = found.harvest(TOKENS, ALL_SITES)
    for site, x in expected.harvest(TOKENS, ALL_SITES).items():
        torch.testing.assert_close(ours[site].float(), x.float(), rtol=1e-4, atol=atol)
    torch.testing.assert_close(found.logits(TOKENS), expected.logits(TOKENS), rtol=1e-4, atol=atol)


# --- GGUF ----------------------------------------------------------------------------------------


@needs_gguf
def test_a_gguf_file_is_read_as_the_model_it_holds(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = LanguageModel.load(spec_of(gguf))
    assert capfd.readouterr().out == ""  # transformers shows how far it is, on stderr
    same(model, LanguageModel.load(spec_of(gguf.with_suffix(""))))
    assert (model.facts.family, model.facts.has_lm_head, model.facts.quantised) == ("llama", True, "")
    assert (model.facts.n_layers, model.facts.d_model, model.facts.tokens.max_context) == (3, 32, 32)


@needs_gguf
def test_its_tokenizer_is_in_it(gguf: Path) -> None:
    tokenizer = load_tokenizer(spec_of(gguf))
    assert tokenizer.convert_ids_to_tokens([3, 50]) == ["▁w3", "▁w50"]
    facts = read_facts(spec_of(gguf))
    assert (facts.tokens.bos_token_id, facts.tokens.eos_token_id, facts.tokens.vocab_size) == (1, 2, 101)


@needs_gguf
def test_a_directory_with_one_gguf_file_means_that_and_of_several_one_is_named(gguf: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(gguf, alone / "a.gguf")
    assert read_facts(spec_of(alone)).family == "llama"
    shutil.copy(gguf, alone / "b.gguf")
    with pytest.raises(ModelError, match=r"holds several GGUF files; set model.gguf_file to one. There are: a.*b.gg"):
        read_facts(spec_of(alone))
    assert read_facts(spec_of(alone, gguf_file="b.gguf")).n_layers == 3
    with pytest.raises(ModelError, match=r"no file c.gguf here \(model.gguf_file\). There are: a.gguf, b.gguf"):
        read_facts(spec_of(alone, gguf_file="c.gguf"))
    with pytest.raises(ModelError, match="gone.gguf: no such directory. Pass .* a .gguf file"):
        read_facts(spec_of(tmp_path / "gone.gguf"))


@needs_gguf
def test_a_plan_reads_no_weights_of_a_gguf_file(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf as library

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("read a tensor")

    monkeypatch.setattr(library, "dequantize", refuse)
    plan = plan_run(recipe({"name": str(gguf)}, tmp_path))
    assert plan.facts.n_layers == 3
    with pytest.raises(AssertionError, match="read a tensor"):
        load_model(plan)


@needs_gguf
@pytest.mark.slow
def test_a_run_on_a_gguf_file_gives_the_bits_of_one_on_its_weights(gguf: Path, tmp_path: Path) -> None:
    runs = []
    for name, model in (("gguf", gguf), ("plain", gguf.with_suffix(""))):
        train_run(recipe({"name": str(model)}, tmp_path), tmp_path / name)
        runs.append(load(tmp_path / name))
    for site in runs[0].sites:
        assert torch.allclose(runs[0][site].W_dec, runs[1][site].W_dec, atol=1e-4)
    assert runs[0].evaluate().legs[0].delta_ce is not None
    assert runs[0].features("1").n_fired.sum() > 0


@needs_gguf
def test_a_damaged_gguf_file_is_one_message(gguf: Path) -> None:
    content = gguf.read_bytes()
    for damaged in (content[:5], content[:900], content[: len(content) // 2], b"PK" + content[2:]):
        gguf.write_bytes(damaged)
        with pytest.raises(ModelError, match="cannot be loaded. Check its files"):
            LanguageModel.load(spec_of(gguf))


@needs_gguf
def test_another_gguf_file_in_its_place_is_another_model(gguf: Path) -> None:
    spec = spec_of(gguf)
    digest, identity = model_digest(spec), weights_identity(spec, read_facts(spec))
    content = bytearray(gguf.read_bytes())
    content[-5] ^= 1
    gguf.write_bytes(bytes(content))
    assert model_digest(spec) != digest and weights_identity(spec, read_facts(spec)) != identity


def test_what_is_not_installed_is_named_with_the_command(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r'GGUF file needs gguf and accelerate, .*pip install "saerelay\[gguf\]"'):
        read_facts(spec_of(tmp_path / "x.gguf"))
    with pytest.raises(ModelError, match=r'with the adapter .* needs peft, .*pip install "saerelay\[peft\]"'):
        read_facts(spec_of(llama, adapter=str(tmp_path)))


# --- adapters ------------------------------------------------------------------------------------


@needs_peft
def test_an_adapter_is_merged_into_the_weights(llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wrapped = write_adapter(tmp_path / "lora", llama)
    capfd.readouterr()
    model = LanguageModel.load(spec_of(llama, adapter=str(tmp_path / "lora")))
    assert capfd.readouterr() == ("", "")
    with torch.no_grad():
        expected = wrapped(TOKENS).logits
    plain = LanguageModel.load(spec_of(llama)).logits(TOKENS)
    assert torch.allclose(model.logits(TOKENS), expected, atol=1e-4) and not torch.allclose(plain, expected, atol=0.1)
    assert type(model.hf_model).__name__ == "LlamaForCausalLM"
    assert not any("lora" in name for name, _ in model.hf_model.named_modules())
    assert model.facts.adapter == str(tmp_path / "lora")


@needs_peft
@pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`")
@pytest.mark.parametrize("saves_embeddings", [False, True])
@pytest.mark.parametrize("changed", ["lm_head", "embed_tokens"])
def test_an_adapter_of_the_head_leaves_the_embeddings_as_they_are(
    tmp_path: Path, changed: str, saves_embeddings: bool
) -> None:
    """And the other way round, although the two share their weights."""
    build(tmp_path / "tied", "llama", tie_word_embeddings=True)
    wrapped = write_adapter(tmp_path / "lora", tmp_path / "tied", target_modules=["q_proj", changed])
    if saves_embeddings:
        wrapped.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    model = LanguageModel.load(spec_of(tmp_path / "tied", adapter=str(tmp_path / "lora")))
    with torch.no_grad():
        expected = wrapped(TOKENS, output_hidden_states=True)
    assert torch.allclose(model.logits(TOKENS), expected.logits, atol=1e-4)
    assert torch.allclose(model.harvest(TOKENS, [Site(0)])[Site(0)], expected.hidden_states[1], atol=1e-4)


@needs_gguf
@needs_peft
def test_an_adapter_is_merged_into_a_gguf_file(gguf: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "lora", gguf.with_suffix(""))
    found = LanguageModel.load(spec_of(gguf, adapter=str(tmp_path / "lora")))
    same(found, LanguageModel.load(spec_of(gguf.with_suffix(""), adapter=str(tmp_path / "lora"))), atol=1e-4)


@needs_peft
def test_another_adapter_in_its_place_is_refused_on_resume(llama: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "lora", llama)
    model = {"name": str(llama), "adapter": str(tmp_path / "lora")}
    run = recipe(model, tmp_path)
    train_run(run, tmp_path / "run")
    train_run(run, tmp_path / "run", resume=True)
    write_adapter(tmp_path / "lora", llama, seed=1)
    with pytest.raises(ModelError, match="tokenizer or adapter have changed since this run began"):
        train_run(run, tmp_path / "run", resume=True)
    with pytest.raises(ModelError, match="have changed since this run began"):
        load(tmp_path / "run").evaluate()

    share.export_run(str(tmp_path / "run"), tmp_path / "out", "saerelay")
    assert own.read(tmp_path / "out" / "layer_1")[1].provenance["adapter"] == "lora"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "with the adapter lora merged into its weights" in card and str(tmp_path) not in card
    assert str(tmp_path) not in placeless_plan(load(tmp_path / "run").plan).to_json()


@needs_peft
def test_an_adapter_of_the_hub_is_kept_at_its_commit(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--me--lora"
    for seed, commit in enumerate((40 * "a", 40 * "b")):
        write_adapter(repository / "snapshots" / commit, llama, seed=seed)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        facts = read_facts(spec_of(llama, adapter="me/lora"))
        assert facts.adapter == f"me/lora@{commit}"

    first = LanguageModel.load(spec_of(llama, adapter=f"me/lora@{40 * 'a'}"))
    newest = LanguageModel.load(spec_of(llama, adapter="me/lora"))
    assert not torch.allclose(first.logits(TOKENS), newest.logits(TOKENS), atol=0.1)
    plan = plan_run(recipe({"name": str(llama), "adapter": "me/lora"}, tmp_path))
    frozen = plan.changed(facts=plan.facts.changed(adapter=f"me/lora@{40 * 'a'}"))
    assert torch.equal(load_model(frozen).logits(TOKENS), first.logits(TOKENS))
    with pytest.raises(ModelError, match='"me/none" could not be fetched from the hub'):
        read_facts(spec_of(llama, adapter="me/none"))


@needs_peft
def test_adapters_that_cannot_be_merged_are_refused_with_the_reason(
    llama: Path, family_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    write_adapter(tmp_path / "lora", llama)
    with pytest.raises(ModelError, match=r'the adapter does not fit ".*gpt2.*Target modules'):
        LanguageModel.load(spec_of(family_directory("gpt2"), adapter=str(tmp_path / "lora")))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "lora" / name).unlink()
        with pytest.raises(ModelError, match=rf"lora: no adapter here \({name} is missing\)"):
            read_facts(spec_of(llama, adapter=str(tmp_path / "lora")))
    with pytest.raises(ModelError, match=r"gone: no such directory. Set model.adapter"):
        read_facts(spec_of(llama, adapter=str(tmp_path / "gone")))

    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's, of transformers
        get_peft_model(AutoModelForCausalLM.from_pretrained(llama), prompts).save_pretrained(tmp_path / "prompts")
    with pytest.raises(
        ModelError, match="adapters of the kind PROMPT_TUNING cannot be merged into weights; use a LoRA"
    ):
        LanguageModel.load(spec_of(llama, adapter=str(tmp_path / "prompts")))


@needs_peft
def test_an_adapter_with_tensors_missing_is_refused(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_adapter(tmp_path / "lora", llama)
    path = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = min(tensors)
    save_file({key: value for key, value in tensors.items() if key != gone}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="it lacks 1 of its tensors, such as base_model"):
        LanguageModel.load(spec_of(llama, adapter=str(tmp_path / "lora")))
    save_file(tensors | {"base_model.model.other": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="the model has no place for 1 of its tensors, such as base_model.model.other"):
        LanguageModel.load(spec_of(llama, adapter=str(tmp_path / "lora")))


# --- quantised -----------------------------------------------------------------------------------


@needs_accelerate
def test_a_model_in_8_bit_floats_is_read_on_a_cpu(llama: Path, tmp_path: Path) -> None:
    rounded = write_fp8(tmp_path / "fp8", llama)
    model = LanguageModel.load(spec_of(tmp_path / "fp8", dtype="auto"))
    assert (model.facts.quantised, model.facts.dtype) == ("fp8", "bfloat16")
    same(model, LanguageModel.load(spec_of(rounded, dtype="bfloat16")), atol=0.02)
    assert read_facts(spec_of(tmp_path / "fp8", dtype="float32")).dtype == "float32"


def test_products_that_cannot_be_differentiated_are_no_obstacle(llama: Path, tmp_path: Path) -> None:
    rounded = write_int8(tmp_path / "int8", llama)
    model = LanguageModel.load(spec_of(tmp_path / "int8"))
    assert model.facts.quantised == "int8-of-the-tests"
    plain = LanguageModel.load(spec_of(rounded))
    same(model, plain)
    assert model.facts.sites == plain.facts.sites and model.facts.model_params == plain.facts.model_params
    assert torch.equal(model.unembedding(), plain.unembedding())


def test_saes_are_attached_to_a_quantised_model(llama: Path, tmp_path: Path) -> None:
    write_int8(tmp_path / "int8", llama)
    model = LanguageModel.load(spec_of(tmp_path / "int8")).hf_model
    eye = torch.eye(32)
    sae = Dictionary(architecture="relu", W_enc=eye, b_enc=torch.zeros(32), W_dec=eye, b_dec=torch.zeros(32))
    with torch.no_grad(), attach(model, {Site(1): sae, Site(2, "mlp_out"): sae}) as attached:
        clean = model(TOKENS).logits
        attached[1].steer(3, 50.0)
        steered = model(TOKENS).logits
    assert attached[1].latents().shape == (2, 7, 32) and not torch.allclose(clean, steered, atol=0.1)


@pytest.mark.slow
def test_a_run_on_a_quantised_model_is_trained_and_measured(llama: Path, tmp_path: Path) -> None:
    write_int8(tmp_path / "int8", llama)
    train_run(recipe({"name": str(tmp_path / "int8")}, tmp_path), tmp_path / "run")
    suite = load(tmp_path / "run")
    assert all(leg.delta_ce is not None for leg in suite.evaluate().legs)


@needs_peft
def test_an_adapter_is_not_merged_into_quantised_weights(llama: Path, tmp_path: Path) -> None:
    write_int8(tmp_path / "int8", llama)
    write_adapter(tmp_path / "lora", llama)
    with pytest.raises(ModelError, match=r"merged into plain weights, and these are quantised \(int8-of-the-tests\)"):
        LanguageModel.load(spec_of(tmp_path / "int8", adapter=str(tmp_path / "lora")))


@pytest.mark.parametrize("method, package", [("gptq", "gptq"), ("awq", "gptqmodel"), ("bitsandbytes", "bitsandbytes")])
def test_a_method_whose_package_is_missing_is_planned_and_names_it_on_loading(
    llama: Path, tmp_path: Path, method: str, package: str
) -> None:
    shutil.copytree(llama, tmp_path / "model")
    keys = {"bits": 4, "group_size": 32} if method != "bitsandbytes" else {"load_in_4bit": True}
    add_quantisation(tmp_path / "model", {"quant_method": method, **keys}, dtype="float16")
    facts = read_facts(spec_of(tmp_path / "model", dtype="auto"))
    assert (facts.quantised, facts.dtype) == (method, "float16")
    with pytest.raises(ModelError, match=f"(?i)needs a package that is not installed.*{package}"):
        LanguageModel.load(spec_of(tmp_path / "model", dtype="auto"))


def test_an_unembedding_in_whole_numbers_is_not_taken_for_one(llama: Path) -> None:
    model = LanguageModel.load(spec_of(llama))
    head = model.hf_model.lm_head
    head.weight = torch.nn.Parameter(head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="its unembedding is quantised"):
        model.unembedding()


def test_the_keys_are_in_the_recipe() -> None:
    spec = ModelSpec()
    assert (spec.gguf_file, spec.adapter) == ("", "")
    assert json.loads(spec.model_dump_json())["adapter"] == ""
