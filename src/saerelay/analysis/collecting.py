"""Where the latents of many dictionaries fire most, and how strongly: one pass over held-out tokens for all of them.

Memory is bounded: a latent keeps its strongest examples so far, and the activations around an example are cut out of
the batch that contains it.

Shapes: B kept positions of a batch of S sequences of C positions each, D width, F latents, E examples of a latent, W
positions in the window around each example. A `spot` numbers the positions of a batch: sequence · C + position.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saerelay.analysis.metrics import Placed, batches
from saerelay.analysis.progress import HIDDEN, Track
from saerelay.data.kept import trained_on
from saerelay.lm.model import LanguageModel
from saerelay.planning.plan import Plan
from saerelay.runs.documents.latents import FeatureFacts
from saerelay.runs.features import Features
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.kernels import Codes, add_at, encode_sparse, join_codes
from saerelay.sae.threads import side_by_side
from saerelay.site import Site

EXAMPLES = 10
"""Number of examples kept per latent."""
WINDOW = (10, 5)
"""Positions kept before and after each example's strongest position."""
ENCODED = 2**20
"""Pre-activations that a thread computes at once (of at least 256 tokens), to stay in the CPU's cache."""
ENCODED_ON_GPU = 2**28
DENSE = 2**21
"""Numbers in a dense piece of codes, cosines or logits: 8 MiB."""
OCTAVES = (-32, 32)
"""Powers of two between which histograms extend; values outside count in the outermost bins."""
BINS = 2 * (OCTAVES[1] - OCTAVES[0])


class CodedBatch(NamedTuple):
    """A batch of held-out sequences, encoded."""

    first: int
    """Index of its first sequence among all sequences."""
    n_sequences: int
    spots: Tensor
    """int64 (B): the kept positions among the batch's S·C positions."""
    codes: dict[str, Codes]
    """Codes (B, F) of each dictionary, by key."""


@torch.no_grad()
def encode_batches(
    plan: Plan,
    model: LanguageModel,
    sequences: np.ndarray,
    dictionaries: Mapping[str, Placed | tuple[Site, Dictionary]],
    *,
    track: Track = HIDDEN.track,
) -> Iterator[CodedBatch]:
    """Encode held-out sequences (N, context) with all dictionaries, batch by batch, with one forward pass per batch."""
    on_device = {key: Placed.of(placed).on(model.device) for key, placed in dictionaries.items()}
    sites = plan.with_probe(placed.site for placed in on_device.values())
    first = 0
    for tokens in track(list(batches(plan, sequences, model.device)), "reading batches"):
        tokens = tokens.to(model.device)
        activations = model.harvest(tokens, sites)
        spots = trained_on(plan, tokens, activations).flatten().nonzero()[:, 0]
        rows = {site: x.flatten(0, 1)[spots].float() for site, x in activations.items()}
        pairs = [(placed.dictionary, rows[placed.site]) for placed in on_device.values()]
        codes = side_by_side(lambda pair: _encode(*pair), pairs, model.device)
        yield CodedBatch(first, len(tokens), spots, dict(zip(on_device, codes, strict=True)))
        first += len(tokens)


def _encode(dictionary: Dictionary, x: Tensor) -> Codes:
    at_once = ENCODED if x.device.type == "cpu" else ENCODED_ON_GPU
    n_rows = max(256, at_once // dictionary.n_latents)
    return join_codes([encode_sparse(dictionary, part) for part in x.split(n_rows)])


def collect(
    plan: Plan,
    model: LanguageModel,
    sequences: np.ndarray,
    dictionaries: Mapping[str, Placed | tuple[Site, Dictionary]],
    *,
    examples: int = EXAMPLES,
    window: tuple[int, int] = WINDOW,
    track: Track = HIDDEN.track,
) -> dict[str, Features]:
    """Collect examples, counts and histograms of dictionaries' latents, by key, on held-out sequences (N, context).

    Positions that are not kept (BOS, outlier norms) do not count. `window` gives the numbers of positions kept before
    and after an example's strongest position. Takes one pass; see `Features`.
    """
    collectors = {}
    for key, (_, dictionary, *_) in dictionaries.items():
        collectors[key] = Collector(dictionary.n_latents, sequences.shape, model.device, examples, window)
    for batch in encode_batches(plan, model, sequences, dictionaries, track=track):
        for key, collector in collectors.items():
            collector.add(batch, batch.codes[key])
    return {key: collector.features() for key, collector in collectors.items()}


class Collector:
    """Collects the features of one dictionary's latents; `shape` is that of all sequences (N, C)."""

    def __init__(
        self,
        n_latents: int,
        shape: tuple[int, ...],
        device: torch.device,
        examples: int = EXAMPLES,
        window: tuple[int, int] = WINDOW,
    ) -> None:
        F = n_latents
        E = examples
        W = window[0] + 1 + window[1]
        self.n_sequences, self.context = shape
        self.window = window
        self.n_tokens = 0
        self.n_fired = torch.zeros(F, dtype=torch.int32, device=device)
        self.total = torch.zeros(F, dtype=torch.float64, device=device)
        self.histogram = torch.zeros(F * BINS, dtype=torch.int32, device=device)
        # The examples of each latent, in decreasing order of activation; an activation of 0 marks a free slot.
        self.best = torch.zeros(F, E, device=device)
        self.spot = torch.zeros(F, E, dtype=torch.long, device=device)  # counted through all sequences
        self.around = torch.zeros(F, E, W, device=device)

    def add(self, batch: CodedBatch, codes: Codes) -> None:
        """Add the codes of a batch."""
        self.n_tokens += len(batch.spots)
        active = codes.values > 0
        latents = codes.columns[active].long()
        values = codes.values[active]
        spots = batch.spots[codes.rows()[active]]

        ones = torch.ones_like(latents, dtype=torch.int32)
        half_octaves = (2 * values.log2()).floor().long() - 2 * OCTAVES[0]
        bins = half_octaves.clamp(0, BINS - 1)
        self.n_fired.index_add_(0, latents, ones)
        add_at(self.total, latents, values.double())
        self.histogram.index_add_(0, latents * BINS + bins, ones)
        self._admit(batch, latents, spots, values)

    def _admit(self, batch: CodedBatch, latents: Tensor, spots: Tensor, values: Tensor) -> None:
        """Replace weaker examples by the batch's strongest, one per sequence; of equally strong ones, the first stays.

        The batch gives a table (F, S) of candidates: the highest activation of each latent in each sequence, and the
        first spot that reaches it. For latents with a candidate stronger than their weakest example, old examples and
        candidates are put side by side (E + S columns) and sorted, and the first E stay. A column index of E or more
        denotes a candidate, whose window must be cut out of the batch.
        """
        F, E = self.best.shape
        S = batch.n_sequences
        C = self.context
        cells = latents * S + spots // C
        highest = self.best.new_zeros(F * S).scatter_reduce_(0, cells, values, "amax")
        reached = values == highest[cells]
        first_spot = spots.new_full((F * S,), S * C).scatter_reduce_(0, cells[reached], spots[reached], "amin")
        highest = highest.view(F, S)
        first_spot = first_spot.view(F, S)

        changed = (highest.amax(dim=1) > self.best[:, -1]).nonzero()[:, 0]
        together = torch.cat([self.best[changed], highest[changed]], dim=1)
        best, order = together.sort(dim=1, descending=True, stable=True)
        best = best[:, :E]
        order = order[:, :E]

        old_columns = order.clamp(max=E - 1)[..., None].expand(-1, -1, self.around.shape[2])
        around = self.around[changed].gather(1, old_columns)
        row, slot = ((order >= E) & (best > 0)).nonzero(as_tuple=True)
        new_spots = first_spot[changed[row], order[row, slot] - E]
        around[row, slot] = self._windows(latents, spots, values, changed, row, new_spots, S * C)

        all_spots = torch.cat([self.spot[changed], batch.first * C + first_spot[changed]], dim=1)
        self.best[changed] = best
        self.spot[changed] = all_spots.gather(1, order)
        self.around[changed] = around

    def _windows(
        self, latents: Tensor, spots: Tensor, values: Tensor, some: Tensor, row: Tensor, centres: Tensor, n_spots: int
    ) -> Tensor:
        """Return the activations (n, W) of latents some[row] (n, ascending) around spots `centres` (n) of a batch.

        The codes of a few latents of `some` at a time are laid out densely (step, n_spots), so that a window is a slice
        of a row; afterwards, the entries that were filled are set back to zero.
        """
        before, after = self.window
        around = centres[:, None] + torch.arange(-before, after + 1, device=centres.device)
        same_sequence = around // self.context == centres[:, None] // self.context
        rank = latents.new_full((len(self.best),), -1)  # of each latent in `some`, or -1
        rank[some] = torch.arange(len(some), device=some.device)
        ranks = rank[latents]

        windows = self.best.new_zeros(around.shape)
        step = max(1, DENSE // n_spots)
        dense = values.new_zeros(step, n_spots)
        for low in range(0, len(some), step):
            in_piece = (ranks >= low) & (ranks < low + step)
            filled = (ranks[in_piece] - low, spots[in_piece])
            dense[filled] = values[in_piece]
            bounds = torch.tensor([low, low + step], device=row.device)
            first, stop = torch.searchsorted(row, bounds).tolist()
            wanted = slice(first, stop)
            windows[wanted] = dense[row[wanted, None] - low, around[wanted].clamp(0, n_spots - 1)]
            dense[filled] = 0
        return windows * same_sequence

    def features(self) -> Features:
        """Return the features that follow from activations."""
        F, E = self.best.shape
        counts = self.histogram.view(F, BINS)
        used = counts.sum(dim=0).nonzero()[:, 0].tolist() or [0]
        free = self.best <= 0
        return Features(
            facts=FeatureFacts(
                n_sequences=self.n_sequences,
                n_tokens=self.n_tokens,
                n_examples=E,
                context=self.context,
                window_before=self.window[0],
                window_after=self.window[1],
                histogram_first_edge=OCTAVES[0] + used[0] / 2,
            ),
            n_fired=self.n_fired.cpu(),
            max_activation=self.best[:, 0].cpu(),
            mean_activation=(self.total / self.n_fired.clamp(min=1)).float().cpu(),
            histogram=counts[:, used[0] : used[-1] + 1].clone().cpu(),
            example_sequence=(self.spot // self.context).masked_fill(free, -1).int().cpu(),
            example_position=(self.spot % self.context).masked_fill(free, 0).int().cpu(),
            example_window=self.around.cpu(),
        )
