"""The report's data: script files that a page opened from disk can load one by one (`fetch` is refused there).

    data/run.js                      facts of the run, its legs, its layers, counts of its lineage; loaded at once
    data/tokens.js, vocabulary.js    token ids of the test split, once; strings of the ids that occur anywhere
    data/index/<leg>.js              what the list of features shows and searches, a column each
    data/features/<leg>/<n>.js       CHUNK features each: histogram, examples, logits, similar latents
    data/links/<n>.js                what became of each latent from one leg to another
    data/training.js, matrix.js, measures.js, interpretations.js

Each is one call, `saerelay.feed(name, data)`. Token text and names come from strangers: see `feed`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saerelay.analysis.features import Features, load_features
from saerelay.analysis.interpret import read_interpretations, summarise
from saerelay.analysis.lineage import token_texts
from saerelay.data.corpus import Corpus
from saerelay.files import finite, read_json
from saerelay.runs.suite import PublishedSuite
from saerelay.views.figures import METRICS

CHUNK = 512
"""Features a file."""
CURVE_POINTS = 400
"""Of a training curve, at most."""
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
    """JSON that may stand in a script."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def write_data(suite: PublishedSuite, summary: dict[str, Any], caption: str, folder: Path) -> None:
    """Write all data files of a run; its features, and summary.json as a dict, must be there."""
    paths, test = suite.directory, Corpus.open(suite.directory.tokens).test
    lineage = read_json(paths.lineage)
    legs, occurring, n_sequences = [], set[int](), 0
    for leg in summary["legs"]:
        features = load_features(paths, leg["id"])
        n_sequences = max(n_sequences, int(features.example_sequence.max()) + 1)
        occurring |= write_features(leg["id"], features, test, folder)
        kept = ("id", "layer", "role", "control_of", "control_kind", "parent", "method", "n_latents", "fvu", "l0")
        legs.append({name: leg[name] for name in kept} | {"features": features.facts})
    standing = [leg.id for leg in suite.one_per_site]
    rows = np.asarray(test[:n_sequences])
    feed(folder, "tokens", rows.tolist())
    text = token_texts(suite.plan)
    feed(folder, "vocabulary", {i: text(i) for i in sorted(occurring | set(np.unique(rows).tolist()))})
    feed(folder, "training", training_curves(paths.metrics))
    links = [write_link(i, link, folder) for i, link in enumerate(lineage["links"])]
    for name, path in (("matrix", paths.matrix), ("measures", paths.measures)):
        if path.is_file():
            feed(folder, name, finite(read_json(path)))
    interpretations = read_interpretations(paths, [leg["id"] for leg in summary["legs"]])
    if interpretations:
        feed(folder, "interpretations", finite(interpretation_columns(interpretations)))
    run = {
        "model": summary["model"],
        "caption": caption,
        "metrics": METRICS,
        "chunk": CHUNK,
        "levels": LEVELS,
        "legs": legs,
        "standing": standing,
        "links": links,
        "lineage": {
            name: lineage[name] for name in ("n_tokens", "map_tokens", "kept_above", "replaced_below", "alive_above")
        },
        "has": {
            "matrix": paths.matrix.is_file(),
            "measures": paths.measures.is_file(),
            "interpretations": bool(interpretations),
        },
    }
    feed(folder, "run", finite(run))


def interpretation_columns(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores by leg and by origin, and by leg and latent [explanation, detection, fuzzing]."""
    latents = {
        document["leg"]: {
            entry["latent"]: [entry["explanation"], entry["detection"], entry["fuzzing"]]
            for entry in document["latents"]
            if entry["explanation"]
        }
        for document in documents
    }
    return summarise(documents) | {"latents": latents}


# --- features ---------------------------------------------------------------------------------------------------


def write_features(leg_id: str, features: Features, test: np.ndarray, folder: Path) -> set[int]:
    """Write a leg's index and its features in chunks; the token ids that its logits name."""
    sequence, position = features.example_sequence.numpy(), features.example_position.numpy()
    peaks = np.where(sequence >= 0, test[sequence, position].astype(np.int64), -1)
    logits = {} if features.top_logits is None else {"top": features.top_logits.tolist()}
    index = {
        "fired": features.n_fired.tolist(),
        "max": [short(value) for value in features.max_activation.tolist()],
        "peaks": [row[row >= 0].tolist() for row in peaks],
    }
    feed(folder, f"index/{leg_id}", index | logits)
    columns = feature_columns(features)
    for first in range(0, len(features.n_fired), CHUNK):
        chunk = {name: column[first : first + CHUNK] for name, column in columns.items()}
        feed(folder, f"features/{leg_id}/{first // CHUNK}", chunk)
    named = [t.unique().tolist() for t in (features.top_logits, features.bottom_logits) if t is not None]
    return {i for ids in named for i in ids}


def feature_columns(features: Features) -> dict[str, list[Any]]:
    """What the pages of a leg's features show, in short: lists with an entry for each.

    An example is [sequence, position, place in the window, level, place, level, …] of the tokens it fires on, a
    histogram [first bin, counts …]; logits are [token, hundredths, …], similar latents [latent, thousandths, …].
    """
    strongest = features.max_activation.clamp(min=1e-30)[:, None, None]
    levels = (features.example_window.float() * (LEVELS / strongest)).ceil().clamp(0, LEVELS).int().tolist()
    sequences, positions = features.example_sequence.tolist(), features.example_position.tolist()
    columns = {
        "fired": features.n_fired.tolist(),
        "max": [short(value) for value in features.max_activation.tolist()],
        "mean": [short(value) for value in features.mean_activation.tolist()],
        "histogram": [trimmed(counts) for counts in features.histogram.tolist()],
        "examples": [
            [
                [sequence, position, *(n for place, level in enumerate(window) if level for n in (place, level))]
                for sequence, position, window in zip(*latent, strict=True)
                if sequence >= 0
            ]
            for latent in zip(sequences, positions, levels, strict=True)
        ],
    }
    for name, ids, values, unit in (
        ("top", features.top_logits, features.top_logits_values, 100),
        ("bottom", features.bottom_logits, features.bottom_logits_values, 100),
        ("above", features.above_latents, features.above_cosine, 1000),
        ("below", features.below_latents, features.below_cosine, 1000),
    ):
        if ids is not None and values is not None:
            rounded = (values.float() * unit).round().int()
            columns[name] = torch.stack([ids, rounded], dim=-1).flatten(1).tolist()
    return columns


def trimmed(counts: list[int]) -> list[int]:
    """A histogram without its empty ends, behind the number of its first bin.

    >>> trimmed([0, 0, 3, 0, 5, 0]), trimmed([0, 0])
    ([2, 3, 0, 5], [])
    """
    used = [i for i, n in enumerate(counts) if n]
    return [used[0], *counts[used[0] : used[-1] + 1]] if used else []


def short(value: float) -> float | None:
    """A number to three digits: what is shown of it.

    >>> short(0.123456), short(83.21999), short(2.0)
    (0.123, 83.2, 2)
    """
    rounded = finite(float(f"{value:.3g}"))
    return int(rounded) if rounded is not None and rounded == int(rounded) else rounded


# --- lineage and training ---------------------------------------------------------------------------------------


def write_link(number: int, link: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write one link of lineage.json with cosines in thousandths; what is known of it without its latents."""
    lists = ("decoder_cosine", "encoder_cosine", "correlation")
    thousandths = {name: [None if c is None else round(1000 * c) for c in link[name]] for name in lists}
    status = "".join(link["status"])
    feed(folder, f"links/{number}", thousandths | {"status": status, "partner": link["partner"]})
    about = {name: link[name] for name in ("kind", "source", "target", "by")}
    return about | {"counts": {letter: status.count(letter) for letter in "kdrxb-"}}


def training_curves(path: Path) -> dict[str, dict[str, list[Any]]]:
    """The training log by leg, a list for each column; long ones thinned."""
    logs: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        logs.setdefault(row["leg"], []).append(row)
    curves = {}
    for leg_id, rows in logs.items():
        step = -(-len(rows) // CURVE_POINTS)
        shown = rows[:-1][::step] + rows[-1:]
        columns = ("age", "loss", "fvu", "l0", "n_dead", "learning_rate", "seconds")
        curves[leg_id] = {name: [finite(row.get(name)) for row in shown] for name in columns}
    return curves
