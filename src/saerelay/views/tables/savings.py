"""Cheaper in what? What a suite takes of samples, tokens, operations and time, beside the same layers from scratch."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from saerelay.planning.cost import Cost
from saerelay.runs.documents.quality import Summary
from saerelay.spec import format_count
from saerelay.views.text import duration, flops, is_number, listed

EQUAL = 1.05
"""Costs that differ by less than this factor count as the same."""


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
    pairs = [
        ("SAE samples", ours.sae_samples, theirs.sae_samples),
        ("tokens of the language model", ours.lm_tokens, theirs.lm_tokens),
        ("operations", ours.flops, theirs.flops),
        ("operations of the language model", ours.lm_flops, theirs.lm_flops),
    ]
    if seconds:
        pairs.append(("time", *seconds))
    return _prices(pairs)


def summary_prices(summary: Summary) -> list[Price]:
    """What a suite took, its survey included, beside all of its layers from scratch."""
    cost = summary.cost
    survey = cost.survey
    theirs = cost.from_scratch
    pairs = [
        ("SAE samples", cost.sae_samples + (survey.sae_samples if survey else 0), theirs.sae_samples),
        ("tokens of the language model", cost.lm_tokens + (survey.lm_tokens if survey else 0), theirs.lm_tokens),
        ("operations", cost.flops + (survey.flops if survey else 0.0), theirs.flops),
        ("operations of the language model", cost.lm_flops, theirs.lm_flops),
    ]
    if is_number(cost.seconds) and is_number(theirs.seconds_estimate):
        pairs.append(("time", cost.seconds + (survey.seconds if survey else 0.0), theirs.seconds_estimate))
    return _prices(pairs)


def _prices(pairs: Sequence[tuple[str, float, float]]) -> list[Price]:
    prices = []
    for name, ours, theirs in pairs:
        write = _count
        if name.startswith("operations"):
            write = flops
        elif name == "time":
            write = duration
        if ours > 0 and theirs > 0:
            prices.append(Price(name, ours, theirs, (write(ours), write(theirs))))
    return prices


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

    operations = next(price for price in prices if price.name == "operations")
    affordable = tokens * operations.ours / operations.theirs
    return Text(
        f"{sentence}. For the same operations every layer can be trained from scratch on {_count(affordable)} "
        "tokens: that is what it has to beat."
    )
