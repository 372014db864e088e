"""One leg as a user writes it: `[[plan.legs]]`. Its keys stand side by side in a file (see `Spec.inline`)."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from saerelay.sae.architectures import architecture_named
from saerelay.sae.spec import LegMethod
from saerelay.site import TRANSCODER, ModuleKind
from saerelay.spec import MAX_COUNT, MAX_SEED, Count, OrAuto, Positive, Spec, parse_count


def _share_or_count(value: object) -> object:
    """Parse a value: a number up to 1 is a share of the leg's budget, a larger one a count of tokens."""
    number = parse_count(value)
    if not isinstance(number, int | float):
        return number
    if 0 <= number <= 1:
        return float(number)
    if number < 0 or number % 1:  # true for NaN and infinity, too
        raise ValueError("must be a share, from 0 to 1, or a whole number of tokens")
    if number > MAX_COUNT:
        raise ValueError(f"must be less than or equal to {MAX_COUNT}")
    return int(number)


ShareOrCount = Annotated[float | int, BeforeValidator(_share_or_count)]
LegId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$")]
"""The id of a leg: safe as the name of a directory. Two facts are in ids alone: what a leg repeats with another seed
(L3-seed1: `Plan.repeat_of`), and to which leg of the recipe an extension of the run added it (L3+2M: `parts_of`); a
leg beside L3 that a user writes cannot have such an id."""
Rate = Annotated[float, Field(gt=0, lt=1)]
Reuse = Annotated[int, Field(ge=1, le=1000)]
"""How many times a leg trains on each block."""
ControlKind = Literal["equal_tokens", "full", "random"]
"""From scratch on the transfer's tokens, from scratch on the full budget, or random and refitted as after a hop."""


def tokens_of(value: float, budget: int) -> int:
    """Return the tokens meant by a share (a float up to 1) or a count, for a leg with `budget` tokens.

    >>> tokens_of(0.5, 1000), tokens_of(300, 1000)
    (500, 300)
    """
    if isinstance(value, float) and value <= 1:
        return round(value * budget)
    return int(value)


def repeat_name(leg_id: str, seed: int) -> str:
    """Return the id of a leg's repeat with another seed.

    >>> repeat_name("L3-from-L5", 1)
    'L3-from-L5-seed1'
    """
    return f"{leg_id}-seed{seed}"


class LegHop(Spec):
    """What a leg is transferred from, and how; None leaves a choice to the plan."""

    parent: str
    """Id of another leg, or the place of a dictionary outside the plan: a directory (a leg or snapshot of another run,
    or another tool's files) or `hf://user/repo[@revision][/path]`."""
    fork_at: ShareOrCount = 1.0
    """The parent's age at which this leg starts from it: a share of its tokens or a count."""
    method: LegMethod | None = None
    refit: bool | None = None


class LegControl(Spec):
    """What a leg is a control of."""

    control_of: str
    control_kind: ControlKind = "equal_tokens"


class LegGoal(Spec):
    """What quality is expected of a leg: FVU in training units (see train.balance) on validation documents."""

    goal_fvu: float | None = Field(default=None, gt=0)
    """FVU at which the leg may end early (see plan.stop)."""
    decay_gain: float = Field(default=0.9, gt=0, le=1)
    """FVU after the learning rate's decay over FVU before it, which a leg with a goal counts on."""
    predicted_fvu: float | None = Field(default=None, gt=0)
    """FVU that a survey predicts; for information only."""


class LegDictionary(Spec):
    """How a leg's dictionary differs from its parent's, or from the recipe's; None changes nothing."""

    architecture: str | None = None
    """An architecture other than the parent's; thresholds are calibrated during the hop."""
    n_latents: Count | None = Field(default=None, ge=1)
    """More or fewer latents than the parent: new ones take up its residual, those that explain least are dropped."""
    k: Positive | None = None
    """Active latents per token (jumprelu, gated: their target_l0); not for relu, whose L0 follows from its penalty."""
    skip_connection: bool | None = None
    """Transcoders: whether there is an affine path beside the latents. A hop fits one that the parent lacks, and drops
    one that the parent has."""

    @field_validator("architecture")
    @classmethod
    def _known_architecture(cls, name: str | None) -> str | None:
        if name is not None:
            architecture_named(name)
        return name


class LegTraining(Spec):
    """How a leg is trained, where it differs from the recipe."""

    batch_tokens: Count | None = Field(default=None, ge=1)
    reuse: Reuse | None = None
    lr: OrAuto[Rate] | None = None


class LegSpec(Spec):
    """One leg of an explicit plan: `[[plan.legs]]`."""

    inline = ("hop", "control", "goal", "dictionary", "training")

    id: LegId
    layer: int
    module: ModuleKind | None = None
    module_out: ModuleKind | Literal[""] | None = None
    """The module that a transcoder reconstructs. A leg without `module` and `module_out` takes both from the recipe."""
    tokens: Count = Field(ge=0)
    """Training tokens. 0 leaves a transfer untrained (the decoder may still be refitted), and gives a control from
    scratch as many as its kind says."""
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    after: str = ""
    """The leg that must end before this one starts (without it, a leg from scratch starts at once)."""
    hop: LegHop | None = None
    """None for a leg from scratch."""
    shared_layers: list[int] = []
    """Other layers whose activations the SAE is trained on as well, after alignment with those of its own layer."""
    control: LegControl | None = None
    goal: LegGoal = LegGoal()
    dictionary: LegDictionary = LegDictionary()
    training: LegTraining = LegTraining()

    @property
    def parent(self) -> str:
        """What the leg is transferred from; "" if it is trained from scratch."""
        return self.hop.parent if self.hop else ""

    @property
    def control_of(self) -> str:
        """The leg that this leg is a control of; "" if it is not a control."""
        return self.control.control_of if self.control else ""

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, data: Any) -> Any:
        """Read an empty parent or control_of as none, and the module "transcoder" as an MLP's input and output."""
        if not isinstance(data, dict):
            return data
        rest = dict(data)
        if rest.get("module") == "transcoder":
            if rest.get("module_out") not in (None, "", TRANSCODER.module_out):
                raise ValueError(
                    f'module = "transcoder" reads {TRANSCODER.module} and reconstructs {TRANSCODER.module_out}; '
                    f'with module_out = "{rest["module_out"]}", set module to the module that is read'
                )
            rest["module"] = TRANSCODER.module
            rest["module_out"] = TRANSCODER.module_out
        if rest.get("parent") == "":
            for key in LegHop.all_keys():
                rest.pop(key, None)
        if rest.get("control_of") == "":
            for key in LegControl.all_keys():
                rest.pop(key, None)
        return rest
