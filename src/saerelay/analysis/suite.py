"""The suite that users work with: a finished run, with all analyses as methods."""

from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from saerelay.analysis.circuits import K, circuits
from saerelay.analysis.describe import describe
from saerelay.analysis.evaluate import evaluate
from saerelay.analysis.features import make_features
from saerelay.analysis.lineage import Lineage, make_lineage
from saerelay.analysis.matrix import matrix
from saerelay.analysis.measures import measures
from saerelay.analysis.prompts import start_of
from saerelay.analysis.session import Session
from saerelay.data.corpus import Corpus, Split
from saerelay.errors import ModelError, RecipeError
from saerelay.lm.attach import Attachment, attach
from saerelay.lm.model import LanguageModel
from saerelay.lm.ports import shape_of
from saerelay.runs.directory import read_plan
from saerelay.runs.documents.across_layers import Matrix, Measures
from saerelay.runs.documents.circuits import Circuits
from saerelay.runs.documents.latents import LatentDescription
from saerelay.runs.documents.quality import Summary
from saerelay.runs.features import Features, load_features
from saerelay.runs.suite import PublishedSuite
from saerelay.site import Site
from saerelay.spec import parse_count


class Suite(PublishedSuite):
    """The published dictionaries of a run, by site or by leg id, with all analyses as methods.

    If a site has several legs, `suite[site]` is the leg that represents it: neither a control nor continued by another
    leg, and of several tiers the one with the recipe's own L0; `suite[site, k]` is another tier. If several seeds leave
    more than one such leg, the error lists them.

    Every analysis writes a file into the run directory and returns its content as a typed document; if the file already
    answers the same question, it is read, not measured again. The language model is loaded when it is first needed, and
    kept.
    """

    @cached_property
    def session(self) -> Session:
        """The language model, maps and tokens that the analyses below share."""
        return Session(self)

    @property
    def model(self) -> LanguageModel:
        """The language model that the suite was trained on; ModelError if another model is found in its place."""
        return self.session.model

    @property
    def tokenizer(self) -> Any:
        """The model's fast tokenizer; ModelError if it comes without one."""
        return self.session.tokenizer

    def tokens(self, split: Split = "test") -> np.ndarray:
        """Return the token ids (N, context) of a split of the run's corpus: "train", "validation" or "test"."""
        corpus = Corpus.open(self.directory.tokens)
        return getattr(corpus, split)

    def evaluate(self, *, tokens: int | str = 0) -> Summary:
        """Measure the held-out quality of every leg and snapshot, and the cost of the suite.

        `suite.evaluate().leg("L3").fvu` is one of the numbers. `tokens` may be written "16k"; 0: the recipe's
        `evaluate.tokens`.
        """
        return evaluate(self.session, tokens=_count(tokens))

    def matrix(
        self, *, methods: Sequence[str] = ("identity", "affine"), tokens: int | str = 0, snapshots: bool = False
    ) -> Matrix:
        """Measure every SAE of the suite at every layer, carried there by each method, without training."""
        return matrix(self.session, methods=methods, tokens=_count(tokens), snapshots=snapshots)

    def measures(self, *, prompts: str | Path | None = None, tokens: int | str = 0) -> Measures:
        """Measure what SAEs have in common and what transfer gained, as in Ghilardi et al. 2024.

        Direct logit attribution uses the prompts of a JSONL file, or, without one, the model's own predictions.
        """
        return measures(self.session, prompts=Path(prompts) if prompts else None, tokens=_count(tokens))

    def features(self, leg: str | int | Site, *, tokens: int | str = 0) -> Features:
        """Find where each latent fires most and which tokens it promotes; `leg` is an id, a layer or a site."""
        make_features(self.session, tokens=_count(tokens))
        return load_features(self.directory, self.leg(leg).id)

    def lineage(self, *, tokens: int | str = 0) -> Lineage:
        """Trace what became of each latent from leg to leg; `suite.lineage().follow("L3", 123)` follows one latent."""
        return make_lineage(self.session, tokens=_count(tokens))

    def describe(self, leg: str | int | Site, latent: int) -> LatentDescription:
        """Return all that is known about one latent; `leg` is an id, a layer or a site."""
        return describe(self.session, leg, latent)

    def circuits(
        self,
        task: str,
        *,
        k: Sequence[int] = K,
        legs: Sequence[str] = (),
        n_prompts: int = 500,
        method: str = "attribution",
        seed: int = 0,
    ) -> Circuits:
        """Find the latents of each leg that a task depends on (Marks et al. 2024).

        `task` is a built-in task ("ioi", "greater-than", "sva", "brackets", "quotes", "self") or a JSONL file.
        """
        return circuits(self.session, task, k=k, legs=legs, n_prompts=n_prompts, method=method, seed=seed)

    def attach(
        self,
        model: Any,
        layers: Iterable[int] | None = None,
        *,
        replace: bool = False,
        leave_alone: Collection[int] | None = None,
    ) -> AbstractContextManager[Attachment]:
        """Run the suite's SAEs inside a language model while a `with` block lasts.

            with suite.attach(model) as attached:        # or layers=[3, 5]
                attached[3].steer(123, 8.0)
                model.generate(**inputs)
            z = attached[3].latents()                    # (B, C, F), prompt and generated tokens

        If a suite has several kinds of sites, the first is used. See `saerelay.attach`, which takes any SAEs by site.
        `leave_alone` is by default the BOS token that the run put in front of its sequences. `model` is the model that
        the suite was trained on, or another with the same number of layers of the same width, such as a fine-tuned
        one. Raises ModelError for any other model, and RunDirectoryError for a layer without an SAE.
        """
        if isinstance(model, LanguageModel):
            model = model.hf_model
        self._check_shape(model)

        kind = self.plan.recipe.sites.first_kind
        if layers is None:
            legs = [leg for leg in self.one_per_site if leg.kind == kind] or self.one_per_site
        else:
            legs = [self.leg_at(Site(layer, kind.module), kind=kind) for layer in layers]
        transcoders = [leg.id for leg in legs if leg.is_transcoder]
        if transcoders:
            raise ModelError(
                f"{self.directory.root}: {transcoders[0]} is a transcoder, and attach takes SAEs; `saerelay export "
                "--format circuit-tracer` writes it for circuit-tracer, which intervenes on transcoders"
            )
        if leave_alone is None:
            leave_alone = start_of(self.plan)
        dictionaries = {leg.site: self.dictionary(leg) for leg in legs}
        return attach(model, dictionaries, replace=replace, leave_alone=leave_alone)

    def _check_shape(self, model: Any) -> None:
        """Raise ModelError unless a model has the number of layers and the width of the one trained on."""
        facts = self.plan.facts
        n_layers, width = shape_of(model)
        if (n_layers, width) != (facts.n_layers, facts.d_model):
            raise ModelError(
                f"{self.directory.root}: trained on {facts.name} ({facts.n_layers} layers, {facts.d_model} wide); "
                f"this model ({type(model).__name__}) has {n_layers} layers, {width} wide. Attach the suite to that "
                "model or one fine-tuned from it; `saerelay hop --from-model` carries an SAE to another"
            )


def load(directory: str | Path) -> Suite:
    """Open a run directory.

    `load("runs/a")[Site(3)]` is the dictionary of layer 3, and `load("runs/a")["L3-from-L5"]` that of a leg.
    Raises RunDirectoryError if there is no run.
    """
    return Suite(Path(directory), read_plan(Path(directory)))


def _count(tokens: int | str) -> int:
    """Return a number of tokens, which may be written "16k" as in a recipe; RecipeError if it is none."""
    try:
        count = parse_count(tokens)
    except ValueError as error:
        raise RecipeError(f"tokens: {error}") from None
    if not isinstance(count, int) or count < 0:
        raise RecipeError(f"tokens: must be a whole number, 0 or more (found {tokens!r})")
    return count
