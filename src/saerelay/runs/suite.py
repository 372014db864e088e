"""A finished run: its published dictionaries, and how its legs relate to one another."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from saerelay.errors import RunDirectoryError
from saerelay.planning.leg import Leg
from saerelay.planning.plan import Plan
from saerelay.runs.dictionaries import read_dictionary, read_info
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.quality import AFRESH, Origin
from saerelay.runs.documents.training import DictionaryInfo
from saerelay.sae.dictionary import Dictionary
from saerelay.site import Site, SiteKind
from saerelay.spec import few_of


class PublishedSuite:
    """The published dictionaries of a run, by site or by leg id.

    For a site with several legs, the suite gives the one that stands for it: neither a control nor continued by another
    leg; of several tiers, the one with the recipe's own L0 (`suite[site, k]` is another tier); of several seeds, the
    first. If a plan written leg by leg leaves more than one, the error lists them.
    """

    def __init__(self, directory: Path, plan: Plan) -> None:
        self.directory = RunDirectory(directory)
        self.plan = plan

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.directory.root}: {few_of(self) or 'nothing published yet'})"

    # --- which legs count -------------------------------------------------------------------------------------------

    @property
    def legs(self) -> list[Leg]:
        """The published legs, in the order of the plan."""
        return [leg for leg in self.plan.legs if self._is_published(leg)]

    def _is_published(self, leg: Leg) -> bool:
        return (self.directory.leg(leg.id) / "dictionary.json").is_file()

    @property
    def final_legs(self) -> list[Leg]:
        """The legs that are no controls and whose place no other leg has taken, kind by kind and layer by layer.

        There are several per site if seeds differ, or if the suite has tiers.
        """
        legs = self.legs
        replaced = {leg.parent for leg in legs if self._takes_place(leg)}
        final = [leg for leg in legs if leg.role != "control" and leg.id not in replaced]
        kinds = list(dict.fromkeys(leg.kind for leg in legs))
        return sorted(final, key=lambda leg: (kinds.index(leg.kind), leg.site))

    def _takes_place(self, leg: Leg) -> bool:
        """Whether a leg takes its parent's place."""
        return self.plan.stays_as(leg) in ("continuation", "replacement")

    def check_has_final_legs(self) -> None:
        """Raise RunDirectoryError if only controls are published: they are not what a suite is made of."""
        if not self.final_legs:
            raise self.directory.unfinished("only controls are finished yet")

    @property
    def suite_legs(self) -> list[Leg]:
        """The final legs of the suite's own tier and first seed; analyses compare these across layers.

        There are several per site if a plan written leg by leg has them.
        """
        by_place: dict[tuple[Site, SiteKind], list[Leg]] = {}
        for leg in self.final_legs:
            by_place.setdefault((leg.site, leg.kind), []).append(leg)
        return [leg for legs in by_place.values() for leg in self._of_own_l0(legs)]

    @property
    def one_per_site(self) -> list[Leg]:
        """The leg that stands for each site and kind: the first in the plan of `suite_legs`."""
        first: dict[tuple[Site, SiteKind], Leg] = {}
        for leg in self.suite_legs:
            first.setdefault((leg.site, leg.kind), leg)
        return list(first.values())

    def _of_own_l0(self, legs: list[Leg]) -> list[Leg]:
        """The given legs with the recipe's L0, without repeats; all legs but repeats if none has that L0."""
        own = self.plan.recipe.dictionary.l0
        legs = self._first_seeds(legs)
        return [leg for leg in legs if leg.dictionary.l0 == own] or legs

    def _first_seeds(self, legs: list[Leg]) -> list[Leg]:
        """The given legs that are not repeats of another leg with another seed; all of them if all are."""
        return [leg for leg in legs if not self.plan.repeat_of(leg)] or legs

    @property
    def kinds(self) -> list[SiteKind]:
        """The kinds of sites with a published leg, in the order of the plan."""
        return list(dict.fromkeys(leg.kind for leg in self.legs))

    @property
    def modules(self) -> str:
        """The kinds of modules that are read, in words: "resid_post", or "resid_post, mlp_out, mlp_in"."""
        return ", ".join(dict.fromkeys(kind.module for kind in self.kinds))

    @property
    def sites(self) -> list[Site]:
        """Sites with a published leg."""
        return sorted({leg.site for leg in self.legs})

    def method(self, leg: Leg) -> str | None:
        """The method by which a leg's dictionary was carried to its layer; None for a leg from scratch."""
        hop = self.info(leg).hop
        return hop.method if hop else leg.method

    def made(self, leg: Leg) -> str:
        """How a leg was made, in words: "affine + refit from L5", or "from scratch"."""
        method = self.method(leg)
        if leg.shared_layers:
            return f"from scratch, on aligned activations of layers {few_of(map(str, [leg.layer, *leg.shared_layers]))}"
        if not leg.parent:
            return "from scratch"
        if method == "random":
            return "random dictionary, refitted"
        if method == "scratch":
            return f"from scratch: no map from {leg.parent} helped"
        if self.plan.continues(leg):
            return f"{self.made(self.plan.first_of(leg))}, continued"
        if self.plan.stays_as(leg) == "tier":
            return copy_of_tier(leg)
        return f"{method_of(leg, method)} from {leg.parent}"

    def successor(self, leg: Leg) -> Leg | None:
        """The leg that has taken a leg's place (see `Leg.stays_as`), the last of several; None if the leg has it."""
        heirs = [other for other in self.legs if other.parent == leg.id and self._takes_place(other)]
        return heirs[-1] if heirs else None

    @property
    def _continuations(self) -> dict[str, str]:
        """The ids of the legs that continue another one, by the id of that leg; the last of several."""
        return {leg.parent: leg.id for leg in self.legs if self.plan.continues(leg)}

    def tokens_before(self, leg: Leg) -> int:
        """The number of tokens that the legs that a leg continues were trained on; 0 if it continues none."""
        if not leg.hop or not self.plan.continues(leg):
            return 0
        before = self.plan.leg(leg.parent)
        return self.tokens_before(before) + min(leg.hop.fork_at_tokens, self.info(before).tokens)

    def compared_with(self, control: Leg) -> str:
        """The leg that a control is compared with: the one it was planned for, or the one that continues that leg.

        A control with equal tokens stays with the leg whose tokens it has, unless it was continued, too.
        """
        leg_id = control.control_of
        if control.control_kind == "equal_tokens" and not self.plan.continues(control):
            return leg_id
        continuations = self._continuations
        while leg_id in continuations:
            leg_id = continuations[leg_id]
        return leg_id

    def scratch_counterparts(self, leg: Leg) -> list[Leg]:
        """The legs from scratch that a transferred leg is compared with: its controls, and roots at its place."""
        counterparts = []
        place = (leg.site, leg.kind, leg.dictionary.l0)
        continuations = self._continuations
        for other in self.legs:
            may_be_control = other.control_kind in ("equal_tokens", "full")
            may_be_root = (other.site, other.kind, other.dictionary.l0) == place and not other.shared_layers
            if other.id in continuations or not (may_be_control or may_be_root):
                continue
            one_repeats = self.plan.repeat_of(other) or self.plan.repeat_of(leg)
            if one_repeats and other.seed != leg.seed:
                continue
            is_control = may_be_control and self.compared_with(other) == leg.id
            is_root = may_be_root and self.plan.first_of(other).role == "root"
            if is_control or is_root:
                counterparts.append(other)
        return counterparts

    def origin(self, leg: Leg) -> Origin:
        """Where a leg's latents come from; a leg that starts from one at its own site has the origin of that leg.

        A hop that was trained from scratch, since no map helped, comes from scratch; a random dictionary, from nowhere.
        """
        while not self.begins_afresh(leg):
            source = self.plan.parent_site(leg)
            if source != leg.site or not self.plan.has(leg.parent):
                return _direction(source.layer, leg.layer)
            leg = self.plan.leg(leg.parent)
        return "random" if leg.method == "random" else "scratch"

    def begins_afresh(self, leg: Leg) -> bool:
        """Whether a leg has no parent, or takes nothing from it, so that its latents have nothing to do with it."""
        method = self.method(leg) if self._is_published(leg) else leg.method
        return not leg.parent or method in AFRESH

    def is_transferred(self, leg: Leg) -> bool:
        """Whether a leg's latents come from another leg, of which it is not a control."""
        first = self.plan.first_of(leg)
        return first.role == "transfer" and not self.begins_afresh(first)

    def transferred_from(self, leg: Leg) -> str:
        """The leg, or the dictionary outside the run, that a leg's latents were carried over from; "" for none.

        A leg that continues another came from where that one did.
        """
        first = self.plan.first_of(leg)
        return "" if self.begins_afresh(first) else first.parent

    def neighbours(self, leg: Leg) -> dict[str, Leg]:
        """The legs of a leg's kind that stand for the next layer ("above") and the previous one ("below"), if any."""
        of_kind = [other for other in self.one_per_site if other.kind == leg.kind]  # layer by layer
        above = [("above", other) for other in of_kind if other.layer > leg.layer]
        below = [("below", other) for other in of_kind if other.layer < leg.layer]
        return dict(above[:1] + below[-1:])

    # --- a single leg -----------------------------------------------------------------------------------------------

    def leg_at(self, site: Site, k: float | None = None, kind: SiteKind | None = None) -> Leg:
        """The leg that stands for a site; or its tier of L0 `k`, or its leg of one `kind` if several read there."""
        final = [leg for leg in self.final_legs if leg.site == site and kind in (None, leg.kind)]
        if k is None:
            final = self._of_own_l0(final)
        else:
            final = self._first_seeds([leg for leg in final if leg.dictionary.l0 == k])
        if len(final) == 1:
            return final[0]
        root = self.directory.root
        at_site = [leg for leg in self.legs if leg.site == site]
        if not at_site:
            sites = ", ".join(str(each) for each in self.sites) or "none"
            raise RunDirectoryError(f"{root}: no dictionary at {site}; the run has dictionaries at: {sites}")
        names = ", ".join(leg.id for leg in at_site)
        of_tier = "" if k is None else f", and {len(final) or 'none'} with {k:g} active latents"
        raise RunDirectoryError(f"{root}: {len(at_site)} legs at {site}{of_tier}: {names}; name one by its id")

    def leg(self, name: str | int | Site) -> Leg:
        """The leg with an id or, for a site or the number of a layer, the leg that stands for it."""
        if isinstance(name, Site):
            return self.leg_at(name)
        name = str(name)
        published = {leg.id: leg for leg in self.legs}
        if name in published:
            return published[name]
        if name.isdecimal():
            kind = self.plan.recipe.sites.first_kind
            return self.leg_at(Site(int(name), kind.module), kind=kind)
        names = ", ".join(published) or "none"
        raise RunDirectoryError(f'{self.directory.root}: no leg "{name}"; the published legs are: {names}')

    def digest(self, legs: Iterable[Leg], *, snapshots: bool = False) -> str:
        """A digest of the dictionaries of some legs, and of their snapshots; "" if old files have no digests.

        Measurements of dictionaries with another digest are out of date.
        """
        found: list[object] = []
        for leg in legs:
            places = [self.directory.leg(leg.id)]
            if snapshots:
                places += [self.directory.snapshot(leg.id, age) for age in self.directory.ages(leg)]
            for place in places:
                info = read_info(place)
                if info.digests:
                    name = str(place.relative_to(self.directory.root))
                    found.append((name, info.architecture, info.k, sorted(info.digests.items())))
        return hashlib.blake2b(repr(found).encode(), digest_size=8).hexdigest() if found else ""

    def info(self, leg: Leg) -> DictionaryInfo:
        """The facts about a leg's dictionary: tokens, time, L0."""
        return read_info(self.directory.leg(leg.id))

    def dictionary(self, leg: Leg) -> Dictionary:
        """A leg's dictionary."""
        return read_dictionary(self.directory.leg(leg.id))[0]

    def snapshot(self, leg: Leg, age: int) -> Dictionary:
        """A leg's dictionary at an earlier age, in tokens."""
        return read_dictionary(self.directory.snapshot(leg.id, age))[0]

    def __getitem__(self, key: Site | str | int | tuple[Site, float]) -> Dictionary:
        if isinstance(key, tuple):
            return self.dictionary(self.leg_at(*key))
        return self.dictionary(self.leg(key))

    def __iter__(self) -> Iterator[str]:
        return (leg.id for leg in self.legs)

    def __len__(self) -> int:
        return len(self.legs)


def _direction(source: int, target: int) -> Origin:
    """Where the latents of a hop between two layers come from."""
    if source == target:
        return "same layer"
    return "from below" if source < target else "from above"


def copy_of_tier(leg: Leg) -> str:
    """How a leg of another tier was made: "copy with 16 active latents"."""
    return f"copy with {leg.dictionary.l0:g} active latents"


def method_of(leg: Leg, chosen: str | None = None) -> str:
    """How a leg's dictionary is carried to its layer: "affine + refit"; "" for a leg from scratch.

    `chosen` is the method that was chosen where the plan has "auto".
    """
    method = chosen or leg.method
    if leg.shared_layers:
        return f"{len(leg.shared_layers) + 1} layers aligned"
    if not method:
        return ""
    if method == "auto":
        method = "best map"
    return f"{method} + refit" if leg.refit_tokens else method
