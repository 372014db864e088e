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
    """Position that `activations` begin at: windows are cut at the ends of a sequence."""
    activations: list[float]
    """Activations on the tokens around it, itself among them; 0 where the latent is silent or a position left out."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Features:
    """What the latents of one dictionary mean; the tensors of features/<id>.safetensors (see docs/run-directory.md)."""

    facts: FeatureFacts
    """How it was measured."""
    n_fired: Tensor
    """int32 (F): number of tokens each latent fires on."""
    max_activation: Tensor
    """(F)."""
    mean_activation: Tensor
    """(F): over the tokens it fires on; 0 if there are none."""
    histogram: Tensor
    """int32 (F, H): counts of activations in half octaves, from 2^`facts.histogram_first_edge` on."""
    example_sequence: Tensor
    """int32 (F, E): -1 for no example; by falling activation, at most one per sequence."""
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

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without those that are None."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def with_(self, **fields: Any) -> "Features":
        """The same features with some fields changed."""
        return replace(self, **fields)

    def examples(self, latent: int) -> list[Example]:
        """The strongest examples of a latent, by falling activation."""
        before, context = self.facts.window_before, self.facts.context
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
            # The window holds positions from `position - before` on; those outside the sequence are cut off.
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
    """What a features file says about itself, without its tensors; None if it is missing or of another schema."""
    if not path.is_file():
        return None
    data = read_facts(path, _REMEDY)
    if data.get("schema") != FeatureFacts.SCHEMA:
        return None
    return FeatureFacts.from_data(data, source=str(path))


def load_features(paths: RunDirectory, leg_id: str) -> Features:
    """What the latents of a leg mean, from its file; RunDirectoryError if there is none, or if it is damaged."""
    return Features.load(paths.features(leg_id))
