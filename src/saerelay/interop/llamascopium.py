"""llamascopium (config.json, sae_weights.safetensors) and Llama Scope (hyperparams.json, checkpoints/).

With u = s·x, s = √D / (mean norm of the training activations), and n_j the norm of decoder row j if
`sparsity_include_decoder_norm`, else 1:

    z_j = pre_j where pre_j·n_j passes the activation function, pre = u W_E + b_E        x_hat = (z W_D + b_D)/s
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saerelay.errors import FormatError
from saerelay.interop.files import canonical, read_config, read_number, read_tensors, shaped
from saerelay.interop.names import site_named
from saerelay.interop.origin import Origin
from saerelay.sae.dictionary import Dictionary, unit_decoder
from saerelay.sae.architectures import Architecture

NAME = "llamascopium"
_ACTIVATIONS: dict[str, Architecture] = {"relu": "relu", "jumprelu": "jumprelu", "topk": "topk"}


def recognises(path: Path) -> bool:
    """Whether a directory has a hyperparams.json, or config.json and sae_weights."""
    weights = any((path / f"sae_weights.{kind}").exists() for kind in ("safetensors", "dcp"))
    return (path / "hyperparams.json").is_file() or ((path / "config.json").is_file() and weights)


def read(path: Path) -> tuple[Dictionary, Origin]:
    """The SAE of a directory, its normalisation by the dataset's norm folded in.

    JumpReLU and ReLU keep their codes; TopK ranks by pre·n, so its codes become those of unit decoder rows. Raises
    FormatError for what no dictionary of raw activations equals, with the reason.
    """
    older = (path / "hyperparams.json").is_file()
    config_file = path / ("hyperparams.json" if older else "config.json")
    file = path / ("checkpoints/final.safetensors" if older else "sae_weights.safetensors")
    config = read_config(config_file)
    reads, writes = (str(config.get(f"hook_point_{end}", "")) for end in ("in", "out"))
    activation = str(config.get("act_fn", "relu")).lower()
    refusals = {
        f"is a {config.get('sae_type')}; saerelay reads SAEs": config.get("sae_type", "sae") != "sae",
        f"is a transcoder: it reads {reads} and writes {writes}": reads != writes,
        "has an encoder with a gate (use_glu_encoder), which no SAE here has": config.get("use_glu_encoder", False),
        f"has act_fn {activation}, which keeps other latents of a token in another batch; turn it into JumpReLU with "
        "llamascopium's topk_to_jumprelu_conversion first": activation.startswith("batch"),
        f"has act_fn {activation}; {', '.join(_ACTIVATIONS)} are known": activation not in _ACTIVATIONS,
    }
    for why, applies in refusals.items():
        if applies:
            raise FormatError(f"{config_file}: {why}")
    if (path / "sae_weights.dcp").exists() and not file.is_file():
        raise FormatError(
            f"{path}/sae_weights.dcp: a distributed checkpoint, which is a pickle; refused. Where you trust it, load "
            "it in llamascopium without a device mesh and save it again: that writes sae_weights.safetensors"
        )
    tensors = read_tensors(file)
    W_enc, b_enc, W_dec, b_dec = _weights(file, tensors, config)
    scale = _scale(config_file, file, config, tensors, reads)
    threshold = _threshold(config_file, file, config, tensors, len(b_enc)) if activation == "jumprelu" else None
    by_norm = bool(config.get("sparsity_include_decoder_norm", True))
    if by_norm and threshold is not None:
        threshold = threshold / W_dec.norm(dim=1).clamp(min=1e-12)
    dictionary = canonical(
        _ACTIVATIONS[activation],
        *(W_enc, b_enc, W_dec, b_dec),
        subtracts_b_dec=bool(config.get("apply_decoder_bias_to_pre_encoder", False)),
        scale=scale,
        threshold=threshold,
        k=int(read_number(config_file, config, "top_k", most=len(b_enc))) if activation == "topk" else None,
    )
    if by_norm and activation == "topk":
        dictionary = unit_decoder(dictionary)
    base = "Llama3_1-8B-Base" in str(path.absolute())
    return dictionary, Origin(model="meta-llama/Llama-3.1-8B" if base else "", site=site_named(reads))


def _weights(file: Path, tensors: dict[str, Tensor], config: Mapping[str, Any]) -> list[Tensor]:
    """W_enc, b_enc, W_dec, b_dec, one row per latent; there are two sets of names."""
    width = config.get("d_model")
    if "encoder.weight" in tensors:
        shapes = {"encoder.weight": "FD", "encoder.bias": "F", "decoder.weight": "DF", "decoder.bias": "D"}
    else:
        shapes = {"W_E": "DF", "b_E": "F", "W_D": "FD", "b_D": "D"}
    if not config.get("use_decoder_bias", True):
        del shapes[next(name for name, letters in shapes.items() if letters == "D")]
    W_enc, b_enc, W_dec, *b_dec = shaped(file, tensors, shapes, D=width)
    if "encoder.weight" in tensors:
        return [W_enc, b_enc, W_dec.T, *(b_dec or [torch.zeros(W_enc.shape[1])])]
    return [W_enc.T, b_enc, W_dec, *(b_dec or [torch.zeros(W_enc.shape[0])])]


def _scale(where: Path, file: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], hook: str) -> float:
    """What activations are multiplied by before they are encoded."""
    name, norms = f"dataset_average_activation_norm.{hook}", config.get("dataset_average_activation_norm")
    match config.get("norm_activation", "dataset-wise"):
        case "inference":
            return 1.0
        case "dataset-wise" if name in tensors:
            norm = read_number(file, {name: float(shaped(file, tensors, {name: ""})[0])}, name)
        case "dataset-wise":
            norm = read_number(where, {name: norms.get("in") if isinstance(norms, dict) else None}, name)
        case mode:
            raise FormatError(
                f"{where}: norm_activation is {mode}: the norm of each {str(mode).split('-')[0]} divides it, which no "
                "fixed dictionary of raw activations does; only dataset-wise and inference can be read"
            )
    return math.sqrt(read_number(where, config, "d_model")) / norm


def _threshold(
    where: Path, file: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], n_latents: int
) -> Tensor:
    """θ (F): a tensor with its logarithm, or, in older files, one number in the configuration."""
    for name in ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold"):
        if name in tensors:
            return shaped(file, tensors, {name: "F"}, F=n_latents)[0].exp()
    return torch.full((n_latents,), read_number(where, config, "jump_relu_threshold"))
