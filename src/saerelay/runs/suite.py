"""A finished run: its published dictionaries, and the one answer to how its legs relate to one another."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from saerelay.errors import RunDirectoryError
from saerelay.planning.plan import Leg, Plan
from saerelay.runs.dictionaries import read_dictionary, read_info
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.quality import Origin
from saerelay.runs.documents.training import DictionaryInfo
from saerelay.sae.dictionary import Dictionary
from saerelay.site import Site


class PublishedSuite:
    """The published dictionaries of a run, by site or by leg id.

    A site with several legs gives the one that stands for it: neither a control nor continued by another leg. If seeds
    leave more than one, the error lists them.
    """

    def __init__(self, directory: Path, plan: Plan) -> None:
        self.directory = RunDirectory(directory)
        self.plan = plan

    # --- which legs count -------------------------------------------------------------------------------------------

    @property
    def legs(self) -> list[Leg]:
        """The legs that are published, in the order of the plan."""
        return [leg for leg in self.plan.legs if (self.directory.leg(leg.id) / "dictionary.json").is_file()]

    @property
    def final_legs(self) -> list[Leg]:
        """The legs that are neither controls nor continued by another, by site; several per site if seeds differ."""
        legs = self.legs
        continued = {(leg.parent, leg.site) for leg in legs}
        final = [leg for leg in legs if leg.role != "control" and (leg.id, leg.site) not in continued]
        return sorted(final, key=lambda leg: leg.site)

    @property
    def one_per_site(self) -> list[Leg]:
        """The leg that stands for each site: the first in the plan of `final_legs`."""
        first: dict[Site, Leg] = {}
        for leg in self.final_legs:
            first.setdefault(leg.site, leg)
        return list(first.values())

    @property
    def sites(self) -> list[Site]:
        """Sites with a published leg."""
        return sorted({leg.site for leg in self.legs})

    def method(self, leg: Leg) -> str | None:
        """The method by which a leg's dictionary was carried to its layer; None for one from scratch."""
        hop = self.info(leg).hop
        return hop.method if hop else leg.method

    def made(self, leg: Leg) -> str:
        """How a leg was made, in words: "affine + refit from L5", or "from scratch"."""
        method = self.method(leg)
        if not leg.parent:
            return "from scratch"
        if method == "random":
            return "random dictionary, refitted"
        if method == "scratch":
            return f"from scratch: no map from {leg.parent} helped"
        return f"{method_of(leg, method)} from {leg.parent}"

    def continuation_of(self, leg: Leg) -> Leg | None:
        """The leg that continues another one at the same site, as `saerelay train --extend` makes them."""
        for other in self.legs:
            if other.parent == leg.id and other.site == leg.site:
                return other
        return None

    def controls_of(self, leg: Leg) -> list[Leg]:
        """The control legs that a leg is compared with."""
        return [other for other in self.legs if other.control_of == leg.id]

    def scratch_counterparts(self, leg: Leg) -> list[Leg]:
        """The legs from scratch that a transferred one is compared with: its controls, and roots at its site."""
        counterparts = []
        for other in self.legs:
            is_root = other.role == "root" and not other.parent and other.site == leg.site
            is_control = other.control_of == leg.id and other.control_kind != "random"
            if is_control or is_root:
                counterparts.append(other)
        return counterparts

    def origin(self, leg: Leg) -> Origin:
        """Where a leg's latents come from; one that continues another of its layer has the origin of that one."""
        return self.plan.origin(leg)

    def neighbour_above(self, leg: Leg) -> Leg | None:
        """The leg that stands for the next layer, at the same kind of module."""
        higher = [other for other in self._same_module(leg) if other.layer > leg.layer]
        return min(higher, key=lambda other: other.layer, default=None)

    def neighbour_below(self, leg: Leg) -> Leg | None:
        """The leg that stands for the previous layer, at the same kind of module."""
        lower = [other for other in self._same_module(leg) if other.layer < leg.layer]
        return max(lower, key=lambda other: other.layer, default=None)

    def _same_module(self, leg: Leg) -> list[Leg]:
        kind = (leg.module, leg.module_out)
        return [other for other in self.one_per_site if (other.module, other.module_out) == kind]

    # --- one of them ------------------------------------------------------------------------------------------------

    def leg_at(self, site: Site) -> Leg:
        """The leg that stands for a site."""
        at_site = [leg for leg in self.legs if leg.site == site]
        final = [leg for leg in self.final_legs if leg.site == site]
        if len(final) == 1:
            return final[0]
        root = self.directory.root
        if not at_site:
            sites = ", ".join(str(each) for each in self.sites) or "none"
            raise RunDirectoryError(f"{root}: no dictionary at {site}; the run has dictionaries at: {sites}")
        names = ", ".join(leg.id for leg in at_site)
        raise RunDirectoryError(f"{root}: {len(at_site)} legs at {site}: {names}; ask for one by its id")

    def leg(self, name: str) -> Leg:
        """The leg with an id, or, for a number, the one that stands for that layer."""
        published = {leg.id: leg for leg in self.legs}
        if name in published:
            return published[name]
        if name.isdecimal():
            return self.leg_at(Site(int(name), self.plan.recipe.sites.module))
        names = ", ".join(published) or "none"
        raise RunDirectoryError(f'{self.directory.root}: no leg "{name}"; the published legs are: {names}')

    def digest(self, legs: Iterable[Leg], *, snapshots: bool = False) -> str:
        """A digest of some legs' dictionaries, and of their snapshots; "" if their files are old and have no digests.

        What was measured of other dictionaries is out of date.
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
        """What is known about a leg's dictionary: tokens, time, L0."""
        return read_info(self.directory.leg(leg.id))

    def dictionary(self, leg: Leg) -> Dictionary:
        """A leg's dictionary."""
        return read_dictionary(self.directory.leg(leg.id))[0]

    def snapshot(self, leg: Leg, age: int) -> Dictionary:
        """A leg's dictionary at an earlier age, in tokens."""
        return read_dictionary(self.directory.snapshot(leg.id, age))[0]

    def __getitem__(self, key: Site | str) -> Dictionary:
        leg = self.leg_at(key) if isinstance(key, Site) else self.leg(key)
        return self.dictionary(leg)

    def __iter__(self) -> Iterator[str]:
        return (leg.id for leg in self.legs)

    def __len__(self) -> int:
        return len(self.legs)


def method_of(leg: Leg, chosen: str | None = None) -> str:
    """How a leg's dictionary is carried to its layer: "affine + refit"; "" for one from scratch.

    `chosen` is the method that was taken where the plan has "auto".
    """
    method = chosen or leg.method
    if not method:
        return ""
    if method == "auto":
        method = "best map"
    return f"{method} + refit" if leg.refit_tokens else method
