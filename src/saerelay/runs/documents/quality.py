"""Held-out quality: of one leg (`eval/<id>.json`), and of the whole suite with its `cost` (`summary.json`)."""

from collections.abc import Iterable
from typing import ClassVar, Literal, Self

from saerelay.document import Document, Measured, Record
from saerelay.planning.left_out import LeftOut
from saerelay.planning.leg import Role
from saerelay.planning.leg_spec import ControlKind
from saerelay.runs.documents.cost import SuiteCost
from saerelay.site import SiteKind

Origin = Literal["scratch", "random", "from below", "from above", "same layer"]
AFRESH = ("random", "scratch")
"""Methods by which a leg takes nothing from its parent: it begins as a random dictionary, or where no map helped, from
scratch."""


class Reconstruction(Record):
    """How well activations x are reconstructed as x̂; means over the kept positions of held-out documents."""

    l0: Measured = None
    """Mean number of active latents per token."""
    l1: Measured = None
    """Mean sum of activations per token."""
    fvu: Measured = None
    """Fraction of variance unexplained: E‖x − x̂‖² / (E‖x‖² − ‖E x‖²)."""
    explained_variance: Measured = None
    """1 − FVU."""
    balanced_fvu: Measured = None
    """Mean of the FVU of each dimension, so that no few large ones dominate; ranks SAEs of a layer as ΔCE does."""
    largest_dimension: Measured = None
    """Share of the variance of x in its largest dimension; if it is large, FVU says little."""
    mse: Measured = None
    """E‖x − x̂‖², summed over the width."""
    cossim: Measured = None
    """Mean cosine of x and x̂."""
    l2_ratio: Measured = None
    """Mean of ‖x̂‖ / ‖x‖."""
    frac_alive: Measured = None
    """Share of latents that fired at least once."""


class Downstream(Record):
    """What the language model loses when x̂ takes the place of x; null without a language-model head."""

    delta_ce: Measured = None
    """Rise of the cross-entropy with the SAE in place, in nats per token."""
    delta_ce_se: Measured = None
    """Standard error of `delta_ce` over sequences."""
    ce_loss_score: Measured = None
    """(CE ablated − CE with SAE) / (CE ablated − CE clean); 1 is best, and it saturates."""
    ce_loss_without_sae: Measured = None
    """Cross-entropy of the clean model, in nats per token."""
    ce_loss_with_sae: Measured = None
    """Cross-entropy with x̂ in place of x, in nats per token."""
    ce_loss_with_ablation: Measured = None
    """Cross-entropy with the site zeroed at all positions, in nats per token."""
    kl_div_score: Measured = None
    """(KL ablated − KL with SAE) / KL ablated; 1 is best."""
    kl_div_with_sae: Measured = None
    """Mean KL(clean ‖ with SAE) over the vocabulary, in nats per token."""
    kl_div_with_ablation: Measured = None
    """Mean KL(clean ‖ site zeroed) over the vocabulary, in nats per token."""


class Metrics(Downstream, Reconstruction):
    """The metrics of a dictionary at a site; names and formulas are those of SAELens 6.54."""


class Density(Record):
    """How often latents fire."""

    log10_edges: list[float]
    """Edges of the histogram, log10 of the firing frequency."""
    counts: list[int]
    """Number of latents in each bin; latents that never fire are in no bin."""
    never: int
    """Number of latents that never fire."""
    freq_over_1_percent: float
    """Share of latents that fire on more than 1 % of tokens."""
    freq_over_10_percent: float
    """Share of latents that fire on more than 10 % of tokens."""


class EvaluationMetrics(Metrics):
    """All metrics of a dictionary on held-out tokens."""

    n_tokens: int
    """Number of kept positions measured on (BOS and outlier norms are left out)."""
    left_out: LeftOut | None = None
    """Positions left out because of their norm; null in files of old versions."""
    density: Density
    """How often latents fire."""
    sequence_delta_ce: list[float] | None = None
    """`delta_ce` of each sequence, in nats per token."""


class EvaluationQuestion(Record):
    """The question that an evaluation answers."""

    tokens: int
    """Number of held-out tokens."""
    ce: bool
    """Whether cross-entropy and KL are measured."""
    ages: list[int]
    """Ages of the leg's snapshots, in tokens."""
    dictionaries: str = ""
    """A digest of the weights of the leg and its snapshots; "" where dictionary.json has none."""


class Evaluation(Document):
    """`eval/<id>.json`: the held-out quality of one leg and its snapshots."""

    SCHEMA: ClassVar = 3
    MADE_BY: ClassVar = "`saerelay eval RUN`"

    asked: EvaluationQuestion
    """The question; another question makes the file again."""
    split: str = "test"
    """Split of the corpus measured on."""
    ablation: str = "zero, all positions"
    """What ablating a site means."""
    leg: str
    """Id of the leg."""
    metrics: EvaluationMetrics
    """Metrics of the finished leg."""
    snapshots: dict[int, EvaluationMetrics]
    """Metrics of its snapshots, by age in tokens."""


# --- the suite ------------------------------------------------------------------------------------------------------


class LegFacts(Record):
    """The identity of a leg."""

    id: str
    """Id of the leg."""
    role: Role
    """Role of the leg: a control is a leg from scratch that another leg is compared with."""
    control_of: str | None = None
    """Id of the leg that a control is compared with: the one it was planned for, or the one that continues that leg."""
    control_kind: ControlKind | None = None
    """`equal_tokens`: as many tokens as the transfer used in all, for its map and, repetitions counted, for training;
    `full`: a root's budget; `random`: not trained."""
    layer: int
    """Layer it reads."""
    module: str
    """Kind of module it reads."""
    module_out: str | None = None
    """Kind of module that a transcoder reconstructs, and that its quality refers to; null for an SAE."""
    architecture: str
    """Architecture of its dictionary."""
    method: str | None = None
    """Method of the map it was transferred by."""
    parent: str | None = None
    """Id or directory of the dictionary it started from."""
    n_latents: int
    """Number of latents."""
    target_l0: Measured = None
    """Number of active latents per token asked for; null if it follows from a penalty, and in files of old versions."""
    lr: Measured
    """The highest learning rate it was trained with."""
    seed: int
    """Seed of its initialisation."""
    repeat_of: str | None = None
    """Id of the leg that it repeats with another seed."""


class LegStanding(Record):
    """Where a leg's latents come from, and whether it counts as part of the suite."""

    origin: Origin
    """Where its latents come from (`random`: it began as a random dictionary); a leg that continues another at its
    site has the origin of that leg."""
    made: str
    """How it was made, in words, such as "affine + refit from L5"."""
    continued_by: str | None = None
    """Id of the leg that has taken its place at the same site: that continues it, or replaces it by another SAE."""
    continues: str | None = None
    """Id of the leg whose SAE it is, trained further at the same site; of several, the first."""
    found_again: Measured = None
    """For a repeat: share of its latents whose decoder row has a cosine above 0.7 with one of the leg it repeats."""
    in_suite: bool
    """Whether it is the leg that stands for its site: not a control, not continued, the first of several seeds."""


class LegTokens(Record):
    """The numbers of tokens that a leg was trained and measured on."""

    tokens: int
    """Number of tokens trained on."""
    tokens_before: int = 0
    """Number of tokens that the legs it continues were trained on."""
    moment_tokens: int
    """Number of tokens its map was fitted on."""
    refit_tokens: int
    """Number of tokens its decoder was refitted on."""
    seconds: float
    """Time spent in its training steps, in seconds."""
    goal_fvu: Measured = None
    """Validation FVU at which it may end early."""
    predicted_fvu: Measured = None
    """Validation FVU that a survey predicted."""
    validation_fvu: Measured = None
    """FVU on the validation rows that goals and predictions refer to."""
    n_eval_tokens: int
    """Number of held-out positions; its metrics are means over these."""


class SnapshotSummary(Metrics):
    """The metrics of a leg at an earlier age."""

    tokens: int
    """Age of the snapshot, in tokens."""


class LegSummary(Metrics, LegTokens, LegStanding, LegFacts):
    """One leg of a run, with its metrics."""

    snapshots: list[SnapshotSummary]
    """Its snapshots, by age."""

    @property
    def tokens_in_all(self) -> int:
        """Number of tokens it was trained on, with those of the legs it continues."""
        return self.tokens_before + self.tokens

    @property
    def kind(self) -> str:
        """Its kind of site, in a word: "mlp_out", or "transcoder"."""
        return str(SiteKind(self.module, self.module_out))  # type: ignore[arg-type]

    @property
    def place(self) -> tuple[int, str]:
        """Its layer and its kind of site."""
        return self.layer, self.kind


class Summary(Document):
    """`summary.json`, and `saerelay eval --json`: the quality of every leg, and the cost of the suite."""

    SCHEMA: ClassVar = 4
    MADE_BY: ClassVar = "`saerelay eval RUN`"

    model: str
    """Name of the language model."""
    revision: str
    """Resolved revision of the language model."""
    data: str
    """Source of the text."""
    legs: list[LegSummary]
    """All published legs, in the order of the plan."""
    left_out: LeftOut | None = None
    """Positions that were not measured on because of their norm; null in files of old versions."""
    n_sequences: int = 0
    """Number of held-out sequences measured on; 0 in files of old versions."""
    n_documents: int = 0
    """Number of documents that these sequences are from; 0 where this is not known."""
    cost: SuiteCost
    """Cost of the suite."""

    def leg(self, leg_id: str) -> LegSummary:
        """The leg with an id."""
        return next(leg for leg in self.legs if leg.id == leg_id)

    def has(self, leg_id: str | None) -> bool:
        """Whether there is a leg with an id."""
        return any(leg.id == leg_id for leg in self.legs)

    def first_of(self, leg: LegSummary) -> LegSummary:
        """The leg that a leg continues, from the beginning; the leg itself if it continues none."""
        return self.leg(leg.continues or "") if self.has(leg.continues) else leg

    def is_transferred(self, leg: LegSummary) -> bool:
        """Whether a leg's latents come from another leg, of which it is not a control."""
        first = self.first_of(leg)
        return first.role == "transfer" and first.method not in AFRESH

    @property
    def outside_parents(self) -> list[str]:
        """The dictionaries outside the run that legs were transferred from; `cost` is without what they took."""
        parents = [leg.parent for leg in self.legs if leg.parent and "/" in leg.parent and self.is_transferred(leg)]
        return list(dict.fromkeys(parents))

    @property
    def only_measured(self) -> bool:
        """Whether nothing was trained or fitted: the dictionaries came from elsewhere, and were only measured."""
        return not any(leg.tokens or leg.moment_tokens or leg.refit_tokens for leg in self.legs)

    @property
    def suite(self) -> list[LegSummary]:
        """The legs that stand for each site, kind by kind and layer by layer."""
        return self.in_order(leg for leg in self.legs if leg.in_suite)

    @property
    def final_legs(self) -> list[LegSummary]:
        """All legs that are neither controls, nor repeats, nor continued by another leg, in order.

        There are several per site if the suite has tiers.
        """
        return self.in_order(leg for leg in self.first_seeds if leg.role != "control" and not leg.continued_by)

    @property
    def first_seeds(self) -> list[LegSummary]:
        """All legs but repeats of another leg with another seed."""
        return [leg for leg in self.legs if not leg.repeat_of]

    def over_seeds(self, leg: LegSummary) -> list[LegSummary]:
        """A leg and its repeats with other seeds."""
        return [leg, *(other for other in self.legs if other.repeat_of == leg.id)]

    def in_order(self, legs: Iterable[LegSummary]) -> list[LegSummary]:
        """Sort legs by kind, in the order of the plan, and by layer; at each site, the suite's own tier comes first."""
        kinds = self.kinds
        return sorted(
            legs,
            key=lambda leg: (kinds.index(leg.kind), leg.layer, self.is_other_tier(leg), leg.target_l0 or 0, leg.id),
        )

    @property
    def kinds(self) -> list[str]:
        """The kinds of sites of the run, in the order of the plan."""
        return list(dict.fromkeys(leg.kind for leg in self.legs))

    def is_other_tier(self, leg: LegSummary) -> bool:
        """Whether a leg has another L0 than the leg that stands for its site; a control counts with its leg."""
        if leg.control_of and self.has(leg.control_of):
            leg = self.leg(leg.control_of)
        own = [other.target_l0 for other in self.legs if other.in_suite and other.place == leg.place]
        return bool(own) and leg.target_l0 not in own

    def of_kind(self, kind: str = "") -> Self:
        """The suite of one kind of site (by default the first kind), with its controls and without other tiers."""
        kind = kind or self.kinds[0]
        return self.changed(legs=[leg for leg in self.legs if leg.kind == kind and not self.is_other_tier(leg)])

    @property
    def drawn_legs(self) -> list[LegSummary]:
        """The legs that figures show: a random dictionary is so much worse that it would compress all others."""
        return [leg for leg in self.first_seeds if leg.control_kind != "random"]

    def controls_of(self, leg: LegSummary) -> list[LegSummary]:
        """The controls that a leg is compared with: not those that were continued, but the legs that continue them."""
        return [other for other in self.legs if other.control_of == leg.id and not other.continued_by]

    def control(self, leg: LegSummary, kind: ControlKind) -> LegSummary | None:
        """The control of a leg of one kind, if there is one."""
        return next((other for other in self.controls_of(leg) if other.control_kind == kind), None)
