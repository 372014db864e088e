"""What a plan must know of a language model."""

from collections.abc import Collection
from typing import Literal

from pydantic import Field

from saerelay.errors import ModelError
from saerelay.site import MODULE_KINDS, ModuleKind, Site
from saerelay.spec import Positive, Spec, Whole

Precision = Literal["float32", "bfloat16", "float16"]
"""What a language model runs in."""


class TokenFacts(Spec):
    """What a model takes as tokens."""

    vocab_size: int
    max_context: int
    """Longest sequence the model takes; 0 if it has no limit."""
    bos_token_id: int | None
    """What `prepend_bos` puts first: the BOS token, or the CLS token of an encoder, or none."""
    eos_token_id: int | None
    """What separates packed documents: EOS, or SEP of an encoder, or none."""
    pad_token_id: int | None = None
    """What fills up sequences in files of tokens, or none."""


class SiteFacts(Spec):
    """Where a model's activations can be read, and how wide they are; found by a probe, without weights."""

    d_attn_z: int
    """Width of the attention output projection's input (heads x head width), where it is widest."""
    widths: dict[ModuleKind, list[int]] = {}
    """Width of each kind of site by layer, 0 where it cannot be read; {} in plans of old versions."""
    refusals: dict[str, str] = {}
    """Why a site cannot be read, by its name."""


class ModelFacts(Spec):
    """What a plan must know of a language model; read from its configuration, without loading weights."""

    inline = ("tokens", "sites")

    name: str
    revision: str
    """Resolved revision where the hub gives one (commit hash), else what the recipe says."""
    adapter: str = ""
    """The adapter that is merged into its weights: a directory, or a hub id with its commit."""
    quantised: str = ""
    """How its weights are quantised, such as "bitsandbytes"; "" for plain ones."""
    family: str
    """`model_type` of the Hugging Face configuration."""
    dtype: Precision
    device: str = Field(pattern=r"^(cpu|cuda|mps)(:[0-9]{1,3})?$")
    n_layers: Positive
    d_model: Positive
    sites: SiteFacts
    tokens: TokenFacts
    has_lm_head: bool
    layer_params: Whole
    """Parameters of one layer (mean over layers)."""
    model_params: Whole
    """All parameters."""

    @property
    def d_attn_z(self) -> int:
        """Width of the attention output projection's input, where it is widest."""
        return self.sites.d_attn_z

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on an NVIDIA GPU."""
        return self.device.startswith("cuda")

    @property
    def bytes_per_value(self) -> int:
        """Size of one of its activations."""
        return 4 if self.dtype == "float32" else 2

    def width(self, site: Site) -> int:
        """Width D of the activations at a site."""
        widths = self.sites.widths.get(site.module, [])
        if site.layer < len(widths) and widths[site.layer]:
            return widths[site.layer]
        return self.d_attn_z if site.module == "attn_z" else self.d_model

    def check_site(self, site: Site) -> None:
        """Raise ModelError where activations cannot be read, with the sites and layers that can be."""
        if str(site) in self.sites.refusals:
            readable = []
            for kind, widths in self.sites.widths.items():
                readable += [Site(layer, kind) for layer, width in enumerate(widths) if width]
            raise ModelError(explain_refusal(site, self.name, self.sites.refusals[str(site)], readable))


def explain_refusal(site: Site, name: str, reason: str, readable: Collection[Site]) -> str:
    """Why a site of a model cannot be read, and which can be: its kind in other layers, other kinds in its layer.

    >>> explain_refusal(Site(0, "attn_z"), "x", "it has no attention", [Site(0), Site(1, "attn_z")])[:65]
    'L0.attn_z of "x" cannot be read: it has no attention. Layer 0 has'
    """
    there = {other.module for other in readable if other.layer == site.layer}
    kinds = [kind for kind in MODULE_KINDS if kind in there]
    layers = sorted(other.layer for other in readable if other.module == site.module)
    advice = f"Layer {site.layer} has {', '.join(kinds)}" if kinds else f"Nothing of layer {site.layer} can be read"
    if layers:
        advice += f"; {site.module} can be read in layers {layers} (sites.layers = {layers})"
    return f'{site} of "{name}" cannot be read: {reason}. {advice}.'
