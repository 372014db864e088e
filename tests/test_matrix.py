"""The cross-layer matrix: the same numbers as one evaluation a cell, and hops as they are defined."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import saerelay as sr
from saerelay.analysis import matrix
from saerelay.analysis.metrics import measure
from saerelay.analysis.session import Session
from saerelay.data.stream import gather_rows
from saerelay.errors import RecipeError
from saerelay.runs.documents.across_layers import Matrix, MatrixQuestion
from saerelay.sae.dictionary import unit_decoder
from saerelay.sae.units import Units

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def suite(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> sr.Suite:
    root = tmp_path_factory.mktemp("matrix")
    tokens = torch.randint(1, 101, (40_000,), generator=torch.Generator().manual_seed(0)).numpy().astype("uint16")
    np.save(root / "tokens.npy", tokens)
    sections = {
        "model": {"name": str(tiny_model), "dtype": "float32", "device": "cpu"},
        "data": {"tokens": str(root / "tokens.npy"), "context": 16, "block_tokens": 1024},
        "dictionary": {"architecture": "batchtopk", "n_latents": 64, "k": 4},
        "plan": {
            "preset": "forward",
            "root_tokens": "4k",
            "transfer_tokens": "2k",
            "moment_tokens": "1k",
            "controls": [1],
        },
        "train": {"batch_tokens": 64, "snapshots": ["1k"]},
        "evaluate": {"tokens": "1k"},
    }
    return sr.train_run(sr.Run.parse(sections, source="test"), root / "run")


@pytest.mark.slow
def test_cells_are_evaluations(suite: sr.Suite) -> None:
    document = suite.matrix(methods=["identity", "affine"])
    assert document == Matrix.load(suite.directory.matrix)
    cells = {(c.leg, c.target, c.method): c for c in document.cells}
    legs = [leg.id for leg in suite.final_legs]
    assert len(legs) == 3 and len(cells) == 9 + 6 and not any("scratch" in leg for leg in legs)
    plan, session = suite.plan, Session(suite)
    model, maps, test = session.model, session.maps, suite.tokens("test")[:64]
    for leg in suite.final_legs:
        for target in suite.sites:
            alone = {"x": (target, suite[leg.id])}
            expected = measure(plan, model, test, alone, ce=True)["x"]
            found = cells[leg.id, target.layer, "identity"]
            for name in ("fvu", "l0", "delta_ce", "ce_loss_score", "kl_div_score"):
                assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6), name
            if target != leg.site:
                between = maps.between([(leg.site, target)])[leg.site, target]
                rows = gather_rows(plan, maps.stream, matrix.REFIT_ROWS)[0][target]
                l0 = suite.info(leg).l0
                assert l0
                units = Units.fitted_to(rows, plan.recipe.train.optimizer.balance)
                in_units = unit_decoder(units.from_canonical(sr.fold(suite[leg.id], between)))
                carried = sr.match_l0(units.to_canonical(in_units), rows[:8192], l0)
                expected = measure(plan, model, test, {"x": (target, carried)}, ce=True)["x"]
                assert cells[leg.id, target.layer, "affine"].fvu == pytest.approx(expected.fvu, rel=1e-4)
                assert cells[leg.id, target.layer, "affine"].l0 == pytest.approx(4, rel=0.2)


def test_what_was_measured_is_not_measured_again(suite: sr.Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    first = suite.matrix(methods=["identity"])
    monkeypatch.setattr(matrix, "measure", None)
    assert suite.matrix(methods=["identity"]) == first
    with pytest.raises(TypeError):
        suite.matrix(methods=["rescale"])


def test_a_matrix_of_another_schema_is_measured_again(suite: sr.Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    first = suite.matrix(methods=["identity"])
    monkeypatch.setattr(Matrix, "SCHEMA", Matrix.SCHEMA + 1)
    monkeypatch.setattr(matrix, "measure", None)
    with pytest.raises(TypeError):
        suite.matrix(methods=["identity"])
    monkeypatch.undo()
    assert suite.matrix(methods=["identity"]) == first


def test_what_is_asked_names_legs_ages_layers_and_methods(suite: sr.Suite) -> None:
    asked = suite.matrix(methods=["identity", "affine"], snapshots=True).asked
    legs = {leg.id: [suite.info(leg).tokens, 1024] for leg in suite.final_legs}
    assert asked == MatrixQuestion(
        tokens=1000,
        methods=["affine", "identity"],
        ce=True,
        layers=[0, 1, 2],
        legs=legs,
        dictionaries=suite.digest(suite.final_legs, snapshots=True),
    )


def test_snapshots_have_cells_of_their_own(suite: sr.Suite) -> None:
    cells = suite.matrix(methods=["identity"], snapshots=True).cells
    ages = {(c.leg, c.tokens) for c in cells if c.snapshot}
    assert len(ages) == 3 and {age for _, age in ages} == {1024} and len(cells) == 18


def test_little_memory_changes_nothing(suite: sr.Suite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def values(document: Matrix) -> dict[tuple[str, int, str], float | None]:
        return {(c.leg, c.target, c.method): c.fvu for c in document.cells}

    monkeypatch.setattr(matrix, "CELL_BYTES", 1)
    shutil.copytree(suite.directory.root, tmp_path / "run")
    (tmp_path / "run/matrix.json").unlink(missing_ok=True)
    again = sr.load(tmp_path / "run").matrix(methods=["identity"])
    assert values(again) == pytest.approx(values(suite.matrix(methods=["identity"])))


def test_refit_helps_and_unknown_methods_are_named(suite: sr.Suite) -> None:
    cells = suite.matrix(methods=["affine", "affine+refit"]).cells
    mean = {method: np.mean([c.fvu for c in cells if c.method == method]) for method in ("affine", "affine+refit")}
    assert mean["affine+refit"] < mean["affine"]
    with pytest.raises(
        RecipeError,
        match='unknown method "afine"; expected one of: identity, rescale, procrustes, affine, affine.refit',
    ):
        suite.matrix(methods=["afine"])


def test_a_matrix_without_cells_is_refused(suite: sr.Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="no method is given"):
        suite.matrix(methods=[])
    lone = [suite.plan.leg("L0")]
    monkeypatch.setattr(sr.Suite, "legs", lone)
    with pytest.raises(RecipeError, match='add "identity" to the methods .affine.'):
        suite.matrix(methods=["affine"])
