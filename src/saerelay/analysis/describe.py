"""Everything that is known about one latent."""

from collections.abc import Callable
from typing import Literal

import numpy as np

from saerelay.analysis.lineage import check_latent, make_lineage
from saerelay.analysis.session import Session
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.interpretation import Interpretation
from saerelay.runs.documents.latents import (
    LatentDescription,
    LatentExample,
    LatentExplanation,
    LatentHistogram,
    LogitEffect,
    SimilarLatent,
    SimilarLatents,
)
from saerelay.runs.features import Features, load_features
from saerelay.site import Site

TokenText = Callable[[int], str]


def describe(session: Session, leg: str | int | Site, latent: int) -> LatentDescription:
    """Return everything that is known about one latent, as printed by `saerelay show --json`.

    `leg` is an id, a layer or a site. Features and lineage of the run are computed if they are not current. Raises
    RunDirectoryError if there is no such leg or latent.
    """
    suite = session.suite
    chosen = suite.leg(leg)
    check_latent(chosen.id, latent, chosen.dictionary.n_latents)
    lineage = make_lineage(session, features=True)
    features = load_features(suite.directory, chosen.id)
    text = session.token_text
    return LatentDescription(
        leg=chosen.id,
        layer=chosen.layer,
        latent=latent,
        model=session.plan.facts.name,
        n_tokens=features.facts.n_tokens,
        n_fired=int(features.n_fired[latent]),
        max_activation=float(features.max_activation[latent]),
        mean_activation=float(features.mean_activation[latent]),
        histogram=LatentHistogram(
            first_edge=features.facts.histogram_first_edge, counts=features.histogram[latent].tolist()
        ),
        examples=examples(features, latent, session.corpus.test, text),
        top_logits=logit_effects(features, "top", latent, text),
        bottom_logits=logit_effects(features, "bottom", latent, text),
        lineage=lineage.follow(chosen.id, latent),
        relatives=lineage.relatives(chosen.id, latent),
        similar=similar(features, latent),
        interpretation=explanation(suite.directory, chosen.id, latent),
    )


def examples(features: Features, latent: int, sequences: np.ndarray, text: TokenText) -> list[LatentExample]:
    """Return the strongest examples of a latent, with the tokens of sequences (N, context) around them."""
    described = []
    for example in features.examples(latent):
        stop = example.start + len(example.activations)
        token_ids = sequences[example.sequence, example.start : stop].tolist()
        described.append(
            LatentExample(**example._asdict(), tokens=[text(token) for token in token_ids], token_ids=token_ids)
        )
    return described


def logit_effects(
    features: Features, side: Literal["top", "bottom"], latent: int, text: TokenText
) -> list[LogitEffect] | None:
    """Return the tokens that a latent promotes ("top") or suppresses ("bottom") most; None if not computed."""
    tensors = features.tensors()
    if f"{side}_logits" not in tensors:
        return None
    token_ids = tensors[f"{side}_logits"][latent].tolist()
    values = tensors[f"{side}_logits_values"][latent].tolist()
    effects = []
    for token_id, value in zip(token_ids, values, strict=True):
        effects.append(LogitEffect(token=text(token_id), token_id=token_id, value=value))
    return effects


def similar(features: Features, latent: int) -> dict[Literal["above", "below"], SimilarLatents]:
    """Return the most similar latents at the next and the previous layer."""
    tensors = features.tensors()
    sides: dict[Literal["above", "below"], SimilarLatents] = {}
    for side in ("above", "below"):
        leg = getattr(features.facts, side)
        if leg is None:
            continue
        latents = tensors[f"{side}_latents"][latent].tolist()
        cosines = tensors[f"{side}_cosine"][latent].tolist()
        rows = [SimilarLatent(latent=i, cosine=cosine) for i, cosine in zip(latents, cosines, strict=True)]
        sides[side] = SimilarLatents(leg=leg, latents=rows)
    return sides


def explanation(paths: RunDirectory, leg_id: str, latent: int) -> LatentExplanation | None:
    """Return a language model's explanation of a latent; None if it was not asked, or gave none."""
    document = Interpretation.load_if_any(paths.interpretation(leg_id))
    if document is None:
        return None
    for entry in document.latents:
        if entry.latent == latent and entry.explanation:
            return LatentExplanation(
                model=document.asked.model,
                explanation=entry.explanation,
                detection=entry.detection,
                fuzzing=entry.fuzzing,
            )
    return None
