"""The measures of Ghilardi et al. 2024 for all legs and snapshots of a run: `measures.json`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from saerelay.analysis.attribution import OWN_TASK, direct_logit_attribution, last_activations, own_prompts
from saerelay.analysis.features import make_features
from saerelay.analysis.matrix import matrix_again
from saerelay.analysis.metrics import Placed, measure, snapshot_key
from saerelay.analysis.prompts import Prompt, digest, read_prompts
from saerelay.analysis.session import Session
from saerelay.analysis.similarity import feature_transferability, mean_max_cosine, transfer_score, values_by_offset
from saerelay.analysis.summary import shown_metrics
from saerelay.analysis.versions import LegVersion, finished, load_versions
from saerelay.runs.documents.across_layers import (
    Attribution,
    Attributions,
    Matrix,
    MatrixCell,
    Measures,
    MeasuresQuestion,
    OffsetMean,
    Similarity,
    Transferability,
    TransferScore,
)
from saerelay.runs.documents.quality import Metrics
from saerelay.runs.features import load_features
from saerelay.runs.suite import PublishedSuite

HIGHER_IS_BETTER = {"fvu": False, "explained_variance": True, "ce_loss_score": True}
"""Metrics with a transfer score."""
OFFSET_METRICS = (*HIGHER_IS_BETTER, "l0", "delta_ce", "kl_div_score")


@torch.no_grad()
def measures(session: Session, *, prompts: Path | None = None, tokens: int = 0) -> Measures:
    """Take all measures of a run's legs and snapshots; writes measures.json, unless it already answers the question.

    `tokens` is the number of tokens of the test split (`evaluate.tokens` if 0); `prompts` is a file for `read_prompts`.
    Transfer scores and offsets come from matrix.json, which is measured again if it is out of date; they are None if
    there is no matrix.json. Missing features are computed first.
    """
    given = read_prompts(prompts, session.plan) if prompts else None
    matrix = matrix_again(session)
    asked = question(session, given, matrix, tokens)
    path = session.suite.directory.measures
    current = Measures.load_current(path, asked)
    if current is not None:
        return current

    make_features(session, tokens=tokens)
    sequences = session.held_out(tokens)
    W_U = session.model.unembedding() if given else session.unembedding
    versions = load_versions(session, sequences, W_U)
    facts = session.plan.facts
    document = Measures(
        model=facts.name,
        revision=facts.revision,
        module=session.suite.modules,
        n_tokens=load_features(session.suite.directory, session.suite.legs[0].id).facts.n_tokens,
        map_tokens=session.maps.tokens,
        asked=asked,
        n_matrix_tokens=matrix.n_tokens if matrix else None,
        similarity=similarities(session, versions),
        transferability=None if W_U is None else transferabilities(session.suite, versions),
        transfer_scores=transfer_scores(session, versions, matrix) if matrix else None,
        offsets=offsets(session.suite, matrix) if matrix else None,
        dla=None if W_U is None else attributions(session, versions, W_U, given, prompts, sequences),
    )
    document.save(path)
    return document


def measures_again(session: Session) -> Measures | None:
    """Return a run's measures, taken again if its legs or its matrix have changed since; None if it has none."""
    old = Measures.load_if_any(session.suite.directory.measures)
    if old is None:
        return None
    return current_measures(session, matrix_again(session)) or measures(session, tokens=old.asked.tokens)


def current_measures(session: Session, matrix: Matrix | None) -> Measures | None:
    """Return a run's measures.json, if it is about the run's present legs and `matrix`; else None.

    Its prompts do not matter, since a file that was given then may no longer be there.
    """
    old = Measures.load_if_any(session.suite.directory.measures)
    if old is None:
        return None
    asked = question(session, None, matrix, old.asked.tokens)
    return old if old.is_current(asked.changed(prompts=old.asked.prompts)) else None


def question(
    session: Session, prompts: Sequence[Prompt] | None, matrix: Matrix | None, tokens: int
) -> MeasuresQuestion:
    """Return the question that measures answer."""
    suite = session.suite
    return MeasuresQuestion(
        tokens=session.n_held_out(tokens),
        prompts=digest(prompts) if prompts is not None else None,
        matrix=matrix.asked if matrix else None,
        dictionaries=suite.digest(suite.legs, snapshots=True),
        legs={leg.id: [suite.info(leg).tokens, *suite.directory.ages(leg)] for leg in suite.legs},
    )


# --- similarity and transferability ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two dictionaries to compare."""

    kind: Literal["suite", "hop", "scratch"]
    source: LegVersion
    target: LegVersion
    about: LegVersion
    """The one of the two that the comparison is about."""


def similarities(session: Session, versions: Sequence[LegVersion]) -> list[Similarity]:
    """Look for the source's latents among the target's, raw and carried by x_target ≈ A x_source, per comparison."""
    comparisons = comparisons_of(session.suite, versions)
    maps = session.maps.between(sorted({(c.source.leg.site_out, c.target.leg.site_out) for c in comparisons}))
    rows = []
    for c in comparisons:
        A = maps[c.source.leg.site_out, c.target.leg.site_out].A
        rows.append(similarity(c, A, session.model.device))
    return rows


def comparisons_of(suite: PublishedSuite, versions: Sequence[LegVersion]) -> list[Comparison]:
    """Return the pairs between which similarity is measured, in both directions; see docs/run-directory.md."""
    legs = finished(versions)
    comparisons = []
    for a, b in permutations(suite.one_per_site, 2):
        if a.kind == b.kind:
            comparisons.append(Comparison("suite", legs[a.id], legs[b.id], about=legs[b.id]))
    for version in versions:
        others: list[tuple[Literal["hop", "scratch"], LegVersion]] = []
        parent = legs.get(suite.transferred_from(version.leg))
        if parent:
            others.append(("hop", parent))
        if suite.is_transferred(version.leg):
            for leg in suite.scratch_counterparts(version.leg):
                others.append(("scratch", legs[leg.id]))
        for kind, other in others:
            comparisons.append(Comparison(kind, other, version, about=version))
            comparisons.append(Comparison(kind, version, other, about=version))
    return comparisons


def similarity(comparison: Comparison, A: Tensor, device: torch.device) -> Similarity:
    """Return the row of measures.json for a comparison."""
    source = comparison.source
    target = comparison.target
    P = source.dictionary.W_dec.to(device)
    Q = target.dictionary.W_dec.to(device)
    alive_p = source.alive.to(device)
    alive_q = target.alive.to(device)
    return Similarity(
        kind=comparison.kind,
        leg=comparison.about.leg.id,
        tokens=comparison.about.tokens,
        snapshot=comparison.about.snapshot,
        source=source.leg.id,
        target=target.leg.id,
        source_layer=source.leg.layer,
        target_layer=target.leg.layer,
        mmcs=mean_max_cosine(P, Q, alive_p, alive_q),
        mmcs_folded=mean_max_cosine(P @ A.T.to(P), Q, alive_p, alive_q),
    )


def transferabilities(suite: PublishedSuite, versions: Sequence[LegVersion]) -> list[Transferability]:
    """Compare every transferred leg and snapshot with its parent, by index, if both have the same number of latents."""
    legs = finished(versions)
    rows = []
    for child in versions:
        parent = legs.get(suite.transferred_from(child.leg))
        if parent is None or not suite.is_transferred(child.leg):
            continue
        if not parent.associations or not child.associations or len(parent.alive) != len(child.alive):
            continue
        alive = parent.alive & child.alive
        shares: dict[str, Any] = {**feature_transferability(parent.associations, child.associations, alive)}
        rows.append(
            Transferability(
                **child.facts,
                parent=parent.leg.id,
                parent_layer=parent.leg.layer,
                n_latents=int(alive.sum()),
                **shares,
            )
        )
    return rows


# --- scores and offsets, from the matrix ----------------------------------------------------------------------------


def transfer_scores(session: Session, versions: Sequence[LegVersion], matrix: Matrix) -> list[TransferScore]:
    """Score each transferred leg and snapshot between zero-shot and each leg from scratch at its site.

    All three are measured on the tokens of matrix.json; versions that it does not hold (controls, perhaps snapshots)
    are measured on them here. A leg whose parent reads another kind of module has no zero-shot value: the matrix
    carries a dictionary only to other layers.
    """
    suite = session.suite
    legs = finished(versions)
    triples = []
    for version in versions:
        parent = legs.get(suite.transferred_from(version.leg))
        if parent and parent.leg.kind == version.leg.kind and suite.is_transferred(version.leg):
            for scratch in suite.scratch_counterparts(version.leg):
                triples.append((version, parent, legs[scratch.id]))
    at_home = metrics_at_home(session, matrix, [v for version, _, scratch in triples for v in (version, scratch)])
    carried = {(cell.leg, cell.tokens, cell.method, cell.target): cell for cell in matrix.cells}

    rows = []
    for version, parent, scratch in triples:
        hop_method = suite.method(suite.plan.first_of(version.leg)) or "identity"
        for method in dict.fromkeys(("identity", hop_method)):
            zero_shot = carried.get((parent.leg.id, parent.tokens, method, version.leg.layer))
            if zero_shot is None:
                continue
            scores = {}
            for metric in HIGHER_IS_BETTER:
                values = [getattr(m, metric) for m in (at_home[version.key], zero_shot, at_home[scratch.key])]
                scores[metric] = score_of(metric, *values)
            rows.append(
                TransferScore(
                    **version.facts,
                    parent=parent.leg.id,
                    parent_layer=parent.leg.layer,
                    method=method,
                    scratch=scratch.leg.id,
                    scratch_tokens=suite.tokens_before(scratch.leg) + scratch.tokens,
                    scratch_kind=scratch.leg.control_kind or "root",
                    **scores,
                )
            )
    return rows


def metrics_at_home(session: Session, matrix: Matrix, versions: Sequence[LegVersion]) -> dict[str, Metrics]:
    """Return the metrics of versions at their own layers, by key: from the matrix, or else measured on its tokens."""
    home = {}
    for cell in matrix.cells:
        if cell.source == cell.target:
            key = snapshot_key(cell.leg, cell.tokens) if cell.snapshot else cell.leg
            home[key] = cell
    missing = {version.key: version for version in versions if version.key not in home}
    if missing:
        dictionaries = {key: Placed.at_home(version.leg, version.dictionary) for key, version in missing.items()}
        sequences = session.held_out(matrix.asked.tokens)
        measured = measure(session.plan, session.model, sequences, dictionaries, ce=matrix.asked.ce)
        home |= {key: Metrics(**shown_metrics(metrics)) for key, metrics in measured.items()}
    return home


def score_of(metric: str, transferred: float | None, zero_shot: float | None, scratch: float | None) -> float | None:
    """Return a transfer score, or None if zero-shot is already as good as scratch, so that there was nothing to gain.

    >>> score_of("fvu", 0.125, 0.25, 0.0), score_of("fvu", 0.08, 0.1, 0.11)
    (0.5, None)
    """
    if zero_shot is None or scratch is None:
        return None
    gain = scratch - zero_shot if HIGHER_IS_BETTER[metric] else zero_shot - scratch
    return transfer_score(transferred, zero_shot, scratch) if gain > 0 else None


def offsets(suite: PublishedSuite, matrix: Matrix) -> list[OffsetMean]:
    """Average the metrics of matrix.json by layer offset, per kind and method: finished legs first, then snapshots."""
    rows = []
    for kind in suite.kinds:
        legs = {leg.id for leg in suite.one_per_site if leg.kind == kind}
        cells = [cell for cell in matrix.cells if cell.leg in legs]
        ages = sorted({cell.tokens for cell in cells if cell.snapshot})
        for age in (None, *ages):
            of_age = [cell for cell in cells if (cell.tokens if cell.snapshot else None) == age]
            rows += offset_means(str(kind), age, of_age)
    return rows


def offset_means(kind: str, age: int | None, cells: Sequence[MatrixCell]) -> list[OffsetMean]:
    """Average the metrics of some cells by layer offset, per method; `age` is that of their snapshots, if they are."""
    rows = []
    for metric in OFFSET_METRICS:
        for method in dict.fromkeys(cell.method for cell in cells):
            for offset, values in values_by_offset(cells, metric, method).items():
                mean = sum(values) / len(values)
                rows.append(
                    OffsetMean(
                        kind=kind, metric=metric, method=method, tokens=age, offset=offset, mean=mean, n=len(values)
                    )
                )
    return rows


# --- direct logit attribution ---------------------------------------------------------------------------------------


def attributions(
    session: Session,
    versions: Sequence[LegVersion],
    W_U: Tensor,
    given: Sequence[Prompt] | None,
    file: Path | None,
    sequences: np.ndarray,
) -> Attributions:
    """Take the direct logit attribution of each leg and snapshot on the given prompts, or on the model's own task."""
    model = session.model
    prompts = given if given is not None else own_prompts(session.plan, model, sequences)
    attributed = [version for version in versions if version.associations] if prompts else []
    x = {}
    if attributed:
        x = last_activations(model, prompts, sorted({version.leg.site for version in attributed}))
    directions = W_U[[prompt.right for prompt in prompts]] - W_U[[prompt.wrong for prompt in prompts]]
    rows = []
    for version in attributed:
        dictionary = version.dictionary.to(W_U.device)
        scores, latents = direct_logit_attribution(dictionary, x[version.leg.site], directions)
        error = float(scores.std()) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
        rows.append(
            Attribution(
                **version.facts,
                mean=float(scores.mean()),
                standard_error=error,
                scores=[round(score, 4) for score in scores.tolist()],
                latents=latents.tolist(),
            )
        )
    return Attributions(prompts=file.name if file else OWN_TASK, n_prompts=len(prompts), legs=rows)
