"""Neuronpedia's upload: a folder of JSON lines for each source, as its importer reads them.

    <model>/<layer>-<set>/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl
                          features/batch-<n>.jsonl.gz, activations/..., explanations/...

A record has the columns that we have data for, and leaves the others to the database's defaults.
The importer takes the columns of a file from its first line, so all lines of a file have the same
keys; it cannot read an empty file, so none is written. This format is for measurements of an SAE,
not for the SAE itself; nothing here reads it.
"""

import gzip
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saerelay.document import Record
from saerelay.files import encodable
from saerelay.interop.names import hub_id
from saerelay.runs.features import Example, Features

NAME = "neuronpedia"
CREATOR = "clkht01d40000jv08hvalcvly"
"""Owner of the records: the account that every Neuronpedia database begins with."""
MOST_FILES = 1000
"""Most files of a kind: the importer asks for one list of names, which has no more entries."""
FEATURES_PER_FILE = 1024
BARS = 40
"""Number of bars in a histogram."""

_THEIR_NAMES = (
    ("^gpt2$", "gpt2-small"),
    (r"^llama-(\d)", r"llama\1"),
    ("^(gemma-3-.*)-pt$", r"\1"),
    ("-instruct$", "-it"),
    ("-base$", "-pt"),
)
"""Changes that Neuronpedia makes to the names of models."""


# --- records: one table of the database each ---------------------------------------------------


class Release(Record):
    """A release: SAEs that belong together, such as all SAEs of a paper."""

    name: str
    description: str
    creatorName: str
    creatorId: str = CREATOR
    visibility: str = "PUBLIC"
    urls: list[str] = []


class Model(Record):
    """A language model; a model that the database has already is left unchanged."""

    id: str
    displayName: str
    displayNameShort: str
    owner: str
    layers: int
    dimension: int
    neuronsPerLayer: int = 0
    instruct: bool = False
    inferenceEnabled: bool = False
    website: str | None = None
    creatorId: str = CREATOR
    visibility: str = "PUBLIC"


class SourceSet(Record):
    """SAEs of one kind, at any number of layers."""

    name: str
    modelId: str
    releaseName: str
    description: str
    creatorName: str
    creatorId: str = CREATOR
    visibility: str = "PUBLIC"
    urls: list[str] = []


class Source(Record):
    """One SAE."""

    id: str
    modelId: str
    setName: str
    num_prompts: int
    num_tokens_in_prompt: int
    dataset: str | None = None
    hfRepoId: str | None = None
    hasDashboards: bool = True
    inferenceEnabled: bool = False
    creatorId: str = CREATOR
    visibility: str = "PUBLIC"


class Feature(Record):
    """One latent; `layer` is the id of its source."""

    modelId: str
    layer: str
    index: str
    sourceSetName: str
    creatorId: str = CREATOR
    maxActApprox: float
    frac_nonzero: float
    freq_hist_data_bar_values: list[float]
    freq_hist_data_bar_heights: list[float]
    pos_str: list[str]
    pos_values: list[float]
    neg_str: list[str]
    neg_values: list[float]


class Activation(Record):
    """A piece of text on which a latent fires."""

    id: str
    modelId: str
    layer: str
    index: str
    creatorId: str = CREATOR
    tokens: list[str]
    values: list[float]
    maxValue: float
    maxValueTokenIndex: int
    minValue: float


class Explanation(Record):
    """An explanation of a latent, in words."""

    id: str
    modelId: str
    layer: str
    index: str
    authorId: str = CREATOR
    description: str
    notes: str


class Explained(NamedTuple):
    """A latent, its explanation, and the author of the explanation."""

    latent: int
    text: str
    notes: str


class Upload(NamedTuple):
    """The four records that a folder begins with."""

    release: Release
    model: Model
    source_set: SourceSet
    source: Source


# --- names -------------------------------------------------------------------------------------


def model_id(public_name: str) -> str:
    """Return Neuronpedia's name of a model.

    >>> model_id("google/gemma-3-270m"), model_id("google/gemma-3-1b-pt"), model_id("openai-community/gpt2")
    ('gemma-3-270m', 'gemma-3-1b', 'gpt2-small')
    """
    name = slug(public_name.split("/")[-1])
    for pattern, replacement in _THEIR_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def slug(text: str) -> str:
    """Turn a text into a part of an address: small letters, digits, dots and single dashes.

    >>> slug("My suite: Gemma__3")
    'my-suite-gemma-3'
    """
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-") or "unnamed"


def model_record(public_name: str, n_layers: int, d_model: int, *, author: str) -> Model:
    """Return the record of a model, for databases that do not have it."""
    identifier = model_id(public_name)
    on_hub = hub_id(public_name)
    return Model(
        id=identifier,
        displayName=identifier,
        displayNameShort=identifier,
        owner=on_hub.split("/")[0] or author,
        layers=n_layers,
        dimension=d_model,
        instruct=identifier.endswith("-it"),
        website=f"https://huggingface.co/{on_hub}" if on_hub else None,
    )


# --- writing -----------------------------------------------------------------------------------


def write_source(
    root: Path,
    upload: Upload,
    features: Features,
    sequences: np.ndarray,
    *,
    token_text: Callable[[int], str],
    explanations: Sequence[Explained] = (),
) -> Path:
    """Write all that is known about an SAE's latents; returns the folder, below `root`.

    `sequences` (N, context) are the token ids on which the features were computed.
    """
    source = upload.source
    folder = root / source.modelId / source.id
    folder.mkdir(parents=True)
    write_lines(folder / "release.jsonl", [upload.release])
    write_lines(folder / "model.jsonl", [upload.model])
    write_lines(folder / "sourceset.jsonl", [upload.source_set])
    write_lines(folder / "source.jsonl", [source])

    text_of = cache(lambda token: storable(token_text(token)))
    n_latents = len(features.n_fired)
    per_file = max(FEATURES_PER_FILE, math.ceil(n_latents / MOST_FILES))
    for number, first in enumerate(range(0, n_latents, per_file)):
        latents = range(first, min(first + per_file, n_latents))
        name = f"batch-{number}.jsonl.gz"
        write_lines(folder / "features" / name, [_feature(source, features, i, text_of) for i in latents])
        activations = [record for i in latents for record in _activations(source, features, i, sequences, text_of)]
        write_lines(folder / "activations" / name, activations)
    write_lines(folder / "explanations" / "batch-0.jsonl.gz", [_explanation(source, each) for each in explanations])
    return folder


def write_lines(path: Path, records: Sequence[Record]) -> None:
    """Write records as lines of JSON, compressed if the name says so; no file if there are none."""
    if not records:
        return
    lines = [json.dumps(record.model_dump(mode="json"), allow_nan=False, separators=(",", ":")) for record in records]
    content = "".join(f"{line}\n" for line in lines).encode("ascii")
    if path.suffix == ".gz":
        content = gzip.compress(content, compresslevel=6, mtime=0)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def storable(text: str) -> str:
    """Return a text without characters that their database refuses: zero bytes and halves of UTF-16 pairs.

    >>> storable(chr(0) + "a" + chr(0xD800))
    ' a?'
    """
    return encodable(text.replace("\0", " "))


def _feature(source: Source, features: Features, latent: int, text_of: Callable[[int], str]) -> Feature:
    values, heights = bars(features, latent)
    pos_str, pos_values = _logits(features.top_logits, features.top_logits_values, latent, text_of)
    neg_str, neg_values = _logits(features.bottom_logits, features.bottom_logits_values, latent, text_of)
    return Feature(
        modelId=source.modelId,
        layer=source.id,
        index=str(latent),
        sourceSetName=source.setName,
        maxActApprox=_short(float(features.max_activation[latent])),
        frac_nonzero=int(features.n_fired[latent]) / max(1, features.facts.n_tokens),
        freq_hist_data_bar_values=values,
        freq_hist_data_bar_heights=heights,
        pos_str=pos_str,
        pos_values=pos_values,
        neg_str=neg_str,
        neg_values=neg_values,
    )


def bars(features: Features, latent: int) -> tuple[list[float], list[float]]:
    """Return middles and heights of a histogram's bars, from 0 to a latent's largest activation; none if silent.

    Our counts are in half octaves, but their plot draws bars of equal width, so a count is spread
    evenly over the bars that its half octave covers.
    """
    counts = features.histogram[latent].double().numpy()
    largest = float(features.max_activation[latent])
    if not counts.any() or not largest > 0:
        return [], []
    first = features.facts.histogram_first_edge
    edges = (2.0 ** (first + np.arange(len(counts) + 1) / 2)).clip(max=largest)
    below = np.concatenate([[0.0], counts.cumsum()])
    ends = np.linspace(0, largest, BARS + 1)
    heights = np.diff(np.interp(ends, edges, below))
    middles = (ends[1:] + ends[:-1]) / 2
    return [_short(value) for value in middles.tolist()], [_short(value) for value in heights.tolist()]


def _logits(
    tokens: Tensor | None, values: Tensor | None, latent: int, text_of: Callable[[int], str]
) -> tuple[list[str], list[float]]:
    """Return the tokens whose logits a latent changes most, and by how much; none if not computed."""
    if tokens is None or values is None:
        return [], []
    texts = [text_of(token) for token in tokens[latent].tolist()]
    numbers = torch.nan_to_num(values[latent].float()).tolist()
    return texts, [_short(value) for value in numbers]


def _activations(
    source: Source, features: Features, latent: int, sequences: np.ndarray, text_of: Callable[[int], str]
) -> Iterator[Activation]:
    for example in features.examples(latent):
        values = [_short(value) for value in example.activations]
        tokens = sequences[example.sequence, example.start : example.start + len(values)]
        largest = max(values)
        yield Activation(
            id=_identifier(source, latent, example),
            modelId=source.modelId,
            layer=source.id,
            index=str(latent),
            tokens=[text_of(token) for token in tokens.tolist()],
            values=values,
            maxValue=largest,
            maxValueTokenIndex=values.index(largest),
            minValue=min(values),
        )


def _explanation(source: Source, explained: Explained) -> Explanation:
    return Explanation(
        id=_identifier(source, explained.latent, explained.text),
        modelId=source.modelId,
        layer=source.id,
        index=str(explained.latent),
        description=storable(explained.text),
        notes=storable(explained.notes),
    )


def _identifier(source: Source, latent: int, what: Example | str) -> str:
    """Return the key of a row: always the same key, so that importing again makes no duplicates."""
    where = (what.sequence, what.position) if isinstance(what, Example) else what
    digest = hashlib.blake2b(repr((source.modelId, source.id, latent, where)).encode(), digest_size=12)
    return f"c{digest.hexdigest()}"


def _short(value: float) -> float:
    """Round a number to five digits."""
    return float(f"{value:.5g}")
