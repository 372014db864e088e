"""llamascopium (config.json, sae_weights.safetensors) and Llama Scope (hyperparams.json).

With u = s·x, s = √D / (mean norm of the training activations), and n_j the norm of decoder row j
if `sparsity_include_decoder_norm`, else 1:

    z_j = pre_j where pre_j·n_j passes the activation function, pre = u W_E + b_E        x_hat = (z W_D + b_D)/s
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saerelay.errors import FormatError
from saerelay.interop.canonical import canonical
from saerelay.interop.files import read_config, read_count, read_number, read_tensors, take
from saerelay.interop.names import site_named
from saerelay.interop.origin import Origin
from saerelay.sae.dictionary import Dictionary, unit_decoder

NAME = "llamascopium"
_ACTIVATIONS: dict[str, str] = {"relu": "relu", "jumprelu": "jumprelu", "topk": "topk"}
_LLAMA_SCOPE = "hyperparams.json"


def recognises(path: Path) -> bool:
    """Whether a directory has a hyperparams.json, or config.json and sae_weights."""
    has_weights = (path / "sae_weights.safetensors").exists() or (path / "sae_weights.dcp").exists()
    return (path / _LLAMA_SCOPE).is_file() or ((path / "config.json").is_file() and has_weights)


@dataclass(frozen=True)
class _Files:
    """The two files of an SAE, and their contents."""

    config_file: Path
    weights_file: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def reads(self) -> str:
        """The hook point that is read."""
        return str(self.config.get("hook_point_in", ""))


def read(path: Path) -> tuple[Dictionary, Origin]:
    """Read the SAE of a directory, with its normalisation by the dataset's norm folded in.

    JumpReLU and ReLU keep their codes; TopK ranks by pre·n, so its codes become those of unit
    decoder rows. Raises FormatError, with the reason, for an SAE that is equivalent to no dictionary
    of raw activations.
    """
    files = _open(path)
    activation = _activation(files.config)
    W_enc, b_enc, W_dec, b_dec = _weights(files)
    n_latents = len(b_enc)
    ranks_by_norm = bool(files.config.get("sparsity_include_decoder_norm", True))
    threshold = None
    if activation == "jumprelu":
        threshold = _threshold(files, n_latents)
        if ranks_by_norm:
            threshold = threshold / W_dec.norm(dim=1).clamp(min=1e-12)
    k = None
    if activation == "topk":
        k = read_count(files.config_file, files.config, "top_k", most=n_latents)

    dictionary = Dictionary(
        architecture=_ACTIVATIONS[activation],
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        threshold=threshold,
        k=k,
    )
    subtracts_b_dec = bool(files.config.get("apply_decoder_bias_to_pre_encoder", False))
    dictionary = canonical(dictionary, subtracts_b_dec=subtracts_b_dec, scale=_scale(files))
    if ranks_by_norm and activation == "topk":
        dictionary = unit_decoder(dictionary)

    is_llama_base = "Llama3_1-8B-Base" in str(path.absolute())
    origin = Origin(model="meta-llama/Llama-3.1-8B" if is_llama_base else "", site=site_named(files.reads))
    return dictionary, origin


def _open(path: Path) -> _Files:
    """Read the files of a directory; FormatError unless they hold an SAE that can be read."""
    if (path / _LLAMA_SCOPE).is_file():
        config_file = path / _LLAMA_SCOPE
        weights_file = path / "checkpoints" / "final.safetensors"
    else:
        config_file = path / "config.json"
        weights_file = path / "sae_weights.safetensors"
    config = read_config(config_file)
    _check_supported(config_file, config)
    if (path / "sae_weights.dcp").exists() and not weights_file.is_file():
        raise FormatError(
            f"{path}/sae_weights.dcp: is a distributed checkpoint, which is a pickle; refused. "
            "If you trust it, load it in llamascopium without a device mesh and save it again, "
            "which writes sae_weights.safetensors"
        )
    return _Files(config_file, weights_file, config=config, tensors=read_tensors(weights_file))


def _activation(config: Mapping[str, Any]) -> str:
    return str(config.get("act_fn", "relu")).lower()


def _check_supported(config_file: Path, config: Mapping[str, Any]) -> None:
    """Raise FormatError for an SAE that is equivalent to no dictionary of raw activations."""
    reads = str(config.get("hook_point_in", ""))
    writes = str(config.get("hook_point_out", ""))
    activation = _activation(config)
    kind = config.get("sae_type", "sae")
    if kind != "sae":
        problem = f"is a {kind}; saerelay reads SAEs"
    elif reads != writes:
        problem = f"is a transcoder: it reads {reads} and writes {writes}"
    elif config.get("use_glu_encoder", False):
        problem = "has an encoder with a gate (use_glu_encoder), which no SAE of saerelay has"
    elif activation.startswith("batch"):
        problem = (
            f"has act_fn {activation}, whose active latents of a token depend on the rest of the "
            "batch; turn it into JumpReLU with llamascopium's topk_to_jumprelu_conversion first"
        )
    elif activation not in _ACTIVATIONS:
        problem = f"has act_fn {activation}; these are read: {', '.join(_ACTIVATIONS)}"
    else:
        return
    raise FormatError(f"{config_file}: {problem}")


def _weights(files: _Files) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return W_enc, b_enc, W_dec and b_dec, one row per latent; files use one of two sets of names."""
    is_linear = "encoder.weight" in files.tensors
    if is_linear:
        shapes = {"encoder.weight": "FD", "encoder.bias": "F", "decoder.weight": "DF"}
        bias = "decoder.bias"
    else:
        shapes = {"W_E": "DF", "b_E": "F", "W_D": "FD"}
        bias = "b_D"
    has_bias = files.config.get("use_decoder_bias", True)
    if has_bias:
        shapes[bias] = "D"

    width = files.config.get("d_model")
    W_enc, b_enc, W_dec, *others = take(files.weights_file, files.tensors, shapes, D=width)
    if is_linear:
        W_dec = W_dec.T
    else:
        W_enc = W_enc.T
    b_dec = others[0] if has_bias else torch.zeros(W_enc.shape[1])
    return W_enc, b_enc, W_dec, b_dec


def _scale(files: _Files) -> float:
    """Return s, by which activations are multiplied before they are encoded."""
    mode = files.config.get("norm_activation", "dataset-wise")
    if mode == "inference":
        return 1.0
    if mode != "dataset-wise":
        unit = str(mode).split("-")[0]
        raise FormatError(
            f"{files.config_file}: norm_activation is {mode}: activations are divided by "
            f"the norm of each {unit}, which an SAE of raw activations cannot do; only "
            "dataset-wise and inference can be read"
        )

    name = f"dataset_average_activation_norm.{files.reads}"
    if name in files.tensors:
        measured = float(take(files.weights_file, files.tensors, {name: ""})[0])
        norm = read_number(files.weights_file, {name: measured}, name)
    else:
        norms = files.config.get("dataset_average_activation_norm")
        measured = norms.get("in") if isinstance(norms, dict) else None
        norm = read_number(files.config_file, {name: measured}, name)
    return math.sqrt(read_number(files.config_file, files.config, "d_model")) / norm


def _threshold(files: _Files, n_latents: int) -> Tensor:
    """Return θ (F), stored as a tensor of logarithms, or, in older files, as one number in the configuration."""
    for name in ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold"):
        if name in files.tensors:
            return take(files.weights_file, files.tensors, {name: "F"}, F=n_latents)[0].exp()
    threshold = read_number(files.config_file, files.config, "jump_relu_threshold")
    return torch.full((n_latents,), threshold)
