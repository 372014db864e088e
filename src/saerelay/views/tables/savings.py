"""The cost of a suite in samples, tokens, operations and time, compared with the same layers from scratch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from saerelay.planning.cost import Cost
from saerelay.runs.documents.cost import ScratchCost, SuiteCost
from saerelay.runs.documents.quality import Summary
from saerelay.spec import format_count
from saerelay.views.text import duration, flops, is_number, listed

EQUAL = 1.05
"""Costs that differ by less than this factor count as the same."""
OPERATIONS = "operations"
"""The resource of which `verdict` gives training from scratch as much as the suite takes."""


@dataclass(frozen=True)
class Price:
    """One resource that training takes: how much of it a suite takes, and how much all layers from scratch take."""

    name: str
    ours: float
    theirs: float
    shown: tuple[str, str]

    @property
    def factor(self) -> str:
        """The factor between the two, in words."""
        if max(self.ours, self.theirs) < EQUAL * min(self.ours, self.theirs):
            return "about as much"
        if self.ours <= self.theirs:
            return f"{self.theirs / self.ours:.1f} times less"
        return f"{self.ours / self.theirs:.1f} times more"


def summary_prices(summary: Summary) -> list[Price]:
    """Return the cost of a suite, its survey included, compared with all of its layers from scratch."""
    ours = summary.cost.with_survey
    theirs = ours.from_scratch
    seconds = None
    if is_number(ours.seconds) and is_number(theirs.seconds_estimate):
        seconds = (ours.seconds, theirs.seconds_estimate)
    return prices_of(ours, theirs, seconds)


def prices_of(ours: Cost | SuiteCost, theirs: Cost | ScratchCost, seconds: tuple[float, float] | None) -> list[Price]:
    """Return the cost of a suite or a plan, without controls, compared with all of its layers from scratch."""
    prices = [
        _price("SAE samples", ours.sae_samples, theirs.sae_samples, _count),
        _price("tokens of the language model", ours.lm_tokens, theirs.lm_tokens, _count),
        _price(OPERATIONS, ours.flops, theirs.flops, flops),
        _price("operations of the language model", ours.lm_flops or 0.0, theirs.lm_flops, flops),
    ]
    if seconds:
        prices.append(_price("time", *seconds, duration))
    return [price for price in prices if price.ours > 0 and price.theirs > 0]


def _price(name: str, ours: float, theirs: float, write: Callable[[float], str]) -> Price:
    return Price(name, ours, theirs, (write(ours), write(theirs)))


def _count(n: float) -> str:
    return format_count(round(n))


def _repeated(tokens: float, reuse: int) -> str:
    return _count(tokens) if reuse == 1 else f"{_count(tokens)} ({reuse} times {_count(tokens / reuse)})"


def savings_table(prices: Sequence[Price], tokens: int, reuse: int) -> Table:
    """Show one row per resource that training takes.

    From scratch, every layer is trained on `tokens`; of these, each token that the language model reads counts `reuse`
    times.
    """
    table = Table(
        box=None, pad_edge=False, title="cost, compared with training every layer from scratch", title_justify="left"
    )
    table.add_column("")
    for name in ("this suite", f"from scratch, {_repeated(tokens, reuse)} each", "the suite takes"):
        table.add_column(name, justify="right")
    for price in prices:
        table.add_row(price.name, *price.shown, price.factor)
    return table


def verdict(prices: Sequence[Price], tokens: int, reuse: int) -> Text:
    """Say what a suite saves, and how many tokens training from scratch could use for the same operations.

    `tokens` and `reuse` are as for `savings_table`.
    """
    cheaper = [price.name for price in prices if price.ours * EQUAL < price.theirs]
    dearer = [price.name for price in prices if price.ours > EQUAL * price.theirs]
    if cheaper:
        sentence = f"The suite saves {listed(cheaper)}"
        if dearer:
            sentence += f"; it needs more {listed(dearer)}"
    else:
        sentence = "The suite saves nothing"

    operations = next(price for price in prices if price.name == OPERATIONS)
    affordable = tokens * operations.ours / operations.theirs
    return Text(
        f"{sentence}. For the same operations, every layer could be trained from scratch on "
        f"{_repeated(affordable, reuse)} tokens; transfer pays only if it beats that."
    )
