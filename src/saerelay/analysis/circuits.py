"""Sparse feature circuits (Marks et al. 2024): which latents a task rests on, and how much of it they carry.

Shapes: B prompts of a batch, N of all, C positions, D width, F latents, V vocabulary.

A model's answer to a prompt is m, the logit of the right token minus that of the wrong one, at the last position. A
latent is ablated by giving it its mean over prompts in place of what it is; what the dictionary does not explain of the
activations stays as it is throughout. So with codes z, their means z̄, and s(S) = Σ of (z̄_j − z_j) W_dec_j over the
latents j of a set S, the model reads

    x + s(all)      all ablated (∅)                    x + s(not C)    a circuit C kept, the rest ablated
    x               none ablated (M), m is its own     x + s(C)        a circuit ablated, the rest kept

Means and effects are taken on one half of the prompts, and circuits are judged on the other.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from saerelay.analysis.evaluate import LOGIT_BYTES
from saerelay.analysis.measures import from_scratch
from saerelay.analysis.prompts import TASKS, Prompt, task_prompts
from saerelay.data.stream import trained_on
from saerelay.errors import ModelError, RecipeError, RunDirectoryError
from saerelay.files import finite, read_json, write_json
from saerelay.lm.model import LanguageModel, load_model
from saerelay.planning.plan import Leg, Plan
from saerelay.runs.suite import PublishedSuite
from saerelay.sae.dictionary import Dictionary
from saerelay.site import Site

SCHEMA_VERSION = 1
Method = Literal["attribution", "integrated-gradients"]
K = (4, 36, 68, 100)
"""Sizes of circuits where none are given; those of Ghilardi et al. 2024."""
STEPS = 10
"""Of integrated gradients: midpoints of as many parts of the way from nothing ablated to all."""
ACCURACY = 0.7
"""The smallest share of prompts with m > 0 of a model that can do a task."""
CLEAR = 2.0
"""Standard errors that a mean must be above 0 to be divided by, or to count as an ability."""
CODES = 2**24
"""Numbers in the codes of a batch: 64 MiB."""


def circuits_run(
    suite: PublishedSuite,
    task: str,
    *,
    k: Sequence[int] = K,
    legs: Sequence[str] = (),
    n_prompts: int = 500,
    method: str = "attribution",
    seed: int = 0,
    model: LanguageModel | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Find and judge the circuits of a task in a run's legs; writes circuits/<task>.json and returns it.

    `task` is one of `prompts.TASKS` or a JSONL file; without `legs`, all that stand, and their controls. What an
    earlier call with the same question measured is kept, site by site. Raises RecipeError for an unknown task, leg or
    method or a circuit larger than a dictionary, DataError for bad prompts, and ModelError if the model cannot do the
    task: fewer than `ACCURACY` of the prompts right, or m not above 0 by `CLEAR` standard errors.
    """
    plan = suite.plan
    chosen = chosen_legs(suite, legs)
    check_asked(chosen, k, method)
    prompts = task_prompts(task, plan, n_prompts, seed)
    name = task if task in TASKS else Path(task).stem
    asked = {"task": name, "prompts": digest(prompts), "n_prompts": len(prompts), "seed": seed}
    asked |= {"method": method, "k": sorted(set(k))}
    path = suite.directory.circuits(name)
    document = read_json(path) if path.is_file() else {}
    if document.get("asked") != asked:
        document = {"schema": SCHEMA_VERSION, "asked": asked, "legs": []}
    ages = {leg.id: suite.info(leg).tokens for leg in suite.legs}
    measured = {row["leg"]: row for row in document["legs"] if ages.get(row["leg"]) == row["tokens"]}
    missing = sorted((leg for leg in chosen if leg.id not in measured), key=attrgetter("site"))
    if missing:
        model = model or load_model(plan)
        half = len(prompts) // 2  # sorted by length for the sake of batches; those of a built-in task have one length
        halves = [sorted(part, key=lambda p: len(p.tokens)) for part in (prompts[:half], prompts[half:])]
        document |= ability(plan, model, task, halves)
        by_site = [(site, list(here)) for site, here in groupby(missing, key=attrgetter("site"))]
        silent = console is None or not console.is_terminal
        for site, here in track(by_site, f"circuits: {name}", console=console, transient=True, disable=silent):
            dictionaries = {leg.id: suite[leg.id] for leg in here}
            found = circuits_at(plan, model, site, dictionaries, *halves, k=asked["k"], method=cast(Method, method))
            for leg in here:
                circuits = {"circuits": judged(found[leg.id], document["clean"], asked["k"])}
                measured[leg.id] = about(leg, ages[leg.id]) | circuits | found[leg.id]
            document["legs"] = [measured[leg.id] for leg in suite.legs if leg.id in measured]
            document["differences"] = comparisons(suite, document["clean"], document["legs"], asked["k"])
            write_json(path, document)
    return finite(document)


def about(leg: Leg, tokens: int) -> dict[str, Any]:
    """What a row of the document says of its leg."""
    said = {"leg": leg.id, "layer": leg.layer, "module": leg.module, "role": leg.role, "parent": leg.parent or None}
    said |= {"control_of": leg.control_of or None, "control_kind": leg.control_kind or None}
    return said | {"tokens": tokens, "n_latents": leg.dictionary.n_latents}


def chosen_legs(suite: PublishedSuite, names: Sequence[str]) -> list[Leg]:
    """The legs named, by id or layer, or all that stand, and controls."""
    if not suite.legs:
        root = suite.directory.root
        raise RunDirectoryError(f"{root}: no leg is finished yet; finish the run with `saerelay train --resume`")
    standing = {leg.id for leg in suite.final_legs}
    everything = [leg for leg in suite.legs if leg.id in standing or leg.role == "control"]
    return [suite.leg(name) for name in names] if names else everything


def check_asked(legs: Sequence[Leg], k: Sequence[int], method: str) -> None:
    """Refuse circuits that are larger than a dictionary, or a method that is none."""
    smallest = min(legs, key=lambda leg: leg.dictionary.n_latents)
    if not k or min(k) < 1 or max(k) > smallest.dictionary.n_latents:
        raise RecipeError(
            f"--k {','.join(map(str, k))}: sizes of circuits go from 1 to {smallest.dictionary.n_latents}, the latents "
            f"of {smallest.id}"
        )
    if method not in get_args(Method):
        raise RecipeError(f'--method "{method}" is none; one of {", ".join(get_args(Method))}')


def digest(prompts: Sequence[Prompt]) -> str:
    """What tells lists of prompts apart."""
    rows = [[*prompt.tokens, prompt.right, prompt.wrong] for prompt in prompts]
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest()


def ability(plan: Plan, model: LanguageModel, task: str, halves: Sequence[Sequence[Prompt]]) -> dict[str, Any]:
    """How well the model does a task, for the document; ModelError if it cannot."""
    found = []
    for half in halves:
        scores = [logit_difference(model.logits(batch.tokens), batch) for batch in batches(plan, half)]
        found.append(torch.cat(scores).double().cpu())
    m = torch.cat(found)
    accuracy, mean, error = float((m > 0).double().mean()), float(m.mean()), standard_error(m)
    if accuracy < ACCURACY or mean <= CLEAR * error:
        raise ModelError(
            f'{plan.facts.name} cannot do "{task}": {accuracy:.1%} of {len(m)} prompts are right ({ACCURACY:.0%} are '
            f"needed), the mean logit difference is {mean:.3g} ± {error:.2g} (it must be above 0 by {CLEAR:.0f} "
            "standard errors). Circuits of it would mean nothing; choose another task, or give a file of prompts."
        )
    lengths = {len(prompt.tokens) for half in halves for prompt in half}
    return {
        "description": (TASKS[task].__doc__ or "") if task in TASKS else f"prompts of {Path(task).name}",
        "model": plan.facts.name,
        "revision": plan.facts.revision,
        "dtype": plan.facts.dtype,
        "n_found_on": len(halves[0]),
        "n_judged_on": len(halves[1]),
        "n_tokens": [min(lengths), max(lengths)],
        "means": "of each position" if one_length([*halves[0], *halves[1]]) else "over all positions",
        "accuracy": accuracy,
        "accuracy_needed": ACCURACY,
        "m": mean,
        "m_se": error,
        "clean": _rounded(found[1]),
    }


# --- the maths --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts of one length."""

    tokens: Tensor
    """(B, C)."""
    right: Tensor
    """(B)."""
    wrong: Tensor
    """(B)."""


def batches(plan: Plan, prompts: Sequence[Prompt], device: torch.device | str = "cpu") -> Iterator[Batch]:
    """Prompts in their order, those of one length that follow each other together."""
    n_latents = max(leg.dictionary.n_latents for leg in plan.legs)
    for length, group in groupby(prompts, key=lambda prompt: len(prompt.tokens)):
        same, size = list(group), min(CODES // n_latents, LOGIT_BYTES // (4 * plan.facts.vocab_size)) // length
        for start in range(0, len(same), max(1, size)):
            part = same[start : start + max(1, size)]
            columns = [[p.tokens for p in part], [p.right for p in part], [p.wrong for p in part]]
            yield Batch(*(torch.tensor(column, device=device) for column in columns))


def logit_difference(logits: Tensor, batch: Batch) -> Tensor:
    """m (B): the right token's logit minus the wrong one's at the last position of logits (B, C, V).

    >>> batch = Batch(torch.tensor([[5, 6]]), torch.tensor([2]), torch.tensor([0]))
    >>> logit_difference(torch.tensor([[[9.0, 9.0, 9.0], [1.0, 2.0, 4.0]]]), batch)
    tensor([3.])
    """
    last = logits[:, -1].float()
    right, wrong = (last.gather(1, ids[:, None].to(last.device))[:, 0] for ids in (batch.right, batch.wrong))
    return right - wrong


def gradient(logits_with: Callable[[Tensor], Tensor], x: Tensor, batch: Batch) -> Tensor:
    """∂m/∂x (B, C, D) of each prompt at activations x (B, C, D), float32; `logits_with` as from `model.resuming`."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(logit_difference(logits_with(leaf), batch).sum(), leaf)[0]


def indirect_effects(dictionary: Dictionary, to_mean: Tensor, slope: Tensor) -> Tensor:
    """What ablating each latent costs, to first order, summed over prompts and positions: (F).

    `to_mean` (B, C, F) is z̄ − z, `slope` (B, C, D) is ∂m/∂x, at x (attribution patching) or averaged on the way from x
    to all ablated (integrated gradients). The effect is −Σ ∂m/∂z_j (z̄_j − z_j): Marks et al. 2024, eq. 3 and 4, with
    the sign turned, so that latents whose ablation hurts the answer most have the largest.

    >>> sae = Dictionary(architecture="relu", W_enc=torch.eye(2), b_enc=torch.zeros(2), W_dec=torch.eye(2),
    ...                  b_dec=torch.zeros(2))
    >>> indirect_effects(sae, torch.tensor([[[-3.0, 1.0]]]), torch.tensor([[[2.0, 0.5]]]))
    tensor([ 6.0000, -0.5000])
    """
    return -(to_mean * (slope @ dictionary.W_dec.T)).sum(dim=(0, 1))


@torch.no_grad()
def circuits_at(
    plan: Plan,
    model: LanguageModel,
    site: Site,
    dictionaries: Mapping[str, Dictionary],
    found_on: Sequence[Prompt],
    judged_on: Sequence[Prompt],
    *,
    k: Sequence[int] = K,
    method: Method = "attribution",
) -> dict[str, dict[str, Any]]:
    """What circuits of k latents of each dictionary at a site do, by key, as circuits/<task>.json has it.

    Latents are ranked by their effects on `found_on`; m is measured on `judged_on`, prompt by prompt. Both come in the
    order of `batches`.
    """
    ours = {key: dictionary.to(model.device) for key, dictionary in dictionaries.items()}
    means = mean_codes(plan, model, site, ours, found_on, per_position=one_length([*found_on, *judged_on]))
    sites = plan.with_probe([site])

    def to_means(key: str, x: Tensor, keep: Tensor) -> Tensor:
        return (means[key] - ours[key].encode(x)) * keep[..., None]

    effects = {key: torch.zeros(d.n_latents, device=model.device) for key, d in ours.items()}
    for batch in batches(plan, found_on, model.device):
        clean = model.forward(batch.tokens, sites)
        x, keep = clean.activations[site].float(), trained_on(plan, batch.tokens, clean.activations)
        with model.resuming(clean, site) as logits_with:
            at_x = gradient(logits_with, x, batch)
            for key, dictionary in ours.items():
                change, slope = to_means(key, x, keep), at_x
                if method == "integrated-gradients":
                    s = change @ dictionary.W_dec
                    parts = ((i + 0.5) / STEPS for i in range(STEPS))
                    slope = torch.stack([gradient(logits_with, x + part * s, batch) for part in parts]).mean(dim=0)
                effects[key] += indirect_effects(dictionary, change, slope) / len(found_on)
    largest = {key: effect.sort(descending=True, stable=True) for key, effect in effects.items()}
    m = {key: list[Tensor]() for key in ours}
    for batch in batches(plan, judged_on, model.device):
        clean = model.forward(batch.tokens, sites)
        x, keep = clean.activations[site].float(), trained_on(plan, batch.tokens, clean.activations)
        with model.resuming(clean, site) as logits_with:
            for key, dictionary in ours.items():
                change = to_means(key, x, keep)
                everything, changes = change @ dictionary.W_dec, list[Tensor]()
                for size in k:
                    C = largest[key].indices[:size]
                    own = change[..., C] @ dictionary.W_dec[C]
                    changes += [everything - own, own]
                scores = [logit_difference(logits_with(x + s), batch) for s in (everything, *changes)]
                m[key].append(torch.stack(scores).cpu())
    found = {}
    for key, scores in m.items():
        empty, *rest = (_rounded(row) for row in torch.cat(scores, dim=1))
        values, indices = (column[: max(k)].tolist() for column in largest[key])
        found[key] = {"latents": indices, "effects": [round(value, 6) for value in values]}
        found[key] |= {"m_empty": empty, "m_kept": rest[::2], "m_ablated": rest[1::2]}
    return found


def mean_codes(
    plan: Plan,
    model: LanguageModel,
    site: Site,
    dictionaries: Mapping[str, Dictionary],
    prompts: Sequence[Prompt],
    *,
    per_position: bool,
) -> dict[str, Tensor]:
    """z̄ of each dictionary, by key: (C, F), means over prompts, or (F), over positions, too; of those `trained_on`."""
    totals, n = dict[str, Tensor](), torch.zeros(())
    for batch in batches(plan, prompts):
        found = model.harvest(batch.tokens, plan.with_probe([site]))
        keep = trained_on(plan, batch.tokens.to(model.device), found).float()[..., None]
        n = n + (keep.sum(dim=0) if per_position else keep.sum())
        for key, dictionary in dictionaries.items():
            z = (dictionary.encode(found[site].float()) * keep).sum(dim=0)
            totals[key] = totals.get(key, 0) + (z if per_position else z.sum(dim=0))
    return {key: total / n.clamp(min=1) for key, total in totals.items()}


def one_length(prompts: Sequence[Prompt]) -> bool:
    """Whether all prompts have as many tokens."""
    return len({len(prompt.tokens) for prompt in prompts}) == 1


def standard_error(values: Tensor) -> float:
    """Of the mean of values (N), taken as independent."""
    return float(values.std()) / math.sqrt(len(values))


def recovered(m: Sequence[float], empty: Sequence[float], clean: Sequence[float]) -> tuple[float, Tensor]:
    """Share of the answer that is left, (mean m − mean ∅) / (mean M − mean ∅), and each prompt's part of its error (N).

    >>> share, parts = recovered([3.0, 2.0], [1.0, 1.0], [3.0, 3.0])
    >>> share, round(standard_error(parts), 3)
    (0.75, 0.25)

    With C kept, faithfulness; with C ablated, completeness. The parts have mean 0, and their standard error is that of
    the ratio (delta method); those of two circuits, subtracted prompt by prompt, give that of their difference. NaN
    where ∅ is not below M by `CLEAR` standard errors: a task that the dictionary carries nothing of.
    """
    own, lost = (torch.tensor(v).double() - torch.tensor(empty).double() for v in (m, clean))
    if not float(lost.mean()) > CLEAR * standard_error(lost):
        return math.nan, torch.full_like(own, math.nan)
    share = float(own.mean() / lost.mean())
    return share, (own - share * lost) / lost.mean()


def judged(row: dict[str, Any], clean: Sequence[float], k: Sequence[int]) -> list[dict[str, Any]]:
    """Faithfulness and completeness of a leg's circuits, with standard errors."""
    found = []
    for size, kept, ablated in zip(k, row["m_kept"], row["m_ablated"], strict=True):
        circuit: dict[str, Any] = {"k": size}
        for name, m in (("faithfulness", kept), ("completeness", ablated)):
            share, parts = recovered(m, row["m_empty"], clean)
            circuit |= {name: share, f"{name}_se": standard_error(parts)}
        found.append(circuit)
    return found


def comparisons(
    suite: PublishedSuite, clean: Sequence[float], rows: Sequence[dict[str, Any]], k: Sequence[int]
) -> list[Any]:
    """Transferred legs minus those from scratch at their sites, pair by pair, then means over pairs of a kind.

    Both legs of a pair answer the same prompts, so standard errors are those of differences prompt by prompt.
    """
    by_leg, found = {row["leg"]: row for row in rows}, list[dict[str, Any]]()
    pairs = [(leg, other) for leg in suite.legs if leg.role == "transfer" for other in from_scratch(suite, leg)]
    pairs = [(leg, other) for leg, other in pairs if leg.id in by_leg and other.id in by_leg]
    kinds = dict.fromkeys(other.control_kind or other.role for _, other in pairs)
    for (i, size), kind in product(enumerate(k), kinds):
        of_kind, differences = [pair for pair in pairs if (pair[1].control_kind or pair[1].role) == kind], []
        for leg, other in of_kind:
            a, b = by_leg[leg.id], by_leg[other.id]
            measured = {}
            for name, key in (("faithfulness", "m_kept"), ("completeness", "m_ablated")):
                (share, parts), (share_b, parts_b) = (recovered(r[key][i], r["m_empty"], clean) for r in (a, b))
                measured[name] = share - share_b, parts - parts_b
            differences.append(measured)
            found.append({"leg": leg.id, "scratch": other.id, "kind": kind, "k": size} | _difference([measured]))
        if len(of_kind) > 1:
            found.append({"leg": None, "scratch": None, "kind": kind, "k": size} | _difference(differences))
    return found


def _difference(measured: Sequence[Mapping[str, tuple[float, Tensor]]]) -> dict[str, float]:
    """Means of differences over pairs, and their standard errors over prompts."""
    found = {}
    for name in ("faithfulness", "completeness"):
        values, parts = zip(*(one[name] for one in measured), strict=True)
        found |= {name: sum(values) / len(values), f"{name}_se": standard_error(torch.stack(parts).mean(dim=0))}
    return found


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]
