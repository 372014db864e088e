"""How much quality varies among legs that differ only in their seed."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from saerelay.runs.documents.quality import LegSummary


class Spread(NamedTuple):
    """A metric over seeds."""

    mean: float | None
    deviation: float | None
    """Standard deviation over seeds, taken as a sample (n − 1)."""


def spread(legs: Sequence[LegSummary], metric: str) -> Spread:
    """Mean and deviation of a metric over the seeds of a leg; None if it was not measured."""
    values = [getattr(leg, metric) for leg in legs]
    if len(values) < 2 or None in values:
        return Spread(None, None)
    return Spread(statistics.mean(values), statistics.stdev(values))


def found_again(legs: Sequence[LegSummary]) -> float | None:
    """Mean share of latents that repeats have in common with the first leg; None if it was not measured."""
    shares = [leg.found_again for leg in legs if leg.found_again is not None]
    return statistics.mean(shares) if shares else None
