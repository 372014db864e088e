"""What a survey measures of its pilots, and what it costs."""

from pathlib import Path

import pytest
from test_cli import place  # noqa: F401  # a fixture

import saerelay as sr
from saerelay.lm.facts import read_facts
from saerelay.planning.cost import plan_cost
from saerelay.planning.survey import survey_plan
from saerelay.runs.directory import RunDirectory
from saerelay.sae.quality import fvu
from saerelay.workflows import pilots
from saerelay.workflows.pilots import MAP_ROWS
from saerelay.workflows.survey import survey_run


@pytest.mark.parametrize("normalise", [True, False])
def test_pilots_are_measured_as_legs_with_a_goal_are(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalise: bool  # noqa: F811
) -> None:  # fmt: skip
    """So that the FVU that a survey predicts is the one that a leg stops at: balanced only where training is."""
    run = sr.Recipe.from_toml(place / "run.toml")
    run = run.changed(
        plan=run.plan.changed(preset="auto", controls=[]),
        dictionary=run.dictionary.changed(normalise=normalise),
        train=run.train.changed(optimizer=run.train.optimizer.changed(balance=1.0)),
    )
    expected = {}

    def spy(asked, plan, suite, rows, held_out, maps):  # type: ignore[no-untyped-def]
        for leg in plan.legs:
            balance = 1.0 if normalise else 0.0
            expected[leg.id] = fvu(suite[leg.id], held_out[leg.site], balance)
        return measure(asked, plan, suite, rows, held_out, maps)

    measure = pilots.pilot_fvus
    monkeypatch.setattr(pilots, "pilot_fvus", spy)
    survey, _ = survey_run(run, RunDirectory(tmp_path), None)
    for layer in survey.layers:
        assert layer.fvu == pytest.approx(expected[f"L{layer.layer}"])
    assert survey.long.long_fvu == pytest.approx(expected["long"])

    # Three maps, and 14 refits: of three short pilots and the hub's long one at three layers each, and of the long
    # ones of the first and the last layer.
    plan = survey_plan(run, read_facts(run.model))
    trained = plan_cost(plan)
    read = survey.cost.lm_flops - trained.lm_flops
    rows = max(MAP_ROWS, 4 * 32)
    refit = rows * (2 * 32 * 64 + 2 * 4 * (64 + 2 * 32)) + 64**3 / 3 + 2 * 64**2 * 32
    assert survey.cost.flops - trained.flops - read == pytest.approx(3 * rows * 8 * 32**2 + 14 * refit)
