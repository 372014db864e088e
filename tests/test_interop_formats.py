"""Gemma Scope, llamascopium and OpenAI: what is read does what their own formulas say; what is wrong is refused."""

import json
import math
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saerelay.errors import FormatError
from saerelay.interop import load_dictionary, load_layer_normed, read_any
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.layer_normed import LayerNormed
from saerelay.site import Site

torch.set_num_threads(1)
D, F, B, K = 24, 80, 60, 7


def numbers(seed: int = 0) -> dict[str, Tensor]:
    """Weights (input first), biases and thresholds far from trivial, and raw activations x with a mean of norm 60."""
    rng = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    return {
        "W_enc": random(D, F) * torch.rand(F, generator=rng).add(0.1),
        "W_dec": random(F, D) * torch.rand(F, 1, generator=rng).add(0.1),
        "b_enc": 3 * random(F),
        "b_dec": 5 * random(D),
        "threshold": 6 * torch.rand(F, generator=rng) + 0.5,
        "x": 4 * random(B, D) + 12 * random(D),
    }


def same(dictionary: Dictionary | LayerNormed, x: Tensor, x_hat: Tensor, codes: Tensor | None = None) -> None:
    """Equal outputs to 1e-5 of their size; neither all latents active nor none."""
    active = (dictionary.encode(x) > 0).float().mean()
    assert 0.02 < active < 0.9
    torch.testing.assert_close(dictionary(x), x_hat, rtol=1e-5, atol=1e-5 * float(x_hat.abs().max()))
    if codes is not None:
        torch.testing.assert_close(dictionary.encode(x), codes, rtol=1e-5, atol=1e-5 * float(codes.abs().max()))


# --- Gemma Scope ---


def gemma_arrays(n: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of Gemma Scope 2."""
    return {
        "w_enc": n["W_enc"], "w_dec": n["W_dec"], "b_enc": n["b_enc"], "b_dec": n["b_dec"],
        "threshold": n["threshold"],
    }  # fmt: skip


def gemma_formula(n: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and reconstructions."""
    pre = x @ n["W_enc"] + n["b_enc"]
    codes = (pre > n["threshold"]) * torch.relu(pre)
    return codes, codes @ n["W_dec"] + n["b_dec"]


def gemma_file(root: Path, folder: str, n: dict[str, Tensor]) -> Path:
    """A params.npz, as np.savez writes it, with the names of the first Gemma Scope."""
    (root / folder).mkdir(parents=True)
    arrays = {name: n[name].numpy() for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    np.savez(root / folder / "params.npz", **arrays)  # type: ignore[arg-type]
    return root / folder


@pytest.mark.parametrize(
    ("folder", "model", "site", "l0"),
    [
        ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", "google/gemma-2-2b", Site(20), 71),
        ("embedding/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", "google/gemma-2-2b", Site(20), 71),
        ("gemma-scope-9b-it-mlp/layer_9/width_16k/canonical", "google/gemma-2-9b-it", Site(9, "mlp_out"), None),
        ("models--google--gemma-scope-27b-pt-att/snapshots/0/layer_3/average_l0_5", "google/gemma-2-27b",
         Site(3, "attn_z"), 5),
        ("somewhere/else", "", None, None),
    ],
)  # fmt: skip
def test_gemma_scope_does_what_its_formula_says(
    tmp_path: Path, folder: str, model: str, site: Site | None, l0: float | None
) -> None:
    n = numbers()
    path = gemma_file(tmp_path, folder, n)
    for reference in (path, path / "params.npz"):
        dictionary, origin = load_dictionary(reference)
        codes, x_hat = gemma_formula(n, n["x"])
        same(dictionary, n["x"], x_hat, codes)
        assert (origin.model, origin.site, origin.l0) == (model, site, l0)


def test_gemma_scope_of_embeddings_reads_the_stream(tmp_path: Path) -> None:
    n = numbers()
    path = gemma_file(tmp_path, "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", n)
    dictionary, origin = load_dictionary(path)
    codes, x_hat = gemma_formula(n, n["x"])
    same(dictionary, n["x"] * math.sqrt(D), x_hat * math.sqrt(D), codes)
    assert origin.site == Site(0, "resid_pre")


@pytest.mark.parametrize(
    ("folder", "config", "model", "site"),
    [
        ("a", {"hf_hook_point_in": "model.layers.7.output", "model_name": "gemma-v3-1b-pt"}, "google/gemma-3-1b-pt",
         Site(7)),
        ("a", {"hf_hook_point_in": "model.layers.7.post_feedforward_layernorm.output"}, "", Site(7, "mlp_out")),
        ("gemma-scope-2-4b-it/attn_out_all/layer_9_width_16k_l0_small",
         {"hf_hook_point_in": "model.layers.9.self_attn.o_proj.input"}, "google/gemma-3-4b-it", Site(9, "attn_z")),
        ("gemma-scope-2-270m-pt/mlp_out/layer_12_width_16k_l0_small", None, "google/gemma-3-270m",
         Site(12, "mlp_out")),
    ],
)  # fmt: skip
def test_gemma_scope_2_is_of_gemma_3(tmp_path: Path, folder: str, config: dict | None, model: str, site: Site) -> None:
    n = numbers()
    path = tmp_path / folder
    path.mkdir(parents=True)
    save_file(gemma_arrays(n), path / "params.safetensors")
    if config:
        (path / "config.json").write_text(json.dumps({"architecture": "jump_relu"} | config))
    dictionary, origin = load_dictionary(path)
    codes, x_hat = gemma_formula(n, n["x"])
    same(dictionary, n["x"], x_hat, codes)
    assert (origin.model, origin.site) == (model, site)


@pytest.mark.parametrize("case", ["skip", "config", "first", "clt"])
def test_transcoders_of_gemma_scope_from_unknown_sites_are_refused(tmp_path: Path, case: str) -> None:
    folder = "gemma-scope-2b-pt-transcoders" if case == "first" else "somewhere"
    path, arrays = tmp_path / folder, gemma_arrays(numbers())
    path /= "layer_3_width_16k"
    path.mkdir(parents=True)
    config = {"hf_hook_point_in": "model.layers.3.a.output"}
    if case == "skip":
        arrays |= {"affine_skip_connection": torch.eye(D)}
    if case == "config":
        config |= {"hf_hook_point_out": "model.layers.3.b.output"}
    if case == "clt":
        arrays["w_dec"] = arrays["w_dec"].unsqueeze(1).repeat(1, 3, 1)
    save_file(arrays, path / "params.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    reason = r"w_dec has shape \(80, 3, 24\)" if case == "clt" else "transcoder"
    with pytest.raises(FormatError, match=rf"params.safetensors: .*{reason}"):
        load_dictionary(path)


# --- llamascopium, Llama Scope ---

NORM = 17.5


def llama(path: Path, n: dict[str, Tensor], **config: Any) -> Path:
    """A directory as llamascopium writes it."""
    hook = "blocks.15.hook_mlp_out"
    config = {
        "sae_type": "sae", "d_model": D, "expansion_factor": F / D, "use_decoder_bias": True, "act_fn": "jumprelu",
        "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True, "top_k": K, "hook_point_in": hook,
        "hook_point_out": hook, "use_glu_encoder": False,
    } | config  # fmt: skip
    tensors = {"W_E": n["W_enc"], "b_E": n["b_enc"], "W_D": n["W_dec"]}
    tensors |= {f"dataset_average_activation_norm.{hook}": torch.tensor(NORM)}
    if config["use_decoder_bias"]:
        tensors["b_D"] = n["b_dec"]
    if config["act_fn"] == "jumprelu":
        tensors["activation_function.log_jumprelu_threshold"] = n["threshold"].log()
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "sae_weights.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def llama_formula(
    n: dict[str, Tensor], x: Tensor, activate: Callable[[Tensor], Tensor], s: float, by_norm: bool
) -> tuple[Tensor, Tensor]:
    """Codes and reconstructions of raw x."""
    pre = (x * s) @ n["W_enc"] + n["b_enc"]
    norms = n["W_dec"].norm(dim=1) if by_norm else torch.ones(F)
    codes = activate(pre * norms) / norms
    return codes, (codes @ n["W_dec"] + n["b_dec"]) / s


def top(pre: Tensor) -> Tensor:
    """The K largest of each row, if positive."""
    kept = torch.zeros_like(pre, dtype=torch.bool)
    for row, order in zip(kept, pre.argsort(dim=1, descending=True), strict=True):
        row[order[:K]] = True
    return torch.relu(pre) * kept


@pytest.mark.parametrize("by_norm", [True, False], ids=["by norm", "plain"])
@pytest.mark.parametrize("mode", ["dataset-wise", "inference"])
@pytest.mark.parametrize("act_fn", ["jumprelu", "topk", "relu"])
def test_llamascopium_does_what_its_formula_says(tmp_path: Path, act_fn: str, mode: str, by_norm: bool) -> None:
    n = numbers()
    path = llama(tmp_path / "sae", n, act_fn=act_fn, norm_activation=mode, sparsity_include_decoder_norm=by_norm)
    activate = {"relu": torch.relu, "topk": top, "jumprelu": lambda pre: pre * (pre > n["threshold"])}[act_fn]
    s = math.sqrt(D) / NORM if mode == "dataset-wise" else 1.0
    codes, x_hat = llama_formula(n, n["x"], activate, s, by_norm)
    dictionary, origin = load_dictionary(path)
    same(dictionary, n["x"], x_hat, None if act_fn == "topk" and by_norm else codes)
    assert origin.site == Site(15, "mlp_out")


def test_llamascopium_without_a_decoder_bias(tmp_path: Path) -> None:
    n = numbers() | {"b_dec": torch.zeros(D)}
    path = llama(tmp_path, n, use_decoder_bias=False, act_fn="relu")
    same(load_dictionary(path)[0], n["x"], llama_formula(n, n["x"], torch.relu, math.sqrt(D) / NORM, False)[1])


@pytest.mark.parametrize("log", [True, False], ids=["R1-distill", "Llama Scope"])
def test_llama_scope_does_what_its_formula_says(tmp_path: Path, log: bool) -> None:
    n = numbers()
    path = tmp_path / "Llama3_1-8B-Base-L15R-8x"
    (path / "checkpoints").mkdir(parents=True)
    hook = "blocks.15.hook_resid_post"
    tensors = {"encoder.weight": n["W_enc"].T.contiguous(), "encoder.bias": n["b_enc"]}
    tensors |= {"decoder.weight": n["W_dec"].T.contiguous(), "decoder.bias": n["b_dec"]}
    config = {"act_fn": "jumprelu", "d_model": D, "hook_point_in": hook, "hook_point_out": hook, "top_k": K}
    config |= {"norm_activation": "dataset-wise", "sparsity_include_decoder_norm": False}
    if log:
        tensors["log_jumprelu_threshold"] = n["threshold"].log()
        tensors[f"dataset_average_activation_norm.{hook}"] = torch.tensor(NORM)
        save_file(tensors, path / "sae_weights.safetensors")
        (path / "config.json").write_text(json.dumps(config))
        threshold = n["threshold"]
    else:
        config |= {"jump_relu_threshold": 0.75, "dataset_average_activation_norm": {"in": NORM, "out": NORM}}
        save_file(tensors, path / "checkpoints" / "final.safetensors")
        (path / "hyperparams.json").write_text(json.dumps(config))
        threshold = torch.tensor(0.75)
    s = math.sqrt(D) / NORM
    codes, x_hat = llama_formula(n, n["x"], lambda pre: pre * (pre > threshold), s, False)
    dictionary, origin = load_dictionary(path)
    same(dictionary, n["x"], x_hat, codes)
    assert (origin.model, origin.site) == ("meta-llama/Llama-3.1-8B", Site(15))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"norm_activation": "token-wise"}, "divided by the norm of each token"),
        ({"norm_activation": "batch-wise"}, "divided by the norm of each batch"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"act_fn": "batchtopk"}, "depend on the rest of the batch"),
        ({"act_fn": "gelu"}, "these are read: relu, jumprelu, topk"),
        ({"hook_point_out": "blocks.15.hook_resid_post"}, "is a transcoder"),
        ({"sae_type": "crosscoder"}, "is a crosscoder"),
        ({"act_fn": "topk", "top_k": F + 1}, f"top_k is {F + 1}, expected a whole number from 1 to {F}"),
        ({"d_model": D + 1}, rf"W_E has shape \({D}, {F}\), expected \(D, F\) = \({D + 1}, {F}\)"),
    ],
)
def test_what_llamascopium_has_and_we_have_not_is_refused(tmp_path: Path, config: dict, reason: str) -> None:
    path = llama(tmp_path, numbers(), **config)
    with pytest.raises(FormatError, match=reason):
        load_dictionary(path)


def test_a_norm_that_was_never_measured_is_refused(tmp_path: Path) -> None:
    path = llama(tmp_path, numbers())
    file = path / "sae_weights.safetensors"
    tensors = load_file(file)
    save_file({k: torch.zeros(()) if "average" in k else t for k, t in tensors.items()}, file)
    with pytest.raises(FormatError, match="dataset_average_activation_norm.* is 0.0, expected a positive number"):
        load_dictionary(path)


# --- OpenAI ---


def openai(path: Path, n: dict[str, Tensor], **more: Any) -> Path:
    """A .pt as torch.save writes it."""
    state = {"pre_bias": n["b_dec"], "latent_bias": n["b_enc"], "encoder.weight": n["W_enc"].T.contiguous()}
    state |= {"decoder.weight": n["W_dec"].T.contiguous(), "stats_last_nonzero": torch.zeros(F, dtype=torch.long)}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state | more, path)
    return path


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("gpt2-small/resid_delta_mlp_v4/autoencoders/11.pt", Site(11, "mlp_out")),
        ("gpt2-small/mlp_post_act/autoencoders/2.pt", None),
        ("v1/layer_3.pt", None),
    ],
)
def test_openai_relu_does_what_its_formula_says(tmp_path: Path, name: str, site: Site | None) -> None:
    n = numbers()
    path = openai(tmp_path / name, n)
    codes = torch.relu((n["x"] - n["b_dec"]) @ n["W_enc"] + n["b_enc"])
    dictionary, origin = load_dictionary(path)
    same(dictionary, n["x"], codes @ n["W_dec"] + n["b_dec"], codes)
    assert (origin.model, origin.site) == ("gpt2" if "gpt2" in name else "", site)


def test_openai_topk_keeps_its_layer_norm(tmp_path: Path) -> None:
    n = numbers()
    x, activation = n["x"], {"k": K, "postact_fn": "ReLU"}
    path = openai(
        tmp_path / "gpt2-small/resid_post_mlp_v5_32k/autoencoders/6.pt", n, activation="TopK",
        activation_state_dict=activation,
    )  # fmt: skip
    mean = x.mean(dim=1, keepdim=True)
    deviation = ((x - mean).square().sum(dim=1, keepdim=True) / (D - 1)).sqrt()
    codes = top(((x - mean) / (deviation + 1e-5) - n["b_dec"]) @ n["W_enc"] + n["b_enc"])
    x_hat = (codes @ n["W_dec"] + n["b_dec"]) * deviation + mean
    sae, origin = load_layer_normed(path)
    same(sae, x, x_hat, codes)
    assert (origin.model, origin.site) == ("gpt2", Site(6))
    with pytest.raises(FormatError, match="normalises each token"):
        load_dictionary(path)


def test_another_activation_is_refused(tmp_path: Path) -> None:
    path = openai(tmp_path / "6.pt", numbers(), activation="TopK", activation_state_dict={"k": K, "postact_fn": "Id"})
    with pytest.raises(FormatError, match="6.pt: activation is 'TopK' .*Id.*expected ReLU, or TopK with ReLU"):
        load_dictionary(path)


# --- damaged and hostile files ---


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """One SAE of each kind of file."""
    n = numbers()
    return {
        "npz": gemma_file(tmp_path, "a", n) / "params.npz",
        "safetensors": llama(tmp_path / "b", n) / "sae_weights.safetensors",
        "pt": openai(tmp_path / "6.pt", n),
    }


@pytest.mark.parametrize("kind", ["npz", "safetensors", "pt"])
@pytest.mark.parametrize("left", [0, 20, 0.5, 0.999])
def test_a_file_cut_off_is_refused(places: dict[str, Path], kind: str, left: float) -> None:
    file = places[kind]
    data = file.read_bytes()
    file.write_bytes(data[: int(left if left > 1 else left * len(data))])
    with pytest.raises(FormatError, match=rf"{file.name}: .*(cut off or damaged|damaged, or holds)"):
        read_any(file.parent if kind == "safetensors" else file)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    n = numbers()
    n["b_enc"][5] = value
    with pytest.raises(FormatError, match="params.npz: tensor b_enc has values that are not finite"):
        load_dictionary(gemma_file(tmp_path, "a", n))


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    n = numbers()
    n["b_enc"] = n["b_enc"][1:]
    with pytest.raises(FormatError, match=r"params.npz: tensor b_enc has shape \(79\), expected \(F\) = \(80\)"):
        load_dictionary(gemma_file(tmp_path, "a", n))
    with pytest.raises(FormatError, match=r"6.pt: tensor latent_bias has shape \(79\), expected \(F\) = \(80\)"):
        load_dictionary(openai(tmp_path / "6.pt", n))
    with pytest.raises(FormatError, match=r"sae_weights.safetensors: tensor b_E has shape \(79\), expected \(F\)"):
        load_dictionary(llama(tmp_path / "b", n))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "params.safetensors"
    save_file({"w_enc": torch.zeros(D, F)}, path)
    with pytest.raises(FormatError, match=r"params.safetensors: tensor b_enc \(F\) is missing; the file has w_enc"):
        load_dictionary(path)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["torch", "pickle", "npz"])
def test_no_pickle_is_run(tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "ran"
    if kind == "npz":
        file = tmp_path / "params.npz"
        np.savez(file, w_enc=np.array([Bomb(marker)], dtype=object))
    elif kind == "torch":
        file = openai(tmp_path / "6.pt", numbers(), extra=Bomb(marker))
    else:
        file = tmp_path / "6.pt"
        file.write_bytes(pickle.dumps({"encoder.weight": Bomb(marker)}, protocol=2))
    reason = "allow_pickle=False" if kind == "npz" else "reading such objects can run code; refused"
    with pytest.raises(FormatError, match=rf"{file.name}: .*{reason}"):
        load_dictionary(file)
    assert not marker.exists()
    if kind != "npz":  # the bomb is real
        torch.load(file, weights_only=False) if kind == "torch" else pickle.loads(file.read_bytes())
        assert marker.exists()


def test_shards_are_read_where_the_index_says(tmp_path: Path) -> None:
    n = numbers()
    arrays = gemma_arrays(n)
    for shard, names in (("1.safetensors", ["w_enc", "b_enc"]), ("2.safetensors", ["w_dec", "b_dec", "threshold"])):
        save_file({name: arrays[name] for name in names}, tmp_path / shard)
    weight_map = dict.fromkeys(["w_enc", "b_enc"], "1.safetensors")
    weight_map |= dict.fromkeys(["w_dec", "b_dec", "threshold"], "2.safetensors")
    index = tmp_path / "params.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    same(load_dictionary(tmp_path, format="gemma_scope")[0], n["x"], gemma_formula(n, n["x"])[1])


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/outside.safetensors", "..", "", ".", "a/b.safetensors", "..\\outside", 3, ["a"]],
)
def test_an_index_names_only_files_beside_it(tmp_path: Path, name: Any) -> None:
    save_file(gemma_arrays(numbers()), tmp_path / "outside.safetensors")
    inside = tmp_path / "inside"
    inside.mkdir()
    index = inside / "params.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w_enc": name}}))
    message = rf"params.safetensors.index.json: names {re.escape(repr(name))}, which is not a file beside it"
    with pytest.raises(FormatError, match=message):
        load_dictionary(inside, format="gemma_scope")


@pytest.mark.parametrize("index", [{}, {"weight_map": 3}, {"weight_map": {"w_enc": "params.safetensors"}}])
def test_an_index_without_files_is_refused(tmp_path: Path, index: dict) -> None:
    (tmp_path / "params.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="weight_map, .* is missing|params.safetensors: no such file"):
        load_dictionary(tmp_path, format="gemma_scope")


def test_a_directory_of_many_names_them(tmp_path: Path, places: dict[str, Path]) -> None:
    with pytest.raises(FormatError, match=r"holds 3 SAEs; give one of them: 6.pt, a, b"):
        load_dictionary(tmp_path)
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(FormatError, match="no such file or directory"):
        load_dictionary(tmp_path / "a")
    with pytest.raises(FormatError, match=r"no such file or directory; .* on the hub, write hf://me/saes/layer_3$"):
        load_dictionary("me/saes/layer_3")
