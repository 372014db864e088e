"""The compiled, immutable plan: all legs of a run, and what they read together. Pure Python.

All legs live on one axis, the cursor: the number of token positions read from the corpus so far (see `leg`). Starts lie
on block borders. A child's moments end where its parent reaches the age at which the child forks off, so that both
share the language model's forward passes.
"""

import math
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import ClassVar, Self

from pydantic import Field, model_validator

from saerelay.document import Document
from saerelay.planning.facts import ModelFacts
from saerelay.planning.leg import External, Leg, Schedule, Stay
from saerelay.planning.leg_spec import repeat_name
from saerelay.planning.recipe import Recipe
from saerelay.site import Site
from saerelay.spec import Whole, few_of, rounded_up

LM_BATCH_TOKENS = 4096
"""Tokens per forward pass of the language model on a CPU."""


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
    extended_at: list[Whole] = Field(default=[], exclude_if=lambda given: not given)
    """Cursors from which extensions of the run read. Not in plans that were extended before this key was there."""

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

    @cached_property
    def _by_id(self) -> dict[str, Leg]:
        """The legs by id; plans of hundreds of legs are asked for each of them again and again."""
        return {leg.id: leg for leg in self.legs}

    def leg(self, leg_id: str) -> Leg:
        """Return the leg with an id."""
        return self._by_id[leg_id]

    def has(self, leg_id: str) -> bool:
        """Whether the plan has a leg with this id."""
        return leg_id in self._by_id

    @property
    def n_tokens(self) -> int:
        """Length of the axis: the token positions that the language model reads."""
        last = max(leg.end for leg in self.legs)
        return rounded_up(last, self.block_tokens)

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
        line = [leg]
        while self.has(line[-1].parent) and len(line) <= len(self.legs):
            line.append(self.leg(line[-1].parent))
        return line

    def stays_as(self, leg: Leg) -> Stay | None:
        """Return what a leg is to its parent, if it stays at the parent's place (see `Leg.stays_as`)."""
        return leg.stays_as(self.leg(leg.parent)) if self.has(leg.parent) else None

    def continues(self, leg: Leg) -> bool:
        """Whether a leg is its parent's SAE, trained further at its place."""
        return self.stays_as(leg) == "continuation"

    def first_of(self, leg: Leg) -> Leg:
        """Return the leg that a leg continues, from the beginning; the leg itself if it continues none."""
        while self.continues(leg):
            leg = self.leg(leg.parent)
        return leg

    @property
    def has_goals(self) -> bool:
        """Whether some leg has an FVU to reach, or one that was predicted, and is measured on held-out rows."""
        return any(leg.goal.is_measured for leg in self.legs)

    def held_out_passes(self, cursor: int) -> int:
        """Return how often held-out rows were read for goals up to `cursor`: once by the run, and by each extension.

        An interrupted run reads them again, which does not count: positions are those of an uninterrupted run.
        """
        n = 0
        for begin, end in pairwise([0, *self.extended_at, math.inf]):
            planned = [leg for leg in self.legs if leg.start < end]
            if begin <= cursor and any(leg.goal.is_measured for leg in planned):
                n += 1
        return n

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
            budget = rounded_up(self.recipe.plan.root_tokens, batch)
            schedule = Schedule(
                budget_tokens=budget,
                batch_tokens=batch,
                lr=leg.schedule.lr,
                dead_after_tokens=leg.schedule.dead_after_tokens,
                reuse=self.recipe.plan.root_reuse,
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
        parent = self.leg(leg.parent) if self.has(leg.parent) else self.externals[leg.parent]
        return parent.site

    def reshapes(self, leg: Leg) -> bool:
        """Whether a leg's dictionary differs from its parent's in architecture, size, sparsity or skip connection."""
        now = leg.dictionary
        if self.has(leg.parent):
            before = self.leg(leg.parent).dictionary
            l0 = before.l0
        else:
            before = self.externals[leg.parent]
            l0 = (before.k or before.l0) if now.l0 else None
        shape = (before.architecture, before.n_latents, l0, before.skip_connection)
        return shape != (now.architecture, now.n_latents, now.l0, now.skip_connection)

    def repeat_of(self, leg: Leg) -> str:
        """Return the leg that a leg repeats with another seed, or "". Ids tell: L3-seed1 repeats L3.

        What an extension added to it (L3-seed1+2M) repeats what was added to the other (L3+2M) or, without that, L3.
        """
        suffix = repeat_name("", leg.seed)
        if leg.id.endswith(suffix):
            originals = [leg.id.removesuffix(suffix)]
        else:
            continued, plus, tokens = leg.id.rpartition("+")
            if not continued.endswith(suffix):
                return ""
            first = continued.removesuffix(suffix)
            originals = [f"{first}{plus}{tokens}", first]
        return next(filter(self.has, originals), "")

    def newness(self, leg: Leg) -> float:
        """Return a leg's own tokens over all that its dictionary is trained on, parents included; 0 if unknown."""
        line = self.line(leg)
        if line[-1].hop:  # its parent is outside the plan
            return 0.0
        tokens_before = sum(child.hop.fork_at_tokens for child in line if child.hop)
        return leg.budget_tokens / max(1, tokens_before + leg.budget_tokens)
