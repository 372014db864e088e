"""The resources that the analyses of a run share: language model, maps between layers, held-out tokens, progress."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from torch import Tensor

from saerelay.analysis.metrics import held_out
from saerelay.analysis.progress import ProgressDisplay
from saerelay.analysis.site_maps import SiteMaps
from saerelay.data.corpus import Corpus
from saerelay.errors import ModelError
from saerelay.lm.identity import check_same_model
from saerelay.lm.model import LanguageModel, load_model
from saerelay.lm.source import pinned
from saerelay.lm.tokens import load_tokenizer, token_text
from saerelay.planning.plan import Plan
from saerelay.planning.ranks import check_groups
from saerelay.runs.suite import PublishedSuite
from saerelay.team import Team

T = TypeVar("T")


class Session:
    """A suite under analysis, and the first argument of every analysis.

    Expensive resources are loaded when they are first used, and kept. `model` is the suite's language model, if it is
    loaded already. Progress is shown on `console`, if that is a terminal. Evaluation, matrix and features are divided
    among the ranks of a `team`. If ranks held the model together in training (`model.tensor_parallel`), they also do so
    here; a single process loads the whole model. Raises RunDirectoryError if the run has no finished leg, PlanError if
    the ranks cannot form groups.
    """

    def __init__(
        self,
        suite: PublishedSuite,
        *,
        model: LanguageModel | None = None,
        console: Console | None = None,
        team: Team | None = None,
    ) -> None:
        if not suite.legs:
            raise suite.directory.unfinished("no SAE is finished yet")
        self.suite = suite
        self.team = team or Team.alone()
        self.degree = 1
        """Number of ranks that hold the model together."""
        if self.team.size > 1:
            self.degree = suite.plan.recipe.model.tensor_parallel
            check_groups(suite.plan.recipe.model, self.team.size)
        self.display = ProgressDisplay(console)
        if model is not None:
            self.model = model

    @property
    def plan(self) -> Plan:
        """The run's plan."""
        return self.suite.plan

    @cached_property
    def model(self) -> LanguageModel:
        """The language model that the suite was trained on; ModelError if another model is found in its place."""
        with self.display.status("loading the language model"):
            check_same_model(pinned(self.plan.recipe.model, self.plan.facts), self.suite.directory.model_digest)
            return load_model(self.plan, split=self.degree > 1)

    def deal(self, work: Sequence[T]) -> list[T]:
        """Return this rank's part of some work; ranks that hold the model together have the same part."""
        if self.degree > 1:
            _ = self.model  # all ranks must load it at the same time, also those that get no work
        return self.team.share(work, self.degree)

    @property
    def writes(self) -> bool:
        """Whether this rank writes its results: of the ranks that measure the same, only one does."""
        return self.team.rank % self.degree == 0

    @cached_property
    def unembedding(self) -> Tensor | None:
        """The effect (V, D) of a direction of the last residual stream on each logit; None if it is not known.

        A head whose logits are not linear in the stream leads to a warning, not an error: only the results that need
        the unembedding are missing.
        """
        if not self.plan.facts.has_lm_head:
            return None
        try:
            return self.model.unembedding()
        except ModelError as error:
            warnings.warn(f"{error} Features come without them.", stacklevel=2)
            return None

    @cached_property
    def maps(self) -> SiteMaps:
        """Maps between the sites of the run."""
        return SiteMaps.of(self.plan, self.model, self.corpus.train, self.display.track)

    @cached_property
    def corpus(self) -> Corpus:
        """The run's tokens."""
        return Corpus.open(self.suite.directory.tokens)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's fast tokenizer; ModelError if it comes without one."""
        return load_tokenizer(pinned(self.plan.recipe.model, self.plan.facts))

    @cached_property
    def token_text(self) -> Callable[[int], str]:
        """A function that gives the text of a token, or its id in <> if the model comes without a tokenizer."""
        try:
            tokenizer = self.tokenizer
        except ModelError:
            return "<{}>".format
        return cache(partial(token_text, tokenizer))

    def held_out(self, tokens: int = 0) -> np.ndarray:
        """Return the first sequences (N, context) of the test split that hold `tokens` (`evaluate.tokens` if 0)."""
        return held_out(self.plan, self.corpus.test, tokens or self.plan.recipe.evaluate.tokens)

    def n_held_out(self, tokens: int) -> int:
        """Return how many of the `tokens` asked for (`evaluate.tokens` if 0) the test split has."""
        return min(tokens or self.plan.recipe.evaluate.tokens, int(self.corpus.test.size))
