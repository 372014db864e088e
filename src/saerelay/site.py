"""Where in a language model activations are read: a value, never a string, in every signature.

The text form of a site ("L3", "L3.mlp_out", or a raw module path) exists only here.
"""

import re
from dataclasses import dataclass
from typing import Literal, Self, get_args

from saerelay.errors import PlanError

ModuleKind = Literal["resid_post", "resid_pre", "mlp_out", "attn_out", "attn_z"]
MODULE_KINDS: tuple[ModuleKind, ...] = get_args(ModuleKind)


@dataclass(frozen=True, order=True)
class Site:
    """A layer and the kind of module read there.

    >>> Site(3), str(Site(3)), str(Site(3, "mlp_out"))
    (Site(layer=3, module='resid_post'), 'L3', 'L3.mlp_out')

    `resid_post` is the residual stream after the layer (for the last layer: before the final norm), `resid_pre` before
    it, `mlp_out` and `attn_out` what the two blocks add to it, `attn_z` the input of the attention's output projection.
    """

    layer: int
    module: ModuleKind = "resid_post"

    def __post_init__(self) -> None:
        if self.module not in MODULE_KINDS:
            raise PlanError(f'unknown module "{self.module}"; one of: {", ".join(MODULE_KINDS)}')
        if self.layer < 0:
            raise PlanError(f"layer {self.layer} is negative; layers count from 0")

    def __str__(self) -> str:
        return f"L{self.layer}" if self.module == "resid_post" else f"L{self.layer}.{self.module}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form back.

        >>> Site.parse("L3.mlp_out")
        Site(layer=3, module='mlp_out')
        """
        match = re.fullmatch(r"L(\d+)(?:\.(\w+))?", text)
        if not match or (match[2] and match[2] not in MODULE_KINDS):
            raise PlanError(f'"{text}" is no site; write "L3" or "L3.mlp_out"')
        return cls(int(match[1]), match[2] or "resid_post")  # type: ignore[arg-type]
