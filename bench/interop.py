"""Other tools' SAEs in and ours out, checked by outputs against the tools themselves.

    make bench-env
    .peers/bin/python bench/interop.py                                # a row for each format, architecture, direction
    .peers/bin/python bench/interop.py --fixtures tests/data/interop  # rewrites what tests/test_interop_peers.py reads
    .peers/bin/python bench/interop.py --evals --run runs/demo        # a finished run, as `sae_lens.evals` sees it

`in`: a tiny SAE with random parameters (decoder rows far from unit norm, activations of norm 300 around a mean) is made
and saved by the tool's own classes, read by us, and both encode and reconstruct the same x. `out`: ours is written, and
read by the tool's own loader. `codes` and `x_hat` are largest differences relative to the largest value there is.
"""

import argparse
import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saerelay.interop import read_any, write_dictionary
from saerelay.interop.origin import Origin
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.layer_normed import LayerNormed
from saerelay.site import Site

# nnsight reads language models for dictionary_learning, and breaks torch.compile for whoever imports it.
sys.modules.setdefault("nnsight", SimpleNamespace(LanguageModel=None))

D, F, K = 8, 24, 5
Outputs = tuple[Tensor, Tensor]
Reference = Callable[[Tensor], Outputs]
"""x (B, D) -> codes (B, F), x_hat (B, D)."""


def activations() -> Tensor:
    """x (16, D), of norm 300 around a mean."""
    generator = torch.Generator().manual_seed(1)
    return 30 * torch.randn(16, D, generator=generator) + 100 * torch.randn(D, generator=generator)


def parameters(*, subtracts_b_dec: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Parameters by our names and orientations, such that about a third of the latents is active on `activations()`."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W_enc, b_dec = randn(F, D), activations().mean(dim=0) + randn(D)
    return {
        "W_enc": W_enc,
        "b_enc": 10 * randn(F) - (0 if subtracts_b_dec else W_enc @ b_dec),
        "W_dec": randn(F, D) * randn(F, 1).exp(),
        "b_dec": b_dec,
        "threshold": 40 * torch.rand(F, generator=generator),
    }


@dataclass(frozen=True)
class Case:
    """An SAE of another tool: `save` writes it into a directory and returns how the tool itself computes."""

    format: str
    name: str
    save: Callable[[Path], Reference]
    place: str = "sae"
    """Name of its directory."""


# --- SAELens --------------------------------------------------------------------------------------------------------


_SAELENS = {"d_in": D, "d_sae": F}
_SAELENS_METADATA = {
    "model_name": "demo",
    "hook_name": "blocks.3.hook_resid_post",
    "context_size": 128,
    "prepend_bos": True,
}


def saelens_cases() -> Iterator[Case]:
    """Finished SAEs, training checkpoints, and a configuration as it was before 6.0."""
    finished, checkpoint = _saelens_finished, _saelens_checkpoint
    for name, save in {
        "standard": finished("Standard"),
        "standard-raw": finished("Standard", apply_b_dec_to_input=False),
        "standard-layernorm": finished("Standard", normalize_activations="layer_norm"),
        "topk": finished("TopK", k=K),
        "topk-rescaled": finished("TopK", k=K, rescale_acts_by_decoder_norm=True),
        "topk-layernorm": finished("TopK", k=K, normalize_activations="layer_norm"),
        "topk-before6": _saelens_before_6,
        "topk-checkpoint": checkpoint("TopK", k=K),
        "jumprelu": finished("JumpReLU"),
        "jumprelu-raw": finished("JumpReLU", apply_b_dec_to_input=False),
        "jumprelu-logthreshold": _saelens_log_threshold,
        "gated": finished("Gated"),
        "gated-raw": finished("Gated", apply_b_dec_to_input=False),
        "batchtopk-checkpoint": checkpoint("BatchTopK", k=K),
        "batchtopk-checkpoint-unscaled": checkpoint("BatchTopK", k=K, rescale_acts_by_decoder_norm=False),
        "batchtopk-checkpoint-normed": checkpoint("BatchTopK", k=K, scale=0.0123),
        "batchtopk-checkpoint-normed-unscaled": checkpoint(
            "BatchTopK", k=K, scale=0.0123, rescale_acts_by_decoder_norm=False
        ),
        "matryoshka-checkpoint": checkpoint("MatryoshkaBatchTopK", k=K, matryoshka_widths=[8, 16, F]),
    }.items():
        yield Case("saelens", name, save)


def _saelens_filled(sae: Any) -> Any:
    """An SAE of SAELens with our parameters."""
    p = parameters(subtracts_b_dec=sae.cfg.apply_b_dec_to_input)
    if sae.cfg.normalize_activations == "layer_norm":
        p = {name: value / 30 for name, value in p.items()} | {"W_enc": p["W_enc"]}
    extra = parameters(seed=7)["b_enc"] / 300
    p |= {"b_gate": p["b_enc"] - 10, "b_mag": p["b_enc"] * extra.exp(), "r_mag": extra}
    p |= {"W_enc": p["W_enc"].T, "topk_threshold": torch.tensor(20.0, dtype=torch.float64)}
    sae.load_state_dict({name: p[name] for name in sae.state_dict()})
    return sae


def _saelens_finished(kind: str, **options: Any) -> Callable[[Path], Reference]:
    import sae_lens as sl

    def save(path: Path) -> Reference:
        config = getattr(sl, f"{kind}SAEConfig")(**_SAELENS, **options, metadata=_metadata(_SAELENS_METADATA))
        _saelens_filled(getattr(sl, f"{kind}SAE")(config)).save_model(path)
        return saelens_load(path)

    return save


def _saelens_checkpoint(kind: str, scale: float | None = None, **options: Any) -> Callable[[Path], Reference]:
    """As saved in the middle of training; the tool computes what it makes of it at the end."""
    import sae_lens as sl

    def save(path: Path) -> Reference:
        normalised = {"normalize_activations": "expected_average_only_in"} if scale else {}
        make = getattr(sl, f"{kind}TrainingSAEConfig")
        sae = _saelens_filled(getattr(sl, f"{kind}TrainingSAE")(make(**_SAELENS, **options, **normalised)))
        sae.cfg.metadata = _metadata(_SAELENS_METADATA | sae.cfg.metadata.to_dict())
        if scale:
            for name in ("b_enc", "b_dec"):
                getattr(sae, name).data *= scale
            sae.topk_threshold *= scale
        sae.save_model(path)
        done = copy.deepcopy(sae)
        if scale:
            (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
            done.fold_activation_norm_scaling_factor(scale)
        with tempfile.TemporaryDirectory() as scratch:
            done.save_inference_model(scratch)
            return saelens_load(Path(scratch))

    return save


def _saelens_before_6(path: Path) -> Reference:
    path.mkdir(parents=True)
    tensors = parameters(subtracts_b_dec=True)
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    del tensors["threshold"]
    save_file(tensors, path / "sae_weights.safetensors")
    config = _SAELENS | {
        "architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K},
        "dtype": "float32", "model_name": "demo", "hook_point": "blocks.3.hook_resid_post", "context_size": 128,
        "sae_lens_version": "3.0",
    }  # fmt: skip
    (path / "cfg.json").write_text(json.dumps(config))
    return saelens_load(path)


def _saelens_log_threshold(path: Path) -> Reference:
    reference = _saelens_finished("JumpReLU")(path)
    tensors = load_file(path / "sae_weights.safetensors")
    tensors["log_threshold"] = tensors.pop("threshold").log()
    save_file(tensors, path / "sae_weights.safetensors")
    return reference


def _metadata(facts: dict[str, Any]) -> Any:
    from sae_lens.saes.sae import SAEMetadata

    return SAEMetadata(**facts)


def saelens_load(path: Path) -> Reference:
    """Our export, as SAELens reads it."""
    from sae_lens import SAE

    sae = SAE.load_from_disk(path)
    return lambda x: (sae.encode(x), sae(x))


# --- sparsify -------------------------------------------------------------------------------------------------------


def sparsify_cases() -> Iterator[Case]:
    """Its one architecture, with either loss."""
    from sparsify import SparseCoder, SparseCoderConfig

    def save_with(**options: Any) -> Callable[[Path], Reference]:
        def save(path: Path) -> Reference:
            p = parameters(subtracts_b_dec=True)
            sae = SparseCoder(D, SparseCoderConfig(k=K, **options))
            sae.load_state_dict(
                {"encoder.weight": p["W_enc"], "encoder.bias": p["b_enc"], "W_dec": p["W_dec"], "b_dec": p["b_dec"]}
            )
            sae.save_to_disk(path)
            (path.parent / "config.json").write_text(json.dumps({"model": "demo", "dataset": "text", "ctx_len": 128}))
            return sparsify_load(path)

        return save

    yield Case("sparsify", "topk", save_with(num_latents=F), "layers.3")
    yield Case("sparsify", "topk-multi", save_with(expansion_factor=F // D, multi_topk=True), "h.3.mlp")


def sparsify_load(path: Path) -> Reference:
    """A sparse coder, as sparsify reads it."""
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(path)

    def compute(x: Tensor) -> Outputs:
        z = sae.encode(x)  # not sae(x): of one trained with the Multi-TopK loss that decodes 4·k latents
        codes = torch.zeros(len(x), sae.num_latents).scatter(1, z.top_indices, z.top_acts)
        return codes, sae.decode(z.top_acts, z.top_indices)

    return compute


# --- dictionary_learning --------------------------------------------------------------------------------------------


def dictionary_learning_cases() -> Iterator[Case]:
    """All classes that its `load_dictionary` knows, and a backup made in the middle of training."""
    factor = 250.0

    def save_as(kind: str, *, backup: bool = False) -> Callable[[Path], Reference]:
        def save(path: Path) -> Reference:
            raw = kind in ("JumpReluAutoEncoder", "AutoEncoderNew")
            p = parameters(subtracts_b_dec=not raw)
            names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "bias": "b_dec", "decoder_bias": "b_dec",
                     "decoder.bias": "b_dec", "mag_bias": "b_enc"}  # fmt: skip
            p |= {old: p[new] for old, new in names.items()} | {"decoder.weight": p["W_dec"].T, "W_enc": p["W_enc"].T}
            p |= {"r_mag": p["b_enc"] / 30, "gate_bias": p["b_enc"] - 10, "k": torch.tensor(K, dtype=torch.int)}
            p["group_sizes"] = torch.tensor([8, 8, 8])
            if kind != "JumpReluAutoEncoder":
                p["threshold"] = torch.tensor(20.0)
            ae = _dictionary_class(kind)
            ae = ae(D, F, K, [8, 8, 8]) if "Matryoshka" in kind else ae(D, F, K) if "TopK" in kind else ae(D, F)
            ae.load_state_dict({name: p[name] for name in ae.state_dict()})
            if backup:
                ae.scale_biases(1 / factor)
            path.mkdir(parents=True)
            state = {name: tensor.clone() for name, tensor in ae.state_dict().items()}
            trainer = {"dict_class": kind, "activation_dim": D, "dict_size": F, "k": K, "layer": 3, "lm_name": "demo",
                       "submodule_name": "resid_post_layer_3"}  # fmt: skip
            if backup:
                state = {"step": 7, "ae": state, "optimizer": {}, "config": trainer, "norm_factor": factor}
                ae.scale_biases(factor)
            torch.save(state, path / "ae.pt")
            (path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128, "io": "out"}}))
            return lambda x: (ae.encode(x), ae(x))

        return save

    for kind in ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE",
                 "JumpReluAutoEncoder", "GatedAutoEncoder"):  # fmt: skip
        yield Case("dictionary_learning", kind, save_as(kind), "trainer_0")
    yield Case("dictionary_learning", "BatchTopKSAE-backup", save_as("BatchTopKSAE", backup=True), "trainer_0")


def dictionary_learning_load(path: Path) -> Reference:
    """Our export, as dictionary_learning reads it."""
    kind = json.loads((path / "config.json").read_text())["trainer"]["dict_class"]
    options = {"normalize_decoder": False} if kind == "AutoEncoder" else {}
    ae = _dictionary_class(kind).from_pretrained(path / "ae.pt", **options)
    return lambda x: (ae.encode(x), ae(x))


def _dictionary_class(kind: str) -> Any:
    from dictionary_learning import dictionary
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    trained = {"AutoEncoderTopK": AutoEncoderTopK, "BatchTopKSAE": BatchTopKSAE}
    return (trained | {"MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE}).get(kind) or getattr(dictionary, kind)


# --- ours -----------------------------------------------------------------------------------------------------------


def ours() -> dict[str, Dictionary]:
    """One of each architecture, and a BatchTopK whose latents have thresholds of their own."""
    p = parameters()
    threshold = p.pop("threshold")
    topk = Dictionary(architecture="topk", k=K, **p)
    batchtopk = replace(topk, architecture="batchtopk", threshold=torch.full((F,), 20.0))
    return {
        "topk": topk,
        "batchtopk": batchtopk,
        "batchtopk-thresholds": replace(batchtopk, threshold=threshold),
        "jumprelu": replace(topk, architecture="jumprelu", k=None, threshold=threshold),
        "relu": replace(topk, architecture="relu", k=None),
    }


LOADERS = {"saelens": saelens_load, "sparsify": sparsify_load, "dictionary_learning": dictionary_learning_load}


def computed(dictionary: Dictionary | LayerNormed, x: Tensor) -> Outputs:
    """Our codes and reconstructions."""
    return dictionary.encode(x), dictionary(x)


def compare(row: dict[str, str], expected: Outputs, found: Outputs) -> dict[str, Any]:
    """One row of the table."""
    names = ("codes", "x_hat")
    differences = {
        n: float((e - f).abs().max() / e.abs().max()) for n, e, f in zip(names, expected, found, strict=True)
    }
    l0 = float((expected[0] > 0).sum(dim=1).float().mean())
    return row | {"l0": l0} | differences | {"ok": max(differences.values()) < 1e-5 and 1 < l0 < F - 1}


@torch.no_grad()
def check(root: Path) -> list[dict[str, Any]]:
    """All rows; files of the `in` direction, with x and what the tool computes, stay in root/<format>/<case>."""
    x, rows = activations(), []
    for case in (*saelens_cases(), *sparsify_cases(), *dictionary_learning_cases()):
        directory = root / case.format / case.name
        expected = case.save(directory / case.place)(x)
        kept = {"x": x, "codes": expected[0], "x_hat": expected[1]}
        save_file({name: tensor.contiguous() for name, tensor in kept.items()}, directory / "expected.safetensors")
        dictionary, origin = read_any(directory / case.place)
        found = computed(dictionary, x)
        layer = origin.site.layer if origin.site else None
        if layer != 3 or origin.model != "demo":
            raise AssertionError(f"{directory}: origin {origin}")
        rows.append(compare({"format": case.format, "case": case.name, "direction": "in"}, expected, found))
    for format, load in LOADERS.items():
        for name, dictionary in ours().items():
            if format == "sparsify" and name != "topk":
                continue
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "layers.3"
                write_dictionary(path, dictionary, Origin(model="demo", site=Site(3), prepend_bos=True), format)
                found = load(path)(x)
            rows.append(compare({"format": format, "case": name, "direction": "out"}, computed(dictionary, x), found))
    with tempfile.TemporaryDirectory() as scratch:  # SAELens reads this site before heads are put side by side
        write_dictionary(Path(scratch), ours()["topk"], Origin(site=Site(3, "attn_z")), "saelens")
        codes, x_hat = saelens_load(Path(scratch))(x.view(-1, 2, D // 2))
    row = {"format": "saelens", "case": "topk-attn_z", "direction": "out"}
    return [*rows, compare(row, computed(ours()["topk"], x), (codes, x_hat.flatten(1)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixtures", type=Path, help="keep the files of the tools here")
    parser.add_argument("--evals", action="store_true", help="compare the quality of a run with sae_lens.evals")
    parser.add_argument("--run", type=Path, help="with --evals: a finished run; without, a tiny one is trained")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    if args.evals:
        from interop_evals import compare_evals

        rows = compare_evals(args.run)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            rows = check(args.fixtures or Path(scratch))
    for row in rows:
        print(json.dumps(row))
    sys.exit(0 if all(row["ok"] for row in rows) else 1)


if __name__ == "__main__":
    main()
