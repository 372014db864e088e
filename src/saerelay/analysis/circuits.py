"""Sparse feature circuits (Marks et al. 2024): which latents carry a task in each leg, and how much of it they carry.

See `ablations` for the computations on one dictionary. Shapes: N prompts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor

from saerelay.analysis.ablations import Halves, Method, answers, circuits_at, n_steps, one_length, readings, rounded
from saerelay.analysis.prompts import TASKS, Prompt, digest, task_prompts
from saerelay.analysis.session import Session
from saerelay.errors import ModelError, RecipeError
from saerelay.planning.leg import Leg
from saerelay.planning.plan import Plan
from saerelay.runs.documents.circuits import (
    Circuit,
    CircuitDifference,
    CircuitLeg,
    CircuitQuestion,
    Circuits,
    CircuitScores,
)
from saerelay.runs.suite import PublishedSuite
from saerelay.site import Site

K = (4, 36, 68, 100)
"""Default sizes of circuits, from Ghilardi et al. 2024."""
CLEAN_BYTES = 2**30
"""Most bytes of activations, of all prompts at several sites, that are kept at once."""
ACCURACY = 0.7
"""Least share of prompts with m > 0 for a model that can do a task."""
CLEAR = 2.0
"""Number of standard errors by which a mean must exceed 0 to be a divisor, or to count as an ability."""


def circuits(
    session: Session,
    task: str,
    *,
    k: Sequence[int] = K,
    legs: Sequence[str] = (),
    n_prompts: int = 500,
    method: str = "attribution",
    seed: int = 0,
) -> Circuits:
    """Find and evaluate the circuits of a task in a run's legs; writes circuits/<task>.json.

    `task` is one of `prompts.TASKS` or a JSONL file; without `legs`, the suite's SAEs and all controls are analysed.
    Measurements of an earlier call with the same question are kept, site by site. Raises RecipeError for an unknown
    task, leg or method or a circuit larger than a dictionary, DataError for bad prompts, and ModelError if the model
    cannot do the task: a share below `ACCURACY` of the prompts right, or m not above 0 by `CLEAR` standard errors.
    """
    suite = session.suite
    chosen = chosen_legs(suite, legs)
    transcoders = [leg.id for leg in chosen if leg.is_transcoder]
    if transcoders:
        raise RecipeError(
            f"circuits are found in SAEs, but {transcoders[0]} is a transcoder; name other legs with --leg, or write "
            "it for circuit-tracer: `saerelay export --format circuit-tracer`"
        )
    check_asked(chosen, k, method)
    prompts = task_prompts(task, session.plan, n_prompts, seed)
    asked = question(task, prompts, k, method, seed)
    path = suite.directory.circuits(asked.task)
    document = Circuits.load_current(path, asked)
    measured = measured_before(suite, document)
    missing = sorted((leg for leg in chosen if leg.id not in measured), key=attrgetter("site"))
    if document is not None and not missing:
        return document

    by_site = {site: list(group) for site, group in groupby(missing, key=attrgetter("site"))}
    ability: ModelAbility | None = None
    for sites in fitting(list(by_site), session.plan, prompts):
        read = read_halves(session, prompts, sites)
        ability = ability or model_ability(session, task, read)
        steps = sum(n_steps(len(by_site[site]), read) for site in sites)
        with session.display.counting(steps, f"circuits: {asked.task}") as done:
            for site in sites:
                dictionaries = {leg.id: suite.dictionary(leg) for leg in by_site[site]}
                chosen_method = cast(Method, method)
                scores = circuits_at(
                    session.model, site, dictionaries, read, k=asked.k, method=chosen_method, done=done
                )
                for leg in by_site[site]:
                    tokens = suite.info(leg).tokens
                    measured[leg.id] = circuit_leg(leg, tokens, scores[leg.id], ability.clean, asked.k)
                document = document_of(suite, asked, ability, measured)
                document.save(path)
    assert document is not None
    return document


def document_of(
    suite: PublishedSuite, asked: CircuitQuestion, ability: "ModelAbility", measured: Mapping[str, CircuitLeg]
) -> Circuits:
    """Return the results so far, as written to circuits/<task>.json."""
    rows = [measured[leg.id] for leg in suite.legs if leg.id in measured]
    return Circuits(
        **ability.facts,
        asked=asked,
        clean=ability.clean,
        legs=rows,
        differences=differences(suite, ability.clean, rows, asked.k),
    )


def question(task: str, prompts: Sequence[Prompt], k: Sequence[int], method: str, seed: int) -> CircuitQuestion:
    """Return the question that a task's circuits answer."""
    return CircuitQuestion(
        task=task if task in TASKS else Path(task).stem,
        prompts=digest(prompts),
        n_prompts=len(prompts),
        seed=seed,
        method=method,
        k=sorted(set(k)),
    )


def chosen_legs(suite: PublishedSuite, names: Sequence[str]) -> list[Leg]:
    """Return the legs named by id or layer; without names, the SAEs of the suite and all controls."""
    if names:
        return [suite.leg(name) for name in names]
    of_suite = {leg.id for leg in suite.suite_legs}
    legs = [leg for leg in suite.legs if leg.id in of_suite or leg.role == "control"]
    return [leg for leg in legs if not leg.is_transcoder] or legs


def check_asked(legs: Sequence[Leg], k: Sequence[int], method: str) -> None:
    """Raise RecipeError for circuits that are larger than a dictionary, and for unknown methods."""
    smallest = min(legs, key=lambda leg: leg.dictionary.n_latents)
    n_latents = smallest.dictionary.n_latents
    if not k or min(k) < 1 or max(k) > n_latents:
        sizes = ",".join(str(size) for size in k)
        raise RecipeError(
            f"--k {sizes}: circuit sizes must be from 1 to {n_latents}, the number of latents of {smallest.id}"
        )
    if method not in get_args(Method):
        raise RecipeError(f'unknown --method "{method}"; expected one of: {", ".join(get_args(Method))}')


def measured_before(suite: PublishedSuite, document: Circuits | None) -> dict[str, CircuitLeg]:
    """Return the rows of an earlier call by leg, without legs that were trained further since."""
    if document is None:
        return {}
    ages = {leg.id: suite.info(leg).tokens for leg in suite.legs}
    return {row.leg: row for row in document.legs if ages.get(row.leg) == row.tokens}


def halved(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts to find circuits on and those to evaluate them on, each sorted by length for batching."""
    half = len(prompts) // 2
    find_on = sorted(prompts[:half], key=lambda prompt: len(prompt.tokens))
    judge_on = sorted(prompts[half:], key=lambda prompt: len(prompt.tokens))
    return find_on, judge_on


def fitting(sites: Sequence[Site], plan: Plan, prompts: Sequence[Prompt]) -> Iterator[Sequence[Site]]:
    """Yield the sites in groups at which the prompts' activations take at most `CLEAN_BYTES`."""
    n_tokens = sum(len(prompt.tokens) for prompt in prompts)
    widest = max(plan.facts.width(site) for site in sites)
    at_once = max(1, CLEAN_BYTES // (n_tokens * widest * plan.facts.bytes_per_value))
    for start in range(0, len(sites), at_once):
        yield sites[start : start + at_once]


def read_halves(session: Session, prompts: Sequence[Prompt], sites: Sequence[Site]) -> Halves:
    """Read both halves of the prompts at some sites."""
    model = session.model  # loaded first, since loading shows a message of its own
    find_on, judge_on = halved(prompts)
    with session.display.status("reading the prompts"):
        return readings(session.plan, model, sites, find_on), readings(session.plan, model, sites, judge_on)


@dataclass(frozen=True)
class ModelAbility:
    """How well the model does a task."""

    facts: dict[str, Any]
    """The fields of `documents.circuits.Ability`."""
    clean: list[float]
    """m of each prompt of the second half, on which circuits are evaluated."""


def model_ability(session: Session, task: str, halves: Halves) -> ModelAbility:
    """Measure how well the model does a task; ModelError if it cannot do it."""
    plan = session.plan
    by_half = []
    for half in halves:
        scores = [answers(session.model.head, reading.clean.states, reading.batch) for reading in half]
        by_half.append(torch.cat(scores).double().cpu())
    m = torch.cat(by_half)
    accuracy = float((m > 0).double().mean())
    mean = float(m.mean())
    error = standard_error(m)
    if accuracy < ACCURACY or mean <= CLEAR * error:
        raise ModelError(
            f'{plan.facts.name} cannot do "{task}": it gets {accuracy:.1%} of {len(m)} prompts right ({ACCURACY:.0%} '
            f"are needed), and its mean logit difference is {mean:.3g} ± {error:.2g} (it must exceed 0 by {CLEAR:.0f} "
            "standard errors). A circuit of this task would mean nothing; choose another, or give a file of prompts."
        )
    find_on, judge_on = halves
    lengths = {reading.batch.tokens.shape[1] for reading in (*find_on, *judge_on)}
    description = f"prompts of {Path(task).name}"
    if task in TASKS:
        description, _, _ = (TASKS[task].__doc__ or "").partition("\n")  # its first sentence
    facts = {
        "description": description,
        "model": plan.facts.name,
        "revision": plan.facts.revision,
        "dtype": plan.facts.dtype,
        "n_found_on": len(by_half[0]),
        "n_judged_on": len(by_half[1]),
        "n_tokens": [min(lengths), max(lengths)],
        "means": "of each position" if one_length([*find_on, *judge_on]) else "over all positions",
        "accuracy": accuracy,
        "accuracy_needed": ACCURACY,
        "m": mean,
        "m_se": error,
    }
    return ModelAbility(facts, rounded(by_half[1]))


# --- how much a circuit carries -------------------------------------------------------------------------------------


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of independent values (N)."""
    return float(values.std()) / math.sqrt(len(values))


class Recovered(NamedTuple):
    """A share of the answer, and each prompt's part of its error."""

    share: float
    parts: Tensor
    """(N), with mean 0; their standard error is that of the share (delta method)."""

    @property
    def error(self) -> float:
        """The standard error of the share."""
        return standard_error(self.parts)

    def minus(self, other: "Recovered") -> "Recovered":
        """Return the difference of two shares on the same prompts, with its error from prompt to prompt."""
        return Recovered(self.share - other.share, self.parts - other.parts)

    @classmethod
    def mean(cls, several: Sequence["Recovered"]) -> "Recovered":
        """Return the mean of several shares on the same prompts."""
        share = sum(one.share for one in several) / len(several)
        return cls(share, torch.stack([one.parts for one in several]).mean(dim=0))


def recovered(m: Sequence[float], empty: Sequence[float], clean: Sequence[float]) -> Recovered:
    """Return the share of the answer left, (mean m − mean ∅) / (mean M − mean ∅), with each prompt's part of its error.

    >>> left = recovered([3.0, 2.0], [1.0, 1.0], [3.0, 3.0])
    >>> left.share, round(left.error, 3)
    (0.75, 0.25)

    With C kept, the share is the faithfulness; with C ablated, the completeness. NaN if ∅ is not below M by `CLEAR`
    standard errors: then the dictionary carries nothing of the task.
    """
    nothing = torch.tensor(empty).double()
    answer = torch.tensor(m).double() - nothing
    whole = torch.tensor(clean).double() - nothing
    if not float(whole.mean()) > CLEAR * standard_error(whole):
        return Recovered(math.nan, torch.full_like(answer, math.nan))
    share = float(answer.mean() / whole.mean())
    return Recovered(share, (answer - share * whole) / whole.mean())


def circuit_leg(leg: Leg, tokens: int, scores: CircuitScores, clean: Sequence[float], k: Sequence[int]) -> CircuitLeg:
    """Return a leg's row, with faithfulness and completeness of its circuits."""
    judged = []
    for i, size in enumerate(k):
        faithfulness = recovered(scores.m_kept[i], scores.m_empty, clean)
        completeness = recovered(scores.m_ablated[i], scores.m_empty, clean)
        judged.append(
            Circuit(
                k=size,
                faithfulness=faithfulness.share,
                faithfulness_se=faithfulness.error,
                completeness=completeness.share,
                completeness_se=completeness.error,
            )
        )
    return CircuitLeg(
        leg=leg.id,
        layer=leg.layer,
        module=leg.module,
        role=leg.role,
        parent=leg.parent or None,
        control_of=leg.control_of or None,
        control_kind=leg.control_kind,
        tokens=tokens,
        n_latents=leg.dictionary.n_latents,
        circuits=judged,
        **dict(scores),
    )


class Difference(NamedTuple):
    """A transferred leg minus a leg from scratch, for circuits of one size."""

    leg: str
    scratch: str
    faithfulness: Recovered
    completeness: Recovered


def differences(
    suite: PublishedSuite, clean: Sequence[float], rows: Sequence[CircuitLeg], k: Sequence[int]
) -> list[CircuitDifference]:
    """Return transferred legs minus legs from scratch at their sites, pair by pair, then means over pairs of a kind.

    Both legs of a pair answer the same prompts, so standard errors are those of the differences prompt by prompt.
    """
    by_leg = {row.leg: row for row in rows}
    by_kind: dict[str, list[tuple[CircuitLeg, CircuitLeg]]] = {}
    for leg in suite.legs:
        if not suite.is_transferred(leg):
            continue
        for scratch in suite.scratch_counterparts(leg):
            if leg.id in by_leg and scratch.id in by_leg:
                kind = scratch.control_kind or "root"
                by_kind.setdefault(kind, []).append((by_leg[leg.id], by_leg[scratch.id]))

    compared = []
    for i, size in enumerate(k):
        for kind, pairs in by_kind.items():
            of_kind = [difference(leg, scratch, clean, i) for leg, scratch in pairs]
            for pair in of_kind:
                compared.append(mean_difference([pair], leg=pair.leg, scratch=pair.scratch, kind=kind, k=size))
            if len(of_kind) > 1:
                compared.append(mean_difference(of_kind, leg=None, scratch=None, kind=kind, k=size))
    return compared


def difference(leg: CircuitLeg, scratch: CircuitLeg, clean: Sequence[float], i: int) -> Difference:
    """Return the difference of one pair, for circuits of the i-th size."""
    faithfulness = recovered(leg.m_kept[i], leg.m_empty, clean)
    completeness = recovered(leg.m_ablated[i], leg.m_empty, clean)
    return Difference(
        leg=leg.leg,
        scratch=scratch.leg,
        faithfulness=faithfulness.minus(recovered(scratch.m_kept[i], scratch.m_empty, clean)),
        completeness=completeness.minus(recovered(scratch.m_ablated[i], scratch.m_empty, clean)),
    )


def mean_difference(
    pairs: Sequence[Difference], *, leg: str | None, scratch: str | None, kind: str, k: int
) -> CircuitDifference:
    """Return the mean difference over pairs, with its standard error over prompts."""
    faithfulness = Recovered.mean([pair.faithfulness for pair in pairs])
    completeness = Recovered.mean([pair.completeness for pair in pairs])
    return CircuitDifference(
        leg=leg,
        scratch=scratch,
        kind=kind,
        k=k,
        faithfulness=faithfulness.share,
        faithfulness_se=faithfulness.error,
        completeness=completeness.share,
        completeness_se=completeness.error,
    )
