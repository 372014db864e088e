"""What a file says about a dictionary besides its tensors, the same for all formats."""

from dataclasses import dataclass, field
from typing import Any

from saerelay.site import ModuleKind, Site


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a dictionary reads, and what it was trained on; None and "" where unknown."""

    model: str = ""
    """Hub id or name of the language model."""
    site: Site | None = None
    site_out: Site | None = None
    """What it reconstructs, if it is a transcoder."""
    module_path: str = ""
    """Path of the module whose output it reads, in the Hugging Face model: "gpt_neox.layers.3"."""
    context: int | None = None
    """Tokens in a training sequence."""
    prepend_bos: bool | None = None
    dataset: str = ""
    l0: float | None = None
    """Mean number of active latents, as measured by whoever wrote the file."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Anything else that should be kept, as JSON: tokens seen, parents, metrics."""

    @property
    def module_out(self) -> ModuleKind | None:
        """The kind of module that a transcoder reconstructs; None for what reconstructs what it reads."""
        return self.site_out.module if self.site_out else None
