"""What every architecture provides.

An instance is what a recipe asks for (its fields are keys of `[dictionary]`); the methods say how such a dictionary
turns pre-activations into codes, what training adds to the squared error, and how its mean L0 is set.

Shapes: B tokens, F latents, n_active the non-zero codes of a batch. Thresholds (F) and r_mag (F), the scales of gates,
belong to the dictionary, and are None where an architecture has none.
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


SMALLEST = 2.0**-126
"""The smallest positive number of float32 and bfloat16, but for denormal ones."""


class BatchSums(NamedTuple):
    """Sums over the codes of a batch, on which a penalty may depend."""

    n_rows: int
    n_active: Tensor
    """Non-zero codes."""
    total_code: Tensor
    """Σ z; for an architecture with a gate, the sum of the gate's codes."""
    divisor: float
    """The divisor of the batch's squared error in the loss."""


class Penalty(NamedTuple):
    """The term that an architecture adds to the loss of a batch, with its gradients."""

    loss: Tensor
    to_z: float | Tensor | None = None
    """∂loss/∂z of every active code, or of every code of the gate, if the term depends on codes."""
    to_step: Tensor | None = None
    """∂loss/∂1[pre > threshold], if the term depends on how many codes are active."""


class GateGradients(NamedTuple):
    """Gradients that a loss of the gate's codes gives to the tensors they are computed from."""

    z: Tensor
    threshold: Tensor
    r_mag: Tensor


class Architecture(Spec):
    """One kind of sparse autoencoder."""

    name: ClassVar[str]
    """The name as recipes and files spell it."""
    title: ClassVar[str]
    """The name as people spell it."""
    l0_key: ClassVar[str | None] = None
    """The field that asks for a mean number of active latents, if there is one."""
    has_threshold: ClassVar[bool] = False
    """Whether dictionaries have a threshold (F)."""
    threshold_is_calibrated: ClassVar[bool] = False
    """Whether the threshold is not trained, but set so that mean L0 is k on given activations."""
    has_gate: ClassVar[bool] = False
    """Whether training also reconstructs from a gate's codes (`gate_codes`); dictionaries then have the scale r_mag."""
    selects_over_batch: ClassVar[bool] = False
    """Whether training chooses active latents over a whole batch rather than per token."""
    selects_fixed_number: ClassVar[bool] = False
    """Whether training selects the same number of latents in every batch of the same size."""
    l0_is_exact: ClassVar[bool] = False
    """Whether every token has the same number of active latents, whatever the activations."""

    @property
    def l0(self) -> float | None:
        """Number of active latents per token that is asked for; None if it follows from a penalty."""
        return None if self.l0_key is None else float(getattr(self, self.l0_key))

    def with_l0(self, l0: float) -> Self:
        """Return the architecture with another number of active latents; unchanged if it asks for none."""
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
        """The architecture of a trained dictionary, which keeps nothing of its training settings but `k`."""
        return cls() if k is None or "k" not in cls.model_fields else cls.model_validate({"k": k})

    # --- encoding -------------------------------------------------------------------------------------------------

    def activate(self, pre: Tensor, threshold: Tensor | None) -> Tensor:
        """Codes z (..., F), non-negative and mostly zero, of pre-activations (..., F).

        By default all that are positive and, if the architecture has thresholds, above their latent's threshold.
        """
        if not self.has_threshold:
            return pre.relu()
        assert threshold is not None, f"a {self.name} dictionary without its threshold"
        return pre.relu() * (pre > threshold)

    def encode_sparse(self, pre: Tensor, threshold: Tensor | None, ops: ModuleType) -> Codes:
        """The same codes of pre-activations (B, F), without the zeros; `ops` are the sparse kernels of the device."""
        return ops.nonzero_codes(self.activate(pre, threshold))

    # --- a given mean L0 ------------------------------------------------------------------------------------------

    @abstractmethod
    def match_l0(self, dictionary: Dictionary, x: Tensor, l0: float) -> Dictionary:
        """Adjust thresholds or biases so that mean L0 on activations x (B, D) is `l0`."""

    def firing_level(self, dictionary: Dictionary, x: Tensor, latents: Tensor) -> Tensor:
        """The level that the pre-activation of each given latent must exceed to fire on activations x (B, D)."""
        if dictionary.threshold is None:
            return x.new_zeros(())
        return dictionary.threshold[latents]

    # --- training, by autograd: the reference ---------------------------------------------------------------------

    def training_codes(self, pre: Tensor, threshold: Tensor | None) -> Tensor:
        """Codes z (B, F) of a training batch, differentiable."""
        return self.activate(pre, threshold)

    def training_penalty(self, pre: Tensor, z: Tensor, threshold: Tensor | None, divisor: float) -> Tensor | None:
        """The term added to the squared error once its warm-up is over, differentiable; None if there is none.

        z (B, F) are the codes, or the gate's codes where there is a gate.
        """
        return None

    def gate_codes(self, z: Tensor, threshold: Tensor, r_mag: Tensor) -> Tensor:
        """The gate's codes, differentiable, for codes z and their latents' threshold and r_mag; only if `has_gate`."""
        raise NotImplementedError

    # --- training, by the sparse step -----------------------------------------------------------------------------

    def shift(self, threshold: Tensor | None) -> Tensor | None:
        """The numbers (F) subtracted from pre-activations before latents are selected; None for none."""
        return None

    def select(self, pre: Tensor, ops: ModuleType) -> Codes:
        """Select the latents that the step considers in each row of shifted pre-activations (B, F).

        On a GPU zeros are left out, as by `positive_codes`, which selects in all steps but a leg's first: an entry more
        in a sum changes its last bits.
        """
        least = 0.0 if pre.device.type == "cpu" else SMALLEST
        return ops.codes_at_least(pre, pre.new_full((1, 1), least))

    def select_over_batch(self, pres: Sequence[Tensor], ops: ModuleType) -> list[Codes]:
        """Select them for a whole batch, given in pieces (rows, F); only if `selects_over_batch`."""
        raise NotImplementedError

    def unshift(self, codes: Codes, shift: Tensor) -> tuple[Codes, Tensor | None]:
        """Return selected codes with their true values, and a mask (n_active) of the straight-through window.

        The mask is None if there is no such window.
        """
        raise NotImplementedError

    def penalty(self, sums: BatchSums, warmth: float | Tensor) -> Penalty | None:
        """The penalty with its gradients; `warmth` in [0, 1] is the share of its weight in force (its warm-up)."""
        return None

    def threshold_gradient(self, to_z: Tensor, to_step: Tensor, threshold: Tensor, window: Tensor) -> Tensor:
        """∂loss/∂threshold at the codes' positions (n_active), for architectures that train thresholds."""
        raise NotImplementedError

    def gate_gradients(self, to_gate: Tensor, gate: Tensor, r_mag: Tensor) -> GateGradients:
        """Carry ∂loss/∂(gate's codes) back to z, threshold and r_mag, all at the codes' positions (n_active)."""
        raise NotImplementedError


def with_common_threshold(dictionary: Dictionary, x: Tensor, l0: float) -> Dictionary:
    """Give all latents one threshold, at least 0, at which mean L0 on activations x (B, D) is `l0`."""
    threshold = level_exceeded(dictionary.pre_activations(x), l0).clamp(min=0)
    return replace(dictionary, threshold=threshold.expand(dictionary.n_latents).clone())


def level_exceeded(scores: Tensor, l0: float) -> Tensor:
    """The level that l0 · B of the scores (B, F) exceed."""
    n = min(round(l0 * scores.shape[0]), scores.numel() - 1)
    return scores.flatten().topk(n + 1, sorted=False).values.min()
