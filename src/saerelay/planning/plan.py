"""The compiled, immutable plan: which leg is trained where, from whom, when and for how long. Pure Python.

All legs live on one axis, the cursor: raw token positions read from the corpus. A leg's life on it:

    start ── moment_tokens ──> fold_at ── budget_tokens ──> end
            (the map from its parent      (gradient steps)
             is fitted; then fold and
             decoder refit, at once)

A leg from scratch has no moments, nor has a plain copy. Starts lie on block borders; a child's moments end where its
parent reaches the age it forks at, so that both share the language model's forward pass.
"""

import math
from collections.abc import Container, Iterable
from typing import ClassVar, Literal

from saerelay.document import Document
from saerelay.planning.facts import ModelFacts
from saerelay.planning.leg_spec import LegId
from saerelay.planning.recipe import Recipe
from saerelay.sae.architectures import Architecture
from saerelay.sae.spec import DictionarySpec, Method
from saerelay.site import ModuleKind, Site
from saerelay.spec import Spec

COPY_RATE = 1 / 8
"""Learning rate of a plain copy, which has no map to tell how far it has come, as a share of the rate from scratch."""


class External(Spec):
    """A parent outside the plan: what its dictionary.json says."""

    layer: int
    module: ModuleKind
    architecture: Architecture
    n_latents: int
    d_model: int
    k: int | None
    l0: float | None = None
    """Mean number of active latents, where its files say."""
    model: str = ""
    """The language model, where its files say."""
    path: str
    """Its directory or file, absolute."""


class Leg(Spec):
    """One SAE's training."""

    id: LegId
    role: Literal["root", "transfer", "control"]
    control_of: str = ""
    control_kind: Literal["", "equal_tokens", "full"] = ""
    layer: int
    module: ModuleKind
    dictionary: DictionarySpec
    parent: str = ""
    """Id of a leg of this plan, or a directory of another run's leg or snapshot; "" for a leg from scratch."""
    fork_at_tokens: int = 0
    """The parent's age (in its own budget) at the fold; meaningless for a parent outside this plan."""
    method: Method | None = None
    start: int = 0
    moment_tokens: int = 0
    refit_tokens: int = 0
    """Tokens that the decoder is refitted on: of the last block of the moments, or, without moments, of its first."""
    budget_tokens: int
    """Tokens trained on, repetitions counted."""
    reuse: int = 1
    """How often each of its blocks is trained on; its age counts repetitions, so it is that many times the cursor's."""
    batch_tokens: int
    lr: float
    """Largest learning rate; if `lr_by_map`, times `transfer.rate_share` of the map it hops by and of the plan's
    `newness`, or, of a copy onto its parent's own site, by whether there is something to learn."""
    lr_by_map: bool = False
    dead_after_tokens: int
    snapshots: list[int] = []
    """Ages published beside the end."""
    seed: int
    goal_fvu: float | None = None
    """FVU on held-out rows of the validation split at which it may end early."""
    decay_gain: float = 0.9
    """FVU after the learning rate's decay over that before it, as far as known; with a goal only."""
    predicted_fvu: float | None = None
    """What a survey predicts of it, on the same rows; changes nothing."""

    @property
    def site(self) -> Site:
        """Where it reads."""
        return Site(self.layer, self.module)

    @property
    def fold_at(self) -> int:
        """Cursor at which it comes to life: age 0."""
        return self.start + self.moment_tokens

    @property
    def end(self) -> int:
        """Cursor at which it retires; an untrained one lives for one batch."""
        return self.fold_at + max(math.ceil(self.budget_tokens / self.reuse), self.batch_tokens)


class Plan(Document):
    """Everything that fixes a run: written to plan.json; after that nothing reads the recipe again."""

    SCHEMA: ClassVar = 2
    MADE_BY: ClassVar = "`saerelay train`"
    REMEDY: ClassVar = "train the recipe again, in a new directory"

    run: Recipe
    facts: ModelFacts
    block_tokens: int
    legs: list[Leg]
    externals: dict[str, External] = {}
    """Parents outside this plan, by their directory as the recipe gives it."""
    probe: int | None
    """Layer at which outlier norms are looked for, whichever sites are open; none if they are kept."""

    def leg(self, leg_id: str) -> Leg:
        """The leg with an id."""
        return next(leg for leg in self.legs if leg.id == leg_id)

    def has(self, leg_id: str) -> bool:
        """Whether a leg has this id."""
        return any(leg.id == leg_id for leg in self.legs)

    @property
    def n_tokens(self) -> int:
        """Length of the axis: token positions the language model reads."""
        return self.block_tokens * math.ceil(max(leg.end for leg in self.legs) / self.block_tokens)

    @property
    def sites(self) -> list[Site]:
        """All sites, in order."""
        return sorted({leg.site for leg in self.legs})

    @property
    def probe_site(self) -> Site | None:
        """Where outlier norms are looked for."""
        return None if self.probe is None else Site(self.probe, self.run.sites.module)

    def open_sites(self, start: int, stop: int, ended: Container[str] = ()) -> list[Site]:
        """Sites whose activations are needed somewhere in [start, stop): by legs in training, or by a coming hop.

        Legs that `ended` before their budget was spent need nothing.
        """
        sites = {leg.site for leg in self.legs if leg.start < stop and start < leg.end and leg.id not in ended}
        for leg in self.legs:
            if leg.moment_tokens and leg.start < stop and start < leg.fold_at:
                sites.add(self.parent_site(leg))
        return self.with_probe(sites) if sites else []

    def with_probe(self, sites: Iterable[Site]) -> list[Site]:
        """Sites in order, and the one where outlier norms are looked for."""
        return sorted({*sites, self.probe_site} if self.probe_site else set(sites))

    def without_controls(self) -> "Plan":
        """What a user would run who believes us."""
        return self.changed(legs=[leg for leg in self.legs if leg.role != "control"])

    def ended_after(self, tokens: dict[str, int]) -> "Plan":
        """The plan as it was run, with the tokens that legs had when they ended."""
        legs = [leg.changed(budget_tokens=tokens.get(leg.id, leg.budget_tokens)) for leg in self.legs]
        return self.changed(legs=legs)

    def reshapes(self, leg: Leg) -> bool:
        """Whether a leg's dictionary is of another architecture, number of latents or sparsity than its parent's."""
        now = leg.dictionary
        if self.has(leg.parent):
            before = self.leg(leg.parent).dictionary
            return (now.architecture, now.n_latents, now.l0) != (before.architecture, before.n_latents, before.l0)
        outside = self.externals[leg.parent]
        l0 = outside.k or outside.l0
        same = (now.architecture, now.n_latents) == (outside.architecture, outside.n_latents)
        return not same or bool(l0 and now.l0 and l0 != now.l0)

    def origin(self, leg: Leg) -> Literal["scratch", "from below", "from above", "same layer"]:
        """Where a leg's latents come from; one that goes on where another of its layer ended has that one's origin."""
        while self.has(leg.parent) and self.leg(leg.parent).layer == leg.layer:
            leg = self.leg(leg.parent)
        if not leg.parent:
            return "scratch"
        source = self.parent_site(leg).layer
        return "same layer" if source == leg.layer else "from below" if source < leg.layer else "from above"

    def newness(self, leg: Leg) -> float:
        """Share of a leg's own tokens in all that its dictionary is trained on, parents included; 0 if not known."""
        before, child = 0, leg
        while child.parent:
            if not self.has(child.parent):
                return 0.0
            before += child.fork_at_tokens
            child = self.leg(child.parent)
        return leg.budget_tokens / max(1, before + leg.budget_tokens)

    def parent_site(self, leg: Leg) -> Site:
        """Where a leg's parent reads."""
        if self.has(leg.parent):
            return self.leg(leg.parent).site
        return Site(self.externals[leg.parent].layer, self.externals[leg.parent].module)
