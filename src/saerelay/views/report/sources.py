"""Everything that a report is made from: the run's documents, features and tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from saerelay.planning.plan import Plan
from saerelay.runs.documents.across_layers import Matrix, Measures
from saerelay.runs.documents.circuits import Circuits
from saerelay.runs.documents.interpretation import Interpretation
from saerelay.runs.documents.judging import Scores
from saerelay.runs.documents.latents import LineageDocument
from saerelay.runs.documents.quality import Summary
from saerelay.runs.documents.training import TrainingLine
from saerelay.runs.features import Features


@dataclass(frozen=True, eq=False, kw_only=True)
class ReportSources:
    """The sources of a report; None or empty for what a run does not have."""

    run: str
    """Name of the run's directory."""
    plan: Plan
    summary: Summary
    lineage: LineageDocument
    training: list[TrainingLine]
    features: Callable[[str], Features]
    """The features of a leg, by its id: loaded one leg at a time."""
    test: np.ndarray
    """Token ids (N, context) of the test split."""
    token_text: Callable[[int], str]
    matrix: Matrix | None = None
    measures: Measures | None = None
    circuits: list[Circuits]
    interpretations: list[Interpretation]
    judging: Scores | None = None
