"""Blind judging of latents by people: which latents are drawn, and how the judges' answers are scored.

A latent counts as interpretable if more judges said yes than no. A latent with as many yes as no is tied, and counted
separately; a skipped latent is not judged.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Annotated, Literal, get_args

import numpy as np
from pydantic import Field
from scipy.stats import binomtest

from saerelay.errors import RunDirectoryError
from saerelay.planning.leg import Leg
from saerelay.runs.documents.judging import (
    Agreement,
    JudgedItem,
    JudgedOrigin,
    JudgeTally,
    JudgingKey,
    LayerTally,
    OriginDifference,
    OriginTally,
    Scores,
    Tally,
)
from saerelay.runs.features import Features
from saerelay.runs.suite import PublishedSuite
from saerelay.site import Site
from saerelay.spec import Spec, seed_from

ORIGINS: tuple[JudgedOrigin, ...] = get_args(JudgedOrigin)
_OF_PAPER: dict[str, JudgedOrigin] = {"scratch": "scratch", "from below": "forward", "from above": "backward"}
_PREFERENCE = (None, "full", "equal_tokens")
"""Control kinds, in order of preference for a leg from scratch: None (a leg of the suite), then the most tokens."""

LegsByOrigin = dict[tuple[Site, str, JudgedOrigin], Leg]
"""Legs by site, kind and origin; SAEs and transcoders may read at the same site."""
Place = tuple[int, str, str]
"""A layer, the module that is read there, and the one that a transcoder reconstructs ("" for an SAE)."""
Answer = Literal["yes", "no", "skip"]
Answers = Mapping[int, Answer]
"""One judge's answers by item; items that were not answered are missing."""


class Judgements(Spec):
    """The file that one judge exported."""

    version: Annotated[Literal[1], Field(alias="schema")]
    page: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    judge: Annotated[str, Field(max_length=80)]
    answers: dict[int, Answer]


# --- which latents --------------------------------------------------------------------------------------------------


def legs_by_origin(suite: PublishedSuite, layers: Sequence[int] | None = None) -> LegsByOrigin:
    """Return the leg that represents each site, kind and origin, in order; if `layers` are given, only at these.

    From scratch, it is the leg of the suite, else the control with the full budget, else the control with equal tokens.
    Of several seeds, the lowest is taken; legs that another leg continues do not count, nor do other tiers and their
    controls. Raises RunDirectoryError for a layer without a dictionary, or if there is nothing to judge.
    """
    root, plan = suite.directory.root, suite.plan
    of_suite = {leg.id for leg in suite.suite_legs}
    legs = []
    for leg in suite.legs:
        is_control = leg.control_kind in ("equal_tokens", "full") and not suite.successor(leg)
        if is_control and plan.stays_as(plan.first_of(plan.leg(leg.control_of))) == "tier":
            continue
        if leg.id in of_suite or is_control:
            legs.append(leg)
    legs.sort(key=lambda leg: (_PREFERENCE.index(leg.control_kind), leg.seed, leg.id))
    available = sorted({leg.layer for leg in legs})
    missing = sorted(set(layers or ()) - set(available))
    if missing:
        raise RunDirectoryError(
            f"{root}: no dictionary at layer {_comma_list(missing)}; the run has layers {_comma_list(available)}"
        )
    first: LegsByOrigin = {}
    for leg in legs:
        origin = _OF_PAPER.get(suite.origin(leg))
        if origin and (layers is None or leg.layer in layers):
            first.setdefault((leg.site, str(leg.kind), origin), leg)
    if not first:
        raise RunDirectoryError(
            f"{root}: nothing to judge: judges compare SAEs from scratch with SAEs transferred from another layer, and "
            "no finished leg is one of these"
        )
    return {key: first[key] for key in sorted(first)}


def _comma_list(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers) or "none"


def drawn(legs: LegsByOrigin, features: Mapping[str, Features], n: int, seed: int) -> list[JudgedItem]:
    """Draw the latents to judge, in the order in which they are shown; `features` are by leg id.

    For each site, kind and origin, they are n of the latents that fired on the held-out tokens, all equally likely, or
    all of them if they are fewer. Draws depend on seed, site and origin, and the order on the seed, but neither depends
    on the order or the names of legs.
    """
    chosen = []
    for (site, _, origin), leg in legs.items():
        alive = features[leg.id].n_fired.numpy().nonzero()[0]
        rng = np.random.default_rng(seed_from(seed, str(site), origin))
        latents = np.sort(rng.choice(alive, min(n, len(alive)), replace=False)).tolist()
        chosen += [(site, origin, leg, latent) for latent in latents]

    order = np.random.default_rng(seed_from(seed, "order")).permutation(len(chosen))
    items = []
    for number, i in enumerate(order.tolist(), start=1):
        site, origin, leg, latent = chosen[i]
        items.append(
            JudgedItem(
                item=number,
                layer=site.layer,
                module=site.module,
                module_out=leg.module_out,
                origin=origin,
                leg=leg.id,
                kind=leg.control_kind or leg.role,
                latent=latent,
            )
        )
    return items


# --- what judges answered -------------------------------------------------------------------------------------------


def score(key: JudgingKey, answers: Mapping[str, Answers]) -> Scores:
    """Score the answers of a page's judges, by their names, with the page's key."""
    on_page = {item.origin for item in key.items}
    origins: list[JudgedOrigin] = [origin for origin in ORIGINS if origin in on_page]
    compared: list[JudgedOrigin] = [origin for origin in origins if origin != "scratch"] if "scratch" in origins else []
    return Scores(
        page=key.page,
        model=key.model,
        seed=key.seed,
        n=key.n,
        n_tokens=key.n_tokens,
        judges=[judge_tally(name, key.items, given) for name, given in answers.items()],
        origins=[origin_tally(origin, key.items, answers) for origin in origins],
        layers=layer_tallies(key.items, answers),
        differences=[difference(origin, key.items, answers) for origin in compared],
        agreement=agreement(key.items, answers),
    )


def judge_tally(name: str, items: Sequence[JudgedItem], judgements: Answers) -> JudgeTally:
    """Count the answers of one judge."""
    answers = list(judgements.values())
    tally = tallied(items, {name: judgements})
    return JudgeTally(
        judge=name,
        n_yes=answers.count("yes"),
        n_no=answers.count("no"),
        n_skip=answers.count("skip"),
        n_left=len(items) - len(answers),
        share=tally.share,
        low=tally.low,
        high=tally.high,
    )


def origin_tally(origin: JudgedOrigin, items: Sequence[JudgedItem], answers: Mapping[str, Answers]) -> OriginTally:
    """Count the answers about one origin over all layers."""
    origin_items = [item for item in items if item.origin == origin]
    return OriginTally(origin=origin, **dict(tallied(origin_items, answers)))


def layer_tallies(items: Sequence[JudgedItem], answers: Mapping[str, Answers]) -> list[LayerTally]:
    """Count the answers about each origin at each place, in order."""
    groups: dict[tuple[Place, int], list[JudgedItem]] = {}
    for item in items:
        groups.setdefault((place_of(item), ORIGINS.index(item.origin)), []).append(item)
    tallies = []
    for _, layer_items in sorted(groups.items()):
        first = layer_items[0]
        tallies.append(
            LayerTally(
                layer=first.layer,
                module=first.module,
                module_out=first.module_out,
                origin=first.origin,
                leg=first.leg,
                kind=first.kind,
                **dict(tallied(layer_items, answers)),
            )
        )
    return tallies


def tallied(items: Sequence[JudgedItem], answers: Mapping[str, Answers]) -> Tally:
    """Count the interpretable items among those without a tie; the share has a 95 % interval."""
    margins = []
    for item in items:
        votes = [judgements.get(item.item, "skip") for judgements in answers.values()]
        n_for = votes.count("yes")
        n_against = votes.count("no")
        if n_for or n_against:
            margins.append(n_for - n_against)
    n_yes = sum(margin > 0 for margin in margins)
    n_tied = margins.count(0)
    n_decided = len(margins) - n_tied
    low, high = wilson(n_yes, n_decided)
    return Tally(
        n_latents=len(items),
        n_judged=len(margins),
        n_tied=n_tied,
        n_interpretable=n_yes,
        share=_share(n_yes, n_decided),
        low=low,
        high=high,
    )


def _share(n: int, of: int) -> float:
    return n / of if of else math.nan


def wilson(yes: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share; NaN if n is 0.

    >>> low, high = wilson(27, 32)
    >>> round(low, 4), round(high, 4)
    (0.6825, 0.9314)

    Wilson, JASA 22, 1927: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n), z = 1.96.
    """
    if not n:
        return math.nan, math.nan
    interval = binomtest(yes, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def difference(origin: JudgedOrigin, items: Sequence[JudgedItem], answers: Mapping[str, Answers]) -> OriginDifference:
    """Return an origin's share minus that of scratch, over the places that have both, with a 95 % interval.

    Newcombe, Statistics in Medicine 17, 1998, method 10: from the two Wilson intervals, d − √((p−l)² + (u'−p')²) to
    d + √((u−p)² + (p'−l')²).
    """
    both = _places_of(items, origin) & _places_of(items, "scratch")
    shared = [item for item in items if place_of(item) in both]
    ours = tallied([item for item in shared if item.origin == origin], answers)
    theirs = tallied([item for item in shared if item.origin == "scratch"], answers)
    layers = sorted({layer for layer, _, _ in both})
    p, low, high = _numbers(ours)
    other_p, other_low, other_high = _numbers(theirs)
    return OriginDifference(
        origin=origin,
        layers=layers,
        difference=p - other_p,
        low=p - other_p - math.hypot(p - low, other_high - other_p),
        high=p - other_p + math.hypot(high - p, other_p - other_low),
    )


def _numbers(tally: Tally) -> list[float]:
    """Return a share and the ends of its interval; NaN where the tally has None, as documents do."""
    return [math.nan if number is None else number for number in (tally.share, tally.low, tally.high)]


def place_of(item: JudgedItem) -> Place:
    """Return the place of an item's leg."""
    return item.layer, item.module, item.module_out or ""


def _places_of(items: Sequence[JudgedItem], origin: JudgedOrigin) -> set[Place]:
    return {place_of(item) for item in items if item.origin == origin}


# --- agreement between judges ---------------------------------------------------------------------------------------


def agreement(items: Sequence[JudgedItem], answers: Mapping[str, Answers]) -> list[Agreement]:
    """Return how far each pair of judges agrees on the items both judged: share of equal answers and Cohen's kappa."""
    rows = []
    for a, b in combinations(answers, 2):
        votes = []
        for item in items:
            pair = (answers[a].get(item.item), answers[b].get(item.item))
            if all(vote in ("yes", "no") for vote in pair):
                votes.append([vote == "yes" for vote in pair])
        both = np.array(votes, dtype=bool).reshape(-1, 2)
        n_equal = int((both[:, 0] == both[:, 1]).sum())
        rows.append(
            Agreement(judges=[a, b], n_latents=len(both), raw=_share(n_equal, len(both)), kappa=cohen_kappa(both))
        )
    return rows


def cohen_kappa(votes: np.ndarray) -> float:
    """Return the agreement of two judges beyond chance; `votes` bool (items, 2).

    >>> cohen_kappa(np.array([[1, 1], [1, 1], [1, 0], [0, 0]], dtype=bool))
    0.5

    Cohen, Educational and Psychological Measurement 20, 1960: (p_o − p_e) / (1 − p_e), with p_e from each judge's own
    share of yes. NaN without votes, or if both judges give the same answer to all items.
    """
    if not len(votes):
        return math.nan
    a, b = votes.mean(axis=0)
    observed = float((votes[:, 0] == votes[:, 1]).mean())
    expected = float(a * b + (1 - a) * (1 - b))
    if expected >= 1:
        return math.nan
    return (observed - expected) / (1 - expected)
