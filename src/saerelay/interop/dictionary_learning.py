"""dictionary_learning (Marks, Karvonen and Mueller): ae.pt, a state dict, and config.json.

Their forward: codes z of u = x − b_dec, by class (JumpReluAutoEncoder and AutoEncoderNew: u = x),
and x_hat = z W_dec + b_dec. Classes with linear layers store
decoder.weight (D, F), the others W_enc (D, F).
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saerelay.errors import FormatError, RunDirectoryError
from saerelay.files import replacing, write_json
from saerelay.interop.canonical import canonical, encoder_bias, from_gate, to_gate
from saerelay.interop.files import lookup, only_tensors, read_config, read_count, read_number, read_pickle, take
from saerelay.interop.names import site_named
from saerelay.interop.origin import Origin
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.units import Units
from saerelay.site import MODULE_KINDS, Site

NAME = "dictionary_learning"
CONFIG = "config.json"
WEIGHTS = "ae.pt"

_LINEAR = {"encoder.weight": "FD", "encoder.bias": "F", "decoder.weight": "DF"}
_PLAIN = {"W_enc": "DF", "b_enc": "F", "W_dec": "FD", "b_dec": "D"}
SHAPES: dict[str, dict[str, str]] = {
    "AutoEncoder": {**_LINEAR, "bias": "D"},
    "AutoEncoderNew": {**_LINEAR, "decoder.bias": "D"},
    "AutoEncoderTopK": {**_LINEAR, "b_dec": "D"},
    "BatchTopKSAE": {**_LINEAR, "b_dec": "D", "threshold": ""},
    "MatryoshkaBatchTopKSAE": {**_PLAIN, "threshold": ""},
    "JumpReluAutoEncoder": {**_PLAIN, "threshold": "F"},
    "GatedAutoEncoder": {
        "encoder.weight": "FD",
        "gate_bias": "F",
        "decoder.weight": "DF",
        "decoder_bias": "D",
        "mag_bias": "F",
        "r_mag": "F",
    },
}
"""The tensors of each class: W_enc, b_enc, W_dec, b_dec in that order, then the others."""

_WRITTEN_CLASSES = {
    "relu": "AutoEncoder",
    "topk": "AutoEncoderTopK",
    "batchtopk": "BatchTopKSAE",
    "gated": "GatedAutoEncoder",
}
"""Their class for each of our architectures; JumpReLU, and BatchTopK with many thresholds, need
another class."""

_TRAINERS = {
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "GatedAutoEncoder": "GatedSAETrainer",
}


def recognises(path: Path) -> bool:
    """Whether a directory has an ae.pt, or a file is called ae.pt or ae_STEP.pt."""
    if path.is_file():
        return re.fullmatch(r"ae(_\d+)?\.pt", path.name) is not None
    return (path / WEIGHTS).is_file()


def read(path: Path) -> tuple[Dictionary, Origin]:
    """Read a `trainer_i` directory, an ae.pt, or a checkpoints/ae_STEP.pt in canonical form.

    BatchTopK and Matryoshka act as at inference, by threshold. A backup (a state dict saved
    together with its optimizer) reads activations divided by `norm_factor`, which is folded in.

    The class is given by config.json, or else by the names of the tensors. TopK and BatchTopK have
    the same names, and both keep a running threshold: without config.json, files with a threshold
    are ambiguous (FormatError).

    The site is given by `submodule_name`: "resid_post_layer_3", "resid_post" with `layer`, or a
    module's path.
    """
    weights = path / WEIGHTS if path.is_dir() else path
    config = _config(weights)
    trainer = lookup(config, "trainer", dict) or {}
    buffer = lookup(config, "buffer", dict) or {}
    values = read_pickle(weights)
    norm_factor = None
    if "ae" in values:  # a backup
        if values.get("norm_factor") is not None:
            norm_factor = read_number(weights, values, "norm_factor")
        trainer = {**(lookup(values, "config", dict) or {}), **trainer}
        values = lookup(values, "ae", dict) or {}
    if trainer.get("transcoder") or buffer.get("io") == "in_and_out":
        raise FormatError(f"{weights}: is a transcoder, which maps a module's input to its output; only SAEs are read")

    dictionary = _dictionary(weights, values, trainer)
    if norm_factor is not None:
        # Its codes are those of x / norm_factor, and ours are norm_factor times as large: as after
        # training in other units, the weights stay, and biases and thresholds are scaled.
        mean = torch.zeros(dictionary.d_model)
        dictionary = Units(mean, torch.tensor(norm_factor)).to_canonical(dictionary)
    origin = Origin(
        model=lookup(trainer, "lm_name", str) or "",
        site=_site(trainer, buffer),
        module_path=_module_path(trainer, buffer),
        context=lookup(buffer, "ctx_len", int),
        provenance=lookup(config, "saerelay", dict) or {},
    )
    return dictionary, origin


def write(path: Path, dictionary: Dictionary, origin: Origin) -> None:
    """Write a dictionary in the form that dictionary_learning trains: ae.pt and config.json.

    BatchTopK with one threshold stays BatchTopK; with several thresholds it becomes JumpReLU, which
    has one for each latent. `AutoEncoder.from_pretrained` normalises the rows of W_dec and scales
    codes to match.
    """
    kind = _class_for(dictionary)
    state = _state(kind, dictionary)
    k = {"k": dictionary.k} if "TopK" in kind else {}
    site = origin.site
    trainer = {
        "trainer_class": _TRAINERS[kind],
        "dict_class": kind,
        "activation_dim": dictionary.d_model,
        "dict_size": dictionary.n_latents,
        **k,
        "layer": site.layer if site else None,
        "lm_name": origin.model,
        "submodule_name": f"{site.module}_layer_{site.layer}" if site else None,
    }
    buffer = {"d_submodule": dictionary.d_model, "io": "out", "ctx_len": origin.context}
    _write_state(path / WEIGHTS, state)
    write_json(path / CONFIG, {"trainer": trainer, "buffer": buffer, "saerelay": origin.provenance})


def _class_for(dictionary: Dictionary) -> str:
    """Return their class that computes the same function as a dictionary of ours."""
    kind = _WRITTEN_CLASSES.get(dictionary.architecture, "JumpReluAutoEncoder")
    threshold = dictionary.threshold
    if kind == "BatchTopKSAE" and threshold is not None and bool((threshold != threshold[0]).any()):
        return "JumpReluAutoEncoder"
    return kind


def _state(kind: str, dictionary: Dictionary) -> dict[str, Tensor]:
    """Return the tensors of a dictionary under the names of their class."""
    if kind == "JumpReluAutoEncoder":
        assert dictionary.threshold is not None
        return {
            "W_enc": dictionary.W_enc.T,
            "b_enc": dictionary.b_enc,
            "W_dec": dictionary.W_dec,
            "b_dec": dictionary.b_dec,
            "threshold": dictionary.threshold,
        }
    if kind == "GatedAutoEncoder":
        b_mag = encoder_bias(dictionary)
        W, b_gate, r_mag = to_gate(dictionary, b_mag)
        return {
            "encoder.weight": W,
            "gate_bias": b_gate,
            "decoder.weight": dictionary.W_dec.T,
            "decoder_bias": dictionary.b_dec,
            "mag_bias": b_mag,
            "r_mag": r_mag,
        }
    state = {
        "encoder.weight": dictionary.W_enc,
        "encoder.bias": encoder_bias(dictionary),
        "decoder.weight": dictionary.W_dec.T,
    }
    if kind == "AutoEncoder":
        state["bias"] = dictionary.b_dec
        return state
    state["b_dec"] = dictionary.b_dec
    state["k"] = torch.tensor(dictionary.k, dtype=torch.int32)
    not_known = torch.tensor(-1.0)
    state["threshold"] = not_known if dictionary.threshold is None else dictionary.threshold[0]
    return state


def _config(weights: Path) -> dict[str, Any]:
    """Read the config.json next to the weights, or, for a checkpoint, one level above them."""
    directories = [weights.parent]
    if weights.parent.name == "checkpoints":
        directories.append(weights.parent.parent)
    for directory in directories:
        if (directory / CONFIG).is_file():
            return read_config(directory / CONFIG)
    return {}


def _class(weights: Path, values: dict[str, Any], trainer: dict[str, Any]) -> str:
    """Return their class, as given by the configuration, or else by the tensors."""
    kind = lookup(trainer, "dict_class", str)
    if kind is not None:
        if kind not in SHAPES:
            raise FormatError(f'{weights}: unknown dict_class "{kind}"; these are read: {", ".join(SHAPES)}')
        return kind

    if "W_enc" in values:
        return "MatryoshkaBatchTopKSAE" if "group_sizes" in values else "JumpReluAutoEncoder"
    threshold = values.get("threshold")
    if isinstance(threshold, Tensor) and bool((threshold >= 0).all()):
        raise FormatError(
            f"{weights}: may be an AutoEncoderTopK or a BatchTopKSAE, whose files look the same; put its config.json "
            'beside it, or one that says {"trainer": {"dict_class": "BatchTopKSAE"}}'
        )
    if "decoder_bias" in values:
        return "GatedAutoEncoder"
    if "bias" in values:
        return "AutoEncoder"
    if "decoder.bias" in values:
        return "AutoEncoderNew"
    return "AutoEncoderTopK"


def _dictionary(weights: Path, values: dict[str, Any], trainer: dict[str, Any]) -> Dictionary:
    """Return the dictionary of a state dict, in canonical form."""
    kind = _class(weights, values, trainer)
    tensors = only_tensors(values)
    d_model = lookup(trainer, "activation_dim", int)
    n_latents = lookup(trainer, "dict_size", int)
    W_enc, b_enc, W_dec, b_dec, *others = take(weights, tensors, SHAPES[kind], D=d_model, F=n_latents)
    if "encoder.weight" in SHAPES[kind]:
        W_dec = W_dec.T
    else:
        W_enc = W_enc.T

    architecture: str = "relu"
    threshold = None
    r_mag = None
    match kind:
        case "AutoEncoderTopK":
            architecture = "topk"
        case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
            architecture = "batchtopk"
            threshold = others[0].clamp(min=0).expand(len(W_enc))  # -1 means: not known yet
        case "JumpReluAutoEncoder":
            architecture = "jumprelu"
            threshold = others[0]
        case "GatedAutoEncoder":
            architecture = "gated"
            b_mag, r_mag = others
            W_enc, b_enc, threshold = from_gate(W_enc, r_mag=r_mag, b_gate=b_enc, b_mag=b_mag)

    k = None
    if architecture in ("topk", "batchtopk"):
        stated = {"k": take(weights, tensors, {"k": ""})[0].item()} if "k" in tensors else trainer
        k = read_count(weights, stated, "k", most=len(W_enc))
    dictionary = Dictionary(
        architecture=architecture,
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        threshold=threshold,
        r_mag=r_mag,
        k=k,
    )
    return canonical(dictionary, subtracts_b_dec=kind not in ("JumpReluAutoEncoder", "AutoEncoderNew"))


def _site(trainer: dict[str, Any], buffer: dict[str, Any]) -> Site | None:
    """Return the site that a configuration names, if it is one of ours."""
    name = lookup(trainer, "submodule_name", str) or ""
    layer = lookup(trainer, "layer", int)
    for kind in MODULE_KINDS:
        match = re.fullmatch(rf"{kind}(?:_layer_(\d+))?", name)
        if match and match[1]:
            return Site(int(match[1]), kind)
        if match and layer is not None and layer >= 0:
            return Site(layer, kind)
    return site_named(_module_path(trainer, buffer))


def _module_path(trainer: dict[str, Any], buffer: dict[str, Any]) -> str:
    """Return the path of the module whose output is read, if `submodule_name` is one; "" if it is not."""
    name = lookup(trainer, "submodule_name", str) or ""
    reads_output = buffer.get("io", "out") == "out"
    return name if reads_output and site_named(name) else ""


def _write_state(path: Path, state: dict[str, Tensor]) -> None:
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, file)
    except (OSError, RuntimeError) as error:
        raise RunDirectoryError(f"{path}: cannot be written ({error}); free disk space and try again") from None
