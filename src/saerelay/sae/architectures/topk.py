"""TopK (Gao et al. 2024): the k largest pre-activations of each token, if positive."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, ClassVar, final

from pydantic import Field

from saerelay.sae.architectures.architecture import Architecture
from saerelay.spec import MAX_COUNT

if TYPE_CHECKING:
    from torch import Tensor

    from saerelay.sae.dictionary import Dictionary
    from saerelay.sae.kernels.codes import Codes

K = Field(default=32, ge=1, le=MAX_COUNT, description="active latents per token")
AUX_WEIGHT = Field(default=1 / 32, ge=0, description="weight of the dead latents' loss (AuxK)")


@final
class TopK(Architecture):
    """The k largest pre-activations of each token."""

    name: ClassVar[str] = "topk"
    title: ClassVar[str] = "TopK"
    l0_key: ClassVar[str | None] = "k"
    selects_fixed_number: ClassVar[bool] = True
    l0_is_exact: ClassVar[bool] = True

    k: int = K
    aux_weight: float = AUX_WEIGHT

    def activate(self, pre: Tensor, threshold: Tensor | None) -> Tensor:
        """See `Architecture.activate`."""
        values, indices = pre.topk(self.k, dim=-1, sorted=False)
        return pre.new_zeros(pre.shape).scatter(-1, indices, values.relu())

    def encode_sparse(self, pre: Tensor, threshold: Tensor | None, ops: ModuleType) -> Codes:
        """See `Architecture.encode_sparse`."""
        return ops.top_codes(pre, self.k)

    def match_l0(self, dictionary: Dictionary, x: Tensor, l0: float) -> Dictionary:
        """Return the dictionary as it is: L0 is k, whatever the activations."""
        return dictionary

    def firing_level(self, dictionary: Dictionary, x: Tensor, latents: Tensor) -> Tensor:
        """The mean over tokens of the k-th largest pre-activation: the level for being among the k."""
        import torch  # here alone, so that reading a recipe does not load it

        smallest = [dictionary.pre_activations(part).topk(self.k, dim=1).values[:, -1] for part in x.split(1024)]
        return torch.cat(smallest).mean()

    def select(self, pre: Tensor, ops: ModuleType) -> Codes:
        """See `Architecture.select`."""
        return ops.top_codes(pre, self.k)
