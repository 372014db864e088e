"""One leg of a plan: the training of one dictionary, where, from which parent, when and for how long.

All legs live on one axis, the cursor: the number of token positions read from the corpus so far. A leg's life on it:

    start ── moment_tokens ──> fold_at ── budget_tokens ──> end
            (the map from its parent      (gradient steps)
             is fitted; then fold and
             decoder refit, at once)

A leg from scratch has no moments, nor has a plain copy; a leg that several layers share has those of its alignment.
"""

import math
from typing import Literal

from pydantic import Field

from saerelay.planning.leg_spec import ControlKind, LegId, repeat_name
from saerelay.sae.spec import LegMethod, SizedDictionarySpec
from saerelay.site import ModuleKind, Site, SiteKind
from saerelay.spec import Positive, Spec, Whole

COPY_RATE = 1 / 8
"""Learning rate of a plain copy, which has no map to set the rate by, as a share of the rate from scratch."""

Role = Literal["root", "transfer", "control"]
Stay = Literal["continuation", "tier", "replacement"]
"""What a leg is to its parent, if it stays at the parent's place (see `Leg.stays_as`)."""


class External(Spec):
    """A parent outside the plan, as its files describe it."""

    layer: int
    module: ModuleKind
    module_out: ModuleKind | None = None
    """The module it reconstructs, if it is a transcoder."""
    architecture: str
    n_latents: int
    d_model: int
    k: int | None
    skip_connection: bool = False
    l0: float | None = None
    """Mean number of active latents, if its files say."""
    model: str = ""
    """The language model, if its files say."""
    carried: bool = False
    """Whether a map brought it to its site from another language model, and it was not trained since."""
    path: str
    """Absolute path of the directory that it is read from when the run needs it."""

    @property
    def site(self) -> Site:
        """The site it reads."""
        return Site(self.layer, self.module)

    @property
    def site_out(self) -> Site:
        """The site it reconstructs."""
        return self.site.at(self.module_out)


class Hop(Spec):
    """How a leg begins from its parent."""

    parent: str
    """Id of a leg of this plan, or the recipe's name for a dictionary outside it."""
    method: LegMethod
    """With "auto", several methods are tried when the hop is due, and the best on held-out rows is taken."""
    fork_at_tokens: Whole = 0
    """The parent's age (in its own budget) at the fold; meaningless for a parent outside this plan."""
    moment_tokens: Whole = 0
    """Tokens on which the map is fitted."""
    refit_tokens: Whole = 0
    """Tokens on which the decoder is refitted: of the last blocks of the moments, or, without moments, of the leg's
    first block."""


class Schedule(Spec):
    """How long a leg is trained, on what, and how fast."""

    budget_tokens: Whole
    """Tokens trained on, counting repetitions."""
    batch_tokens: Positive
    lr: float
    """Largest learning rate. With `lr_by_map` it is multiplied by `maps.rate_share` of the hop's map and the plan's
    `newness`; for a copy onto its parent's own site, by a factor for whether there is something to learn."""
    dead_after_tokens: Positive
    """Tokens without firing after which a latent is dead."""
    reuse: Positive = 1
    """How many times the leg trains on each of its blocks. The leg's age counts repetitions, so it grows this many
    times as fast as the cursor. After a hop, the first repetition of each batch is a batch of its moments instead."""
    lr_by_map: bool = False
    snapshots: list[Whole] = []
    """Ages at which the leg is published, besides its end."""


class Control(Spec):
    """Which leg a control is compared with, and how."""

    control_of: str
    control_kind: ControlKind


class Goal(Spec):
    """The FVU expected of a leg, in training units, on held-out rows of the validation split."""

    goal_fvu: float | None = None
    """FVU at which the leg may end early."""
    decay_gain: float = 0.9
    """FVU after the learning rate's decay over FVU before it, as far as it is known."""
    predicted_fvu: float | None = None
    """FVU that a survey predicts; for information only."""

    @property
    def is_measured(self) -> bool:
        """Whether the leg's FVU is measured on held-out rows."""
        return bool(self.goal_fvu or self.predicted_fvu)


class Leg(Spec):
    """The training of one SAE."""

    inline = ("hop", "schedule", "control", "goal")

    id: LegId
    role: Role
    """A leg that an extension of the run continues another leg with keeps that leg's role, although it has a parent."""
    layer: int
    module: ModuleKind
    module_out: ModuleKind | None = Field(default=None, exclude_if=lambda given: given is None)
    """The module it reconstructs, if it is a transcoder."""
    dictionary: SizedDictionarySpec
    seed: int
    schedule: Schedule
    start: Whole = 0
    hop: Hop | None = None
    """None for a leg from scratch."""
    shared_layers: list[int] = Field(default=[], exclude_if=lambda given: not given)
    """Other layers whose activations, aligned with those of its own layer, it is trained on as well."""
    alignment_tokens: Whole = Field(default=0, exclude_if=lambda given: not given)
    """Tokens on which these layers are aligned; 0 if there are no such layers."""
    control: Control | None = None
    goal: Goal = Goal()

    @property
    def site(self) -> Site:
        """The site it reads."""
        return Site(self.layer, self.module)

    @property
    def site_out(self) -> Site:
        """The site it reconstructs: the one it reads, unless it is a transcoder."""
        return self.out_at(self.site)

    @property
    def kind(self) -> SiteKind:
        """The modules it reads and reconstructs, whatever the layer."""
        return SiteKind(self.module, self.module_out)

    def stays_as(self, parent: "Leg") -> Stay | None:
        """Return what this leg is to the leg that it starts from, if it stays at that leg's place; otherwise None.

        - "continuation": the same SAE, trained further: by an extension of the run or as a plan was written, however
          the copy was made, and however old the parent was. It takes the parent's place in the suite.
        - "replacement": another SAE that takes this place: one with another architecture or number of latents, with or
          without a skip connection, or the layer's own copy of an SAE that several layers share.
        - "tier": a copy at another L0, which stands beside its parent. A ReLU SAE, whose L0 follows from its penalty,
          is none.

        None is for legs at another site or of another kind (a transcoder beside an SAE), controls (except that a
        control, too, may be continued), repeats with another seed, and random dictionaries, which take nothing.
        """
        if self.parent != parent.id or self.method == "random" or self.id == repeat_name(parent.id, self.seed):
            return None
        if (self.site, self.kind, self.control) != (parent.site, parent.kind, parent.control):
            return None
        if self.dictionary.l0 not in (None, parent.dictionary.l0):
            return "tier"
        same = self.dictionary == parent.dictionary and not parent.shared_layers
        return "continuation" if same else "replacement"

    @property
    def is_transcoder(self) -> bool:
        """Whether it reconstructs another module than it reads."""
        return self.module_out is not None

    def out_at(self, site: Site) -> Site:
        """Return the site that its dictionary would reconstruct if it read `site`."""
        return site.at(self.module_out)

    @property
    def parent(self) -> str:
        """The leg or dictionary it is transferred from; "" for a leg from scratch."""
        return self.hop.parent if self.hop else ""

    @property
    def method(self) -> LegMethod | None:
        """The method of its transfer; None for a leg from scratch."""
        return self.hop.method if self.hop else None

    @property
    def moment_tokens(self) -> int:
        """Tokens on which the map from its parent, or the maps of its shared layers, are fitted; 0 without maps."""
        return self.hop.moment_tokens if self.hop else self.alignment_tokens

    @property
    def shared_sites(self) -> list[Site]:
        """The sites it reads besides its own, if several layers share it."""
        return [Site(layer, self.module) for layer in self.shared_layers]

    @property
    def refit_tokens(self) -> int:
        """Tokens on which its decoder is refitted before training; 0 if it is not refitted."""
        return self.hop.refit_tokens if self.hop else 0

    def n_kept_blocks(self, block_tokens: int) -> int:
        """Return the number of blocks, the last ones before its hop, that are kept in memory for this leg.

        A leg that trains on each block several times keeps all blocks of its moments, to train on them as well. A refit
        keeps the blocks that it needs; one block alone is at hand anyway.
        """
        if not self.hop or not self.moment_tokens:
            return 0
        if self.schedule.reuse > 1 and self.budget_tokens:
            return self.moment_tokens // block_tokens
        for_refit = math.ceil(self.refit_tokens / block_tokens)
        return for_refit if for_refit > 1 else 0

    @property
    def budget_tokens(self) -> int:
        """Tokens trained on, counting repetitions."""
        return self.schedule.budget_tokens

    @property
    def fold_at(self) -> int:
        """Cursor at which its training begins: age 0."""
        return self.start + self.moment_tokens

    @property
    def end(self) -> int:
        """Cursor at which it ends; an untrained leg lasts for one batch."""
        positions = math.ceil(self.budget_tokens / self.schedule.reuse)
        return self.fold_at + max(positions, self.schedule.batch_tokens)

    @property
    def control_of(self) -> str:
        """The leg that this leg is a control of; "" if it is not a control."""
        return self.control.control_of if self.control else ""

    @property
    def control_kind(self) -> ControlKind | None:
        """The kind of control; None if this leg is not a control."""
        return self.control.control_kind if self.control else None
