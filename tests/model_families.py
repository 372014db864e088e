"""Small random models of every family whose modules `saerelay.lm.ports` knows, and some beyond."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from saerelay.planning.recipe import ModelSpec
from saerelay.site import MODULE_KINDS, Site

SMALL = {"vocab_size": 101, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}
COMMON = {**SMALL, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = {**COMMON, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 16}  # 4 heads x 16 = 64, twice the model's width
ONE_EOS = {"eos_token_id": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "neox_parallel": ("gpt_neox", {**COMMON, **ONE_EOS, "use_parallel_residual": True}),
    "neox_sequential": ("gpt_neox", {**COMMON, **ONE_EOS, "use_parallel_residual": False}),
    "gpt2": ("gpt2", {**SMALL, **ONE_EOS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}),
    "llama": ("llama", GROUPED),
    "mistral": ("mistral", {**GROUPED, **ONE_EOS, "sliding_window": None}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", WIDE),
    "gemma": ("gemma", WIDE),
    "gemma2": ("gemma2", WIDE),
    "gemma3": ("gemma3_text", WIDE),
    "glm4": ("glm4", WIDE),
    "bert": ("bert", {**COMMON, **ONE_EOS}),
    # layers of Falcon return tuples, and add to mlp_out in place
    "falcon": ("falcon", {**COMMON, "parallel_attn": True, "num_kv_heads": 4}),
}
"""`model_type` and configuration of each: 3 layers, 32 wide, 101 tokens."""

TOKENS = torch.arange(3, 17).reshape(2, 7)
ALL_SITES = [Site(layer, kind) for layer in range(3) for kind in MODULE_KINDS]


def build(directory: Path, family: str, **changes: Any) -> Path:
    """A random model, all of whose weights (norms and biases too) matter, saved as transformers saves it."""
    torch.manual_seed(0)
    model_type, config = FAMILIES[family]
    model_class = AutoModel if family == "bert" else AutoModelForCausalLM
    model = model_class.from_config(AutoConfig.for_model(model_type, **{**config, **changes}))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory


def spec_of(directory: Path, **changes: Any) -> ModelSpec:
    return ModelSpec(**{"name": str(directory), "dtype": "float32", "device": "cpu", **changes})
