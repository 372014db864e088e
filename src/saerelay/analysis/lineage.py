"""What became of each latent: from parent to child, from layer to layer, and beside a control.

Two legs that descend from one root have the same latents at the same index: a transfer never permutes them. Where they
do not, latents are matched one to one by decoder cosine (optimal assignment). Before anything is compared, the source
is folded through the affine map between the two layers, whose raw spaces are not comparable. Shapes: F latents of the
source, G of the target, B kept positions of a batch.

The states of a latent and its partner: `k`ept (both fire, decoder cosine over KEPT_ABOVE), `d`rifted (cosine not over
it), `r`eplaced (under REPLACED_BELOW: the place has another meaning now), `x` died (the partner does not fire), `b`orn
(only the partner fires), `-` silent in both. Children start as their parents: what is kept by index is inherited, not
found again; links to controls say how much independent training finds.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from rich.console import Console
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from saerelay.analysis.features import (
    DENSE,
    Collector,
    encode_batches,
    held_out_sequences,
    load_features,
    most_similar,
    neighbour_pairs,
    neighbours,
    without_features,
    write_features,
)
from saerelay.analysis.site_maps import SiteMaps
from saerelay.data.corpus import Corpus
from saerelay.errors import ModelError, RunDirectoryError
from saerelay.files import finite, read_json, write_text
from saerelay.lm.model import LanguageModel, load_model
from saerelay.lm.tokens import load_tokenizer, token_text
from saerelay.planning.plan import Leg, Plan
from saerelay.runs.directory import RunDirectory
from saerelay.runs.suite import PublishedSuite
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.kernels import Codes, split_codes
from saerelay.sae.transfer import fold

SCHEMA_VERSION = 1
KEPT_ABOVE = 0.7
"""Decoder cosine over which a latent counts as the same. On the demo run latents that have kept their index make two
humps: over .7 the partner is the most similar of all in more than 99 % of cases, under .3 never (what was silent
after the hop was given another meaning); between them lie 1 % of the latents, in the first layers up to 22 %."""
REPLACED_BELOW = 0.3
ALIVE_ABOVE = 0
"""A latent is alive if it fires more often than this on the held-out tokens: the rule of `frac_alive`."""
EXACT_LATENTS = 4_096
"""Assignments of no more latents are optimal over all pairs; larger ones over each latent's CANDIDATES most similar
ones, or none. That takes a ninth of the time at 8192 latents (9 s become 1), and of the demo's controls it changes a
tenth of the partners, of those with a cosine over a half 2 to 3 %."""
CANDIDATES = 32

Kind = Literal["hop", "depth", "control"]
_KINDS: tuple[Kind, ...] = get_args(Kind)
_NAMES = {"k": "kept", "d": "drifted", "r": "replaced", "x": "died", "b": "born", "-": "silent"}


@dataclass(frozen=True, eq=False)
class Link:
    """What became of a leg's latents in another leg; tensors have an entry for each latent of the source."""

    kind: Kind
    """hop: parent to child; depth: a layer's leg to the next layer's; control: a leg to its from-scratch control."""
    source: str
    target: str
    source_layer: int
    target_layer: int
    partner: Tensor | None
    """int64 (F): latents of the target, -1 for none; None where latents have kept their index."""
    decoder_cosine: Tensor
    """(F): of the folded source with the partner; NaN without one."""
    encoder_cosine: Tensor
    correlation: Tensor
    """(F): Pearson's, of the activations on the same tokens; NaN where one never fires."""
    status: str
    """A letter a latent: k, d, r, x, b or -."""

    def forward(self, latent: int) -> int | None:
        """The partner of a latent of the source, or None."""
        partner = latent if self.partner is None else int(self.partner[latent])
        return None if partner < 0 else partner

    def backward(self, latent: int) -> int | None:
        """The latent of the source whose partner is `latent`, or None."""
        if self.partner is None:
            return latent
        found = (self.partner == latent).nonzero()
        return int(found[0, 0]) if len(found) else None

    def found(self, latent: int) -> dict[str, Any]:
        """What is known of a latent of the source and its partner, None for what is not; see `Step`."""
        names = ("decoder_cosine", "encoder_cosine", "correlation")
        numbers = {name: float(getattr(self, name)[latent]) for name in names}
        return finite(numbers) | {"status": _NAMES[self.status[latent]]}

    def shares(self) -> dict[str, float]:
        """Shares of the source's latents of each state; their sum is 1."""
        counts = Counter(self.status)
        return {name: counts[letter] / len(self.status) for letter, name in _NAMES.items()}


class Step(NamedTuple):
    """A latent of a leg, and how alike it is to the one it was reached from; None of the first of a way."""

    leg: str
    layer: int
    latent: int
    decoder_cosine: float | None = None
    encoder_cosine: float | None = None
    correlation: float | None = None
    status: str | None = None
    """"kept", "drifted", "replaced", "died", "born" or "silent": read towards deeper layer, child or control."""


@dataclass(frozen=True, eq=False)
class Lineage:
    """What became of each latent of a run's legs; the content of lineage.json (see docs/run-directory.md).

    `Lineage.load("runs/a").follow("L3-from-L5", 123)` is latent 123 of layer 3, from the first layer to the last.
    """

    facts: dict[str, Any]
    """All of lineage.json but its links: how it was measured, and `legs`: {id: {layer, n_latents}}."""
    links: list[Link]

    @classmethod
    def load(cls, directory: str | Path) -> "Lineage":
        """Read a run's lineage.json; RunDirectoryError if there is none, or it is damaged."""
        path = RunDirectory(Path(directory)).lineage
        if not path.is_file():
            raise RunDirectoryError(f"{path}: no lineage here; `saerelay show {directory} LEG LATENT` makes it")
        data = read_json(path)
        try:
            links = [_link_from_json(link) for link in data.pop("links")]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RunDirectoryError(f"{path}: damaged ({error!r}); delete it to have it made again") from None
        return cls(data, links)

    def link(self, source: str, target: str) -> Link:
        """The link between two legs, by their ids."""
        for link in self.links:
            if (link.source, link.target) == (source, target):
                return link
        there = ", ".join(f"{link.source} to {link.target}" for link in self.links) or "none"
        raise RunDirectoryError(f"no link from {source} to {target}; there are {there}")

    def follow(self, leg: str, latent: int) -> list[Step]:
        """A latent of a leg, from the first layer to the last, along the depth links that it is on.

        The way ends where a latent has no partner. A leg that no depth link joins (a control) is a way of one step.
        Raises RunDirectoryError if there is no such leg or latent.
        """
        legs = self.facts["legs"]
        if leg not in legs:
            raise RunDirectoryError(f'no leg "{leg}" in this lineage; there are {", ".join(legs)}')
        check_latent(leg, latent, legs[leg]["n_latents"])
        depth = [link for link in self.links if link.kind == "depth"]
        first, at = leg, latent
        while link := next((link for link in depth if link.target == first), None):
            before = link.backward(at)
            if before is None:
                break
            first, at = link.source, before
        steps = [Step(first, legs[first]["layer"], at)]
        while link := next((link for link in depth if link.source == steps[-1].leg), None):
            before, partner = steps[-1].latent, link.forward(steps[-1].latent)
            if partner is None:
                break
            steps.append(Step(link.target, link.target_layer, partner, **link.found(before)))
        return steps

    def relatives(self, leg: str, latent: int) -> list[tuple[str, Step]]:
        """A latent's counterparts beside its way: in the leg's parent, in its controls, in what it is a control of."""
        found = []
        for link in (link for link in self.links if link.kind != "depth"):
            if link.target == leg and (before := link.backward(latent)) is not None:
                name = "parent" if link.kind == "hop" else "control of"
                found.append((name, Step(link.source, link.source_layer, before, **link.found(before))))
            if link.kind == "control" and link.source == leg and (partner := link.forward(latent)) is not None:
                found.append(("control", Step(link.target, link.target_layer, partner, **link.found(latent))))
        return found

    def summary(self) -> list[dict[str, Any]]:
        """One dict a link: kind, source, target, and its `shares`."""
        return [{"kind": x.kind, "source": x.source, "target": x.target} | x.shares() for x in self.links]


def check_latent(leg: str, latent: int, n_latents: int) -> None:
    """Raise RunDirectoryError if a leg has no such latent."""
    if not 0 <= latent < n_latents:
        raise RunDirectoryError(f"{leg} has no latent {latent}; its latents are 0 to {n_latents - 1}")


# --- pairs and cosines ------------------------------------------------------------------------------------------


def assign(source: Tensor, target: Tensor) -> Tensor:
    """Match decoder rows (F, D) with rows (G, D), one to one, so that the cosines' sum is largest: int64 (F), -1 none.

    >>> rows = torch.eye(4)
    >>> assign(rows, rows[[2, 0, 3, 1]]).tolist()
    [1, 3, 0, 2]

    Exact up to EXACT_LATENTS; beyond, among each row's CANDIDATES most similar ones (see there).
    """
    F, G = len(source), len(target)
    partner = torch.full((F,), -1)
    if max(F, G) <= EXACT_LATENTS:
        cosines = _unit(source) @ _unit(target).T
        rows, columns = linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
    else:
        latents, cosines = (t.cpu().flatten() for t in most_similar(source, target, CANDIDATES))
        everyone = torch.arange(F)
        row = torch.cat([everyone.repeat_interleave(len(latents) // F), everyone])
        column = torch.cat([latents, G + everyone])  # a column of its own is for a row that goes without
        cost = torch.cat([2 - cosines, torch.full((F,), 3.0)]).double()  # positive, and highest without
        graph = csr_matrix((cost.numpy(), (row.numpy(), column.numpy())), shape=(F, G + F))
        rows, columns = min_weight_full_bipartite_matching(graph)
        rows, columns = rows[columns < G], columns[columns < G]
    partner[torch.from_numpy(rows).long()] = torch.from_numpy(columns).long()
    return partner


def paired_cosine(source: Tensor, target: Tensor, partner: Tensor | None) -> Tensor:
    """Cosine (F) of each row (F, D) with its partner among rows (G, D); NaN without one."""
    if partner is None:
        return (_unit(source) * _unit(target)).sum(dim=1)
    cosines = (_unit(source) * _unit(target)[partner.to(target.device)]).sum(dim=1)
    return cosines.masked_fill((partner < 0).to(target.device), torch.nan)


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


# --- activations on the same tokens -----------------------------------------------------------------------------


class Firing:
    """Sums over tokens of a dictionary's codes: how often, Σz and Σz² of each latent, in float64."""

    def __init__(self, n_latents: int, device: torch.device) -> None:
        self.count = torch.zeros(n_latents, dtype=torch.long, device=device)
        self.total, self.squares = (torch.zeros(n_latents, dtype=torch.float64, device=device) for _ in range(2))

    def add(self, codes: Codes) -> None:
        """Take in a batch."""
        latents, values = codes.columns.long(), codes.values.double()
        self.count.index_add_(0, latents, (values > 0).long())
        self.total.index_add_(0, latents, values)
        self.squares.index_add_(0, latents, values.square())


class Pair(NamedTuple):
    """Two legs to compare."""

    kind: Kind
    source: Leg
    target: Leg


class Comparison:
    """Two legs while their codes go by: partners and cosines, known from the start, and Σ z·z' (F) of partners."""

    def __init__(self, pair: Pair, carried: Dictionary, other: Dictionary, by_index: bool) -> None:
        self.pair = pair
        self.partner = None if by_index else assign(carried.W_dec, other.W_dec).to(other.W_dec.device)
        self.decoder_cosine = paired_cosine(carried.W_dec, other.W_dec, self.partner)
        self.encoder_cosine = paired_cosine(carried.W_enc, other.W_enc, self.partner)
        self.products = torch.zeros_like(self.decoder_cosine, dtype=torch.float64)

    def add(self, source: Codes, target: Codes, scratch: Tensor) -> None:
        """Take in the codes of a batch; `scratch` (at least G) is zero, and left so."""
        n_rows, G = len(scratch) // target.n_latents, target.n_latents
        for z, other in zip(split_codes(source, n_rows), split_codes(target, n_rows), strict=True):
            places, latents = other.rows() * G + other.columns, z.columns.long()
            partners = latents if self.partner is None else self.partner[latents]
            scratch[places] = other.values
            met = scratch[z.rows() * G + partners.clamp(min=0)]  # without a partner, anything: `link` leaves it out
            self.products.index_add_(0, latents, (z.values * met).double())
            scratch[places] = 0

    def link(self, source: Firing, target: Firing, n_tokens: int) -> Link:
        """What was found."""
        partner = (
            torch.arange(len(self.products), device=self.products.device) if self.partner is None else self.partner
        )
        count, total, squares = (
            torch.where(partner >= 0, sums[partner], 0) for sums in (target.count, target.total, target.squares)
        )
        covariance = self.products - source.total * total / n_tokens
        variances = (source.squares - source.total.square() / n_tokens) * (squares - total.square() / n_tokens)
        correlation = (covariance / variances.sqrt()).masked_fill((source.count == 0) | (count == 0), torch.nan)
        return Link(
            kind=self.pair.kind,
            source=self.pair.source.id,
            target=self.pair.target.id,
            source_layer=self.pair.source.layer,
            target_layer=self.pair.target.layer,
            partner=None if self.partner is None else self.partner.cpu(),
            decoder_cosine=self.decoder_cosine.cpu(),
            encoder_cosine=self.encoder_cosine.cpu(),
            correlation=correlation.float().cpu(),
            status=status(self.decoder_cosine, source.count > ALIVE_ABOVE, count > ALIVE_ABOVE),
        )


def status(decoder_cosine: Tensor, source_alive: Tensor, target_alive: Tensor) -> str:
    """One letter a latent (see the top of this file); all (F), `target_alive` that of its partner.

    >>> before, after = torch.tensor([1, 1, 1, 1, 0, 0]).bool(), torch.tensor([1, 1, 1, 0, 1, 0]).bool()
    >>> status(torch.tensor([0.9, 0.5, 0.1, 0.9, 0.9, 0.9]), before, after)
    'kdrxb-'
    """
    letters = []
    for cosine, before, after in zip(
        decoder_cosine.tolist(), source_alive.tolist(), target_alive.tolist(), strict=True
    ):
        alike = "k" if cosine > KEPT_ABOVE else "r" if cosine < REPLACED_BELOW else "d"
        letters.append(alike if before and after else "x" if before else "b" if after else "-")
    return "".join(letters)


# --- a run's lineage --------------------------------------------------------------------------------------------


def pairs_of(suite: PublishedSuite) -> list[Pair]:
    """Which legs are compared. A parent outside the run has no link."""
    published = {leg.id: leg for leg in suite.legs}
    pairs = [Pair("hop", published[leg.parent], leg) for leg in suite.legs if leg.parent in published]
    for leg in suite.one_per_site:
        above = neighbours(suite, leg)["above"]
        pairs += [Pair("depth", leg, above)] if above else []
    pairs += [Pair("control", published[leg.control_of], leg) for leg in suite.legs if leg.control_of in published]
    return sorted(pairs, key=lambda pair: (_KINDS.index(pair.kind), pair.source.site, pair.target.site))


def ancestor(plan: Plan, leg: Leg) -> str:
    """The root that a leg's latents have their index from, or the directory of one outside the run.

    A leg with more or fewer latents than its parent is a root of its own.
    """
    while leg.parent:
        parent = plan.leg(leg.parent).dictionary if plan.has(leg.parent) else plan.externals[leg.parent]
        if parent.n_latents != leg.dictionary.n_latents:
            return leg.id
        if not plan.has(leg.parent):
            return leg.parent
        leg = plan.leg(leg.parent)
    return leg.id


@torch.no_grad()
def lineage_run(
    suite: PublishedSuite,
    model: LanguageModel | None = None,
    *,
    tokens: int = 0,
    features: bool = False,
    maps: SiteMaps | None = None,
    console: Console | None = None,
) -> Lineage:
    """Find what became of each latent of a run, on the test split, unless it is known already; writes lineage.json.

    With `features`, also what `features_run` does, from the same pass over the tokens. `tokens` are the recipe's
    `evaluate.tokens` unless given. `model` may be None to load it only if something is left to do, `maps` to fit
    them only then.
    """
    plan, paths, sequences = suite.plan, suite.directory, held_out_sequences(suite, tokens)
    known = is_known(suite, len(sequences))
    pairs, legs = [] if known else pairs_of(suite), without_features(suite, tokens) if features else []
    if known and not legs:
        return Lineage.load(paths.root)
    model = model or load_model(plan)
    device, wanted = model.device, legs if known else suite.legs
    dictionaries = {leg.id: (leg.site, suite[leg.id].to(device)) for leg in wanted}
    sites = neighbour_pairs(suite, legs) + [(pair.source.site, pair.target.site) for pair in pairs]
    maps = maps or SiteMaps.of(suite, model, console)
    between = maps.between(sites)
    comparisons = []
    for pair in pairs:
        carried = fold(dictionaries[pair.source.id][1], between[pair.source.site, pair.target.site])
        by_index = ancestor(plan, pair.source) == ancestor(plan, pair.target)
        comparisons.append(Comparison(pair, carried, dictionaries[pair.target.id][1], by_index))
    firing = {key: Firing(d.n_latents, device) for key, (_, d) in dictionaries.items()}
    collectors = {leg.id: Collector(leg.dictionary.n_latents, sequences.shape[1], device) for leg in legs}
    scratch = torch.zeros(max(DENSE, *(d.n_latents for _, d in dictionaries.values())), device=device)
    n_tokens = 0
    for batch in encode_batches(plan, model, sequences, dictionaries, console):
        n_tokens += len(batch.places)
        for key, codes in batch.codes.items():
            firing[key].add(codes)
        for key, collector in collectors.items():
            collector.add(batch, batch.codes[key])
        for c in comparisons:
            c.add(batch.codes[c.pair.source.id], batch.codes[c.pair.target.id], scratch)
    write_features(suite, model, {key: collector.result() for key, collector in collectors.items()}, between, tokens)
    if not known:
        links = [c.link(firing[c.pair.source.id], firing[c.pair.target.id], n_tokens) for c in comparisons]
        facts = asked_of(suite, len(sequences)) | {"n_tokens": n_tokens, "map_tokens": maps.tokens}
        document = finite(facts | {"links": [_link_to_json(link) for link in links]})
        write_text(paths.lineage, json.dumps(document, allow_nan=False, separators=(",", ":")) + "\n")
    return Lineage.load(paths.root)


def asked_of(suite: PublishedSuite, n_sequences: int) -> dict[str, Any]:
    """What lineage.json says of itself that follows from what was asked."""
    legs = {leg.id: {"layer": leg.layer, "n_latents": leg.dictionary.n_latents} for leg in suite.legs}
    return {
        "schema": SCHEMA_VERSION,
        "model": suite.plan.facts.name,
        "n_sequences": n_sequences,
        "kept_above": KEPT_ABOVE,
        "replaced_below": REPLACED_BELOW,
        "alive_above": ALIVE_ABOVE,
        "legs": legs,
    }


def is_known(suite: PublishedSuite, n_sequences: int) -> bool:
    """Whether lineage.json is there, and for what is asked."""
    if not suite.directory.lineage.is_file():
        return False
    facts = Lineage.load(suite.directory.root).facts
    return facts | asked_of(suite, n_sequences) == facts


def _link_to_json(link: Link) -> dict[str, Any]:
    lists = {
        name: [round(value, 4) for value in getattr(link, name).tolist()]
        for name in ("decoder_cosine", "encoder_cosine", "correlation")
    }
    by, partner = ("index", None) if link.partner is None else ("assignment", link.partner.tolist())
    return vars(link) | {"by": by, "partner": partner} | lists


def _link_from_json(data: dict[str, Any]) -> Link:
    def floats(values: list[float | None]) -> Tensor:
        return torch.tensor([torch.nan if value is None else value for value in values])

    own: dict[str, Any] = {"partner": None if data.pop("by") == "index" else torch.tensor(data["partner"])}
    own |= {name: floats(data[name]) for name in ("decoder_cosine", "encoder_cosine", "correlation")}
    return Link(**(data | own))


# --- one latent -------------------------------------------------------------------------------------------------


def describe_latent(suite: PublishedSuite, leg: str, latent: int, *, console: Console | None = None) -> dict[str, Any]:
    """All that is known of one latent, as JSON: what `saerelay show --json` prints (see docs/run-directory.md).

    `leg` is an id, or the number of a layer. Features and lineage of the run are made if they are not there. Raises
    RunDirectoryError if there is no such leg or latent.
    """
    chosen, plan = suite.leg(leg), suite.plan
    check_latent(chosen.id, latent, chosen.dictionary.n_latents)
    lineage = lineage_run(suite, features=True, console=console)
    features, sequences = load_features(suite.directory, chosen.id), Corpus.open(suite.directory.tokens).test
    text, facts, tensors = token_texts(plan), features.facts, features.tensors()
    examples = []
    for example in features.examples(latent):
        tokens = sequences[example.sequence, example.start : example.start + len(example.activations)].tolist()
        examples.append(example._asdict() | {"tokens": [text(token) for token in tokens], "token_ids": tokens})
    logits = {}
    for name in ("top_logits", "bottom_logits"):
        if name in tensors:
            pairs = zip(tensors[name][latent].tolist(), tensors[f"{name}_values"][latent].tolist(), strict=True)
            logits[name] = [{"token": text(token), "token_id": token, "value": value} for token, value in pairs]
    similar = {}
    for side in ("above", "below"):
        if facts[side]:
            pairs = zip(*(tensors[f"{side}_{name}"][latent].tolist() for name in ("latents", "cosine")), strict=True)
            similar[side] = {"leg": facts[side], "latents": [{"latent": i, "cosine": c} for i, c in pairs]}
    return {
        "leg": chosen.id,
        "layer": chosen.layer,
        "latent": latent,
        "model": plan.facts.name,
        "n_tokens": facts["n_tokens"],
        "n_fired": int(features.n_fired[latent]),
        "max_activation": float(features.max_activation[latent]),
        "mean_activation": float(features.mean_activation[latent]),
        "histogram": {"first_edge": facts["histogram_first_edge"], "counts": features.histogram[latent].tolist()},
        "examples": examples,
        **logits,
        "lineage": [step._asdict() for step in lineage.follow(chosen.id, latent)],
        "relatives": [{"kind": kind} | step._asdict() for kind, step in lineage.relatives(chosen.id, latent)],
        "similar": similar,
        "interpretation": interpretation(suite.directory, chosen.id, latent),
    }


def interpretation(paths: RunDirectory, leg_id: str, latent: int) -> dict[str, Any] | None:
    """What a language model made of a latent: its name, the explanation, its scores; None if it was not asked."""
    path = paths.interpretation(leg_id)
    document: dict[str, Any] = read_json(path) if path.is_file() else {"latents": []}
    for entry in document["latents"]:
        if entry["latent"] == latent and entry["explanation"]:
            scores = {name: entry[name] for name in ("explanation", "detection", "fuzzing")}
            return {"model": document["asked"]["model"]} | scores
    return None


def token_texts(plan: Plan) -> Callable[[int], str]:
    """What gives the text of a token, or its number where the model comes without a tokenizer."""
    try:
        tokenizer = load_tokenizer(plan.run.model.model_copy(update={"revision": plan.facts.revision}))
    except ModelError:
        return lambda token: f"<{token}>"
    return partial(token_text, tokenizer)
