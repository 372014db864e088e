"""circuit-tracer's transcoder sets: config.yaml, and layer_<i>.safetensors for each layer.

    pre = x W_encᵀ + b_enc        z = relu(pre), or pre·1[pre > threshold]        y_hat = z W_dec + b_dec + x W_skipᵀ

config.yaml names the sites that are read and reconstructed, by TransformerLens' hook names, the same for all layers.
"""

import re
import warnings
from pathlib import Path
from typing import Any

import yaml

from saerelay.errors import FormatError
from saerelay.files import write_text
from saerelay.interop.files import lookup, read_tensors, take
from saerelay.interop.names import hook_name, site_named
from saerelay.interop.origin import Origin
from saerelay.runs.tensors import write_tensors
from saerelay.sae.dictionary import Dictionary
from saerelay.site import Site

NAME = "circuit-tracer"
CONFIG = "config.yaml"
_LAYER = re.compile(r"layer_(\d+)\.safetensors")
_THRESHOLD = "activation_function.threshold"
_SHAPES = {"W_enc": "FD", "b_enc": "F", "W_dec": "FE", "b_dec": "E"}
_OPTIONAL = {_THRESHOLD: "F", "W_skip": "ED"}
_MOST_BYTES = 2**20
"""Largest size of a config.yaml that is read."""


def recognises(path: Path) -> bool:
    """Whether a file is the transcoder of a layer, next to the set's config.yaml."""
    return bool(_LAYER.fullmatch(path.name)) and (path.parent / CONFIG).is_file()


def read(path: Path) -> tuple[Dictionary, Origin]:
    """Read the transcoder of one layer, a file such as set/layer_3.safetensors.

    Raises FormatError for sites that saerelay cannot read, and for thresholds below zero, with which codes may be
    negative.
    """
    match = _LAYER.fullmatch(path.name)
    if match is None:
        raise FormatError(f"{path}: name the file of one layer in the set, such as {path}/layer_0.safetensors")
    config = _read_config(path.parent / CONFIG)
    site, site_out = _sites(path.parent / CONFIG, config, int(match[1]))
    tensors = read_tensors(path)
    shapes = _SHAPES | {name: letters for name, letters in _OPTIONAL.items() if name in tensors}
    unknown = sorted(tensors.keys() - shapes.keys())
    if unknown:
        raise FormatError(f"{path}: has a tensor {unknown[0]}, which circuit-tracer does not read")

    found: dict[str, Any] = dict(zip(shapes, take(path, tensors, shapes), strict=True))
    threshold = found.pop(_THRESHOLD, None)
    if threshold is not None and bool((threshold < 0).any()):
        raise FormatError(f"{path}: has thresholds below zero, but the codes of saerelay are never negative")
    architecture = "relu" if threshold is None else "jumprelu"
    dictionary = Dictionary(architecture=architecture, threshold=threshold, **found)
    return dictionary, Origin(model=lookup(config, "model_name", str) or "", site=site, site_out=site_out)


def write(path: Path, dictionary: Dictionary, origin: Origin) -> None:
    """Add a transcoder to the set in a directory, as layer_<i>.safetensors.

    Raises FormatError for SAEs, for TopK, which circuit-tracer does not load, and for a transcoder that does not match
    those already in the set.
    """
    if not origin.site or not origin.site_out:
        raise FormatError(
            f"circuit-tracer loads only transcoders, and the SAE at {origin.site} is not one; export it as saelens"
        )
    if dictionary.architecture == "topk":
        raise FormatError(
            "circuit-tracer loads ReLU and JumpReLU transcoders (BatchTopK and Gated are JumpReLU at inference), and "
            f'the one at {origin.site} is topk; train with architecture = "batchtopk" or "jumprelu", or convert it: '
            "saerelay hop --architecture batchtopk --tokens 0"
        )
    _add_to_config(path / CONFIG, dictionary, origin)
    tensors = {name: getattr(dictionary, name) for name in _SHAPES}
    if dictionary.threshold is not None:
        tensors[_THRESHOLD] = dictionary.threshold
    if dictionary.W_skip is not None:
        tensors["W_skip"] = dictionary.W_skip
    write_tensors(path / f"layer_{origin.site.layer}.safetensors", tensors)


def check_set(directory: Path) -> None:
    """Warn if circuit-tracer cannot load the set as a whole, because it lacks a layer from 0 on."""
    matches = [_LAYER.fullmatch(path.name) for path in directory.iterdir()]
    layers = sorted(int(match[1]) for match in matches if match)
    if layers != list(range(len(layers))):
        warnings.warn(
            f"the set has the layers {layers}, but circuit-tracer loads only sets with every layer from 0 on; its "
            "load_relu_transcoder reads single files",
            stacklevel=2,
        )


def _add_to_config(path: Path, dictionary: Dictionary, origin: Origin) -> None:
    """Write config.yaml, or check that a transcoder matches the existing one."""
    assert origin.site and origin.site_out
    config = {
        "model_name": origin.model,
        "model_kind": "transcoder_set",
        "feature_input_hook": _hook(origin.site),
        "feature_output_hook": _hook(origin.site_out),
        "scan": origin.model,
        "d_transcoder": dictionary.n_latents,
        "skip_connection": dictionary.W_skip is not None,
    }
    if path.is_file():
        before = _read_config(path)
        different = sorted(key for key, value in config.items() if before.get(key) != value)
        if different:
            raise FormatError(
                f"the transcoders of a set must be alike, but the one at {origin.site} has {different[0]} "
                f"{config[different[0]]!r}, and others have {before.get(different[0])!r}; choose legs with --leg"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(config, sort_keys=False))


def _hook(site: Site) -> str:
    """Return a hook's name within a layer: "mlp.hook_in"."""
    return hook_name(site).split(".", 2)[2]


def _sites(path: Path, config: dict[str, Any], layer: int) -> tuple[Site, Site]:
    """Return the sites that the transcoder of a layer reads and reconstructs."""
    if config.get("model_kind") != "transcoder_set":
        raise FormatError(f"{path}: model_kind is {config.get('model_kind')!r}; only a transcoder_set is read")
    sites = []
    for key in ("feature_input_hook", "feature_output_hook"):
        site = site_named(f"blocks.{layer}.{config.get(key)}")
        if site is None:
            raise FormatError(
                f"{path}: {key} is {config.get(key)!r}, at which saerelay cannot read activations; it knows "
                "mlp.hook_in (the MLP's input, including the gains of its norm) and hook_mlp_out"
            )
        sites.append(site)
    return sites[0], sites[1]


def _read_config(path: Path) -> dict[str, Any]:
    """Read the keys of a config.yaml; FormatError if it is damaged."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise FormatError(f"{path}: is larger than any set's configuration")
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:200]
        raise FormatError(f"{path}: cannot be read as YAML ({why})") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path}: holds a YAML {type(config).__name__}, expected keys and values")
    return config
