"""BatchTopK (Bussmann et al. 2024): the k·B largest pre-activations of a batch, if positive.

At inference a common threshold replaces the batch: it is calibrated so that mean L0 is k on given activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar, final

from saerelay.sae.architectures.architecture import Architecture, with_common_threshold
from saerelay.sae.architectures.topk import AUX_WEIGHT, K

if TYPE_CHECKING:
    from torch import Tensor

    from saerelay.sae.dictionary import Dictionary
    from saerelay.sae.kernels.codes import Codes


@final
class BatchTopK(Architecture):
    """The k largest pre-activations per token, on average over a batch."""

    name: ClassVar[str] = "batchtopk"
    title: ClassVar[str] = "BatchTopK"
    l0_key: ClassVar[str | None] = "k"
    selects_fixed_number: ClassVar[bool] = True
    has_threshold: ClassVar[bool] = True
    threshold_is_calibrated: ClassVar[bool] = True
    selects_over_batch: ClassVar[bool] = True

    k: int = K
    aux_weight: float = AUX_WEIGHT

    def match_l0(self, dictionary: Dictionary, x: Tensor, l0: float) -> Dictionary:
        """Calibrate the common threshold."""
        return with_common_threshold(dictionary, x, l0)

    def training_codes(self, pre: Tensor, threshold: Tensor | None) -> Tensor:
        """Zero all but the k·B largest entries of a batch (B, F), and negative ones."""
        flat = pre.flatten()
        values, indices = flat.topk(self.k * pre.shape[0], sorted=False)
        kept = flat.new_zeros(flat.shape).scatter(0, indices, values.relu())
        return kept.view_as(pre)

    def select_over_batch(self, pres: Sequence[Tensor], ops: ModuleType) -> list[Codes]:
        """See `Architecture.select_over_batch`."""
        n_rows = sum(pre.shape[0] for pre in pres)
        return ops.top_codes_of_batch(pres, self.k * n_rows)
