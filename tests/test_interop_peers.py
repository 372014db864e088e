"""SAELens, sparsify and dictionary_learning: what their own classes saved and computed, in data/interop.

`bench/interop.py --fixtures` made these files, with those tools installed; here none of them is.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saerelay.errors import FormatError
from saerelay.files import read_json
from saerelay.interop import format_of, load_dictionary, load_layer_normed, read_any, write_dictionary
from saerelay.interop.origin import Origin
from saerelay.sae.dictionary import Dictionary
from saerelay.site import Site

DATA = Path(__file__).parent / "data" / "interop"
CASES = sorted(path.parent for path in DATA.rglob("expected.safetensors"))
FORMATS = ("saelens", "sparsify", "dictionary_learning")
D, F = 8, 24


def sae_of(case: Path) -> Path:
    return next(path for path in case.iterdir() if path.is_dir())


def copied(name: str, to: Path) -> Path:
    case = shutil.copytree(DATA / name, to / "case")
    return sae_of(case)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def random_dictionary(architecture: str, **fields: Any) -> Dictionary:
    g = torch.Generator().manual_seed(3)
    fields = {"k": 5 if "topk" in architecture else None, "threshold": None} | fields
    if architecture in ("batchtopk", "jumprelu", "gated") and fields["threshold"] is None:
        fields["threshold"] = torch.full((F,), 0.7) if architecture == "batchtopk" else torch.rand(F, generator=g)
    if architecture == "gated":
        fields["r_mag"] = torch.randn(F, generator=g)
    return Dictionary(
        architecture=architecture,  # type: ignore[arg-type]
        W_enc=torch.randn(F, D, generator=g),
        b_enc=torch.randn(F, generator=g),
        W_dec=torch.randn(F, D, generator=g),
        b_dec=3 + torch.randn(D, generator=g),
        **fields,
    )


def same_function(a: Dictionary, b: Dictionary) -> None:
    x = 3 + torch.randn(200, D, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(a.encode(x), b.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a(x), b(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.relative_to(DATA)))
def test_codes_and_reconstructions_are_those_of_the_tool_itself(case: Path) -> None:
    expected = load_file(case / "expected.safetensors")
    assert format_of(sae_of(case)).NAME == case.parent.name
    dictionary, origin = read_any(sae_of(case))
    for found, name in ((dictionary.encode(expected["x"]), "codes"), (dictionary(expected["x"]), "x_hat")):
        assert (found - expected[name]).abs().max() < 1e-5 * expected[name].abs().max()
    assert 1 < (expected["codes"] > 0).sum(dim=1).float().mean() < F - 1
    assert origin.model == "demo" and origin.context == 128
    assert origin.site == (Site(3, "mlp_out") if sae_of(case).name == "h.3.mlp" else Site(3))


def test_every_architecture_of_every_tool_is_there() -> None:
    assert {format: len(list((DATA / format).iterdir())) for format in FORMATS} == {
        "saelens": 18,
        "sparsify": 2,
        "dictionary_learning": 8,
    }


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "gated", "relu"])
@pytest.mark.parametrize("format", FORMATS)
def test_what_we_write_we_read(format: str, architecture: str, tmp_path: Path) -> None:
    if format == "sparsify" and architecture != "topk":
        pytest.skip("has TopK alone")
    written = random_dictionary(architecture)
    origin = Origin(
        model="org/model", site=Site(2, "mlp_out"), module_path="model.layers.2.mlp", context=64, prepend_bos=False,
        dataset="some/text", l0=4.5, provenance={"tokens": 1000, "parent": {"leg": "L5"}},
    )  # fmt: skip
    path = tmp_path / "layers.2.mlp"
    write_dictionary(path, written, origin, format)
    assert not [file.name for file in path.iterdir() if file.name.startswith(".")]
    assert format_of(path).NAME == format
    read, found = load_dictionary(path)
    assert (read.architecture, read.k) == (architecture, written.k)
    same_function(written, read)
    kept = {
        "saelens": origin,
        "sparsify": Origin(
            model=origin.model, site=origin.site, module_path="layers.2.mlp", provenance=origin.provenance
        ),
        "dictionary_learning": Origin(model=origin.model, site=origin.site, context=64, provenance=origin.provenance),
    }
    assert found == kept[format]


def test_an_origin_that_says_nothing_is_written_and_read(tmp_path: Path) -> None:
    for format in FORMATS:
        write_dictionary(tmp_path / format, random_dictionary("topk"), Origin(), format)
        assert load_dictionary(tmp_path / format)[1] == Origin()


def test_batchtopk_with_several_thresholds_goes_to_dictionary_learning_as_jumprelu(tmp_path: Path) -> None:
    written = random_dictionary("batchtopk", threshold=torch.rand(F, generator=torch.Generator().manual_seed(0)))
    write_dictionary(tmp_path, written, Origin(), "dictionary_learning")
    assert read_json(tmp_path / "config.json")["trainer"]["dict_class"] == "JumpReluAutoEncoder"
    read, _ = load_dictionary(tmp_path)
    assert read.architecture == "jumprelu"
    same_function(written, read)


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu", "gated", "relu"])
def test_sparsify_refuses_what_it_cannot_say(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(
        FormatError, match=rf"only TopK, and this SAE is {architecture}; export it as saelens or dictionary_learning"
    ):
        write_dictionary(tmp_path / "out", random_dictionary(architecture), Origin(), "sparsify")
    assert not (tmp_path / "out").exists()


def test_sparsify_is_told_whether_decoder_rows_have_unit_norm(tmp_path: Path) -> None:
    dictionary = random_dictionary("topk")
    unit = replace(dictionary, W_dec=torch.nn.functional.normalize(dictionary.W_dec, dim=1))
    for name, written, is_unit in (("plain", dictionary, False), ("unit", unit, True)):
        write_dictionary(tmp_path / name, written, Origin(), "sparsify")
        assert read_json(tmp_path / name / "cfg.json")["normalize_decoder"] is is_unit


# --- refusals: which file, what is wrong, what would do -------------------------------------------------------------


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("saelens/topk", {"architecture": "jumprelu_transcoder"}, r"jumprelu_transcoder.* maps one site .*standard, topk,"),
    ("saelens/topk", {"architecture": "temporal"}, r'"temporal" is not known here; these are read: standard, topk, '),
    ("saelens/topk", {"normalize_activations": "constant_norm_rescale"}, r"constant_norm_rescale.* not a fixed map"),
    ("saelens/topk", {"normalize_activations": "covariance_whitening"}, r"covariance_whitening.* read: none, "),
    ("saelens/topk", {"k": None}, r"cfg.json: k is None, expected a "),
    ("saelens/topk", {"k": 25}, r"cfg.json: k is 25, expected a whole number from 1 to 24"),
    (
        "saelens/topk",
        {"d_sae": 32},
        r"sae_weights.safetensors: tensor W_enc has shape \(8, 24\), expected .* \(8, 32\)",
    ),
    ("saelens/topk", {"architecture": "jumprelu"}, r"sae_weights.safetensors: tensor threshold \(F\) is missing"),
    ("saelens/topk-before6", {"hook_point_head_index": 2}, r"reads only head 2 of blocks.3.hook_resid_post"),
    ("saelens/topk-before6", {"activation_fn_str": "tanh-relu"}, r'activation "tanh-relu" cannot be read'),
    ("sparsify/topk", {"activation": "groupmax"}, r'cfg.json: activation is "groupmax"; only topk is read'),
    ("sparsify/topk", {"signed": True}, r'cfg.json: activation is "signed topk"'),
    ("sparsify/topk", {"transcode": True}, r"cfg.json: is a transcoder"),
    ("sparsify/topk", {"skip_connection": True}, r"cfg.json: has a skip connection"),
    ("sparsify/topk", {"k": "5"}, r"cfg.json: k is '5', expected a "),
    (
        "sparsify/topk",
        {"d_in": 9},
        r"sae.safetensors: tensor encoder.weight has shape \(24, 8\), expected .* \(24, 9\)",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_read_is_refused(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = copied(name, tmp_path)
    edit(path / "cfg.json", lambda config: config.update(change))
    with pytest.raises(FormatError, match=message):
        read_any(path)


def test_saelens_transcoders_and_single_heads_are_refused(tmp_path: Path) -> None:
    path = copied("saelens/jumprelu", tmp_path)
    edit(path / "cfg.json", lambda config: config["metadata"].update(hook_name_out="blocks.3.hook_mlp_out"))
    with pytest.raises(FormatError, match=r"maps blocks.3.hook_resid_post to blocks.3.hook_mlp_out"):
        read_any(path)
    edit(path / "cfg.json", lambda config: config["metadata"].update(hook_name_out=None, hook_head_index=0))
    with pytest.raises(FormatError, match="reads only head 0 of"):
        read_any(path)


def test_saelens_decoders_that_were_rescaled_in_finetuning_are_refused(tmp_path: Path) -> None:
    path = copied("saelens/standard", tmp_path)
    weights = path / "sae_weights.safetensors"
    save_file(load_file(weights) | {"scaling_factor": torch.ones(F)}, weights)
    read_any(path)
    save_file(load_file(weights) | {"scaling_factor": torch.full((F,), 1.1)}, weights)
    with pytest.raises(FormatError, match="scaling_factor is not all 1"):
        read_any(path)


def test_a_missing_scaling_factor_is_warned_of(tmp_path: Path) -> None:
    path = copied("saelens/batchtopk-checkpoint-normed", tmp_path)
    with_factor, _ = load_dictionary(path)
    (path / "activation_scaler.json").unlink()
    with pytest.warns(UserWarning, match=r"missing here \(activation_scaler.json\); a factor of 1 is assumed"):
        without, _ = load_dictionary(path)
    assert not torch.allclose(with_factor.b_dec, without.b_dec)


def test_an_sae_with_a_layer_norm_is_not_a_dictionary_of_raw_activations() -> None:
    with pytest.raises(FormatError, match="normalises each token"):
        load_dictionary(DATA / "saelens" / "topk-layernorm" / "sae")
    with pytest.raises(FormatError, match="reads raw activations; load it with saerelay.load_dictionary"):
        load_layer_normed(sae_of(DATA / "saelens" / "topk"))


@pytest.mark.parametrize("name", ["W_skip", "log_threshold"])
def test_sparsify_with_tensors_of_something_else_is_refused(name: str, tmp_path: Path) -> None:
    path = copied("sparsify/topk", tmp_path)
    tensors = load_file(path / "sae.safetensors")
    save_file(tensors | {name: torch.zeros(D, D)}, path / "sae.safetensors")
    with pytest.raises(FormatError, match="skip connection" if name == "W_skip" else "has a tensor log_threshold"):
        read_any(path)


@pytest.mark.parametrize("name", ["saelens/topk", "sparsify/topk", "dictionary_learning/AutoEncoder"])
def test_a_file_that_is_cut_off_is_refused(name: str, tmp_path: Path) -> None:
    path = copied(name, tmp_path)
    weights = max(path.iterdir(), key=lambda file: file.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-700])
    with pytest.raises(FormatError, match=rf"{weights.name}: .*(cut off|damaged)"):
        read_any(path)


# --- where it reads -------------------------------------------------------------------------------------------------


def test_a_site_is_used_where_the_files_do_not_say_and_refused_where_they_say_another(tmp_path: Path) -> None:
    write_dictionary(tmp_path / "silent", random_dictionary("topk"), Origin(), "saelens")
    assert load_dictionary(tmp_path / "silent", site=Site(2), model="m")[1] == Origin(model="m", site=Site(2))
    write_dictionary(tmp_path / "says", random_dictionary("topk"), Origin(model="n", site=Site(3)), "saelens")
    assert load_dictionary(tmp_path / "says", site=Site(3), model="m")[1].model == "n"
    with pytest.raises(FormatError, match="says: its files say it reads L3, not L2"):
        load_dictionary(tmp_path / "says", site=Site(2))


def test_saelens_metadata_becomes_the_origin(tmp_path: Path) -> None:
    path = copied("saelens/jumprelu", tmp_path)
    said = {"dataset_path": "some/text", "l0": 30, "prepend_bos": False, "hf_hook_name": "model.layers.3", "seed": 7}
    edit(path / "cfg.json", lambda config: config["metadata"].update(said))
    origin = load_dictionary(path)[1]
    assert (origin.dataset, origin.l0, origin.prepend_bos) == ("some/text", 30.0, False)
    assert (origin.site, origin.module_path, origin.provenance["seed"]) == (Site(3), "model.layers.3", 7)


def test_saelens_hooks_of_hugging_face_models_and_unknown_ones(tmp_path: Path) -> None:
    path = copied("saelens/jumprelu", tmp_path)
    edit(path / "cfg.json", lambda config: config["metadata"].update(hook_name="model.layers.5"))
    origin = load_dictionary(path)[1]
    assert (origin.site, origin.module_path) == (Site(5), "model.layers.5")
    edit(path / "cfg.json", lambda config: config["metadata"].update(hook_name="blocks.5.ln1.hook_normalized"))
    origin = load_dictionary(path)[1]
    assert (origin.site, origin.module_path) == (None, "")


def test_saelens_before_6_had_bos_unless_it_said_otherwise(tmp_path: Path) -> None:
    path = copied("saelens/topk-before6", tmp_path)
    assert load_dictionary(path)[1] == Origin(model="demo", site=Site(3), context=128, prepend_bos=True)
    edit(path / "cfg.json", lambda config: config.update(prepend_bos=False))
    assert load_dictionary(path)[1].prepend_bos is False


def test_saelens_jumprelu_that_was_trained_as_batchtopk_is_that_again(tmp_path: Path) -> None:
    path = copied("saelens/jumprelu", tmp_path)
    trained = {"training_architecture": "batchtopk", "training_architecture_details": {"k": 4.6}}  # a mean
    edit(path / "cfg.json", lambda config: config["metadata"].update(trained))
    dictionary, _ = load_dictionary(path)
    assert (dictionary.architecture, dictionary.k) == ("batchtopk", 5)


def test_the_directory_of_a_sparsify_sae_says_where_it_reads(tmp_path: Path) -> None:
    run = DATA / "sparsify" / "topk"
    shutil.copytree(run / "layers.3", tmp_path / "run" / "h.7.attn" / "seed1")
    shutil.copy(run / "config.json", tmp_path / "run" / "config.json")
    origin = load_dictionary(tmp_path / "run" / "h.7.attn" / "seed1")[1]
    assert origin == Origin(model="demo", site=Site(7, "attn_out"), module_path="h.7.attn", context=128, dataset="text")
    shutil.copytree(run / "layers.3", tmp_path / "elsewhere" / "mine")
    assert load_dictionary(tmp_path / "elsewhere" / "mine")[1] == Origin()


@pytest.mark.parametrize(
    ("said", "site"),
    [
        ({"submodule_name": "resid_post_layer_7"}, Site(7)),
        ({"submodule_name": "resid_post", "layer": 4}, Site(4)),
        ({"submodule_name": "mlp_out", "layer": 4}, Site(4, "mlp_out")),
        ({"submodule_name": "gpt_neox.layers.2.mlp", "layer": 2}, Site(2, "mlp_out")),
        ({"submodule_name": None, "layer": 4}, None),
        ({"submodule_name": "something", "layer": 4}, None),
    ],
)
def test_the_submodule_of_dictionary_learning_is_the_site(
    said: dict[str, Any], site: Site | None, tmp_path: Path
) -> None:
    path = copied("dictionary_learning/AutoEncoderTopK", tmp_path)
    edit(path / "config.json", lambda config: config["trainer"].update(said))
    origin = load_dictionary(path)[1]
    assert origin.site == site
    names_a_module = (said["submodule_name"] or "").startswith("gpt_neox.")
    assert origin.module_path == (said["submodule_name"] if names_a_module else "")


# --- dictionary_learning: state dicts alone -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["AutoEncoder", "AutoEncoderNew", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder",
                                  "GatedAutoEncoder"])  # fmt: skip
def test_the_class_follows_from_the_tensors(kind: str, tmp_path: Path) -> None:
    with_config, _ = load_dictionary(DATA / "dictionary_learning" / kind / "trainer_0")
    alone = tmp_path / "ae_5000.pt"
    shutil.copy(DATA / "dictionary_learning" / kind / "trainer_0" / "ae.pt", alone)
    dictionary, origin = load_dictionary(alone)
    assert (dictionary.architecture, origin) == (with_config.architecture, Origin())
    torch.testing.assert_close(dictionary.tensors(), with_config.tensors())


def test_topk_and_batchtopk_need_their_configuration_once_there_is_a_threshold(tmp_path: Path) -> None:
    source = DATA / "dictionary_learning" / "BatchTopKSAE" / "trainer_0"
    alone = tmp_path / "ae.pt"
    shutil.copy(source / "ae.pt", alone)
    with pytest.raises(FormatError, match=r"AutoEncoderTopK or a BatchTopKSAE, .* put its config.json beside it"):
        load_dictionary(alone)
    torch.save(torch.load(source / "ae.pt", weights_only=True) | {"threshold": torch.tensor(-1.0)}, alone)
    assert load_dictionary(alone)[0].architecture == "topk"


def test_a_checkpoint_has_the_configuration_of_its_trainer(tmp_path: Path) -> None:
    path = copied("dictionary_learning/BatchTopKSAE", tmp_path)
    (path / "checkpoints").mkdir()
    checkpoint = (path / "ae.pt").rename(path / "checkpoints" / "ae_100.pt")
    dictionary, origin = load_dictionary(checkpoint)
    assert (dictionary.architecture, origin.model) == ("batchtopk", "demo")


def test_a_threshold_that_is_not_known_yet_lets_all_positive_codes_through(tmp_path: Path) -> None:
    path = copied("dictionary_learning/BatchTopKSAE", tmp_path)
    state = torch.load(path / "ae.pt", weights_only=True)
    torch.save(state | {"threshold": torch.tensor(-1.0)}, path / "ae.pt")
    dictionary, _ = load_dictionary(path)
    x = load_file(path.parent / "expected.safetensors")["x"]
    torch.testing.assert_close(dictionary.encode(x), dictionary.pre_activations(x).relu())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dict_class": "CrossCoder"}, r'unknown dict_class "CrossCoder"; these are read: AutoEncoder, AutoEncoderNew'),
        ({"dict_size": 32}, r"ae.pt: tensor encoder.weight has shape \(24, 8\), expected .* \(32, 8\)"),
        ({"dict_class": "JumpReluAutoEncoder"}, r"ae.pt: tensor W_enc \(D, F\) is missing; the file has "),
    ],
)
def test_what_cannot_be_read_of_dictionary_learning_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = copied("dictionary_learning/AutoEncoderTopK", tmp_path)
    edit(path / "config.json", lambda config: config["trainer"].update(change))
    with pytest.raises(FormatError, match=message):
        read_any(path)


def test_transcoders_of_dictionary_learning_are_refused(tmp_path: Path) -> None:
    path = copied("dictionary_learning/AutoEncoder", tmp_path)
    edit(path / "config.json", lambda config: config["buffer"].update(io="in_and_out"))
    with pytest.raises(FormatError, match="is a transcoder"):
        read_any(path)


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def test_no_pickle_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"bias": torch.zeros(3), "also": Runs()}, tmp_path / "ae.pt")
    with pytest.raises(FormatError, match=r"ae.pt: .*can run code; refused"):
        read_any(tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "ae.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # it is dangerous indeed


def test_what_we_write_is_a_plain_state_dict(tmp_path: Path) -> None:
    write_dictionary(tmp_path, replace(random_dictionary("topk"), k=7), Origin(), "dictionary_learning")
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F), "b_dec": (D,),
        "k": (), "threshold": (),
    }  # fmt: skip
    assert state["k"] == 7 and state["threshold"] == -1
