"""What every architecture provides.

An instance is what a recipe asks for (its fields are keys of `[dictionary]`); the methods say how such a dictionary
turns pre-activations into codes, what training adds to the squared error, and how its mean L0 is set.

Shapes: B tokens, F latents, n_active the non-zero codes of a batch. Thresholds (F) belong to the dictionary, and are
None where an architecture has none; so do r_mag (F), the scales of gates.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

from saerelay.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor

    from saerelay.sae.dictionary import Dictionary
    from saerelay.sae.kernels.codes import Codes


class BatchSums(NamedTuple):
    """What a penalty may depend on: sums over the codes of a batch."""

    n_rows: int
    n_active: Tensor
    """Non-zero codes."""
    total_code: Tensor
    """Σ z; of an architecture with a gate the sum of the gate's codes."""
    divisor: float
    """What the squared error of the batch is divided by in the loss."""


class Penalty(NamedTuple):
    """What an architecture adds to the loss of a batch, with its gradients."""

    loss: Tensor
    to_z: float | Tensor | None = None
    """∂loss/∂z of every active code, or of every code of the gate, if it depends on codes."""
    to_step: Tensor | None = None
    """∂loss/∂1[pre > threshold], if it depends on how many codes are active."""


class GateGradients(NamedTuple):
    """What the loss of a gate's codes gives to what they are made of."""

    z: Tensor
    threshold: Tensor
    r_mag: Tensor


class Architecture(Spec):
    """One kind of sparse autoencoder."""

    name: ClassVar[str]
    """As recipes and files spell it."""
    title: ClassVar[str]
    """As people spell it."""
    l0_key: ClassVar[str | None] = None
    """The field that asks for a mean number of active latents, if there is one."""
    has_threshold: ClassVar[bool] = False
    """Whether dictionaries have a threshold (F)."""
    threshold_is_calibrated: ClassVar[bool] = False
    """Whether the threshold is no parameter: it is set so that mean L0 is k on given activations."""
    has_gate: ClassVar[bool] = False
    """Whether training also reconstructs from a gate's codes (`gate_codes`), whose scale, r_mag, dictionaries have."""
    selects_over_batch: ClassVar[bool] = False
    """Whether training chooses active latents over a whole batch, not token by token."""
    selects_fixed_number: ClassVar[bool] = False
    """Whether training selects the same number of latents in every batch of a size."""
    l0_is_exact: ClassVar[bool] = False
    """Whether every token has the same number of active latents, whatever the activations."""

    @property
    def l0(self) -> float | None:
        """Active latents per token that are asked for; None if they follow from a penalty."""
        return None if self.l0_key is None else float(getattr(self, self.l0_key))

    def with_l0(self, l0: float) -> Self:
        """The same, asking for another number of active latents; unchanged if it asks for none."""
        if self.l0_key is None:
            return self
        kind = type(getattr(self, self.l0_key))
        value = max(1, round(l0)) if kind is int else float(l0)
        return self.model_copy(update={self.l0_key: value})

    @property
    def published_k(self) -> int | None:
        """The `k` that a dictionary is published with."""
        return getattr(self, "k", None)

    @property
    def weight_of_aux(self) -> float:
        """Weight of the dead latents' loss (AuxK) in training; 0 for architectures without it."""
        return getattr(self, "aux_weight", 0.0)

    @classmethod
    def of_dictionary(cls, k: int | None) -> Self:
        """As it encodes in a trained dictionary, which knows nothing of training but `k`."""
        return cls() if k is None or "k" not in cls.model_fields else cls.model_validate({"k": k})

    # --- encoding -------------------------------------------------------------------------------------------------

    @abstractmethod
    def activate(self, pre: Tensor, threshold: Tensor | None) -> Tensor:
        """Codes z (..., F), non-negative and mostly zero, of pre-activations (..., F)."""

    def encode_sparse(self, pre: Tensor, threshold: Tensor | None, ops: ModuleType) -> Codes:
        """The same codes of pre-activations (B, F) without the zeros; `ops` are the sparse kernels of their device."""
        return ops.nonzero_codes(self.activate(pre, threshold))

    # --- a given mean L0 ------------------------------------------------------------------------------------------

    @abstractmethod
    def match_l0(self, dictionary: Dictionary, x: Tensor, l0: float) -> Dictionary:
        """Shift what decides which latents are active until mean L0 on activations x (B, D) is `l0`."""

    def firing_level(self, dictionary: Dictionary, x: Tensor, latents: Tensor) -> Tensor:
        """What the pre-activation of each of some latents must exceed to fire on activations x (B, D)."""
        if dictionary.threshold is None:
            return x.new_zeros(())
        return dictionary.threshold[latents]

    # --- training, by autograd: the reference ---------------------------------------------------------------------

    def training_codes(self, pre: Tensor, threshold: Tensor | None) -> Tensor:
        """Codes z (B, F) of a training batch, differentiable."""
        return self.activate(pre, threshold)

    def training_penalty(self, pre: Tensor, z: Tensor, threshold: Tensor | None, divisor: float) -> Tensor | None:
        """What is added to the squared error once its warm-up is over, differentiable; None if nothing is.

        z (B, F) are the codes, or the gate's where there is one.
        """
        return None

    def gate_codes(self, z: Tensor, threshold: Tensor, r_mag: Tensor) -> Tensor:
        """The gate's codes, differentiable, if `has_gate`: of codes z with the threshold and r_mag of their latents."""
        raise NotImplementedError

    # --- training, by the sparse step -----------------------------------------------------------------------------

    def shift(self, threshold: Tensor | None) -> Tensor | None:
        """What is subtracted from pre-activations (F) before latents are selected; None for nothing."""
        return None

    def select(self, pre: Tensor, ops: ModuleType) -> Codes:
        """The latents of each row of shifted pre-activations (B, F) that the step looks at."""
        return ops.codes_at_least(pre, pre.new_zeros(1, 1))

    def select_over_batch(self, pres: Sequence[Tensor], ops: ModuleType) -> list[Codes]:
        """The same for a whole batch, given in pieces (rows, F), if `selects_over_batch`."""
        raise NotImplementedError

    def unshift(self, codes: Codes, shift: Tensor) -> tuple[Codes, Tensor | None]:
        """Codes with their true values from selected ones, and which are in the straight-through window (n_active).

        None if there is no such window.
        """
        raise NotImplementedError

    def penalty(self, sums: BatchSums, warmth: float | Tensor) -> Penalty | None:
        """The same with its gradients; `warmth` in [0, 1] is the share of its weight in force (its warm-up)."""
        return None

    def threshold_gradient(self, to_z: Tensor, to_step: Tensor, threshold: Tensor, window: Tensor) -> Tensor:
        """∂loss/∂threshold at the codes' positions (n_active), for thresholds that are trained."""
        raise NotImplementedError

    def gate_gradients(self, to_gate: Tensor, gate: Tensor, r_mag: Tensor) -> GateGradients:
        """What ∂loss/∂gate's codes is to what these are made of, all at the codes' positions (n_active)."""
        raise NotImplementedError


def with_common_threshold(dictionary: Dictionary, x: Tensor, l0: float) -> Dictionary:
    """Give all latents the one threshold at which mean L0 on activations x (B, D) is `l0`, but none below zero."""
    threshold = level_exceeded(dictionary.pre_activations(x), l0).clamp(min=0)
    return replace(dictionary, threshold=threshold.expand(dictionary.n_latents).clone())


def level_exceeded(scores: Tensor, l0: float) -> Tensor:
    """The level that l0 · B of the scores (B, F) exceed."""
    n = min(round(l0 * scores.shape[0]), scores.numel() - 1)
    return scores.flatten().topk(n + 1, sorted=False).values.min()
