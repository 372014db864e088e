"""SAELens, before and since version 6.0, SAEs and checkpoints: cfg.json, sae_weights.safetensors.

Their forward, with W_enc (D, F): u = norm(x) − b_dec (if `apply_b_dec_to_input`),
pre = u W_enc + b_enc, z by `architecture`, x_hat = norm⁻¹(z W_dec + b_dec). Thresholds are strict
(pre > threshold), as ours.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor

from saerelay.errors import FormatError
from saerelay.files import write_json
from saerelay.interop.canonical import canonical, from_gate, to_gate
from saerelay.interop.files import lookup, read_config, read_count, read_number, read_tensors, take
from saerelay.interop.names import hook_name, site_named
from saerelay.interop.origin import Origin
from saerelay.runs.tensors import write_tensors
from saerelay.sae.dictionary import Dictionary, unit_decoder
from saerelay.sae.layer_normed import LayerNormed

NAME = "saelens"
CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"
REGISTRY = "pretrained_saes.yaml"
"""The file in which SAELens lists published SAEs; the file we write holds one entry of such a list."""
VERSION = "6.54.12"
"""The version whose format is written."""

BATCHTOPK = ("batchtopk", "matryoshka_batchtopk")
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", *BATCHTOPK)
NORMALISATIONS = ("none", "expected_average_only_in", "layer_norm")

_ARCHITECTURES_WRITTEN: dict[str, str] = {
    "relu": "standard",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "jumprelu",
}
"""SAELens' architecture for each of ours; SAELens itself turns a trained BatchTopK into JumpReLU."""

_KEYS_BEFORE_6 = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
"""Keys of cfg.json before 6.0, and their names since."""

_KNOWN_METADATA = {
    # fields of Origin
    "model_name",
    "hook_name",
    "hf_hook_name",
    "context_size",
    "prepend_bos",
    "dataset_path",
    "l0",
    "saerelay",
    # facts about the file itself
    "hook_head_index",
    "sae_lens_version",
    "sae_lens_training_version",
    "training_architecture",
    "training_architecture_details",
}
"""All other metadata is provenance."""


def recognises(path: Path) -> bool:
    """Whether a directory has cfg.json and sae_weights.safetensors."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> tuple[Dictionary | LayerNormed, Origin]:
    """Read a SAELens directory in canonical form: the same codes and reconstructions.

    TopK with `rescale_acts_by_decoder_norm`, and checkpoints of BatchTopK and Matryoshka, are
    converted as SAELens itself does at the end of training: rows of W_dec have unit norm, and the
    running threshold is that of all latents. The factor of `expected_average_only_in` is folded in
    if the directory has it (activation_scaler.json); otherwise a warning says that it is missing.
    Raises FormatError for transcoders, single heads, normalisations of other kinds, and damaged
    files.
    """
    config = {}
    for key, value in read_config(path / CONFIG).items():
        config[_KEYS_BEFORE_6.get(key, key)] = value
    metadata = lookup(config, "metadata", dict)
    if metadata is None:  # before 6.0 everything was on one level, and BOS was there by default
        metadata = {"prepend_bos": True, **config}
    _check_supported(path / CONFIG, config, metadata)

    dictionary = _dictionary(path, config, metadata)
    _warn_of_changes(path / CONFIG, metadata)
    if config.get("normalize_activations") == "layer_norm":
        return LayerNormed(dictionary), _origin(config, metadata)
    return dictionary, _origin(config, metadata)


def write(path: Path, dictionary: Dictionary, origin: Origin) -> None:
    """Write a dictionary as a finished SAE of SAELens, with the same codes and reconstructions.

    BatchTopK becomes JumpReLU, as in SAELens; `training_architecture` names the original.
    """
    site = origin.site
    config: dict[str, Any] = {
        "architecture": _ARCHITECTURES_WRITTEN[dictionary.architecture],
        "d_in": dictionary.d_model,
        "d_sae": dictionary.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if site and site.module == "attn_z" else "none",
    }
    if dictionary.architecture == "topk":
        config["k"] = dictionary.k
        config["rescale_acts_by_decoder_norm"] = False
    config["metadata"] = {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": origin.model or None,
        "hook_name": hook_name(site) if site else origin.module_path or None,
        "hf_hook_name": origin.module_path or None,
        "hook_head_index": None,
        "context_size": origin.context,
        "prepend_bos": origin.prepend_bos,
        "dataset_path": origin.dataset or None,
        "l0": origin.l0,
        "saerelay": origin.provenance,
    }
    if dictionary.architecture == "batchtopk":
        config["metadata"]["training_architecture"] = "batchtopk"
        config["metadata"]["training_architecture_details"] = {"k": dictionary.k}

    tensors = dictionary.tensors()
    if dictionary.architecture == "gated":
        tensors["W_enc"], tensors["b_gate"], _ = to_gate(dictionary, dictionary.b_enc)
        tensors["b_mag"] = tensors.pop("b_enc")
        del tensors["threshold"]
    tensors["W_enc"] = tensors["W_enc"].T
    write_tensors(path / WEIGHTS, tensors)
    write_json(path / CONFIG, config)


class Listed(NamedTuple):
    """The facts about one SAE in a list of SAEs."""

    path: str
    """Its folder in the repository."""
    l0: float | None
    explained_variance: float | None


def registry_entry(release: str, repo: str, model: str, saes: Sequence[Listed]) -> str:
    """Return the entry of a suite in SAELens' list of published SAEs, as YAML.

    >>> print(registry_entry("mine", "me/saes", "openai-community/gpt2", [Listed("layer_3", 32.0, None)]), end="")
    mine:
      repo_id: me/saes
      model: openai-community/gpt2
      saes:
      - id: layer_3
        path: layer_3
        l0: 32.0

    With it in the list, SAELens loads an SAE by release and id: `SAE.from_pretrained("mine", "layer_3")`.
    """
    listed = []
    for sae in saes:
        entry: dict[str, Any] = {"id": sae.path, "path": sae.path}
        if sae.l0 is not None:
            entry["l0"] = round(sae.l0, 2)
        if sae.explained_variance is not None:
            entry["variance_explained"] = round(sae.explained_variance, 4)
        listed.append(entry)
    content = {release: {"repo_id": repo, "model": model, "saes": listed}}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _origin(config: dict[str, Any], metadata: dict[str, Any]) -> Origin:
    """Return the model, the data and the provenance that a configuration states."""
    name = lookup(metadata, "hook_name", str) or ""
    # SAELens also reads Hugging Face models without TransformerLens; hooks then have the modules'
    # names.
    module_path = lookup(metadata, "hf_hook_name", str)
    if not module_path:
        module_path = "" if "hook_" in name else name

    provenance = {}
    for key, value in metadata.items():
        if key not in _KNOWN_METADATA and key not in config:
            provenance[key] = value
    provenance.update(lookup(metadata, "saerelay", dict) or {})
    return Origin(
        model=lookup(metadata, "model_name", str) or "",
        site=site_named(name),
        module_path=module_path,
        context=lookup(metadata, "context_size", int),
        prepend_bos=lookup(metadata, "prepend_bos", bool),
        dataset=lookup(metadata, "dataset_path", str) or "",
        l0=lookup(metadata, "l0", float),
        provenance=provenance,
    )


def _architecture(config: dict[str, Any]) -> object:
    """Return their architecture; before 6.0, TopK was an activation of the standard architecture."""
    architecture = config.get("architecture", "standard")
    if architecture == "standard" and config.get("activation_fn") == "topk":
        return "topk"
    return architecture


def _check_supported(path: Path, config: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Raise FormatError for an SAE that is equivalent to no dictionary of ours."""
    architecture = _architecture(config)
    activation = config.get("activation_fn", "relu")
    normalisation = config.get("normalize_activations")
    reads = metadata.get("hook_name")
    writes = metadata.get("hook_name_out")
    head = metadata.get("hook_head_index")
    if str(architecture).endswith("transcoder"):
        problem = f'architecture "{architecture}" maps one site to another; these are read: {", ".join(ARCHITECTURES)}'
    elif architecture not in ARCHITECTURES:
        problem = f'architecture "{architecture}" is not known here; these are read: {", ".join(ARCHITECTURES)}'
    elif activation not in ("relu", "topk"):
        problem = f'activation "{activation}" cannot be read; relu and topk can'
    elif writes not in (None, reads):
        problem = f"maps {reads} to {writes}; an SAE reconstructs what it reads, and only SAEs are read"
    elif head is not None:
        problem = f"reads only head {head} of {reads}; only SAEs of whole sites are read"
    elif normalisation not in (None, False, True, *NORMALISATIONS):
        problem = (
            f'normalize_activations = "{normalisation}" is not a fixed map of raw activations; '
            f"these are read: {', '.join(NORMALISATIONS)}"
        )
    else:
        return
    raise FormatError(f"{path}: {problem}")


def _dictionary(path: Path, config: dict[str, Any], metadata: dict[str, Any]) -> Dictionary:
    """Read the dictionary of a directory, in canonical form."""
    architecture = _architecture(config)
    tensors = read_tensors(path / WEIGHTS)
    _check_not_rescaled(path / WEIGHTS, tensors)
    shapes = _shapes(architecture, tensors)
    d_model = lookup(config, "d_in", int)
    n_latents = lookup(config, "d_sae", int)
    W_enc, W_dec, b_dec, b_enc, *others = take(path / WEIGHTS, tensors, shapes, D=d_model, F=n_latents)
    W_enc = W_enc.T

    kind: str = "relu"
    threshold = None
    r_mag = None
    match architecture:
        case "topk":
            kind = "topk"
        case "gated":
            kind = "gated"
            b_mag, r_mag = others
            W_enc, b_enc, threshold = from_gate(W_enc, r_mag=r_mag, b_gate=b_enc, b_mag=b_mag)
        case "jumprelu":
            kind = "batchtopk" if _was_batchtopk(metadata) else "jumprelu"
            threshold = others[0].exp() if "log_threshold" in shapes else others[0]
        case "batchtopk" | "matryoshka_batchtopk":
            kind = "batchtopk"
            threshold = others[0].clamp(min=0).expand(len(W_dec))

    dictionary = Dictionary(
        architecture=kind,
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        k=_k(path / CONFIG, config, metadata, most=len(W_dec)) if kind in ("topk", "batchtopk") else None,
    )
    scale = _scale(path, config)
    subtracts_b_dec = config.get("apply_b_dec_to_input") is not False
    dictionary = canonical(dictionary, subtracts_b_dec=subtracts_b_dec, scale=scale)
    if architecture in ("topk", *BATCHTOPK) and config.get("rescale_acts_by_decoder_norm"):
        # With n the norm of a row of W_dec, SAELens' threshold is for codes z·n, and unit_decoder
        # makes them z·n / s.
        dictionary = unit_decoder(dictionary)
        threshold = None if threshold is None else threshold / scale
    return replace(dictionary, threshold=threshold, r_mag=r_mag)


def _shapes(architecture: object, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return the tensors of an architecture: W_enc, W_dec, b_dec, an encoder bias, then others."""
    shapes = {"W_enc": "DF", "W_dec": "FD", "b_dec": "D"}
    match architecture:
        case "gated":
            return {**shapes, "b_gate": "F", "b_mag": "F", "r_mag": "F"}
        case "jumprelu":
            is_old = "log_threshold" in tensors  # some checkpoints store the threshold's logarithm
            return {**shapes, "b_enc": "F", "log_threshold" if is_old else "threshold": "F"}
        case "batchtopk" | "matryoshka_batchtopk":
            return {**shapes, "b_enc": "F", "topk_threshold": ""}
        case _:
            return {**shapes, "b_enc": "F"}


def _check_not_rescaled(weights: Path, tensors: dict[str, Tensor]) -> None:
    """Raise FormatError if the decoder was rescaled in fine-tuning."""
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors and not bool((tensors[name] == 1).all()):
            raise FormatError(
                f"{weights}: tensor {name} is not all 1; decoders that were rescaled by it cannot be read"
            )


def _was_batchtopk(metadata: dict[str, Any]) -> bool:
    """Whether a JumpReLU was trained as BatchTopK, and its k is known."""
    details = lookup(metadata, "training_architecture_details", dict) or {}
    return metadata.get("training_architecture") in BATCHTOPK and "k" in details


def _k(path: Path, config: dict[str, Any], metadata: dict[str, Any], *, most: int) -> int:
    """Return the active latents per token, from wherever this version of SAELens keeps them."""
    architecture = _architecture(config)
    k: Any = config.get("k")
    if architecture == "topk" and "k" not in config:  # before 6.0
        k = (lookup(config, "activation_fn_kwargs", dict) or {}).get("k")
    if architecture == "jumprelu":
        k = (lookup(metadata, "training_architecture_details", dict) or {}).get("k")
    if architecture != "topk" and isinstance(k, float):  # a mean over the tokens of a batch
        k = max(1, round(k))
    return read_count(path, {"k": k}, "k", most=most)


_LOADING = ("device", "dtype", "local", "revision", "token", "cache", "trust", "checkpoint", "n_devices", "hf_")
"""Parts of the names of options that say how a model is loaded, not how it is changed."""


def _warn_of_changes(path: Path, metadata: dict[str, Any]) -> None:
    """Warn about an SAE whose model was changed when it was loaded: here it reads the unchanged model."""
    changes = {}
    for key, value in (lookup(metadata, "model_from_pretrained_kwargs", dict) or {}).items():
        if value and not any(part in key for part in _LOADING):
            changes[key] = value
    if changes:
        listed = ", ".join(f"{key} = {value}" for key, value in changes.items())
        warnings.warn(
            f"{path}: was trained on a model that was changed when it was loaded "
            f"(model_from_pretrained_kwargs: {listed}). Here it reads the activations of the unchanged "
            "model, on which its reconstructions, FVU and explained variance differ; if the weights "
            "were centred, for example, subtract the mean over dimensions from the activations first",
            stacklevel=2,
        )


def _scale(path: Path, config: dict[str, Any]) -> float:
    """Return the factor s of a dictionary that reads s·x."""
    if config.get("normalize_activations") not in (True, "expected_average_only_in"):
        return 1.0
    if (path / SCALER).is_file():
        return read_number(path / SCALER, read_config(path / SCALER), "scaling_factor")
    warnings.warn(
        f"{path / CONFIG}: was trained on activations times a factor (normalize_activations = "
        f"expected_average_only_in) that is missing here ({SCALER}); a factor of 1 is assumed, as "
        "in SAELens",
        stacklevel=2,
    )
    return 1.0
