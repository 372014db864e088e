"""What is known of a model before its weights are loaded, how they are loaded, and errors with their remedies."""

import json
import os
import shutil
from collections.abc import Callable
from logging import Handler, getLogger
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub
from model_families import ALL_SITES, COMMON, FAMILIES, GROUPED, ONE_EOS, TOKENS, build, spec_of
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    MixtralConfig,
    MixtralForCausalLM,
)

from saerelay.errors import ModelError
from saerelay.lm.facts import read_facts
from saerelay.lm.model import LanguageModel
from saerelay.lm.tokens import load_tokenizer, token_text
from saerelay.planning.recipe import ModelSpec
from saerelay.site import Site

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_configuration_that_asks_for_millions_of_layers_is_refused_at_once(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**8}))
    with pytest.raises(ModelError, match=r"num_hidden_layers = 1e\+08, but at most 4,096 is allowed"):
        read_facts(ModelSpec(name=str(copy)))


def test_a_pipe_among_the_files_of_a_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    (copy / "model.safetensors").unlink()
    os.mkfifo(copy / "model.safetensors")
    with pytest.raises(ModelError, match="model.safetensors: not a regular file"):
        LanguageModel.load(ModelSpec(name=str(copy)))


def test_facts_are_those_of_the_loaded_model(family: str, family_directory: Callable[[str], Path]) -> None:
    model = LanguageModel.load(spec_of(family_directory(family)))
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


def test_of_experts_only_those_that_a_token_is_sent_to_are_used(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    facts = read_facts(spec_of(tmp_path))
    assert facts.idle_layer_params == 6 * 3 * 32 * 64
    in_use = 4 * 32 * 32 + 2 * 3 * 32 * 64 + 8 * 32 + 2 * 32  # attention, two experts, the router, the norms
    assert facts.layer_params - facts.idle_layer_params == in_use


def test_a_backbone_without_its_head_has_none(family_directory: Callable[[str], Path], tmp_path: Path) -> None:
    backbone = AutoModel.from_pretrained(family_directory("llama"))
    backbone.save_pretrained(tmp_path)
    model = LanguageModel.load(spec_of(tmp_path))
    assert not model.facts.has_lm_head
    tokens = LanguageModel.load(spec_of(family_directory("llama"))).harvest(TOKENS, [Site(2)])[Site(2)]
    assert torch.equal(model.harvest(TOKENS, [Site(2)])[Site(2)], tokens)


def test_missing_weights_are_an_error(family_directory: Callable[[str], Path], tmp_path: Path) -> None:
    AutoModel.from_pretrained(family_directory("llama")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ModelError, match=r"lack 1 tensors \(lm_head.weight\), which would be initialised at random"):
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


def test_a_model_without_a_tokenizer_says_what_to_give_instead(
    family: str, family_directory: Callable[[str], Path]
) -> None:
    with pytest.raises(ModelError, match="has no fast tokenizer. Put a tokenizer.json beside its config.json, or give"):
        load_tokenizer(spec_of(family_directory(family)))


def test_a_slow_tokenizer_is_refused(family_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    slow = transformers.ByT5Tokenizer()
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: slow)
    with pytest.raises(ModelError, match="has no fast tokenizer"):
        load_tokenizer(spec_of(family_directory("llama")))


def test_the_tokenizer_decides_on_special_tokens(tmp_path: Path) -> None:
    build(tmp_path, "bert")
    words = {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "hi": 3}
    tokenizer = transformers.BertTokenizerFast(
        vocab=words, cls_token="[CLS]", sep_token="[SEP]", pad_token="[UNK]", mask_token="[UNK]"
    )
    tokenizer.save_pretrained(tmp_path)
    facts = read_facts(spec_of(tmp_path))
    assert (facts.tokens.bos_token_id, facts.tokens.eos_token_id) == (0, 1)


def test_it_is_said_if_the_configuration_decides_on_special_tokens_for_want_of_the_tokenizer(tmp_path: Path) -> None:
    """The tokenizer might have others, with which the same recipe would train on other sequences."""
    build(tmp_path, "llama", eos_token_id=2)
    (tmp_path / "tokenizer.json").write_text('{"model":')
    told = r"BOS 1, EOS 2, padding 0\) are taken from config.json: .*its tokenizer.json cannot be read \(EOF .*restore"
    with pytest.warns(UserWarning, match=told):
        assert read_facts(spec_of(tmp_path)).tokens.eos_token_id == 2
    for config in ("", "{}"):  # alone, and beside a tokenizer_config.json
        with pytest.raises(ModelError, match="cannot be read|cannot be loaded. Check its files"):
            load_tokenizer(spec_of(tmp_path))
        (tmp_path / "tokenizer_config.json").write_text(config or "{}")


def test_special_tokens_outside_the_vocabulary_are_none(tmp_path: Path) -> None:
    build(tmp_path, "llama", bos_token_id=128_000, eos_token_id=[101], pad_token_id=-1)
    tokens = read_facts(spec_of(tmp_path)).tokens
    assert (tokens.bos_token_id, tokens.eos_token_id, tokens.pad_token_id) == (None, None, None)


def test_the_space_in_front_of_a_sentencepiece_token_is_shown() -> None:
    class SentencePiece:
        """Three tokens, of which decode drops the leading space, as SentencePiece does."""

        def convert_ids_to_tokens(self, token: int) -> str:
            return ["▁the", "re", "▁"][token]

        def decode(self, ids: list[int], **_: Any) -> str:
            return ["the", "re", " "][ids[0]]

    assert [token_text(SentencePiece(), token) for token in range(3)] == [" the", "re", " "]


@pytest.mark.parametrize("name, text, head", [("gemma3", "gemma3_text", True), ("llava", "llama", False)])
def test_of_models_that_also_see_the_text_layers_are_read(tmp_path: Path, name: str, text: str, head: bool) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = AutoConfig.for_model(
        name,
        text_config=GROUPED | {"model_type": text, "head_dim": 8},
        vision_config=vision | {"model_type": "siglip_vision_model", "num_hidden_layers": 3},
    )
    (AutoModelForCausalLM if head else AutoModelForImageTextToText).from_config(config).save_pretrained(tmp_path)
    model = LanguageModel.load(spec_of(tmp_path))
    assert (model.facts.n_layers, model.facts.d_model, model.facts.has_lm_head) == (3, 32, head)
    assert model.harvest(TOKENS, ALL_SITES)[Site(2)].shape == (2, 7, 32)


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
        (http_error(hub.HfHubHTTPError), "Check the name and the network connection, or pass a local directory."),
        (hub.LocalEntryNotFoundError("away"), "Check the name and the network connection, or pass a local directory."),
        (hub.OfflineModeIsEnabled("off"), "Check the name and the network connection, or pass a local directory."),
        (hub.HTTPError("no route"), "Check the name and the network connection, or pass a local directory."),
        (OSError("disk on fire"), "cannot be loaded. Check its files, .*disk on fire"),
    ],
)
def test_errors_of_the_hub_come_with_their_remedy(monkeypatch: pytest.MonkeyPatch, error: Exception, told: str) -> None:
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
        with pytest.raises(ModelError, match="is neither a directory nor a valid hub id"):
            read_facts(ModelSpec(name=name))


@pytest.fixture
def some_llama(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family_directory: Callable[[str], Path]
) -> Callable[[str], Path]:
    """Puts a commit of "some/llama" into a hub cache of its own, as what `main` stands for."""
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--llama"

    def commit(name: str) -> Path:
        snapshot = repository / "snapshots" / name
        shutil.copytree(family_directory("llama"), snapshot, dirs_exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(name)
        return snapshot

    return commit


@pytest.mark.filterwarnings("ignore:special tokens")
def test_the_commit_that_a_branch_stands_for_is_recorded_and_loaded(some_llama: Callable[[str], Path]) -> None:
    first, second = 40 * "a", 40 * "b"
    some_llama(first)
    with pytest.warns(UserWarning, match='are taken from config.json: "some/llama" has no fast tokenizer'):
        facts = read_facts(ModelSpec(name="some/llama", device="cpu"))
    assert facts.revision == first
    (some_llama(second) / "model.safetensors").unlink()
    assert read_facts(ModelSpec(name="some/llama", revision="main", device="cpu")).revision == second
    pinned = ModelSpec(name="some/llama", revision=first, device="cpu")
    assert LanguageModel.load(pinned).facts.revision == first


def test_a_model_whose_commit_cannot_be_told_is_refused(
    monkeypatch: pytest.MonkeyPatch, some_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    some_llama(40 * "a")
    monkeypatch.setattr(transformers.utils.hub, "cached_file", lambda *_, **__: str(tmp_path / "config.json"))
    with pytest.raises(ModelError, match="its revision cannot be determined .*set model.revision to a commit"):
        read_facts(ModelSpec(name="some/llama"))


def test_an_adapter_beside_the_weights_is_refused_wherever_it_comes_from(
    some_llama: Callable[[str], Path], family_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/base"})
    beside = tmp_path / "beside"
    shutil.copytree(family_directory("llama"), beside)
    alone = tmp_path / "alone"
    alone.mkdir()
    snapshot = some_llama(40 * "a")
    for directory in (beside, alone, snapshot):
        (directory / "adapter_config.json").write_text(adapter)
    for name in (str(beside), str(alone), "some/llama"):
        with pytest.raises(
            ModelError,
            match=r"holds an adapter \(.*some/base\).*set model.name to its base model and model.adapter to this",
        ):
            read_facts(ModelSpec(name=name))


def test_directories_without_a_model_are_refused(
    tmp_path: Path, family_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for name in ("./gone", "/no/where", "~/no/where"):
        with pytest.raises(ModelError, match="no such directory. Pass a directory with a config.json"):
            read_facts(ModelSpec(name=name))
    with pytest.raises(ModelError, match="file: not a directory. Pass a directory with a config.json"):
        read_facts(ModelSpec(name="file"))
    with pytest.raises(ModelError, match=r"no Hugging Face model here \(config.json is missing\)"):
        read_facts(spec_of(tmp_path))
    for text in ("{bad", "{}", '{"model_type": "nosuch"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match="cannot be loaded. Check its files, and that .* supports"):
            read_facts(spec_of(tmp_path))
    (tmp_path / "here").symlink_to(family_directory("llama"))
    assert read_facts(spec_of(Path("here"))).family == "llama"


def test_weights_that_cannot_be_loaded_are_refused(tmp_path: Path, family_directory: Callable[[str], Path]) -> None:
    (tmp_path / "config.json").write_text((family_directory("llama") / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="no weights in safetensors format. If .*, convert them once"):
        LanguageModel.load(spec_of(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"rubbish" * 10)
    with pytest.raises(ModelError, match="cannot be loaded.*header"):
        LanguageModel.load(spec_of(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((family_directory("mistral") / "model.safetensors").read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        LanguageModel.load(spec_of(tmp_path))


def test_encoder_decoders_and_foreign_code_are_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("t5", vocab_size=101, d_model=32, num_layers=2, num_heads=2, d_ff=16, d_kv=8)
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\(t5\) is not a single stack of layers"):
        read_facts(spec_of(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}))
    with pytest.raises(ModelError, match="needs Python code that comes with it.*set model.trust_remote_code = true"):
        read_facts(spec_of(tmp_path))


def test_auto_takes_the_device_and_dtype_that_are_fast_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ModelError, match=f'model.device "{device}" is not available: .* Use "auto" or "cpu"'):
            read_facts(ModelSpec(device=device))
    with pytest.raises(ModelError, match='unknown model.device "gpu"; use "auto", "cpu", "cuda" or "cuda:1"'):
        read_facts(ModelSpec(device="gpu"))
    with pytest.raises(ModelError, match="float64, which MPS lacks"):
        read_facts(ModelSpec(device="mps"))
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
