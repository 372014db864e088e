"""Gemma Scope: params.npz for Gemma 2, params.safetensors and config.json for Gemma 3.

    pre = x w_enc + b_enc        z = relu(pre)·1[pre > threshold]        x_hat = z w_dec + b_dec

They read raw activations. The first Gemma Scope calls its weights W_enc and W_dec, the second w_enc and w_dec. The
site is given by the names of repository and folders, and by config.json if there is one.
"""

import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from saerelay.errors import FormatError
from saerelay.interop.canonical import canonical
from saerelay.interop.files import read_config, read_tensors, take
from saerelay.interop.names import site_named
from saerelay.interop.origin import Origin
from saerelay.sae.dictionary import Dictionary
from saerelay.site import ModuleKind, Site

NAME = "gemma_scope"
_FILES = ("params.npz", "params.safetensors")
_SHAPES = {"w_enc": "DF", "b_enc": "F", "w_dec": "FD", "b_dec": "D", "threshold": "F"}
_SKIP = "affine_skip_connection"

_MODULES: dict[str, ModuleKind] = {
    # at the end of a repository's name
    "res": "resid_post",
    "mlp": "mlp_out",
    "att": "attn_z",
    # folders, since Gemma 3
    "resid_post": "resid_post",
    "mlp_out": "mlp_out",
    "attn_out": "attn_z",
    "transcoder": "mlp_in",
}


def recognises(path: Path) -> bool:
    """Whether a directory has a params.npz or params.safetensors, or a file is one."""
    return path.name in _FILES or any((path / name).is_file() for name in _FILES)


def read(path: Path) -> tuple[Dictionary, Origin]:
    """Read the SAE of a directory such as gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71.

    SAEs in `embedding` read embeddings before Gemma multiplies them by √D; here they read the
    residual stream before layer 0, after the multiplication (so b_dec is multiplied as well). SAEs
    in the folders `transcoder` and `transcoder_all` of Gemma Scope 2 are transcoders from an MLP's
    input to its output, some with an affine skip connection. Raises FormatError for the first Gemma
    Scope's transcoders, whose input is not a site, and for cross-layer transcoders.
    """
    file = _weights_file(path)
    config_file = file.with_name("config.json")
    config = read_config(config_file) if config_file.is_file() else {}
    kind = _kind(file)
    tensors = _with_small_letters(read_tensors(file))
    origin = _origin(file, kind, config)
    _check_is_readable(file, kind, config, origin, set(tensors))

    shapes = _SHAPES | ({_SKIP: "DD"} if _SKIP in tensors else {})
    w_enc, b_enc, w_dec, b_dec, threshold, *skip = take(file, tensors, shapes)
    dictionary = Dictionary(
        architecture="jumprelu",
        W_enc=w_enc.T,
        b_enc=b_enc,
        W_dec=w_dec,
        b_dec=b_dec,
        threshold=threshold,
        W_skip=skip[0].T.contiguous() if skip else None,
    )
    scale = 1 / math.sqrt(len(b_dec)) if _reads_embeddings(file) else 1.0
    return canonical(dictionary, scale=scale), origin


def _with_small_letters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names of Gemma Scope 2: w_enc for the first Gemma Scope's W_enc."""
    return {name.replace("W_", "w_", 1): tensor for name, tensor in tensors.items()}


def _reads_embeddings(file: Path) -> bool:
    """Whether an SAE is in the folder of those that read embeddings: embedding/width_4k/average_l0_6."""
    return "/embedding/width_" in file.absolute().as_posix()


def _weights_file(path: Path) -> Path:
    """Return the file in a directory, or the file itself; if neither exists, a name for the error message."""
    if path.is_file():
        return path
    for name in _FILES:
        if (path / name).is_file():
            return path / name
    return path / "params.safetensors"


def _check_is_readable(file: Path, kind: str, config: dict[str, Any], origin: Origin, tensor_names: set[str]) -> None:
    """Raise FormatError for relatives of SAEs and transcoders, and for transcoders between unknown sites."""
    reads = config.get("hf_hook_point_in")
    writes = config.get("hf_hook_point_out")
    unknown = sorted(tensor_names - _SHAPES.keys() - {_SKIP})
    is_transcoder = kind == "transcoder" or _SKIP in tensor_names or (writes and writes != reads)
    if unknown:
        reason = f"it has a tensor {unknown[0]}"
    elif kind == "transcoders":
        reason = "it reads the MLP's input before the gains of its norm, and no site gives that"
    elif kind == "clt":
        reason = "it writes to several layers"
    elif is_transcoder and not origin.site_out:
        reason = f"it reads {reads or 'one place'} and writes {writes or kind or 'another'}"
    else:
        return
    raise FormatError(f"{file}: is a transcoder or another relative of SAEs that saerelay cannot read ({reason})")


def _kind(file: Path) -> str:
    """Return the kind that the path names: a key of _MODULES, a transcoder, or "".

    The name of a folder outranks that of the repository.
    """
    path = file.absolute().as_posix()
    folder = re.search(r".*/(resid_post|attn_out|mlp_out|transcoder|clt)(?:_all)?/", path)
    if folder:
        return folder[1]
    repository = _repository(path)
    return (repository["kind"] or "") if repository else ""


def _repository(path: str) -> re.Match[str] | None:
    """Return the repository's name in a path: gemma-scope-2b-pt-res, gemma-scope-2-4b-it."""
    return re.search(
        r".*gemma-scope-(?P<gemma_3>2-)?(?P<size>\d+[mb])-(?P<variant>pt|it)"
        r"(?:-(?P<kind>res|mlp|att|transcoders))?(?![\w-])",
        path,
    )


def _origin(file: Path, kind: str, config: dict[str, Any]) -> Origin:
    """Return model, site and L0, from the path and the configuration."""
    path = file.absolute().as_posix()
    l0 = re.search(r"/average_l0_(\d+)", path)
    return Origin(
        model=_model(path, config),
        site=_site(file, kind, config),
        site_out=_site_out(file, kind, config),
        context=1024,
        prepend_bos=True,
        l0=float(l0[1]) if l0 else None,
    )


def _site(file: Path, kind: str, config: dict[str, Any]) -> Site | None:
    if _reads_embeddings(file):
        return Site(0, "resid_pre")
    site = site_named(str(config.get("hf_hook_point_in", "")))
    if site is not None:
        return site
    layer = re.search(r".*/layer_(\d+)", file.absolute().as_posix())
    if layer and kind in _MODULES:
        return Site(int(layer[1]), _MODULES[kind])
    return None


def _site_out(file: Path, kind: str, config: dict[str, Any]) -> Site | None:
    """Return the site that a transcoder reconstructs, in the layer that it reads; None for an SAE."""
    site = _site(file, kind, config)
    if kind == "transcoder" and site and site.module == "mlp_in":
        return Site(site.layer, "mlp_out")
    out = site_named(str(config.get("hf_hook_point_out", "")))
    is_transcoder = out and site and out != site and out.layer == site.layer
    return out if is_transcoder else None


def _model(path: str, config: dict[str, Any]) -> str:
    """Return the hub id of the SAE's Gemma model, "" if unknown; Gemma Scope 2 is for Gemma 3."""
    named = re.search(r"gemma-v?3-(\d+[mb])-(pt|it)", str(config.get("model_name", "")))
    if named:
        return _hub_id("3", size=named[1], variant=named[2])
    repository = _repository(path)
    if repository:
        generation = "3" if repository["gemma_3"] else "2"
        return _hub_id(generation, size=repository["size"], variant=repository["variant"])
    return ""


def _hub_id(generation: str, *, size: str, variant: str) -> str:
    """google/gemma-2-2b, google/gemma-2-2b-it, google/gemma-3-1b-pt, google/gemma-3-270m."""
    base = f"google/gemma-{generation}-{size}"
    pretrained_has_no_suffix = generation == "2" or size == "270m"
    if variant == "pt" and pretrained_has_no_suffix:
        return base
    return f"{base}-{variant}"
