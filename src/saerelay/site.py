"""Sites: where in a language model activations are read. Every signature takes a `Site`, never a string.

Only this module knows how a site is written as text ("L3", "L3.mlp_out").
"""

import re
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, Self, get_args

from saerelay.errors import PlanError

ModuleKind = Literal["resid_post", "resid_pre", "mlp_in", "mlp_out", "attn_out", "attn_z"]
MODULE_KINDS: tuple[ModuleKind, ...] = get_args(ModuleKind)
KindName = Literal[ModuleKind, "transcoder"]
"""A kind of site as a recipe names it: `transcoder` reads mlp_in and reconstructs mlp_out."""


@dataclass(frozen=True, order=True)
class Site:
    """A layer and the kind of module read there.

    >>> Site(3), str(Site(3)), str(Site(3, "mlp_out"))
    (Site(layer=3, module='resid_post'), 'L3', 'L3.mlp_out')

    `resid_pre` and `resid_post` are the residual stream before and after the layer (after the last
    layer: before the final norm); `attn_out` and `mlp_out` are what attention and MLP add to it;
    `attn_z` is the input of attention's output projection, `mlp_in` the input of the MLP, after the norm.
    Raises PlanError for an unknown module, or a layer that is negative or not a number.
    """

    layer: int
    module: ModuleKind = "resid_post"

    def __post_init__(self) -> None:
        if self.module == "transcoder":
            raise PlanError(
                f"a transcoder is at two sites: it reads {TRANSCODER.module} and reconstructs {TRANSCODER.module_out}; "
                f'write suite["{TRANSCODER.leg_name(self.layer)}"] in Python, sites.module = "transcoder" in a recipe'
            )
        if not isinstance(self.layer, Integral):
            raise PlanError(f'a layer is a number, and {self.layer!r} is not; Site.parse reads text such as "L3"')
        if self.module not in MODULE_KINDS:
            raise PlanError(f'unknown module "{self.module}"; expected one of: {", ".join(MODULE_KINDS)}')
        if self.layer < 0:
            raise PlanError(f"layer {self.layer} is negative; layers are counted from 0")

    def __str__(self) -> str:
        if self.module == "resid_post":
            return f"L{self.layer}"
        return f"L{self.layer}.{self.module}"

    def at(self, module: ModuleKind | None) -> "Site":
        """The site of another module in the same layer; this site itself for None.

        >>> str(Site(3, "mlp_in").at("mlp_out")), str(Site(3).at(None))
        ('L3.mlp_out', 'L3')
        """
        return self if module is None else Site(self.layer, module)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form back; PlanError if it is not a site.

        >>> Site.parse("L3.mlp_out")
        Site(layer=3, module='mlp_out')
        """
        match = re.fullmatch(r"L(\d+)(?:\.(\w+))?", text)
        kind = "resid_post" if match is None or match[2] is None else match[2]
        if match is None or kind not in MODULE_KINDS:
            raise PlanError(f'invalid site "{text}"; write it like "L3" or "L3.mlp_out"')
        return cls(layer=int(match[1]), module=kind)


@dataclass(frozen=True)
class SiteKind:
    """What the SAEs of one kind read and reconstruct, at whichever layer.

    >>> str(SiteKind("mlp_out")), str(SiteKind("mlp_in", "mlp_out")), str(SiteKind("attn_z", "attn_out"))
    ('mlp_out', 'transcoder', 'attn_z to attn_out')
    """

    module: ModuleKind = "resid_post"
    module_out: ModuleKind | None = None
    """What a transcoder reconstructs; None for an SAE, which reconstructs what it reads."""

    @classmethod
    def named(cls, name: KindName) -> "SiteKind":
        """The kind that a recipe means by a name.

        >>> SiteKind.named("transcoder")
        SiteKind(module='mlp_in', module_out='mlp_out')
        """
        return TRANSCODER if name == "transcoder" else cls(name)

    def __str__(self) -> str:
        if self.module_out is None:
            return self.module
        if self == TRANSCODER:
            return "transcoder"
        return f"{self.module} to {self.module_out}"

    @property
    def written(self) -> ModuleKind:
        """The module whose activations are reconstructed."""
        return self.module_out or self.module

    def leg_name(self, layer: int) -> str:
        """The name of a leg at a layer, without the suffix that tells several such legs apart.

        >>> SiteKind().leg_name(5), SiteKind("mlp_out").leg_name(5), SiteKind("mlp_in", "mlp_out").leg_name(5)
        ('L5', 'L5.mlp_out', 'L5.transcoder')
        """
        if self == TRANSCODER:
            return f"L{layer}.transcoder"
        site = str(Site(layer, self.module))
        return f"{site}-to-{self.module_out}" if self.module_out else site


TRANSCODER = SiteKind("mlp_in", "mlp_out")
"""The default meaning of "transcoder": the transcoder of an MLP."""
