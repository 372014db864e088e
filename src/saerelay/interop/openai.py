"""OpenAI's SAEs of GPT-2 small (Gao et al. 2024): <place>/autoencoders/<layer>.pt, a pickle of a state dict.

With u = x for ReLU (v1, v4), and x normalised token by token for TopK (v5):

    z = activation((u − pre_bias) encoder.weightᵀ + latent_bias)        u_hat = z decoder.weightᵀ + pre_bias
"""

import re
from pathlib import Path

from torch import Tensor

from saerelay.errors import FormatError
from saerelay.interop.files import canonical, read_number, read_pickle, shaped
from saerelay.interop.origin import Origin
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.layer_normed import LayerNormed
from saerelay.site import ModuleKind, Site

NAME = "openai"
_SHAPES = {"encoder.weight": "FD", "latent_bias": "F", "decoder.weight": "DF", "pre_bias": "D"}
_PLACES: dict[str, ModuleKind | None] = {
    **{"resid_post_mlp": "resid_post", "resid_delta_mlp": "mlp_out", "resid_delta_attn": "attn_out"},
    **{"resid_post_attn": None, "mlp_post_act": None},  # no site of ours: between the blocks, and inside the MLP
}


def recognises(path: Path) -> bool:
    """Whether it is a file such as 6.pt or layer_6.pt."""
    return re.fullmatch(r"(?:layer_)?\d+\.pt", path.name) is not None


def read(path: Path) -> tuple[Dictionary | LayerNormed, Origin]:
    """The SAE of a file; the one of v5 keeps its layer norm. Raises FormatError if it is damaged or holds objects."""
    state = read_pickle(path)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    W_enc, b_enc, W_dec, b_dec = shaped(path, tensors, _SHAPES)
    weights, origin = (W_enc, b_enc, W_dec.T, b_dec), _origin(path)
    match state.get("activation", "ReLU"), state.get("activation_state_dict"):
        case "ReLU", _:
            return canonical("relu", *weights, subtracts_b_dec=True), origin
        case "TopK", {"postact_fn": "ReLU"} as activation:
            k = int(read_number(path, activation, "k", most=len(b_enc)))
            return LayerNormed(canonical("topk", *weights, subtracts_b_dec=True, k=k)), origin
        case name, settings:
            raise FormatError(f"{path}: activation is {name!r} {settings or ''}, expected ReLU, or TopK with ReLU")


def _origin(path: Path) -> Origin:
    """What the path says: gpt2-small/resid_post_mlp_v5_32k/autoencoders/6.pt."""
    parts, layer = path.absolute().parts, re.search(r"\d+", path.stem)
    place = next((name for name in _PLACES for part in parts if part.startswith(name)), "")
    module = _PLACES.get(place)
    return Origin(
        model="gpt2" if "gpt2-small" in parts else "",
        site=Site(int(layer[0]), module) if layer and module else None,
        context=64,
        provenance={"location": place} if place else {},
    )
