"""The report's data: script files that a page opened from disk can load one by one (`fetch` is refused there).

    data/run.js                      facts of the run, its legs, its layers, counts of its lineage; loaded at once
    data/labels.js                   words for metrics, methods, statuses, origins and roles; loaded at once
    data/tokens.js, vocabulary.js    token ids of the test split, once; strings of the ids that occur anywhere
    data/index/<leg>.js              what the list of features shows and searches, one list per column
    data/features/<leg>/<n>.js       CHUNK features each: histogram, examples, logits, similar latents
    data/links/<n>.js                what became of each latent from one leg to another
    data/training.js, matrix.js, measures.js, interpretations.js

Each file except labels.js, which defines `labels`, is one call, `saerelay.feed(name, data)`. Token text and names are
not to be trusted: see `feed`.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from saerelay.runs.documents.interpretation import Interpretation, summarise
from saerelay.runs.documents.latents import STATUSES, LineageLink
from saerelay.runs.documents.quality import LegSummary, Summary
from saerelay.runs.documents.training import TrainingLine
from saerelay.runs.features import Features
from saerelay.views.labels import METRICS, for_js, place_name
from saerelay.views.report.sources import ReportSources

CHUNK = 512
"""Features per file."""
CURVE_POINTS = 400
"""Most points of a training curve."""
LEVELS = 99
"""Activations in examples are whole numbers from 0 to this, relative to the latent's largest."""


def feed(folder: Path, name: str, data: Any) -> None:
    """Write a data file: one call with a name and JSON, in ASCII and without `<`, so that no text can end the script.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> feed(folder, "a/b", ["</script>", chr(0x2028), chr(0xD800)])
    >>> print((folder / "a/b.js").read_text(), end="")
    saerelay.feed("a/b", ["\\u003c/script>","\\u2028","\\ud800"]);
    """
    path = folder / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"saerelay.feed({script_json(name)}, {script_json(data)});\n", encoding="ascii")


def script_json(data: Any) -> str:
    """Return JSON that is safe inside a script."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def write_data(sources: ReportSources, caption: str, folder: Path) -> None:
    """Write all data files of a run."""
    legs = []
    named = set[int]()
    n_sequences = 0
    for leg in sources.summary.legs:
        features = sources.features(leg.id)
        n_sequences = max(n_sequences, int(features.example_sequence.max()) + 1)
        named |= write_features(leg.id, features, sources.test, folder)
        legs.append(leg_facts(sources.summary, leg, features))

    rows = np.asarray(sources.test[:n_sequences])
    occurring = sorted(named | set(np.unique(rows).tolist()))
    feed(folder, "tokens", rows.tolist())
    feed(folder, "vocabulary", {token: sources.token_text(token) for token in occurring})
    feed(folder, "training", training_curves(sources.training))
    links = [write_link(i, link, folder) for i, link in enumerate(sources.lineage.links)]
    if sources.matrix:
        feed(folder, "matrix", sources.matrix.to_data())
    if sources.measures:
        feed(folder, "measures", sources.measures.to_data())
    if sources.interpretations:
        feed(folder, "interpretations", interpretation_columns(sources.interpretations))
    (folder / "labels.js").write_text(f"const labels = {script_json(for_js())};\n", encoding="ascii")
    feed(folder, "run", run_facts(sources, caption, legs, links))


def run_facts(
    sources: ReportSources, caption: str, legs: list[dict[str, Any]], links: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the data that the page needs at once."""
    lineage = sources.lineage
    return {
        "model": sources.summary.model,
        "caption": caption,
        "n_tokens": sources.summary.final_legs[0].n_eval_tokens,
        "metrics": METRICS,
        "chunk": CHUNK,
        "levels": LEVELS,
        "legs": legs,
        "kinds": sources.summary.kinds,
        "standing": [leg.id for leg in sources.summary.suite],
        "links": links,
        "lineage": {
            "n_tokens": lineage.n_tokens,
            "map_tokens": lineage.map_tokens,
            "kept_above": lineage.kept_above,
            "replaced_below": lineage.replaced_below,
            "alive_above": lineage.alive_above,
        },
        "has": {
            "matrix": sources.matrix is not None,
            "measures": sources.measures is not None,
            "interpretations": bool(sources.interpretations),
        },
    }


def leg_facts(summary: Summary, leg: LegSummary, features: Features) -> dict[str, Any]:
    """Return the data about a leg that the page needs at once."""
    return {
        "id": leg.id,
        "layer": leg.layer,
        "kind": leg.kind,
        "place": place_name(summary, leg),
        "role": leg.role,
        "control_of": leg.control_of,
        "control_kind": leg.control_kind,
        "parent": leg.parent,
        "method": leg.method,
        "origin": leg.origin,
        "made": leg.made,
        "n_latents": leg.n_latents,
        "fvu": leg.fvu,
        "l0": leg.l0,
        "features": features.facts.to_data(),
    }


def interpretation_columns(documents: Sequence[Interpretation]) -> dict[str, Any]:
    """Return scores by leg and by origin, and [explanation, detection, fuzzing] by leg and latent."""
    latents: dict[str, dict[int, list[Any]]] = {}
    for document in documents:
        explained = [entry for entry in document.latents if entry.explanation]
        latents[document.leg] = {
            entry.latent: [entry.explanation, entry.detection, entry.fuzzing] for entry in explained
        }
    return {**summarise(documents).to_data(), "latents": latents}


# --- features -------------------------------------------------------------------------------------------------------


def write_features(leg_id: str, features: Features, test: np.ndarray, folder: Path) -> set[int]:
    """Write a leg's index and its features in chunks; returns the token ids that occur in its logits."""
    feed(folder, f"index/{leg_id}", index_columns(features, test))
    columns = feature_columns(features)
    for first in range(0, len(features.n_fired), CHUNK):
        chunk = {name: column[first : first + CHUNK] for name, column in columns.items()}
        feed(folder, f"features/{leg_id}/{first // CHUNK}", chunk)
    named = set[int]()
    for tokens in (features.top_logits, features.bottom_logits):
        if tokens is not None:
            named.update(tokens.unique().tolist())
    return named


def index_columns(features: Features, test: np.ndarray) -> dict[str, list[Any]]:
    """Return the columns that the list of features shows and searches: frequency, strength, tokens, promoted tokens."""
    sequence = features.example_sequence.numpy()
    position = features.example_position.numpy()
    peaks = np.where(sequence >= 0, test[sequence, position].astype(np.int64), -1)
    columns: dict[str, list[Any]] = {
        "fired": features.n_fired.tolist(),
        "max": [short(value) for value in features.max_activation.tolist()],
        "peaks": [row[row >= 0].tolist() for row in peaks],
    }
    if features.top_logits is not None:
        columns["top"] = features.top_logits.tolist()
    return columns


def feature_columns(features: Features) -> dict[str, list[Any]]:
    """Return the contents of the pages of a leg's features, in compact form: lists with one entry per feature.

    An example is [sequence, position, place in the window, level, place, level, …] of the tokens it fires on; a
    histogram is [first bin, counts …]; logits are [token, change, …]; similar latents [latent, thousandths, …].
    """
    columns: dict[str, list[Any]] = {
        "fired": features.n_fired.tolist(),
        "max": [short(value) for value in features.max_activation.tolist()],
        "mean": [short(value) for value in features.mean_activation.tolist()],
        "histogram": [trimmed(counts) for counts in features.histogram.tolist()],
        "examples": example_column(features),
    }
    for name, ids, values in (
        ("top", features.top_logits, features.top_logits_values),
        ("bottom", features.bottom_logits, features.bottom_logits_values),
    ):
        if ids is not None and values is not None:
            columns[name] = interleaved(ids, [[short(value) for value in row] for row in values.tolist()])
    for name, ids, values in (
        ("above", features.above_latents, features.above_cosine),
        ("below", features.below_latents, features.below_cosine),
    ):
        if ids is not None and values is not None:
            columns[name] = interleaved(ids, [thousandths(row) for row in values.tolist()])
    return columns


def example_column(features: Features) -> list[list[list[int]]]:
    """Return the examples of each feature."""
    strongest = features.max_activation.clamp(min=1e-30)[:, None, None]
    levels = (features.example_window.float() * (LEVELS / strongest)).ceil().clamp(0, LEVELS).int()
    column = []
    for examples in zip(
        features.example_sequence.tolist(), features.example_position.tolist(), levels.tolist(), strict=True
    ):
        rows = []
        for sequence, position, window in zip(*examples, strict=True):
            if sequence < 0:
                continue
            row = [sequence, position]
            for i, level in enumerate(window):
                if level:
                    row += [i, level]
            rows.append(row)
        column.append(rows)
    return column


def interleaved(ids: Tensor, values: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    """Return rows [id, value, id, value, …] of ids (F, n) and as many rows of values.

    >>> import torch
    >>> interleaved(torch.tensor([[7, 8]]), [[0.5, None]])
    [[7, 0.5, 8, None]]
    """
    rows = []
    for own_ids, own_values in zip(ids.tolist(), values, strict=True):
        rows.append([part for pair in zip(own_ids, own_values, strict=True) for part in pair])
    return rows


def trimmed(counts: list[int]) -> list[int]:
    """Return a histogram without its empty ends, preceded by the index of its first bin.

    >>> trimmed([0, 0, 3, 0, 5, 0]), trimmed([0, 0])
    ([2, 3, 0, 5], [])
    """
    used = [i for i, n in enumerate(counts) if n]
    if not used:
        return []
    return [used[0], *counts[used[0] : used[-1] + 1]]


def short(value: float) -> float | None:
    """Round a number to the three digits that are shown.

    >>> short(0.123456), short(83.21999), short(2.0)
    (0.123, 83.2, 2)
    """
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.3g}")
    return int(rounded) if rounded == int(rounded) else rounded


# --- lineage and training -------------------------------------------------------------------------------------------


def write_link(number: int, link: LineageLink, folder: Path) -> dict[str, Any]:
    """Write one link of lineage.json with cosines in thousandths; returns its data without latents."""
    data = {
        "decoder_cosine": thousandths(link.decoder_cosine),
        "encoder_cosine": thousandths(link.encoder_cosine),
        "correlation": thousandths(link.correlation),
        "status": link.status,
        "partner": link.partner,
    }
    feed(folder, f"links/{number}", data)
    return {
        "kind": link.kind,
        "source": link.source,
        "target": link.target,
        "by": link.by,
        "counts": {letter: link.status.count(letter) for letter in STATUSES},
    }


def thousandths(values: Sequence[float | None]) -> list[int | None]:
    """Return values as whole thousandths."""
    return [None if value is None else round(1000 * value) for value in values]


def training_curves(lines: Sequence[TrainingLine]) -> dict[str, dict[str, list[Any]]]:
    """Return the training log by leg, one list per column; long lists are thinned."""
    logs: dict[str, list[TrainingLine]] = {}
    for line in lines:
        logs.setdefault(line.leg, []).append(line)
    curves = {}
    for leg_id, rows in logs.items():
        step = math.ceil(len(rows) / CURVE_POINTS)
        thinned = rows[:-1][::step] + rows[-1:]
        curves[leg_id] = {
            "age": [row.age for row in thinned],
            "loss": [row.loss for row in thinned],
            "fvu": [row.fvu for row in thinned],
            "l0": [row.l0 for row in thinned],
            "n_dead": [row.n_dead for row in thinned],
            "learning_rate": [row.learning_rate for row in thinned],
            "seconds": [row.seconds for row in thinned],
        }
    return curves
