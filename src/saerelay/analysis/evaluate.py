"""Quality of dictionaries on held-out documents. Names and formulas are those of SAELens 6.54.

Everything a batch of tokens needs but a dictionary does not change is computed once and shared by all: activations of
all sites, the clean logits, and the logits with a site ablated. x are activations at kept positions (no BOS, no outlier
norm), x_hat their reconstructions, E means over positions.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from saerelay.analysis.summary import SCHEMA_VERSION, summary
from saerelay.data.corpus import Corpus
from saerelay.data.stream import kept_positions
from saerelay.errors import ModelError, RunDirectoryError
from saerelay.files import read_json, write_json
from saerelay.lm.model import LanguageModel, load_model
from saerelay.planning.plan import Leg, Plan
from saerelay.runs.dictionaries import read_dictionary
from saerelay.runs.directory import RunDirectory
from saerelay.runs.suite import PublishedSuite
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.kernels import reconstruct
from saerelay.sae.threads import side_by_side
from saerelay.site import Site

LOGIT_BYTES = 2**28
"""Logits of one evaluation batch stay under this."""


ROWS_BYTES = 2**20
"""Logits are compared so many at a time on a processor, so that they stay in its cache."""


@dataclass
class Quality:
    """Running sums over kept positions for one dictionary; all on the CPU, in float64."""

    n_tokens: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    x_sum: Tensor | None = None
    fires: Tensor | None = None
    sequence_delta_ce: list[Tensor] = field(default_factory=list)

    def add(self, **values: Tensor) -> None:
        """Add sums over positions."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.sum(dtype=torch.float64))

    def add_reconstruction(self, dictionary: Dictionary, x: Tensor) -> Tensor:
        """Take in kept activations x (B, D), float32; their reconstructions."""
        codes, x_hat = reconstruct(dictionary, x)
        active = codes.values != 0
        norm, norm_hat = x.norm(dim=1), x_hat.norm(dim=1)
        self.add(
            l0=active,
            l1=codes.values,
            squared_error=(x - x_hat).square(),
            x_squared=norm.square(),
            cossim=torch.nn.functional.cosine_similarity(x, x_hat, dim=1),
            l2_ratio=norm_hat / norm.clamp(min=1e-12),
        )
        total = x.sum(dim=0, dtype=torch.float64).cpu()
        fires = torch.bincount(codes.columns[active], minlength=dictionary.n_latents).cpu()
        self.x_sum = total if self.x_sum is None else self.x_sum + total
        self.fires = fires if self.fires is None else self.fires + fires
        self.n_tokens += x.shape[0]
        return x_hat

    def result(self, ablated: "Ablation | None") -> dict[str, Any]:
        """The metrics by name (see docs/run-directory.md)."""
        assert self.x_sum is not None and self.fires is not None
        mean = {name: value / self.n_tokens for name, value in self.sums.items() if name not in ("ce", "kl")}
        variance = mean["x_squared"] - float((self.x_sum / self.n_tokens).square().sum())
        fvu = mean["squared_error"] / variance if variance > 0 else math.nan
        result: dict[str, Any] = {
            "n_tokens": self.n_tokens,
            "l0": mean["l0"],
            "l1": mean["l1"],
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "mse": mean["squared_error"],
            "cossim": mean["cossim"],
            "l2_ratio": mean["l2_ratio"],
            "frac_alive": float((self.fires > 0).double().mean()),
            "density": density(self.fires / self.n_tokens),
        }
        if ablated:
            result |= self._downstream(ablated)
        return result

    def _downstream(self, ablated: "Ablation") -> dict[str, Any]:
        ce, kl = self.sums["ce"] / ablated.n_ce, self.sums["kl"] / ablated.n_kl
        clean, zero, kl_zero = ablated.ce_clean / ablated.n_ce, ablated.ce / ablated.n_ce, ablated.kl / ablated.n_kl
        deltas = torch.cat(self.sequence_delta_ce)
        spread = float(deltas.std()) if len(deltas) > 1 else math.nan
        return {
            "ce_loss_without_sae": clean,
            "ce_loss_with_sae": ce,
            "ce_loss_with_ablation": zero,
            "delta_ce": ce - clean,
            "delta_ce_se": spread / math.sqrt(len(deltas)),
            "sequence_delta_ce": [round(float(delta), 6) for delta in deltas],
            "ce_loss_score": (zero - ce) / (zero - clean) if zero != clean else math.nan,
            "kl_div_with_sae": kl,
            "kl_div_with_ablation": kl_zero,
            "kl_div_score": (kl_zero - kl) / kl_zero if kl_zero else math.nan,
        }


@dataclass
class Ablation:
    """Running sums with one site zeroed at all positions, and the clean ones beside them."""

    n_ce: int = 0
    n_kl: int = 0
    ce_clean: float = 0.0
    ce: float = 0.0
    kl: float = 0.0


def density(frequency: Tensor) -> dict[str, Any]:
    """How often latents fire: a histogram of log10(firing frequency), and shares of frequent ones; frequency (F)."""
    alive = frequency[frequency > 0].log10()
    counts, edges = np.histogram(alive.numpy(), bins=np.arange(-7.0, 0.5, 0.5))
    return {
        "log10_edges": edges.tolist(),
        "counts": counts.tolist(),
        "never": int((frequency == 0).sum()),
        "freq_over_1_percent": float((frequency > 0.01).double().mean()),
        "freq_over_10_percent": float((frequency > 0.1).double().mean()),
    }


@torch.no_grad()
def measure(
    plan: Plan,
    model: LanguageModel,
    sequences: np.ndarray,
    dictionaries: dict[str, tuple[Site, Dictionary]],
    *,
    ce: bool,
    console: Console | None = None,
) -> dict[str, dict[str, Any]]:
    """Quality of dictionaries, by key, on sequences (N, context) of held-out token ids."""
    on_device = {key: (site, d.to(model.device)) for key, (site, d) in dictionaries.items()}
    sites = sorted({site for site, _ in on_device.values()})
    qualities = {key: Quality() for key in on_device}
    ablations = {site: Ablation() for site in sites}
    open_sites = plan.with_probe(sites)
    silent = console is None or not console.is_terminal
    for tokens in track(
        list(batches(plan, sequences, ce)), "evaluating", console=console, transient=True, disable=silent
    ):
        tokens = tokens.to(model.device)
        forward = model.forward(tokens, open_sites) if ce else None
        harvested = forward.activations if forward else model.harvest(tokens, open_sites)
        flat = {site: x.flatten(0, 1) for site, x in harvested.items()}
        keep = kept_positions(plan, tokens, flat)
        clean = Logits(forward.logits, tokens, keep) if forward else None
        for site in sites:
            here = [(qualities[key], d) for key, (where, d) in on_device.items() if where == site]
            with model.resuming(forward, site) if forward else nullcontext() as logits_with:
                batch = Batch(harvested[site], keep, flat[site][keep].float(), clean, logits_with)
                jobs = [partial(batch.add_ablation, ablations[site])] if clean else []
                jobs += [partial(batch.add_dictionary, *pair) for pair in here]
                side_by_side(lambda job: job(), jobs, model.device)
    return {key: quality.result(ablations[on_device[key][0]] if ce else None) for key, quality in qualities.items()}


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch at one site, which many dictionaries are measured on, side by side."""

    whole: Tensor
    """(B, C, D), as the model has it."""
    keep: Tensor
    """bool (B·C)."""
    x: Tensor
    """Kept positions (n, D), float32."""
    clean: "Logits | None"
    logits_with: Callable[[Tensor], Tensor] | None
    """The model's logits with something else in place of `whole`."""

    def add_ablation(self, sums: Ablation) -> None:
        """Add a forward pass with the site zeroed."""
        assert self.clean and self.logits_with
        self.clean.add_ablation(sums, self.logits_with(torch.zeros_like(self.whole)))

    def add_dictionary(self, quality: Quality, dictionary: Dictionary) -> None:
        """Add a dictionary's reconstructions, and a forward pass with them in place."""
        x_hat = quality.add_reconstruction(dictionary, self.x)
        if self.clean and self.logits_with:
            whole = self.whole.clone()
            whole.view(-1, whole.shape[-1])[self.keep] = x_hat.to(whole.dtype)
            self.clean.add_spliced(quality, self.logits_with(whole))


class Logits:
    """Clean logits of one batch, and comparisons with changed ones; (B, C, V) for tokens (B, C).

    Of changed logits s only log Σ exp s, Σ p s with the clean probabilities p, and s of the next token are needed:
    CE = log Σ exp s − s_next, KL(clean ‖ changed) = Σ p log p − Σ p s + log Σ exp s.
    """

    def __init__(self, logits: Tensor, tokens: Tensor, keep: Tensor) -> None:
        self.keep = keep.view_as(tokens)
        self.next = tokens[:, 1:, None]
        log_p = logits.float().log_softmax(dim=-1)
        self.p = log_p.exp().flatten(0, 1)
        self.negative_entropy = torch.linalg.vecdot(self.p, log_p.flatten(0, 1)).view_as(tokens)
        self.ce = self.compare(logits)[0]

    def compare(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """CE (B, C − 1) of each next token and KL from the clean logits (B, C); zero where a position is not kept."""
        n_rows = max(1, ROWS_BYTES // (4 * logits.shape[-1])) if logits.device.type == "cpu" else len(self.p)
        totals, products = list[Tensor](), list[Tensor]()
        for p, part in zip(self.p.split(n_rows), logits.flatten(0, 1).split(n_rows), strict=True):
            part = part.float()
            totals.append(part.logsumexp(dim=-1))
            products.append(torch.linalg.vecdot(p, part))
        total, product = torch.cat(totals).view_as(self.keep), torch.cat(products).view_as(self.keep)
        ce = total[:, :-1] - logits[:, :-1].gather(-1, self.next).squeeze(-1)
        return ce * self.keep[:, :-1], (self.negative_entropy - product + total) * self.keep

    def add_ablation(self, sums: Ablation, logits: Tensor) -> None:
        """Add a forward pass with a site ablated."""
        ce, kl = self.compare(logits)
        sums.n_ce += int(self.keep[:, :-1].sum())
        sums.n_kl += int(self.keep.sum())
        sums.ce_clean += float(self.ce.sum(dtype=torch.float64))
        sums.ce += float(ce.sum(dtype=torch.float64))
        sums.kl += float(kl.sum(dtype=torch.float64))

    def add_spliced(self, quality: Quality, logits: Tensor) -> None:
        """Add a forward pass with a site reconstructed."""
        ce, kl = self.compare(logits)
        quality.add(ce=ce, kl=kl)
        n = self.keep[:, :-1].sum(dim=1)
        quality.sequence_delta_ce.append(((ce - self.ce).sum(dim=1) / n.clamp(min=1))[n > 0].double().cpu())


def batches(plan: Plan, sequences: np.ndarray, ce: bool) -> Iterator[Tensor]:
    """The evaluation sequences as batches of token ids (B, context)."""
    context = plan.run.data.context
    per_batch = max(1, 4096 // context)
    if ce:
        per_batch = max(1, min(per_batch, LOGIT_BYTES // (4 * context * plan.facts.vocab_size)))
    for start in range(0, len(sequences), per_batch):
        yield torch.from_numpy(sequences[start : start + per_batch].astype(np.int64))


def evaluate_run(
    suite: PublishedSuite, model: LanguageModel | None = None, *, tokens: int = 0, console: Console | None = None
) -> dict[str, Any]:
    """Evaluate every published leg and snapshot on the test split; what was measured before is not measured again.

    Writes eval/<id>.json and returns the document that `summary.json` and `saerelay eval --json` share. `model` may be
    None to load it only if something is left to measure.
    """
    plan, paths = suite.plan, suite.directory
    if not suite.legs:
        raise RunDirectoryError(f"{paths.root}: no leg is finished yet; finish the run with `saerelay train --resume`")
    test = Corpus.open(paths.tokens).test
    asked = {"tokens": min(tokens or plan.run.evaluate.tokens, int(test.size)), "ce": wants_ce(plan)}
    missing = [leg for leg in suite.legs if not _measured(paths, leg, asked)]
    if missing:
        model = model or load_model(plan)
        wanted = {key: value for leg in missing for key, value in _dictionaries(paths, leg).items()}
        sequences = held_out(plan, test, asked["tokens"])
        results = measure(plan, model, sequences, wanted, ce=asked["ce"], console=console)
        for leg in missing:
            snapshots = {key.rpartition("@")[2]: r for key, r in results.items() if key.rpartition("@")[0] == leg.id}
            document = {"schema": SCHEMA_VERSION, "asked": asked, "split": "test", "ablation": "zero, all positions"}
            document |= {"leg": leg.id, "metrics": results[leg.id], "snapshots": snapshots}
            write_json(paths.evaluation(leg.id), document)
    return summary(suite)


def held_out(plan: Plan, split: np.ndarray, tokens: int) -> np.ndarray:
    """The first sequences (N, context) of a split that have as many tokens, or all it has."""
    return split[: math.ceil(tokens / plan.run.data.context)]


def wants_ce(plan: Plan) -> bool:
    """Whether CE and KL are measured; ModelError if they are asked of a model without a language-model head."""
    asked = plan.run.evaluate.ce
    if asked is True and not plan.facts.has_lm_head:
        raise ModelError(
            f"evaluate.ce is true, but {plan.facts.name} ({plan.facts.family}) has no language-model head, so there is "
            'no cross-entropy; set evaluate.ce = "auto" or false, or use a causal language model'
        )
    return plan.facts.has_lm_head if asked == "auto" else asked


def _measured(paths: RunDirectory, leg: Leg, asked: dict[str, Any]) -> bool:
    path = paths.evaluation(leg.id)
    if not path.is_file():
        return False
    document = read_json(path)
    ages = {str(age) for age in paths.ages(leg)}
    return document.get("asked") == asked and set(document["snapshots"]) == ages


def _dictionaries(paths: RunDirectory, leg: Leg) -> dict[str, tuple[Site, Dictionary]]:
    """A leg's dictionary under its id, and those of its snapshots under id@age."""
    found = {leg.id: (leg.site, read_dictionary(paths.leg(leg.id))[0])}
    for age in paths.ages(leg):
        found[f"{leg.id}@{age}"] = (leg.site, read_dictionary(paths.snapshot(leg.id, age))[0])
    return found
