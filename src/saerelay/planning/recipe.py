"""The recipe: what a user writes in `run.toml`. The comments that `saerelay init` prints are the descriptions here.

Sections with many keys are made of parts; in a file their keys stand side by side (see `Spec.inline`).
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from saerelay.sae.architectures import architecture_named
from saerelay.sae.spec import DictionarySpec, Method
from saerelay.site import ModuleKind
from saerelay.spec import Auto, Count, OrAuto, Spec, parse_count

Preset = Literal["scratch", "forward", "backward", "alternate", "hub", "paper", "auto"]


def _share_or_count(value: object) -> object:
    """A float up to 1 is a share of the leg's budget, anything else a count of tokens."""
    if isinstance(value, float) and 0 <= value <= 1:
        return value
    return parse_count(value)


ShareOrCount = Annotated[float | int, BeforeValidator(_share_or_count)]
LegId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$")]
"""The id of a leg: safe as the name of a directory."""
Rate = Annotated[float, Field(gt=0, lt=1)]
ControlKind = Literal["equal_tokens", "full"]


def tokens_of(value: float, budget: int) -> int:
    """Tokens meant by a share (a float up to 1) or a count, of a leg with `budget` tokens.

    >>> tokens_of(0.5, 1000), tokens_of(300, 1000)
    (500, 300)
    """
    if isinstance(value, float) and value <= 1:
        return round(value * budget)
    return int(value)


BUDGET_UNITS = {"tokens": "tokens", "flops": "FLOPs", "hours": "hours", "hour": "hours"}


def parse_budget(text: str) -> tuple[float, str]:
    """A budget as (amount, "tokens" | "FLOPs" | "hours").

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
    """Which language model is read."""

    name: str = Field(default="demo", description='hub id, local directory, or "demo" for the built-in model')
    revision: str = Field(default="", description='hub branch, tag or commit; "" is the default branch')
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description='"auto": bfloat16 where the hardware multiplies it fast, else float32'
    )
    device: str = Field(default="auto", description='"auto", "cpu", "cuda", "cuda:1", "mps"')
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with a hub model")


class SitesSpec(Spec):
    """Which activations get a dictionary."""

    layers: Literal["all"] | list[int] = Field(default="all", description='"all", or a list such as [0, 3, 6]')
    module: ModuleKind = Field(default="resid_post", description="resid_post, resid_pre, mlp_out, attn_out or attn_z")


class DatasetSpec(Spec):
    """A Hugging Face dataset."""

    dataset: str = Field(
        default="", description='Hugging Face dataset: hub id (streamed) or a local directory; "" for none'
    )
    subset: str = Field(default="", description="the dataset's configuration name, if it has several")
    split: str = Field(default="train", description="the dataset's split")
    column: str = Field(default="text", description="the dataset's column with the documents")
    revision: str = Field(default="", description="the dataset's branch, tag or commit")


class DataSpec(Spec):
    """Where tokens come from. At most one of `dataset`, `text`, `tokens`; none means the built-in Python corpus."""

    inline = ("hub",)

    hub: DatasetSpec = DatasetSpec()
    text: list[str] = Field(default=[], description="text files or directories of text files")
    tokens: str = Field(default="", description="a .npy file of token ids (uint16 or uint32, 1-D or 2-D)")
    context: int = Field(default=256, ge=4, description="tokens per sequence")
    prepend_bos: bool = Field(default=True, description="start every sequence with the BOS token (never trained on)")
    epochs: int = Field(default=1, ge=1, description="how many times the corpus may be read")
    outlier_norm: float = Field(
        default=10.0,
        ge=0,
        description="leave out positions whose norm exceeds this multiple of the median; 0 keeps all",
    )
    cache: str = Field(
        default="",
        description='directory for activations (bfloat16), to be read by later epochs and runs; "" for none',
    )
    block_tokens: OrAuto[Count] = Field(
        default="auto",
        description='tokens shuffled together; "auto": from the shapes of model and plan, at most 65536',
    )

    @model_validator(mode="after")
    def _one_source(self) -> "DataSpec":
        sources = {"dataset": self.hub.dataset, "text": self.text, "tokens": self.tokens}
        given = [key for key, value in sources.items() if value]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; keep one of them and empty the others")
        return self


class LegHop(Spec):
    """Where a leg is transferred from, and how; None leaves it to the plan."""

    parent: str
    """Id of another leg, or a dictionary outside the plan: a directory (a leg or snapshot of another run, or another
    tool's files) or `hf://user/repo[@revision][/path]`."""
    fork_at: ShareOrCount = 1.0
    """The parent's age at which this leg starts from it: a share of its tokens or a count."""
    method: Method | None = None
    refit: bool | None = None


class LegControl(Spec):
    """What a leg is a control of."""

    control_of: str
    control_kind: ControlKind = "equal_tokens"


class LegGoal(Spec):
    """What quality is expected of a leg, as FVU on validation documents."""

    goal_fvu: float | None = Field(default=None, gt=0)
    """At which the leg may end early (see plan.stop)."""
    decay_gain: float = Field(default=0.9, gt=0, le=1)
    """FVU after the learning rate's decay over FVU before it: what a leg with a goal counts on."""
    predicted_fvu: float | None = Field(default=None, gt=0)
    """What a survey predicts; changes nothing."""


class LegDictionary(Spec):
    """How a leg's dictionary differs from its parent's, or from the recipe's; None leaves it as it is."""

    architecture: str | None = None
    """Another architecture than the parent's: thresholds are calibrated on the way."""
    n_latents: Count | None = Field(default=None, ge=1)
    """More or fewer than the parent's: new ones take up its residual, those that explain least are left behind."""
    k: int | None = Field(default=None, ge=1)
    """Active latents per token, whatever the architecture (jumprelu: its target_l0)."""

    @field_validator("architecture")
    @classmethod
    def _known_architecture(cls, name: str | None) -> str | None:
        if name is not None:
            architecture_named(name)
        return name


class LegTraining(Spec):
    """How a leg is trained, where it differs from the recipe."""

    batch_tokens: Count | None = Field(default=None, ge=1)
    reuse: int | None = Field(default=None, ge=1)
    lr: OrAuto[Rate] | None = None


class LegSpec(Spec):
    """One leg of an explicit plan: `[[plan.legs]]`."""

    inline = ("hop", "control", "goal", "dictionary", "training")

    id: LegId
    layer: int
    module: ModuleKind | None = None
    tokens: Count = Field(ge=0)
    """Training tokens; 0 leaves a transfer untrained (but refitted, if it is to be)."""
    seed: int | None = Field(default=None, ge=0)
    after: str = ""
    """Start when this leg has ended (a leg from scratch starts at once otherwise)."""
    hop: LegHop | None = None
    """None trains from scratch."""
    control: LegControl | None = None
    goal: LegGoal = LegGoal()
    dictionary: LegDictionary = LegDictionary()
    training: LegTraining = LegTraining()

    @property
    def parent(self) -> str:
        """What it is transferred from; "" if it is trained from scratch."""
        return self.hop.parent if self.hop else ""

    @property
    def control_of(self) -> str:
        """The leg that it is a control of; "" if it is none."""
        return self.control.control_of if self.control else ""

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, data: Any) -> Any:
        """An empty parent, or control_of, is none."""
        if not isinstance(data, dict):
            return data
        rest = dict(data)
        if rest.get("parent") == "":
            for key in LegHop.all_keys():
                rest.pop(key, None)
        if rest.get("control_of") == "":
            for key in LegControl.all_keys():
                rest.pop(key, None)
        return rest


class HopSpec(Spec):
    """How legs get from layer to layer."""

    method: Method = Field(default="affine", description="identity, rescale, procrustes or affine")
    refit: bool = Field(
        default=True, description="after a hop: revive silent latents, refit the decoder in closed form"
    )
    moment_tokens: Count = Field(default=100_000, gt=0, description="tokens the map between two layers is fitted on")
    refit_tokens: Count = Field(default=65_536, gt=0, description="tokens the decoder is refitted on, at most a block")
    fork_at: ShareOrCount = Field(
        default=1.0, description="when children leave a parent: a share of its tokens, or a count"
    )
    reuse: int = Field(
        default=1,
        ge=1,
        description="how many times a transfer trains on each block: more samples from fewer tokens",
    )


class AutoSpec(Spec):
    """What `preset = "auto"` aims for."""

    budget: str = Field(
        default="", description='auto: what the run may take: "10M tokens" trained on, "5e14 FLOPs" or "1.5 hours" ...'
    )
    fvu_ratio: OrAuto[Annotated[float, Field(gt=0)]] = Field(
        default="auto", description='... or the FVU wanted, as a multiple of scratch at root_tokens; "auto": 1.05'
    )
    survey_tokens: OrAuto[Count] = Field(
        default="auto",
        description='auto: tokens of the longest pilot; "auto": root_tokens / 10, or 64 per latent if that is more',
    )

    @field_validator("budget")
    @classmethod
    def _known_unit(cls, budget: str) -> str:
        if budget:
            parse_budget(budget)
        return budget

    @property
    def given(self) -> bool:
        """Whether an aim is stated."""
        return bool(self.budget) or self.fvu_ratio != "auto"


class PlanSpec(Spec):
    """Which layers are trained from scratch, which are transferred from which, and on how many tokens."""

    inline = ("auto", "hop")

    preset: Preset = Field(default="hub", description="scratch, forward, backward, alternate, hub, paper or auto")
    auto: AutoSpec = AutoSpec()
    stop: bool = Field(default=True, description="let legs that have a goal end when they have reached it")
    roots: list[int] = Field(default=[], description="layers trained from scratch; [] lets the preset choose")
    direction: Literal["auto", "forward", "backward", "both"] = Field(
        default="auto",
        description="alternate, paper: transfer forward (from the layer below), backward (from above), or both",
    )
    root_tokens: Count = Field(default=2_000_000, gt=0, description="training tokens of a root")
    transfer_tokens: Count = Field(default=250_000, ge=0, description="training tokens of a transfer; 0 is zero-shot")
    hop: HopSpec = HopSpec()
    controls: list[int] = Field(
        default=[], description="layers that also get from-scratch controls (equal tokens, and full)"
    )
    legs: list[LegSpec] = Field(
        default=[], description="an explicit plan instead of a preset: [[plan.legs]], see the documentation"
    )

    @model_validator(mode="after")
    def _one_aim(self) -> "PlanSpec":
        if self.auto.budget and self.auto.fvu_ratio != "auto":
            raise ValueError("budget and fvu_ratio are given; keep one of them: each follows from the other")
        if self.preset != "auto" and self.auto.given:
            raise ValueError('budget and fvu_ratio belong to preset = "auto"; set it, or remove them')
        return self

    @property
    def surveyed(self) -> bool:
        """Whether the legs are chosen by a survey."""
        return self.preset == "auto" and not self.legs


class OptimizerSpec(Spec):
    """Learning rates and their schedule."""

    lr: OrAuto[Rate] = Field(
        default="auto", description='of the decoder, from scratch; "auto": by width and budget (decision 007)'
    )
    transfer_lr: OrAuto[Rate] = Field(
        default="auto", description='after a transfer; "auto": by what its map leaves unexplained'
    )
    encoder_lr: float = Field(default=0.5, gt=0, description="rate of the encoder's weights, as a share of lr")
    bias_lr: OrAuto[Annotated[float, Field(gt=0)]] = Field(
        default="auto", description='rate of its biases and thresholds, as a share of lr; "auto": √width / 5'
    )
    betas: tuple[float, float] = Field(default=(0.8, 0.99), description="Adam's")
    whitening: float = Field(
        default=0.25,
        ge=0,
        le=0.5,
        description="the encoder reads activations times their covariance to minus this power: learns faster; 0: off",
    )
    warmup: float = Field(
        default=0.02, ge=0, lt=1, description="share of the budget over which the learning rate rises"
    )
    sparsity_warmup: float = Field(
        default=0.05, ge=0, lt=1, description="jumprelu, relu: share over which the penalty rises"
    )
    decay: float = Field(
        default=0.3, ge=0, le=1, description="share of the budget over which the learning rate falls to 0"
    )
    clip: float = Field(default=1.0, ge=0, description="largest norm of a gradient; 0 never clips")


class TrainSpec(Spec):
    """How a dictionary is trained."""

    inline = ("optimizer",)

    batch_tokens: Count = Field(default=512, gt=0, description="tokens per training step")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description='of the encoder product; "auto": bfloat16 where the model runs in it'
    )
    optimizer: OptimizerSpec = OptimizerSpec()
    dead_after: OrAuto[Count] = Field(
        default="auto",
        description='tokens without firing after which a latent is dead; "auto": min(10M, a fiftieth of the budget)',
    )
    seed: int = Field(default=0, ge=0, description="every random choice follows from it")
    checkpoint_every: Count = Field(default=500_000, gt=0, description="tokens between two saved states")
    snapshots: list[ShareOrCount] = Field(
        default=[], description="ages also published: shares or counts; 0 is right after a hop"
    )
    memory_gib: OrAuto[Annotated[float, Field(gt=0)]] = Field(
        default="auto",
        description='split cohorts whose training state exceeds this; "auto": 70 % of the device\'s memory',
    )
    loggers: list[Literal["tensorboard", "wandb"]] = Field(
        default=[], description="in addition to metrics.jsonl: tensorboard, wandb"
    )


class EvaluateSpec(Spec):
    """How quality is measured."""

    tokens: Count = Field(default=131_072, gt=0, description="held-out tokens")
    ce: bool | Auto = Field(
        default="auto", description='CE and KL metrics; "auto": if the model has a language-model head'
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
"""The name that recipes had in the public interface at first."""


# --- as text ------------------------------------------------------------------------------------------------------


def annotated_toml(recipe: Recipe) -> str:
    """The recipe as TOML with every key and what it means: the output of `saerelay init`."""
    lines = ['# A recipe for `saerelay train run.toml --out runs/a`. Counts may be written 250_000 or "250k".', ""]
    for name, section in recipe:
        summary = (type(section).__doc__ or "").splitlines()[0]
        lines.append(f"# {summary}")
        lines.append(f"[{name}]")
        for key, value, description in section.described():
            if key == "legs":
                lines.append(f"# {description}")
                continue
            assignment = f"{key} = {_toml_value(value)}"
            lines.append(f"{assignment:<34}# {description}")
        lines.append("")
    for leg in recipe.plan.legs:
        given = leg.model_dump(exclude_unset=True, exclude_none=True)
        lines.append("[[plan.legs]]")
        lines += [f"{key} = {_toml_value(value)}" for key, value in given.items()]
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:_}"
    if isinstance(value, tuple):
        value = list(value)
    return json.dumps(value, ensure_ascii=False)
