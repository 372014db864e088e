"""Which pieces of text are put before a reader: the strongest to explain a latent from, others to score it on.

Texts are pieces of the test split, of one length, cut without regard to where the latent fires.
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
"""The strongest pieces, which the explanation is made from; at most a third of all that the latent fires in."""
QUANTILES = 5
"""Ranges of strength, with the same number of pieces each, that scores are drawn from."""
PER_QUANTILE = 8
"""Pieces drawn from one quantile, at most."""
FEWEST = 20
"""Pieces that a latent must fire in to be explained."""
PER_QUESTION = 5
"""Pieces in one question."""

Kind = Literal["detection", "fuzzing"]
KINDS: tuple[Kind, ...] = ("detection", "fuzzing")


class Piece(NamedTuple):
    """A piece of text put before a reader."""

    tokens: tuple[int, ...]
    levels: tuple[int, ...]
    """Of each token: its activation over the latent's largest, in tenths, rounded up; 0 where it does not fire."""
    quantile: int
    """Of its strongest activation among those drawn from, 0 the strongest; -1 where the latent does not fire."""
    marked: tuple[int, ...]
    """Positions between «»."""
    truth: bool
    """Detection: the latent fires in it. Fuzzing: what is marked is what it fires on."""


@dataclass(frozen=True)
class Subject:
    """One latent, and the pieces that it is explained from and scored on; none where it fires in too few."""

    latent: int
    n_pieces: int
    """Distinct pieces it fires in."""
    explained: list[Piece]
    """What the explanation is made from, the strongest first."""
    detection: list[Piece]
    fuzzing: list[Piece]

    def questions(self, kind: Kind) -> list[list[Piece]]:
        """The pieces of one kind, PER_QUESTION at a time."""
        pieces = self.detection if kind == "detection" else self.fuzzing
        return [pieces[start : start + PER_QUESTION] for start in range(0, len(pieces), PER_QUESTION)]


def draw(latent: int, pieces: np.ndarray, activations: np.ndarray, seed: int) -> Subject:
    """What is asked about a latent with activations (M, W) on the tokens of distinct pieces (M, W).

    The explanation sees the strongest. Of the rest, in QUANTILES of equal size by their strongest activation, up to
    PER_QUANTILE are drawn of each: half of them have the tokens marked on which the latent fires, half as many others
    of theirs (fuzzing). The first half serve detection too, with as many pieces in which it does not fire. What is
    drawn depends on the seed and on where the latent fires, not on its number or leg.
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
            off = np.flatnonzero(activations[i] == 0)
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
    """The first n latents, in a random order of all numbers, of those that fire on at least FEWEST tokens.

    `n_fired` (F) is how often each fires.

    >>> drawn_latents(np.array([0, 50, 20, 19]), 8, seed=0)
    [1, 2]
    """
    order = np.random.default_rng(seed_from("latents", seed)).permutation(len(n_fired))
    return sorted(order[n_fired[order] >= FEWEST][:n].tolist())


# --- where chosen latents fire --------------------------------------------------------------------------------------

Firings = tuple[np.ndarray, np.ndarray]
"""Positions, counted through all sequences, and activations there."""


def subjects_of(session: Session, chosen: Mapping[str, Sequence[int]], seed: int) -> dict[str, list[Subject]]:
    """The subjects of chosen latents by leg, from one pass over the test split."""
    sequences = session.held_out()
    n_sequences, context = sequences.shape
    length = min(LENGTH, context)
    pieces = sequences[:, : context // length * length].reshape(-1, length)
    # A piece that occurs twice is used once: what is shown must not be scored under another number.
    distinct = np.unique(pieces, axis=0, return_index=True)[1]
    distinct.sort()

    fired = firings(session, sequences, chosen)
    subjects = {}
    for leg_id, latents in chosen.items():
        subjects[leg_id] = []
        for latent in latents:
            positions, values = fired[leg_id, latent]
            activations = dense(positions, values, (n_sequences, context), length)
            subjects[leg_id].append(draw(latent, pieces[distinct], activations[distinct], seed))
    return subjects


def firings(
    session: Session, sequences: np.ndarray, chosen: Mapping[str, Sequence[int]]
) -> dict[tuple[str, int], Firings]:
    """Where chosen latents of legs fire on sequences (N, C), and how strongly, by (leg, latent).

    One pass; only the firings of the chosen are kept, 12 bytes each.
    """
    suite = session.suite
    parts: dict[tuple[str, int], list[Firings]] = {}
    dictionaries = {}
    for leg_id, latents in chosen.items():
        dictionaries[leg_id] = (suite.plan.leg(leg_id).site, suite[leg_id])
        for latent in latents:
            parts[leg_id, latent] = [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))]

    batches = encode_batches(session.plan, session.model, sequences, dictionaries, track=session.display.track)
    for batch in batches:
        for leg_id, latents in chosen.items():
            codes = batch.codes[leg_id]
            is_chosen = torch.zeros(codes.n_latents, dtype=torch.bool, device=codes.columns.device)
            is_chosen[list(latents)] = True
            fires = is_chosen[codes.columns] & (codes.values > 0)
            columns = codes.columns[fires].cpu().numpy()
            values = codes.values[fires].float().cpu().numpy()
            spots = batch.spots[codes.rows()[fires]].cpu().numpy()
            positions = spots + batch.first * sequences.shape[1]
            for latent in np.unique(columns).tolist():
                of_latent = columns == latent
                parts[leg_id, latent].append((positions[of_latent], values[of_latent]))

    joined = {}
    for key, latent_parts in parts.items():
        positions = np.concatenate([part[0] for part in latent_parts])
        values = np.concatenate([part[1] for part in latent_parts])
        joined[key] = (positions, values)
    return joined


def dense(positions: np.ndarray, values: np.ndarray, shape: tuple[int, int], length: int) -> np.ndarray:
    """Activations (M, length) of all pieces of sequences of a shape (N, C), from positions and values.

    >>> dense(np.array([1, 4, 7]), np.array([1.0, 2.0, 3.0]), (2, 5), 2).tolist()
    [[0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [3.0, 0.0]]

    What is left at the end of a sequence is dropped.
    """
    n_sequences, context = shape
    flat = np.zeros(n_sequences * context, dtype=np.float32)
    flat[positions] = values
    whole = context // length * length
    return flat.reshape(shape)[:, :whole].reshape(-1, length)
