"""Cheaper in what? What a suite takes of samples, tokens, operations and time, beside the same layers from scratch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from saerelay.planning.cost import Cost
from saerelay.runs.documents.quality import ScratchCost, SuiteCost, Summary
from saerelay.spec import format_count
from saerelay.views.text import duration, flops, is_number, listed

EQUAL = 1.05
"""Costs that differ by less than this factor count as the same."""
OPERATIONS = "operations"
"""The price by which training from scratch is made comparable."""


@dataclass(frozen=True)
class Price:
    """One thing that training takes: how much a suite takes of it, and all layers from scratch."""

    name: str
    ours: float
    theirs: float
    shown: tuple[str, str]

    @property
    def factor(self) -> str:
        """How many times as much the dearer one takes, in words."""
        if self.ours <= self.theirs:
            return f"{self.theirs / self.ours:.1f} times less"
        return f"{self.ours / self.theirs:.1f} times more"


def plan_prices(ours: Cost, theirs: Cost, seconds: tuple[float, float] | None) -> list[Price]:
    """What a plan takes without its controls, beside all of its layers from scratch."""
    return _prices(ours, theirs, seconds)


def summary_prices(summary: Summary) -> list[Price]:
    """What a suite took, its survey included, beside all of its layers from scratch."""
    ours = summary.cost.with_survey
    theirs = ours.from_scratch
    seconds = None
    if is_number(ours.seconds) and is_number(theirs.seconds_estimate):
        seconds = (ours.seconds, theirs.seconds_estimate)
    return _prices(ours, theirs, seconds)


def _prices(ours: Cost | SuiteCost, theirs: Cost | ScratchCost, seconds: tuple[float, float] | None) -> list[Price]:
    prices = [
        _price("SAE samples", ours.sae_samples, theirs.sae_samples, _count),
        _price("tokens of the language model", ours.lm_tokens, theirs.lm_tokens, _count),
        _price(OPERATIONS, ours.flops, theirs.flops, flops),
        _price("operations of the language model", ours.lm_flops, theirs.lm_flops, flops),
    ]
    if seconds:
        prices.append(_price("time", *seconds, duration))
    return [price for price in prices if price.ours > 0 and price.theirs > 0]


def _price(name: str, ours: float, theirs: float, write: Callable[[float], str]) -> Price:
    return Price(name, ours, theirs, (write(ours), write(theirs)))


def _count(n: float) -> str:
    return format_count(round(n))


def savings_table(prices: Sequence[Price], tokens: int) -> Table:
    """One row for each thing that training takes; from scratch, every layer is trained on `tokens`."""
    table = Table(box=None, pad_edge=False, title="cheaper in what?", title_justify="left")
    table.add_column("")
    for name in ("this suite", f"from scratch, {format_count(tokens)} each", "the suite takes"):
        table.add_column(name, justify="right")
    for price in prices:
        table.add_row(price.name, *price.shown, price.factor)
    return table


def verdict(prices: Sequence[Price], tokens: int) -> Text:
    """Which of these a suite saves, and how long training from scratch may take for the same operations."""
    cheaper = [price.name for price in prices if price.ours * EQUAL < price.theirs]
    dearer = [price.name for price in prices if price.ours > EQUAL * price.theirs]
    if cheaper:
        sentence = f"The suite saves {listed(cheaper)}"
        if dearer:
            sentence += f"; it takes more {listed(dearer)}"
    else:
        sentence = "The suite saves nothing"

    operations = next(price for price in prices if price.name == OPERATIONS)
    affordable = tokens * operations.ours / operations.theirs
    return Text(
        f"{sentence}. For the same operations every layer can be trained from scratch on {_count(affordable)} "
        "tokens: that is what it has to beat."
    )
