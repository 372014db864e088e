"""Options and arguments that several commands share, how they are parsed, and how results are printed."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from saerelay.errors import printable
from saerelay.rank import rank
from saerelay.spec import parse_count

if TYPE_CHECKING:
    from saerelay.planning.recipe import Recipe
    from saerelay.runs.documents.quality import Summary
    from saerelay.site import Site

RecipePath = Annotated[Path, typer.Argument(help="Recipe; `saerelay init > run.toml` writes one.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
OutRun = Annotated[Path, typer.Option("--out", help="New directory for the run.")]
OutDir = Annotated[Path, typer.Option("--out", help="New directory.")]
Legs = Annotated[
    list[str],
    typer.Option("--leg", show_default="all", help="Leg: its id or layer number; repeat the option for several legs."),
]
OneLegPerLayer = Annotated[
    list[str],
    typer.Option(
        "--leg", show_default="one per layer", help="Leg: its id or layer number; repeat it for several legs."
    ),
]
Licence = Annotated[str, typer.Option(help="Licence for the model card, as named on the hub: apache-2.0.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
Source = Annotated[str, typer.Argument(help="Run directory, or one trained SAE in any format.")]
AnySae = Annotated[str, typer.Argument(help="A trained SAE in any format: a path, or hf://user/repo/path.")]
Seeds = Annotated[
    int | None,
    typer.Option(min=1, show_default="the recipe's", help="Train every leg with this many seeds, for error bars."),
]
InputFormat = Annotated[str, typer.Option("--format", help="Format of the SAE, if it is not detected: saelens, ...")]


def with_seeds(recipe: "Recipe", seeds: int | None) -> "Recipe":
    """Return the recipe with another number of seeds, if one is given."""
    if seeds is None:
        return recipe
    return recipe.changed(train=recipe.train.changed(seeds=seeds))


def token_count(value: str | int) -> int:
    """Parse an option that is a number of tokens, such as "250k"."""
    try:
        count = parse_count(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not isinstance(count, int) or count < 0:
        raise typer.BadParameter(f"{value} is not a number of tokens")
    return count


HeldOutTokens = Annotated[
    int,
    typer.Option(
        "--tokens", parser=token_count, metavar="COUNT", show_default="the recipe's", help="Number of held-out tokens."
    ),
]


def split_list(values: Sequence[str]) -> list[str]:
    """Return the items of an option that may be repeated and may hold several items, separated by commas.

    >>> split_list(["L1,L2", "3"])
    ['L1', 'L2', '3']
    """
    items = []
    for value in values:
        items += [item.strip() for item in value.split(",") if item.strip()]
    return items


def number_list(text: str, option: str, example: str) -> list[int]:
    """Parse whole numbers separated by commas; `option` and `example` are for the error message.

    >>> number_list("1, 2", "--layers", "1,2")
    [1, 2]
    """
    items = split_list([text])
    if (text and not items) or not all(item.isdecimal() for item in items):
        raise typer.BadParameter(
            f'"{text}": expected numbers separated by commas, such as {example}', param_hint=option
        )
    return [int(item) for item in items]


def one_at_a_time(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command on a run wait while another command measures the same run."""

    @wraps(command)
    def alone(**options: Any) -> None:
        from saerelay.runs.directory import one_at_a_time as waiting_for_others

        with waiting_for_others(options["run"]) if rank() == 0 else nullcontext():
            command(**options)

    return alone


def site_of(layer: int | None, module: str) -> "Site | None":
    """Return the site named by the options for its layer and module; None without a layer."""
    from saerelay.site import Site

    return None if layer is None else Site.parse(f"L{layer}.{module}")


class SafeConsole(Console):
    """A console that escapes control characters, because texts may come from files that others wrote."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape and render a text; every text passes through here, those in tables included."""
        return super().render_str(printable(text), **options)


def progress() -> Console:
    """Return the console for progress: stderr, so that stdout holds results only."""
    return SafeConsole(stderr=True, quiet=rank() > 0)


def output() -> Console:
    """Return the console for tables: stdout, 120 columns wide if it is not a terminal."""
    return SafeConsole(width=None if sys.stdout.isatty() else 120, quiet=rank() > 0)


def say(text: str) -> None:
    """Print a text with control characters escaped; of several ranks, only the first one prints."""
    if rank() == 0:
        print(printable(text))


def print_all(items: Iterable[RenderableType]) -> None:
    """Print tables and texts."""
    console = output()
    for item in items:
        console.print(item)


def print_json(data: Any) -> None:
    """Print one JSON document; of several ranks, only the first one prints."""
    if rank() == 0:
        print(json.dumps(data))


def print_summary(summary: "Summary") -> None:
    """Print a suite's quality and cost."""
    from saerelay.views.tables.quality import notes, quality_table
    from saerelay.views.tables.savings import savings_table, summary_prices, verdict

    items: list[Any] = [quality_table(summary), ""]
    transferred = any(map(summary.is_transferred, summary.final_legs))  # else the suite is what it is compared with
    if transferred and not summary.only_measured:
        prices = summary_prices(summary)
        scratch = summary.cost.from_scratch
        items += [
            savings_table(prices, scratch.tokens, scratch.reuse),
            verdict(prices, scratch.tokens, scratch.reuse),
            "",
        ]
    print_all([*items, *notes(summary)])
