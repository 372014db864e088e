"""A language model too large for one GPU, held by several ranks together: `model.tensor_parallel`.

transformers cuts the weights of each layer by the tensor-parallel plan of the model's family, and sums the partial
results of the ranks of a group. Between layers every rank has the whole residual stream.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saerelay.errors import ModelError
from saerelay.lm.source import quantisation
from saerelay.planning.facts import ModelFacts
from saerelay.planning.recipe import ModelSpec
from saerelay.rank import n_ranks
from saerelay.site import Site

OWN_HEADS = "each of the ranks that hold the model together has only its own attention heads (model.tensor_parallel)"
"""The reason why the outputs of attention heads cannot be read."""


def check_splittable(skeleton: Any, config: Any, spec: ModelSpec) -> None:
    """Raise ModelError unless transformers can cut a model into `spec.tensor_parallel` parts."""
    rules = getattr(skeleton, "tp_plan", None) or {}
    if not any("*" in rule for rule in rules):  # "layers.*.mlp.up_proj", say
        raise ModelError(
            f'"{spec.name}" ({config.model_type}) cannot be held by several ranks together: transformers has no '
            "tensor-parallel plan for its layers; set model.tensor_parallel = 1"
        )
    if spec.adapter or quantisation(config):
        what = f"the adapter {spec.adapter}" if spec.adapter else f"weights quantised by {quantisation(config)}"
        raise ModelError(
            f'"{spec.name}" has {what}, but only plain weights can be split among ranks; save the model with plain '
            "weights (merged and dequantised), or set model.tensor_parallel = 1"
        )
    text_config = config.get_text_config()
    for key in ("num_attention_heads", "num_key_value_heads"):
        n_heads = getattr(text_config, key, None)
        if isinstance(n_heads, int) and n_heads % spec.tensor_parallel:
            raise ModelError(
                f"model.tensor_parallel is {spec.tensor_parallel}, which does not divide the {n_heads} heads of "
                f'"{spec.name}" ({key}); set it to a divisor'
            )


def split_over_ranks(spec: ModelSpec) -> dict[str, Any]:
    """Options with which all ranks call `from_pretrained` at once, so that each group of ranks holds the model.

    Raises ModelError if something that this needs is missing.
    """
    from transformers.utils.import_utils import is_accelerate_available

    try:
        from transformers.distributed import DistributedConfig  # pyright: ignore  # re-exported
    except ImportError:
        DistributedConfig = None
    if DistributedConfig is None or not is_accelerate_available():
        raise ModelError(
            "model.tensor_parallel needs accelerate, and a version of transformers that can split a model among ranks, "
            "such as 5.23. Install them: pip install --upgrade accelerate transformers"
        )
    fastest = torch.accelerator.current_accelerator()
    if spec.device == "cpu" and fastest is not None:
        raise ModelError(
            f'model.device is "cpu", but on this machine transformers splits models for {fastest.type}; set '
            f'model.device = "{fastest.type}", or hide that device'
        )

    class Groups(DistributedConfig):
        """Groups of ranks, each of which holds the whole model; transformers' own class would also shard it."""

        @property
        def dp_size(self) -> int:
            return 1

    n_groups = n_ranks() // spec.tensor_parallel
    return {"distributed_config": Groups(tp_size=spec.tensor_parallel, dp_replicate_size=n_groups)}


def check_whole(by_rank: Sequence[Mapping[Site, Tensor]], facts: ModelFacts, degree: int) -> None:
    """Raise ModelError unless all `degree` ranks of a group hold the same, whole activations (B, C, D) at each site."""
    for rank, found in enumerate(by_rank):
        first = by_rank[rank - rank % degree]
        for site, x in found.items():
            if x.shape[-1] == facts.width(site) and torch.equal(x, first[site]):
                continue
            raise ModelError(
                f"{site}: the ranks that hold {facts.name} together do not all have its complete activations there; "
                "read another kind of site (sites.module), or set model.tensor_parallel = 1"
            )
