"""One hop of one SAE: to itself, to another shape, from another model, from files that say little."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import call, place  # noqa: F401  # a fixture

import saerelay as sr
from saerelay.analysis import metrics
from saerelay.errors import FormatError, ModelError, RunDirectoryError
from saerelay.interop import write_dictionary
from saerelay.interop.origin import Origin
from saerelay.planning.recipe import ModelSpec
from saerelay.runs.dictionaries import read_dictionary
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.layer_normed import LayerNormed
from saerelay.workflows import hop

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(place: Path) -> sr.Recipe:  # noqa: F811
    return sr.Recipe.from_toml(place / "run.toml")


@pytest.fixture
def call_in(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:  # noqa: F811
    """Exit code, stdout and stderr of the program, called beside the finished run."""
    monkeypatch.chdir(place)
    return partial(call, capsys=capsys, monkeypatch=monkeypatch)


def fvu(out: Path) -> float:
    return sr.load(out).evaluate().legs[0].fvu or 0


def copied_parent(out: Path) -> Path:
    """Where a hop keeps its copy of the SAE that it started from."""
    (copy,) = (out / "parents").iterdir()
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_onto_its_own_site_and_untrained_it_stays_as_it_is(
    place: Path,  # noqa: F811
    run: sr.Run,
    tmp_path: Path,
    architecture: str,
) -> None:
    source = read_dictionary(place / "run/legs/L1")[0]
    uneven = replace(source, W_dec=source.W_dec * torch.linspace(0.5, 2, 64)[:, None])  # TopK does not rank by norms
    if architecture == "batchtopk":
        uneven = replace(uneven, architecture=architecture, threshold=torch.full((64,), 0.1))  # not calibrated
    write_dictionary(tmp_path / "sae", uneven, Origin(model="a", site=sr.Site(1)), "saerelay")
    suite = sr.hop_run(tmp_path / "sae", 1, run, tmp_path / "out", tokens=0, refit=False)
    assert list(suite) == ["L1-from-L1"] and suite.plan.legs[0].method == "identity"
    for name, tensor in suite["L1-from-L1"].tensors().items():
        assert torch.allclose(tensor, uneven.tensors()[name], atol=2e-5), name


@pytest.mark.parametrize(
    ("options", "shape", "l0"),
    [
        (["--n-latents", "96"], ("topk", 96, 4), 4.0),
        (["--n-latents", "40", "--k", "3"], ("topk", 40, 3), 3.0),
        (["--k", "8"], ("topk", 64, 8), 8.0),
        (["--architecture", "jumprelu"], ("jumprelu", 64, None), 4.0),
        (["--architecture", "batchtopk", "--n-latents", "80"], ("batchtopk", 80, 4), 4.0),
        (["--architecture", "relu"], ("relu", 64, None), 4.0),
    ],
)
@pytest.mark.parametrize("layer", [1, 2])
def test_to_another_shape(
    call_in: Call,
    tmp_path: Path,
    options: list[str],
    shape: tuple[str, int, int | None],
    l0: float,
    layer: int,
) -> None:
    arguments = ["hop", "--from", "run/legs/L1", "--to-layer", layer, "--recipe", "run.toml"]
    arguments += ["--out", tmp_path / "x", "--tokens", "0", *options]
    code, _, stderr = call_in(*arguments)
    assert code == 0, stderr
    suite = sr.load(tmp_path / "x")
    found = suite[f"L{layer}-from-L1"]
    assert (found.architecture, found.n_latents, found.k) == shape
    (leg,) = suite.evaluate().legs
    assert leg.l0 == pytest.approx(l0, rel=0.1) and leg.fvu and leg.fvu < 1
    assert leg.frac_alive and leg.frac_alive > 0.5


def test_a_reshaped_child_is_trained_and_its_lineage_is_matched(place: Path, run: sr.Run, tmp_path: Path) -> None:  # noqa: F811
    legs: list[dict[str, Any]] = [
        {"id": "a", "layer": 1, "tokens": 8192},
        {"id": "wide", "layer": 1, "parent": "a", "tokens": 2048, "n_latents": 96, "method": "identity"},
        {"id": "jump", "layer": 2, "parent": "wide", "tokens": 2048, "architecture": "jumprelu", "k": 6},
        {"id": "small", "layer": 2, "parent": "a", "tokens": 2048, "n_latents": 32},
    ]
    plan = {**run.plan.model_dump(), "legs": legs, "controls": []}
    suite = sr.train_run(sr.Run.parse({**run.model_dump(), "plan": plan}, source="test"), tmp_path / "run")
    assert [suite[leg].n_latents for leg in suite] == [64, 96, 96, 32]
    assert suite.plan.leg("jump").dictionary.l0 == 6
    lineage = suite.lineage()
    assert lineage.link("wide", "jump").partner is None  # the same latents, whatever decides which are active
    for child, least in (("wide", 60), ("small", 30)):
        partner = lineage.link("a", child).partner
        assert partner is not None and int((partner >= 0).sum()) >= least
    wide = lineage.link("a", "wide")
    assert wide.shares()["kept"] > 0.5
    partner = wide.partner
    assert partner is not None and float((partner == torch.arange(64)).float().mean()) > 0.5


def test_from_a_copy_of_the_model_is_as_from_the_model(place: Path, run: sr.Run, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(place / "model", tmp_path / "copy")
    source = place / "run/legs/L1"
    suite = sr.hop_run(source, 1, run, tmp_path / "a", model=str(tmp_path / "copy"), tokens=0, refit=False)
    sr.hop_run(source, 1, run, tmp_path / "b", tokens=0, refit=False)
    assert fvu(tmp_path / "a") == pytest.approx(fvu(tmp_path / "b"), rel=0.02)
    info = json.loads((copied_parent(tmp_path / "a") / "dictionary.json").read_text())
    assert info["carried_from"]["model"] == str(tmp_path / "copy") and info["carried_from"]["unexplained"] < 0.01
    assert info["carried_from"]["lm_tokens"] == 2 * run.plan.hop.moment_tokens
    assert suite.plan.legs[0].method == "identity"


def test_a_map_between_models_is_fitted_on_all_its_tokens_whatever_roots_repeat(place: Path, run: sr.Run) -> None:  # noqa: F811
    repeating = run.changed(plan=run.plan.changed(root_reuse=1000))
    n_read = sum(tokens.numel() for tokens, _, _ in hop.kept_rows(hop.moments_plan(repeating, sr.Site(1)), sr.Site(1)))
    assert n_read == run.plan.hop.moment_tokens


def test_from_another_model_the_refit_asked_for_is_made(place: Path, run: sr.Run, tmp_path: Path) -> None:  # noqa: F811
    """The decoder was mapped, not trained where it arrives, so it need not prove that a refit gains much."""
    suite = sr.hop_run(place / "run/legs/L1", 1, run, tmp_path / "a", model=str(place / "model"), tokens=0)
    mapped = read_dictionary(copied_parent(tmp_path / "a"))[0]
    assert suite.plan.legs[0].refit_tokens and not torch.allclose(suite["L1-from-L1"].W_dec, mapped.W_dec, atol=1e-2)


def test_from_another_model_the_random_dictionary_to_beat_is_of_the_same_kind(
    place: Path, run: sr.Run, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """Whatever kind the recipe has: with a larger k, a random dictionary would win too often."""
    dictionary, _ = read_dictionary(place / "run/legs/L1")
    seen: list[Any] = []

    def noted(*given: Any, **_: Any) -> dict[str, float]:
        seen.append(given[4])
        return {"identity": 0.1}

    monkeypatch.setattr(hop, "try_methods", noted)
    recipe = sr.Run.parse({**run.model_dump(), "dictionary": {"architecture": "batchtopk", "k": 16}}, source="t")
    hop.carry_from_model(dictionary, Origin(site=sr.Site(1)), recipe, sr.Site(1), str(place / "model"), "auto")
    (fresh,) = seen
    assert (fresh.architecture, fresh.l0, fresh.n_latents) == ("topk", dictionary.k, dictionary.n_latents)


def test_from_another_model_scale_and_l0_are_those_of_all_batches(
    place: Path, run: sr.Run, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr(metrics, "BATCH_TOKENS", 512)
    seen: list[int] = []
    at_scale = LayerNormed.at_scale
    carry = hop.carry

    def noted_at_scale(self: LayerNormed, x: torch.Tensor) -> Dictionary:
        seen.append(len(x))
        return at_scale(self, x)

    def noted_carry(dictionary: Dictionary, between: Any, rows: torch.Tensor, *arguments: Any, **keys: Any) -> Any:
        seen.append(len(rows))
        return carry(dictionary, between, rows, *arguments, **keys)

    monkeypatch.setattr(LayerNormed, "at_scale", noted_at_scale)
    monkeypatch.setattr(hop, "carry", noted_carry)
    normed = LayerNormed(read_dictionary(place / "run/legs/L1")[0])
    origin = Origin(site=sr.Site(1))
    hop.carry_from_model(normed, origin, run, sr.Site(1), str(place / "model"), "affine")
    hop.completed(normed, origin, run, None)
    assert len(seen) == 3 and min(seen) > 1536


def test_the_other_model_is_loaded_without_what_belongs_to_the_recipes_own(
    run: sr.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(recipe: sr.Recipe, other: ModelSpec) -> None:
        raise ModelError(f"adapter {other.adapter!r}, file {other.gguf_file!r}")

    monkeypatch.setattr(hop, "check_tokens", stop)
    monkeypatch.setattr(hop, "moments_plan", lambda *_: None)
    merged = run.changed(model=run.model.changed(adapter="my/lora", gguf_file="a.gguf", revision="b"))
    with pytest.raises(ModelError, match="adapter '', file ''"):
        hop.carry_from_model(None, Origin(site=sr.Site(1)), merged, sr.Site(1), "base", "auto")  # type: ignore[arg-type]


@pytest.mark.slow
def test_from_a_model_of_another_width(place: Path, run: sr.Run, tmp_path: Path) -> None:  # noqa: F811
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(vocab_size=101, n_embd=48, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "wide")
    wide = sr.Run.parse(
        {**run.model_dump(), "model": {**run.model.model_dump(), "name": str(tmp_path / "wide")}}, source="t"
    )
    plan = run.plan.changed(controls=[], preset="scratch")
    sr.train_run(wide.changed(plan=plan), tmp_path / "wide-run")
    source = tmp_path / "wide-run/legs/L0"
    suite = sr.hop_run(source, 2, run, tmp_path / "x", model=str(tmp_path / "wide"), tokens=2048)
    leg = suite.plan.legs[0]
    assert (suite[leg.id].d_model, suite[leg.id].n_latents) == (32, 64) and leg.id == "L2-from-L0"
    scratch = 0.1  # random models share little but tokens and positions: it has to work, not to be good
    assert fvu(tmp_path / "x") < 1 - scratch
    with pytest.raises(sr.SaeRelayError, match="source and a target of the same width, but their widths are 48 and 32"):
        sr.hop_run(source, 2, run, tmp_path / "y", model=str(tmp_path / "wide"), method="rescale")
    with pytest.raises(sr.SaeRelayError, match="reads activations of width 48"):
        sr.hop_run(source, 1, run, tmp_path / "z")


def test_tokens_that_differ_are_refused(tmp_path: Path) -> None:
    demo = Path(sr.__file__).parent / "demo"
    shutil.copytree(demo, tmp_path / "other", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    run = sr.Run()
    hop.check_tokens(run, ModelSpec(name=str(tmp_path / "other")))
    tokenizer = json.loads((tmp_path / "other/tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="do not read the same tokens"):
        hop.check_tokens(run, ModelSpec(name=str(tmp_path / "other")))


def test_files_that_do_not_say_where_they_read(place: Path, run: sr.Run, tmp_path: Path) -> None:  # noqa: F811
    write_dictionary(tmp_path / "sae", read_dictionary(place / "run/legs/L1")[0], Origin(), "saerelay")
    with pytest.raises(FormatError, match="do not say which layer it reads; name it with --from-layer"):
        sr.hop_run(tmp_path / "sae", 2, run, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    suite = sr.hop_run(tmp_path / "sae", 2, run, tmp_path / "x", site=sr.Site(1), tokens=0)
    again = sr.hop_run(place / "run/legs/L1", 2, run, tmp_path / "y", tokens=0)
    assert torch.equal(suite["L2-from-L1"].W_enc, again["L2-from-L1"].W_enc)


def test_a_hop_of_another_sae_is_not_taken_for_the_one_that_is_there(place: Path, run: sr.Run, tmp_path: Path) -> None:  # noqa: F811
    """Their layers are given, so that both are copied into the run: the copies must not be mistaken for each other."""
    for name, leg in (("a", "L1"), ("b", "L0-scratch-full")):
        write_dictionary(tmp_path / name, read_dictionary(place / "run/legs" / leg)[0], Origin(l0=4.0), "saerelay")
    keys: dict[str, Any] = {"site": sr.Site(1), "tokens": 0}
    first = sr.hop_run(tmp_path / "a", 2, run, tmp_path / "x", **keys)["L2-from-L1"]
    with pytest.raises(RunDirectoryError, match="was begun with another recipe"):
        sr.hop_run(tmp_path / "b", 2, run, tmp_path / "x", **keys)
    again = sr.hop_run(tmp_path / "a", 2, run, tmp_path / "x", **keys)["L2-from-L1"]
    assert torch.equal(first.W_enc, again.W_enc)


def test_a_hop_onto_another_kind_of_site_is_no_copy(place: Path, run: sr.Run, tmp_path: Path) -> None:  # noqa: F811
    suite = sr.hop_run(place / "run/legs/L1", 1, run, tmp_path / "x", tokens=0, module="mlp_out")
    assert suite.plan.legs[0].site == sr.Site(1, "mlp_out") and suite.plan.legs[0].method == "auto"


def test_from_another_model_a_random_dictionary_is_what_is_asked_for(
    place: Path, run: sr.Run, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    suite = sr.hop_run(place / "run/legs/L1", 2, run, tmp_path / "x", model=str(place / "model"), method="random")
    assert suite.method(suite.plan.legs[0]) == "random"


@pytest.mark.parametrize(("normalise", "balance"), [(True, 1.0), (False, 0.0)])
def test_from_another_model_the_units_are_those_of_training(
    place: Path, run: sr.Run, monkeypatch, normalise: bool, balance: float  # noqa: F811
) -> None:  # fmt: skip
    seen = []
    monkeypatch.setattr(hop, "unexplained", lambda moments, balance: seen.append(balance) or 0.1)
    run = run.changed(
        dictionary=run.dictionary.changed(normalise=normalise),
        train=run.train.changed(optimizer=run.train.optimizer.changed(balance=1.0), seeds=2),
    )
    dictionary, origin = sr.load_dictionary(place / "run/legs/L1")
    hop.carry_from_model(dictionary, origin, run, sr.Site(2), str(place / "model"), "affine")
    assert seen == [balance]


@pytest.mark.parametrize("layer", [1, 2])
def test_an_l0_that_files_do_not_say_is_measured(place: Path, run: sr.Run, tmp_path: Path, layer: int) -> None:  # noqa: F811
    source = read_dictionary(place / "run/legs/L1")[0]
    dense = replace(source, architecture="jumprelu", k=None, threshold=torch.full((64,), 1e-3))
    write_dictionary(tmp_path / "sae", dense, Origin(site=sr.Site(1)), "saerelay")
    suite = sr.hop_run(tmp_path / "sae", layer, run, tmp_path / "x", tokens=0)
    own = read_dictionary(copied_parent(tmp_path / "x"))[1].l0
    assert own is not None and own > 8
    assert suite.plan.legs[0].dictionary.l0 == own
    assert suite.evaluate().legs[0].l0 == pytest.approx(own, rel=0.1)


def test_a_layer_normed_one_is_taken_at_the_scale_of_the_text(
    place: Path, run: sr.Run, tmp_path: Path, monkeypatch  # noqa: F811
) -> None:  # fmt: skip
    source = read_dictionary(place / "run/legs/L1")[0]
    normed = LayerNormed(source)
    monkeypatch.setattr(hop, "read_any", lambda *_, **__: (normed, Origin(site=sr.Site(1), l0=4.0)))
    suite = sr.hop_run("hf://some/where", 1, run, tmp_path / "x", tokens=0, refit=False)
    found = suite["L1-from-L1"]
    scale = (found.W_dec.norm(dim=1) / source.W_dec.norm(dim=1)).median()
    assert torch.allclose(found.W_enc.sum(dim=1), torch.zeros(64), atol=1e-4)  # the mean of a token does not matter
    assert torch.allclose(found.W_dec, source.W_dec * scale, rtol=1e-4) and not torch.isclose(scale, torch.tensor(1.0))
