"""The facts that files state about a dictionary besides its tensors, the same for all formats."""

from dataclasses import dataclass, field
from typing import Any

from saerelay.site import ModuleKind, Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The site that a dictionary reads, and what it was trained on; None and "" if unknown."""

    model: str = ""
    """Hub id or name of the language model."""
    site: Site | None = None
    site_out: Site | None = None
    """The site it reconstructs, if it is a transcoder."""
    module_path: str = ""
    """Path of the module whose output it reads, in the Hugging Face model: "gpt_neox.layers.3"."""
    context: int | None = None
    """Number of tokens in a training sequence."""
    prepend_bos: bool | None = None
    dataset: str = ""
    l0: float | None = None
    """Mean number of active latents, as stated in the file."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Any other facts to keep, as JSON: tokens seen, parents, metrics."""

    @property
    def kind(self) -> SiteKind | None:
        """The kind of site that it is at; None if its files do not say where it reads."""
        return SiteKind(self.site.module, self.module_out) if self.site else None

    @property
    def module_out(self) -> ModuleKind | None:
        """The module that a transcoder reconstructs; None for an SAE, which reconstructs its input."""
        return self.site_out.module if self.site_out else None
