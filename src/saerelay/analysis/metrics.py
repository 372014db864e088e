"""Dictionaries measured on held-out tokens, many at a time; `sums` has the metrics.

Results that do not depend on the dictionary are computed once per batch and shared: the activations of all sites, the
clean logits, and the logits with a site ablated.

Shapes: B sequences of a batch, C positions, D width, V vocabulary, n kept positions of a batch.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saerelay.analysis.logits import CleanStates, one_row, same_everywhere
from saerelay.analysis.progress import HIDDEN, Done, ProgressDisplay
from saerelay.analysis.sums import AblationSums, MetricSums
from saerelay.data.kept import OutlierCount, kept_positions
from saerelay.errors import ModelError
from saerelay.lm.model import Forward, LanguageModel
from saerelay.planning.leg import Leg
from saerelay.planning.plan import Plan
from saerelay.runs.documents.quality import EvaluationMetrics
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.threads import side_by_side
from saerelay.site import Site

BATCH_TOKENS = 2048
"""Most token positions in one batch."""
LOGIT_BYTES = 2**29
"""Most bytes of one batch's logits, if they are all held at once."""
STATES_BYTES = 2**28
"""Most bytes of last hidden states waiting for comparison: states compared together share one run of clean logits."""
ON_GPU = 16
"""Factor by which batches are larger on a GPU, which smaller ones would not keep busy."""
TRIAL_TOKENS = 64
"""Token positions on which it is tried whether zeroing a site makes all of them alike."""


class Placed(NamedTuple):
    """A dictionary, and the site where it is placed."""

    site: Site
    """The site it reads."""
    dictionary: Dictionary
    target: Site | None = None
    """The site it reconstructs, if it is a transcoder."""

    @classmethod
    def of(cls, placed: "Placed | tuple[Site, Dictionary]") -> "Placed":
        """Make a Placed from a site and a dictionary; a Placed is returned as it is."""
        return placed if isinstance(placed, Placed) else cls(*placed)

    @classmethod
    def at_home(cls, leg: Leg, dictionary: Dictionary) -> "Placed":
        """Place a leg's dictionary at the site where it was trained."""
        return cls(leg.site, dictionary, leg.site_out)

    @property
    def site_out(self) -> Site:
        """The site whose activations its reconstruction replaces."""
        return self.target or self.site

    def on(self, device: torch.device) -> "Placed":
        """Move the dictionary to a device."""
        return self._replace(dictionary=self.dictionary.to(device))


def snapshot_key(leg_id: str, age: int) -> str:
    """Return the key under which a leg's snapshot of an age is measured; a finished leg's key is its id.

    >>> snapshot_key("L3", 4096)
    'L3@4096'
    """
    return f"{leg_id}@{age}"


@torch.no_grad()
def measure(
    plan: Plan,
    model: LanguageModel,
    sequences: np.ndarray,
    dictionaries: Mapping[str, Placed | tuple[Site, Dictionary]],
    *,
    ce: bool,
    display: ProgressDisplay = HIDDEN,
) -> dict[str, EvaluationMetrics]:
    """Measure dictionaries, by key, on sequences (N, context) of held-out token ids.

    The metrics of a transcoder are about the site it reconstructs, such as an MLP's output. With `ce`, they include
    cross-entropy and KL, which take a forward pass per dictionary.
    """
    on_device = {key: Placed.of(placed).on(model.device) for key, placed in dictionaries.items()}
    measurement = Measurement(plan, model, on_device, ce)
    if ce:
        measurement.try_ablations(sequences)
    holds_logits = ce and not model.head.in_parts
    every_batch = list(batches(plan, sequences, model.device, holds_logits=holds_logits))
    n_steps = len(every_batch) * len(on_device)
    if ce:
        n_steps *= 2  # the layers above the site, then the head
    with display.counting(n_steps, "evaluating") as done:
        for tokens in every_batch:
            measurement.add(tokens.to(model.device), done)
    return measurement.metrics()


class Measurement:
    """Dictionaries, by key, that are measured batch by batch on the same tokens."""

    def __init__(self, plan: Plan, model: LanguageModel, placed: Mapping[str, Placed], ce: bool) -> None:
        self.plan = plan
        self.model = model
        self.placed = placed
        self.ce = ce
        self.sites = sorted({one.site_out for one in placed.values()})
        self.sums = {key: MetricSums() for key in placed}
        self.ablations = {site: AblationSums() for site in self.sites}
        self.outliers = OutlierCount(plan)

    def try_ablations(self, sequences: np.ndarray) -> None:
        """Find the sites without which all positions are alike, on the first of the sequences (N, context)."""
        n = math.ceil(TRIAL_TOKENS / sequences.shape[1])
        clean = self.model.forward(torch.from_numpy(sequences[:n].astype(np.int64)), self.sites)
        for site in self.sites:
            self.ablations[site].same_row = row_without(self.model, clean, site)

    def add(self, tokens: Tensor, done: Done) -> None:
        """Add a batch of token ids (B, context); `done` is called for each dictionary, with `ce` twice."""
        model = self.model
        read = self.plan.with_probe([*self.sites, *(one.site for one in self.placed.values())])
        forward = model.forward(tokens, read) if self.ce else None
        activations = forward.activations if forward else model.harvest(tokens, read)
        flat = {site: x.flatten(0, 1) for site, x in activations.items()}
        keep = kept_positions(self.plan, tokens, flat)
        self.outliers.add(tokens, keep.view_as(tokens))
        losses = Losses(model, forward, keep.view_as(tokens), done) if forward else None

        def add_dictionary(batch: SiteBatch, key: str) -> Changed | None:
            changed = batch.add_dictionary(self.sums[key], self.placed[key])
            done()
            return changed

        for site in self.sites:
            keys = [key for key, one in self.placed.items() if one.site_out == site]
            rows = {one: flat[one][keep].float() for one in {site, *(self.placed[key].site for key in keys)}}
            with model.resuming(forward, site) if forward else nullcontext() as states_with:
                batch = SiteBatch(site, activations[site], keep, rows, states_with)
                jobs: list[Callable[[], Changed | None]] = [partial(add_dictionary, batch, key) for key in keys]
                if losses:
                    losses.run([partial(batch.add_ablation, self.ablations[site]), *jobs])
                else:
                    _results(jobs, model)
        if losses:
            losses.add()

    def metrics(self) -> dict[str, EvaluationMetrics]:
        """Return the metrics of all dictionaries."""
        left_out = self.outliers.left_out()
        found = {}
        for key, one in self.placed.items():
            ablated = self.ablations[one.site_out] if self.ce else None
            found[key] = self.sums[key].metrics(ablated).changed(left_out=left_out)
        return found


def row_without(model: LanguageModel, clean: Forward, site: Site) -> Tensor | None:
    """Return the logits (V) common to all positions if a site is zeroed; None if positions then still differ.

    Without the residual stream, the layers above see the same input at every position of every sequence.
    """
    with model.resuming(clean, site) as states_with:
        states = states_with(torch.zeros_like(clean.activations[site]))
    return one_row(model.head, states) if same_everywhere(states) else None


def _results(jobs: Sequence[Callable[[], "Changed | None"]], model: LanguageModel) -> "list[Changed | None]":
    """Return the results of jobs, run in order if other ranks hold the model with this one and run the same jobs."""
    if model.is_split:
        return [job() for job in jobs]
    return side_by_side(lambda job: job(), jobs, model.device)


def batches(plan: Plan, sequences: np.ndarray, device: torch.device, *, holds_logits: bool = False) -> Iterator[Tensor]:
    """Yield sequences (N, context) in batches of token ids (B, context) for a model on a device.

    With `holds_logits` they are so small that all logits of a batch fit.
    """
    context = plan.recipe.data.context
    times = 1 if device.type == "cpu" else ON_GPU
    per_batch = max(1, times * BATCH_TOKENS // context)
    if holds_logits:
        fitting = times * LOGIT_BYTES // (4 * context * plan.facts.tokens.vocab_size)
        per_batch = max(1, min(per_batch, fitting))
    for start in range(0, len(sequences), per_batch):
        yield torch.from_numpy(sequences[start : start + per_batch].astype(np.int64))


def held_out(plan: Plan, split: np.ndarray, tokens: int) -> np.ndarray:
    """Return the first sequences (N, context) of a split that hold `tokens`, or all of them."""
    return split[: math.ceil(tokens / plan.recipe.data.context)]


def wants_ce(plan: Plan) -> bool:
    """Whether CE and KL are measured; ModelError if they are asked of a model without a language-model head."""
    asked = plan.recipe.evaluate.ce
    if asked is True and not plan.facts.has_lm_head:
        raise ModelError(
            f"evaluate.ce is true, but {plan.facts.name} ({plan.facts.family}) has no language-model head, so there is "
            'no cross-entropy; set evaluate.ce = "auto" or false, or use a causal language model'
        )
    return plan.facts.has_lm_head if asked == "auto" else asked


# --- one batch ------------------------------------------------------------------------------------------------------


class Changed(NamedTuple):
    """The head's input with a site changed, and the sums to which its losses are added."""

    sums: MetricSums | AblationSums
    states: Tensor | None = None
    """Last hidden states (B, C, D) ..."""
    row: Tensor | None = None
    """... or the logits (V), float32, common to all positions."""


class Losses:
    """Changed states of one batch that wait to be compared with the clean ones, which takes one run of clean logits."""

    def __init__(self, model: LanguageModel, forward: Forward, keep: Tensor, done: Done) -> None:
        """`keep`: bool (B, C); `done` is called for each dictionary whose losses are added."""
        self.model = model
        self.clean = CleanStates(model.head, forward.states, forward.tokens, keep)
        self.at_once = max(1, STATES_BYTES // forward.states.nbytes)
        """Most states that wait."""
        self.waiting: list[Changed] = []
        self.done = done

    def run(self, jobs: Sequence[Callable[[], Changed | None]]) -> None:
        """Run jobs that give changed states; those that wait are compared when more would not have room."""
        for start in range(0, len(jobs), self.at_once):
            together = jobs[start : start + self.at_once]
            if len(self.waiting) + len(together) > self.at_once:
                self.add()
            self.waiting += [changed for changed in _results(together, self.model) if changed is not None]

    def add(self) -> None:
        """Compare all states that wait, and add their losses to their sums."""
        moved = [(one.sums, one.states) for one in self.waiting if one.states is not None]
        uniform = [(one.sums, one.row) for one in self.waiting if one.row is not None]
        self.waiting = []
        if not moved and not uniform:
            return
        own, *losses = self.clean.losses([states for _, states in moved], [row for _, row in uniform])
        for (sums, _), loss in zip([*moved, *uniform], losses, strict=True):
            sums.add_loss(own, loss, self.clean.keep)
            if isinstance(sums, MetricSums):
                self.done()


@dataclass(frozen=True, eq=False)
class SiteBatch:
    """One batch at one site, on which many dictionaries are measured side by side."""

    site: Site
    whole: Tensor
    """Activations (B, C, D), in the model's dtype."""
    keep: Tensor
    """bool (B·C): kept positions."""
    rows: Mapping[Site, Tensor]
    """Kept activations (n, D), float32, of the site and of the sites that transcoders to it read."""
    states_with: Callable[[Tensor], Tensor] | None
    """Gives the last hidden states with other activations in place of `whole`; None if losses are not measured."""

    def add_ablation(self, sums: AblationSums) -> Changed:
        """Run the layers above with the site zeroed, unless that is known to make all positions alike."""
        assert self.states_with
        if sums.same_row is not None:
            return Changed(sums, row=sums.same_row)
        return Changed(sums, self.states_with(torch.zeros_like(self.whole)))

    def add_dictionary(self, sums: MetricSums, placed: Placed) -> Changed | None:
        """Add a dictionary's reconstructions, and run the layers above with them in place."""
        x_hat = sums.add_reconstruction(placed.dictionary, self.rows[placed.site], self.rows[self.site])
        if not self.states_with:
            return None
        spliced = self.whole.clone()
        spliced.view(-1, spliced.shape[-1])[self.keep] = x_hat.to(spliced.dtype)
        return Changed(sums, self.states_with(spliced))
