"""SAEs out and in: exports with a card, a fake of the hub's API spoken to by the program itself, hostile names."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fake_hub import COMMIT, TOKEN, Hub
from huggingface_hub import ModelCard
from test_plan import compiled

from saerelay import cli
from saerelay.errors import FormatError, HubError, RunDirectoryError
from saerelay.files import read_json, write_text
from saerelay.interop import hub, load_dictionary, own, write_dictionary
from saerelay.interop.origin import Origin
from saerelay.planning.facts import ModelFacts
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import Recipe
from saerelay.runs.dictionaries import publish
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.quality import Density, Evaluation, EvaluationMetrics, EvaluationQuestion
from saerelay.sae.dictionary import Dictionary
from saerelay.site import Site
from saerelay.spec import format_count
from saerelay.workflows import model_card, share
from saerelay.workflows.settle import describe_external, plan_run

torch.set_num_threads(1)
METRICS = EvaluationMetrics(
    n_tokens=131_072, l0=3.75, fvu=0.125, explained_variance=0.875, delta_ce=0.0321, delta_ce_se=0.0012,
    ce_loss_score=0.9876, frac_alive=0.96, sequence_delta_ce=[0.1],
    density=Density(log10_edges=[], counts=[0, 1], never=0, freq_over_1_percent=0.0, freq_over_10_percent=0.0),
)  # fmt: skip


def random_sae(seed: int) -> Dictionary:
    """Of the tiny model's width."""
    rng = torch.Generator().manual_seed(seed)
    W_enc, W_dec = (torch.randn(64, 32, generator=rng) for _ in range(2))
    b_enc, b_dec = torch.randn(64, generator=rng), torch.randn(32, generator=rng)
    return Dictionary(architecture="topk", k=4, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run of three layers and a control, with random SAEs, of which only the root was evaluated."""
    root = tmp_path_factory.mktemp("share")
    np.save(root / "tokens.npy", np.arange(60_000, dtype=np.uint16) % 100)
    sections: dict[str, Any] = {"model": {"name": str(tiny_model), "device": "cpu"}, "plan": {"controls": [0]}}
    sections |= {"data": {"tokens": str(root / "tokens.npy"), "context": 16, "prepend_bos": False}}
    sections |= {"dictionary": {"n_latents": 64, "k": 4}}
    plan, paths = plan_run(Recipe.parse(sections, source="test")), RunDirectory(root / "run")
    write_text(paths.plan, plan.to_json())
    for seed, leg in enumerate(plan.legs):
        info = {"layer": leg.layer, "module": leg.module, "model": str(tiny_model), "tokens": leg.budget_tokens}
        info |= {"l0": 4.0, "leg": leg.model_dump()}
        if leg.parent:
            info["hop"] = {"method": "affine", "trials": {"affine": 0.1, "identity": 0.2}}
        publish(paths.leg(leg.id), random_sae(seed), info)
    root_leg = plan.legs[0].id
    asked = EvaluationQuestion(tokens=131_072, ce=True, ages=[])
    evaluation = Evaluation(asked=asked, leg=root_leg, metrics=METRICS, snapshots={})
    evaluation.save(paths.evaluation(root_leg))
    return paths.root


def same(found: Dictionary, expected: Dictionary) -> None:
    """Equal reconstructions of random activations."""
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(found(x), expected(x), rtol=1e-5, atol=1e-4)


# --- exports and imports ---


@pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary_learning", "saerelay"])
def test_a_suite_is_exported_with_one_directory_per_layer(run: Path, tmp_path: Path, format: str) -> None:
    shared = share.export_run(str(run), tmp_path / "out", format)
    legs = share.load(run).one_per_site
    name = "layers.{}" if format == "sparsify" else "layer_{}"
    assert [one.folder for one in shared] == [name.format(layer) for layer in range(3)]
    files = ["README.md", "pretrained_saes.yaml"] if format == "saelens" else ["README.md"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*files, *map(name.format, range(3))}
    for one, leg in zip(shared, legs, strict=True):
        found, origin = load_dictionary(tmp_path / "out" / one.folder)
        same(found, own.read(RunDirectory(run).leg(leg.id))[0])
        assert origin.site == leg.site


def test_an_export_for_saelens_has_the_entry_of_its_list_of_saes(run: Path, tmp_path: Path) -> None:
    saes = share.export_run(str(run), tmp_path / "mine", "saelens", repo="me/my-saes")
    entry = yaml.safe_load((tmp_path / "mine" / "pretrained_saes.yaml").read_text())
    assert list(entry) == ["my-saes"]
    listed = entry["my-saes"].pop("saes")
    assert entry["my-saes"] == {"repo_id": "me/my-saes", "model": "model"}
    assert [sae["path"] for sae in listed] == [sae["id"] for sae in listed] == [sae.folder for sae in saes]
    assert listed[1] == {"id": "layer_1", "path": "layer_1", "l0": 3.75, "variance_explained": 0.875}
    assert listed[0] == {"id": "layer_0", "path": "layer_0", "l0": 4.0}  # it was not evaluated
    share.export_run(str(run), tmp_path / "unnamed", "saelens")
    assert (
        yaml.safe_load((tmp_path / "unnamed" / "pretrained_saes.yaml").read_text())["unnamed"]["repo_id"] == "USER/REPO"
    )


def test_what_is_known_of_an_sae_goes_with_it(run: Path, tmp_path: Path) -> None:
    share.export_run(str(run), tmp_path / "out", "saerelay")
    root = share.load(run).plan.legs[0]
    origin = own.read(tmp_path / "out" / f"layer_{root.layer}")[1]
    assert origin.module_path == f"gpt_neox.layers.{root.layer}" and origin.model == "model"
    assert (origin.context, origin.prepend_bos, origin.dataset, origin.l0) == (16, False, "", 3.75)
    assert origin.provenance["tokens"] == root.budget_tokens and origin.provenance["evaluation"]["fvu"] == 0.125
    assert not {"density", "sequence_delta_ce"} & origin.provenance["evaluation"].keys()


def test_chosen_legs_of_one_site_have_their_ids(run: Path, tmp_path: Path) -> None:
    control = next(leg for leg in share.load(run).plan.legs if leg.role == "control")
    shared = share.export_run(str(run), tmp_path / "out", "saerelay", legs=[control.control_of, control.id, "2"])
    names = [f"layer_0-{control.control_of}", f"layer_0-{control.id}", "layer_2"]
    assert [one.folder for one in shared] == names
    with pytest.raises(RunDirectoryError, match='no leg "L9"'):
        share.export_run(str(run), tmp_path / "other", "saerelay", legs=["L9"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_transcoders_of_one_layer_do_not_take_each_others_place(tiny_model: Path, tmp_path: Path) -> None:
    mlp = {"layer": 1, "module": "mlp_in", "module_out": "mlp_out", "tokens": 1024}
    legs = [
        {"id": "mlp", **mlp},
        {"id": "sparse", **mlp, "k": 2},
        {"id": "attention", "layer": 1, "module": "attn_z", "module_out": "attn_out", "tokens": 1024},
    ]
    sections: dict[str, Any] = {"model": {"name": str(tiny_model), "device": "cpu"}, "plan": {"legs": legs}}
    sections |= {"data": {"context": 16}, "dictionary": {"architecture": "batchtopk", "n_latents": 64, "k": 4}}
    plan, paths = plan_run(Recipe.parse(sections, source="test")), RunDirectory(tmp_path / "run")
    write_text(paths.plan, plan.to_json())
    for seed, leg in enumerate(plan.legs):
        info = {"layer": 1, "module": leg.module, "module_out": leg.module_out, "leg": leg.model_dump()}
        publish(paths.leg(leg.id), replace(random_sae(seed), architecture="relu", k=None), info)

    ids = [leg["id"] for leg in legs]
    shared = share.export_run(str(paths.root), tmp_path / "out", "saerelay", legs=[*ids, "mlp"])
    places = ["layer_1.transcoder-mlp", "layer_1.transcoder-sparse", "layer_1.attn_z-to-attn_out"]
    assert [one.folder for one in shared] == places
    for seed, place in enumerate(places):
        assert torch.equal(own.read(tmp_path / "out" / place)[0].W_enc, random_sae(seed).W_enc)
    with pytest.raises(FormatError, match="one transcoder for each layer, but mlp, sparse are of the same layer"):
        share.export_run(str(paths.root), tmp_path / "set", "circuit-tracer", legs=ids[:2])


def test_the_card_says_what_is_there(run: Path, tmp_path: Path) -> None:
    share.export_run(str(run), tmp_path / "out", "saelens", licence="apache-2.0", repo="me/saes")
    card = (tmp_path / "out" / "README.md").read_text()
    _, header, text = card.split("---\n", 2)
    header = yaml.safe_load(header)
    assert header["license"] == "apache-2.0" and header["library_name"] == "saelens" and "saerelay" in header["tags"]
    assert "base_model" not in header and "datasets" not in header  # both are files of this machine
    root = share.load(run).plan.legs[0]
    rows = {
        cells[1].replace("\\", ""): cells
        for line in text.splitlines()
        if (cells := re.split(r"(?<!\\) ?\| ?", line))[1:]
    }
    assert rows[f"layer_{root.layer}"][4:11] == [
        "3.8",
        "0.1250",
        "0.8750",
        "0.0321 ± 0.0012",
        "0.9876",
        "96.0%",
        "2M tokens",
    ]
    other = next(leg for leg in share.load(run).one_per_site if leg is not root and leg.parent)
    assert rows[f"layer_{other.layer}"][5:7] == ["not evaluated", "-"]
    assert rows[other.id][3:6] == [root.id, "affine + refit", format_count(other.moment_tokens)]
    assert 'SAE.from_pretrained("me/saes", "layer_0")' in text and "hf://me/saes/layer_0" in text
    assert "n_latents = 64" in text and text.rstrip().endswith("apache-2.0")
    assert "reproduces these dictionaries" in text


def test_the_card_of_a_surveyed_run_does_not_promise_the_same_legs(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    plan = share.load(run).plan
    auto = plan.recipe.changed(plan=plan.recipe.plan.changed(preset="auto", controls=[]))
    plan.changed(recipe=auto, facts=plan.facts.changed(revision="abc123")).save(tmp_path / "run/plan.json")
    share.export_run(str(tmp_path / "run"), tmp_path / "out", "saerelay")
    card = (tmp_path / "out/README.md").read_text()
    assert "surveys the layers again" in card and "reproduces these dictionaries" not in card
    assert 'revision = "abc123"' in card, "the commit that was trained on, whatever the recipe leaves open"


def test_the_card_of_a_run_to_which_layers_were_added_does_not_promise_the_same_saes(facts: ModelFacts) -> None:
    """They were trained after the others, and in one run they would be trained beside them, on other text."""
    sae = model_card.ExportedSAE("layer_1", "topk", Origin(model="a", site=Site(1)), leg=None, metrics={})
    begun = compiled(facts, sites={"layers": [1, 2]})
    longer = compiled(facts, sites={"layers": [1, 2, 3]}, finished=begun)
    longest = compiled(facts, sites={"layers": [0, 1, 2, 3]}, finished=Plan.from_data(longer.to_data(), "plan.json"))
    assert longest.extended_at == [begun.n_tokens, longer.n_tokens] and not begun.extended_at
    cards = [model_card.model_card([sae], "saerelay", plan=plan) for plan in (begun, longer, longest)]
    promised = ["reproduces these dictionaries" in card for card in cards]
    assert promised == [True, False, False]


def test_the_first_of_several_kinds_is_loaded_as_what_it_is() -> None:
    saes = []
    for layer, site_out in ((0, Site(0, "mlp_out")), (1, None)):
        origin = Origin(model="a", site=Site(layer, "mlp_in"), site_out=site_out)
        saes.append(model_card.ExportedSAE(f"layer_{layer}", "topk", origin, leg=None, metrics={}))
    card = model_card.model_card(saes, "saerelay")
    assert "y_hat = transcoder(x)" in card and "sae.decode(z)" not in card
    assert "x_hat = sae.decode(z)" in model_card.model_card(saes[::-1], "saerelay")


def test_the_card_of_a_child_names_its_parent(run: Path, tmp_path: Path) -> None:
    child = next(leg for leg in share.load(run).one_per_site if leg.parent)
    share.export_run(str(run), tmp_path / "out", "saerelay", legs=[child.id])
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("| layer\\_") == 1 and f"| {child.parent} | resid\\_post, layer 1 | - | from scratch |" in card


def test_the_card_of_a_leg_that_no_map_helped_says_so(run: Path) -> None:
    suite = share.load(run)
    child = next(leg for leg in suite.one_per_site if leg.parent)
    origin = Origin(model="demo", site=child.site, provenance={"hop": {"method": "scratch"}})
    sae = model_card.ExportedSAE("layer", "topk", origin, leg=child, metrics={})
    card = model_card.model_card([sae], "saerelay", plan=suite.plan)
    assert f"| - | from scratch: no map from {child.parent} helped |" in card


def test_the_card_of_a_hub_model_links_it(tmp_path: Path) -> None:
    origin = Origin(model="EleutherAI/pythia-70m", site=Site(3), dataset="user/text", l0=4.0)
    write_dictionary(tmp_path / "one", random_sae(0), origin, "saerelay")
    share.export_run(str(tmp_path / "one"), tmp_path / "out", "saerelay")
    header = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])
    assert header["base_model"] == ["EleutherAI/pythia-70m"] and header["datasets"] == ["user/text"]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    model = 'x|y <img src=x onerror="a()"> `c` [d](javascript:e)\n---\n# f'
    one = model_card.ExportedSAE("layer_0", "topk | <b>", Origin(model=model, site=Site(0)), leg=None, metrics={})
    card = model_card.model_card([one], "saerelay", licence="---\nevil: true\n<script>")
    data = ModelCard(card).data.to_dict()
    assert data["license"] == "---\nevil: true\n<script>" and "evil" not in data
    text = ModelCard(card).text
    outside = re.sub(r"\\.", "", text.split("## Loading")[0] + text.split("## Licence")[1])
    assert not re.search(r"[<>`\[]|\n# f|^---$", re.sub("`saerelay[^`]*`", "", outside), re.M)
    assert model_card._fenced("a\n````\nb", "toml").startswith("`````toml\n")


def test_paths_of_modules_are_not_trusted(tmp_path: Path) -> None:
    for path in ("model.../../../evil", "model./etc", "model.layers.3.input", ""):
        place = tmp_path / hashlib.sha256(path.encode()).hexdigest()[:8]
        write_dictionary(place, random_sae(0), Origin(site=Site(3, "mlp_out"), module_path=path), "saerelay")
        with pytest.raises(FormatError, match="names SAEs after the path of the module"):
            share.export_run(str(place), tmp_path / "out", "sparsify")
        assert not (tmp_path / "out").exists()


def test_an_import_is_a_parent(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    write_dictionary(tmp_path / "lens", random_sae(5), Origin(model="gpt2", site=Site(1, "mlp_out")), "saelens")
    write_dictionary(tmp_path / "bare", random_sae(5), Origin(), "saerelay")

    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["saerelay", "import", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert exit_.value.code == 0

    call(tmp_path / "lens", "--out", tmp_path / "a")
    assert "topk, k 4, 64 latents, width 32; reads L1.mlp_out of gpt2" in capsys.readouterr().out
    external = describe_external(str(tmp_path / "a"), Recipe())
    assert (external.layer, external.module, external.n_latents, external.k) == (1, "mlp_out", 64, 4)
    call(tmp_path / "bare", "--out", tmp_path / "b", "--layer", 2, "--module", "attn_z", "--model", "m")
    found, origin = load_dictionary(tmp_path / "b")
    same(found, random_sae(5))
    assert (origin.site, origin.model) == (Site(2, "attn_z"), "m")
    with pytest.raises(FormatError, match="do not say what it reads; add --layer"):
        share.import_dictionary(str(tmp_path / "bare"), tmp_path / "c")
    with pytest.raises(RunDirectoryError, match="a exists; choose another place"):
        share.import_dictionary(str(tmp_path / "lens"), tmp_path / "a")
    assert not (tmp_path / "c").exists() and not list(tmp_path.glob(".*"))


# --- the hub ---


@pytest.fixture(scope="module")
def fake() -> Iterator[Hub]:
    """A hub on this machine."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()


def environment(fake: Hub, home: Path) -> dict[str, str]:
    """For a process that takes the fake for the hub."""
    return os.environ | {
        "HF_ENDPOINT": fake.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def saerelay(*arguments: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The program, in a process of its own."""
    command = [sys.executable, "-m", "saerelay", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


@pytest.fixture(scope="module")
def pushed(run: Path, fake: Hub, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `push` printed."""
    env = environment(fake, tmp_path_factory.mktemp("home"))
    done = saerelay("push", run, "me/saes", "--licence", "mit", "--private", env=env)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_push_uploads_the_export(run: Path, fake: Hub, pushed: str, tmp_path: Path) -> None:
    share.export_run(str(run), tmp_path / "out", "saelens", licence="mit", repo="me/saes")
    expected = {
        p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert fake.repos["me/saes"] == expected and len(expected) == 8
    assert fake.private["me/saes"] and f"me/saes/commit/{COMMIT}" in pushed


@pytest.mark.slow
def test_pull_brings_it_back(run: Path, fake: Hub, pushed: str, tmp_path: Path) -> None:
    fake.repos["me/mixed"] = fake.repos["me/saes"] | {
        "evil.py": b"raise SystemExit",
        "layer_0/x.bin": b"x",
        "state.pt": b"x",
    }
    done = saerelay("pull", "me/mixed", "--out", tmp_path / "all", env=environment(fake, tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "all" / f"layer_{i}") for i in range(3)]
    got = {
        p.relative_to(tmp_path / "all").as_posix(): p.read_bytes() for p in (tmp_path / "all").rglob("*") if p.is_file()
    }
    assert got == fake.repos["me/saes"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all", "home"]


SCRIPT = """
import json, sys
from pathlib import Path
from saerelay.errors import SaeRelayError
from saerelay.interop import hub, load_dictionary
for reference in sys.argv[1:]:
    try:
        dictionary, origin = load_dictionary(reference)
        print(json.dumps([str(hub.local(reference)), origin.site.layer, float(dictionary.W_dec.sum())]))
    except SaeRelayError as error:
        print(json.dumps(str(error)))
"""


def read_all(*references: str, env: dict[str, str]) -> list[Any]:
    """What load_dictionary makes of references, in a process."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, *references], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_references_to_the_hub_are_read(run: Path, fake: Hub, pushed: str, tmp_path: Path) -> None:
    fake.repos["me/gated"] = dict(fake.repos["me/saes"])
    env, fake.requests[:] = environment(fake, tmp_path / "home"), []
    references = ["hf://me/saes/layer_1", f"hf://me/saes@{COMMIT}/layer_1/", "hf://me/saes", "hf://me/saes/layre_1",
                  "hf://me/none/layer_1", "hf://me/saes@v2/layer_1", "hf://me/gated/layer_1", "hf://me"]  # fmt: skip
    first, second, *refused = read_all(*references, env=env)
    leg = next(leg for leg in share.load(run).one_per_site if leg.layer == 1)
    total = float(own.read(RunDirectory(run).leg(leg.id))[0].W_dec.sum())
    assert first == second == [first[0], 1, pytest.approx(total)]
    assert f"snapshots/{COMMIT}/layer_1" in first[0]
    fetched = {request.split("/resolve/")[1] for request in fake.requests if "/resolve/" in request}
    assert fetched == {f"{COMMIT}/layer_1/{name}" for name in ("cfg.json", "sae_weights.safetensors")}
    reasons = [
        "hf://me/saes holds no SAE itself; these folders contain SAE files: layer_0, layer_1, layer_2",
        'no "layre_1"; did you mean layer_',
        '"me/none" is not on the hub. Check the name; if it is private, run `hf auth login`',
        '"me/saes" has no revision "v2"',
        '"me/gated" is gated: accept the licence at',
        '"hf://me" is not a valid reference to the hub; write hf://user/repo',
    ]
    for message, reason in zip(refused, reasons, strict=True):
        assert reason in message
    offline = env | {"HF_HUB_OFFLINE": "1"}
    again, other = read_all("hf://me/saes/layer_1", "hf://me/saes/layer_2", env=offline)
    assert again == first and 'the hub is not reachable, and the cache has no "layer_2"' in other


@pytest.mark.slow
def test_of_a_file_on_the_hub_only_its_own_files_are_fetched(fake: Hub, tmp_path: Path) -> None:
    sae = random_sae(3)
    state = {
        "encoder.weight": sae.W_enc,
        "latent_bias": sae.b_enc,
        "decoder.weight": sae.W_dec.T,
        "pre_bias": sae.b_dec,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    folder = "gpt2-small/resid_delta_mlp_v4/autoencoders"
    names = [
        f"{folder}/6.pt",
        f"{folder}/7.pt",
        f"{folder}/notes.json",
        f"{folder}/run.py",
        "config.json",
        "other/8.pt",
    ]
    fake.repos["me/files"] = dict.fromkeys(names, b"{}") | {f"{folder}/6.pt": buffer.getvalue()}
    fake.requests.clear()
    [(path, layer, total)] = read_all(f"hf://me/files/{folder}/6.pt", env=environment(fake, tmp_path / "home"))
    assert path.endswith(f"{COMMIT}/{folder}/6.pt") and layer == 6
    assert total == pytest.approx(float(sae.W_dec.sum()), rel=1e-4)
    fetched = {request.split(f"/resolve/{COMMIT}/")[1] for request in fake.requests if "/resolve/" in request}
    assert fetched == {f"{folder}/6.pt", f"{folder}/notes.json", "config.json"}


@pytest.mark.slow
def test_a_repository_of_many_saes_with_checkpoints_is_none_itself(fake: Hub, tmp_path: Path) -> None:
    names = [f"L{i}[8x]/{name}" for i in range(2) for name in ("hyperparams.json", "checkpoints/final.safetensors")]
    fake.repos["me/scope"] = dict.fromkeys(["README.md", *names], b"{}")
    fake.requests.clear()
    whole, one = read_all("hf://me/scope", "hf://me/scope/L1[8x]", env=environment(fake, tmp_path / "home"))
    assert "holds no SAE itself; these folders contain SAE files: L0[8x], L1[8x]" in whole
    assert "L1[8x]/checkpoints/final.safetensors: cut off or damaged" in one
    fetched = {request.split(f"/resolve/{COMMIT}/")[1] for request in fake.requests if "/resolve/" in request}
    assert {urllib.parse.unquote(name) for name in fetched} == set(names[2:])


@pytest.mark.slow
def test_a_repository_that_cannot_be_read_leaves_nothing(fake: Hub, pushed: str, tmp_path: Path) -> None:
    broken = dict(fake.repos["me/saes"])
    broken["layer_2/sae_weights.safetensors"] = broken["layer_2/sae_weights.safetensors"][:-10]
    fake.repos["me/broken"], fake.repos["me/pickle"] = broken, fake.repos["me/saes"] | {"more/model.pt": b"\x80\x02."}
    script = SCRIPT.replace("load_dictionary(reference)", "pull(reference, Path('out')), 1").replace(
        "from saerelay.interop import hub",
        "from saerelay.workflows.share import pull\nfrom saerelay.interop import hub",
    )
    env = environment(fake, tmp_path / "home")
    command = [sys.executable, "-c", script, "me/broken", "hf://me/pickle", "hf://me/none"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    first, second, third = map(json.loads, done.stdout.splitlines())
    assert re.search("layer_2/sae_weights.safetensors: cut off or damaged", first)
    assert "more/model.pt is a pickle of an unknown format" in second and '"me/none" is not on the hub' in third
    assert {p.name for p in tmp_path.iterdir()} <= {"home"}


@pytest.mark.slow
def test_an_interrupted_pull_leaves_nothing(fake: Hub, pushed: str, tmp_path: Path) -> None:
    fake.repos["me/slow"] = dict(fake.repos["me/saes"])
    command = [sys.executable, "-m", "saerelay", "pull", "hf://me/slow", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment(fake, tmp_path / "home"), text=True)
    assert fake.downloading.wait(60)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    fake.go_on.set()
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in shown, shown
    assert {p.name for p in tmp_path.iterdir()} <= {"home"}


def test_a_dry_run_needs_no_network(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr(hub, "upload", no_network)
    monkeypatch.setattr(sys, "argv", ["saerelay", "push", str(run), "me/saes", "--dry-run", "--licence", "mit"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    shown = capsys.readouterr().out
    assert exit_.value.code == 0 and "license: mit" in shown and "# Sparse autoencoders of model" in shown
    assert re.search(r"\d\d,\d{3}  layer_1/sae_weights.safetensors\n", shown)
    assert re.search(r"bytes would be uploaded to me/saes", shown)


def test_who_is_not_logged_in_is_told(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    message = "me/saes: you are not logged in to the hub; run `hf auth login`"
    with pytest.raises(HubError, match=message):
        share.push_run(str(run), "me/saes", "saelens")
    monkeypatch.setattr(sys, "argv", ["saerelay", "push", str(run), "me/saes"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    shown = capsys.readouterr().err
    assert exit_.value.code == 2 and "not logged in to the hub" in shown and "Traceback" not in shown


def test_an_upload_that_the_hub_refuses_is_a_hub_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("you have no\n  right to do this")

    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(HubError, match=r'"me/saes" was not uploaded \(you have no right to do this\). Check'):
        hub.upload(tmp_path, "me/saes")


def test_an_unfinished_run_and_a_taken_place_are_refused(run: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "plan.json", (run / "plan.json").read_text())
    with pytest.raises(
        RunDirectoryError,
        match=r"no SAE is finished yet\. This continues the run: saerelay train .* --out .* --resume$",
    ):
        share.export_run(str(tmp_path / "new"), tmp_path / "out", "saelens")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="or choose another place"):
        share.export_run(str(run), tmp_path / "file" / "out", "saelens")
    with pytest.raises(FormatError, match="gemma_scope can be read but not written"):
        share.export_run(str(run), tmp_path / "out", "gemma_scope")
    one = str(share.load(run).directory.leg("L1"))
    with pytest.raises(FormatError, match="not a run, so that it has no legs to choose from"):
        share.export_run(one, tmp_path / "out", "saelens", legs=["L0"])
    for taken in (".", "/"):
        with pytest.raises(RunDirectoryError, match="exists; choose another place"):
            share.export_run(one, Path(taken), "saelens")
    assert read_json(tmp_path / "new" / "plan.json") and not (tmp_path / "out").exists()


def test_what_is_published_says_nothing_of_places_on_this_machine(run: Path, tmp_path: Path) -> None:
    for format in ("saelens", "sparsify", "saerelay"):
        share.export_run(str(run), tmp_path / format, format)
    texts = [path.read_text() for path in tmp_path.rglob("*") if path.suffix in (".json", ".md")]
    assert len(texts) > 9 and not [text for text in texts if str(run.parent) in text or "/model" in text]
