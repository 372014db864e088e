"""Shared by all tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402

from saerelay.plan import ModelFacts  # noqa: E402


@pytest.fixture
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
