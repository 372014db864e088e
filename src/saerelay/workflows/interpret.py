"""`saerelay interpret`: estimate the cost, ask for confirmation, and send the questions."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.prompt import Confirm

from saerelay.analysis.endpoint.address import Endpoint
from saerelay.analysis.endpoint.asker import Asker
from saerelay.analysis.interpret.study import Study, estimate, example_prompts, interpret, prepare
from saerelay.analysis.session import Session
from saerelay.errors import EndpointError
from saerelay.runs.documents.interpretation import AskedModel, Estimate, InterpretationSummary
from saerelay.runs.suite import PublishedSuite
from saerelay.views.tables.interpretation import estimate_text, prompts_text


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The number of requests in flight, the price of tokens, and the most that may be spent."""

    concurrency: int = 8
    price_in: float = 0.0
    """USD per million input tokens."""
    price_out: float = 0.0
    """USD per million output tokens."""
    max_cost: float | None = None
    """Most to spend, in USD; None for no limit."""

    def __post_init__(self) -> None:
        if self.max_cost is not None and not all(self.prices):
            raise EndpointError("--max-cost needs both --price-in and --price-out, in USD per million tokens")

    @property
    def prices(self) -> tuple[float, float]:
        """USD per million input tokens and output tokens."""
        return self.price_in, self.price_out

    @property
    def limit(self) -> float:
        """Most to spend, in USD; infinity for no limit."""
        return float("inf") if self.max_cost is None else self.max_cost


@dataclass(frozen=True)
class DryRun:
    """The questions that would be asked, and their estimated cost."""

    expected: Estimate
    prompts: dict[str, list[dict[str, str]]]
    """Messages of one question of each kind, by kind."""
    asked: AskedModel
    prices: tuple[float, float]

    def to_data(self) -> dict[str, Any]:
        """Return the estimate and the questions as plain JSON data."""
        return {"estimate": self.expected.model_dump(), "prompts": self.prompts}

    def show(self, console: Console) -> None:
        """Print the estimate and the questions; `console` should escape control characters."""
        console.print(estimate_text(self.expected, self.asked, self.prices), prompts_text(self.prompts))


def prepare_study(
    suite: PublishedSuite,
    *,
    legs: Sequence[str],
    n: int,
    latents: Sequence[int],
    seed: int,
    console: Console | None,
) -> Study:
    """Draw the latents and texts to ask about; sends nothing. See `study.prepare`."""
    return prepare(Session(suite, console=console), legs=legs, n=n, latents=latents, seed=seed)


def dry_run(study: Study, endpoint: Endpoint, budget: Budget) -> DryRun:
    """Estimate the cost of a study, with a question of each kind; sends nothing."""
    with _asker(study, endpoint, budget) as asker:
        expected = estimate(study, asker)
    return DryRun(expected, example_prompts(study, endpoint), _asked(endpoint), budget.prices)


def interpret_run(
    study: Study, endpoint: Endpoint, budget: Budget, *, yes: bool, resume_command: str, console: Console
) -> InterpretationSummary | None:
    """Show the estimated cost of a study, ask for confirmation unless `yes`, and run it; None if the answer is no.

    Raises EndpointError if the study may cost more than allowed, or if there is no terminal to ask on.
    """
    with _asker(study, endpoint, budget) as asker:
        expected = estimate(study, asker)
        console.print(estimate_text(expected, _asked(endpoint), budget.prices))
        check_cost(expected, budget)
        if expected.n_requests and not yes:
            if not sys.stdin.isatty():
                raise EndpointError(
                    "there is no terminal to ask for confirmation, and nothing is sent without it; add --yes"
                )
            if not Confirm.ask(f"Send {expected.n_requests} requests?", console=console, default=False):
                return None
        return interpret(study, asker, resume_command=resume_command, console=console)


def check_cost(expected: Estimate, budget: Budget) -> None:
    """Raise EndpointError if a study may cost more than allowed."""
    if budget.max_cost is None:
        return
    if expected.cost is None:
        raise EndpointError(
            "--max-cost needs a limit on the length of answers, which --body removes; leave one of them out"
        )
    if expected.cost > budget.max_cost:
        raise EndpointError(
            f"this may cost ${expected.cost:.2f}, more than --max-cost {budget.max_cost:g}; lower --n, or raise "
            "--max-cost"
        )


def _asker(study: Study, endpoint: Endpoint, budget: Budget) -> Asker:
    return Asker(
        endpoint,
        study.suite.directory.answers,
        concurrency=budget.concurrency,
        prices=budget.prices,
        max_cost=budget.limit,
    )


def _asked(endpoint: Endpoint) -> AskedModel:
    return AskedModel(model=endpoint.model, endpoint=endpoint.url, body=endpoint.described_body)
