"""The recipe: what a user writes in `run.toml`. `saerelay init` prints the descriptions given here as comments.

A section with many keys is made of parts, whose keys stand side by side in the file (see `Spec.inline`).
"""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from saerelay.planning.facts import Precision
from saerelay.planning.leg_spec import ControlKind, LegSpec, Rate, Reuse, ShareOrCount
from saerelay.sae.spec import DictionarySpec, MethodOrAuto
from saerelay.site import KindName, ModuleKind, SiteKind
from saerelay.spec import MAX_COUNT, MAX_SEED, Auto, Count, Distinct, OrAuto, Positive, Spec, parse_count

Preset = Literal["scratch", "forward", "backward", "alternate", "hub", "shared", "paper", "auto"]


BUDGET_UNITS = {"tokens": "tokens", "flops": "FLOPs", "hours": "hours", "hour": "hours"}


def parse_budget(text: str) -> tuple[float, str]:
    """Parse a budget into (amount, "tokens" | "FLOPs" | "hours").

    >>> parse_budget("10M tokens"), parse_budget("5e14 FLOPs"), parse_budget("1.5 hours")
    ((10000000.0, 'tokens'), (500000000000000.0, 'FLOPs'), (1.5, 'hours'))

    Raises ValueError for anything else.
    """
    amount, _, written_unit = text.strip().partition(" ")
    unit = BUDGET_UNITS.get(written_unit.strip().lower(), "")
    try:
        value = float(parse_count(amount)) if unit == "tokens" else float(amount)  # type: ignore[arg-type]
    except ValueError:
        value = 0.0
    if not unit or not 0 < value < float("inf"):
        raise ValueError(f'"{text}" is not a valid budget; write "10M tokens", "5e14 FLOPs" or "1.5 hours"')
    return value, unit


# --- sections -----------------------------------------------------------------------------------------------------


class ModelSpec(Spec):
    """The language model."""

    name: str = Field(
        default="demo", min_length=1, description='hub id, local directory, GGUF file, or "demo" for the built-in model'
    )
    revision: str = Field(default="", description='hub branch, tag or commit; "" is the default branch')
    dtype: Literal["auto", Precision] = Field(
        default="auto", description='"auto": bfloat16 where the hardware is fast at it, else float32'
    )
    device: str = Field(default="auto", description='"auto", "cpu", "cuda", "cuda:1"')
    trust_remote_code: bool = Field(default=False, description="run the Python code that comes with a hub model")
    gguf_file: str = Field(default="", description="GGUF file to read, if the repository or directory has several")
    adapter: str = Field(
        default="", description='adapter (peft) to merge into the weights: directory, or hub id, "user/name@revision"'
    )
    tensor_parallel: Positive = Field(
        default=1,
        description="number of GPUs to split the model over, if it is too large for one; see docs/scale-out.md",
    )


class SitesSpec(Spec):
    """Which activations get an SAE."""

    layers: Literal["all"] | Distinct[int] = Field(default="all", description='"all", or a list such as [0, 3, 6]')
    module: KindName | Distinct[KindName] = Field(
        default="resid_post",
        description="resid_post, resid_pre, mlp_in, mlp_out, attn_out, attn_z or transcoder (of the MLP); or a list of "
        "these: the plan is repeated for each of them, in one pass of the language model",
    )
    module_out: ModuleKind | Literal[""] = Field(
        default="",
        description='module to reconstruct, if not the one that is read; "mlp_out" with module = "mlp_in" makes '
        "transcoders",
    )

    @model_validator(mode="after")
    def _kinds_are_clear(self) -> "SitesSpec":
        if not self.module:
            raise ValueError('module is an empty list; write "resid_post", or a list of kinds of sites')
        if self.module_out and (isinstance(self.module, list) or self.module == "transcoder"):
            raise ValueError(
                f'module_out = "{self.module_out}" goes with one module; leave it out, and name MLP transcoders '
                '"transcoder" in module'
            )
        return self

    @property
    def kinds(self) -> list[SiteKind]:
        """The kinds of sites that are read and reconstructed, one for each suite of SAEs."""
        if isinstance(self.module, list):
            return [SiteKind.named(name) for name in self.module]
        kind = SiteKind.named(self.module)
        if self.module_out and self.module_out != kind.module:
            kind = SiteKind(kind.module, self.module_out)
        return [kind]

    @property
    def first_kind(self) -> SiteKind:
        """The kind of site that is meant where only a layer is named."""
        return self.kinds[0]


class DatasetSpec(Spec):
    """A Hugging Face dataset."""

    dataset: str = Field(
        default="", description='Hugging Face dataset: hub id (streamed) or a local directory; "" for none'
    )
    subset: str = Field(default="", description="the dataset's configuration name, if it has several")
    split: str = Field(default="train", description="the dataset's split")
    column: str = Field(default="text", description="the dataset's column that holds the documents")
    revision: str = Field(default="", description="the dataset's branch, tag or commit")


class DataSpec(Spec):
    """Where tokens come from: at most one of `dataset`, `text`, `tokens`; without any, the built-in Python corpus."""

    inline = ("hub",)

    hub: DatasetSpec = DatasetSpec()
    text: list[str] = Field(default=[], description="text files or directories of text files")
    tokens: str = Field(default="", description="a .npy file of token ids (uint16 or uint32, 1-D or 2-D)")
    context: int = Field(default=256, ge=4, le=MAX_COUNT, description="tokens per sequence")
    prepend_bos: bool = Field(default=True, description="start every sequence with the BOS token (never trained on)")
    epochs: Positive = Field(default=1, description="how many times the corpus may be read")
    outlier_norm: float = Field(
        default=10.0,
        ge=0,
        description="leave out positions whose norm at the model's middle layer exceeds this multiple of the median; "
        "0 keeps all",
    )
    cache: str = Field(
        default="",
        description="where to keep activations (bfloat16) for later epochs and runs: a directory, or an address such "
        'as s3://bucket/folder; "" for none',
    )
    block_tokens: OrAuto[Annotated[Count, Field(gt=0)]] = Field(
        default="auto",
        description='tokens that are shuffled together; "auto": set by the shapes of model and plan, at most 65536',
    )

    @model_validator(mode="after")
    def _one_source(self) -> "DataSpec":
        sources = {"dataset": self.hub.dataset, "text": self.text, "tokens": self.tokens}
        given = [key for key, value in sources.items() if value]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; keep one of them and empty the others")
        return self


class HopSpec(Spec):
    """How SAEs are transferred from layer to layer."""

    method: MethodOrAuto = Field(
        default="auto",
        description='identity, rescale, procrustes or affine; "auto": for each hop, the best on held-out rows',
    )
    refit: bool = Field(
        default=True, description="after a hop: revive silent latents, refit the decoder in closed form"
    )
    moment_tokens: Count = Field(
        default=100_000, gt=0, description="tokens on which the map between two layers is fitted"
    )
    refit_tokens: Count = Field(
        default=65_536,
        gt=0,
        description="tokens on which the decoder is refitted: at most those of the map; without a map, one block",
    )
    fork_at: ShareOrCount = Field(
        default=1.0, description="age of the parent at which transfers branch off: a share of its tokens, or a count"
    )
    parents: str = Field(
        default="",
        description="directory of another run, whose SAEs are trained further here, layer by layer, instead of the "
        'preset\'s legs (for an instruction-tuned model, for example); "" for none',
    )
    reuse: Reuse = Field(
        default=1,
        description="how many times a transfer trains on each block; second passes begin with the tokens of its map",
    )


class TierSpec(Spec):
    """Further levels of sparsity (L0) at which the suite is published."""

    tiers: Distinct[Positive] = Field(
        default=[],
        description="further numbers of active latents, such as [16, 64]: for each of them, every SAE gets a copy that "
        "is trained further with that k",
    )
    tier_tokens: OrAuto[Annotated[Count, Field(gt=0)]] = Field(
        default="auto", description='training tokens of each such copy; "auto": transfer_tokens'
    )


class AutoSpec(Spec):
    """What `preset = "auto"` aims for."""

    budget: str = Field(
        default="",
        description='preset "auto": what the suite may cost, controls aside: "10M tokens" of training, "5e14 FLOPs" '
        'or "1.5 hours" ...',
    )
    fvu_ratio: OrAuto[Annotated[float, Field(gt=0)]] = Field(
        default="auto",
        description='... or the FVU to reach, as a multiple of that after root_tokens from scratch; "auto": 1.05',
    )
    survey_tokens: OrAuto[Annotated[Count, Field(gt=0)]] = Field(
        default="auto",
        description='preset "auto": tokens of the longest pilot; "auto": root_tokens / 10, or 64 per latent if that is '
        "more, but at most root_tokens / 4",
    )

    @field_validator("budget")
    @classmethod
    def _known_unit(cls, budget: str) -> str:
        if budget:
            parse_budget(budget)
        return budget

    @property
    def given(self) -> bool:
        """Whether a budget or a ratio is given."""
        return bool(self.budget) or self.fvu_ratio != "auto"


class PlanSpec(Spec):
    """Which layers are trained from scratch, which are transferred from which, and on how many tokens."""

    inline = ("auto", "hop", "tier")

    preset: Preset = Field(
        default="hub", description="scratch, forward, backward, alternate, hub, shared, paper or auto"
    )
    auto: AutoSpec = AutoSpec()
    stop: bool = Field(
        default=True, description="end a leg (the training of one SAE) that has a goal as soon as it reaches the goal"
    )
    roots: Distinct[int] = Field(default=[], description="layers trained from scratch; [] lets the preset choose")
    direction: Literal["auto", "forward", "backward", "both"] = Field(
        default="auto",
        description="alternate, paper: transfer forward (from the layer below), backward (from above), or both",
    )
    root_tokens: Count = Field(default=2_000_000, gt=0, description="training tokens of a root")
    root_reuse: Reuse = Field(
        default=1,
        description="how many times a root, or a control with the full budget, trains on each block: with 2 the "
        "language model reads half of root_tokens",
    )
    transfer_tokens: Count = Field(default=250_000, ge=0, description="training tokens of a transfer; 0 is zero-shot")
    hop: HopSpec = HopSpec()
    controls: Distinct[int] = Field(
        default=[], description="layers that also get controls, SAEs trained for comparison (see control_kinds)"
    )
    control_kinds: Distinct[ControlKind] = Field(
        default=["equal_tokens", "full"],
        description="from scratch on the tokens of the transfer (equal_tokens) or on root_tokens (full); or random: a "
        "random dictionary, refitted as after a hop",
    )
    tier: TierSpec = TierSpec()
    legs: list[LegSpec] = Field(
        default=[], description="[[plan.legs]]: a plan written leg by leg, in place of a preset; see docs/plans.md"
    )

    @model_validator(mode="after")
    def _one_aim(self) -> "PlanSpec":
        if self.auto.budget and self.auto.fvu_ratio != "auto":
            raise ValueError("budget and fvu_ratio are given; keep one of them: each follows from the other")
        if self.preset != "auto" and self.auto.given:
            raise ValueError('budget and fvu_ratio belong to preset = "auto"; set this preset, or remove them')
        return self

    @property
    def surveyed(self) -> bool:
        """Whether the legs are chosen by a survey."""
        return self.preset == "auto" and not self.legs


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSpec(Spec):
    """Learning rates and their schedule."""

    lr: OrAuto[Rate] = Field(
        default="auto",
        description='learning rate of the decoder, from scratch; "auto": set by width, budget and batch (decision 007)',
    )
    transfer_lr: OrAuto[Rate] = Field(
        default="auto", description='learning rate after a transfer; "auto": set by what the map leaves unexplained'
    )
    encoder_lr: float = Field(default=0.5, gt=0, description="learning rate of the encoder's weights, as a share of lr")
    bias_lr: OrAuto[Annotated[float, Field(gt=0)]] = Field(
        default="auto", description='learning rate of biases and thresholds, as a share of lr; "auto": √width / 5'
    )
    betas: tuple[Beta, Beta] = Field(default=(0.8, 0.99), description="Adam's beta1 and beta2")
    balance: Annotated[float, Field(ge=0, le=1)] | Auto = Field(
        default="auto",
        description='each dimension is divided by its standard deviation to this power; 0: off; "auto": 0.75 if a '
        "dimension has over 5 % of the variance, else 0 (decision 031)",
    )
    whitening: float = Field(
        default=0.25,
        ge=0,
        le=0.5,
        description="the encoder reads activations times their covariance to minus this power, to learn faster; 0: off",
    )
    warmup: float = Field(
        default=0.02, ge=0, lt=1, description="share of the budget over which the learning rate rises"
    )
    sparsity_warmup: float = Field(
        default=0.05, ge=0, lt=1, description="jumprelu, relu, gated: share of the budget over which the penalty rises"
    )
    decay: float = Field(
        default=0.3, ge=0, le=1, description="share of the budget over which the learning rate falls to 0"
    )
    clip: float = Field(default=1.0, ge=0, description="largest norm of a gradient; 0: no clipping")


class TrainSpec(Spec):
    """How an SAE is trained."""

    inline = ("optimizer",)

    batch_tokens: OrAuto[Annotated[Count, Field(gt=0)]] = Field(
        default="auto",
        description='tokens per training step; "auto": 512, on a GPU up to 4096 if a leg still takes 1000 steps '
        "(decision 035)",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description='of the encoder\'s matrix product; "auto": bfloat16 if the activations are bfloat16'
    )
    optimizer: OptimizerSpec = OptimizerSpec()
    dead_after: OrAuto[Annotated[Count, Field(gt=0)]] = Field(
        default="auto",
        description='tokens without firing after which a latent is dead; "auto": min(10M, a fiftieth of the budget)',
    )
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="every random choice follows from this seed")
    seeds: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="train every leg with this many seeds (seed, seed + 1, ...), for error bars",
    )
    checkpoint_every: OrAuto[Annotated[Count, Field(gt=0)]] = Field(
        default="auto", description='tokens between two saved states; "auto": as many as are trained in five minutes'
    )
    snapshots: list[ShareOrCount] = Field(
        default=[], description="ages at which to publish snapshots: shares or counts of tokens; 0: right after a hop"
    )
    memory_gib: OrAuto[Annotated[float, Field(gt=0)]] = Field(
        default="auto",
        description='legs wait while the training state would exceed this; "auto": 70 % of the device\'s memory',
    )
    loggers: Distinct[Literal["tensorboard", "wandb"]] = Field(
        default=[], description="in addition to metrics.jsonl: tensorboard, wandb"
    )


class EvaluateSpec(Spec):
    """How quality is measured."""

    tokens: Count = Field(default=131_072, gt=0, description="number of held-out tokens")
    ce: bool | Auto = Field(
        default="auto", description='measure CE and KL; "auto": if the model has a language-model head'
    )


class Recipe(Spec):
    """A whole recipe.

    >>> Recipe().model.name
    'demo'
    """

    model: ModelSpec = ModelSpec()
    sites: SitesSpec = SitesSpec()
    data: DataSpec = DataSpec()
    dictionary: DictionarySpec = DictionarySpec()
    plan: PlanSpec = PlanSpec()
    train: TrainSpec = TrainSpec()
    evaluate: EvaluateSpec = EvaluateSpec()


Run = Recipe
"""The earlier name of `Recipe` in the public interface."""
