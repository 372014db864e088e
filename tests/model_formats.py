"""Small models as one has them: in a GGUF file, with an adapter beside them, quantised."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

BLOCK = 32
"""Numbers that GGUF's Q8_0 quantises together."""

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""What llama.cpp calls the modules of a Llama."""


# --- GGUF ----------------------------------------------------------------------------------------


def write_gguf(path: Path, directory: Path) -> Path:
    """A Llama as a GGUF file, in Q8_0 where rows are whole blocks, and with the same rounding in a directory.

    The tokenizer has a word for every id. Returns the directory.
    """
    import gguf

    config = json.loads((directory / "config.json").read_text())
    n_heads, n_kv = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(config["hidden_size"] // n_heads)
    writer.add_vocab_size(config["vocab_size"])

    words = ["<unk>", "<s>", "</s>", *(f"▁w{i}" for i in range(3, config["vocab_size"]))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([2, 3, 3] + [1] * (len(words) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    rounded = {}
    for key, tensor in load_file(directory / "model.safetensors").items():
        array = tensor.numpy()
        heads = n_heads if "q_proj" in key else n_kv if "k_proj" in key else 0
        name = _gguf_name(key)
        if array.ndim == 2 and array.shape[1] % BLOCK == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(_interleaved(array, heads), kind), raw_dtype=kind)
            array = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        else:
            writer.add_tensor(name, _interleaved(array, heads))
        rounded[key] = torch.from_numpy(np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    return with_weights(path.with_suffix(""), directory, rounded)


def with_weights(copy: Path, base: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A copy of a model with other weights."""
    shutil.copytree(base, copy)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def _gguf_name(key: str) -> str:
    module = key.removesuffix(".weight")
    if module in _GGUF_NAMES:
        return f"{_GGUF_NAMES[module]}.weight"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[inner]}.weight"


def _interleaved(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """The rows of a projection to heads in llama.cpp's order: what is rotated together stands together."""
    if not n_heads:
        return weight
    halves = weight.reshape(n_heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


# --- adapters ------------------------------------------------------------------------------------


def write_adapter(directory: Path, base: Path, *, seed: int = 0, **changes: Any) -> Any:
    """A LoRA of a model's attention and MLP, all of whose weights matter; the model with it, as `peft` has it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    keys = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's, of transformers
        wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**keys))
    for name, parameter in wrapped.named_parameters():
        if "lora" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(directory, save_embedding_layers=False)
    return wrapped.eval()


# --- quantised -----------------------------------------------------------------------------------


def write_fp8(directory: Path, base: Path) -> Path:
    """A model in 8-bit floats, as DeepSeek's are saved, and with the same rounding in the directory returned."""
    shutil.copytree(base, directory)
    saved = {}
    rounded = {}
    for key, tensor in load_file(base / "model.safetensors").items():
        rounded[key] = saved[key] = tensor.bfloat16()
        if "proj" in key:
            scale = tensor.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            small = (tensor / scale).to(torch.float8_e4m3fn)
            saved[key] = small
            saved[f"{key}_scale_inv"] = scale.reshape(1, 1)
            rounded[key] = (small.float() * scale).bfloat16()
    save_file(saved, directory / "model.safetensors", metadata={"format": "pt"})
    how = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    add_quantisation(directory, how, dtype="bfloat16")

    return with_weights(directory.with_name(f"{directory.name}-rounded"), base, rounded)


def add_quantisation(directory: Path, how: dict[str, Any], **changes: Any) -> None:
    """Say in a model's configuration that its weights are quantised."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": how} | changes))


class Int8Linear(nn.Module):
    """A product with weights in whole numbers, through which nothing can be differentiated."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(n_out, n_in, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * self.scale[:, None].to(x.dtype)  # type: ignore[operator, index, union-attr]
        return (x.detach() @ weight.T).detach()


@register_quantization_config("int8-of-the-tests")
class Int8Config(QuantizationConfigMixin):
    """The configuration of a method that needs no package and no GPU."""

    def __init__(self, **_: Any) -> None:
        self.quant_method = "int8-of-the-tests"  # type: ignore[assignment]


@register_quantizer("int8-of-the-tests")
class Int8Quantizer(HfQuantizer):
    """Puts Int8Linear in the place of the projections."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and "proj" in path:
                parent, _, name = path.rpartition(".")
                replacement = Int8Linear(module.in_features, module.out_features)
                setattr(model.get_submodule(parent), name, replacement)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def write_int8(directory: Path, base: Path) -> Path:
    """A model whose projections are whole numbers times a scale; with the same rounding in the directory returned."""
    shutil.copytree(base, directory)
    saved = {}
    rounded = {}
    for key, tensor in load_file(base / "model.safetensors").items():
        rounded[key] = saved[key] = tensor
        if "proj" in key:
            scale = tensor.abs().amax(dim=1) / 127
            whole = (tensor / scale[:, None]).round()
            saved[key] = whole.to(torch.int8)
            saved[key.replace("weight", "scale")] = scale
            rounded[key] = whole * scale[:, None]
    save_file(saved, directory / "model.safetensors", metadata={"format": "pt"})
    add_quantisation(directory, {"quant_method": "int8-of-the-tests"})

    return with_weights(directory.with_name(f"{directory.name}-rounded"), base, rounded)
