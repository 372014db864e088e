"""What a plan must know about a language model, so that planning need not load it.

`lm.facts.read_facts` reads it from the model's configuration; `plan.json` keeps it.
"""

from collections.abc import Collection
from typing import Literal

from pydantic import Field

from saerelay.errors import ModelError
from saerelay.site import MODULE_KINDS, ModuleKind, Site
from saerelay.spec import Positive, Spec, Whole

Precision = Literal["float32", "bfloat16", "float16"]
"""The dtypes a language model may run in."""


class TokenFacts(Spec):
    """A language model's vocabulary, special tokens and context."""

    vocab_size: int
    max_context: int
    """Longest sequence that the model takes; 0 if there is no limit."""
    bos_token_id: int | None
    """The token that `prepend_bos` puts first: BOS, or CLS for an encoder; None if the model has neither."""
    eos_token_id: int | None
    """The token between packed documents: EOS, or SEP for an encoder; None if the model has neither."""
    pad_token_id: int | None = None
    """The token that fills up sequences in files of tokens; None if the model has no such token."""


class SiteFacts(Spec):
    """Where a model's activations can be read, and how wide they are; found by a probe that loads no weights."""

    d_attn_z: int
    """Width of the attention output projection's input (heads x head width), where it is widest."""
    widths: dict[ModuleKind, list[int]] = {}
    """Width of each kind of site by layer, 0 where it cannot be read; {} in plans of old versions."""
    refusals: dict[str, str] = {}
    """Why sites cannot be read, by their names."""


class ModelFacts(Spec):
    """What a plan must know about a language model; read from its configuration, without loading weights."""

    inline = ("tokens", "sites")

    name: str
    revision: str
    """Commit hash that the hub resolves the revision to, if any; else the recipe's revision."""
    adapter: str = ""
    """The adapter that is merged into its weights: a directory, or a hub id with its commit."""
    quantised: str = ""
    """How its weights are quantised, such as "bitsandbytes"; "" if they are not."""
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
    idle_layer_params: Whole = 0
    """Of these, the parameters of the experts that a token is not sent to; 0 without experts."""
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
        """Size in bytes of one number of its activations."""
        return 4 if self.dtype == "float32" else 2

    def width(self, site: Site) -> int:
        """Return the width D of the activations at a site."""
        widths = self.sites.widths.get(site.module, [])
        if site.layer < len(widths) and widths[site.layer]:
            return widths[site.layer]
        return self.d_attn_z if site.module == "attn_z" else self.d_model

    def check_site(self, site: Site) -> None:
        """Raise ModelError if the site's activations cannot be read; the message names sites and layers that can be."""
        if str(site) in self.sites.refusals:
            readable = []
            for kind, widths in self.sites.widths.items():
                readable += [Site(layer, kind) for layer, width in enumerate(widths) if width]
            raise ModelError(explain_refusal(site, self.name, self.sites.refusals[str(site)], readable))


def explain_refusal(site: Site, name: str, reason: str, readable: Collection[Site]) -> str:
    """Explain why a site cannot be read, and which sites can: other kinds in its layer, its kind in other layers.

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
