"""What single latents mean: `features/<id>.safetensors`, `lineage.json`, and what `saerelay show` prints."""

from typing import Any, ClassVar, Literal

from saerelay.document import Document, Measured, Record

STATUSES = {"k": "kept", "d": "drifted", "r": "replaced", "x": "died", "b": "born", "-": "silent"}
"""What can become of a latent from one leg to another: the letter in `lineage.json`, and its word."""


class FeatureQuestion(Record):
    """The question that a features file answers."""

    leg: str
    """Id of the leg."""
    layer: int
    """Layer it reads."""
    n_sequences: int
    """Number of held-out sequences, from the first."""
    n_examples: int
    """Number of examples kept per latent."""
    window_before: int
    """Number of positions kept before an example's strongest token."""
    window_after: int
    """Number of positions kept after it."""
    above: str | None
    """Id of the leg at the next layer, in which similar latents were searched for."""
    dictionaries: str = ""
    """A digest of the weights of the leg and of its neighbours; "" where dictionary.json has none."""
    below: str | None
    """Id of the leg at the previous layer."""


class FeatureFacts(Document):
    """The metadata of `features/<id>.safetensors`; leg, layer and neighbours are null outside a run."""

    SCHEMA: ClassVar = 1
    MADE_BY: ClassVar = "`saerelay show RUN LEG 0`"

    leg: str | None = None
    """Id of the leg."""
    layer: int | None = None
    """Layer it reads."""
    n_sequences: int
    """Number of held-out sequences, from the first."""
    n_tokens: int
    """Number of kept positions in them."""
    n_examples: int
    """Number of examples kept per latent."""
    context: int
    """Number of tokens in a sequence."""
    window_before: int
    """Number of positions kept before an example's strongest token."""
    window_after: int
    """Number of positions kept after it."""
    histogram_first_edge: float
    """Lowest edge of the histograms, log2 of the activation; bins are half octaves."""
    above: str | None = None
    """Id of the leg at the next layer, in which similar latents were searched for."""
    dictionaries: str = ""
    """A digest of the weights of the leg and of its neighbours; "" where dictionary.json has none."""
    below: str | None = None
    """Id of the leg at the previous layer."""


# --- from leg to leg ------------------------------------------------------------------------------------------------


class LineageLeg(Record):
    """A leg at an end of a link."""

    layer: int
    """Layer it reads."""
    n_latents: int
    """Number of latents."""


class LineageQuestion(Record):
    """The question that a lineage answers."""

    model: str
    """Name of the language model."""
    n_sequences: int
    """Number of held-out sequences, from the first."""
    kept_above: float
    """Decoder cosine above which a latent counts as kept."""
    replaced_below: float
    """Decoder cosine below which a latent counts as replaced."""
    alive_above: int
    """Number of firings above which a latent counts as alive."""
    dictionaries: str = ""
    """A digest of the weights of the legs; "" where dictionary.json has none."""
    legs: dict[str, LineageLeg]
    """The run's legs, by id."""


class LineageFacts(LineageQuestion, Document):
    """All of `lineage.json` except its links."""

    SCHEMA: ClassVar = 2
    MADE_BY: ClassVar = "`saerelay show RUN LEG LATENT`"
    INDENT: ClassVar = None

    n_tokens: int
    """Number of kept positions on which correlations are measured."""
    map_tokens: int
    """Number of training positions that maps between layers are fitted on."""


class LineageLink(Record):
    """What became of a leg's latents in another leg; lists have one entry per latent of the source."""

    kind: Literal["hop", "depth", "control"]
    """`hop`: parent to child; `depth`: a layer's leg to the next layer's; `control`: a leg to its control."""
    source: str
    """Id of the source leg."""
    target: str
    """Id of the target leg."""
    source_layer: int
    """Layer of the source."""
    target_layer: int
    """Layer of the target."""
    by: Literal["index", "assignment"]
    """`index` if both descend from one root, whose latents keep their numbers; else they are matched one to one."""
    partner: list[int] | None
    """Matched latent of the target, −1 for none; null if latents keep their numbers."""
    decoder_cosine: list[float | None]
    """Cosine of decoder rows, the source folded through the affine map between the layers."""
    encoder_cosine: list[float | None]
    """Cosine of encoder rows, likewise folded."""
    correlation: list[float | None]
    """Pearson correlation of activations on the same tokens, zeros included; null where one of the two never fires."""
    status: str
    """One letter per latent: k(ept), d(rifted), r(eplaced), x (died), b(orn), or - for silent in both legs."""

    @property
    def n_alive(self) -> int:
        """Number of latents that are alive in at least one of the two legs."""
        return len(self.status) - self.status.count("-")


class LineageDocument(LineageFacts):
    """`lineage.json`: what became of each latent across legs."""

    links: list[LineageLink]
    """All links, kind by kind and by layer."""


# --- one latent -----------------------------------------------------------------------------------------------------


class LatentHistogram(Record):
    """Counts of activations."""

    first_edge: float
    """Lowest edge, as log2 of the activation."""
    counts: list[int]
    """Number of tokens in each half octave from that edge on."""


class LatentExample(Record):
    """Tokens around a position on which a latent fires strongly."""

    sequence: int
    """Row of the test split."""
    position: int
    """Position of the strongest token."""
    start: int
    """Position of the first token given."""
    activations: list[float]
    """Activation on each token."""
    tokens: list[str]
    """Text of each token."""
    token_ids: list[int]
    """Id of each token."""


class LogitEffect(Record):
    """A token whose logit a latent changes."""

    token: str
    """Text of the token."""
    token_id: int
    """Id of the token."""
    value: float
    """Change of its logit per unit of activation."""


class SimilarLatent(Record):
    """A latent of a neighbouring layer."""

    latent: int
    """Number of the latent."""
    cosine: float
    """Cosine of decoder rows, after folding."""


class SimilarLatents(Record):
    """The most similar latents of one neighbouring layer."""

    leg: str
    """Id of the leg at that layer."""
    latents: list[SimilarLatent]
    """The most similar first."""


class LineageStep(Record):
    """A latent of a leg, and how similar it is to the latent of the step before; null for the first step."""

    leg: str
    """Id of the leg."""
    layer: int
    """Layer it reads."""
    latent: int
    """Number of the latent."""
    decoder_cosine: Measured = None
    """Cosine of decoder rows."""
    encoder_cosine: Measured = None
    """Cosine of encoder rows."""
    correlation: Measured = None
    """Pearson correlation of activations on the same tokens."""
    status: str | None = None
    """`kept`, `drifted`, `replaced`, `died`, `born` or `silent`, towards the deeper layer, child or control."""


class Relative(LineageStep):
    """A counterpart of a latent off its path through the layers."""

    kind: str
    """`parent`, `control`, or `control of`."""


class LatentExplanation(Record):
    """A language model's explanation of a latent."""

    model: str
    """Name of the model that was asked."""
    explanation: str
    """Its explanation."""
    detection: Measured
    """Balanced accuracy of telling texts in which the latent fires from others."""
    fuzzing: Measured
    """Balanced accuracy of telling tokens on which it fires from others."""


class LatentActivity(Record):
    """Where a latent fires, and how strongly, on the test split."""

    leg: str
    """Id of the leg."""
    layer: int
    """Layer it reads."""
    latent: int
    """Number of the latent."""
    model: str
    """Name of the language model."""
    n_tokens: int
    """Number of kept positions."""
    n_fired: int
    """Number of these on which it fires."""
    max_activation: float
    """Largest activation."""
    mean_activation: float
    """Mean activation where it fires."""
    histogram: LatentHistogram
    """Counts of activations."""
    examples: list[LatentExample]
    """Its strongest examples, at most one per sequence."""


class LatentDescription(LatentActivity):
    """Everything known about one latent: `saerelay show --json`."""

    top_logits: list[LogitEffect] | None
    """Tokens it promotes most; null without a language-model head."""
    bottom_logits: list[LogitEffect] | None
    """Tokens it suppresses most."""
    lineage: list[LineageStep]
    """Its counterparts from the first layer to the last."""
    relatives: list[Relative]
    """Its counterparts in the leg's parent and controls."""
    similar: dict[Literal["above", "below"], SimilarLatents]
    """Most similar latents at the next and the previous layer."""
    interpretation: LatentExplanation | None
    """Result of `saerelay interpret`, or null."""

    def to_data(self) -> dict[str, Any]:
        """The description as plain JSON data."""
        return self.model_dump(mode="json")
