"""Transcoders of a small model: trained on its MLPs, measured with an MLP replaced, and looked at."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_evaluate import slowly

import saerelay as sr
from saerelay.analysis.metrics import Placed, measure
from saerelay.errors import ModelError, PlanError, RecipeError
from saerelay.lm.model import LanguageModel
from saerelay.site import Site
from saerelay.training.engine import Trainee
from saerelay.workflows.settle import plan_run
from saerelay.workflows.survey import survey_once
from saerelay.workflows.timing import measured_speeds


def recipe(model: Path, root: Path, **changes: dict[str, Any]) -> sr.Recipe:
    sections: dict[str, Any] = {
        "model": {"name": str(model), "dtype": "float32", "device": "cpu"},
        "sites": {"module": "mlp_in", "module_out": "mlp_out"},
        "data": {"tokens": str(root / "tokens.npy"), "context": 16, "block_tokens": 1024},
        "dictionary": {"architecture": "batchtopk", "n_latents": 64, "k": 4, "skip_connection": True},
        "plan": {"roots": [1], "root_tokens": "4k", "transfer_tokens": "2k", "moment_tokens": "1k", "controls": [2]},
        "train": {"batch_tokens": 64},
        "evaluate": {"tokens": "1k"},
    }
    for name, keys in changes.items():
        sections[name] = sections[name] | keys
    return sr.Recipe.parse(sections, source="test")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("transcoder-runs")
    tokens = torch.randint(1, 101, (40_000,), generator=torch.Generator().manual_seed(0)).numpy().astype("uint16")
    np.save(root / "tokens.npy", tokens)
    return root


@pytest.fixture(scope="module")
def suite(tiny_model: Path, place: Path) -> sr.Suite:
    return sr.train_run(recipe(tiny_model, place), place / "run")


def test_from_the_cache_it_is_as_from_the_model(suite: sr.Suite, tiny_model: Path, place: Path) -> None:
    """The cache rounds to bfloat16: a run that fills it and one that reads it have the same bits."""
    cached = recipe(tiny_model, place, data={"cache": str(place / "cache")}, plan={"controls": []})
    first = sr.train_run(cached, place / "first")
    second = sr.train_run(cached, place / "second")
    for leg in first:
        for name, tensor in first[leg].tensors().items():
            assert torch.equal(second[leg].tensors()[name], tensor), (leg, name)
    assert len(list((place / "cache").glob("*/L1.mlp_out/*.safetensors"))) > 0


def test_steps_are_timed_with_their_targets(tiny_model: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside an SAE of the same width, whose steps take another time."""
    both = recipe(tiny_model, place, sites={"module": ["resid_post", "transcoder"], "module_out": ""})
    plan = plan_run(both.changed(dictionary=both.dictionary.changed(skip_connection=False)))
    timed = set()

    def step(trainee: Trainee, x: torch.Tensor, target: torch.Tensor | None = None) -> None:
        timed.add((trainee.leg.is_transcoder, None if target is None else target.shape == x.shape))

    monkeypatch.setattr(Trainee, "step", step)
    measured_speeds([plan], LanguageModel.load(both.model))
    assert timed == {(False, None), (True, True)}


def test_every_metric_is_about_the_replaced_output(suite: sr.Suite) -> None:
    model = LanguageModel.load(suite.plan.recipe.model)
    sequences = suite.tokens("test")[:6]
    tokens = torch.from_numpy(sequences.astype(np.int64))
    legs = ["L1.transcoder", "L0.transcoder-from-L1"]
    placed = {leg: Placed.at_home(suite.leg(leg), suite[leg]) for leg in legs}
    results = measure(suite.plan, model, sequences, placed, ce=True)
    for leg in legs:
        layer = suite.leg(leg).layer
        x = model.harvest(tokens, [Site(layer, "mlp_in")])[Site(layer, "mlp_in")]
        found = results[leg].model_dump()
        expected = replaced_slowly(model, tokens, Site(layer, "mlp_out"), suite[leg], x)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=2e-3, abs=2e-5), (leg, name)


def replaced_slowly(
    model: LanguageModel, tokens: torch.Tensor, site: Site, transcoder: sr.Dictionary, x: torch.Tensor
) -> dict[str, float]:
    """`test_evaluate.slowly`, of something that gives the transcoder's output whatever it is shown."""

    class Fixed:
        def encode(self, _: torch.Tensor) -> torch.Tensor:
            return transcoder.encode(x if _.dim() == 3 else x[:, 1:].flatten(0, 1))

        def __call__(self, h: torch.Tensor) -> torch.Tensor:
            return transcoder(x if h.dim() == 3 else x[:, 1:].flatten(0, 1))

    return slowly(model, tokens, site, Fixed())  # type: ignore[arg-type]


def test_a_suite_is_evaluated_carried_and_looked_at(suite: sr.Suite) -> None:
    summary = suite.evaluate()
    assert {leg.id for leg in summary.legs} == set(suite)
    assert summary.leg("L1.transcoder").fvu < 1
    matrix = suite.matrix(methods=["identity", "affine+refit"])
    assert len(matrix.cells) == 9 + 6
    features = suite.features("L1.transcoder")
    assert {"top_logits", "above_latents", "below_latents"} <= features.tensors().keys()
    links = suite.lineage().summary()
    (depth,) = (row for row in links if row["source"] == "L0.transcoder-from-L1")
    assert depth["kind"] == "depth" and depth["kept"] + depth["drifted"] + depth["replaced"] > 0
    assert suite.method(suite.leg("L0.transcoder-from-L1")) == "scratch"
    assert not any(row["kind"] == "hop" for row in links), "no map helped, so nothing was inherited"
    measures = suite.measures()
    assert measures.similarity and measures.dla


def test_the_affine_hop_is_the_better_refit(suite: sr.Suite) -> None:
    cells = {(c.leg, c.target, c.method): c for c in suite.matrix(methods=["identity", "affine+refit"]).cells}
    for layer in (0, 2):
        carried = cells["L1.transcoder", layer, "affine+refit"]
        copied = cells["L1.transcoder", layer, "identity"]
        assert carried.fvu is not None and copied.fvu is not None and carried.fvu < copied.fvu


def test_a_hop_names_its_leg_as_a_plan_would(suite: sr.Suite, tiny_model: Path, place: Path) -> None:
    run = recipe(tiny_model, place, plan={"controls": [], "roots": []})
    hopped = sr.hop_run(suite.directory.leg("L1.transcoder"), 0, run, place / "hopped", tokens=0, refit=False)
    assert list(hopped) == ["L0.transcoder-from-L1"]


def test_what_is_not_done_with_transcoders_says_so(suite: sr.Suite, tiny_model: Path, place: Path) -> None:
    model = LanguageModel.load(suite.plan.recipe.model)
    with pytest.raises(ModelError, match=r"L\d.transcoder.* is a transcoder, and attach takes SAEs"):
        suite.attach(model)
    with pytest.raises(RecipeError, match="circuits are found in SAEs"):
        suite.circuits("self")
    with pytest.raises(PlanError, match="surveys SAEs"):
        survey_once(recipe(tiny_model, place, plan={"preset": "auto", "controls": [], "roots": []}), None)


def test_a_tier_keeps_its_skip_connection_where_nothing_is_refitted(tiny_model: Path, place: Path) -> None:
    plan = {"roots": [1], "controls": [], "root_tokens": "1k", "transfer_tokens": 0, "tiers": [6], "refit": False}
    tiers = sr.train_run(recipe(tiny_model, place, sites={"layers": [1]}, plan=plan), place / "tiers")
    first, tier = tiers["L1.transcoder"], tiers["L1.transcoder-k6"]
    assert first.W_skip is not None and tier.W_skip is not None and tier.k == 6
    torch.testing.assert_close(tier.W_skip, first.W_skip)
