"""What judges said, joined with the key: the share of latents that people find interpretable, by origin and layer."""

import math
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from scipy.stats import binomtest

from saerelay.errors import RunDirectoryError
from saerelay.files import finite, read_json, write_json
from saerelay.runs.suite import PublishedSuite
from saerelay.spec import Spec
from saerelay.views.judge import ORIGINS, SCHEMA_VERSION

Document = dict[str, Any]


class Judgements(Spec):
    """What one judge exported."""

    version: Annotated[Literal[1], Field(alias="schema")]
    page: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    judge: Annotated[str, Field(max_length=80)]
    answers: dict[int, Literal["yes", "no", "skip"]]
    """By item; what is not there was not answered."""


def score_run(suite: PublishedSuite, paths: list[Path]) -> Document:
    """Score judges' exports of one page of this run; writes and returns judging/scores.json.

    A latent counts as interpretable if more judges said yes than no; one with as many of either is tied, and counted
    apart; skipped is not judged. Raises RecipeError for a damaged file, RunDirectoryError for one of another page, of
    an item that the page does not have, or of a judge who is there already.
    """
    if not paths:
        raise RunDirectoryError("--score takes the files that judges exported: saerelay judge DIR --score FILE...")
    judges = {}
    for path in paths:
        export = Judgements.from_json(path)
        name = export.judge.strip() or path.stem
        if name in judges:
            raise RunDirectoryError(f'{path}: judge "{name}" is there already; give one file of each judge')
        judges[name] = _of_this_run(suite, path, export)
    pages = {export.page for export in judges.values()}
    if len(pages) > 1:
        raise RunDirectoryError(f"these are judgements of {len(pages)} pages: {', '.join(sorted(pages))}; score one")
    key = read_json(suite.directory.judging / f"{pages.pop()}.json")
    scores = {name: key[name] for name in ("schema", "page", "model", "seed", "n", "n_tokens")}
    scores |= finite(scored(key["items"], {name: export.answers for name, export in judges.items()}))
    write_json(suite.directory.judging / "scores.json", scores)
    return scores


def _of_this_run(suite: PublishedSuite, path: Path, export: Judgements) -> Judgements:
    folder = suite.directory.judging
    if not (folder / f"{export.page}.json").is_file():
        known = ", ".join(sorted(found.stem for found in folder.glob("*.json") if found.stem != "scores")) or "none"
        raise RunDirectoryError(
            f"{path}: judgements of page {export.page}, which is not of this run (another run, seed, --n or --layers); "
            f"pages of {suite.directory.root}: {known}"
        )
    key = read_json(folder / f"{export.page}.json")
    if key["schema"] != SCHEMA_VERSION:
        raise RunDirectoryError(f"{folder}: schema {key['schema']}, this program reads {SCHEMA_VERSION}")
    if strange := sorted(set(export.answers) - {item["item"] for item in key["items"]}):
        raise RunDirectoryError(f"{path}: item {strange[0]}; page {export.page} has 1 to {len(key['items'])}")
    return export


def scored(items: list[Document], answers: dict[str, dict[int, str]]) -> Document:
    """Tables of judges, origins, layers, differences and agreement, from the key's items and the answers by judge."""
    origins = [origin for origin in ORIGINS if any(item["origin"] == origin for item in items)]
    places = sorted({(item["layer"], item["module"], ORIGINS.index(item["origin"])) for item in items})
    layers = []
    for layer, module, at in places:
        chosen = [i for i in items if (i["layer"], i["module"], i["origin"]) == (layer, module, ORIGINS[at])]
        about = {"layer": layer, "module": module, "origin": ORIGINS[at], "leg": chosen[0]["leg"]}
        layers.append(about | {"kind": chosen[0]["kind"]} | tallied(chosen, answers))
    return {
        "judges": [{"judge": name} | _effort(items, own) for name, own in answers.items()],
        "origins": [{"origin": o} | tallied([i for i in items if i["origin"] == o], answers) for o in origins],
        "layers": layers,
        "differences": [differing(items, o, answers) for o in origins if o != "scratch" and "scratch" in origins],
        "agreement": agreement(items, answers),
    }


def _effort(items: list[Document], own: dict[int, str]) -> Document:
    counts = {f"n_{said}": list(own.values()).count(said) for said in ("yes", "no", "skip")}
    tally = tallied(items, {"": own})
    return counts | {"n_left": len(items) - len(own)} | {name: tally[name] for name in ("share", "low", "high")}


def tallied(items: list[Document], answers: dict[str, dict[int, str]]) -> Document:
    """How many of some items are interpretable, of those that judges are not tied on; share with its 95 % interval."""
    votes = [[own[i["item"]] for own in answers.values() if own.get(i["item"], "skip") != "skip"] for i in items]
    margins = [said.count("yes") - said.count("no") for said in votes if said]
    yes, tied = sum(margin > 0 for margin in margins), margins.count(0)
    low, high = wilson(yes, len(margins) - tied)
    counts = {"n_latents": len(items), "n_judged": len(margins), "n_tied": tied, "n_interpretable": yes}
    return counts | {"share": _share(yes, len(margins) - tied), "low": low, "high": high}


def _share(n: int, of: int) -> float:
    return n / of if of else math.nan


def wilson(yes: int, n: int) -> tuple[float, float]:
    """The Wilson score interval of a share, 95 %; of nothing, nan.

    >>> low, high = wilson(27, 32)
    >>> round(low, 4), round(high, 4)
    (0.6825, 0.9314)

    Wilson, JASA 22, 1927: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n), z = 1.96.
    """
    interval = binomtest(yes, n).proportion_ci(0.95, method="wilson") if n else (math.nan, math.nan)
    return float(interval[0]), float(interval[1])


def differing(items: list[Document], origin: str, answers: dict[str, dict[int, str]]) -> Document:
    """Share of an origin minus that from scratch, over the sites that have both, with a 95 % interval.

    Newcombe, Statistics in Medicine 17, 1998, method 10: from the two Wilson intervals, d − √((p−l)² + (u'−p')²) to
    d + √((u−p)² + (p'−l')²).
    """
    sites = {o: {(i["layer"], i["module"]) for i in items if i["origin"] == o} for o in (origin, "scratch")}
    both = sites[origin] & sites["scratch"]
    ours, theirs = (
        tallied([i for i in items if i["origin"] == o and (i["layer"], i["module"]) in both], answers)
        for o in (origin, "scratch")
    )
    difference = ours["share"] - theirs["share"]
    below = math.hypot(ours["share"] - ours["low"], theirs["high"] - theirs["share"])
    above = math.hypot(ours["high"] - ours["share"], theirs["share"] - theirs["low"])
    about = {"origin": origin, "layers": sorted({layer for layer, _ in both})}
    return about | {"difference": difference, "low": difference - below, "high": difference + above}


# --- agreement between judges -----------------------------------------------------------------------------------


def agreement(items: list[Document], answers: dict[str, dict[int, str]]) -> list[Document]:
    """How far each two judges agree, on the items that both judged: `raw`, the share of equal answers, and `kappa`."""
    rows = []
    for a, b in combinations(answers, 2):
        pairs = [(answers[a].get(i["item"]), answers[b].get(i["item"])) for i in items]
        votes = np.array([(x == "yes", y == "yes") for x, y in pairs if {x, y} <= {"yes", "no"}], bool).reshape(-1, 2)
        raw = _share(int((votes[:, 0] == votes[:, 1]).sum()), len(votes))
        rows.append({"judges": [a, b], "n_latents": len(votes), "raw": raw, "kappa": cohen_kappa(votes)})
    return rows


def cohen_kappa(votes: np.ndarray) -> float:
    """Agreement of two judges beyond chance; `votes` bool (items, 2). Of nothing, or if both always say the same: nan.

    >>> cohen_kappa(np.array([[1, 1], [1, 1], [1, 0], [0, 0]], dtype=bool))
    0.5

    Cohen, Educational and Psychological Measurement 20, 1960: (p_o − p_e) / (1 − p_e), p_e from each judge's own share.
    """
    if not len(votes):
        return math.nan
    a, b = votes.mean(axis=0)
    observed, expected = float((votes[:, 0] == votes[:, 1]).mean()), float(a * b + (1 - a) * (1 - b))
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan
