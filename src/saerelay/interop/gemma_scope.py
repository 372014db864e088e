"""Gemma Scope: JumpReLU SAEs of every layer of Gemma 2 (params.npz) and Gemma 3 (params.safetensors, config.json).

    pre = x w_enc + b_enc        z = relu(pre)·1[pre > threshold]        x_hat = z w_dec + b_dec

They read raw activations. Which, the names of repository and folders say; config.json too, where there is one.
"""

import math
import re
from pathlib import Path
from typing import Any

from saerelay.errors import FormatError
from saerelay.interop.files import canonical, read_config, read_tensors, shaped
from saerelay.interop.names import site_named
from saerelay.interop.origin import Origin
from saerelay.sae.dictionary import Dictionary
from saerelay.site import ModuleKind, Site

NAME = "gemma_scope"
_FILES = ("params.npz", "params.safetensors")
_SHAPES = {"w_enc": "DF", "b_enc": "F", "w_dec": "FD", "b_dec": "D", "threshold": "F"}
_MODULES: dict[str, ModuleKind] = {
    **{"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"},  # at the end of a repository's name
    **{"resid_post": "resid_post", "mlp_out": "mlp_out", "attn_out": "attn_z"},  # the names of folders, since Gemma 3
}


def recognises(path: Path) -> bool:
    """Whether a directory has a params.npz or params.safetensors, or a file is one."""
    return path.name in _FILES or any((path / name).is_file() for name in _FILES)


def read(path: Path) -> tuple[Dictionary, Origin]:
    """The SAE of a directory such as gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71.

    Those in `embedding` read embeddings before Gemma multiplies them by √D; here they read the residual stream before
    layer 0, which is after that (so b_dec is multiplied, too). Raises FormatError for transcoders, which read one place
    and write another.
    """
    file = (
        path if path.is_file() else next((path / name for name in _FILES if (path / name).is_file()), path / _FILES[1])
    )
    config_file = file.with_name("config.json")
    config = read_config(config_file) if config_file.is_file() else {}
    origin, kind = _origin(file, config)
    reads, writes = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    tensors = read_tensors(file)
    unknown = sorted(tensors.keys() - _SHAPES.keys())
    if kind in ("transcoder", "transcoders", "clt") or unknown or (writes and writes != reads):
        why = (
            f"it has a tensor {unknown[0]}" if unknown else f"it reads {reads or 'one place'}, writes {writes or kind}"
        )
        raise FormatError(f"{file}: is a transcoder or another relative of SAEs ({why}); saerelay reads SAEs")
    w_enc, b_enc, w_dec, b_dec, threshold = shaped(file, tensors, _SHAPES)
    scale = 1 / math.sqrt(len(b_dec)) if "embedding" in file.parts else 1.0
    return canonical("jumprelu", w_enc.T, b_enc, w_dec, b_dec, scale=scale, threshold=threshold), origin


def _origin(file: Path, config: dict[str, Any]) -> tuple[Origin, str]:
    """What the path and the configuration say, and the kind of thing that is there by its path."""
    place = file.absolute().as_posix()
    repository = re.search(r".*gemma-scope-(2-)?(\d+[mb])-(pt|it)(?:-(res|mlp|att|transcoders))?(?![\w-])", place)
    named = re.search(r"gemma-v?3-(\d+[mb])-(pt|it)", str(config.get("model_name", "")))
    model, module = "", ""
    if repository:
        module = repository[4] or ""
        generation = "3" if repository[1] else "2"
        model = _model(generation, repository[2], repository[3])
    if named:
        model = _model("3", named[1], named[2])
    folder = re.search(r".*/(resid_post|attn_out|mlp_out|transcoder|clt)(?:_all)?/", place)
    module = folder[1] if folder else module
    layer, l0 = re.search(r".*/layer_(\d+)", place), re.search(r"/average_l0_(\d+)", place)
    site = site_named(str(config.get("hf_hook_point_in", "")))
    if "embedding" in file.parts:
        site = Site(0, "resid_pre")
    elif site is None and layer and module in _MODULES:
        site = Site(int(layer[1]), _MODULES[module])
    origin = Origin(model=model, site=site, context=1024, prepend_bos=True, l0=float(l0[1]) if l0 else None)
    return origin, module


def _model(generation: str, size: str, variant: str) -> str:
    """The hub id of a Gemma: google/gemma-2-2b, google/gemma-2-2b-it, google/gemma-3-1b-pt, google/gemma-3-270m."""
    base = f"google/gemma-{generation}-{size}"
    return base if variant == "pt" and (generation == "2" or size == "270m") else f"{base}-{variant}"
