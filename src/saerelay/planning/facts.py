"""What a plan must know of a language model."""

from saerelay.site import Site
from saerelay.spec import Spec


class TokenFacts(Spec):
    """What a model takes as tokens."""

    vocab_size: int
    max_context: int
    """Longest sequence the model takes; 0 if it has no limit."""
    bos_token_id: int | None
    """What `prepend_bos` puts first: the BOS token, or the CLS token of an encoder, or none."""
    eos_token_id: int | None
    """What separates packed documents: EOS, or SEP of an encoder, or none."""


class ModelFacts(Spec):
    """What a plan must know of a language model; read from its configuration, without loading weights."""

    inline = ("tokens",)

    name: str
    revision: str
    """Resolved revision where the hub gives one (commit hash), else what the recipe says."""
    family: str
    """`model_type` of the Hugging Face configuration."""
    dtype: str
    device: str
    n_layers: int
    d_model: int
    d_attn_z: int
    """Width of the attention output projection's input (heads x head width)."""
    tokens: TokenFacts
    has_lm_head: bool
    layer_params: int
    """Parameters of one layer (mean over layers)."""
    model_params: int
    """All parameters."""

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
        return self.d_attn_z if site.module == "attn_z" else self.d_model
