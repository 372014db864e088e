"""The cost of a suite, as `summary.json` states it, beside that of all layers from scratch."""

from saerelay.document import Measured, Record
from saerelay.planning.survey import SurveyCost


class ControlCost(Record):
    """The cost of the control legs, and of repeats with other seeds."""

    sae_samples: int
    """Number of activations they were trained or refitted on."""
    flops: float
    """Floating-point operations executed."""
    seconds: Measured
    """Time of their training steps, in seconds; divided by the number of ranks, which train legs at the same time."""


class ScratchCost(Record):
    """The cost of all layers from scratch at `plan.root_tokens`, sharing one pass of the language model."""

    tokens: int
    """Number of tokens that each SAE is trained on, counting repetitions."""
    reuse: int = 1
    """How many times each is trained on each token (`plan.root_reuse`)."""
    lm_tokens: int
    """Number of tokens the language model reads."""
    sae_samples: int
    """Number of activations that SAEs are trained on."""
    flops: float
    """Floating-point operations."""
    lm_flops: float
    """Floating-point operations of the language model among them."""
    seconds_estimate: Measured
    """Estimated wall-clock time in seconds, on as many ranks, from the time per token of the legs that were trained
    from scratch and of the language model."""


class SuiteCost(Record):
    """The cost of the suite without its controls and without evaluation, beside that of all layers from scratch."""

    lm_tokens: int
    """Number of tokens the language model read."""
    lm_tokens_held_out: int
    """Number of validation tokens it read to measure goals."""
    lm_tokens_unique: int
    """Number of different tokens among `lm_tokens`."""
    survey: SurveyCost | None
    """Cost of the survey, on top of everything else; null without a survey."""
    sae_samples: int
    """Number of activations that SAEs were trained or refitted on."""
    flops: float
    """Floating-point operations executed."""
    lm_flops: Measured
    """Floating-point operations of the language model among them."""
    flops_dense_equivalent: float
    """Floating-point operations with dense SAE steps: per token six for each weight, 12·D·F for an SAE."""
    seconds: Measured
    """Wall-clock time, in seconds."""
    processor_seconds: Measured = None
    """CPU time of the whole run, controls included, in seconds; the time of other programs is not included."""
    seconds_lm: Measured
    """Wall-clock time of the language model's forward passes, in seconds."""
    from_scratch: ScratchCost
    """Cost of the same layers from scratch."""
    controls: ControlCost
    """Cost of the controls."""

    @property
    def with_survey(self) -> "SuiteCost":
        """The same cost with the survey's samples, tokens, operations and time added; None where they are unknown."""
        survey = self.survey
        if survey is None:
            return self
        lm_flops = None
        if self.lm_flops is not None and survey.lm_flops is not None:
            lm_flops = self.lm_flops + survey.lm_flops
        return self.changed(
            sae_samples=self.sae_samples + survey.sae_samples,
            lm_tokens=self.lm_tokens + survey.lm_tokens,
            flops=self.flops + survey.flops,
            lm_flops=lm_flops,
            seconds=None if self.seconds is None else self.seconds + survey.seconds,
            survey=None,
        )
