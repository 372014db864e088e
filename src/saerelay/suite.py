"""A finished run: its dictionaries, by site or by leg."""

from collections.abc import Iterator
from pathlib import Path

from saerelay.checkpoint import RunDirectory, read_dictionary, read_plan
from saerelay.dictionaries import Dictionary
from saerelay.errors import RunDirectoryError
from saerelay.plan import Leg, Plan
from saerelay.site import Site


class Suite:
    """The published dictionaries of a run, by site or by leg id.

    A site with several legs gives the one that is no control and was not continued by another; if there is not just
    one, the error lists them.
    """

    def __init__(self, directory: Path, plan: Plan) -> None:
        self.directory = RunDirectory(directory)
        self.plan = plan

    @property
    def legs(self) -> list[Leg]:
        """The legs that are published."""
        return [leg for leg in self.plan.legs if (self.directory.leg(leg.id) / "dictionary.json").is_file()]

    @property
    def standing(self) -> list[Leg]:
        """The suite itself, by site: published legs that are no control and were not continued by another."""
        continued = {(leg.parent, leg.site) for leg in self.legs}
        legs = [leg for leg in self.legs if leg.role != "control" and (leg.id, leg.site) not in continued]
        return sorted(legs, key=lambda leg: leg.site)

    @property
    def one_a_site(self) -> list[Leg]:
        """Those of `standing` without the second and third of a site (other seeds): the first of the plan stands."""
        first = {leg.site: leg for leg in reversed(self.standing)}
        return [first[site] for site in sorted(first)]

    @property
    def sites(self) -> list[Site]:
        """Sites with a published leg."""
        return sorted({leg.site for leg in self.legs})

    def leg_at(self, site: Site) -> Leg:
        """The leg that stands for a site."""
        here = [leg for leg in self.legs if leg.site == site]
        chosen = [leg for leg in self.standing if leg.site == site]
        if len(chosen) == 1:
            return chosen[0]
        if not here:
            raise RunDirectoryError(
                f"{self.directory.root}: no dictionary at {site}; there are {', '.join(map(str, self.sites)) or 'none'}"
            )
        raise RunDirectoryError(
            f"{self.directory.root}: {len(here)} legs at {site}: {', '.join(leg.id for leg in here)}; "
            "ask for one by its id"
        )

    def leg(self, name: str) -> Leg:
        """The leg with an id, or, for a number, the one that stands for that layer."""
        published = {leg.id: leg for leg in self.legs}
        if name in published:
            return published[name]
        if name.isdecimal():
            return self.leg_at(Site(int(name), self.plan.run.sites.module))
        raise RunDirectoryError(f'{self.directory.root}: no leg "{name}"; there are {", ".join(published) or "none"}')

    def __getitem__(self, key: Site | str) -> Dictionary:
        leg = self.leg_at(key) if isinstance(key, Site) else self.leg(key)
        return read_dictionary(self.directory.leg(leg.id))[0]

    def __iter__(self) -> Iterator[str]:
        return (leg.id for leg in self.legs)

    def __len__(self) -> int:
        return len(self.legs)


def load(directory: str | Path) -> Suite:
    """Open a run directory.

    `load("runs/a")[Site(3)]` is the dictionary of layer 3; `load("runs/a")["L3-from-L5"]` the one of a leg.
    Raises RunDirectoryError if there is no run.
    """
    return Suite(Path(directory), read_plan(Path(directory)))
