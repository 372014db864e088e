"""dictionary_learning (Marks, Karvonen and Mueller): ae.pt, a plain state dict, and config.json beside it.

Their forward: z by class from u = x − b_dec (JumpReluAutoEncoder and AutoEncoderNew: u = x), x_hat = z W_dec + b_dec.
Classes with linear layers have decoder.weight (D, F), the others W_enc (D, F).
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saerelay.errors import FormatError, RunDirectoryError
from saerelay.files import replacing, write_json
from saerelay.interop.files import (
    canonical,
    encoder_bias,
    read_config,
    read_number,
    read_pickle,
    said,
    shaped,
    ungated,
)
from saerelay.interop.names import site_named
from saerelay.interop.origin import Origin
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.units import to_canonical
from saerelay.sae.architectures import Architecture
from saerelay.site import MODULE_KINDS, Site

NAME = "dictionary_learning"
CONFIG, WEIGHTS = "config.json", "ae.pt"
_LINEAR = {"encoder.weight": "FD", "encoder.bias": "F", "decoder.weight": "DF"}
_PLAIN = {"W_enc": "DF", "b_enc": "F", "W_dec": "FD", "b_dec": "D"}
SHAPES: dict[str, dict[str, str]] = {
    "AutoEncoder": _LINEAR | {"bias": "D"},
    "AutoEncoderNew": _LINEAR | {"decoder.bias": "D"},
    "AutoEncoderTopK": _LINEAR | {"b_dec": "D"},
    "BatchTopKSAE": _LINEAR | {"b_dec": "D", "threshold": ""},
    "MatryoshkaBatchTopKSAE": _PLAIN | {"threshold": ""},
    "JumpReluAutoEncoder": _PLAIN | {"threshold": "F"},
    "GatedAutoEncoder": {"encoder.weight": "FD", "gate_bias": "F", "decoder.weight": "DF", "decoder_bias": "D",
                         "mag_bias": "F", "r_mag": "F"},
}  # fmt: skip
"""The tensors of each class: W_enc, b_enc, W_dec, b_dec in that order, then the others."""
TRAINERS = {"AutoEncoder": "StandardTrainer", "AutoEncoderTopK": "TopKTrainer", "BatchTopKSAE": "BatchTopKTrainer",
            "JumpReluAutoEncoder": "JumpReluTrainer"}  # fmt: skip


def recognises(path: Path) -> bool:
    """Whether a directory has an ae.pt, or a file is called ae.pt or ae_STEP.pt."""
    return (path / WEIGHTS).is_file() or (path.is_file() and re.fullmatch(r"ae(_\d+)?\.pt", path.name) is not None)


def read(path: Path) -> tuple[Dictionary, Origin]:
    """A `trainer_i` directory, an ae.pt, or a checkpoints/ae_STEP.pt in canonical form: same codes and reconstructions.

    Gated SAEs become the JumpReLU they equal; BatchTopK and Matryoshka act as at inference, by threshold. A backup (a
    state dict wrapped with its optimizer) is of activations divided by `norm_factor`, which is folded. The class is
    what config.json says, or else what the names of the tensors say. TopK and BatchTopK share these, and both keep a
    running threshold: without config.json they cannot be told apart once there is one (FormatError).
    The site is that of `submodule_name`: "resid_post_layer_3", "resid_post" with `layer`, or a module's path.
    """
    weights = path / WEIGHTS if path.is_dir() else path
    config = _config(weights)
    trainer, buffer = said(config, "trainer", dict) or {}, said(config, "buffer", dict) or {}
    values, factor = read_pickle(weights), None
    if "ae" in values:
        factor = None if values.get("norm_factor") is None else read_number(weights, values, "norm_factor")
        trainer = (said(values, "config", dict) or {}) | trainer
        values = said(values, "ae", dict) or {}
    if trainer.get("transcoder") or buffer.get("io") == "in_and_out":
        raise FormatError(f"{weights}: is a transcoder, which maps a module's input to its output; only SAEs are read")
    dictionary = _dictionary(weights, values, trainer)
    if factor is not None:  # W stays: codes of x / factor, times factor, are codes of x
        dictionary = to_canonical(dictionary, torch.zeros(dictionary.d_model), torch.tensor(factor))
    origin = Origin(
        model=said(trainer, "lm_name", str) or "",
        site=_site(trainer, buffer),
        context=said(buffer, "ctx_len", int),
        provenance=said(config, "saerelay", dict) or {},
    )
    return dictionary, origin


def write(path: Path, dictionary: Dictionary, origin: Origin) -> None:
    """Write a dictionary as a trained one of dictionary_learning, ae.pt and config.json.

    BatchTopK with one threshold stays that; with several it goes out as JumpReLU, which has one for each latent. Where
    rows of W_dec are not of unit norm, `AutoEncoder.from_pretrained` makes them so, and scales codes to match.
    """
    d = dictionary
    kind = {"relu": "AutoEncoder", "topk": "AutoEncoderTopK", "batchtopk": "BatchTopKSAE"}.get(d.architecture, "")
    if d.threshold is not None and (not kind or bool((d.threshold != d.threshold[0]).any())):
        kind = "JumpReluAutoEncoder"
    if kind == "JumpReluAutoEncoder":
        state = {"W_enc": d.W_enc.T, "b_enc": d.b_enc, "W_dec": d.W_dec, "b_dec": d.b_dec, "threshold": d.threshold}
    else:
        state = {"encoder.weight": d.W_enc, "encoder.bias": encoder_bias(d), "decoder.weight": d.W_dec.T}
        state["bias" if kind == "AutoEncoder" else "b_dec"] = d.b_dec
    k = {} if kind in ("AutoEncoder", "JumpReluAutoEncoder") else {"k": d.k}
    if k:
        state["k"] = torch.tensor(d.k, dtype=torch.int32)
        state["threshold"] = torch.tensor(-1.0) if d.threshold is None else d.threshold[0]
    trainer: dict[str, Any] = {
        "trainer_class": TRAINERS[kind],
        "dict_class": kind,
        "activation_dim": d.d_model,
        "dict_size": d.n_latents,
        **k,
        "layer": origin.site.layer if origin.site else None,
        "lm_name": origin.model,
        "submodule_name": f"{origin.site.module}_layer_{origin.site.layer}" if origin.site else None,
    }
    _write_state(path / WEIGHTS, {name: tensor for name, tensor in state.items() if tensor is not None})
    buffer = {"d_submodule": d.d_model, "io": "out", "ctx_len": origin.context}
    write_json(path / CONFIG, {"trainer": trainer, "buffer": buffer, "saerelay": origin.provenance})


def _config(weights: Path) -> dict[str, Any]:
    """The config.json of a trainer's directory; a checkpoint lies one level below it."""
    for directory in (weights.parent, weights.parent.parent):
        if (directory / CONFIG).is_file():
            return read_config(directory / CONFIG)
        if weights.parent.name != "checkpoints":
            break
    return {}


def _class(weights: Path, values: dict[str, Any], trainer: dict[str, Any]) -> str:
    kind = said(trainer, "dict_class", str)
    if kind is not None:
        if kind not in SHAPES:
            raise FormatError(f'{weights}: dict_class "{kind}" is not known; these are read: {", ".join(SHAPES)}')
        return kind
    threshold = values.get("threshold")
    if "W_enc" in values:
        return "MatryoshkaBatchTopKSAE" if "group_sizes" in values else "JumpReluAutoEncoder"
    if isinstance(threshold, Tensor) and bool((threshold >= 0).all()):
        raise FormatError(
            f"{weights}: may be an AutoEncoderTopK or a BatchTopKSAE, whose files look the same; put its config.json "
            'beside it, or one that says {"trainer": {"dict_class": "BatchTopKSAE"}}'
        )
    by_bias = {"decoder_bias": "GatedAutoEncoder", "bias": "AutoEncoder", "decoder.bias": "AutoEncoderNew"}
    return next((kind for name, kind in by_bias.items() if name in values), "AutoEncoderTopK")


def _dictionary(weights: Path, values: dict[str, Any], trainer: dict[str, Any]) -> Dictionary:
    kind = _class(weights, values, trainer)
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    sizes = {"D": said(trainer, "activation_dim", int), "F": said(trainer, "dict_size", int)}
    W_enc, b_enc, W_dec, b_dec, *rest = shaped(weights, tensors, SHAPES[kind], **sizes)
    if "encoder.weight" in SHAPES[kind]:
        W_dec = W_dec.T
    else:
        W_enc = W_enc.T
    n_latents, threshold, k = len(W_enc), None, None
    architecture: Architecture = "relu"
    match kind:
        case "AutoEncoderTopK":
            architecture = "topk"
        case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
            architecture, threshold = "batchtopk", rest[0].clamp(min=0).expand(n_latents)  # -1: not known yet
        case "JumpReluAutoEncoder":
            architecture, threshold = "jumprelu", rest[0]
        case "GatedAutoEncoder":
            architecture = "jumprelu"
            W_enc, b_enc, threshold = ungated(W_enc, b_gate=b_enc, b_mag=rest[0], r_mag=rest[1])
    if architecture in ("topk", "batchtopk"):
        on_file = {"k": shaped(weights, tensors, {"k": ""})[0].item()} if "k" in tensors else trainer
        k = int(read_number(weights, on_file, "k", most=n_latents))
    subtracts = kind not in ("JumpReluAutoEncoder", "AutoEncoderNew")
    return canonical(architecture, W_enc, b_enc, W_dec, b_dec, subtracts_b_dec=subtracts, threshold=threshold, k=k)


def _site(trainer: dict[str, Any], buffer: dict[str, Any]) -> Site | None:
    name, layer = said(trainer, "submodule_name", str) or "", said(trainer, "layer", int)
    for kind in MODULE_KINDS:
        match = re.fullmatch(rf"{kind}(?:_layer_(\d+))?", name)
        if match and (match[1] or (layer is not None and layer >= 0)):
            return Site(int(match[1] or layer or 0), kind)
    return site_named(name) if buffer.get("io", "out") == "out" else None


def _write_state(path: Path, state: dict[str, Tensor]) -> None:
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, file)
    except (OSError, RuntimeError) as error:
        raise RunDirectoryError(f"{path}: cannot be written ({error}); free disk space and try again") from None
