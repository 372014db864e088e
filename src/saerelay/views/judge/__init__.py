"""`saerelay judge`: do people make as much of transferred latents as of others? One page to judge them on, blind.

judging/<page>.html     the page: one file, opened from disk; latents in random order, and not where they come from
judging/<page>.json     its key: which latent of which leg each is; for `saerelay.views.judge.score`, not for judges
judging/scores.json     what judges said, by origin and by layer
"""

import base64
import hashlib
import math
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from rich.console import Console

from saerelay.analysis.features import Example, Features, features_run, load_features
from saerelay.analysis.lineage import token_texts
from saerelay.data.corpus import Corpus
from saerelay.errors import RunDirectoryError
from saerelay.files import write_json, write_text
from saerelay.planning.plan import Leg, Plan
from saerelay.runs.suite import PublishedSuite
from saerelay.site import Site
from saerelay.spec import seed_from
from saerelay.views.report.data import LEVELS, script_json

SCHEMA_VERSION = 1
ORIGINS = ("scratch", "forward", "backward")
PREFERRED = ("", "full", "equal_tokens")
"""Control kinds, by how gladly a leg from scratch is taken: one of the suite, then the control with more tokens."""
BEYOND = 8
"""Tokens shown on either side of an example's window, where activations are not known."""
OURS = '<meta name="generator" content="saerelay judge">'
Document = dict[str, Any]


def judge_run(
    suite: PublishedSuite,
    *,
    layers: list[int] | None = None,
    n: int = 32,
    seed: int = 0,
    out: Path | None = None,
    console: Console | None = None,
) -> tuple[Path, Document]:
    """Write a page on which people judge latents without knowing where they come from; its path, and its key.

    Features are computed first if they are missing. `n` latents of each origin at each layer (all layers if None) are
    drawn, see `drawn`. The page is judging/<page>.html of the run, or `out`, a file or a directory; the key stays in
    the run. Raises RunDirectoryError if there is nothing to judge, or if `out` holds something else.
    """
    legs = legs_by_origin(suite, layers)
    features_run(suite, console=console)
    return write_judging(suite, legs, n, seed, out)


def legs_by_origin(suite: PublishedSuite, layers: list[int] | None = None) -> dict[tuple[Site, str], Leg]:
    """The leg that stands for each site and origin, in order.

    From scratch: the leg of the suite, else the control with the full budget, else the one with equal tokens. Of
    several seeds the lowest; legs that another continued do not count.
    """
    continued = {(leg.parent, leg.site) for leg in suite.legs}
    legs = [leg for leg in suite.legs if (leg.id, leg.site) not in continued]
    legs.sort(key=lambda leg: (PREFERRED.index(leg.control_kind), leg.seed, leg.id), reverse=True)
    known = sorted({leg.layer for leg in legs})
    if missing := sorted(set(layers or ()) - set(known)):
        raise RunDirectoryError(
            f"{suite.directory.root}: no dictionary at layer {', '.join(map(str, missing))}; "
            f"there are {', '.join(map(str, known)) or 'none'}"
        )
    found = {(leg.site, origin_of(suite.plan, leg)): leg for leg in legs if layers is None or leg.layer in layers}
    found = {key: found[key] for key in sorted(found) if key[1] in ORIGINS}
    if not found:
        raise RunDirectoryError(f"{suite.directory.root}: no finished leg to judge")
    return found


def origin_of(plan: Plan, leg: Leg) -> str:
    """Where a leg's latents come from, as the paper says it: "scratch", "forward", "backward"; of its own layer: ""."""
    of_paper = {"scratch": "scratch", "from below": "forward", "from above": "backward"}
    return of_paper.get(plan.origin(leg), "")


def drawn(legs: dict[tuple[Site, str], Leg], features: dict[str, Features], n: int, seed: int) -> list[Document]:
    """The latents to judge, in the order in which they are shown; `features` by leg id.

    For each site and origin n latents that fired on the held-out tokens, all equally likely, or all there are. Draws
    depend on seed, site and origin, and the order on the seed: not on the order or the names of legs.
    """
    items = []
    for (site, origin), leg in legs.items():
        alive = features[leg.id].n_fired.numpy().nonzero()[0]
        rng = np.random.default_rng(seed_from(seed, str(site), origin))
        chosen = np.sort(rng.choice(alive, min(n, len(alive)), replace=False)).tolist()
        place = {"layer": site.layer, "module": site.module, "origin": origin, "leg": leg.id}
        items += [place | {"kind": leg.control_kind or leg.role, "latent": latent} for latent in chosen]
    order = np.random.default_rng(seed_from(seed, "order")).permutation(len(items))
    return [{"item": i} | items[at] for i, at in enumerate(order.tolist(), start=1)]


def write_judging(
    suite: PublishedSuite, legs: dict[tuple[Site, str], Leg], n: int, seed: int, out: Path | None
) -> tuple[Path, Document]:
    """Write the page and its key, from features that are there."""
    paths = suite.directory
    features = {leg.id: load_features(paths, leg.id) for leg in legs.values()}
    items = drawn(legs, features, n, seed)
    shown = shown_items(suite, items, features)
    page_id = hashlib.blake2b(script_json([seed, shown]).encode(), digest_size=6).hexdigest()
    if out is None:
        page = paths.judging / f"{page_id}.html"
    else:
        page = out / f"judge-{page_id}.html" if out.is_dir() else out
        if page.is_file() and OURS not in page.read_text(encoding="utf-8", errors="replace"):
            raise RunDirectoryError(f"{page} exists and is no judging page; choose another --out")
    key = {
        "schema": SCHEMA_VERSION,
        "page": page_id,
        "model": suite.plan.facts.name,
        "seed": seed,
        "n": n,
        "n_tokens": next(iter(features.values())).facts["n_tokens"],
        "items": items,
    }
    write_json(paths.judging / f"{page_id}.json", key)
    write_text(page, page_html(suite.plan.facts.name, {"page": page_id, "levels": LEVELS} | shown))
    return page, key


# --- what a judge sees ------------------------------------------------------------------------------------------


def shown_items(suite: PublishedSuite, items: list[Document], features: dict[str, Features]) -> Document:
    """All of the page's data: texts of tokens, and the items with tokens as numbers into these.

    Activations are levels from 0 to LEVELS, relative to the latent's largest (-1 where they are not known), and effects
    on logits relative to the largest of the latent's, since their units would tell the layer.
    """
    test, text = Corpus.open(suite.directory.tokens).test, token_texts(suite.plan)
    texts: dict[str, int] = {}

    def numbered(token: int) -> int:
        return texts.setdefault(text(token), len(texts))

    shown = []
    for item in items:
        known, latent = features[item["leg"]], item["latent"]
        most = float(known.max_activation[latent])
        examples = [example_shown(e, most, test[e.sequence], numbered) for e in known.examples(latent)]
        shown.append({"examples": examples} | logits_shown(known, latent, numbered))
    return {"texts": list(texts), "items": shown}


def example_shown(example: Example, most: float, row: np.ndarray, numbered: Callable[[int], int]) -> Document:
    """An example's tokens, with some beyond its window, their levels, and which of them fires most."""
    end = example.start + len(example.activations)
    first, last = max(0, example.start - BEYOND), min(len(row), end + BEYOND)
    levels = [min(LEVELS, math.ceil(LEVELS * activation / most)) for activation in example.activations]
    return {
        "peak": example.position - first,
        "tokens": [numbered(token) for token in row[first:last].tolist()],
        "levels": [-1] * (example.start - first) + levels + [-1] * (last - end),
    }


def logits_shown(features: Features, latent: int, numbered: Callable[[int], int]) -> Document:
    """The tokens that a latent promotes and suppresses most; nothing where that was not computed."""
    if features.top_logits_values is None or features.bottom_logits_values is None:
        return {}
    tensors, shown = features.tensors(), {}
    values = {side: tensors[f"{side}_logits_values"][latent].float() for side in ("top", "bottom")}
    most = max(float(side.abs().max()) for side in values.values()) or 1.0
    for side, effects in values.items():
        tokens = [numbered(token) for token in tensors[f"{side}_logits"][latent].tolist()]
        shown[side] = [[t, round(effect / most, 2)] for t, effect in zip(tokens, effects.tolist(), strict=True)]
    return shown


def page_html(model: str, data: Document) -> str:
    """The page, whole: styles, scripts and data are in it; its content policy allows these and no request."""
    report, here = files("saerelay.views.report"), files("saerelay.views.judge")
    read = {place.name: place.read_text(encoding="utf-8") for folder in (report, here) for place in folder.iterdir()
            if place.name in ("style.css", "core.js", "judge.css", "judge.js", "page.html")}  # fmt: skip
    style, script = read["style.css"] + read["judge.css"], read["core.js"] + read["judge.js"]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(read["page.html"]).render(
        model=model, data=script_json(data), style=style, script=script, hashes=[_hash(style), _hash(script)]
    )
    return page.encode("utf-8", errors="replace").decode("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
