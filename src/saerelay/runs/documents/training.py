"""The documents that training writes: published dictionaries, the log, the cost, and the resume state."""

from typing import Any, ClassVar

from pydantic import ConfigDict, Field, model_validator

from saerelay.document import Document, Measured, Record
from saerelay.site import ModuleKind


class DictionaryShape(Record):
    """The size and kind of a dictionary."""

    architecture: str
    """`topk`, `batchtopk`, `jumprelu`, `gated` or `relu`."""
    k: int | None = Field(strict=True)
    """Number of active latents per token; null for architectures without a k."""
    d_model: int = Field(gt=0, strict=True)
    """Width D of the activations it reads."""
    d_out: int | None = Field(default=None, gt=0, strict=True)
    """Width of the activations it reconstructs, if different from `d_model`."""
    skip_connection: bool = False
    """Whether a transcoder has an affine path beside its latents."""
    n_latents: int = Field(gt=0, strict=True)
    """Number of latents F."""
    digests: dict[str, str] = {}
    """A digest of each tensor in dictionary.safetensors, to detect damage."""


class DictionarySite(Record):
    """The site of a dictionary; only imported dictionaries state more than layer, module and model."""

    layer: int | None = Field(default=None, ge=0, strict=True)
    """Layer it reads; null if an imported file does not state it."""
    module: ModuleKind | None = None
    """Kind of module it reads, such as `resid_post`; null if, and only if, the layer is null."""
    module_out: ModuleKind | None = None
    """Kind of module that a transcoder reconstructs, such as `mlp_out`; null for an SAE."""
    model: str = ""
    """Name of the language model."""
    revision: str = ""
    """Resolved revision of the language model."""
    module_path: str = ""
    """Path of the module in the Hugging Face model, such as `gpt_neox.layers.3`."""
    context: int | None = None
    """Number of tokens in a training sequence."""
    prepend_bos: bool | None = None
    """Whether training sequences began with a BOS token."""
    dataset: str = ""
    """Name of the training data."""


class HopFacts(Record):
    """How a transferred leg began."""

    method: str
    """Method of the map; `scratch` if no map was better than a random dictionary."""
    trials: dict[str, Measured] = {}
    """With method "auto": FVU of each method (balanced, if training units are), at one L0, after a refit, on unseen
    rows; the best first, where affine counts as worse by 5%."""


class DictionaryTraining(Record):
    """How a dictionary was trained."""

    leg: dict[str, Any] = {}
    """The leg as in plan.json: parent, method, learning rate, seed and budget."""
    hop: HopFacts | None = None
    """How it began, if it was transferred."""
    tokens: int = 0
    """Number of tokens this leg was trained on."""
    finished: bool = True
    """Whether the leg reached its end; false for snapshots."""
    failure: str | None = None
    """Why the leg stopped early, or null."""
    lr: Measured = None
    """The highest learning rate it was trained with."""
    n_dead: int | None = None
    """Number of latents that did not fire on the last `dead_after_tokens` tokens; null after fewer tokens."""
    dead_after_tokens: int | None = None
    """Number of tokens without firing after which a latent counts as dead."""
    seconds: float = 0.0
    """Time spent in this leg's training steps, in seconds."""
    l0: Measured = None
    """Mean number of active latents per token, on the first 8192 rows of the last block."""
    validation_fvu: Measured = None
    """FVU in training units on the validation rows that goals are measured on; only for runs with goals."""


class DictionaryInfo(DictionaryTraining, DictionarySite, DictionaryShape, Document):
    """`dictionary.json`: the facts about one dictionary. Imported dictionaries may have further keys."""

    SCHEMA: ClassVar = 2
    MADE_BY: ClassVar = "`saerelay train`"
    REMEDY: ClassVar = "train or import it again"
    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _whole_site(self) -> "DictionaryInfo":
        if (self.layer is None) != (self.module is None):
            raise ValueError(f"layer is {self.layer} and module is {self.module}; give both or neither")
        return self

    def to_data(self) -> dict[str, Any]:
        """Only the keys that were given: an imported dictionary states nothing about its training."""
        return {"schema": self.SCHEMA, **self.model_dump(mode="json", exclude_unset=True)}


class TrainingLine(Record):
    """One line of `metrics.jsonl`: averages of one leg since its previous line."""

    cursor: int
    """Number of token positions read so far by the whole run."""
    leg: str
    """Id of the leg."""
    age: int
    """Number of tokens this leg has been trained on."""
    loss: Measured = None
    """Training loss in normalised units, auxiliary terms included."""
    fvu: Measured = None
    """Fraction of variance unexplained in training units, on training tokens."""
    l0: Measured = None
    """Mean number of active latents per token."""
    n_dead: int | None = None
    """Number of latents that did not fire for `dead_after_tokens`."""
    learning_rate: Measured = None
    """Learning rate of the optimizer."""
    seconds: Measured = None
    """Time spent in this leg's training steps since the run began, in seconds."""


class PhaseSeconds(Record):
    """Wall-clock time of a run, in seconds; of several ranks, the longest time of any rank in each phase."""

    total: float
    """From the start to the end, without the pauses between an interruption and the resumption."""
    processor: float | None = None
    """CPU time of all threads of all ranks, in seconds; the time of other programs is not included."""
    lm: float
    """Forward passes of the language model."""
    fits: float = 0.0
    """Maps between layers, folds and decoder refits."""
    goals: float = 0.0
    """Measuring goals on validation rows."""
    exchange: float = 0.0
    """Sending activations between ranks, a part of `lm`; 0 for a process on its own."""


class ReadPositions(Record):
    """Token positions that the language model read."""

    read: int = 0
    """Positions of the training split."""
    left_out: int = 0
    """Number of these positions that no leg was trained on (BOS and outlier norms)."""
    held_out: int = 0
    """Positions of the validation split, read to measure goals."""


class RunCost(Document):
    """`cost.json`: the time a finished run took, and the positions it read."""

    SCHEMA: ClassVar = 1
    MADE_BY: ClassVar = "`saerelay train RECIPE --out RUN --resume`"

    seconds: PhaseSeconds
    """Wall-clock time by phase."""
    positions: ReadPositions = ReadPositions()
    """Token positions read."""
    ranks: int = Field(default=1, ge=1)
    """Number of processes that trained the run together, when it ended."""


class ResumeFacts(Record):
    """The facts of a resume state, beside its tensors."""

    cursor: int
    """Number of token positions read."""
    failures: dict[str, str]
    """Why legs stopped early, by leg id."""
    hops: dict[str, HopFacts] = {}
    """How transferred legs began, by leg id."""
    seconds: dict[str, float]
    """Wall-clock time by phase, in seconds."""
    positions: dict[str, int]
    """Token positions read."""
    live: list[str]
    """Ids of the legs in training."""
    moments: list[str]
    """Ids of the legs whose moments are being gathered."""
    kept_blocks: list[str] = []
    """Ids of the legs that keep blocks read before their hop, to use them again."""
    machine: dict[str, Any]
    """Threads, instruction set, torch version and, on a GPU, its kind and libraries, on which the bits depend."""
    log_bytes: int
    """Length of metrics.jsonl, to which it is cut back on resume."""
    legs: dict[str, str]
    """A digest of each leg of the plan that the state belongs to."""
    serial: int
    """Name of the directory with its tensors: the number of states saved before it, plus one."""
    digests: dict[str, dict[str, str]]
    """A digest of each tensor, by file."""
