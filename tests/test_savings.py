"""Cheaper in what: what a plan takes beside all of its layers from scratch."""

import io

from rich.console import Console
from rich.table import Table
from rich.text import Text

from saerelay.planning.cost import Cost
from saerelay.views.tables.savings import prices_of, savings_table, verdict


def cost(samples: int, tokens: int, flops: float, lm_flops: float) -> Cost:
    return Cost(
        lm_tokens=tokens, sae_samples=samples, flops=flops, lm_flops=lm_flops,
        flops_dense_equivalent=flops, memory_bytes=1, disk_bytes=1, cache_bytes=0,
    )  # fmt: skip


SCRATCH = cost(16_000_000, 2_000_000, 8e12, 2e12)


def shown(item: Table | Text) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(item)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_what_is_saved_and_what_is_not_are_told_apart() -> None:
    prices = prices_of(cost(4_000_000, 3_000_000, 4e12, 3e12), SCRATCH, (50.0, 51.0))
    table = shown(savings_table(prices, 2_000_000, 1))
    assert "4.0 times less" in table and "1.5 times more" in table and "from scratch, 2M each" in table
    said = " ".join(shown(verdict(prices, 2_000_000, 1)).split())
    assert said.startswith(
        "The suite saves SAE samples and operations; it needs more tokens of the language model and operations of the "
        "language model. For the same operations, every layer could be trained from scratch on 1M tokens"
    )


def test_costs_that_hardly_differ_are_neither_less_nor_more() -> None:
    prices = prices_of(cost(15_900_000, 2_000_000, 8.3e12, 2.2e12), SCRATCH, None)
    assert [price.factor for price in prices] == ["about as much"] * 3 + ["1.1 times more"]


def test_a_suite_that_saves_nothing_says_so() -> None:
    prices = prices_of(cost(16_000_000, 3_000_000, 9e12, 3e12), SCRATCH, None)
    said = shown(verdict(prices, 2_000_000, 1))
    assert said.startswith("The suite saves nothing.") and "2.25M tokens" in said


def test_repetitions_are_told_from_tokens() -> None:
    prices = prices_of(cost(8_000_000, 3_000_000, 4e12, 3e12), SCRATCH, None)
    assert "from scratch, 2M (2 times 1M) each" in shown(savings_table(prices, 2_000_000, 2))
    assert "from scratch on 1M (2 times 500k) tokens" in " ".join(shown(verdict(prices, 2_000_000, 2)).split())


def test_time_stands_there_only_if_it_is_known() -> None:
    names = [price.name for price in prices_of(SCRATCH, SCRATCH, None)]
    assert "time" not in names and "SAE samples" in names
