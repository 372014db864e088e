"""The judging page: one file, opened from disk, on which people judge latents blind.

It shows where each latent fires and which tokens it promotes, in random order, but not where latents come from.
`workflows.judge` draws the latents and keeps the key.
"""

import base64
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np

from saerelay.files import encodable
from saerelay.runs.documents.judging import JudgedItem
from saerelay.runs.features import Example, Features
from saerelay.views.report.data import LEVELS, script_json

BEYOND = 8
"""Tokens shown on either side of an example's window, whose activations are not known."""
GENERATOR = '<meta name="generator" content="saerelay judge">'
"""A mark in every judging page, by which an older page is recognised."""


def page_data(
    items: Sequence[JudgedItem], features: Mapping[str, Features], test: np.ndarray, text: Callable[[int], str]
) -> dict[str, Any]:
    """Return all of the page's data: the texts of tokens, and the items, with tokens as indices into these texts.

    `features` are by leg id, `test` holds the tokens (N, context) of the test split, and `text` gives the text of a
    token. Activations are levels from 0 to LEVELS, relative to the latent's largest (-1 where they are not known);
    effects on logits are relative to the latent's largest effect. Their absolute values would give the layer away.
    """
    numbers: dict[str, int] = {}

    def number_of(token: int) -> int:
        return numbers.setdefault(text(token), len(numbers))

    rows = []
    for item in items:
        leg_features = features[item.leg]
        strongest = float(leg_features.max_activation[item.latent])
        examples = []
        for example in leg_features.examples(item.latent):
            examples.append(_example(example, strongest, test[example.sequence], number_of))
        rows.append({"examples": examples, **_logits(leg_features, item.latent, number_of)})
    return {"texts": list(numbers), "items": rows}


def _example(example: Example, strongest: float, row: np.ndarray, number_of: Callable[[int], int]) -> dict[str, Any]:
    """Return an example's tokens, with some beyond its window, their levels, and the index of the strongest."""
    stop = example.start + len(example.activations)
    first = max(0, example.start - BEYOND)
    last = min(len(row), stop + BEYOND)
    levels = [min(LEVELS, math.ceil(LEVELS * activation / strongest)) for activation in example.activations]
    return {
        "peak": example.position - first,
        "tokens": [number_of(token) for token in row[first:last].tolist()],
        "levels": [-1] * (example.start - first) + levels + [-1] * (last - stop),
    }


def _logits(features: Features, latent: int, number_of: Callable[[int], int]) -> dict[str, Any]:
    """Return the tokens that a latent promotes and suppresses most; nothing if they were not computed."""
    tensors = features.tensors()
    if "top_logits_values" not in tensors or "bottom_logits_values" not in tensors:
        return {}
    values = {side: tensors[f"{side}_logits_values"][latent].float() for side in ("top", "bottom")}
    largest = max(float(effects.abs().max()) for effects in values.values()) or 1.0
    sides = {}
    for side, effects in values.items():
        tokens = [number_of(token) for token in tensors[f"{side}_logits"][latent].tolist()]
        pairs = zip(tokens, effects.tolist(), strict=True)
        sides[side] = [[token, round(effect / largest, 2)] for token, effect in pairs]
    return sides


def page_name(seed: int, data: Mapping[str, Any]) -> str:
    """Return the name of a page: a digest of the seed and the page's data."""
    return hashlib.blake2b(script_json([seed, data]).encode(), digest_size=6).hexdigest()


def page_html(model: str, page: str, data: Mapping[str, Any]) -> str:
    """Return the whole page, with styles, scripts and data inside; its content policy allows them and no request."""
    report = files("saerelay.views.report")
    judge = files("saerelay.views.judge")
    style = "".join(path.read_text(encoding="utf-8") for path in (report / "style.css", judge / "judge.css"))
    script = "".join(path.read_text(encoding="utf-8") for path in (report / "core.js", judge / "judge.js"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((judge / "page.html").read_text(encoding="utf-8"))
    content = {"page": page, "levels": LEVELS, **data}
    html = template.render(
        model=model,
        data=script_json(content),
        style=style,
        script=script,
        hashes=[_content_hash(style), _content_hash(script)],
    )
    return encodable(html)


def _content_hash(text: str) -> str:
    """Return the name by which a content policy allows a style or a script: its hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
