"""`saerelay demo` (and `make demo`), on a recipe of seconds: every part of the pipeline, offline."""

from pathlib import Path

import pytest

import saerelay as sr
from saerelay.cli import training
from saerelay.planning.recipe import DataSpec, EvaluateSpec, PlanSpec, SitesSpec, TrainSpec
from saerelay.sae.architectures import TopK
from saerelay.sae.spec import DictionarySpec
from saerelay.workflows import demo

TINY = demo.DEMO.changed(
    sites=SitesSpec(layers=[1, 2]),
    data=DataSpec(context=32, block_tokens=1024),
    dictionary=DictionarySpec(n_latents=64, activation=TopK(k=4)),
    plan=PlanSpec(preset="hub", root_tokens=4096, transfer_tokens=1024, moment_tokens=1024, controls=[1]),
    train=TrainSpec(batch_tokens=128),
    evaluate=EvaluateSpec(tokens=1024),
)
"""The demo's recipe with two layers and few of everything."""


@pytest.mark.slow
def test_the_demo_trains_measures_and_reports_and_may_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "DEMO", TINY)
    monkeypatch.setattr("saerelay.workflows.report.MATRIX_TOKENS", 1024)
    out = tmp_path / "demo"
    out.mkdir()
    (out / demo.MARK).touch()
    (out / "legs/old").mkdir(parents=True)
    training.demo(out)
    shown = capsys.readouterr().out
    assert f"{out}/report/index.html" in shown and "ΔCE" in shown
    assert (out / "report/index.html").is_file()
    suite = sr.load(out)
    assert set(suite) == {"L2", "L1-from-L2", "L1-scratch-equal", "L1-scratch-full"}
    assert not (out / "legs/old").exists(), "an earlier demo is replaced"
    for leg in suite.evaluate().legs:
        assert leg.fvu < 1.0 and leg.delta_ce is not None


def test_a_demo_replaces_nothing_but_a_demo(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(sr.SaeRelayError, match="holds something that is not a demo"):
        demo.run_demo(tmp_path, None)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_the_demo_that_users_get_is_the_one_of_the_readme() -> None:
    plan = sr.plan_run(demo.DEMO)
    assert len({leg.layer for leg in plan.legs}) == 8
    (root,) = [leg for leg in plan.legs if leg.role == "root"]
    assert (root.layer, root.dictionary.n_latents, root.dictionary.activation.k) == (5, 3072, 24)
    assert {leg.layer for leg in plan.legs if leg.role == "control"} == {2, 6}
