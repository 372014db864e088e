"""The command line, from outside: what a stranger types, and what they get wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import saerelay as sr
import saerelay.analysis.suite
from saerelay import cli
from saerelay.cli import app, main
from saerelay.runs.dictionaries import read_dictionary

torch.set_num_threads(1)
RECIPE = """
[model]
name = "{model}"
dtype = "float32"
device = "cpu"
[data]
tokens = "{tokens}"
context = 16
block_tokens = 1024
prepend_bos = false
[dictionary]
n_latents = 64
k = 4
[plan]
preset = "hub"
root_tokens = "8k"
transfer_tokens = "4k"
moment_tokens = "2k"
refit_tokens = "1k"
controls = [0]
[train]
batch_tokens = 64
checkpoint_every = "2k"
[evaluate]
tokens = "1k"
"""


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A tiny model, tokens, a recipe and a finished run."""
    root = tmp_path_factory.mktemp("cli")
    shutil.copytree(tiny_model, root / "model")
    rng = np.random.default_rng(0)
    steps = rng.integers(1, 4, size=60_000).cumsum() % 100 + 1
    np.save(root / "tokens.npy", steps.astype(np.uint16))
    (root / "run.toml").write_text(RECIPE.format(model=root / "model", tokens=root / "tokens.npy"))
    sr.train_run(sr.Recipe.from_toml(root / "run.toml"), root / "run")
    return root


def changed(place: Path, tmp_path: Path, old: str = "", new: str = "") -> Path:
    """The recipe with a line changed (or `new` added in front)."""
    text = (place / "run.toml").read_text()
    assert old in text
    (tmp_path / "run.toml").write_text(text.replace(old, new) if old else new + text)
    return tmp_path / "run.toml"


def call(
    *arguments: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the program in this process."""
    monkeypatch.setattr(sys, "argv", ["saerelay", *map(str, arguments)])
    try:
        main()
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 0
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def refused(place: Path, out: Path, recipe: Path, match: str, **fixtures: Any) -> None:
    """Exit code 2, one message with these words, no traceback, nothing written."""
    code, stdout, stderr = call("train", recipe, "--out", out, **fixtures)
    assert code == 2 and re.search(match, stderr), stderr
    assert "Traceback" not in stderr and stdout == "" and not out.exists()


CASES = {
    "unknown key": ("k = 4", "kay = 4", r'unknown key "dictionary.kay"; did you mean "k"\?'),
    "unknown section": ("[evaluate]", "[evalute]", r'unknown key "evalute"; did you mean "evaluate"'),
    "wrong type": ('root_tokens = "8k"', 'root_tokens = "eight"', r'"eight" is not a valid count'),
    "layer out of range": ("[data]", "[sites]\nlayers = [0, 3]\n[data]", r"layer 3 is out of range: .* has layers 0 to 2"),
    "unknown module": ("[data]", '[sites]\nmodule = "mlp"\n[data]', r"sites.module: must be 'resid_post'"),
    "k too large": ("k = 4", "k = 65", r"dictionary.k is 65 but there are only 64 latents"),
    "model missing": ("/model", "/modle", r"modle: no such directory"),
    "context too long": ("context = 16", "context = 128", r"takes at most 64 tokens"),
    "tokens missing": ("tokens.npy", "token.npy", r"token.npy"),
    "too few tokens": ('root_tokens = "8k"', 'root_tokens = "80k"', r"needs [\d,]+ training tokens and the corpus has [\d,]+.*epochs"),
    "parent missing": ("controls = [0]", '[[plan.legs]]\nid = "a"\nlayer = 1\nparent = "b"\ntokens = 64', r'names "b", which is not a leg'),
    "parent directory missing": (
        "controls = [0]", '[[plan.legs]]\nid = "a"\nlayer = 1\nparent = "no/where"\ntokens = 64', r"no/where: no such file or directory"
    ),
    "logger not installed": ("[train]", '[train]\nloggers = ["wandb"]', r"names wandb, which is not installed; install it with pip"),
    "wrong budget": ("controls = [0]", 'budget = "soon"', r'plan.budget: "soon" is not a valid budget; write "10M tokens"'),
    "two aims": ("controls = [0]", 'budget = "1 hours"\nfvu_ratio = 1.1', r"budget and fvu_ratio are given; keep one"),
    "aim without auto": ("controls = [0]", "fvu_ratio = 1.1", r'belong to preset = "auto"'),
    "auto from nowhere": ("controls = [0]", "roots = [7]", r"plan.roots names layer 7|layer 7 is out of range"),
    "ragged block": ("block_tokens = 1024", "block_tokens = 1000", r"must be a multiple of train.batch_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_recipes_are_refused(place: Path, tmp_path: Path, case: str, capsys, monkeypatch) -> None:
    old, new, match = CASES[case]
    refused(place, tmp_path / "out", changed(place, tmp_path, old, new), match, capsys=capsys, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("dtype", "top", "match"),
    [(np.int64, 100, "int64.*uint16"), (np.uint16, 101, "101.*vocabulary"), (np.float32, 5, "float32.*uint16")],
)
def test_bad_tokens_are_refused(place: Path, tmp_path: Path, dtype, top: int, match: str, capsys, monkeypatch) -> None:
    np.save(tmp_path / "bad.npy", np.full(40_000, top, dtype=dtype))
    recipe = changed(place, tmp_path, str(place / "tokens.npy"), str(tmp_path / "bad.npy"))
    refused(place, tmp_path / "out", recipe, f"(?s){match}", capsys=capsys, monkeypatch=monkeypatch)


def test_not_enough_disk_is_refused(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    refused(place, tmp_path / "out", place / "run.toml", "GiB are free", capsys=capsys, monkeypatch=monkeypatch)


def test_a_taken_directory_is_never_overwritten(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    before = sorted(p.stat().st_mtime_ns for p in (place / "run").rglob("*.safetensors"))
    code, _, stderr = call("train", place / "run.toml", "--out", place / "run", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2 and "already holds a run; continue it with --resume" in stderr
    assert sorted(p.stat().st_mtime_ns for p in (place / "run").rglob("*.safetensors")) == before
    (tmp_path / "thesis.txt").write_text("precious")
    code, _, stderr = call("train", place / "run.toml", "--out", tmp_path, capsys=capsys, monkeypatch=monkeypatch)
    assert (
        code == 2 and "is not empty and holds no run" in stderr and (tmp_path / "thesis.txt").read_text() == "precious"
    )


def test_resume_with_another_recipe_says_what_changed(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    recipe = changed(place, tmp_path, "k = 4", "k = 5")
    code, _, stderr = call("train", recipe, "--out", place / "run", "--resume", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2 and "dictionary.k: 4 in the run, 5 in the recipe" in stderr


def test_a_second_process_on_the_same_run_is_refused(place: Path, capsys, monkeypatch) -> None:
    import filelock

    with filelock.FileLock(place / "run/state/lock"):
        arguments = ("train", place / "run.toml", "--out", place / "run", "--resume")
        code, _, stderr = call(*arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2 and "another process is training this run" in stderr


def test_eval_matrix_prints_every_sae_on_every_layer(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    code, stdout, _ = call("matrix", tmp_path / "run", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0 and "FVU of each SAE on the activations of each layer: plain copy (zero-shot)" in stdout
    assert re.search(r"^L0-from-L1 +\d\.\d{3} +\d+\.\d{3} +\d+\.\d{3}$", stdout, re.MULTILINE)
    options = ("--json", "--methods", "identity, rescale")
    code, stdout, _ = call("matrix", tmp_path / "run", *options, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0 and len(json.loads(stdout)["cells"]) == 9 + 6
    old = call("eval", tmp_path / "run", "--matrix", *options, capsys=capsys, monkeypatch=monkeypatch)
    assert old == (0, stdout, ""), "the old spelling does the same"
    code, stdout, stderr = call("matrix", tmp_path / "run", "--methods", "x", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2 and stdout == "" and 'unknown method "x"; expected one of: identity, rescale' in stderr


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("matrix", "--methods", ","), "no method is given; choose some of: identity"),
        (("judge", "--layers", ","), "expected numbers separated by commas"),
        (("circuits", "--task", "self", "--k", ","), "expected numbers separated by commas"),
    ],
    ids=["matrix", "judge", "circuits"],
)
def test_lists_of_nothing_are_refused(place: Path, arguments: tuple[str, ...], match: str, capsys, monkeypatch) -> None:
    command, *options = arguments
    code, _, stderr = call(command, place / "run", *options, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2 and match in " ".join(stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--matrix", "--measures"), "run saerelay matrix RUN, then saerelay measures RUN"),
        (("--methods", "affine"), "--methods: this is an option of saerelay matrix RUN"),
        (("--measures", "--snapshots"), "--snapshots: this is an option of saerelay matrix RUN"),
        (("--matrix", "--prompts", "x.jsonl"), "--prompts: this is an option of saerelay measures RUN"),
    ],
    ids=["both", "methods", "snapshots", "prompts"],
)
def test_eval_ignores_none_of_its_old_options(
    place: Path, options: tuple[str, ...], told: str, capsys, monkeypatch
) -> None:
    code, stdout, stderr = call("eval", place / "run", *options, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2 and stdout == "" and told in " ".join(stderr.replace("│", " ").split())


def test_old_spellings_still_work(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    run = shutil.copytree(place / "run", tmp_path / "run")
    fixtures: dict[str, Any] = {"capsys": capsys, "monkeypatch": monkeypatch}
    assert call("eval", run, "--measures", **fixtures) == call("measures", run, **fixtures)
    prompts = tmp_path / "prompts.jsonl"
    line = json.dumps({"prompt": [5], "right": 6, "wrong": 7})
    prompts.write_text("\n".join([line] * 9))
    new = ("circuits", run, "--task", prompts, "--k", "4")
    code, _, stderr = call(*new, "--prompts", 3, **fixtures)
    assert code == 2 and "3 prompts are too few" in stderr and stderr == call(*new, "--n-prompts", 3, **fixtures)[2]
    ask = ("interpret", run, "--endpoint", "http://localhost:1/v1", "--dry-run", "--json", "--n", 2)
    one = call(*ask, "--model", "m", "--legs", "L1,0", **fixtures)
    assert one[0] == 0 and one == call(*ask, "--explainer", "m", "--leg", "L1", "--leg", "0", **fixtures)
    assert call(*ask, **fixtures)[0] == 2, "somebody must be asked"


def test_show_prints_a_latent(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    code, stdout, stderr = call("show", tmp_path / "run", "0", "3", "--json", capsys=capsys, monkeypatch=monkeypatch)
    document = json.loads(stdout)
    assert code == 0 and (document["leg"], document["latent"]) == ("L0-from-L1", 3)
    assert [step["leg"] for step in document["lineage"]] == ["L0-from-L1", "L1", "L2-from-L1"]
    monkeypatch.setattr("saerelay.analysis.session.load_model", None)  # the second time, no model is loaded
    code, stdout, _ = call("show", tmp_path / "run", "L0-from-L1", "3", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0 and "L0-from-L1, latent 3 (layer 0 of" in stdout
    cosine = f"{document['lineage'][1]['decoder_cosine']:z.3f}"
    assert re.search(rf"^ +1 +L1 +3 +{cosine} ", stdout, re.MULTILINE)
    for arguments, message in (
        (("L9", "0"), 'no leg "L9"; the published legs are: L1, L0-from-L1,'),
        (("9", "0"), "no dictionary at L9; the run has dictionaries at: L0, L1, L2"),
        (("L1", "64"), "L1 has no latent 64; its latents are 0 to 63"),
    ):
        code, stdout, stderr = call("show", tmp_path / "run", *arguments, capsys=capsys, monkeypatch=monkeypatch)
        assert code == 2 and stdout == "" and message in stderr and len(stderr.splitlines()) == 1


def test_eval_prints_one_document_and_a_table(place: Path, capsys, monkeypatch) -> None:
    code, stdout, _ = call("eval", place / "run", "--json", capsys=capsys, monkeypatch=monkeypatch)
    document = json.loads(stdout)
    assert code == 0 and document["schema"] == 4
    roles = {
        leg["id"]: (leg["role"], leg["control_of"], leg["control_kind"], leg["parent"]) for leg in document["legs"]
    }
    assert roles == {
        "L1": ("root", None, None, None),
        "L0-from-L1": ("transfer", None, None, "L1"),
        "L2-from-L1": ("transfer", None, None, "L1"),
        "L0-scratch-equal": ("control", "L0-from-L1", "equal_tokens", None),
        "L0-scratch-full": ("control", "L0-from-L1", "full", None),
    }
    wanted = "layer module architecture method tokens l0 fvu explained_variance delta_ce ce_loss_score kl_div_score frac_alive"
    assert all(set(wanted.split()) <= set(leg) for leg in document["legs"])
    cost = "lm_tokens lm_tokens_unique sae_samples flops lm_flops flops_dense_equivalent seconds"
    assert all(document["cost"][name] > 0 for name in cost.split())
    code, stdout, _ = call("eval", place / "run", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0 and "control: from scratch, equal tokens" in stdout
    assert re.search(r"(identity|rescale|procrustes|affine) \+ refit from L1|no map from L1 helped", stdout), stdout


def test_a_plan_of_roots_alone_is_not_compared_with_itself(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    fixtures = {"capsys": capsys, "monkeypatch": monkeypatch}
    assert "cost, compared with training" in call("plan", place / "run.toml", **fixtures)[1]
    scratch = changed(place, tmp_path, 'preset = "hub"', 'preset = "scratch"')
    scratch.write_text(scratch.read_text().replace("controls = [0]\n", ""))
    code, stdout, _ = call("plan", scratch, **fixtures)
    assert code == 0 and "SAEs train on" in stdout and "compared with training" not in stdout


def test_an_extended_run_from_scratch_is_not_compared_with_itself(
    place: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """The leg that continues another one has a parent, but is no transfer."""
    recipe = sr.Recipe.from_toml(changed(place, tmp_path, "controls = [0]", "controls = []"))
    scratch = recipe.plan.changed(preset="scratch", root_tokens=2048)
    recipe = recipe.changed(sites=recipe.sites.changed(layers=[1]), plan=scratch)
    sr.train_run(recipe, tmp_path / "r")
    longer = recipe.changed(plan=scratch.changed(root_tokens=4096))
    assert [leg.parent for leg in sr.train_run(longer, tmp_path / "r", extend=True).final_legs] == ["L1"]
    code, stdout, _ = call("eval", tmp_path / "r", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0 and "continued" in stdout and "compared with training" not in stdout


def test_plan_trains_nothing(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, stdout, _ = call("plan", place / "run.toml", capsys=capsys, monkeypatch=monkeypatch)
    shown = " ".join(stdout.split())
    assert (
        code == 0
        and "L0-from-L1" in shown
        and "language model reads" in shown
        and "not measured; --timing" in shown
        and "the suite takes" in shown
    )
    assert not list(tmp_path.iterdir())
    code, stdout, _ = call("plan", place / "run.toml", "--timing", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0 and "extrapolated from a few steps" in stdout
    code, stdout, _ = call("plan", place / "run.toml", "--json", capsys=capsys, monkeypatch=monkeypatch)
    assert len(json.loads(stdout)["plan"]["legs"]) == 5


def test_python_reads_a_run(place: Path) -> None:
    suite = sr.load(place / "run")
    sae = suite[sr.Site(0)]
    x = torch.randn(7, 32)
    z = sae.encode(x)
    assert z.shape == (7, 64) and sae.decode(z).shape == (7, 32) and int((z > 0).sum(dim=1).max()) <= 4
    assert torch.equal(suite["L0-from-L1"].W_enc, sae.W_enc)
    with pytest.raises(sr.SaeRelayError, match="no dictionary at L9; the run has dictionaries at: L0, L1, L2"):
        suite[sr.Site(9)]
    with pytest.raises(sr.SaeRelayError, match='no leg "L7"'):
        suite["L7"]
    with pytest.raises(sr.SaeRelayError, match="no run here"):
        sr.load(place / "nowhere")
    with pytest.raises(sr.SaeRelayError, match="an SAE, not a run; load_dictionary reads it"):
        sr.load(place / "run/legs/L1")


def test_analyses_take_counts_as_recipes_do(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = sr.load(place / "run")
    monkeypatch.setattr(saerelay.analysis.suite, "evaluate", lambda session, tokens: tokens)
    assert suite.evaluate(tokens="1.5k") == 1500 and suite.evaluate(tokens=7) == 7
    for count in ("many", "1.5", -1, 0.5):
        with pytest.raises(sr.SaeRelayError, match="tokens: "):
            suite.evaluate(tokens=count)  # type: ignore[arg-type]


@pytest.mark.slow
def test_several_legs_at_a_site_are_listed(place: Path, tmp_path: Path) -> None:
    run = sr.Recipe.from_toml(changed(place, tmp_path, 'preset = "hub"', 'preset = "paper"'))
    run = run.changed(plan=run.plan.changed(controls=[]))
    suite = sr.train_run(run, tmp_path / "paper")
    with pytest.raises(sr.SaeRelayError, match="3 legs at L1: L1, L1-from-L0, L1-from-L2; name one by its id"):
        suite[sr.Site(1)]
    assert suite["L1-from-L2"].n_latents == 64
    assert len(list((tmp_path / "paper/legs/L1/snapshots").iterdir())) == 9


@pytest.mark.parametrize("tokens", ["2k", "0"])
def test_hop_carries_one_dictionary_to_another_layer(
    place: Path, tmp_path: Path, tokens: str, capsys, monkeypatch
) -> None:
    source = place / "run/legs/L1"
    arguments = ["hop", "--from", source, "--to-layer", 2, "--recipe", place / "run.toml", "--out", tmp_path / "x"]
    code, stdout, stderr = call(*arguments, "--tokens", tokens, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0 and "L2-from-L1" in stdout, stderr
    hopped, info = read_dictionary(tmp_path / "x/legs/L2-from-L1")
    assert hopped.n_latents == 64 and info.tokens == (2048 if tokens == "2k" else 0)
    code, stdout, _ = call("eval", tmp_path / "x", "--json", capsys=capsys, monkeypatch=monkeypatch)
    assert json.loads(stdout)["legs"][0]["fvu"] < 1
    for wrong, match in (
        (place / "run", "holds 5 SAEs; give one of them: legs/L0-from-L1"),
        (place / "nowhere", "no such file or directory"),
    ):
        arguments[2], arguments[-1] = wrong, tmp_path / "y"
        code, _, stderr = call(*arguments, capsys=capsys, monkeypatch=monkeypatch)
        assert code == 2 and match in stderr and not (tmp_path / "y").exists()


def test_a_finished_run_can_be_extended(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    small = changed(place, tmp_path, "controls = [0]", "controls = []")
    assert call("train", small, "--out", tmp_path / "r", capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    before = sr.load(tmp_path / "r")["L0-from-L1"]
    code, _, stderr = call("train", small, "--out", tmp_path / "r", "--extend", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2 and "adds nothing" in stderr
    text = small.read_text().replace('transfer_tokens = "4k"', 'transfer_tokens = "6k"')
    small.write_text(text)
    code, _, stderr = call("train", small, "--out", tmp_path / "r", "--extend", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0, stderr
    suite = sr.load(tmp_path / "r")
    assert suite.leg_at(sr.Site(0)).id == "L0-from-L1+6.02k" and suite.leg_at(sr.Site(0)).parent == "L0-from-L1"
    assert torch.equal(suite["L0-from-L1"].W_enc, before.W_enc)
    assert not torch.equal(suite[sr.Site(0)].W_enc, before.W_enc)


def test_an_extension_that_cannot_be_leaves_the_run_as_it_was(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    small = changed(place, tmp_path, "controls = [0]", "controls = []")
    sr.train_run(sr.Recipe.from_toml(small), tmp_path / "r")
    files = sorted(p for p in (tmp_path / "r").rglob("*") if p.is_file())
    for old, new, match in (
        ('transfer_tokens = "4k"', 'transfer_tokens = "400k"', "training tokens and the corpus has"),
        ("context = 16", "context = 32", "data.context: 16 in the run, 32 in the recipe"),
    ):
        text = small.read_text()
        (tmp_path / "more.toml").write_text(text.replace(old, new))
        arguments = ("train", tmp_path / "more.toml", "--out", tmp_path / "r", "--extend")
        code, _, stderr = call(*arguments, capsys=capsys, monkeypatch=monkeypatch)
        assert code == 2 and match in stderr
        assert sorted(p for p in (tmp_path / "r").rglob("*") if p.is_file()) == files


def test_a_hop_of_another_width_is_refused_before_anything_is_written(
    place: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    from saerelay.runs.dictionaries import publish

    narrow = sr.Dictionary(
        architecture="relu", W_enc=torch.eye(8), b_enc=torch.zeros(8), W_dec=torch.eye(8), b_dec=torch.zeros(8)
    )
    publish(tmp_path / "narrow", narrow, {"layer": 1, "module": "resid_post"})
    arguments = [
        "hop",
        "--from",
        tmp_path / "narrow",
        "--to-layer",
        2,
        "--recipe",
        place / "run.toml",
        "--out",
        tmp_path / "x",
    ]
    code, _, stderr = call(*arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2 and "of width 8, but those of L1 have width 32" in stderr and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_what_a_killed_start_leaves_does_not_leak_into_the_next(place: Path, tmp_path: Path) -> None:
    """Tokens of another recipe, left by a process that was killed before plan.json, are not used."""
    other = changed(place, tmp_path, "context = 16", "context = 32")
    sr.train_run(sr.Recipe.from_toml(other), tmp_path / "r")
    for name in ("plan.json", "run.toml", "metrics.jsonl", "cost.json"):
        (tmp_path / "r" / name).unlink()
    shutil.rmtree(tmp_path / "r/legs")
    (tmp_path / "r/state/state.json").unlink()
    suite = sr.train_run(sr.Recipe.from_toml(place / "run.toml"), tmp_path / "r", resume=True)
    assert torch.equal(suite["L1"].W_enc, sr.load(place / "run")["L1"].W_enc)


def test_an_explicit_plan_can_be_resumed_from_its_own_recipe(place: Path, tmp_path: Path) -> None:
    legs = '[[plan.legs]]\nid = "a"\nlayer = 1\ntokens = "2k"\nlr = 1.2345678e-4\n[[plan.legs]]\nid = "b"\nlayer = 0\nparent = "a"\ntokens = 640\n[train]'
    recipe = changed(place, tmp_path, "controls = [0]", "")
    recipe.write_text(recipe.read_text().replace("[train]", legs))
    sr.train_run(sr.Recipe.from_toml(recipe), tmp_path / "r")
    again = sr.Recipe.from_toml(tmp_path / "r/run.toml")
    assert again == sr.Recipe.from_toml(recipe)
    sr.train_run(again, tmp_path / "r", resume=True)


@pytest.mark.slow
def test_epochs_are_only_used_when_the_corpus_is_short(place: Path, tmp_path: Path) -> None:
    recipe = changed(place, tmp_path, "context = 16", "context = 16\nepochs = 3")
    suite = sr.train_run(sr.Recipe.from_toml(recipe), tmp_path / "r")
    assert np.load(tmp_path / "r/tokens/train.npy").size >= suite.plan.n_tokens
    assert torch.equal(suite["L1"].W_enc, sr.load(place / "run")["L1"].W_enc)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu", "gated", "relu"])
@pytest.mark.parametrize("module", ["attn_z", "mlp_out"])
def test_other_modules_and_architectures_go_the_whole_way(
    place: Path, tmp_path: Path, architecture: str, module: str, capsys, monkeypatch
) -> None:
    new = f'architecture = "{architecture}"\ntarget_l0 = 4\nl1 = 0.3\nk = 4'
    recipe = changed(place, tmp_path, "k = 4", new)
    recipe.write_text(recipe.read_text().replace("[data]", f'[sites]\nmodule = "{module}"\n[data]'))
    assert call("train", recipe, "--out", tmp_path / "r", capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    code, stdout, stderr = call("eval", tmp_path / "r", "--json", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0, stderr
    legs = json.loads(stdout)["legs"]
    assert {leg["module"] for leg in legs} == {module} and all(leg["fvu"] < 1.05 for leg in legs)
    assert sr.load(tmp_path / "r")[sr.Site(1, module)].architecture == architecture  # type: ignore[arg-type]
    if architecture == "batchtopk":
        assert all(leg["l0"] == pytest.approx(4, rel=0.35) for leg in legs)


@pytest.mark.slow
def test_an_encoder_goes_the_whole_way_without_ce(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    recipe = changed(place, tmp_path, str(place / "model"), str(tmp_path / "bert"))
    assert call("train", recipe, "--out", tmp_path / "r", capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    code, stdout, _ = call("eval", tmp_path / "r", "--json", capsys=capsys, monkeypatch=monkeypatch)
    legs = json.loads(stdout)["legs"]
    assert code == 0 and all(leg["delta_ce"] is None and 0 < leg["fvu"] < 1.05 for leg in legs)
    assert call("eval", tmp_path / "r", capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    recipe.write_text(recipe.read_text() + "ce = true\n")
    refused(place, tmp_path / "x", recipe, "has no language-model head", capsys=capsys, monkeypatch=monkeypatch)


def start(recipe: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "saerelay", "train", str(recipe), "--out", str(out), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_from_outside_and_resumed_gives_the_same_bits(place: Path, tmp_path: Path, how: signal.Signals) -> None:
    """SIGKILL at an arbitrary instant after the first saved state, and Ctrl-C, both finish to the same weights."""
    recipe = changed(place, tmp_path, 'root_tokens = "8k"', 'root_tokens = "30k"')
    whole = sr.train_run(sr.Recipe.from_toml(recipe), tmp_path / "whole")
    process = start(recipe, tmp_path / "killed")
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed/state/state.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130), stderr
    if how == signal.SIGINT:
        assert f"--out {tmp_path}/killed --resume" in stderr and "Traceback" not in stderr
    process = start(recipe, tmp_path / "killed", "--resume")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    resumed = sr.load(tmp_path / "killed")
    assert list(resumed) == list(whole)
    for leg in whole:
        for name, tensor in whole[leg].tensors().items():
            assert torch.equal(tensor, resumed[leg].tensors()[name]), (leg, name)


@pytest.mark.slow
def test_resume_without_state_starts_over(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    for name, option in (("new", []), ("resumed", ["--resume"])):
        (tmp_path / name / "state").mkdir(parents=True)
        arguments = ("train", place / "run.toml", "--out", tmp_path / name, *option)
        assert call(*arguments, capsys=capsys, monkeypatch=monkeypatch)[0] == 0
        assert torch.equal(sr.load(tmp_path / name)["L1"].W_enc, sr.load(place / "run")["L1"].W_enc)


AUTO = 'preset = "auto"\nbudget = "60k tokens"\nsurvey_tokens = "4k"'


@pytest.mark.slow
def test_auto_surveys_shows_writes_and_trains(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    fixtures: dict[str, Any] = {"capsys": capsys, "monkeypatch": monkeypatch}
    recipe, planned = changed(place, tmp_path, 'preset = "hub"', AUTO), tmp_path / "planned.toml"
    code, shown, stderr = call("plan", recipe, "--write", planned, **fixtures)
    assert code == 0 and all(len(line) <= 120 for line in shown.splitlines()), stderr
    for part in (
        "survey",
        "pilot FVU",
        "predicted",
        "extrapolated from the survey's pilots)",
        "Basis: pilots of",
        "The survey took",
        "ratio",
        "Lower bound",
    ):
        assert part.lower() in " ".join(shown.split()).lower(), part
    assert "controls included" not in shown and "over 3 legs" in shown, "a budget is for the suite without its controls"
    samples = re.findall(r"SAEs train on +(\S+) activations|SAE samples +(\S+) ", shown)
    assert samples[0][0] == samples[1][1], "both are those of the legs as predicted"
    explicit = sr.Recipe.from_toml(planned)
    assert {leg.layer for leg in explicit.plan.legs} == {0, 1, 2} and not explicit.plan.surveyed
    code, _, stderr = call("plan", recipe, "--write", planned, **fixtures)
    assert code == 2 and "exists; choose another file" in " ".join(stderr.replace("│", " ").split())
    document = json.loads(call("plan", recipe, "--json", "--ranks", 2, **fixtures)[1])
    assert (
        len(document["ranks"]["ranks"]) == 2
        and len(document["survey"]["layers"]) == 3
        and document["cost"]["sae_samples"] <= 60_000
    )
    assert call("train", recipe, "--out", tmp_path / "run", **fixtures)[0] == 0
    survey = (tmp_path / "run/survey.json").read_text()
    assert not (tmp_path / "run/survey").exists() and json.loads(survey)["asked"]["plan"]["preset"] == "auto"
    code, _, stderr = call("train", recipe, "--out", tmp_path / "run", "--extend", **fixtures)
    assert code == 2 and f"{tmp_path}/run/planned.toml, where the legs of this run are written out" in stderr
    code, table, _ = call("eval", tmp_path / "run", **fixtures)
    assert code == 0 and "predicted" in table and "validation" in table
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    for leg in summary["legs"]:
        known = leg["role"] != "control"
        assert (leg["predicted_fvu"] is not None) == known and leg["validation_fvu"] > 0
    assert summary["cost"]["survey"]["sae_samples"] + summary["cost"]["sae_samples"] <= 60_000
    assert call("train", planned, "--out", tmp_path / "again", **fixtures)[0] == 0
    assert call("plan", place / "run.toml", "--write", planned.with_name("x"), **fixtures)[0] == 2


@pytest.mark.slow
def test_a_survey_is_resumed_and_a_finished_one_not_made_again(
    place: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    recipe, out = changed(place, tmp_path, 'preset = "hub"', AUTO), tmp_path / "killed"
    whole = sr.train_run(sr.Recipe.from_toml(recipe), tmp_path / "whole")
    process = start(recipe, out)
    deadline = time.monotonic() + 60
    while not (out / "survey/state/state.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and f"--out {out} --resume" in stderr, stderr
    recipe.write_text(recipe.read_text().replace("60k tokens", "5k tokens"))
    code, _, stderr = call("train", recipe, "--out", out, "--resume", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2 and "of which the survey takes" in stderr and (out / "survey.json").is_file()
    recipe.write_text(recipe.read_text().replace("5k tokens", "60k tokens"))
    monkeypatch.setattr("saerelay.workflows.survey.measure_survey", None)
    assert call("train", recipe, "--out", out, "--resume", capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    for leg in whole:
        for name, tensor in whole[leg].tensors().items():
            assert torch.equal(tensor, sr.load(out)[leg].tensors()[name]), (leg, name)


def test_a_survey_is_not_taken_for_that_of_another_recipe(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    fixtures: dict[str, Any] = {"capsys": capsys, "monkeypatch": monkeypatch}
    recipe, out = changed(place, tmp_path, 'preset = "hub"', AUTO.replace("60k", "5k")), tmp_path / "out"
    code, _, stderr = call("train", recipe, "--out", out, **fixtures)
    assert code == 2 and "of which the survey takes" in stderr
    survey = (out / "survey.json").read_text()
    code, _, stderr = call("train", place / "run.toml", "--out", out, **fixtures)
    assert code == 2 and f'{out} holds the survey of a recipe with preset = "auto"' in stderr
    assert (out / "survey.json").read_text() == survey and not (out / "plan.json").exists()


@pytest.mark.slow
def test_a_survey_interrupted_while_it_measures_says_how_to_go_on(
    place: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    recipe, out = changed(place, tmp_path, 'preset = "hub"', AUTO), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("saerelay.workflows.survey.measure_survey", interrupted)
        code, _, stderr = call("train", recipe, "--out", out, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 130 and f"--out {out} --resume" in stderr
    again = call("train", out / "survey/run.toml", "--out", out, "--resume", capsys=capsys, monkeypatch=monkeypatch)
    assert again[0] == 0 and len(sr.load(out)) > 0


def test_commands_and_options_are_these() -> None:
    """The recipe is the interface; a new option needs a reason."""
    from typer.main import get_command

    commands = get_command(app).commands  # type: ignore[attr-defined]
    options = {name: options_of(command, hidden=False) for name, command in commands.items()}
    assert options == {
        "init": set(),
        "plan": {"--json", "--timing", "--write", "--ranks", "--seeds"},
        "train": {"--out", "--resume", "--extend", "--seeds"},
        "eval": {"--json", "--tokens"},
        "matrix": {"--json", "--tokens", "--methods", "--snapshots"},
        "measures": {"--json", "--tokens", "--prompts"},
        "circuits": {"--task", "--k", "--leg", "--n-prompts", "--method", "--seed", "--json"},
        "show": {"--json"},
        "hop": {"--from", "--to-layer", "--recipe", "--out", "--tokens", "--method", "--refit", "--architecture"}
        | {"--n-latents", "--k", "--skip-connection", "--from-model", "--from-layer", "--from-module", "--format"},
        "interpret": {"--explainer", "--endpoint", "--key-env", "--body", "--leg", "--n", "--latents", "--seed"}
        | {"--concurrency", "--dry-run", "--price-in", "--price-out", "--max-cost", "--yes", "--json"},
        "import": {"--out", "--format", "--layer", "--module", "--model"},
        "export": {"--format", "--out", "--leg", "--licence", "--repo"},
        "push": {"--format", "--leg", "--licence", "--private", "--dry-run"},
        "pull": {"--out"},
        "report": {"--quick", "--open"},
        "judge": {"--layers", "--n", "--seed", "--out", "--json"},
        "score": {"--json"},
        "demo": {"--out"},
    }
    old = {name: options_of(command, hidden=True) for name, command in commands.items()}
    assert {name: options for name, options in old.items() if options} == {
        "eval": {"--matrix", "--methods", "--snapshots", "--measures", "--prompts"},
        "circuits": {"--prompts"},
        "interpret": {"--model", "--legs"},
        "judge": {"--score"},
    }


def options_of(command: Any, *, hidden: bool) -> set[str]:
    """The options of a command that its help shows, or those that it hides."""
    params = [param for param in command.params if getattr(param, "hidden", False) == hidden]
    return {option for param in params for option in param.opts if option.startswith("--")}


def test_help_and_init() -> None:
    runner = CliRunner()
    assert "relay it to the others" in " ".join(runner.invoke(app, ["--help"]).output.replace("│", "").split())
    assert runner.invoke(app, ["--version"]).output.strip() == sr.__version__
    assert "[dictionary]" in runner.invoke(app, ["init"]).output


def test_every_command_explains_itself() -> None:
    from typer.main import get_command

    runner = CliRunner()
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        result = runner.invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert result.exit_code == 0, f"{name}: {result.exception}"
        summary = (command.help or "").split("\n\n")[0]
        shown = " ".join(result.output.split())
        assert " ".join(summary.split()) in shown
        for option in options_of(command, hidden=False):
            assert option in shown


def test_ctrl_c_says_so_without_a_traceback(place: Path, capsys, monkeypatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("saerelay.workflows.report.report_run", interrupted)
    assert call("report", place / "run", capsys=capsys, monkeypatch=monkeypatch) == (130, "", "stopped.\n")


@pytest.mark.slow
def test_report_needs_a_run_and_nothing_else(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    run = shutil.copytree(place / "run", tmp_path / "run")
    code, shown, stderr = call("report", run, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0 and re.fullmatch(rf"{re.escape(str(run))}/report/index.html \([\d.]+ MB\)\n", shown), stderr
    page = (run / "report/index.html").read_text(encoding="utf-8")
    assert "What was saved?" in page and (run / "lineage.json").is_file()
    (run / "report/.saerelay-report").unlink()
    code, shown, stderr = call("report", run, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2 and "holds something that is not a report" in stderr and shown == ""
    code, _, stderr = call("report", tmp_path, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2 and "no run here" in stderr


def test_judge_makes_a_page_and_keeps_its_key(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    run = shutil.copytree(place / "run", tmp_path / "run")
    options = ("--layers", "1,0", "--n", "3", "--seed", "5", "--out", tmp_path / "page.html")
    code, shown, stderr = call("judge", run, *options, "--json", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0, stderr
    key = json.loads(shown)
    assert key.pop("path") == str(tmp_path / "page.html")
    assert json.loads((run / "judging" / f"{key['page']}.json").read_text()) == key
    assert (key["seed"], key["n"]) == (5, 3) and {item["layer"] for item in key["items"]} == {0, 1}
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    code, shown, _ = call("judge", run, *options, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0 and "it needs nothing else" in shown
    assert "forward      0 (there is no such leg)" in shown and "backward     3 latents of L0-from-L1" in shown
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    for wrong, says in (
        (("--layers", "first"), '--layers: "first": expected numbers separated by commas'),
        (("--layers", "99"), "no dictionary at layer 99"),
        (("ada.json",), "saerelay score RUN FILE..."),
        (("--score",), "give the files that the judges exported"),
        (("missing.json", "--score"), "missing.json: cannot be read"),
        (("missing.json", "--score", "--layers", "1"), "--layers, --n, --seed and --out are for making a page"),
    ):
        code, shown, stderr = call("judge", run, *wrong, capsys=capsys, monkeypatch=monkeypatch)
        said = " ".join(stderr.replace("│", " ").split())
        assert code == 2 and says in said and "Traceback" not in stderr and shown == ""


def test_a_warning_is_a_note_without_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    cli._show_warnings_as_notes()
    warnings.showwarning("layers\x1b[1m are missing", UserWarning, str(Path(cli.__file__).with_name("sharing.py")), 1)
    warnings.showwarning("of another package", UserWarning, "/elsewhere/module.py", 1)
    error = capsys.readouterr().err
    assert (
        error.startswith("note: layers") and "are missing" in error and "\x1b" not in error and "sharing" not in error
    )
    assert shown == ["of another package"]
