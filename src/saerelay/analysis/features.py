"""What each latent of a dictionary means: where it fires most, how strongly, which tokens it speaks for.

One pass over held-out documents serves all dictionaries. Memory is bounded: a latent keeps its strongest examples so
far, and the activations around one are cut out of the batch that brings it. Shapes: B kept positions of a batch of S
sequences of C positions, D model width, F latents, E examples a latent, W positions around each, V vocabulary.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor

from saerelay.analysis.evaluate import batches, held_out
from saerelay.analysis.site_maps import Pair, SiteMaps
from saerelay.data.corpus import Corpus
from saerelay.data.stream import trained_on
from saerelay.errors import RunDirectoryError
from saerelay.lm.model import LanguageModel, load_model
from saerelay.planning.plan import Leg, Plan
from saerelay.runs.directory import RunDirectory
from saerelay.runs.suite import PublishedSuite
from saerelay.runs.tensors import write_tensors
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.kernels import Codes, encode_sparse, join_codes
from saerelay.sae.threads import side_by_side
from saerelay.sae.transfer import AffineMap, fold
from saerelay.site import Site

SCHEMA_VERSION = 1
EXAMPLES, WINDOW = 10, (10, 5)
"""Examples a latent, and the positions shown before and after each."""
NEIGHBOURS, TOKENS = 3, 10
"""Similar latents shown of a neighbouring layer; tokens promoted, and suppressed."""
ENCODED = 2**20
"""Pre-activations that a thread makes at once, or 256 tokens' worth: they stay in a processor's cache."""
DENSE = 2**21
"""Numbers in a dense piece of codes, cosines or logits: 8 MiB."""
OCTAVES = (-32, 32)
"""Powers of two that histograms reach from and to; what is outside counts in the outermost bins."""
BINS = 2 * (OCTAVES[1] - OCTAVES[0])


class Example(NamedTuple):
    """A place where a latent fires strongly."""

    sequence: int
    """Row of the tokens it was found in (of a run: tokens/test.npy)."""
    position: int
    """Of the strongest token."""
    start: int
    """Position that `activations` begin at: windows are cut at the ends of a sequence."""
    activations: list[float]
    """Of the tokens around it, itself among them; 0 where it does not fire, and where positions are left out."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Features:
    """What the latents of one dictionary mean; the tensors of features/<id>.safetensors (see docs/run-directory.md)."""

    n_fired: Tensor
    """int32 (F)."""
    max_activation: Tensor
    """(F)."""
    mean_activation: Tensor
    """(F): over the tokens it fires on; 0 if there are none."""
    histogram: Tensor
    """int32 (F, H): counts of activations in half octaves from 2^`facts["histogram_first_edge"]` on."""
    example_sequence: Tensor
    """int32 (F, E): -1 where there is none; by falling activation, at most one a sequence."""
    example_position: Tensor
    """int32 (F, E)."""
    example_window: Tensor
    """(F, E, W): activations around the position."""
    top_logits: Tensor | None = None
    """int32 (F, 10): tokens whose logits the decoder row raises most, and `bottom_logits` those it lowers most."""
    top_logits_values: Tensor | None = None
    bottom_logits: Tensor | None = None
    bottom_logits_values: Tensor | None = None
    above_latents: Tensor | None = None
    """int32 (F, 3): the most similar latents at the next layer, and `below_latents` those at the previous one."""
    above_cosine: Tensor | None = None
    below_latents: Tensor | None = None
    below_cosine: Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without those that are not there."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def examples(self, latent: int) -> list[Example]:
        """The strongest examples of a latent, by falling activation."""
        before, context = self.facts["window_before"], self.facts["context"]
        found = []
        for sequence, position, window in zip(
            self.example_sequence[latent].tolist(),
            self.example_position[latent].tolist(),
            self.example_window[latent].tolist(),
            strict=True,
        ):
            if sequence >= 0:
                start = max(0, position - before)
                cut = window[start - position + before : context - position + before]
                found.append(Example(sequence, position, start, cut))
        return found


# --- one pass over held-out tokens ------------------------------------------------------------------------------


class Coded(NamedTuple):
    """A batch of held-out sequences, encoded."""

    first: int
    """Row of its first sequence."""
    n_sequences: int
    places: Tensor
    """int64 (B): which of the batch's S·C positions were kept."""
    codes: dict[str, Codes]
    """(B, F), by the dictionary's key."""


@torch.no_grad()
def encode_batches(
    plan: Plan,
    model: LanguageModel,
    sequences: np.ndarray,
    dictionaries: dict[str, tuple[Site, Dictionary]],
    console: Console | None = None,
) -> Iterator[Coded]:
    """Encode held-out sequences (N, context) with all dictionaries, batch by batch; one forward of the model each."""
    on_device = {key: (site, d.to(model.device)) for key, (site, d) in dictionaries.items()}
    sites = plan.with_probe(site for site, _ in on_device.values())
    silent, first = console is None or not console.is_terminal, 0
    for tokens in track(
        list(batches(plan, sequences, False)), "reading latents", console=console, transient=True, disable=silent
    ):
        tokens = tokens.to(model.device)
        harvested = model.harvest(tokens, sites)
        places = trained_on(plan, tokens, harvested).flatten().nonzero()[:, 0]
        rows = {site: x.flatten(0, 1)[places].float() for site, x in harvested.items()}
        pairs = [(d, rows[site]) for site, d in on_device.values()]
        codes = side_by_side(lambda pair: _encode(*pair), pairs, model.device)
        yield Coded(first, len(tokens), places, dict(zip(on_device, codes, strict=True)))
        first += len(tokens)


def _encode(dictionary: Dictionary, x: Tensor) -> Codes:
    n_rows = max(256, ENCODED // dictionary.n_latents)
    return join_codes([encode_sparse(dictionary, part) for part in x.split(n_rows)])


class Collector:
    """What is known of the latents of one dictionary so far."""

    def __init__(
        self,
        n_latents: int,
        context: int,
        device: torch.device,
        examples: int = EXAMPLES,
        window: tuple[int, int] = WINDOW,
    ) -> None:
        F, E, W = n_latents, examples, window[0] + 1 + window[1]
        self.context, self.window, self.n_tokens = context, window, 0
        self.n_fired = torch.zeros(F, dtype=torch.int32, device=device)
        self.total = torch.zeros(F, dtype=torch.float64, device=device)
        self.histogram = torch.zeros(F * BINS, dtype=torch.int32, device=device)
        self.best = torch.zeros(F, E, device=device)
        self.place = torch.zeros(F, E, dtype=torch.long, device=device)
        self.around = torch.zeros(F, E, W, device=device)

    def add(self, batch: Coded, codes: Codes) -> None:
        """Take in the codes of a batch."""
        self.n_tokens += len(batch.places)
        active = codes.values > 0
        latents, values = codes.columns[active].long(), codes.values[active]
        places = batch.places[codes.rows()[active]]
        ones = torch.ones_like(latents, dtype=torch.int32)
        bins = ((2 * values.log2()).floor().long() - 2 * OCTAVES[0]).clamp(0, BINS - 1)
        self.n_fired.index_add_(0, latents, ones)
        self.total.index_add_(0, latents, values.double())
        self.histogram.index_add_(0, latents * BINS + bins, ones)
        self._admit(batch, latents, places, values)

    def _admit(self, batch: Coded, latents: Tensor, places: Tensor, values: Tensor) -> None:
        """Let the batch's strongest examples, one a sequence, displace weaker ones; of equal ones, the first stays."""
        F, E, S, C = *self.best.shape, batch.n_sequences, self.context
        cells = latents * S + places // C
        highest = self.best.new_zeros(F * S).scatter_reduce_(0, cells, values, "amax")
        reached = values == highest[cells]
        where = places.new_full((F * S,), S * C).scatter_reduce_(0, cells[reached], places[reached], "amin").view(F, S)
        highest = highest.view(F, S)
        changed = (highest.amax(dim=1) > self.best[:, -1]).nonzero()[:, 0]
        best, order = torch.cat([self.best[changed], highest[changed]], dim=1).sort(dim=1, descending=True, stable=True)
        best, order = best[:, :E], order[:, :E]
        row, slot = ((order >= E) & (best > 0)).nonzero(as_tuple=True)
        around = self.around[changed].gather(1, order.clamp(max=E - 1)[..., None].expand(-1, -1, self.around.shape[2]))
        at = where[changed[row], order[row, slot] - E]
        around[row, slot] = self._windows(latents, places, values, changed, row, at, S * C)
        everywhere = torch.cat([self.place[changed], batch.first * C + where[changed]], dim=1)
        self.best[changed], self.place[changed], self.around[changed] = best, everywhere.gather(1, order), around

    def _windows(
        self, latents: Tensor, places: Tensor, values: Tensor, some: Tensor, row: Tensor, at: Tensor, n_places: int
    ) -> Tensor:
        """Activations (n, W) of latents some[row] (n, ascending) around places `at` (n), from a batch's codes."""
        before, after = self.window
        around = at[:, None] + torch.arange(-before, after + 1, device=at.device)
        inside = around // self.context == at[:, None] // self.context
        rank = latents.new_full((len(self.best),), -1)
        rank[some] = torch.arange(len(some), device=some.device)
        ranks, windows, step = rank[latents], self.best.new_zeros(around.shape), max(1, DENSE // n_places)
        dense = values.new_zeros(step, n_places)
        for low in range(0, len(some), step):
            mine = (ranks >= low) & (ranks < low + step)
            filled = (ranks[mine] - low, places[mine])
            dense[filled] = values[mine]
            wanted = slice(*torch.searchsorted(row, torch.tensor([low, low + step], device=row.device)).tolist())
            windows[wanted] = dense[row[wanted, None] - low, around[wanted].clamp(0, n_places - 1)]
            dense[filled] = 0
        return windows * inside

    def result(self) -> Features:
        """What the latents mean, without what does not come from activations."""
        counts = self.histogram.view(len(self.best), BINS)
        used = counts.sum(dim=0).nonzero()[:, 0].tolist() or [0]
        empty = self.best <= 0
        return Features(
            n_fired=self.n_fired.cpu(),
            max_activation=self.best[:, 0].cpu(),
            mean_activation=(self.total / self.n_fired.clamp(min=1)).float().cpu(),
            histogram=counts[:, used[0] : used[-1] + 1].clone().cpu(),
            example_sequence=(self.place // self.context).masked_fill(empty, -1).int().cpu(),
            example_position=(self.place % self.context).masked_fill(empty, 0).int().cpu(),
            example_window=self.around.cpu(),
            facts={
                "n_tokens": self.n_tokens,
                "window_before": self.window[0],
                "window_after": self.window[1],
                "histogram_first_edge": OCTAVES[0] + used[0] / 2,
                "context": self.context,
            },
        )


def collect(
    plan: Plan,
    model: LanguageModel,
    sequences: np.ndarray,
    dictionaries: dict[str, tuple[Site, Dictionary]],
    *,
    examples: int = EXAMPLES,
    window: tuple[int, int] = WINDOW,
    console: Console | None = None,
) -> dict[str, Features]:
    """Examples, counts and histograms of the latents of dictionaries, by key, on held-out sequences (N, context).

    Positions that are not kept (BOS, outlier norm) do not count. `window` is how many positions are kept before and
    after an example's strongest one. One pass; see `Features`.
    """
    C, device = sequences.shape[1], model.device
    collectors = {key: Collector(d.n_latents, C, device, examples, window) for key, (_, d) in dictionaries.items()}
    for batch in encode_batches(plan, model, sequences, dictionaries, console):
        for key, collector in collectors.items():
            collector.add(batch, batch.codes[key])
    return {key: collector.result() for key, collector in collectors.items()}


# --- what comes from weights ------------------------------------------------------------------------------------


@torch.no_grad()
def logit_effects(W_dec: Tensor, W_U: Tensor, n: int = TOKENS) -> dict[str, Tensor]:
    """The n tokens whose logits each decoder row (F, D) raises and lowers most, through an unembedding (V, D).

    >>> effects = logit_effects(torch.tensor([[2.0]]), torch.tensor([[1.0], [-3.0], [0.5]]), n=1)
    >>> effects["top_logits"].tolist(), effects["top_logits_values"].tolist(), effects["bottom_logits"].tolist()
    ([[0]], [[2.0]], [[1]])

    Direct logit attribution: what the row adds to the last residual stream, nothing in between counted.
    """
    found: dict[str, list[Tensor]] = {}
    for rows in W_dec.split(max(1, DENSE // W_U.shape[0])):
        effects = rows @ W_U.T
        for name, largest in (("top_logits", True), ("bottom_logits", False)):
            values, tokens = effects.topk(min(n, W_U.shape[0]), dim=1, largest=largest)
            found.setdefault(name, []).append(tokens.int().cpu())
            found.setdefault(f"{name}_values", []).append(values.half().cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
def most_similar(rows: Tensor, others: Tensor, n: int = NEIGHBOURS) -> tuple[Tensor, Tensor]:
    """For each decoder row (F, D), which n of others (G, D) have the highest cosine with it (F, n), and the cosines."""
    found, directions = [], torch.nn.functional.normalize(others, dim=1).T
    for part in torch.nn.functional.normalize(rows, dim=1).split(max(1, DENSE // len(others))):
        found.append((part @ directions).topk(min(n, len(others)), dim=1))
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


# --- a run's features -------------------------------------------------------------------------------------------


def neighbours(suite: PublishedSuite, leg: Leg) -> dict[str, Leg | None]:
    """The suite's legs at the next ("above") and previous ("below") layer, same module; of several, the first."""
    others = [other for other in suite.one_per_site if other.module == leg.module]
    return {
        "above": min((o for o in others if o.layer > leg.layer), key=lambda o: o.layer, default=None),
        "below": max((o for o in others if o.layer < leg.layer), key=lambda o: o.layer, default=None),
    }


def features_run(
    suite: PublishedSuite,
    model: LanguageModel | None = None,
    *,
    tokens: int = 0,
    maps: SiteMaps | None = None,
    console: Console | None = None,
) -> None:
    """Find what the latents of every published leg mean, on the test split; what is known already is not done again.

    Writes features/<id>.safetensors, which `load_features` reads. `tokens` are the recipe's `evaluate.tokens` unless
    given. `model` and `maps` may be None to load and fit them only if something is left to do.
    """
    legs = without_features(suite, tokens)
    if not legs:
        return
    plan, model = suite.plan, model or load_model(suite.plan)
    between = (maps or SiteMaps.of(suite, model, console)).between(neighbour_pairs(suite, legs))
    dictionaries = {leg.id: (leg.site, suite[leg.id]) for leg in legs}
    found = collect(plan, model, held_out_sequences(suite, tokens), dictionaries, console=console)
    write_features(suite, model, found, between, tokens)


def held_out_sequences(suite: PublishedSuite, tokens: int) -> np.ndarray:
    """The sequences (N, context) of the test split that are asked for."""
    test = Corpus.open(suite.directory.tokens).test
    return held_out(suite.plan, test, tokens or suite.plan.run.evaluate.tokens)


def neighbour_pairs(suite: PublishedSuite, legs: list[Leg]) -> list[Pair]:
    """The pairs of sites between which similar latents are looked for."""
    return [(leg.site, other.site) for leg in legs for other in neighbours(suite, leg).values() if other]


def asked_of(suite: PublishedSuite, leg: Leg, n_sequences: int) -> dict[str, Any]:
    """What a features file says of itself that follows from what was asked."""
    known = {
        "schema": SCHEMA_VERSION,
        "leg": leg.id,
        "layer": leg.layer,
        "n_sequences": n_sequences,
    }
    known |= {"n_examples": EXAMPLES, "window_before": WINDOW[0], "window_after": WINDOW[1]}
    return known | {side: other.id if other else None for side, other in neighbours(suite, leg).items()}


def without_features(suite: PublishedSuite, tokens: int = 0) -> list[Leg]:
    """The legs whose features are not there, or were asked for differently."""
    missing, n_sequences = [], len(held_out_sequences(suite, tokens))
    for leg in suite.legs:
        path = suite.directory.features(leg.id)
        if not path.is_file() or asked_of(suite, leg, n_sequences).items() - _facts(path).items():
            missing.append(leg)
    return missing


@torch.no_grad()
def write_features(
    suite: PublishedSuite, model: LanguageModel, found: dict[str, Features], maps: dict[Pair, AffineMap], tokens: int
) -> None:
    """Write what was collected of some legs, with what comes from weights: logits, and similar latents next door."""
    W_U = model.unembedding() if found and suite.plan.facts.has_lm_head else None
    n_sequences = len(held_out_sequences(suite, tokens))
    for leg_id, features in found.items():
        leg, dictionary = suite.plan.leg(leg_id), suite[leg_id].to(model.device)
        more = {} if W_U is None or leg.module == "attn_z" else logit_effects(dictionary.W_dec, W_U)
        for side, other in neighbours(suite, leg).items():
            if other:
                carried = fold(dictionary, maps[leg.site, other.site])
                latents, cosines = most_similar(carried.W_dec, suite[other.id].to(model.device).W_dec)
                more |= {f"{side}_latents": latents.int().cpu(), f"{side}_cosine": cosines.half().cpu()}
        facts = features.facts | asked_of(suite, leg, n_sequences)
        write_tensors(suite.directory.features(leg_id), features.tensors() | more, {"facts": json.dumps(facts)})


def load_features(paths: RunDirectory, leg_id: str) -> Features:
    """What the latents of a leg mean, from its file; RunDirectoryError if there is none, or it is damaged."""
    path = paths.features(leg_id)
    if not path.is_file():
        raise RunDirectoryError(f"{path}: no features here; `saerelay show {paths.root} {leg_id} 0` makes them")
    facts = _facts(path)
    try:
        return Features(facts=facts, **load_file(path))
    except (OSError, TypeError, safetensors.SafetensorError) as error:
        raise RunDirectoryError(f"{path}: damaged ({error}); delete it to have it made again") from None


def _facts(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["facts"])
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise RunDirectoryError(f"{path}: damaged ({error}); delete it to have it made again") from None
