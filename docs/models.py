"""The table in models.md: what can be read in each causal family of the installed transformers.

    python docs/models.py            # prints the page with its table as it should be
    python docs/models.py --write    # writes it
    python docs/models.py llama xlm  # prints the rows of some families

Each family is built small and random, once with weights and once without. A probe runs a few tokens
through both. The table says what is found without weights, which is what a plan is told: it must
never be more than what is found with them. What is said of the residual stream is compared with the
hidden states that transformers itself returns.
"""

import inspect
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from saerelay.errors import ModelError
from saerelay.lm.ports import intercept, port_of
from saerelay.lm.probe import Anatomy, probe, probe_skeleton
from saerelay.lm.readout import linear_readout
from saerelay.lm.trial import trial_tokens, without_weights
from saerelay.site import MODULE_KINDS, Site

PAGE = Path(__file__).parent / "models.md"
MARKERS = re.compile(r"(<!-- families -->\n).*(<!-- end -->)", re.S)

SMALL = (
    (r"vocab_size|vocab_size_per_layer_input|n_tokens", 101),
    (r"hidden_size|n_embd|d_model|dim|emb_dim|embedding_size|word_embed_proj_dim|lru_width|attention_hidden_size", 32),
    (r"\w*intermediate_size|\w*ffn_dim|d_ff|n_inner|\w*ffn_hidden_size|mlp_hidden_size|block_ff_dim|dim_ff", 48),
    (r"(num_)?(hidden_|decoder_|encoder_)?layers|n_layers?", 4),
    (r"(num_|decoder_|encoder_|swa_)*attention_heads|num_heads|n_heads?|swa_num_attention_heads", 4),
    (r"(\w+_)?num_key_value_heads|num_kv_heads|num_global_key_value_heads", 2),
    (r"(\w+_)?head_dim|v_head_dim|d_head|d_kv|kv_channels|linear_(key|value)_head_dim", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_target_positions", 64),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts", 2),
    (r"n_shared_experts|num_shared_experts|n_group|topk_group|(mamba_)?n_groups|mamba_ngroups", 1),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|mamba_d_head|mamba_head_dim|mamba_headdim|image_size", 16),
    (r"qk_(rope|nope)_head_dim|mamba_n_heads|n_mamba_heads|linear_num_(key|value)_heads", 4),
    (r"sliding_window\w*|attention_window_size|mamba_d_state|(ssm_)?state_size|(mamba_)?chunk_size|patch_size", 8),
    (r"bos_token_id|bos_index", 1),
    (r"eos_token_id|eos_index", 2),
    (r"pad_token_id|pad_index", 0),
)
"""What keys of configurations are set to, the last match counting."""

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
}
BY_KIND = {"full_attention": ROPE, "sliding_attention": ROPE}

FITTING: dict[str, dict[str, Any]] = {
    "axk2": {"num_key_value_heads": 4},
    "blt": {"decoder_config": {"hidden_size_global": 64}, "global_config": {"hidden_size": 64}},
    "codegen": {"n_ctx": 64, "rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": BY_KIND},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10_000.0}, "max_seq_len": 64},
    "deepseek_v32": {"num_key_value_heads": 4},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4, "use_dsa": True},
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "num_hidden_layers": 42},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 8, "hidden_size_per_layer_input": 8},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 4, "num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attention_head_size": 8, "feed_forward_size": 48},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "attn_layer_period": 2, "attn_layer_offset": 0},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""Keys without which a small configuration of a family does not fit together; those of its parts by their names."""


NOT_TRIED = {
    "gemma3n": "its images need the package timm; its text model is gemma3n_text",
    "gemma4_assistant": "it drafts tokens for another model, and reads that one's keys and values",
    "gemma4_unified_assistant": "it drafts tokens for another model, and reads that one's keys and values",
    "musicgen": "transformers makes no causal model of its configuration; it writes sound, not text",
    "musicgen_melody": "transformers makes no causal model of its configuration; it writes sound, not text",
}
"""Families of which no small model can be made, and why."""


def main(names: list[str]) -> None:
    """Print or write the page, or print some rows of its table."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if names and names != ["--write"]:
        print("\n".join(row(name) for name in names))
        return
    table = ["| family | can be read | cannot be read, and why |", "|---|---|---|", *rows()]
    page = MARKERS.sub(lambda match: "\n".join([match[1], *table, "", match[2]]), PAGE.read_text(encoding="utf-8"))
    if names:
        PAGE.write_text(page, encoding="utf-8")
    else:
        print(page, end="")


def rows() -> Iterator[str]:
    """The rows of all families."""
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        print(name, file=sys.stderr)
        yield row(name)


def row(name: str) -> str:
    """The row of a family; AssertionError if the probe is wrong about it."""
    if name in NOT_TRIED:
        return f"| {name} | | not tried: {NOT_TRIED[name]} |"
    try:
        model = small_model(name)
    except Exception as error:  # configurations fail in any way
        return f"| {name} | | not tried: no small model of it can be made here ({type(error).__name__}) |"
    try:
        anatomy = probe(model, name)
    except ModelError as error:
        return f"| {name} | | {reason_of(error)} |"
    try:
        planned = probe_skeleton(without_weights(model), name)
    except ModelError as error:  # a plan cannot be made of what does not run without weights
        return f"| {name} | | {reason_of(error)} |"
    except RuntimeError:  # no copy can be made; plans are made from the configuration and need none
        planned = anatomy
    check(model, anatomy)
    assert planned.ports.items() <= anatomy.ports.items(), "a plan would be told of sites that cannot be read"
    anatomy = planned

    readable = []
    refused = []
    for kind in MODULE_KINDS:
        layers = [site.layer for site in anatomy.ports if site.module == kind]
        if layers:
            readable.append(kind + ("" if len(layers) == anatomy.n_layers else f" of {of_layers(len(layers))}"))
        for reason in sorted({why for site, why in anatomy.refusals.items() if site.module == kind}):
            refused.append(f"{kind}: {reason}")
    try:
        linear_readout(model, model.get_submodule(anatomy.last_layer), name)
    except ModelError as error:
        refused.append(f"top tokens: {reason_of(error)}")
    return f"| {name} | {', '.join(readable)} | {'; '.join(refused)} |"


def of_layers(n: int) -> str:
    """A number of layers in words."""
    return "1 layer" if n == 1 else f"{n} layers"


def reason_of(error: ModelError) -> str:
    """An error without the model's name and the advice."""
    text = re.sub(r'^.*?"[\w-]+"( \([\w-]+\))? ', "", str(error))
    inner = re.search(r"residual stream \((.*)\), so the ", text)
    return inner[1] if inner else re.split(r"\. Use|; use| \((?=\w+Error)", text)[0]


# --- small models -----------------------------------------------------------------------------


def small_model(name: str) -> Any:
    """A small random model of a family, all of whose weights matter."""
    torch.manual_seed(0)
    config = small_config(CONFIG_MAPPING[name], FITTING.get(name, {}))
    model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def small_config(kind: Any, fitting: dict[str, Any]) -> Any:
    """A small configuration of a class: its keys by `SMALL`, its parts alike."""
    names = set(inspect.signature(kind.__init__).parameters)
    for base in kind.__mro__:
        names |= set(getattr(base, "__annotations__", {}))
    keys: dict[str, Any] = {}
    for key in names:
        for pattern, value in SMALL:
            if re.fullmatch(pattern, key):
                keys[key] = value
    parts = getattr(kind, "sub_configs", None) or {}
    default = kind() if parts else None
    for key in parts:
        part = getattr(default, key, None)
        if part is not None and not isinstance(part, dict):
            keys[key] = small_config(type(part), fitting.get(key, {})).to_dict()
    own = {key: value for key, value in fitting.items() if key not in parts}
    return kind(**keys | own)


# --- checks -----------------------------------------------------------------------------------


def check(model: Any, anatomy: Anatomy) -> None:
    """Compare what a probe says of the residual stream with transformers' hidden states."""
    sites = [site for site in anatomy.ports if site.module == "resid_post"]
    found = read(model, sites)
    with torch.no_grad():
        states = model.base_model(trial_tokens(model), output_hidden_states=True, use_cache=False).hidden_states
    last = max((site.layer for site in sites), default=0)
    for site in sites:
        is_last = site.layer == last  # behind it, transformers has the final norm
        if states is not None and not is_last:  # some families leave the first one out
            assert any(torch.equal(found[site], state) for state in states), f"{site} is not a hidden state"


def read(model: Any, sites: list[Site]) -> dict[Site, torch.Tensor]:
    """What passes at sites of a model."""
    found: dict[Site, torch.Tensor] = {}

    def keep(site: Site, x: torch.Tensor) -> torch.Tensor:
        found[site] = x.clone()
        return x

    with torch.no_grad(), ExitStack() as stack:
        for site in sites:
            stack.enter_context(intercept(port_of(model, site), site, partial(keep, site)))
        model.base_model(trial_tokens(model), use_cache=False)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
