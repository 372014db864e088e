"""What a dictionary is asked to be, and the names of architectures and transfer methods. Pure Python."""

from importlib.util import find_spec
from typing import Literal

from pydantic import Field

from saerelay.spec import Count, Spec

Architecture = Literal["topk", "batchtopk", "jumprelu", "relu"]


Method = Literal["identity", "rescale", "procrustes", "affine"]


class DictionarySpec(Spec):
    """What a dictionary looks like and how sparse it is."""

    architecture: Architecture = Field(default="topk", description="topk, batchtopk, jumprelu or relu")
    expansion: float = Field(default=8, gt=0, description="latents per dimension of the model's activations ...")
    n_latents: Count = Field(default=0, ge=0, description="... or their number; 0 takes expansion")
    k: int = Field(default=32, ge=1, description="topk, batchtopk: active latents per token")
    target_l0: float = Field(default=32.0, gt=0, description="jumprelu: active latents per token to aim for")
    l1: float = Field(default=4.0, ge=0, description="relu: weight of the L1 penalty, in normalised units")
    l0_weight: float = Field(
        default=1.0, ge=0, description="jumprelu: weight of the penalty ((L0 - target) / target)^2"
    )
    bandwidth: float = Field(
        default=0.3, gt=0, description="jumprelu: width of the straight-through window, in normalised units"
    )
    aux_weight: float = Field(
        default=1 / 32, ge=0, description="topk, batchtopk: weight of the dead latents' loss (AuxK)"
    )
    normalise: bool = Field(
        default=True, description="train on centred, rescaled activations; false reproduces the paper"
    )

    def latents(self, width: int) -> int:
        """Number of latents on activations of a width."""
        return self.n_latents or round(self.expansion * width)

    @property
    def l0(self) -> float | None:
        """Active latents per token that are asked for; ReLU's follow from its penalty."""
        return {"relu": None, "jumprelu": self.target_l0}.get(self.architecture, float(self.k))


def takes_sparse_step(device: str) -> bool:
    """Whether training is by `kernels.sparse_step`: processors, and GPUs with Triton. Elsewhere it is by autograd."""
    return device == "cpu" or (device.startswith("cuda") and find_spec("triton") is not None)
