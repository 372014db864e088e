"""The metrics of dictionaries, as sums over batches of held-out tokens. Names and formulas are those of SAELens 6.54.

x denotes activations at kept positions (no BOS, no outlier norms), x_hat their reconstructions.

Shapes: B sequences of a batch, C positions, D width, Dy width of what is reconstructed, F latents, V vocabulary, n kept
positions of a batch.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saerelay.analysis.logits import Loss
from saerelay.runs.documents.quality import Density, EvaluationMetrics
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.kernels import reconstruct
from saerelay.sae.quality import MEASURE_BALANCE, balanced_ratio


@dataclass
class AblationSums:
    """Running sums with one site zeroed at all positions, together with the clean sums."""

    n_ce: int = 0
    """Positions over which cross-entropy is summed: kept positions with a next token."""
    n_kl: int = 0
    """Positions over which KL is summed: kept positions."""
    ce_clean: float = 0.0
    ce: float = 0.0
    kl: float = 0.0
    same_row: Tensor | None = None
    """The logits (V) common to all positions, if zeroing the site makes all positions alike."""

    def add_loss(self, clean: Loss, loss: Loss, keep: Tensor) -> None:
        """Add the losses of a batch's kept positions (B, C) with the site zeroed."""
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
    """Number of times that each latent fired (F)."""
    sequence_delta_ce: list[Tensor] = field(default_factory=list)

    def add(self, **values: Tensor) -> None:
        """Add sums over positions, by name."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.sum(dtype=torch.float64))

    def add_reconstruction(self, dictionary: Dictionary, read: Tensor, x: Tensor) -> Tensor:
        """Add kept activations (n, D) to read, and x (n, Dy) to reconstruct, in float32; returns x_hat."""
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
        """Add the losses of a batch's kept positions (B, C) with the reconstructions in place."""
        self.add(ce=loss.ce, kl=loss.kl)
        n_kept = keep[:, :-1].sum(dim=1)
        delta_ce = (loss.ce - clean.ce).sum(dim=1) / n_kept.clamp(min=1)
        self.sequence_delta_ce.append(delta_ce[n_kept > 0].cpu())

    def metrics(self, ablated: AblationSums | None) -> EvaluationMetrics:
        """Return the metrics; cross-entropy and KL are included only with the sums of an ablation."""
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
    """Summarise how often latents fire, from their firing frequencies (F).

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
