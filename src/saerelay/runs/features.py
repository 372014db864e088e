"""What the latents of a dictionary mean, as tensors: `features/<id>.safetensors`.

Shapes: F latents, E examples of each, W positions around each example, H bins of a histogram.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from saerelay.errors import RunDirectoryError
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.latents import FeatureFacts
from saerelay.runs.tensors import damage_named, read_facts, read_tensors, write_tensors

_REMEDY = "delete it to have it made again"


class Example(NamedTuple):
    """A position on which a latent fires strongly."""

    sequence: int
    """Row of the tokens it comes from (of a run: of the test split)."""
    position: int
    """Position of the strongest token."""
    start: int
    """Position at which `activations` begin: windows are cut off at the ends of a sequence."""
    activations: list[float]
    """Activations on the tokens around `position`, and on it; 0 where the latent is silent or a position left out."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Features:
    """What the latents of one dictionary mean: the tensors of features/<id>.safetensors (see docs/run-directory.md)."""

    facts: FeatureFacts
    """The facts of the measurement."""
    n_fired: Tensor
    """int32 (F): number of tokens each latent fires on."""
    max_activation: Tensor
    """(F): largest activation."""
    mean_activation: Tensor
    """(F): mean activation over the tokens the latent fires on; 0 if there are none."""
    histogram: Tensor
    """int32 (F, H): counts of activations in bins of half an octave, from 2^`facts.histogram_first_edge` on."""
    example_sequence: Tensor
    """int32 (F, E): -1 for no example; in decreasing order of activation, at most one per sequence."""
    example_position: Tensor
    """int32 (F, E): position of the strongest token."""
    example_window: Tensor
    """(F, E, W): activations around the position."""
    top_logits: Tensor | None = None
    """int32 (F, 10): tokens whose logits the decoder row raises most; in `bottom_logits`, those it lowers most."""
    top_logits_values: Tensor | None = None
    bottom_logits: Tensor | None = None
    bottom_logits_values: Tensor | None = None
    above_latents: Tensor | None = None
    """int32 (F, 3): the most similar latents at the next layer; `below_latents`: at the previous layer."""
    above_cosine: Tensor | None = None
    below_latents: Tensor | None = None
    below_cosine: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without fields that are None."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def with_(self, **fields: Any) -> "Features":
        """The same features with some fields changed."""
        return replace(self, **fields)

    def examples(self, latent: int) -> list[Example]:
        """The strongest examples of a latent, in decreasing order of activation."""
        before = self.facts.window_before
        context = self.facts.context
        rows = zip(
            self.example_sequence[latent].tolist(),
            self.example_position[latent].tolist(),
            self.example_window[latent].tolist(),
            strict=True,
        )
        examples = []
        for sequence, position, window in rows:
            if sequence < 0:
                continue
            # The window holds positions from `position - before` on; positions outside the sequence are cut off.
            start = max(0, position - before)
            inside = window[start - position + before : context - position + before]
            examples.append(Example(sequence, position, start, inside))
        return examples

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        write_tensors(path, self.tensors(), {"facts": json.dumps(self.facts.to_data())})

    @classmethod
    def load(cls, path: Path) -> "Features":
        """Read a file; RunDirectoryError if it is missing, damaged or of another schema."""
        if not path.is_file():
            raise RunDirectoryError(f"{path}: no features here; {FeatureFacts.MADE_BY} makes them")
        facts = load_facts(path)
        if facts is None:
            raise RunDirectoryError(f"{path}: has another schema than {FeatureFacts.SCHEMA}; {_REMEDY}")
        tensors = read_tensors(path, _REMEDY)
        with damage_named(path, _REMEDY):
            return cls(facts=facts, **tensors)


def load_facts(path: Path) -> FeatureFacts | None:
    """Read the facts of a features file, without its tensors; None if it is missing or of another schema."""
    if not path.is_file():
        return None
    data = read_facts(path, _REMEDY)
    if data.get("schema") != FeatureFacts.SCHEMA:
        return None
    return FeatureFacts.from_data(data, source=str(path))


def load_features(paths: RunDirectory, leg_id: str) -> Features:
    """Read the features of a leg from its file; RunDirectoryError if there is none, or if it is damaged."""
    return Features.load(paths.features(leg_id))
