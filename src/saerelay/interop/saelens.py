"""SAELens: cfg.json and sae_weights.safetensors, of finished SAEs and of training checkpoints, before and after 6.0.

Their forward, with W_enc (D, F): u = norm(x) − b_dec (if `apply_b_dec_to_input`), pre = u W_enc + b_enc, z by
`architecture`, x_hat = norm⁻¹(z W_dec + b_dec). Thresholds are strict (pre > threshold), as ours.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from saerelay.errors import FormatError
from saerelay.files import write_json
from saerelay.interop.files import canonical, read_config, read_number, read_tensors, said, shaped, ungated
from saerelay.interop.names import hook_name, site_named
from saerelay.interop.origin import Origin
from saerelay.runs.tensors import write_tensors
from saerelay.sae.dictionary import Dictionary, unit_decoder
from saerelay.sae.layer_normed import LayerNormed
from saerelay.sae.architectures import Architecture

NAME = "saelens"
CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
VERSION = "6.54.12"
"""The version whose format is written."""
BATCHTOPK = ("batchtopk", "matryoshka_batchtopk")
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", *BATCHTOPK)
NORMALISATIONS = ("none", "expected_average_only_in", "layer_norm")
BEFORE_6 = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
USED = {
    "model_name", "hook_name", "hf_hook_name", "hook_head_index", "context_size", "prepend_bos", "dataset_path", "l0",
    "sae_lens_version", "sae_lens_training_version", "training_architecture", "training_architecture_details",
    "saerelay",
}  # fmt: skip
"""Metadata that an Origin has fields for, or that is about the file; the rest is provenance."""


def recognises(path: Path) -> bool:
    """Whether a directory has cfg.json and sae_weights.safetensors."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> tuple[Dictionary | LayerNormed, Origin]:
    """A SAELens directory in canonical form: the same codes and reconstructions.

    Gated SAEs become the JumpReLU they equal. TopK with `rescale_acts_by_decoder_norm`, and checkpoints of BatchTopK
    and Matryoshka, become what SAELens itself makes of them at the end of training: rows of W_dec have unit norm, and
    the running threshold is that of all latents. The factor of `expected_average_only_in` is folded where it is on file
    (activation_scaler.json); else a warning says that there is none. Raises FormatError for transcoders, single heads,
    normalisations of other kinds, and damaged files.
    """
    config = {BEFORE_6.get(name, name): value for name, value in read_config(path / CONFIG).items()}
    metadata = said(config, "metadata", dict)
    if metadata is None:  # before 6.0 all of it was one level, and the default was True
        metadata = {"prepend_bos": True} | config
    _check_supported(path / CONFIG, config, metadata)
    dictionary = _dictionary(path, config, metadata)
    name = said(metadata, "hook_name", str) or ""
    other = {key: value for key, value in metadata.items() if key not in USED and key not in config}
    origin = Origin(
        model=said(metadata, "model_name", str) or "",
        site=site_named(name),
        module_path=said(metadata, "hf_hook_name", str) or ("" if "hook_" in name else name),
        context=said(metadata, "context_size", int),
        prepend_bos=said(metadata, "prepend_bos", bool),
        dataset=said(metadata, "dataset_path", str) or "",
        l0=said(metadata, "l0", float),
        provenance=other | (said(metadata, "saerelay", dict) or {}),
    )
    return (LayerNormed(dictionary) if config.get("normalize_activations") == "layer_norm" else dictionary), origin


def write(path: Path, dictionary: Dictionary, origin: Origin) -> None:
    """Write a dictionary as a finished SAE of SAELens, with the same codes and reconstructions.

    BatchTopK goes out as JumpReLU, as in SAELens, with `training_architecture` to say what it was.
    """
    d = dictionary
    tensors = {"W_enc": d.W_enc.T, "b_enc": d.b_enc, "W_dec": d.W_dec, "b_dec": d.b_dec}
    if d.threshold is not None:
        tensors["threshold"] = d.threshold
    config: dict[str, Any] = {
        "architecture": {"relu": "standard", "batchtopk": "jumprelu"}.get(d.architecture, d.architecture),
        "d_in": d.d_model,
        "d_sae": d.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if origin.site and origin.site.module == "attn_z" else "none",
    }
    if d.architecture == "topk":
        config |= {"k": d.k, "rescale_acts_by_decoder_norm": False}
    metadata: dict[str, Any] = {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": origin.model or None,
        "hook_name": hook_name(origin.site) if origin.site else origin.module_path or None,
        "hf_hook_name": origin.module_path or None,
        "hook_head_index": None,
        "context_size": origin.context,
        "prepend_bos": origin.prepend_bos,
        "dataset_path": origin.dataset or None,
        "l0": origin.l0,
        "saerelay": origin.provenance,
    }
    if d.architecture == "batchtopk":
        metadata |= {"training_architecture": "batchtopk", "training_architecture_details": {"k": d.k}}
    write_tensors(path / WEIGHTS, {name: tensor.cpu() for name, tensor in tensors.items()})
    write_json(path / CONFIG, config | {"metadata": metadata})


def _architecture(config: dict[str, Any]) -> object:
    """The architecture; before 6.0, TopK was an activation of the standard one."""
    architecture = config.get("architecture", "standard")
    return "topk" if architecture == "standard" and config.get("activation_fn") == "topk" else architecture


def _check_supported(path: Path, config: dict[str, Any], metadata: dict[str, Any]) -> None:
    architecture, name = _architecture(config), metadata.get("hook_name")
    if architecture not in ARCHITECTURES:
        why = "maps one site to another" if str(architecture).endswith("transcoder") else "is not known here"
        raise FormatError(f'{path}: architecture "{architecture}" {why}; these are read: {", ".join(ARCHITECTURES)}')
    if config.get("activation_fn", "relu") not in ("relu", "topk"):
        raise FormatError(f'{path}: activation "{config["activation_fn"]}" cannot be read; relu and topk can')
    out = metadata.get("hook_name_out")
    if out not in (None, name):
        raise FormatError(f"{path}: maps {name} to {out}; an SAE reconstructs what it reads, and only those are read")
    if metadata.get("hook_head_index") is not None:
        raise FormatError(
            f"{path}: reads head {metadata['hook_head_index']} of {name} alone; only SAEs of whole sites are read"
        )
    if config.get("normalize_activations") not in (None, False, True, *NORMALISATIONS):
        raise FormatError(
            f'{path}: normalize_activations = "{config["normalize_activations"]}" is no fixed map of raw activations; '
            f"these are read: {', '.join(NORMALISATIONS)}"
        )


def _dictionary(path: Path, config: dict[str, Any], metadata: dict[str, Any]) -> Dictionary:
    architecture, weights = _architecture(config), path / WEIGHTS
    tensors = read_tensors(weights)
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors and not bool((tensors[name] == 1).all()):
            raise FormatError(f"{weights}: tensor {name} is not all 1: decoders rescaled in that way are not read")
    jump = "log_threshold" if "log_threshold" in tensors else "threshold"  # the logarithm in older checkpoints
    shapes = {"W_enc": "DF", "W_dec": "FD", "b_dec": "D"}
    match architecture:
        case "gated":
            shapes |= {"b_gate": "F", "b_mag": "F", "r_mag": "F"}
        case "jumprelu":
            shapes |= {"b_enc": "F", jump: "F"}
        case "batchtopk" | "matryoshka_batchtopk":
            shapes |= {"b_enc": "F", "topk_threshold": ""}
        case _:
            shapes |= {"b_enc": "F"}
    found = shaped(weights, tensors, shapes, D=said(config, "d_in", int), F=said(config, "d_sae", int))
    (W_enc, W_dec, b_dec, b_enc), rest = found[:4], found[4:]
    W_enc, n_latents, scale = W_enc.T, len(W_dec), _scale(path, config)
    kind: Architecture = "relu"
    threshold, k = None, None
    details = said(metadata, "training_architecture_details", dict) or {}
    match architecture:
        case "topk":
            of_activation = said(config, "activation_fn_kwargs", dict) or {}
            kind, k = "topk", config.get("k", of_activation.get("k"))
        case "gated":
            kind = "jumprelu"
            W_enc, b_enc, threshold = ungated(W_enc, b_gate=b_enc, b_mag=rest[0], r_mag=rest[1])
        case "jumprelu":
            threshold = rest[0].exp() if jump == "log_threshold" else rest[0]
            kind = "jumprelu"
            if metadata.get("training_architecture") in BATCHTOPK and "k" in details:
                kind, k = "batchtopk", details["k"]
        case "batchtopk" | "matryoshka_batchtopk":
            kind, k = "batchtopk", config.get("k")
            threshold = rest[0].clamp(min=0).expand(n_latents)
    if kind in ("topk", "batchtopk"):
        if kind == "batchtopk" and isinstance(k, float):
            k = max(1, round(k))  # a mean over tokens
        k = int(read_number(path / CONFIG, {"k": k}, "k", most=n_latents))
    subtracts = config.get("apply_b_dec_to_input") is not False
    dictionary = canonical(kind, W_enc, b_enc, W_dec, b_dec, subtracts_b_dec=subtracts, scale=scale, k=k)
    if architecture in ("topk", *BATCHTOPK) and config.get("rescale_acts_by_decoder_norm"):
        dictionary = unit_decoder(dictionary)  # codes are divided by the scale: they are in units of raw x
        threshold = None if threshold is None else threshold / scale
    return replace(dictionary, threshold=threshold)


def _scale(path: Path, config: dict[str, Any]) -> float:
    """The factor s of a dictionary that reads s·x."""
    if config.get("normalize_activations") not in (True, "expected_average_only_in"):
        return 1.0
    if (path / SCALER).is_file():
        return read_number(path / SCALER, read_config(path / SCALER), "scaling_factor")
    warnings.warn(
        f"{path / CONFIG}: was trained on activations times a factor (normalize_activations = "
        f"expected_average_only_in) that is not on file ({SCALER}); read as if it were 1, as SAELens does",
        stacklevel=2,
    )
    return 1.0
