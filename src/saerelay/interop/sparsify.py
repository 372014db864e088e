"""sparsify (EleutherAI): cfg.json and sae.safetensors, in a directory named after a module.

Their forward, with encoder.weight and W_dec (F, D): z = the k largest of
relu((x − b_dec) encoder.weightᵀ + encoder.bias), x_hat = z W_dec + b_dec.
"""

import re
from pathlib import Path
from typing import Any

from saerelay.errors import FormatError
from saerelay.files import write_json
from saerelay.interop.canonical import canonical, encoder_bias
from saerelay.interop.files import lookup, read_config, read_count, read_tensors, take
from saerelay.interop.names import site_named
from saerelay.interop.origin import Origin
from saerelay.runs.tensors import write_tensors
from saerelay.sae.dictionary import Dictionary

NAME = "sparsify"
CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"
SHAPES = {"encoder.weight": "FD", "encoder.bias": "F", "W_dec": "FD", "b_dec": "D"}


def recognises(path: Path) -> bool:
    """Whether a directory has cfg.json and sae.safetensors."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> tuple[Dictionary, Origin]:
    """Read a sparsify directory in canonical form: the same codes and reconstructions.

    The site is given by the directory's name, if it names one: "layers.10" or "h.3.mlp" (for
    "h.3.mlp/seed0", the part before). Model, context and data set come from the run's config.json
    next to it. The Multi-TopK loss makes no difference: k latents are active, as in their `encode`.
    Raises FormatError for transcoders, skip connections, activations other than TopK, and damaged
    files.
    """
    config = read_config(path / CONFIG)
    _check_config(path / CONFIG, config)
    tensors = read_tensors(path / WEIGHTS)
    _check_tensors(path / WEIGHTS, set(tensors))

    d_model = lookup(config, "d_in", int)
    n_latents = lookup(config, "num_latents", int) or None  # 0 if it follows from the expansion factor
    W_enc, b_enc, W_dec, b_dec = take(path / WEIGHTS, tensors, SHAPES, D=d_model, F=n_latents)
    k = read_count(path / CONFIG, config, "k", most=len(W_enc))
    dictionary = Dictionary(architecture="topk", W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, k=k)
    return canonical(dictionary, subtracts_b_dec=True), _origin(path, config)


def write(path: Path, dictionary: Dictionary, origin: Origin) -> None:
    """Write a TopK dictionary; name the directory after the module it reads: "layers.10".

    Raises FormatError for other architectures: sparsify has no threshold.
    """
    if dictionary.architecture != "topk":
        raise FormatError(
            f"{path}: sparsify supports only TopK, and this SAE is {dictionary.architecture}; "
            "export it as saelens or dictionary_learning"
        )
    distance_from_unit_norm = (dictionary.W_dec.norm(dim=1) - 1).abs().max()
    tensors = {
        "encoder.weight": dictionary.W_enc,
        "encoder.bias": encoder_bias(dictionary),
        "W_dec": dictionary.W_dec,
        "b_dec": dictionary.b_dec,
    }
    config = {
        "activation": "topk",
        "expansion_factor": max(1, dictionary.n_latents // dictionary.d_model),
        "normalize_decoder": bool(distance_from_unit_norm < 1e-3),
        "num_latents": dictionary.n_latents,
        "k": dictionary.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": dictionary.d_model,
        "saerelay": {"model": origin.model, "provenance": origin.provenance},
    }
    write_tensors(path / WEIGHTS, tensors)
    write_json(path / CONFIG, config)


def _check_config(path: Path, config: dict[str, Any]) -> None:
    """Raise FormatError if the configuration is not that of a plain TopK SAE."""
    activation = config.get("activation", "topk")
    if config.get("signed"):
        activation = "signed topk"
    if activation != "topk":
        raise FormatError(f'{path}: activation is "{activation}"; only topk is read')
    if config.get("transcode"):
        raise FormatError(f"{path}: is a transcoder, which maps a module's input to its output; only SAEs are read")
    if config.get("skip_connection"):
        raise FormatError(f"{path}: has a skip connection past its latents; only SAEs without one are read")


def _check_tensors(path: Path, names: set[str]) -> None:
    """Raise FormatError for tensors that a plain TopK SAE does not have."""
    if "W_skip" in names:
        raise FormatError(f"{path}: has a skip connection past its latents; only SAEs without one are read")
    unknown = sorted(names - set(SHAPES))
    if unknown:
        raise FormatError(
            f"{path}: has a tensor {unknown[0]}, which sparsify never writes; the file comes from another tool"
        )


def _origin(path: Path, config: dict[str, Any]) -> Origin:
    """Return the origin from the directory's name, the run's config.json and our note in cfg.json."""
    directory = path.resolve()
    if re.fullmatch(r"seed\d+", directory.name):
        directory = directory.parent
    run_config = directory.parent / "config.json"
    run = read_config(run_config) if run_config.is_file() else {}
    note = lookup(config, "saerelay", dict) or {}
    return Origin(
        model=lookup(run, "model", str) or lookup(note, "model", str) or "",
        site=site_named(directory.name),
        module_path=directory.name if site_named(directory.name) else "",
        context=lookup(run, "ctx_len", int),
        dataset=lookup(run, "dataset", str) or "",
        provenance=lookup(note, "provenance", dict) or {},
    )
