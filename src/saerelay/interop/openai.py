"""OpenAI's SAEs of GPT-2 small (Gao et al. 2024): <location>/autoencoders/<layer>.pt.

With u = x for ReLU (v1, v4), and x normalised token by token for TopK (v5):

    z = activation((u − pre_bias) encoder.weightᵀ + latent_bias)        u_hat = z decoder.weightᵀ + pre_bias
"""

import re
from pathlib import Path

from saerelay.errors import FormatError
from saerelay.interop.canonical import canonical
from saerelay.interop.files import lookup, only_tensors, read_count, read_pickle, take
from saerelay.interop.origin import Origin
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.layer_normed import LayerNormed
from saerelay.site import ModuleKind, Site

NAME = "openai"
_SHAPES = {"encoder.weight": "FD", "latent_bias": "F", "decoder.weight": "DF", "pre_bias": "D"}

_LOCATIONS: dict[str, ModuleKind | None] = {
    "resid_post_mlp": "resid_post",
    "resid_delta_mlp": "mlp_out",
    "resid_delta_attn": "attn_out",
    "resid_post_attn": None,  # between attention and MLP
    "mlp_post_act": None,  # inside the MLP
}
"""Their names of places in the model, and our kinds of sites there."""


def recognises(path: Path) -> bool:
    """Whether a path is a file such as 6.pt or layer_6.pt."""
    return re.fullmatch(r"(?:layer_)?\d+\.pt", path.name) is not None


def read(path: Path) -> tuple[Dictionary | LayerNormed, Origin]:
    """Read the SAE of a file; SAEs of v5 keep their layer norm.

    Raises FormatError if it is damaged, has another activation, or holds objects besides tensors.
    """
    state = read_pickle(path)
    activation = state.get("activation", "ReLU")
    settings = lookup(state, "activation_state_dict", dict) or {}
    is_topk = activation == "TopK" and settings.get("postact_fn") == "ReLU"
    if activation != "ReLU" and not is_topk:
        raise FormatError(f"{path}: activation is {activation!r} {settings}, expected ReLU, or TopK with ReLU")

    tensors = only_tensors(state)
    W_enc, b_enc, W_dec, b_dec = take(path, tensors, _SHAPES)
    dictionary = Dictionary(
        architecture="topk" if is_topk else "relu",
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec.T,
        b_dec=b_dec,
        k=read_count(path, settings, "k", most=len(b_enc)) if is_topk else None,
    )
    dictionary = canonical(dictionary, subtracts_b_dec=True)
    if is_topk:
        return LayerNormed(dictionary), _origin(path)
    return dictionary, _origin(path)


def _origin(path: Path) -> Origin:
    """Return the origin from the path: gpt2-small/resid_post_mlp_v5_32k/autoencoders/6.pt."""
    parts = path.absolute().parts
    location = _location(parts)
    layer = re.search(r"\d+", path.stem)
    module = _LOCATIONS.get(location)
    return Origin(
        model="gpt2" if "gpt2-small" in parts else "",
        site=Site(int(layer[0]), module) if layer and module else None,
        context=64,
        provenance={"location": location} if location else {},
    )


def _location(parts: tuple[str, ...]) -> str:
    """Return the location that a folder is named after, "" if there is none."""
    for location in _LOCATIONS:
        if any(part.startswith(location) for part in parts):
            return location
    return ""
