"""Shared by all tests."""

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job, whose children would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from saerelay.planning.facts import ModelFacts, TokenFacts


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever asks for a browser is a browser test."""
    for item in items:
        if "chromium" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models so small that threads would only wait for each other."""
    import torch

    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="session")
def save_tiny_model() -> Callable[..., Path]:
    """A function that saves a random GPT-NeoX in a directory: 32 wide, 101 tokens."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    def save(directory: Path, *, n_layers: int = 3, eos_token_id: int | None = 0) -> Path:
        torch.manual_seed(0)
        config = GPTNeoXConfig(
            vocab_size=101,
            hidden_size=32,
            num_hidden_layers=n_layers,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=eos_token_id,
        )
        GPTNeoXForCausalLM(config).save_pretrained(directory)
        return directory

    return save


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: Callable[..., Path]) -> Path:
    """The directory of a random GPT-NeoX: 3 layers, 32 wide, 101 tokens."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def family_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a random model of a family in `model_families`, built when it is first asked for."""
    from model_families import build

    directories: dict[str, Path] = {}

    def directory(family: str) -> Path:
        if family not in directories:
            directories[family] = build(tmp_path_factory.mktemp(family), family)
        return directories[family]

    return directory


@pytest.fixture(scope="session")
def facts() -> ModelFacts:
    """A model that exists on paper: 6 layers, 16 wide."""
    return ModelFacts(
        name="paper-model",
        revision="",
        family="gpt_neox",
        dtype="float32",
        device="cpu",
        n_layers=6,
        d_model=16,
        d_attn_z=24,
        tokens=TokenFacts(
            vocab_size=101,
            max_context=64,
            bos_token_id=0,
            eos_token_id=0,
        ),
        has_lm_head=True,
        layer_params=3000,
        model_params=25000,
    )


@pytest.fixture(scope="session")
def demo_tokenizer() -> Any:
    """The tokenizer of the built-in model."""
    from transformers import PreTrainedTokenizerFast

    from saerelay.demo import MODEL_DIR

    return PreTrainedTokenizerFast(tokenizer_file=str(MODEL_DIR / "tokenizer.json"))


@pytest.fixture
def make_corpus(tmp_path: Path, demo_tokenizer: Any) -> Callable[..., Any]:
    """A function that prepares a corpus of `data` in out/c0, out/c1, and so on; by default of all there is."""
    from corpora import ALL_THERE_IS, FACTS

    from saerelay.data.corpus import Corpus, prepare
    from saerelay.planning.recipe import DataSpec, Recipe, TrainSpec

    numbers = itertools.count()

    def make(
        *,
        train: int = ALL_THERE_IS,
        held_out: int = ALL_THERE_IS,
        facts: ModelFacts = FACTS,
        seed: int = 0,
        **data: Any,
    ) -> Corpus:
        run = Recipe(data=DataSpec.model_validate({"context": 16, **data}), train=TrainSpec(seed=seed))
        target = tmp_path / "out" / f"c{next(numbers)}"
        return prepare(run, facts, demo_tokenizer, target, train_sequences=train, eval_sequences=held_out)

    return make
