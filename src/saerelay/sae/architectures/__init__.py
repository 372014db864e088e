"""The architectures: one file each, and this list.

A new architecture is a file with one final class and a place in ARCHITECTURES; nothing else in the package names it.
Nothing here loads torch: a class is also the spec that a recipe is read into, and planning reads recipes without torch.
"""

from saerelay.sae.architectures.architecture import Architecture, Penalty
from saerelay.sae.architectures.batchtopk import BatchTopK
from saerelay.sae.architectures.gated import Gated
from saerelay.sae.architectures.jumprelu import JumpReLU
from saerelay.sae.architectures.relu import ReLU
from saerelay.sae.architectures.topk import TopK

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "BatchTopK",
    "Gated",
    "JumpReLU",
    "Penalty",
    "ReLU",
    "TopK",
    "architecture_named",
]

ARCHITECTURES: list[type[Architecture]] = [TopK, BatchTopK, JumpReLU, Gated, ReLU]
"""All architectures, in the order in which they are listed for people."""


def architecture_named(name: str) -> type[Architecture]:
    """The class of an architecture, by the name that recipes and files use.

    >>> architecture_named("jumprelu").title
    'JumpReLU'

    Raises ValueError for an unknown name.
    """
    for architecture in ARCHITECTURES:
        if architecture.name == name:
            return architecture
    names = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise ValueError(f'unknown architecture "{name}"; valid: {names}')
