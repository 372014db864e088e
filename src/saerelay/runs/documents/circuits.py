"""Sparse feature circuits: `circuits/<task>.json`."""

from typing import ClassVar

from saerelay.document import Document, Measured, Record
from saerelay.planning.leg import Role
from saerelay.planning.leg_spec import ControlKind


class CircuitQuestion(Record):
    """The question about a task."""

    task: str
    """Name of the task, or of the file of prompts without its extension."""
    prompts: str
    """Digest of the prompts."""
    n_prompts: int
    """Number of prompts."""
    seed: int
    """Seed with which the prompts were drawn."""
    method: str
    """`attribution` or `integrated-gradients`."""
    k: list[int]
    """Sizes of circuits, in latents."""


class Ability(Record):
    """How well the model does the task; m is the logit of the right token minus that of the wrong one."""

    description: str
    """Description of the task."""
    model: str
    """Name of the language model."""
    revision: str
    """Resolved revision of the language model."""
    dtype: str
    """Data type of the language model's activations."""
    n_found_on: int
    """Number of prompts that circuits are found on."""
    n_judged_on: int
    """Number of other prompts that circuits are judged on."""
    n_tokens: list[int]
    """Smallest and largest number of tokens of a prompt, BOS included."""
    means: str
    """Whether latents are ablated to their means at each position, or over all positions."""
    accuracy: float
    """Share of prompts with m > 0."""
    accuracy_needed: float
    """Accuracy below which nothing is measured."""
    m: float
    """Mean m over all prompts, in logits."""
    m_se: float
    """Standard error of `m`."""


class Circuit(Record):
    """How much of the answer one circuit of k latents carries."""

    k: int
    """Number of latents."""
    faithfulness: Measured
    """(m̄ kept − m̄ empty) / (m̄ clean − m̄ empty); 1 is best, null where ablating all latents does not lower m̄."""
    faithfulness_se: Measured
    """Standard error over prompts (delta method)."""
    completeness: Measured
    """(m̄ ablated − m̄ empty) / (m̄ clean − m̄ empty); 0 is best."""
    completeness_se: Measured
    """Standard error over prompts (delta method)."""


class CircuitScores(Record):
    """Measurements of the circuits of one leg, prompt by prompt."""

    latents: list[int]
    """Latents of the largest circuit, the largest effect first."""
    effects: list[float]
    """Their indirect effects, in logits."""
    m_empty: list[float]
    """m of each prompt with all latents ablated."""
    m_kept: list[list[float]]
    """m of each prompt with the circuit kept and all other latents ablated, one list per k."""
    m_ablated: list[list[float]]
    """m of each prompt with the circuit ablated and all other latents kept, one list per k."""


class CircuitLeg(CircuitScores):
    """Circuits of one leg."""

    leg: str
    """Id of the leg."""
    layer: int
    """Layer it reads."""
    module: str
    """Kind of module it reads."""
    role: Role
    """Role of the leg."""
    parent: str | None
    """Id or directory of the dictionary it started from."""
    control_of: str | None
    """Id of the leg that a control is compared with."""
    control_kind: ControlKind | None
    """Which kind of control it is."""
    tokens: int
    """Number of tokens it was trained on."""
    n_latents: int
    """Number of latents."""
    circuits: list[Circuit]
    """One circuit per k."""


class CircuitDifference(Circuit):
    """Circuits of a transferred leg minus those of one from scratch at its site, on the same prompts."""

    leg: str | None
    """Id of the transferred leg; null for the mean over all pairs of a kind."""
    scratch: str | None
    """Id of the leg from scratch; null for the mean over all pairs of a kind."""
    kind: str
    """`root`, `equal_tokens` or `full`."""


class Circuits(Ability, Document):
    """`circuits/<task>.json`: the latents that carry a task in each leg."""

    SCHEMA: ClassVar = 1
    MADE_BY: ClassVar = "`saerelay circuits RUN --task TASK`"

    asked: CircuitQuestion
    """The question; another question about the task makes the file again."""
    clean: list[float]
    """m of the clean model for each prompt judged on."""
    legs: list[CircuitLeg]
    """One row for each leg."""
    differences: list[CircuitDifference]
    """Transferred legs minus those from scratch."""
