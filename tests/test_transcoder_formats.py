"""Transcoders in and out: circuit-tracer's sets, as its own classes wrote them, and Gemma Scope 2."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import saerelay as sr
from saerelay.errors import FormatError
from saerelay.interop import find_saes, load_dictionary, write_dictionary
from saerelay.interop.circuit_tracer import check_set
from saerelay.interop.origin import Origin
from saerelay.sae.dictionary import Dictionary
from saerelay.site import Site
from saerelay.workflows.share import export_run, import_dictionary

DATA = Path(__file__).parent / "data" / "transcoders"
D, F = 8, 24
AT_3 = {"site": Site(3, "mlp_in"), "site_out": Site(3, "mlp_out")}


def random_transcoder(architecture: str = "jumprelu", *, skip: bool = True, seed: int = 0) -> Dictionary:
    g = torch.Generator().manual_seed(seed)
    return Dictionary(
        architecture=architecture, k=5 if "topk" in architecture else None,
        W_enc=torch.randn(F, D, generator=g), b_enc=torch.randn(F, generator=g),
        W_dec=torch.randn(F, D, generator=g), b_dec=3 + torch.randn(D, generator=g),
        threshold=torch.rand(F, generator=g) if architecture in ("jumprelu", "gated", "batchtopk") else None,
        W_skip=torch.randn(D, D, generator=g) if skip else None,
    )  # fmt: skip


def same(a: Dictionary, b: Dictionary) -> None:
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(a.encode(x), b.encode(x))
    torch.testing.assert_close(a(x), b(x))


# --- circuit-tracer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", sorted(path.name for path in DATA.iterdir()))
def test_codes_and_outputs_are_those_of_circuit_tracer_itself(case: str) -> None:
    expected = load_file(DATA / case / "expected.safetensors")
    dictionary, origin = load_dictionary(DATA / case / "layer_1.safetensors")
    torch.testing.assert_close(dictionary.encode(expected["x"]), expected["codes"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary(expected["x"]), expected["x_hat"], rtol=1e-5, atol=1e-4)
    assert (origin.model, origin.site, origin.site_out) == ("demo", Site(1, "mlp_in"), Site(1, "mlp_out"))
    assert (dictionary.W_skip is not None) == case.endswith("skip")
    assert [path.name for path in find_saes(DATA / case)] == ["layer_0.safetensors", "layer_1.safetensors"]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated", "batchtopk"])
def test_what_is_written_is_its_formula(tmp_path: Path, architecture: str, skip: bool) -> None:
    """W_enc (F, D), W_dec (F, D), W_skip (D, D) as x W_skipᵀ, a threshold only for JumpReLU: circuit-tracer 0.5.0."""
    written = random_transcoder(architecture, skip=skip)
    write_dictionary(tmp_path, written, Origin(model="org/model", **AT_3), "circuit-tracer")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {
        "model_name": "org/model", "model_kind": "transcoder_set", "scan": "org/model",
        "feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out",
        "d_transcoder": F, "skip_connection": skip,
    }  # fmt: skip
    t = load_file(tmp_path / "layer_3.safetensors")
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    pre = x @ t["W_enc"].T + t["b_enc"]
    z = pre * (pre > t["activation_function.threshold"]) if architecture != "relu" else pre.relu()
    y = z @ t["W_dec"] + t["b_dec"]
    if skip:
        y = y + x @ t["W_skip"].T
    torch.testing.assert_close(written(x), y)
    read, origin = load_dictionary(tmp_path / "layer_3.safetensors")
    same(read, written)
    assert (origin.site, origin.site_out) == (Site(3, "mlp_in"), Site(3, "mlp_out"))


def test_topk_and_saes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"L3.mlp_in is topk; .*--architecture batchtopk --tokens 0"):
        write_dictionary(tmp_path, random_transcoder("topk"), Origin(**AT_3), "circuit-tracer")
    with pytest.raises(FormatError, match="only transcoders, and the SAE at L3 is not one; export it as saelens"):
        write_dictionary(tmp_path, random_transcoder(skip=False), Origin(site=Site(3)), "circuit-tracer")
    with pytest.raises(FormatError, match="formats of transcoders: saerelay, circuit-tracer"):
        write_dictionary(tmp_path, random_transcoder(), Origin(**AT_3), "saelens")
    narrow = Dictionary(
        architecture="relu", W_enc=torch.ones(F, D), b_enc=torch.ones(F), W_dec=torch.ones(F, 3), b_dec=torch.ones(3)
    )
    for transcoder in (random_transcoder(), narrow):  # their tensors say what they are, where nobody says it
        with pytest.raises(FormatError, match="saelens can hold only SAEs"):
            write_dictionary(tmp_path, transcoder, Origin(site=Site(3, "mlp_in")), "saelens")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("site", [None, Site(2, "mlp_in")])
def test_a_transcoder_of_no_layer_or_of_two_is_not_written(tmp_path: Path, site: Site | None) -> None:
    with pytest.raises(FormatError, match=r"of one layer; this one reconstructs L3.mlp_out, and reads"):
        write_dictionary(tmp_path, random_transcoder(), Origin(site=site, site_out=Site(3, "mlp_out")), "saerelay")


def test_a_set_is_of_one_kind_and_says_where_layers_lack(tmp_path: Path) -> None:
    write_dictionary(tmp_path, random_transcoder(), Origin(**AT_3), "circuit-tracer")
    at_4 = Origin(site=Site(4, "mlp_in"), site_out=Site(4, "mlp_out"))
    with pytest.raises(FormatError, match="has skip_connection False, and others have True"):
        write_dictionary(tmp_path, random_transcoder(skip=False), at_4, "circuit-tracer")
    with pytest.warns(UserWarning, match=r"the set has the layers \[3\]"):
        check_set(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"feature_input_hook": "ln2.hook_normalized"}, "feature_input_hook is 'ln2.hook_normalized', at which"),
        ({"model_kind": "cross_layer_transcoder"}, "only a transcoder_set is read"),
    ],
)
def test_sites_and_kinds_that_are_not_known_are_named(tmp_path: Path, change: dict[str, str], match: str) -> None:
    write_dictionary(tmp_path, random_transcoder(), Origin(**AT_3), "circuit-tracer")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | change))
    with pytest.raises(FormatError, match=match):
        load_dictionary(tmp_path / "layer_3.safetensors")


def test_a_set_without_a_model_has_none(tmp_path: Path) -> None:
    write_dictionary(tmp_path, random_transcoder(), Origin(**AT_3), "circuit-tracer")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"model_name": None}))
    assert load_dictionary(tmp_path / "layer_3.safetensors")[1].model == ""


def test_damage_is_named(tmp_path: Path) -> None:
    write_dictionary(tmp_path, random_transcoder(), Origin(**AT_3), "circuit-tracer")
    tensors = load_file(tmp_path / "layer_3.safetensors")
    save_file(tensors | {"activation_function.threshold": -torch.ones(F)}, tmp_path / "layer_3.safetensors")
    with pytest.raises(FormatError, match="thresholds below zero"):
        load_dictionary(tmp_path / "layer_3.safetensors")
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(FormatError, match="config.yaml: cannot be read as YAML"):
        load_dictionary(tmp_path / "layer_3.safetensors")


def test_a_directory_lists_its_layers(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds 2 SAEs; give one of them: layer_0.safetensors, layer_1.safetensors"):
        load_dictionary(DATA / "relu")


# --- Gemma Scope 2 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("with_config", [False, True])
def test_gemma_scope_2_transcoders_do_what_their_formula_says(tmp_path: Path, skip: bool, with_config: bool) -> None:
    g = torch.Generator().manual_seed(0)
    t = {
        "w_enc": torch.randn(D, F, generator=g), "b_enc": torch.randn(F, generator=g),
        "w_dec": torch.randn(F, D, generator=g), "b_dec": torch.randn(D, generator=g),
        "threshold": torch.rand(F, generator=g),
    }  # fmt: skip
    if skip:
        t["affine_skip_connection"] = torch.randn(D, D, generator=g)
    path = tmp_path / "gemma-scope-2-270m-pt/transcoder_all/layer_12_width_16k_l0_small_affine"
    path.mkdir(parents=True)
    save_file(t, path / "params.safetensors")
    if with_config:
        config = {
            "hf_hook_point_in": "model.layers.12.pre_feedforward_layernorm.output",
            "hf_hook_point_out": "model.layers.12.post_feedforward_layernorm.output",
            "architecture": "jump_relu", "type": "transcoder", "affine_connection": skip,
        }  # fmt: skip
        (path / "config.json").write_text(json.dumps(config))

    dictionary, origin = load_dictionary(path)
    x = torch.randn(50, D, generator=g)
    pre = x @ t["w_enc"] + t["b_enc"]
    z = pre.relu() * (pre > t["threshold"])
    y = z @ t["w_dec"] + t["b_dec"]
    if skip:
        y = y + x @ t["affine_skip_connection"]
    torch.testing.assert_close(dictionary.encode(x), z)
    torch.testing.assert_close(dictionary(x), y)
    assert (origin.model, origin.site, origin.site_out) == (
        "google/gemma-3-270m", Site(12, "mlp_in"), Site(12, "mlp_out"),
    )  # fmt: skip


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_transcoder_is_imported_hopped_and_exported(tmp_path: Path, tiny_model: Path) -> None:
    import numpy as np
    from test_transcoder_runs import recipe

    tokens = torch.randint(1, 101, (40_000,), generator=torch.Generator().manual_seed(0)).numpy().astype("uint16")
    np.save(tmp_path / "tokens.npy", tokens)
    run = recipe(tiny_model, tmp_path, sites={"layers": [0, 1]}, plan={"roots": [1], "controls": []})
    suite = sr.train_run(run, tmp_path / "run")
    written = export_run(str(tmp_path / "run"), tmp_path / "set", "circuit-tracer")
    assert [one.folder for one in written] == ["layer_0.safetensors", "layer_1.safetensors"]
    card = (tmp_path / "set/README.md").read_text()
    assert "mlp\\_in → mlp\\_out, layer 0" in card and "load_transcoder_from_hub" in card

    read, origin = import_dictionary(str(tmp_path / "set/layer_1.safetensors"), tmp_path / "imported")
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(read(x), suite["L1.transcoder"](x))
    assert (read.architecture, origin.site_out) == ("jumprelu", Site(1, "mlp_out"))
    again, _ = load_dictionary(tmp_path / "imported")
    torch.testing.assert_close(again(x), read(x))

    hopped = sr.hop_run(tmp_path / "set/layer_1.safetensors", 2, run, tmp_path / "hop", tokens=1024)
    leg = hopped.legs[0]
    assert (leg.site, leg.site_out, leg.dictionary.skip_connection) == (Site(2, "mlp_in"), Site(2, "mlp_out"), True)
    assert hopped[leg.id].W_skip is not None
