"""A finished run: its dictionaries, by site or by leg."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from saerelay.errors import ModelError, RunDirectoryError
from saerelay.lm.attach import Attachment, attach
from saerelay.lm.model import LanguageModel
from saerelay.lm.ports import shape_of
from saerelay.planning.plan import Leg, Plan
from saerelay.runs.dictionaries import read_dictionary
from saerelay.runs.directory import RunDirectory, read_plan
from saerelay.sae.dictionary import Dictionary
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
            return self.leg_at(Site(int(name), self.plan.recipe.sites.module))
        raise RunDirectoryError(f'{self.directory.root}: no leg "{name}"; there are {", ".join(published) or "none"}')

    def attach(
        self,
        model: Any,
        layers: Iterable[int] | None = None,
        *,
        replace: bool = False,
        leave_alone: Collection[int] | None = None,
    ) -> AbstractContextManager[Attachment]:
        """Put the suite's SAEs to work in a language model while a `with` block lasts.

            with suite.attach(model) as attached:        # or layers=[3, 5]
                attached[3].steer(123, 8.0)
                model.generate(**inputs)
            z = attached[3].latents()                    # (B, C, F), prompt and generated tokens

        What `saerelay.attach` says holds; `leave_alone` is by default the BOS that the run put in front of its
        sequences. `model` is the one that the suite was trained on, or another with as many layers of that width, such
        as one fine-tuned from it; raises ModelError otherwise, RunDirectoryError for a layer without an SAE.
        """
        model = model.hf_model if isinstance(model, LanguageModel) else model
        facts = self.plan.facts
        wanted, found = (facts.n_layers, facts.d_model), shape_of(model)
        if found != wanted:
            raise ModelError(
                f"{self.directory.root}: trained on {facts.name} ({wanted[0]} layers, {wanted[1]} wide); this model "
                f"({type(model).__name__}) has {found[0]} layers, {found[1]} wide. Attach the suite to that model or "
                "one fine-tuned from it; `saerelay hop --from-model` carries an SAE to another"
            )
        module = self.plan.recipe.sites.module
        legs = self.one_a_site if layers is None else [self.leg_at(Site(layer, module)) for layer in layers]
        if leave_alone is None:
            bos = facts.tokens.bos_token_id if self.plan.recipe.data.prepend_bos else None
            leave_alone = [] if bos is None else [bos]
        return attach(model, {leg.site: self[leg.id] for leg in legs}, replace=replace, leave_alone=leave_alone)

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
