"""The held-out quality of a run's legs and snapshots: `eval/<id>.json`, and `summary.json` for all of them."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from saerelay.analysis.metrics import Placed, measure, snapshot_key, wants_ce
from saerelay.analysis.session import Session
from saerelay.analysis.summary import summarise
from saerelay.lm.model import LanguageModel
from saerelay.planning.leg import Leg
from saerelay.runs.documents.quality import Evaluation, EvaluationMetrics, EvaluationQuestion, Summary
from saerelay.runs.suite import PublishedSuite
from saerelay.team import Team


def evaluate(session: Session, *, tokens: int = 0) -> Summary:
    """Evaluate every published leg and snapshot on the test split; writes eval/<id>.json and summary.json.

    Legs already measured for the same question are not measured again. If `tokens` is 0, it is `evaluate.tokens`.
    """
    suite = session.suite
    questions = {leg.id: question(session, leg, tokens) for leg in suite.legs}
    missing = session.team.once(lambda: legs_to_measure(suite, questions))
    mine = session.deal(missing)
    if mine:
        ce = wants_ce(session.plan)
        dictionaries: dict[str, Placed] = {}
        for leg in mine:
            dictionaries |= versions(suite, leg)
        sequences = session.held_out(tokens)
        metrics = measure(session.plan, session.model, sequences, dictionaries, ce=ce, display=session.display)
        for leg in mine if session.writes else []:
            evaluation = evaluation_of(leg, questions[leg.id], metrics)
            evaluation.save(suite.directory.evaluation(leg.id))

    session.team.gather(None)  # wait until all evaluations are written

    def summary() -> Summary:
        document = summarise(suite, session.corpus)
        document.save(suite.directory.summary)
        return document

    return session.team.once(summary)


def legs_to_measure(suite: PublishedSuite, questions: Mapping[str, EvaluationQuestion]) -> list[Leg]:
    """Return the legs whose evaluations are missing, or answer other questions."""
    missing = []
    for leg in suite.legs:
        path = suite.directory.evaluation(leg.id)
        if Evaluation.load_current(path, questions[leg.id]) is None:
            missing.append(leg)
    return missing


def evaluate_run(
    suite: PublishedSuite, model: LanguageModel | None = None, *, tokens: int = 0, console: Console | None = None
) -> dict[str, Any]:
    """Evaluate every published leg of a run; returns the content of summary.json (`Suite.evaluate` returns it typed).

    `model` is the run's language model, if it is loaded already.
    """
    return evaluate(Session(suite, model=model, console=console, team=Team.joined()), tokens=tokens).to_data()


def question(session: Session, leg: Leg, tokens: int) -> EvaluationQuestion:
    """Return the question that a leg's evaluation answers."""
    return EvaluationQuestion(
        tokens=session.n_held_out(tokens),
        ce=wants_ce(session.plan),
        ages=session.suite.directory.ages(leg),
        dictionaries=session.suite.digest([leg], snapshots=True),
    )


def versions(suite: PublishedSuite, leg: Leg) -> dict[str, Placed]:
    """Return a leg's dictionary under its id and those of its snapshots under `snapshot_key`, each with its site."""
    dictionaries = {leg.id: Placed.at_home(leg, suite.dictionary(leg))}
    for age in suite.directory.ages(leg):
        dictionaries[snapshot_key(leg.id, age)] = Placed.at_home(leg, suite.snapshot(leg, age))
    return dictionaries


def evaluation_of(leg: Leg, asked: EvaluationQuestion, metrics: dict[str, EvaluationMetrics]) -> Evaluation:
    """Return the document of a leg, from the metrics of its `versions`."""
    return Evaluation(
        asked=asked,
        leg=leg.id,
        metrics=metrics[leg.id],
        snapshots={age: metrics[snapshot_key(leg.id, age)] for age in asked.ages},
    )
