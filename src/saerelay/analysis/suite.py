"""The suite that users work with: a finished run, and everything that can be done with it."""

from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from saerelay.errors import ModelError
from saerelay.lm.attach import Attachment, attach
from saerelay.lm.model import LanguageModel
from saerelay.lm.ports import shape_of
from saerelay.runs.directory import read_plan
from saerelay.runs.suite import PublishedSuite
from saerelay.site import Site


class Suite(PublishedSuite):
    """The published dictionaries of a run, by site or by leg id, and everything that can be done with them.

    A site with several legs gives the one that stands for it: neither a control nor continued by another leg. If seeds
    leave more than one, the error lists them.
    """

    def attach(
        self,
        model: Any,
        layers: Iterable[int] | None = None,
        *,
        replace: bool = False,
        leave_alone: Collection[int] | None = None,
    ) -> AbstractContextManager[Attachment]:
        """Put the suite's SAEs to work in a language model while a `with` block lasts.

            with suite.attach(model) as attached:        # or layers=[3, 5]
                attached[3].steer(123, 8.0)
                model.generate(**inputs)
            z = attached[3].latents()                    # (B, C, F), prompt and generated tokens

        See `saerelay.attach`; `leave_alone` is by default the BOS that the run put in front of its sequences. `model`
        is the one that the suite was trained on, or another with as many layers of that width, such as one fine-tuned
        from it. Raises ModelError for any other, and RunDirectoryError for a layer without an SAE.
        """
        if isinstance(model, LanguageModel):
            model = model.hf_model
        self._check_shape(model)

        module = self.plan.run.sites.module
        if layers is None:
            legs = self.one_per_site
        else:
            legs = [self.leg_at(Site(layer, module)) for layer in layers]
        if leave_alone is None:
            bos = self.plan.facts.bos_token_id
            leave_alone = [bos] if self.plan.run.data.prepend_bos and bos is not None else []
        dictionaries = {leg.site: self.dictionary(leg) for leg in legs}
        return attach(model, dictionaries, replace=replace, leave_alone=leave_alone)

    def _check_shape(self, model: Any) -> None:
        """Raise ModelError unless a model has as many layers of the same width as the one trained on."""
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

    `load("runs/a")[Site(3)]` is the dictionary of layer 3; `load("runs/a")["L3-from-L5"]` that of a leg.
    Raises RunDirectoryError if there is no run.
    """
    return Suite(Path(directory), read_plan(Path(directory)))
