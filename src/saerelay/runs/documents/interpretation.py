"""Explanations of latents by a language model: `interpret/<id>.json`."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, get_args

import numpy as np

from saerelay.document import Document, Measured, Record
from saerelay.runs.documents.quality import Origin


class Estimate(Record):
    """The estimated size and cost of an interpretation."""

    n_latents: int
    """Number of latents that fire often enough to be explained."""
    n_requests: int
    """Number of requests to be sent."""
    n_known: int
    """Number of requests whose answer is already on disk."""
    tokens_in: int
    """Estimated tokens of the requests, one per three bytes."""
    tokens_out: int
    """Largest possible number of tokens of the answers; −1 if the request sets no bound."""
    cost: Measured
    """Highest cost in USD; null if the request sets no bound."""


class MeanScore(Record):
    """A mean over latents."""

    mean: Measured
    """Mean balanced accuracy; 0.5 is chance."""
    standard_error: Measured
    """Standard error of the mean; null for fewer than two latents."""
    n: int
    """Number of latents with a score."""

    @classmethod
    def over(cls, scores: Iterable[float | None]) -> "MeanScore":
        """The mean of the scores that are not None.

        >>> MeanScore.over([0.5, None, 1.0])
        MeanScore(mean=0.75, standard_error=0.25, n=2)
        """
        values = [score for score in scores if score is not None]
        mean = float(np.mean(values)) if values else None
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(mean=mean, standard_error=error, n=len(values))


class AskedModel(Record):
    """Which language model was asked."""

    model: str
    """Its name at the endpoint."""
    endpoint: str
    """Address of the endpoint."""
    body: dict[str, Any]
    """Further fields of each request; text values, which may be API keys, are not kept."""


class AnswerCost(Record):
    """The cost of the answers that a file is based on, whenever they were paid for."""

    n_questions: int
    """Number of questions."""
    tokens_in: int
    """Tokens of the questions, as counted by the endpoint, or else one per three bytes."""
    tokens_out: int
    """Tokens of the answers."""
    usd: float | None
    """Cost in USD; null without prices."""


class ExplanationScores(Record):
    """How well an explanation predicts where a latent fires; null where this was not asked or not answered."""

    detection: Measured = None
    """Balanced accuracy of telling texts in which the latent fires from others."""
    detection_by_quantile: list[float | None] | None = None
    """The same for texts of each quantile of strength, the strongest first, against all texts in which it is silent."""
    detection_counts: list[int] | None = None
    """Hits, misses, false alarms and correct rejections."""
    fuzzing: Measured = None
    """Balanced accuracy of telling tokens on which the latent fires from other tokens of the same texts."""
    fuzzing_by_quantile: list[float | None] | None = None
    """The same by quantile."""
    fuzzing_counts: list[int] | None = None
    """Hits, misses, false alarms and correct rejections."""


class InterpretedLatent(ExplanationScores):
    """The explanation of one latent, and its scores."""

    latent: int
    """Number of the latent."""
    n_pieces: int
    """Number of distinct pieces of text in which it fires."""
    explanation: str | None
    """The explanation, or null."""
    n_questions: int
    """Number of questions asked about it."""
    n_failed: int
    """Number of questions without a readable answer."""
    tokens_in: int
    """Tokens of the questions."""
    tokens_out: int
    """Tokens of the answers."""


class InterpretedLeg(Record):
    """Which leg was interpreted, by which model, on which text."""

    leg: str
    """Id of the leg."""
    layer: int
    """Layer it reads."""
    module: str
    """Kind of module it reads."""
    origin: Origin
    """Where its latents come from."""
    parent: str | None
    """Id or directory of the dictionary it started from."""
    model: str
    """Name of the language model that the leg belongs to."""
    asked: AskedModel
    """The model that was asked."""
    seed: int
    """Seed of the latents and texts drawn."""
    split: str = "test"
    """Split of the corpus that texts come from."""
    n_tokens: int
    """Number of positions of that split."""
    piece_tokens: int
    """Number of tokens in a piece of text."""


class InterpretationScores(InterpretedLeg):
    """The scores of a leg's explanations, without its latents."""

    n_latents: int
    """Number of latents asked about."""
    n_explained: int
    """Number of these that have an explanation."""
    n_rare: int
    """Number of these that fire in too few pieces of text to be asked about."""
    n_failed: int
    """Number of these that were asked about but have no explanation."""
    n_failed_questions: int
    """Number of questions without a readable answer."""
    detection: MeanScore
    """Mean detection score over explained latents."""
    fuzzing: MeanScore
    """Mean fuzzing score over explained latents."""
    cost: AnswerCost
    """Cost of the answers."""


class Interpretation(InterpretationScores, Document):
    """`interpret/<id>.json`: explanations of a leg's latents, and their scores."""

    SCHEMA: ClassVar = 1
    MADE_BY: ClassVar = "`saerelay interpret RUN`"

    latents: list[InterpretedLatent]
    """The latents asked about."""

    def scores(self) -> dict[str, Any]:
        """All but the latents, as plain JSON data."""
        data = self.to_data()
        del data["latents"]
        return data


class OriginScores(Record):
    """Scores over all latents of legs with one origin."""

    origin: Origin
    """Where their latents come from."""
    n_legs: int
    """Number of legs."""
    n_explained: int
    """Number of explained latents."""
    detection: MeanScore
    """Mean detection score."""
    fuzzing: MeanScore
    """Mean fuzzing score."""


class InterpretationSummary(Record):
    """Scores by leg and by origin: `saerelay interpret --json`."""

    legs: list[Interpretation]
    """The interpreted legs, by layer."""
    origins: list[OriginScores]
    """Scores by origin."""

    def to_data(self) -> dict[str, Any]:
        """The summary as plain JSON data, without latents."""
        origins = [origin.model_dump(mode="json") for origin in self.origins]
        return {"legs": [leg.scores() for leg in self.legs], "origins": origins}


def summarise(documents: Sequence[Interpretation]) -> InterpretationSummary:
    """Scores by leg, in the order of layers, and by origin, over all latents of its legs."""
    by_layer = sorted(documents, key=lambda document: (document.layer, document.leg))
    origins = []
    for origin in get_args(Origin):
        of_origin = [document for document in by_layer if document.origin == origin]
        latents = [latent for document in of_origin for latent in document.latents]
        if of_origin:
            origins.append(
                OriginScores(
                    origin=origin,
                    n_legs=len(of_origin),
                    n_explained=sum(document.n_explained for document in of_origin),
                    detection=MeanScore.over(latent.detection for latent in latents),
                    fuzzing=MeanScore.over(latent.fuzzing for latent in latents),
                )
            )
    return InterpretationSummary(legs=by_layer, origins=origins)
