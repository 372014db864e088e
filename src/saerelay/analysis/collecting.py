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
NUMBERS_PER_PIECE = 2**21
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


class ActiveCodes(NamedTuple):
    """The codes of one dictionary above zero in a batch, one after the other; n of them."""

    latents: Tensor
    """int64 (n)."""
    spots: Tensor
    """int64 (n)."""
    values: Tensor
    """(n)."""

    @classmethod
    def of(cls, batch: CodedBatch, codes: Codes) -> "ActiveCodes":
        """The active ones among the codes (B, F) of a batch."""
        active = codes.values > 0
        return cls(codes.columns[active].long(), batch.spots[codes.rows()[active]], codes.values[active])


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
    for key, placed in dictionaries.items():
        n_latents = Placed.of(placed).dictionary.n_latents
        collectors[key] = Collector(n_latents, sequences.shape, model.device, examples, window)
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
        before, after = window
        W = before + 1 + after
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
        active = ActiveCodes.of(batch, codes)
        ones = torch.ones_like(active.latents, dtype=torch.int32)
        half_octaves = (2 * active.values.log2()).floor().long() - 2 * OCTAVES[0]
        bins = half_octaves.clamp(0, BINS - 1)
        self.n_fired.index_add_(0, active.latents, ones)
        add_at(self.total, active.latents, active.values.double())
        self.histogram.index_add_(0, active.latents * BINS + bins, ones)
        self._admit(batch, active)

    def _admit(self, batch: CodedBatch, active: ActiveCodes) -> None:
        """Replace weaker examples by the batch's strongest, one per sequence; of equally strong ones, the first stays.

        How to see this: the batch gives each latent S candidates, the strongest activation in each sequence. For the J
        latents with a candidate stronger than their weakest example, the E old examples and the S candidates are put
        side by side and sorted, and the first E of them stay. A column of E or more of these E + S columns is a
        candidate, whose window must be cut out of the batch.
        """
        E = self.best.shape[1]
        candidates, candidate_spots = self._candidates(batch, active)
        changed = (candidates.amax(dim=1) > self.best[:, -1]).nonzero()[:, 0]  # (J)
        old_and_new = torch.cat([self.best[changed], candidates[changed]], dim=1)  # (J, E + S)
        in_order, columns = old_and_new.sort(dim=1, descending=True, stable=True)
        best = in_order[:, :E]
        columns = columns[:, :E]

        # Old examples take their windows along; those of candidates are filled in afterwards.
        old_columns = columns.clamp(max=E - 1)[..., None].expand(-1, -1, self.around.shape[2])
        around = self.around[changed].gather(1, old_columns)  # (J, E, W)
        is_new = (columns >= E) & (best > 0)
        row, slot = is_new.nonzero(as_tuple=True)
        new_spots = candidate_spots[changed[row], columns[row, slot] - E]
        around[row, slot] = self._windows(batch, active, changed, row, new_spots)

        spots_before = batch.first * self.context
        old_and_new_spots = torch.cat([self.spot[changed], spots_before + candidate_spots[changed]], dim=1)
        self.best[changed] = best
        self.spot[changed] = old_and_new_spots.gather(1, columns)
        self.around[changed] = around

    def _candidates(self, batch: CodedBatch, active: ActiveCodes) -> tuple[Tensor, Tensor]:
        """The highest activation of each latent in each sequence (F, S), and the first spot that reaches it (F, S)."""
        F = self.best.shape[0]
        S = batch.n_sequences
        cells = active.latents * S + active.spots // self.context
        highest = self.best.new_zeros(F * S).scatter_reduce_(0, cells, active.values, "amax")
        reaches = active.values == highest[cells]
        first_spot = active.spots.new_full((F * S,), S * self.context)
        first_spot.scatter_reduce_(0, cells[reaches], active.spots[reaches], "amin")
        return highest.view(F, S), first_spot.view(F, S)

    def _windows(self, batch: CodedBatch, active: ActiveCodes, some: Tensor, row: Tensor, centres: Tensor) -> Tensor:
        """Return the activations (n, W) of latents some[row] (n, ascending) around the spots `centres` (n) of a batch.

        How to see this: the codes of a few latents of `some` at a time are laid out densely, with a row of all spots
        for each latent, so that a window is a stretch of a row. Afterwards the filled entries are set back to zero.
        """
        before, after = self.window
        n_spots = batch.n_sequences * self.context
        around = centres[:, None] + torch.arange(-before, after + 1, device=centres.device)  # (n, W)
        is_inside = around // self.context == centres[:, None] // self.context  # in the centre's sequence
        around = around.clamp(0, n_spots - 1)

        rank = active.latents.new_full((len(self.best),), -1)  # of each latent in `some`, or -1
        rank[some] = torch.arange(len(some), device=some.device)
        ranks = rank[active.latents]

        windows = self.best.new_zeros(around.shape)
        n_at_once = max(1, NUMBERS_PER_PIECE // n_spots)
        dense = active.values.new_zeros(n_at_once, n_spots)
        for low in range(0, len(some), n_at_once):
            high = low + n_at_once
            in_piece = (ranks >= low) & (ranks < high)
            filled = (ranks[in_piece] - low, active.spots[in_piece])
            dense[filled] = active.values[in_piece]
            bounds = torch.tensor([low, high], device=row.device)
            first, stop = torch.searchsorted(row, bounds).tolist()
            windows[first:stop] = dense[row[first:stop, None] - low, around[first:stop]]
            dense[filled] = 0
        return windows * is_inside

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
