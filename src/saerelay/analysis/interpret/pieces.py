"""The pieces of text shown to a reader: the strongest to explain a latent from, others to score the explanation on.

Pieces are taken from the test split, all of one length, cut without regard to where the latent fires.
Shapes: N sequences of C positions, M pieces of W positions, F latents.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from saerelay.analysis.collecting import encode_batches
from saerelay.analysis.session import Session
from saerelay.spec import seed_from

LENGTH = 32
"""Tokens in a piece of text, or the run's context if that is shorter."""
MOST_SHOWN = 20
"""Most pieces, the strongest, to explain a latent from; also at most a third of those in which it fires."""
QUANTILES = 5
"""Number of ranges of strength, with the same number of pieces each, from which pieces for scores are drawn."""
PER_QUANTILE = 8
"""Most pieces drawn from one quantile."""
FEWEST = 20
"""Least number of pieces in which a latent must fire to be explained."""
PER_QUESTION = 5
"""Pieces per question."""

Kind = Literal["detection", "fuzzing"]
KINDS: tuple[Kind, ...] = ("detection", "fuzzing")


class Piece(NamedTuple):
    """A piece of text shown to a reader."""

    tokens: tuple[int, ...]
    levels: tuple[int, ...]
    """Activation on each token over the latent's largest, in tenths, rounded up; 0 where it does not fire."""
    quantile: int
    """Quantile of its strongest activation among the pieces drawn from, 0 the strongest; -1 if it is not from one."""
    marked: tuple[int, ...]
    """Positions between «»."""
    truth: bool
    """Detection: whether the latent fires in it. Fuzzing: whether the marked tokens are those on which it fires."""


@dataclass(frozen=True)
class Subject:
    """One latent, and the pieces on which its explanation is based and scored; none if it fires in too few."""

    latent: int
    n_pieces: int
    """Number of distinct pieces in which it fires."""
    explained: list[Piece]
    """The pieces from which the explanation is made, the strongest first."""
    detection: list[Piece]
    fuzzing: list[Piece]

    def questions(self, kind: Kind) -> list[list[Piece]]:
        """Return the pieces of one kind, PER_QUESTION at a time."""
        pieces = self.detection if kind == "detection" else self.fuzzing
        return [pieces[start : start + PER_QUESTION] for start in range(0, len(pieces), PER_QUESTION)]


def draw(latent: int, pieces: np.ndarray, activations: np.ndarray, kept: np.ndarray, seed: int) -> Subject:
    """Draw the pieces for a latent with activations (M, W) on the tokens of distinct pieces (M, W).

    `kept`, bool (M, W), tells the positions that dictionaries see: all but BOS and outlier norms.

    The explanation is made from the strongest pieces. The rest are divided into QUANTILES of equal size by their
    strongest activation, and up to PER_QUANTILE are drawn from each. For fuzzing, half of these have the tokens marked
    on which the latent fires, and the other half the same number of other tokens that are kept. The first half also
    serve detection, with as many pieces in which the latent does not fire. The draw depends on the seed and on where
    the latent fires, not on its index or leg.
    """
    strength = activations.max(axis=1)
    firing = np.flatnonzero(strength)
    if len(firing) < FEWEST:
        return Subject(latent, len(firing), [], [], [])
    where_it_fires = hashlib.sha256(np.packbits(activations > 0).tobytes()).hexdigest()
    rng = np.random.default_rng(seed_from("interpret", seed, where_it_fires))
    levels = np.ceil(activations * (10 / strength.max())).astype(int).clip(0, 10)

    def piece(i: int, quantile: int, marked: Sequence[int], truth: bool) -> Piece:
        return Piece(tuple(pieces[i].tolist()), tuple(levels[i].tolist()), quantile, tuple(sorted(marked)), truth)

    falling = firing[np.argsort(-strength[firing], kind="stable")]
    n_explained = min(MOST_SHOWN, len(falling) // 3)
    explained = [piece(i, -1, np.flatnonzero(activations[i]).tolist(), True) for i in falling[:n_explained]]

    detection = []
    fuzzing = []
    for quantile, part in enumerate(np.array_split(falling[n_explained:], QUANTILES)):
        for number, i in enumerate(rng.permutation(part)[:PER_QUANTILE]):
            on = np.flatnonzero(activations[i])
            off = np.flatnonzero((activations[i] == 0) & kept[i])
            if number % 2 == 0:
                detection.append(piece(i, quantile, (), True))
                fuzzing.append(piece(i, quantile, on.tolist(), True))
            elif len(off):
                elsewhere = rng.choice(off, size=min(len(on), len(off)), replace=False)
                fuzzing.append(piece(i, quantile, elsewhere.tolist(), False))

    silent = np.flatnonzero(strength == 0)
    without = rng.choice(silent, size=min(len(detection), len(silent)), replace=False)
    detection += [piece(i, -1, (), False) for i in without]
    detection = [detection[i] for i in rng.permutation(len(detection))]
    fuzzing = [fuzzing[i] for i in rng.permutation(len(fuzzing))]
    return Subject(latent, len(firing), explained, detection, fuzzing)


def drawn_latents(n_fired: np.ndarray, n: int, seed: int) -> list[int]:
    """Draw n of the latents that fire on at least FEWEST tokens: the first n in a random order of all latents.

    `n_fired` (F) is the number of times that each latent fires.

    >>> drawn_latents(np.array([0, 50, 20, 19]), 8, seed=0)
    [1, 2]
    """
    order = np.random.default_rng(seed_from("latents", seed)).permutation(len(n_fired))
    return sorted(order[n_fired[order] >= FEWEST][:n].tolist())


# --- where chosen latents fire --------------------------------------------------------------------------------------

Firings = tuple[np.ndarray, np.ndarray]
"""Positions, numbered through all sequences, and the activations there."""


def subjects_of(session: Session, chosen: Mapping[str, Sequence[int]], seed: int) -> dict[str, list[Subject]]:
    """Return the subjects of chosen latents by leg, from one pass over the test split."""
    sequences = session.held_out()
    n_sequences, context = sequences.shape
    length = min(LENGTH, context)
    pieces = sequences[:, : context // length * length].reshape(-1, length)
    # A piece that occurs twice is used once, so that a piece shown in explaining is not also scored.
    distinct = np.unique(pieces, axis=0, return_index=True)[1]
    distinct.sort()

    fired, spots = firings(session, sequences, chosen)
    kept = dense(spots, np.ones(len(spots), dtype=np.float32), (n_sequences, context), length)[distinct] > 0
    subjects = {}
    for leg_id, latents in chosen.items():
        subjects[leg_id] = []
        for latent in latents:
            positions, values = fired[leg_id, latent]
            activations = dense(positions, values, (n_sequences, context), length)
            subjects[leg_id].append(draw(latent, pieces[distinct], activations[distinct], kept, seed))
    return subjects


def firings(
    session: Session, sequences: np.ndarray, chosen: Mapping[str, Sequence[int]]
) -> tuple[dict[tuple[str, int], Firings], np.ndarray]:
    """Find where chosen latents of legs fire on sequences (N, C), and how strongly, by (leg, latent).

    Also returns the positions that dictionaries see. Takes one pass; only the firings of the chosen latents are held,
    12 bytes each.
    """
    suite = session.suite
    parts: dict[tuple[str, int], list[Firings]] = {}
    seen = [np.empty(0, dtype=np.int64)]
    dictionaries = {}
    for leg_id, latents in chosen.items():
        dictionaries[leg_id] = (suite.plan.leg(leg_id).site, suite[leg_id])
        for latent in latents:
            parts[leg_id, latent] = [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))]

    batches = encode_batches(session.plan, session.model, sequences, dictionaries, track=session.display.track)
    for batch in batches:
        start = batch.first * sequences.shape[1]
        seen.append(batch.spots.cpu().numpy() + start)
        for leg_id, latents in chosen.items():
            codes = batch.codes[leg_id]
            is_chosen = torch.zeros(codes.n_latents, dtype=torch.bool, device=codes.columns.device)
            is_chosen[list(latents)] = True
            fires = is_chosen[codes.columns] & (codes.values > 0)
            columns = codes.columns[fires].cpu().numpy()
            values = codes.values[fires].float().cpu().numpy()
            positions = batch.spots[codes.rows()[fires]].cpu().numpy() + start
            for latent in np.unique(columns).tolist():
                of_latent = columns == latent
                parts[leg_id, latent].append((positions[of_latent], values[of_latent]))

    joined = {}
    for key, latent_parts in parts.items():
        positions = np.concatenate([part[0] for part in latent_parts])
        values = np.concatenate([part[1] for part in latent_parts])
        joined[key] = (positions, values)
    return joined, np.concatenate(seen)


def dense(positions: np.ndarray, values: np.ndarray, shape: tuple[int, int], length: int) -> np.ndarray:
    """Return the activations (M, length) of all pieces of sequences of a shape (N, C), from positions and values.

    >>> dense(np.array([1, 4, 7]), np.array([1.0, 2.0, 3.0]), (2, 5), 2).tolist()
    [[0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [3.0, 0.0]]

    An incomplete piece at the end of a sequence is dropped.
    """
    n_sequences, context = shape
    flat = np.zeros(n_sequences * context, dtype=np.float32)
    flat[positions] = values
    whole = context // length * length
    return flat.reshape(shape)[:, :whole].reshape(-1, length)
