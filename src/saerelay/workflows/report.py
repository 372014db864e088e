"""`saerelay report`: measure whatever is missing or out of date, and write the page."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from saerelay.analysis.evaluate import evaluate
from saerelay.analysis.features import make_features
from saerelay.analysis.lineage import make_lineage
from saerelay.analysis.matrix import current_matrix, matrix, matrix_again
from saerelay.analysis.measures import current_measures, measures, measures_again
from saerelay.analysis.session import Session
from saerelay.errors import RunDirectoryError
from saerelay.files import read_text
from saerelay.lm.model import LanguageModel
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.across_layers import Matrix, Measures
from saerelay.runs.documents.circuits import Circuits
from saerelay.runs.documents.interpretation import AskedModel, Interpretation
from saerelay.runs.documents.judging import Scores
from saerelay.runs.documents.latents import LineageDocument
from saerelay.runs.documents.quality import Summary
from saerelay.runs.documents.training import TrainingLine
from saerelay.runs.features import load_features
from saerelay.runs.suite import PublishedSuite
from saerelay.views.report import check_replaceable, write_report
from saerelay.views.report.sources import ReportSources
from saerelay.workflows.placeless import placeless, placeless_plan, public_names

MATRIX_TOKENS = 4_096
"""Held-out tokens of a matrix that is measured for a report; `saerelay matrix` uses more."""


def report_run(
    suite: PublishedSuite, model: LanguageModel | None = None, *, quick: bool = False, console: Console | None = None
) -> Path:
    """Write the report of a run, after measuring whatever is missing or out of date; returns its index.html.

    `quick` leaves out the matrix and the measures, whose cost grows with the square of the number of layers, unless
    they are current. An earlier report is replaced. `model` is the run's language model, if it is loaded already.
    Raises RunDirectoryError if no leg is finished, or only controls are, or if report/ holds other files.
    """
    check_replaceable(suite.directory.report)
    session = Session(suite, model=model, console=console)
    suite.check_has_final_legs()
    summary = evaluate(session)
    make_lineage(session, features=True)
    if quick:
        known_matrix = current_matrix(session)
        known_measures = current_measures(session, known_matrix)
    else:
        known_matrix = matrix_again(session) or matrix(session, tokens=MATRIX_TOKENS)
        known_measures = measures_again(session) or measures(session)
        make_features(session)  # again, if the measures of old were of another number of tokens, and so are these
    with session.display.status("writing the report"):
        sources = report_sources(session, summary, known_matrix, known_measures)
        return write_report(sources, suite.directory.report)


def report_sources(
    session: Session, summary: Summary, known_matrix: Matrix | None, known_measures: Measures | None
) -> ReportSources:
    """Return the sources of a report, without private paths; features and lineage must be current."""
    suite = session.suite
    paths = suite.directory
    names = public_names(suite.plan)
    lineage = LineageDocument.load(paths.lineage)
    return ReportSources(
        run=paths.root.resolve().name,
        plan=placeless_plan(suite.plan),
        summary=placeless(summary, names),
        lineage=lineage.changed(model=names.get(lineage.model, lineage.model)),
        training=training_lines(paths.metrics),
        features=lambda leg_id: load_features(paths, leg_id),
        test=session.corpus.test,
        token_text=session.token_text,
        matrix=placeless(known_matrix, names) if known_matrix else None,
        measures=placeless(known_measures, names) if known_measures else None,
        circuits=[placeless(document, names) for document in circuits_of(paths)],
        interpretations=[for_others(document, names) for document in interpretations_of(suite)],
        judging=Scores.load_if_any(paths.judging / "scores.json"),
    )


def for_others(document: Interpretation, names: Mapping[str, str]) -> Interpretation:
    """Return an interpretation without the endpoint's address and request fields; its texts are unchanged."""
    return document.changed(
        model=names.get(document.model, document.model),
        parent=names.get(document.parent or "", document.parent),
        asked=AskedModel(model=document.asked.model, endpoint="", body={}),
    )


def training_lines(path: Path) -> list[TrainingLine]:
    """Read the training log, line by line; RunDirectoryError if it is damaged."""
    try:
        return [TrainingLine.model_validate_json(line) for line in read_text(path).splitlines()]
    except ValueError as error:  # pydantic's errors are ValueErrors
        first = str(error).splitlines()[0]
        raise RunDirectoryError(
            f"{path}: damaged ({first}); a report needs an intact log, so remove the damaged lines"
        ) from None


def circuits_of(paths: RunDirectory) -> list[Circuits]:
    """Return the circuits found in a run, by task."""
    documents = [Circuits.load_if_any(path) for path in sorted((paths.root / "circuits").glob("*.json"))]
    return [document for document in documents if document is not None]


def interpretations_of(suite: PublishedSuite) -> list[Interpretation]:
    """Return the interpretations of a run's legs."""
    documents = [Interpretation.load_if_any(suite.directory.interpretation(leg.id)) for leg in suite.legs]
    return [document for document in documents if document is not None]
