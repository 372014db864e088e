"""The compiled, immutable plan: which leg is trained where, from which parent, when and for how long. Pure Python.

All legs live on one axis, the cursor: the number of token positions read from the corpus so far. A leg's life on it:

    start ── moment_tokens ──> fold_at ── budget_tokens ──> end
            (the map from its parent      (gradient steps)
             is fitted; then fold and
             decoder refit, at once)

A leg from scratch has no moments, nor has a plain copy; a leg that several layers share has those of its alignment.
Starts lie on block borders. A child's moments end where its parent reaches the age at which the child forks off, so
that both share the language model's forward passes.
"""

import math
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from saerelay.document import Document
from saerelay.planning.facts import ModelFacts
from saerelay.planning.leg_spec import ControlKind, LegId, repeat_name
from saerelay.planning.recipe import Recipe
from saerelay.sae.spec import LegMethod, SizedDictionarySpec
from saerelay.site import ModuleKind, Site, SiteKind
from saerelay.spec import Positive, Spec, Whole, few_of

COPY_RATE = 1 / 8
"""Learning rate of a plain copy, which has no map to set the rate by, as a share of the rate from scratch."""

LM_BATCH_TOKENS = 4096
"""Tokens per forward pass of the language model on a CPU."""

Role = Literal["root", "transfer", "control"]


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
    """Tokens on which the decoder is refitted: of the last block of the moments, or, without moments, of the leg's
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
    times as fast as the cursor."""
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


class Leg(Spec):
    """The training of one SAE."""

    inline = ("hop", "schedule", "control", "goal")

    id: LegId
    role: Role
    """A leg that continues another leg keeps that leg's role, although it has a parent."""
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


class Plan(Document):
    """Everything that determines a run; written to plan.json before training."""

    SCHEMA: ClassVar = 2
    MADE_BY: ClassVar = "`saerelay train`"
    REMEDY: ClassVar = "train the recipe again, in a new directory"

    recipe: Recipe
    facts: ModelFacts
    block_tokens: int = Field(gt=0)
    lm_batch_tokens: int = Field(default=LM_BATCH_TOKENS, gt=0)
    """Tokens per forward pass of the language model: part of the plan, since the bits of the results depend on it."""
    legs: list[Leg] = Field(min_length=1)
    externals: dict[str, External] = {}
    """Parents outside this plan, by the names that the recipe gives them."""
    probe: int | None
    """Layer at which outlier norms are looked for, whichever sites are open; None if no outliers are left out."""

    @model_validator(mode="after")
    def _is_consistent(self) -> "Plan":
        ids = [leg.id for leg in self.legs]
        if len(set(ids)) < len(ids):
            raise ValueError("two legs have the same id")
        for leg in self.legs:
            if leg.hop and leg.parent not in ids and leg.parent not in self.externals:
                raise ValueError(f"leg {leg.id} has the parent {leg.parent}, which the plan does not describe")
        for leg in self.legs:
            if len(self.line(leg)) > len(self.legs):
                raise ValueError(f"leg {leg.id} descends from itself")
        return self

    def __repr__(self) -> str:
        return f"Plan({self.facts.name}: {few_of(leg.id for leg in self.legs)})"

    __str__ = __repr__

    def leg(self, leg_id: str) -> Leg:
        """Return the leg with an id."""
        return next(leg for leg in self.legs if leg.id == leg_id)

    def has(self, leg_id: str) -> bool:
        """Whether the plan has a leg with this id."""
        return any(leg.id == leg_id for leg in self.legs)

    @property
    def n_tokens(self) -> int:
        """Length of the axis: the token positions that the language model reads."""
        last = max(leg.end for leg in self.legs)
        return self.block_tokens * math.ceil(last / self.block_tokens)

    @property
    def sites(self) -> list[Site]:
        """The sites of all legs, in order: those that they read and those that they reconstruct."""
        return sorted({site for leg in self.legs for site in (leg.site, leg.site_out)})

    @property
    def sites_read(self) -> list[Site]:
        """All sites read at some time, in order: those of legs, of layers that share a leg, and of maps' sources."""
        return sorted({site for leg in self.legs for site in self.sites_of(leg, leg.start, leg.end)})

    @property
    def probe_site(self) -> Site | None:
        """The site where outlier norms are looked for; for transcoders, what they reconstruct: no norm evens it out."""
        return None if self.probe is None else Site(self.probe, self.recipe.sites.first_kind.written)

    def open_sites(self, start: int, stop: int, ended: Container[str] = ()) -> list[Site]:
        """Return the sites whose activations are needed within [start, stop), by a leg in training or a coming hop.

        Legs in `ended`, which ended before their budget was spent, need nothing.
        """
        sites: set[Site] = set()
        for leg in self.legs:
            if leg.id not in ended:
                sites |= self.sites_of(leg, start, stop)
        return self.with_probe(sites) if sites else []

    def sites_of(self, leg: Leg, start: int, stop: int) -> set[Site]:
        """Return the sites that a leg needs in [start, stop): those it is trained on, and the source of its map."""
        if stop <= leg.start or leg.end <= start:
            return set()
        sites = {leg.site, leg.site_out, *leg.shared_sites}
        if leg.hop and leg.moment_tokens and start < leg.fold_at:
            source = self.parent_site(leg)
            sites |= {source, leg.out_at(source)}
        return sites

    def stretches(self) -> Iterator[tuple[int, list[Site]]]:
        """Yield the stretches of the axis, in order, in which the same sites are open: (number of blocks, sites).

        There are a few per leg, however long the axis is.
        """
        block = self.block_tokens
        borders = {0, self.n_tokens // block}
        for leg in self.legs:
            for position in (leg.start, leg.fold_at, leg.end):
                borders |= {position // block, math.ceil(position / block)}
        for first, last in pairwise(sorted(borders)):
            yield last - first, self.open_sites(first * block, (first + 1) * block)

    def share_of_depth(self, sites: Sequence[Site]) -> float:
        """Return the share of the layers up to `deepest` that the language model has to run to reach all of `sites`."""
        return (sites[-1].layer + 1) / (self.deepest.layer + 1)

    @property
    def deepest(self) -> Site:
        """The site beyond which the language model never runs: the last of all sites read and the probe site."""
        return self.with_probe(self.sites_read)[-1]

    @property
    def batch_tokens(self) -> int:
        """Tokens per step of the whole run: as the recipe asks, or else those of the leg with the largest batches."""
        asked = self.recipe.train.batch_tokens
        return max(leg.schedule.batch_tokens for leg in self.legs) if asked == "auto" else asked

    def with_probe(self, sites: Iterable[Site]) -> list[Site]:
        """Return the sites in order, together with the probe site."""
        probed = set(sites)
        if self.probe_site:
            probed.add(self.probe_site)
        return sorted(probed)

    def line(self, leg: Leg) -> list[Leg]:
        """Return a leg and all that it descends from, up to the first; in a circle, more legs than the plan has."""
        by_id = {leg.id: leg for leg in self.legs}
        line = [leg]
        while line[-1].parent in by_id and len(line) <= len(by_id):
            line.append(by_id[line[-1].parent])
        return line

    @property
    def own_legs(self) -> list[Leg]:
        """The legs that are neither controls nor repeats with other seeds."""
        return [leg for leg in self.legs if not leg.control and not self.repeat_of(leg)]

    def without_controls(self) -> Self:
        """Return the plan of the suite alone: without control legs and repeats, unless other legs descend from them."""
        needed = {ancestor.id for leg in self.own_legs for ancestor in self.line(leg)}
        return self.changed(legs=[leg for leg in self.legs if leg.id in needed])

    def all_from_scratch(self) -> Self:
        """Return the plan to compare with: every site trained from scratch on `plan.root_tokens`, all at the same time.

        Each site has, for each kind and each L0, the dictionary that the plan ends with there. Controls and repeats are
        left out.
        """
        last_of_place = {(leg.site, leg.kind, leg.dictionary.l0): leg for leg in self.own_legs}
        legs = []
        for leg in last_of_place.values():
            batch = leg.schedule.batch_tokens
            budget = batch * math.ceil(self.recipe.plan.root_tokens / batch)
            schedule = Schedule(
                budget_tokens=budget,
                batch_tokens=batch,
                lr=leg.schedule.lr,
                dead_after_tokens=leg.schedule.dead_after_tokens,
            )
            legs.append(
                leg.changed(role="root", hop=None, start=0, schedule=schedule, shared_layers=[], alignment_tokens=0)
            )
        return self.changed(legs=legs)

    def ended_after(self, tokens: dict[str, int]) -> Self:
        """Return the plan as it was run, with the tokens on which each leg had been trained when it ended."""
        legs = [leg.changed(budget_tokens=tokens.get(leg.id, leg.budget_tokens)) for leg in self.legs]
        return self.changed(legs=legs)

    def parent_site(self, leg: Leg) -> Site:
        """Return the site that a leg's parent reads."""
        if self.has(leg.parent):
            return self.leg(leg.parent).site
        return self.externals[leg.parent].site

    def reshapes(self, leg: Leg) -> bool:
        """Whether a leg's dictionary differs from its parent's in architecture, number of latents or sparsity."""
        now = leg.dictionary
        if self.has(leg.parent):
            before = self.leg(leg.parent).dictionary
            l0 = before.l0
        else:
            before = self.externals[leg.parent]
            l0 = (before.k or before.l0) if now.l0 else None
        shape = (before.architecture, before.n_latents, l0)
        return shape != (now.architecture, now.n_latents, now.l0)

    def repeat_of(self, leg: Leg) -> str:
        """Return the leg that a leg repeats with another seed, or "". Ids tell: L3-seed1 repeats L3.

        The continuation of a repeat (L3-seed1+2M) repeats the continuation of the first leg (L3+2M), or, if there is
        none, the first leg itself.
        """
        name, plus, more = leg.id.partition("+")
        first = name.removesuffix(repeat_name("", leg.seed))
        if first == name:
            return ""
        return next((other for other in (first + plus + more, first) if self.has(other)), "")

    def tier_of(self, leg: Leg) -> str:
        """Return the leg at the same site of which a leg is a copy at another L0, or ""."""
        if not self.has(leg.parent):
            return ""
        parent = self.leg(leg.parent)
        same_place = (parent.site, parent.module_out) == (leg.site, leg.module_out)
        return parent.id if same_place and parent.dictionary.l0 != leg.dictionary.l0 else ""

    def newness(self, leg: Leg) -> float:
        """Return a leg's own tokens over all that its dictionary is trained on, parents included; 0 if unknown."""
        line = self.line(leg)
        if line[-1].hop:  # its parent is outside the plan
            return 0.0
        tokens_before = sum(child.hop.fork_at_tokens for child in line if child.hop)
        return leg.budget_tokens / max(1, tokens_before + leg.budget_tokens)
