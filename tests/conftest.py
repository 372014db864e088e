"""Shared by all tests."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402

from saerelay.planning.facts import ModelFacts  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever asks for a browser is a browser test."""
    for item in items:
        if "chromium" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a random GPT-NeoX: 3 layers, 32 wide, 101 tokens."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("tiny") / "model"
    GPTNeoXForCausalLM(config).save_pretrained(directory)
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
        vocab_size=101,
        max_context=64,
        bos_token_id=0,
        eos_token_id=0,
        has_lm_head=True,
        layer_params=3000,
        model_params=25000,
    )
