"""Ablation of latents in a forward pass: their effects on an answer, and how much of it a circuit carries.

A model's answer to a prompt is m, the logit of the right token minus that of the wrong token, at the last position. A
latent is ablated by replacing its activation with its mean over prompts; the part of the activations that the
dictionary does not explain is never changed. So with codes z, their means z̄, and s(S) = Σ of (z̄_j − z_j) W_dec_j over
the latents j of a set S, the model reads

    x + s(all)      all ablated (∅)                    x + s(not C)    a circuit C kept, the rest ablated
    x               none ablated (M), m is its own     x + s(C)        a circuit ablated, the rest kept

Means and effects are taken on one half of the prompts, and circuits are evaluated on the other.
Shapes: B prompts of a batch, N prompts in all, C positions, D width, F latents, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from saerelay.analysis.metrics import LOGIT_BYTES
from saerelay.analysis.progress import Done, uncounted
from saerelay.analysis.prompts import Prompt
from saerelay.data.kept import trained_on
from saerelay.lm.head import Head
from saerelay.lm.model import Forward, LanguageModel
from saerelay.planning.plan import Plan
from saerelay.runs.documents.circuits import CircuitScores
from saerelay.sae.dictionary import Dictionary
from saerelay.site import Site

Method = Literal["attribution", "integrated-gradients"]
STEPS = 10
"""Steps of integrated gradients: midpoints of equal parts of the path from nothing ablated to all ablated."""
CODES = 2**24
"""Most numbers in the codes of a batch: 64 MiB."""

AnswersWith = Callable[[Tensor], Tensor]
"""Gives m (B) of each prompt with other activations (B, C, D) at a site."""


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts of one length."""

    tokens: Tensor
    """(B, C)."""
    right: Tensor
    """(B)."""
    wrong: Tensor
    """(B)."""


def prompt_batches(plan: Plan, prompts: Sequence[Prompt], device: torch.device) -> Iterator[PromptBatch]:
    """Yield prompts in their order, in batches of consecutive prompts of the same length."""
    n_latents = max(leg.dictionary.n_latents for leg in plan.legs)
    most_tokens = min(CODES // n_latents, LOGIT_BYTES // (4 * plan.facts.tokens.vocab_size))
    for length, group in groupby(prompts, key=lambda prompt: len(prompt.tokens)):
        same_length = list(group)
        size = max(1, most_tokens // length)
        for start in range(0, len(same_length), size):
            part = same_length[start : start + size]
            yield PromptBatch(
                tokens=torch.tensor([prompt.tokens for prompt in part], device=device),
                right=torch.tensor([prompt.right for prompt in part], device=device),
                wrong=torch.tensor([prompt.wrong for prompt in part], device=device),
            )


def answers(head: Head, states: Tensor, batch: PromptBatch) -> Tensor:
    """Return m (B): the right token's logit minus the wrong token's, at the last position of hidden states (B, C, D).

    >>> from saerelay.lm.model import LanguageModel
    >>> from saerelay.planning.recipe import ModelSpec
    >>> model = LanguageModel.load(ModelSpec(device="cpu"))
    >>> batch = PromptBatch(torch.tensor([[5, 6]]), right=torch.tensor([7]), wrong=torch.tensor([7]))
    >>> answers(model.head, model.head.states(batch.tokens), batch)
    tensor([0.])
    """
    both = torch.stack([batch.right, batch.wrong], dim=1).to(states.device)
    tokens, columns = both.unique(return_inverse=True)
    logits = head.logits(states[:, -1:], tokens)[:, 0].float()
    right, wrong = logits.gather(1, columns).unbind(dim=1)
    return right - wrong


def gradient(answers_with: AnswersWith, x: Tensor) -> Tensor:
    """Return ∂m/∂x (B, C, D) of each prompt at activations x (B, C, D), float32."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(answers_with(leaf).sum(), leaf)[0]


def indirect_effects(dictionary: Dictionary, to_mean: Tensor, slope: Tensor) -> Tensor:
    """Return the loss of m from ablating each latent (F), to first order, summed over prompts and positions.

    `to_mean` (B, C, F) is z̄ − z, and `slope` (B, C, D) is ∂m/∂x, at x (attribution patching) or averaged along the path
    from x to all ablated (integrated gradients). The effect is −Σ ∂m/∂z_j (z̄_j − z_j): Marks et al. 2024, eq. 3 and 4,
    with the sign reversed, so that latents whose ablation hurts the answer most have the largest effects.

    >>> sae = Dictionary(architecture="relu", W_enc=torch.eye(2), b_enc=torch.zeros(2), W_dec=torch.eye(2),
    ...                  b_dec=torch.zeros(2))
    >>> indirect_effects(sae, torch.tensor([[[-3.0, 1.0]]]), torch.tensor([[[2.0, 0.5]]]))
    tensor([ 6.0000, -0.5000])
    """
    return -(to_mean * (slope @ dictionary.W_dec.T)).sum(dim=(0, 1))


# --- all dictionaries of a site -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reading:
    """A batch of prompts as the model reads it, with nothing ablated."""

    batch: PromptBatch
    clean: Forward
    keep: Tensor
    """bool (B, C): positions at which latents are ablated."""

    def x(self, site: Site) -> Tensor:
        """Return the activations (B, C, D) at a site, float32."""
        return self.clean.activations[site].float()

    @contextmanager
    def answering(self, model: LanguageModel, site: Site) -> Iterator[AnswersWith]:
        """Give a function from activations at a site to m (B)."""
        with model.resuming(self.clean, site) as states_with:
            yield lambda x: answers(model.head, states_with(x), self.batch)


Halves = tuple[Sequence[Reading], Sequence[Reading]]
"""Prompts to find circuits on, and prompts to evaluate them on."""


@torch.no_grad()
def readings(plan: Plan, model: LanguageModel, sites: Sequence[Site], prompts: Sequence[Prompt]) -> list[Reading]:
    """Read all batches of prompts at some sites."""
    found = []
    for batch in prompt_batches(plan, prompts, model.device):
        clean = model.forward(batch.tokens, plan.with_probe(sites))
        keep = trained_on(plan, batch.tokens, clean.activations)
        found.append(Reading(batch, clean, keep))
    return found


@torch.no_grad()
def circuits_at(
    model: LanguageModel,
    site: Site,
    dictionaries: Mapping[str, Dictionary],
    halves: Halves,
    *,
    k: Sequence[int],
    method: Method = "attribution",
    done: Done = uncounted,
) -> dict[str, CircuitScores]:
    """Measure circuits of k latents of each dictionary at a site, by key, as written to circuits/<task>.json.

    Latents are ranked by their effects on the first half of the prompts; m is measured on the second half, prompt by
    prompt. `done` counts the steps of `n_steps`.
    """
    find_on, judge_on = halves
    per_position = one_length([*find_on, *judge_on])
    on_device = {key: dictionary.to(model.device) for key, dictionary in dictionaries.items()}
    means = mean_codes(site, on_device, find_on, per_position=per_position)
    ablations = {key: MeanAblation(dictionary, means[key]) for key, dictionary in on_device.items()}

    n_found_on = sum(len(reading.batch.tokens) for reading in find_on)
    effects = {key: torch.zeros(d.n_latents, device=model.device) for key, d in on_device.items()}
    for reading in find_on:
        x = reading.x(site)
        with reading.answering(model, site) as answers_with:
            slope_at_x = gradient(answers_with, x)
            for key, ablation in ablations.items():
                change = ablation.change(x, reading.keep)
                slope = slope_at_x
                if method == "integrated-gradients":
                    slope = ablation.mean_slope(answers_with, x, change)
                effects[key] += indirect_effects(ablation.dictionary, change, slope) / n_found_on
        done()

    ranked = {key: effect.sort(descending=True, stable=True) for key, effect in effects.items()}
    scores: dict[str, list[Tensor]] = {key: [] for key in on_device}
    for reading in judge_on:
        x = reading.x(site)
        with reading.answering(model, site) as answers_with:
            for key, ablation in ablations.items():
                change = ablation.change(x, reading.keep)
                scores[key].append(ablation.answers(answers_with, x, change, ranked[key].indices, k))
                done()

    results = {}
    for key, parts in scores.items():
        empty, *by_size = [rounded(row) for row in torch.cat(parts, dim=1)]
        values, indices = ranked[key]
        results[key] = CircuitScores(
            latents=indices[: max(k)].tolist(),
            effects=[round(value, 6) for value in values[: max(k)].tolist()],
            m_empty=empty,
            m_kept=by_size[::2],
            m_ablated=by_size[1::2],
        )
    return results


@dataclass(frozen=True, eq=False)
class MeanAblation:
    """A dictionary whose latents are ablated to their means: (C, F) for each position, or (F) for all."""

    dictionary: Dictionary
    means: Tensor

    def change(self, x: Tensor, keep: Tensor) -> Tensor:
        """Return z̄ − z (B, C, F), with zeros at positions (B, C) that are not ablated."""
        return (self.means - self.dictionary.encode(x)) * keep[..., None]

    def mean_slope(self, answers_with: AnswersWith, x: Tensor, change: Tensor) -> Tensor:
        """Return ∂m/∂x (B, C, D), averaged along the path from nothing ablated to all ablated."""
        s = change @ self.dictionary.W_dec
        slopes = []
        for i in range(STEPS):
            part = (i + 0.5) / STEPS
            slopes.append(gradient(answers_with, x + part * s))
        return torch.stack(slopes).mean(dim=0)

    def answers(
        self, answers_with: AnswersWith, x: Tensor, change: Tensor, ranking: Tensor, k: Sequence[int]
    ) -> Tensor:
        """Return m (1 + 2 · len(k), B): with all ablated; then per size, with the circuit kept and with it ablated."""
        everything = change @ self.dictionary.W_dec
        changes = [everything]
        for size in k:
            circuit = ranking[:size]
            by_circuit = change[..., circuit] @ self.dictionary.W_dec[circuit]
            changes += [everything - by_circuit, by_circuit]
        return torch.stack([answers_with(x + s) for s in changes]).cpu()


def n_steps(n_dictionaries: int, halves: Halves) -> int:
    """Return the number of steps that the circuits of `n_dictionaries` dictionaries at a site take."""
    find_on, judge_on = halves
    return len(find_on) + n_dictionaries * len(judge_on)


def mean_codes(
    site: Site, dictionaries: Mapping[str, Dictionary], readings: Sequence[Reading], *, per_position: bool
) -> dict[str, Tensor]:
    """Return z̄ of each dictionary, by key, over positions that are trained on: (C, F) if `per_position`, else (F)."""
    totals: dict[str, Tensor] = {}
    n = torch.zeros(())
    for reading in readings:
        keep = reading.keep.float()[..., None]
        n = n + (keep.sum(dim=0) if per_position else keep.sum())
        for key, dictionary in dictionaries.items():
            z = (dictionary.encode(reading.x(site)) * keep).sum(dim=0)
            totals[key] = totals.get(key, 0) + (z if per_position else z.sum(dim=0))
    return {key: total / n.clamp(min=1) for key, total in totals.items()}


def one_length(readings: Sequence[Reading]) -> bool:
    """Whether all prompts have the same number of tokens."""
    return len({reading.batch.tokens.shape[1] for reading in readings}) == 1


def rounded(values: Tensor) -> list[float]:
    """Round logit differences as they are written to files."""
    return [round(value, 5) for value in values.tolist()]
