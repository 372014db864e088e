"""What became of each latent of a run: from parent to child, from layer to layer, and in comparison with a control.

Children start as copies of their parents, so latents kept by index are inherited, not found again; links to controls
say how much independent training finds. See `links` for how two legs are compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console

from saerelay.analysis.collecting import NUMBERS_PER_PIECE, Collector, encode_batches
from saerelay.analysis.features import legs_without_features, neighbour_pairs, write_features
from saerelay.analysis.links import ALIVE_ABOVE, KEPT_ABOVE, REPLACED_BELOW, Comparison, Firing, Kind, LegPair, Link
from saerelay.analysis.metrics import Placed
from saerelay.analysis.session import Session
from saerelay.analysis.site_maps import SitePair, map_of_legs, sites_between
from saerelay.errors import RunDirectoryError
from saerelay.lm.model import LanguageModel
from saerelay.planning.leg import Leg
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.latents import (
    STATUSES,
    LineageDocument,
    LineageFacts,
    LineageLeg,
    LineageQuestion,
    LineageStep,
    Relative,
)
from saerelay.runs.suite import PublishedSuite
from saerelay.sae.maps import AffineMap
from saerelay.sae.transfer import fold


@dataclass(frozen=True, eq=False)
class Lineage:
    """What became of each latent of a run's legs; the content of lineage.json (see docs/run-directory.md).

    `Lineage.load("runs/a").follow("L3-from-L5", 123)` is latent 123 of layer 3, from the first layer to the last.
    """

    facts: LineageFacts
    """How it was measured, and the legs by id."""
    links: list[Link]

    @classmethod
    def load(cls, directory: str | Path) -> "Lineage":
        """Read a run's lineage.json; RunDirectoryError if there is none, or if it is damaged."""
        return cls.from_document(LineageDocument.load(RunDirectory(Path(directory)).lineage))

    @classmethod
    def from_document(cls, document: LineageDocument) -> "Lineage":
        """Make a lineage from its document."""
        facts = LineageFacts(**{name: getattr(document, name) for name in LineageFacts.model_fields})
        return cls(facts, [Link.from_document(link) for link in document.links])

    def link(self, source: str, target: str) -> Link:
        """Return the link between two legs, by their ids."""
        for link in self.links:
            if (link.source, link.target) == (source, target):
                return link
        pairs = ", ".join(f"{link.source} to {link.target}" for link in self.links) or "none"
        raise RunDirectoryError(f"no link from {source} to {target}; the links are: {pairs}")

    def follow(self, leg: str, latent: int) -> list[LineageStep]:
        """Follow a latent of a leg from the first layer to the last, along depth links.

        The path ends where the latent has no partner. A leg without depth links (a control) gives a single step. Raises
        RunDirectoryError if there is no such leg or latent.
        """
        legs = self.facts.legs
        if leg not in legs:
            raise RunDirectoryError(f'no leg "{leg}" in this lineage; its legs are: {", ".join(legs)}')
        check_latent(leg, latent, legs[leg].n_latents)
        to_next = {link.source: link for link in self.links if link.kind == "depth"}
        from_previous = {link.target: link for link in self.links if link.kind == "depth"}

        # Back to the first layer ...
        first_leg = leg
        first_latent = latent
        while first_leg in from_previous:
            link = from_previous[first_leg]
            previous = link.backward(first_latent)
            if previous is None:
                break
            first_leg = link.source
            first_latent = previous

        # ... and from there to the last.
        steps = [LineageStep(leg=first_leg, layer=legs[first_leg].layer, latent=first_latent)]
        while steps[-1].leg in to_next:
            link = to_next[steps[-1].leg]
            partner = link.forward(steps[-1].latent)
            if partner is None:
                break
            facts = _facts_of(link, steps[-1].latent)
            steps.append(LineageStep(leg=link.target, layer=link.target_layer, latent=partner, **facts))
        return steps

    def relatives(self, leg: str, latent: int) -> list[Relative]:
        """Return a latent's counterparts off its path: in the leg's parent, its controls, and the leg it controls."""
        relatives = []
        for link in self.links:
            if link.kind == "depth":
                continue
            if link.target == leg:
                source = link.backward(latent)
                if source is not None:
                    kind = "parent" if link.kind == "hop" else "control of"
                    facts = _facts_of(link, source)
                    relatives.append(
                        Relative(kind=kind, leg=link.source, layer=link.source_layer, latent=source, **facts)
                    )
            if link.kind == "control" and link.source == leg:
                partner = link.forward(latent)
                if partner is not None:
                    facts = _facts_of(link, latent)
                    relatives.append(
                        Relative(kind="control", leg=link.target, layer=link.target_layer, latent=partner, **facts)
                    )
        return relatives

    def summary(self) -> list[dict[str, Any]]:
        """Return one dict per link: kind, source, target, and its `shares`."""
        rows = []
        for link in self.links:
            rows.append({"kind": link.kind, "source": link.source, "target": link.target, **link.shares()})
        return rows


def _facts_of(link: Link, latent: int) -> dict[str, Any]:
    """Return how alike a latent of the source and its partner are."""
    return {
        "decoder_cosine": float(link.decoder_cosine[latent]),
        "encoder_cosine": float(link.encoder_cosine[latent]),
        "correlation": float(link.correlation[latent]),
        "status": STATUSES[link.status[latent]],
    }


def check_latent(leg: str, latent: int, n_latents: int) -> None:
    """Raise RunDirectoryError if a leg has no such latent."""
    if not 0 <= latent < n_latents:
        raise RunDirectoryError(f"{leg} has no latent {latent}; its latents are 0 to {n_latents - 1}")


# --- a run's lineage ------------------------------------------------------------------------------------------------


@torch.no_grad()
def make_lineage(session: Session, *, tokens: int = 0, features: bool = False) -> Lineage:
    """Find what became of each latent of a run, on the test split; writes lineage.json, unless it is current.

    With `features`, missing features are computed in the same pass over the tokens, as by `make_features`. If `tokens`
    is 0, it is `evaluate.tokens`.
    """
    suite = session.suite
    asked = question(session, tokens)
    current = LineageDocument.load_current(suite.directory.lineage, asked)
    without_features = legs_without_features(session, tokens) if features else []
    if current is not None and not without_features:
        return Lineage.from_document(current)

    pairs = leg_pairs(suite) if current is None else []
    legs = suite.legs if current is None else without_features
    dictionaries = {leg.id: Placed.at_home(leg, suite.dictionary(leg)).on(session.model.device) for leg in legs}
    compared_sites = [sites for pair in pairs for sites in sites_between(pair.source, pair.target)]
    maps = session.maps.between(neighbour_pairs(suite, without_features) + compared_sites)
    comparisons = [compare(suite, pair, dictionaries, maps) for pair in pairs]

    sequences = session.held_out(tokens)
    collectors = {}
    for leg in without_features:
        collectors[leg.id] = Collector(leg.dictionary.n_latents, sequences.shape, session.model.device)
    firing, n_tokens = _read(session, sequences, dictionaries, comparisons, collectors)
    collected = {key: collector.features() for key, collector in collectors.items()}
    write_features(session, collected, maps, tokens)
    if current is None:
        links = []
        for comparison in comparisons:
            source = firing[comparison.pair.source.id]
            target = firing[comparison.pair.target.id]
            links.append(comparison.link(source, target, n_tokens).to_document())
        current = LineageDocument(**dict(asked), n_tokens=n_tokens, map_tokens=session.maps.tokens, links=links)
        current.save(suite.directory.lineage)
    return Lineage.from_document(current)


def _read(
    session: Session,
    sequences: np.ndarray,
    dictionaries: Mapping[str, Placed],
    comparisons: Sequence[Comparison],
    collectors: Mapping[str, Collector],
) -> tuple[dict[str, Firing], int]:
    """Encode sequences (N, context) once, for all comparisons and for the collectors of features, by leg.

    Returns how each dictionary fires, and the number of positions kept.
    """
    device = session.model.device
    firing = {key: Firing(placed.dictionary.n_latents, device) for key, placed in dictionaries.items()}
    widest = max(placed.dictionary.n_latents for placed in dictionaries.values())
    scratch = torch.zeros(max(NUMBERS_PER_PIECE, widest), device=device)
    n_tokens = 0
    batches = encode_batches(session.plan, session.model, sequences, dictionaries, track=session.display.track)
    for batch in batches:
        n_tokens += len(batch.spots)
        for key, codes in batch.codes.items():
            firing[key].add(codes)
        for key, collector in collectors.items():
            collector.add(batch, batch.codes[key])
        for comparison in comparisons:
            pair = comparison.pair
            comparison.add(batch.codes[pair.source.id], batch.codes[pair.target.id], scratch)
    return firing, n_tokens


def lineage_run(
    suite: PublishedSuite,
    model: LanguageModel | None = None,
    *,
    tokens: int = 0,
    features: bool = False,
    console: Console | None = None,
) -> Lineage:
    """Find what became of each latent of a run; writes lineage.json. See `Suite.lineage`.

    `model` is the run's language model, if it is loaded already; with `features`, features are computed as well.
    """
    return make_lineage(Session(suite, model=model, console=console), tokens=tokens, features=features)


def question(session: Session, tokens: int) -> LineageQuestion:
    """Return the question that a run's lineage answers."""
    legs = {}
    for leg in session.suite.legs:
        legs[leg.id] = LineageLeg(layer=leg.layer, n_latents=leg.dictionary.n_latents)
    return LineageQuestion(
        model=session.plan.facts.name,
        n_sequences=len(session.held_out(tokens)),
        kept_above=KEPT_ABOVE,
        replaced_below=REPLACED_BELOW,
        alive_above=ALIVE_ABOVE,
        dictionaries=session.suite.digest(session.suite.legs),
        legs=legs,
    )


def leg_pairs(suite: PublishedSuite) -> list[LegPair]:
    """Return the pairs of legs to compare.

    A parent outside the run has no link, nor has one from which nothing was taken; of a continued control, only the
    continuation has one to the leg that it is compared with.
    """
    published = {leg.id: leg for leg in suite.legs}
    pairs = []
    for leg in suite.legs:
        if leg.parent in published and not suite.begins_afresh(leg):
            pairs.append(LegPair("hop", published[leg.parent], leg))
        controlled = published.get(suite.compared_with(leg))
        if controlled and not suite.successor(leg):
            pairs.append(LegPair("control", controlled, leg))
    for leg in suite.one_per_site:
        above = suite.neighbours(leg).get("above")
        if above:
            pairs.append(LegPair("depth", leg, above))
    kinds = get_args(Kind)
    return sorted(pairs, key=lambda pair: (kinds.index(pair.kind), pair.source.site, pair.target.site))


def compare(
    suite: PublishedSuite,
    pair: LegPair,
    dictionaries: Mapping[str, Placed],
    maps: Mapping[SitePair, AffineMap],
) -> Comparison:
    """Begin the comparison of a pair, before any tokens are read."""
    folded = fold(dictionaries[pair.source.id].dictionary, map_of_legs(maps, pair.source, pair.target))
    by_index = ancestor(suite, pair.source) == ancestor(suite, pair.target)
    return Comparison(pair, folded, dictionaries[pair.target.id].dictionary, by_index)


def ancestor(suite: PublishedSuite, leg: Leg) -> str:
    """Return the root from which a leg's latents have their index, or the directory of a root outside the run.

    A leg with more or fewer latents than its parent counts as a root itself, and so does one that took nothing from it.
    """
    plan = suite.plan
    while not suite.begins_afresh(leg):
        inside = plan.has(leg.parent)
        parent = plan.leg(leg.parent).dictionary if inside else plan.externals[leg.parent]
        if parent.n_latents != leg.dictionary.n_latents:
            return leg.id
        if not inside:
            return leg.parent
        leg = plan.leg(leg.parent)
    return leg.id
