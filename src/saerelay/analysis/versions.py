"""The legs of a run and their snapshots, with the tokens associated with their latents, for the measures to compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saerelay.analysis.collecting import collect
from saerelay.analysis.features import OFF_THE_STREAM, logit_effects
from saerelay.analysis.metrics import Placed, snapshot_key
from saerelay.analysis.session import Session
from saerelay.analysis.similarity import TokenAssociations
from saerelay.planning.leg import Leg
from saerelay.runs.features import Features, load_features
from saerelay.sae.dictionary import Dictionary


@dataclass(frozen=True, eq=False)
class LegVersion:
    """A leg, or a snapshot of it, with its live latents and their associated tokens."""

    leg: Leg
    tokens: int
    """Age of the leg or snapshot."""
    snapshot: bool
    dictionary: Dictionary
    alive: Tensor
    """bool (F): fired on the held-out tokens."""
    associations: TokenAssociations | None
    """None without a language-model head, or if decoder rows are not directions of the residual stream."""

    @property
    def facts(self) -> dict[str, Any]:
        """The fields that identify it in rows of measures.json."""
        return {"leg": self.leg.id, "layer": self.leg.layer, "tokens": self.tokens, "snapshot": self.snapshot}

    @property
    def key(self) -> str:
        """A key that is unique among versions."""
        return snapshot_key(self.leg.id, self.tokens) if self.snapshot else self.leg.id


def load_versions(session: Session, sequences: np.ndarray, W_U: Tensor | None) -> list[LegVersion]:
    """Load all published legs, each followed by its snapshots.

    The features files of legs tell which of their latents are alive; for snapshots, held-out sequences are read here.
    """
    suite = session.suite
    snapshots = {}
    for leg in suite.legs:
        for age in suite.directory.ages(leg):
            snapshots[leg.id, age] = suite.snapshot(leg, age)
    features = {}
    if snapshots:
        dictionaries = {}
        for (leg_id, age), dictionary in snapshots.items():
            dictionaries[snapshot_key(leg_id, age)] = Placed.at_home(suite.plan.leg(leg_id), dictionary)
        track = session.display.track
        features = collect(session.plan, session.model, sequences, dictionaries, window=(0, 0), track=track)

    versions = []
    for leg in suite.legs:
        dictionary = suite.dictionary(leg)
        leg_features = load_features(suite.directory, leg.id)
        age = suite.info(leg).tokens
        versions.append(leg_version(leg, age, False, dictionary, leg_features, sequences, W_U))
        for age in suite.directory.ages(leg):
            leg_features = features[snapshot_key(leg.id, age)]
            versions.append(leg_version(leg, age, True, snapshots[leg.id, age], leg_features, sequences, W_U))
    return versions


def leg_version(
    leg: Leg,
    age: int,
    snapshot: bool,
    dictionary: Dictionary,
    features: Features,
    sequences: np.ndarray,
    W_U: Tensor | None,
) -> LegVersion:
    """Return one version, with the tokens associated with its latents."""
    associations = None
    if W_U is not None and leg.site_out.module not in OFF_THE_STREAM:
        effects = features.tensors()
        if "top_logits" not in effects:  # snapshots have none yet
            effects = logit_effects(dictionary.W_dec.to(W_U.device), W_U)
        rows = features.example_sequence.long()
        positions = features.example_position.long()
        strongest = torch.from_numpy(sequences.astype(np.int64))[rows, positions].masked_fill(rows < 0, -1)
        associations = TokenAssociations(effects["top_logits"], effects["bottom_logits"], strongest)
    return LegVersion(leg, age, snapshot, dictionary, features.n_fired > 0, associations)


def finished(versions: Sequence[LegVersion]) -> dict[str, LegVersion]:
    """Return the finished legs by id, without snapshots."""
    return {version.leg.id: version for version in versions if not version.snapshot}
