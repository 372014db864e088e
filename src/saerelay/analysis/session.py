"""What the analyses of a run share: its language model, maps between its layers, held-out tokens, and progress."""

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
from saerelay.errors import ModelError, RunDirectoryError
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
    """A suite under analysis. Whatever is expensive is loaded when it is first used, and kept.

    The first argument of every analysis. `model` is the suite's language model, if it is at hand. Progress is shown on
    `console`, if that is a terminal. Evaluation, matrix and features are dealt to the ranks of a `team`; where these
    held the model together while it was trained on (`model.tensor_parallel`), they do so here, and a process on its own
    loads the whole model. Raises RunDirectoryError if the run has no finished leg, PlanError if the ranks cannot form
    groups.
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
            raise RunDirectoryError(
                f"{suite.directory.root}: no SAE is finished yet; finish the run with `saerelay train --resume`"
            )
        self.suite = suite
        self.team = team or Team.alone()
        self.degree = 1
        """How many ranks hold the model together."""
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
        """The language model that the suite was trained on; ModelError if another has taken its place."""
        with self.display.status("loading the language model"):
            check_same_model(pinned(self.plan.recipe.model, self.plan.facts), self.suite.directory.model_digest)
            return load_model(self.plan, split=self.degree > 1)

    def deal(self, work: Sequence[T]) -> list[T]:
        """The part of some work that falls to this rank, or to the ranks that hold the model with it."""
        if self.degree > 1:
            _ = self.model  # which all ranks load at once, even those that are left without work
        return self.team.share(work, self.degree)

    @property
    def writes(self) -> bool:
        """Whether this rank writes what it measures: of those that measure the same, one does."""
        return self.team.rank % self.degree == 0

    @cached_property
    def unembedding(self) -> Tensor | None:
        """What a direction of the last residual stream adds to each logit, (V, D); None where nothing tells.

        That a head's logits do not follow from the stream linearly is said, not raised: only what needs it is missing.
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
        """Gives the text of a token, or its number in <> if the model comes without a tokenizer."""
        try:
            tokenizer = self.tokenizer
        except ModelError:
            return "<{}>".format
        return cache(partial(token_text, tokenizer))

    def held_out(self, tokens: int = 0) -> np.ndarray:
        """The first sequences (N, context) of the test split that hold `tokens`; `evaluate.tokens` if 0."""
        return held_out(self.plan, self.corpus.test, tokens or self.plan.recipe.evaluate.tokens)
