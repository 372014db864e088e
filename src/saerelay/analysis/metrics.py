"""The metrics of dictionaries on held-out tokens. Names and formulas are those of SAELens 6.54.

Whatever does not change with the dictionary is computed once per batch and shared: the activations of all sites, the
clean logits, and the logits with a site ablated. x are activations at kept positions (no BOS, no outlier norms), x_hat
their reconstructions, E means over positions.

Shapes: B sequences of a batch, C positions, D width, F latents, V vocabulary, n kept positions of a batch.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saerelay.analysis.logits import CleanStates, Loss, one_row, same_everywhere
from saerelay.analysis.progress import Track, untracked
from saerelay.data.stream import OutlierCount, kept_positions
from saerelay.errors import ModelError
from saerelay.lm.head import Head
from saerelay.lm.model import LanguageModel
from saerelay.planning.plan import Leg, Plan
from saerelay.runs.documents.quality import Density, EvaluationMetrics
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.kernels import reconstruct
from saerelay.sae.quality import MEASURE_BALANCE, balanced_ratio
from saerelay.sae.threads import side_by_side
from saerelay.site import Site

BATCH_TOKENS = 4096
"""Token positions in one batch, at most."""
LOGIT_BYTES = 2**29
"""Logits of one batch stay below this."""
STATES_BYTES = 2**28
"""Last hidden states that wait to be compared, at most: all of a batch together need the clean logits only once."""
ON_GPU = 8
"""How many times as much a batch holds on a GPU, which smaller ones do not keep busy."""


class Placed(NamedTuple):
    """A dictionary, and the site it is put at."""

    site: Site
    """What it reads."""
    dictionary: Dictionary
    target: Site | None = None
    """What it reconstructs, if it is a transcoder."""

    @classmethod
    def of(cls, placed: "Placed | tuple[Site, Dictionary]") -> "Placed":
        """The same, if only a site and a dictionary are given."""
        return placed if isinstance(placed, Placed) else cls(*placed)

    @classmethod
    def at_home(cls, leg: Leg, dictionary: Dictionary) -> "Placed":
        """A leg's dictionary where it was trained."""
        return cls(leg.site, dictionary, leg.site_out)

    @property
    def site_out(self) -> Site:
        """What its reconstruction takes the place of."""
        return self.target or self.site

    def on(self, device: torch.device) -> "Placed":
        """The same on another device."""
        return self._replace(dictionary=self.dictionary.to(device))


@torch.no_grad()
def measure(
    plan: Plan,
    model: LanguageModel,
    sequences: np.ndarray,
    dictionaries: Mapping[str, Placed | tuple[Site, Dictionary]],
    *,
    ce: bool,
    track: Track = untracked,
) -> dict[str, EvaluationMetrics]:
    """The metrics of dictionaries, by key, on sequences (N, context) of held-out token ids.

    Those of transcoders are about what they reconstruct, such as an MLP's output.

    With `ce` also cross-entropy and KL, which take a forward pass for each dictionary.
    """
    on_device = {key: Placed.of(placed).on(model.device) for key, placed in dictionaries.items()}
    sums = {key: MetricSums() for key in on_device}
    sites = sorted({placed.site_out for placed in on_device.values()})
    ablations = {site: AblationSums() for site in sites}
    open_sites = plan.with_probe([*sites, *(placed.site for placed in on_device.values())])
    outliers = OutlierCount(plan)

    for tokens in track(list(batches(plan, sequences, ce)), "evaluating"):
        tokens = tokens.to(model.device)
        forward = model.forward(tokens, open_sites) if ce else None
        activations = forward.activations if forward else model.harvest(tokens, open_sites)
        flat = {site: x.flatten(0, 1) for site, x in activations.items()}
        keep = kept_positions(plan, tokens, flat)
        outliers.add(tokens, keep.view_as(tokens))
        clean = CleanStates(model.head, forward.states, tokens, keep.view_as(tokens)) if forward else None
        at_once = max(1, STATES_BYTES // forward.states.nbytes) if forward else len(on_device)
        waiting: list[Changed] = []
        for site in sites:
            at_site = [(sums[key], placed) for key, placed in on_device.items() if placed.site_out == site]
            read = {site, *(placed.site for _, placed in at_site)}
            rows = {one: flat[one][keep].float() for one in read}
            with model.resuming(forward, site) if forward else nullcontext() as states_with:
                batch = SiteBatch(site, activations[site], keep, rows, states_with)
                jobs: list[Callable[[], Changed | None]] = [partial(batch.add_dictionary, *pair) for pair in at_site]
                if clean:
                    jobs.insert(0, partial(batch.add_ablation, ablations[site], model.head))
                for start in range(0, len(jobs), at_once):
                    together = jobs[start : start + at_once]
                    if clean and len(waiting) + len(together) > at_once:
                        add_losses(clean, waiting)
                        waiting = []
                    waiting += [one for one in _done(together, model) if one is not None]
        if clean and waiting:
            add_losses(clean, waiting)

    left_out = outliers.left_out()
    found = {}
    for key, placed in on_device.items():
        ablated = ablations[placed.site_out] if ce else None
        found[key] = sums[key].metrics(ablated).changed(left_out=left_out)
    return found


def _done(jobs: Sequence[Callable[[], "Changed | None"]], model: LanguageModel) -> "list[Changed | None]":
    """What jobs return; one after the other where other ranks hold the model with this one, and run the same."""
    if model.is_split:
        return [job() for job in jobs]
    return side_by_side(lambda job: job(), jobs, model.device)


def batches(plan: Plan, sequences: np.ndarray, ce: bool) -> Iterator[Tensor]:
    """Sequences (N, context) as batches of token ids (B, context); with `ce`, so few that their logits fit."""
    context = plan.recipe.data.context
    times = ON_GPU if plan.facts.on_gpu else 1
    per_batch = max(1, times * BATCH_TOKENS // context)
    if ce:
        fitting = times * LOGIT_BYTES // (4 * context * plan.facts.tokens.vocab_size)
        per_batch = max(1, min(per_batch, fitting))
    for start in range(0, len(sequences), per_batch):
        yield torch.from_numpy(sequences[start : start + per_batch].astype(np.int64))


def held_out(plan: Plan, split: np.ndarray, tokens: int) -> np.ndarray:
    """The first sequences (N, context) of a split that hold `tokens`, or all that it has."""
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


# --- sums over batches ----------------------------------------------------------------------------------------------


@dataclass
class AblationSums:
    """Running sums with one site zeroed at all positions, and the clean ones beside them."""

    n_ce: int = 0
    """Positions that cross-entropy is summed over: kept ones with a next token."""
    n_kl: int = 0
    """Positions that KL is summed over: kept ones."""
    ce_clean: float = 0.0
    ce: float = 0.0
    kl: float = 0.0
    same_row: Tensor | None = None
    """The logits (V) of every position, where zeroing the site leaves nothing to tell positions apart."""

    def add_loss(self, clean: Loss, loss: Loss, keep: Tensor) -> None:
        """Add what a batch's kept positions (B, C) lose with the site zeroed."""
        self.n_ce += int(keep[:, :-1].sum())
        self.n_kl += int(keep.sum())
        self.ce_clean += float(clean.ce.sum())
        self.ce += float(loss.ce.sum())
        self.kl += float(loss.kl.sum())


@dataclass
class MetricSums:
    """Running sums over kept positions for one dictionary; all on the CPU, in float64."""

    n_tokens: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    moments: Tensor | None = None
    """(3, D): Σ x, Σ x², Σ (x − x_hat)²."""
    n_fired: Tensor | None = None
    """How often each latent fired (F)."""
    sequence_delta_ce: list[Tensor] = field(default_factory=list)

    def add(self, **values: Tensor) -> None:
        """Add sums over positions, by name."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.sum(dtype=torch.float64))

    def add_reconstruction(self, dictionary: Dictionary, read: Tensor, x: Tensor) -> Tensor:
        """Take in kept activations (n, D) that are read, and x (n, Dy) to be reconstructed; returns x_hat; float32."""
        codes, x_hat = reconstruct(dictionary, read)
        active = codes.values != 0
        norm = x.norm(dim=1)
        self.add(
            l0=active,
            l1=codes.values,
            cossim=torch.nn.functional.cosine_similarity(x, x_hat, dim=1),
            l2_ratio=x_hat.norm(dim=1) / norm.clamp(min=1e-12),
        )
        columns = [x, x.square(), (x - x_hat).square()]
        moments = torch.stack([column.sum(dim=0, dtype=torch.float64) for column in columns]).cpu()
        n_fired = torch.bincount(codes.columns[active], minlength=dictionary.n_latents).cpu()
        self.moments = moments if self.moments is None else self.moments + moments
        self.n_fired = n_fired if self.n_fired is None else self.n_fired + n_fired
        self.n_tokens += x.shape[0]
        return x_hat

    def add_loss(self, clean: Loss, loss: Loss, keep: Tensor) -> None:
        """Add what a batch's kept positions (B, C) lose with the reconstructions in place."""
        self.add(ce=loss.ce, kl=loss.kl)
        n_kept = keep[:, :-1].sum(dim=1)
        delta_ce = (loss.ce - clean.ce).sum(dim=1) / n_kept.clamp(min=1)
        self.sequence_delta_ce.append(delta_ce[n_kept > 0].cpu())

    def metrics(self, ablated: AblationSums | None) -> EvaluationMetrics:
        """The metrics; those of cross-entropy and KL only with the sums of an ablation."""
        assert self.moments is not None and self.n_fired is not None
        mean = {name: value / self.n_tokens for name, value in self.sums.items() if name not in ("ce", "kl")}
        x_mean, x_square, errors = self.moments / self.n_tokens
        variances = (x_square - x_mean.square()).clamp(min=0)
        total = float(variances.sum())
        fvu = float(errors.sum()) / total if total > 0 else math.nan
        downstream = self._downstream(ablated) if ablated else {}
        return EvaluationMetrics(
            n_tokens=self.n_tokens,
            l0=mean["l0"],
            l1=mean["l1"],
            fvu=fvu,
            explained_variance=1 - fvu,
            balanced_fvu=balanced_ratio(errors, variances, MEASURE_BALANCE) if total > 0 else math.nan,
            largest_dimension=float(variances.max()) / total if total > 0 else math.nan,
            mse=float(errors.sum()),
            cossim=mean["cossim"],
            l2_ratio=mean["l2_ratio"],
            frac_alive=float((self.n_fired > 0).double().mean()),
            density=density(self.n_fired / self.n_tokens),
            **downstream,
        )

    def _downstream(self, ablated: AblationSums) -> dict[str, Any]:
        ce = self.sums["ce"] / ablated.n_ce
        ce_clean = ablated.ce_clean / ablated.n_ce
        ce_zero = ablated.ce / ablated.n_ce
        kl = self.sums["kl"] / ablated.n_kl
        kl_zero = ablated.kl / ablated.n_kl
        deltas = torch.cat(self.sequence_delta_ce)
        spread = float(deltas.std()) if len(deltas) > 1 else math.nan
        return {
            "ce_loss_without_sae": ce_clean,
            "ce_loss_with_sae": ce,
            "ce_loss_with_ablation": ce_zero,
            "delta_ce": ce - ce_clean,
            "delta_ce_se": spread / math.sqrt(len(deltas)),
            "sequence_delta_ce": [round(float(delta), 6) for delta in deltas],
            "ce_loss_score": (ce_zero - ce) / (ce_zero - ce_clean) if ce_zero != ce_clean else math.nan,
            "kl_div_with_sae": kl,
            "kl_div_with_ablation": kl_zero,
            "kl_div_score": (kl_zero - kl) / kl_zero if kl_zero else math.nan,
        }


def density(frequency: Tensor) -> Density:
    """How often latents fire, from their firing frequencies (F).

    >>> density(torch.tensor([0.0, 0.02, 0.5])).freq_over_10_percent
    0.3333333333333333
    """
    alive = frequency[frequency > 0].log10()
    counts, edges = np.histogram(alive.numpy(), bins=np.arange(-7.0, 0.5, 0.5))
    return Density(
        log10_edges=edges.tolist(),
        counts=counts.tolist(),
        never=int((frequency == 0).sum()),
        freq_over_1_percent=float((frequency > 0.01).double().mean()),
        freq_over_10_percent=float((frequency > 0.1).double().mean()),
    )


# --- one batch ------------------------------------------------------------------------------------------------------


class Changed(NamedTuple):
    """What the head reads with a site changed, and the sums that take in what that costs."""

    sums: MetricSums | AblationSums
    states: Tensor | None = None
    """Last hidden states (B, C, D) ..."""
    row: Tensor | None = None
    """... or the logits (V), float32, of every position."""


def add_losses(clean: CleanStates, changed: Sequence[Changed]) -> None:
    """Add to all sums what a batch loses."""
    moved = [(one.sums, one.states) for one in changed if one.states is not None]
    uniform = [(one.sums, one.row) for one in changed if one.row is not None]
    own, *losses = clean.losses([states for _, states in moved], [row for _, row in uniform])
    for (sums, _), loss in zip([*moved, *uniform], losses, strict=True):
        sums.add_loss(own, loss, clean.keep)


@dataclass(frozen=True, eq=False)
class SiteBatch:
    """One batch at one site, on which many dictionaries are measured side by side."""

    site: Site
    whole: Tensor
    """Activations (B, C, D), as the model has them."""
    keep: Tensor
    """bool (B·C): kept positions."""
    rows: Mapping[Site, Tensor]
    """Kept activations (n, D), float32, of the site and of those that transcoders to it read."""
    states_with: Callable[[Tensor], Tensor] | None
    """The last hidden states with other activations in place of `whole`; None if nobody asks what they cost."""

    def add_ablation(self, sums: AblationSums, head: Head) -> Changed:
        """Run the layers above with the site zeroed.

        Without the residual stream, they see the same at every position of every sequence. Whether that is so is
        measured on the first batch; the others then need no forward.
        """
        assert self.states_with
        if sums.same_row is not None:
            return Changed(sums, row=sums.same_row)
        states = self.states_with(torch.zeros_like(self.whole))
        if sums.n_kl > 0 or not same_everywhere(states):
            return Changed(sums, states)
        sums.same_row = one_row(head, states)
        return Changed(sums, row=sums.same_row)

    def add_dictionary(self, sums: MetricSums, placed: Placed) -> Changed | None:
        """Add a dictionary's reconstructions, and run the layers above with them in place."""
        x_hat = sums.add_reconstruction(placed.dictionary, self.rows[placed.site], self.rows[self.site])
        if not self.states_with:
            return None
        spliced = self.whole.clone()
        spliced.view(-1, spliced.shape[-1])[self.keep] = x_hat.to(spliced.dtype)
        return Changed(sums, self.states_with(spliced))
