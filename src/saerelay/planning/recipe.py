"""The recipe: what a user writes in `run.toml`. The comments that `saerelay init` prints are the descriptions here."""

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from saerelay.sae.architectures import Architecture

from saerelay.sae.spec import DictionarySpec, Method
from saerelay.site import ModuleKind
from saerelay.spec import Count, Spec, parse_count

Preset = Literal["scratch", "forward", "backward", "alternate", "hub", "paper", "auto"]


def _share_or_count(value: object) -> object:
    """A float up to 1 is a share of the leg's budget, anything else a count of tokens."""
    return value if isinstance(value, float) and 0 <= value <= 1 else parse_count(value)


def _rate(value: object) -> object:
    """A learning rate, or "auto" (stored as 0)."""
    return 0.0 if value == "auto" else value


ShareOrCount = Annotated[float | int, BeforeValidator(_share_or_count)]


LegId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$")]
"""The id of a leg: safe as the name of a directory."""


Rate = Annotated[float, BeforeValidator(_rate), Field(ge=0, lt=1)]


ShareOfRate = Annotated[float, BeforeValidator(_rate), Field(ge=0)]


def tokens_of(value: float, budget: int) -> int:
    """Tokens meant by a share (a float up to 1) or a count, of a leg with `budget` tokens.

    >>> tokens_of(0.5, 1000), tokens_of(300, 1000)
    (500, 300)
    """
    return round(value * budget) if isinstance(value, float) and value <= 1 else int(value)


def parse_budget(text: str) -> tuple[float, str]:
    """A budget as (amount, "tokens" | "FLOPs" | "hours").

    >>> parse_budget("10M tokens"), parse_budget("5e14 FLOPs"), parse_budget("1.5 hours")
    ((10000000.0, 'tokens'), (500000000000000.0, 'FLOPs'), (1.5, 'hours'))
    """
    amount, _, unit = text.strip().partition(" ")
    unit = {"tokens": "tokens", "flops": "FLOPs", "hours": "hours", "hour": "hours"}.get(unit.strip().lower(), "")
    try:
        value = float(amount) if unit != "tokens" else float(parse_count(amount))  # type: ignore[arg-type]
    except ValueError:
        value = 0.0
    if not unit or not 0 < value < float("inf"):
        raise ValueError(f'"{text}" is no budget; write "10M tokens", "5e14 FLOPs" or "1.5 hours"')
    return value, unit


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


class DataSpec(Spec):
    """Where tokens come from. At most one of `dataset`, `text`, `tokens`; none means the built-in Python corpus."""

    dataset: str = Field(
        default="", description='Hugging Face dataset: hub id (streamed) or a local directory; "" for none'
    )
    subset: str = Field(default="", description="the dataset's configuration name, if it has several")
    split: str = Field(default="train", description="the dataset's split")
    column: str = Field(default="text", description="the dataset's column with the documents")
    revision: str = Field(default="", description="the dataset's branch, tag or commit")
    text: list[str] = Field(default=[], description="text files or directories of text files")
    tokens: str = Field(default="", description="a .npy file of token ids (uint16 or uint32, 1-D or 2-D)")
    context: int = Field(default=256, ge=4, description="tokens in one sequence")
    prepend_bos: bool = Field(default=True, description="start every sequence with the BOS token (never trained on)")
    epochs: int = Field(default=1, ge=1, description="how often the corpus may be read")
    outlier_norm: float = Field(
        default=10.0,
        ge=0,
        description="leave out positions whose norm is over this multiple of the median; 0 keeps all",
    )
    cache: str = Field(
        default="", description='directory for activations (bfloat16) that several epochs or runs read; "" for none'
    )
    block_tokens: Count = Field(
        default=0, ge=0, description="tokens shuffled together; 0 chooses by memory, at most 65536"
    )

    @model_validator(mode="after")
    def _one_source(self) -> "DataSpec":
        given = [key for key in ("dataset", "text", "tokens") if getattr(self, key)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; keep one of them and empty the others")
        return self


class LegSpec(Spec):
    """One leg of an explicit plan: `[[plan.legs]]`."""

    id: LegId
    layer: int
    module: ModuleKind | None = None
    parent: str = ""
    """Id of another leg, or a dictionary outside: a directory (a leg or snapshot of another run, or another tool's
    files) or hf://user/repo[@revision][/path]; "" trains from scratch."""
    tokens: Count = Field(ge=0)
    """Training tokens; 0 leaves a transfer untrained (but refitted, if it is to be)."""
    fork_at: ShareOrCount = 1.0
    """The parent's age at which this leg starts from it: a share of its tokens or a count."""
    method: Method | None = None
    refit: bool | None = None
    control_of: str = ""
    control_kind: Literal["equal_tokens", "full"] = "equal_tokens"
    batch_tokens: Count | None = Field(default=None, ge=1)
    reuse: int | None = Field(default=None, ge=1)
    lr: Rate | None = None
    architecture: Architecture | None = None
    """Another one than the parent's: thresholds are calibrated on the way."""
    n_latents: Count | None = Field(default=None, ge=1)
    """More or fewer than the parent's: new ones take up its residual, those that explain least are left behind."""
    k: int | None = Field(default=None, ge=1)
    """Active latents per token, of whatever architecture (jumprelu: its target_l0)."""
    seed: int | None = Field(default=None, ge=0)
    after: str = ""
    """Start when this leg has ended (a leg from scratch starts at once otherwise)."""
    goal_fvu: float | None = Field(default=None, gt=0)
    """FVU on validation documents at which it may end early (see plan.stop)."""
    decay_gain: float = Field(default=0.9, gt=0, le=1)
    """FVU after the learning rate's decay over that before it: what a leg with a goal counts on."""
    predicted_fvu: float | None = Field(default=None, gt=0)
    """What a survey predicts of it, on validation documents; changes nothing."""


class PlanSpec(Spec):
    """Who is trained from scratch, who from whom, with how many tokens."""

    preset: Preset = Field(default="hub", description="scratch, forward, backward, alternate, hub, paper or auto")
    budget: str = Field(
        default="", description='auto: what the run may take: "10M tokens" trained on, "5e14 FLOPs" or "1.5 hours" ...'
    )
    fvu_ratio: float = Field(
        default=0.0, ge=0, description="... or the FVU wanted, as a multiple of scratch at root_tokens; 0 is 1.05"
    )
    survey_tokens: Count = Field(
        default=0, ge=0, description="auto: tokens of the longest pilot; 0 is root_tokens / 10, or 40 a latent"
    )
    stop: bool = Field(default=True, description="let legs that have a goal end when they have reached it")
    roots: list[int] = Field(default=[], description="layers trained from scratch; [] lets the preset choose")
    direction: Literal["auto", "forward", "backward", "both"] = Field(
        default="auto",
        description="alternate, paper: which neighbour gives: forward (the one below), backward (above), both",
    )
    root_tokens: Count = Field(default=2_000_000, gt=0, description="training tokens of a root")
    transfer_tokens: Count = Field(default=250_000, ge=0, description="training tokens of a transfer; 0 is zero-shot")
    fork_at: ShareOrCount = Field(
        default=1.0, description="when children leave a parent: a share of its tokens, or a count"
    )
    reuse: int = Field(
        default=1, ge=1, description="how often a transfer trains on each block: more samples from fewer tokens"
    )
    method: Method = Field(default="affine", description="identity, rescale, procrustes or affine")
    refit: bool = Field(
        default=True, description="after a hop: revive silent latents, refit the decoder in closed form"
    )
    moment_tokens: Count = Field(default=100_000, gt=0, description="tokens the map between two layers is fitted on")
    refit_tokens: Count = Field(default=65_536, gt=0, description="tokens the decoder is refitted on, at most a block")
    controls: list[int] = Field(
        default=[], description="layers that also get from-scratch controls (equal tokens, and full)"
    )
    legs: list[LegSpec] = Field(
        default=[], description="an explicit plan instead of a preset: [[plan.legs]], see the README"
    )

    @field_validator("budget")
    @classmethod
    def _known_unit(cls, budget: str) -> str:
        if budget:
            parse_budget(budget)
        return budget

    @model_validator(mode="after")
    def _one_aim(self) -> "PlanSpec":
        if self.budget and self.fvu_ratio:
            raise ValueError("budget and fvu_ratio are given; keep one of them: each follows from the other")
        if self.preset != "auto" and (self.budget or self.fvu_ratio):
            raise ValueError('budget and fvu_ratio belong to preset = "auto"; set it, or remove them')
        return self

    @property
    def surveyed(self) -> bool:
        """Whether its legs are chosen by a survey."""
        return self.preset == "auto" and not self.legs


class TrainSpec(Spec):
    """How a dictionary is trained."""

    batch_tokens: Count = Field(default=512, gt=0, description="tokens in one training step")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description='of the encoder product; "auto": bfloat16 where the model runs in it'
    )
    lr: Rate = Field(default=0.0, description='of the decoder, from scratch; "auto" follows the sweep in docs/log.md')
    transfer_lr: Rate = Field(default=0.0, description='after a transfer; "auto" by what its map leaves unexplained')
    encoder_lr: float = Field(default=0.5, gt=0, description="rate of the encoder's weights, as a share of lr")
    bias_lr: ShareOfRate = Field(
        default=0.0, description='rate of its biases and thresholds, as a share of lr; "auto": √width / 5'
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
    dead_after: Count = Field(
        default=0,
        ge=0,
        description="tokens without firing after which a latent is dead; 0: min(10M, a fiftieth of the budget)",
    )
    seed: int = Field(default=0, ge=0, description="every random choice follows from it")
    checkpoint_every: Count = Field(default=500_000, gt=0, description="tokens between two saved states")
    snapshots: list[ShareOrCount] = Field(
        default=[], description="ages also published: shares or counts; 0 is right after a hop"
    )
    memory_gib: float = Field(
        default=0.0, ge=0, description="split cohorts whose training state exceeds this; 0: 70 % of the device's memory"
    )
    loggers: list[Literal["tensorboard", "wandb"]] = Field(
        default=[], description="beside metrics.jsonl: tensorboard, wandb"
    )


class EvaluateSpec(Spec):
    """How quality is measured."""

    tokens: Count = Field(default=131_072, gt=0, description="held-out tokens")
    ce: bool | Literal["auto"] = Field(
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


def annotated_toml(run: Recipe) -> str:
    """The recipe as TOML with every key and what it means: the output of `saerelay init`."""
    lines = ['# A recipe for `saerelay train run.toml --out runs/a`. Counts may be written 250_000 or "250k".', ""]
    for name, section in run:
        lines += [f"# {(type(section).__doc__ or '').splitlines()[0]}", f"[{name}]"]
        for key, field in type(section).model_fields.items():
            if key == "legs":
                lines.append(f"# {field.description}")
                continue
            text = f"{key} = {_toml_value(key, getattr(section, key))}"
            lines.append(f"{text:<34}# {field.description}")
        lines.append("")
    for leg in run.plan.legs:
        given = leg.model_dump(exclude_unset=True, exclude_none=True)
        lines += ["[[plan.legs]]", *(f"{key} = {_toml_value(key, value)}" for key, value in given.items()), ""]
    return "\n".join(lines)


def _toml_value(key: str, value: Any) -> str:
    if key in ("lr", "transfer_lr") and value == 0:
        return '"auto"'
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:_}"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
