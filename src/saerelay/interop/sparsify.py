"""sparsify (EleutherAI): cfg.json and sae.safetensors in a directory named after the module whose output is read.

Their forward, with encoder.weight and W_dec (F, D): z = the k largest of
relu((x − b_dec) encoder.weightᵀ + encoder.bias), x_hat = z W_dec + b_dec.
"""

import re
from pathlib import Path
from typing import Any

from saerelay.errors import FormatError
from saerelay.files import write_json
from saerelay.interop.files import canonical, encoder_bias, read_config, read_number, read_tensors, said, shaped
from saerelay.interop.names import site_named
from saerelay.interop.origin import Origin
from saerelay.runs.tensors import write_tensors
from saerelay.sae.dictionary import Dictionary

NAME = "sparsify"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
SHAPES = {"encoder.weight": "FD", "encoder.bias": "F", "W_dec": "FD", "b_dec": "D"}


def recognises(path: Path) -> bool:
    """Whether a directory has cfg.json and sae.safetensors."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> tuple[Dictionary, Origin]:
    """A sparsify directory in canonical form: the same codes and reconstructions.

    The site is what the directory's name says, "layers.10" or "h.3.mlp" (of "h.3.mlp/seed0" the part before), if it
    does; model, context and data set are in the run's config.json beside it. The Multi-TopK loss changes nothing: k are
    active, as in their `encode`. Raises FormatError for transcoders, skip
    connections, other activations than TopK, and damaged files.
    """
    config = read_config(path / CONFIG)
    if config.get("activation", "topk") != "topk" or config.get("signed"):
        found = "signed topk" if config.get("signed") else config["activation"]
        raise FormatError(f'{path / CONFIG}: activation is "{found}"; only topk is read')
    tensors = read_tensors(path / WEIGHTS)
    if config.get("transcode"):
        raise FormatError(
            f"{path / CONFIG}: is a transcoder, which maps a module's input to its output; only SAEs are read"
        )
    if config.get("skip_connection") or "W_skip" in tensors:
        raise FormatError(f"{path / CONFIG}: has a skip connection past its latents; only SAEs without one are read")
    if other := sorted(set(tensors) - set(SHAPES)):
        raise FormatError(f"{path / WEIGHTS}: has tensor {other[0]}, which sparsify does not write; another tool did")
    W_enc, b_enc, W_dec, b_dec = shaped(
        path / WEIGHTS, tensors, SHAPES, D=said(config, "d_in", int), F=said(config, "num_latents", int) or None
    )
    k = int(read_number(path / CONFIG, config, "k", most=len(W_enc)))
    dictionary = canonical("topk", W_enc, b_enc, W_dec, b_dec, subtracts_b_dec=True, k=k)
    named = path.resolve()
    if re.fullmatch(r"seed\d+", named.name):
        named = named.parent
    run = read_config(named.parent / "config.json") if (named.parent / "config.json").is_file() else {}
    own = said(config, "saerelay", dict) or {}
    origin = Origin(
        model=said(run, "model", str) or said(own, "model", str) or "",
        site=site_named(named.name),
        context=said(run, "ctx_len", int),
        dataset=said(run, "dataset", str) or "",
        provenance=said(own, "provenance", dict) or {},
    )
    return dictionary, origin


def write(path: Path, dictionary: Dictionary, origin: Origin) -> None:
    """Write a TopK dictionary as a sparse coder of sparsify; name the directory after the module, as "layers.10".

    Raises FormatError for other architectures: sparsify has no threshold.
    """
    d = dictionary
    if d.architecture != "topk":
        raise FormatError(
            f"{path}: sparsify has TopK alone, this is {d.architecture}; saelens and dictionary_learning can hold it"
        )
    tensors = {"encoder.weight": d.W_enc, "encoder.bias": encoder_bias(d), "W_dec": d.W_dec, "b_dec": d.b_dec}
    config: dict[str, Any] = {
        "activation": "topk",
        "expansion_factor": max(1, d.n_latents // d.d_model),
        "normalize_decoder": bool((d.W_dec.norm(dim=1) - 1).abs().max() < 1e-3),
        "num_latents": d.n_latents,
        "k": d.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": d.d_model,
        "saerelay": {"model": origin.model, "provenance": origin.provenance},
    }
    write_tensors(path / WEIGHTS, {name: tensor.cpu() for name, tensor in tensors.items()})
    write_json(path / CONFIG, config)
