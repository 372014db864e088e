"""Comparisons across layers: `matrix.json` and `measures.json`."""

from typing import ClassVar, Literal

from saerelay.document import Document, Measured, Record
from saerelay.runs.documents.quality import Metrics
from saerelay.sae.spec import Method

CarryingMethod = Literal[Method, "affine+refit"]
"""A way to carry a dictionary to another layer without training it there."""


class HeldOutFacts(Record):
    """The model, module and tokens that something was measured on."""

    model: str
    """Name of the language model."""
    revision: str = ""
    """Resolved revision of the language model."""
    module: str
    """Kind of module that the suite reads."""
    split: str = "test"
    """Split of the corpus measured on."""
    n_tokens: int
    """Number of kept positions measured on."""
    map_tokens: int
    """Number of training positions that maps between layers are fitted on."""


# --- every dictionary on every layer --------------------------------------------------------------------------------


class MatrixQuestion(Record):
    """The question that a matrix answers."""

    tokens: int
    """Number of held-out tokens."""
    methods: list[str]
    """Methods by which dictionaries are carried to other layers."""
    ce: bool
    """Whether cross-entropy and KL are measured."""
    layers: list[int]
    """Layers measured on."""
    dictionaries: str = ""
    """A digest of the weights of the legs and their snapshots; "" where dictionary.json has none."""
    legs: dict[str, list[int]]
    """Ages measured of each leg of the suite, in tokens: the final age, and those of snapshots if asked for."""


class MatrixKey(Record):
    """Which dictionary was carried to which layer, and how."""

    leg: str
    """Id of the leg."""
    tokens: int
    """Age of the leg or of its snapshot, in tokens."""
    snapshot: bool
    """Whether it is a snapshot."""
    method: CarryingMethod
    """Method by which it was carried: `identity` is a plain copy, the only method at the leg's own layer."""
    source: int
    """Layer it was trained at."""
    target: int
    """Layer it was measured on."""


class MatrixCell(Metrics, MatrixKey):
    """The metrics of one dictionary on one layer."""


class Matrix(HeldOutFacts, Document):
    """`matrix.json`: the metrics of every dictionary of the suite on every layer, without training there."""

    SCHEMA: ClassVar = 3
    MADE_BY: ClassVar = "`saerelay matrix RUN`"

    asked: MatrixQuestion
    """The question; another question makes the file again."""
    ablation: str = "zero, all positions"
    """What ablating a site means."""
    layers: list[int]
    """Layers of the matrix."""
    cells: list[MatrixCell]
    """One cell for each dictionary, method and layer."""

    @property
    def has_snapshots(self) -> bool:
        """Whether snapshots of legs were measured as well."""
        return any(cell.snapshot for cell in self.cells)


# --- what dictionaries have in common -------------------------------------------------------------------------------


class MeasuresQuestion(Record):
    """The question that measures answer."""

    tokens: int
    """Number of held-out tokens."""
    prompts: str | None
    """Digest of the prompts given; null for the model's own task."""
    matrix: MatrixQuestion | None
    """The question of the matrix that scores and offsets come from; null without a matrix."""
    dictionaries: str = ""
    """A digest of the weights of the legs and their snapshots; "" where dictionary.json has none."""
    legs: dict[str, list[int]]
    """Ages measured of each leg, in tokens."""


class Version(Record):
    """A leg at its end, or at a snapshot."""

    leg: str
    """Id of the leg."""
    layer: int
    """Layer it reads."""
    tokens: int
    """Its age, in tokens."""
    snapshot: bool
    """Whether it is a snapshot."""


class Similarity(Record):
    """How similar two dictionaries' decoder rows are, in one direction."""

    kind: Literal["suite", "hop", "scratch"]
    """`suite`: two legs of the suite; `hop`: parent and child, or the leg that continues the child; `scratch`: a
    transferred leg and one from scratch."""
    leg: str
    """Id of the leg that the comparison is about: the child, or the transferred leg; in a suite, the target."""
    tokens: int
    """Age of that leg, in tokens."""
    snapshot: bool
    """Whether it is a snapshot of that leg."""
    source: str
    """Id of the leg whose latents are searched for."""
    target: str
    """Id of the leg in which they are searched for."""
    source_layer: int
    """Layer of the source."""
    target_layer: int
    """Layer of the target."""
    mmcs: Measured
    """Mean over the source's alive latents of the largest cosine with an alive decoder row of the target."""
    mmcs_folded: Measured
    """The same with the source folded through the affine map between the layers."""


class Transferability(Version):
    """Shares of tokens that a transferred leg's latents have in common with its parent's, by index."""

    parent: str
    """Id of the parent; for a leg that continues another, that leg's parent."""
    parent_layer: int
    """Layer of the parent."""
    n_latents: int
    """Number of latents alive in both; shares are means over these."""
    transferability: Measured
    """Mean of the three shares below."""
    top_logits: Measured
    """Share of the 10 most promoted tokens."""
    bottom_logits: Measured
    """Share of the 10 most suppressed tokens."""
    top_tokens: Measured
    """Share of the 10 tokens of highest activation."""


class TransferScore(Version):
    """Normalised transfer scores, (transferred − zero-shot) / (from scratch − zero-shot), by metric.

    Null where zero-shot, the parent carried over without training, is already as good as training from scratch. Legs
    whose parent reads another kind of module have no score.
    """

    parent: str
    """Id of the parent; for a leg that continues another, that leg's parent."""
    parent_layer: int
    """Layer of the parent."""
    method: str
    """Method by which the parent was carried over for the zero-shot value."""
    scratch: str
    """Id of the leg from scratch."""
    scratch_tokens: int
    """Number of tokens that leg was trained on, with those of the legs it continues."""
    scratch_kind: Literal["root", "equal_tokens", "full"]
    """Whether it is a root, or which kind of control."""
    fvu: Measured
    """Score of FVU."""
    explained_variance: Measured
    """Score of explained variance, equal to that of FVU."""
    ce_loss_score: Measured
    """Score of the CE score."""


class OffsetMean(Record):
    """The mean of matrix cells with the same distance between the layer measured on and the layer trained at."""

    kind: str = ""
    """Kind of site that the SAEs are for: a kind of module, or `transcoder`; "" in files of old versions."""
    metric: str
    """Name of the metric."""
    method: str
    """Method by which dictionaries were carried."""
    tokens: int | None
    """Age of the snapshots averaged, in tokens; null for finished legs."""
    offset: int
    """Target layer − source layer (the paper's offsets have the other sign)."""
    mean: Measured
    """Mean over cells."""
    n: int
    """Number of cells."""


class Attribution(Version):
    """Direct logit attribution of one leg: for each prompt, the largest effect of a latent on the answer."""

    mean: Measured
    """Mean over prompts."""
    standard_error: Measured
    """Standard error of the mean over prompts."""
    scores: list[float]
    """Largest effect for each prompt: activation × decoder row · (unembedding of the right − of the wrong token)."""
    latents: list[int]
    """Latent with the largest effect, for each prompt."""


class Attributions(Record):
    """Direct logit attributions, and the prompts they are about."""

    prompts: str
    """Name of the prompts: a file, or the model's own task."""
    n_prompts: int
    """Number of prompts."""
    legs: list[Attribution]
    """One row for each leg and snapshot."""


class Measures(HeldOutFacts, Document):
    """`measures.json`: how much dictionaries have in common and what transfer gained, as in Ghilardi et al. 2024."""

    SCHEMA: ClassVar = 4
    MADE_BY: ClassVar = "`saerelay measures RUN`"

    asked: MeasuresQuestion
    """The question; another question makes the file again."""
    n_matrix_tokens: int | None
    """Number of positions of matrix.json; null without it."""
    similarity: list[Similarity]
    """Similarity of pairs of dictionaries, each pair in both directions."""
    transferability: list[Transferability] | None
    """Feature transferability; null without a language-model head."""
    transfer_scores: list[TransferScore] | None
    """Transfer scores, all three parts measured on the tokens of matrix.json; null without it."""
    offsets: list[OffsetMean] | None
    """Means of matrix.json by offset, over the legs of the suite; null without it."""
    dla: Attributions | None
    """Direct logit attribution; null without a language-model head."""
