"""Several trainees in lockstep on one stream's batches: how `train` takes a step of all live legs.

Lockstep is a loop over trainees, so a trainee that retires cannot change another's bits.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from saerelay.sae.threads import alone, in_parallel
from saerelay.site import Site
from saerelay.training.engine import Trainee


class Cohort:
    """Trainees stepping in lockstep on one stream's batches.

    >>> from saerelay.planning.leg import Leg, Schedule
    >>> from saerelay.planning.recipe import TrainSpec
    >>> from saerelay.sae.spec import DictionarySpec
    >>> from saerelay.training.state import first_state
    >>> dictionary = DictionarySpec.parse({"n_latents": 32, "k": 4}).sized(8)
    >>> schedule = Schedule(budget_tokens=512, batch_tokens=64, lr=1e-2, dead_after_tokens=512)
    >>> leg = Leg(id="L0", role="root", layer=0, module="resid_post", dictionary=dictionary, schedule=schedule, seed=0)
    >>> x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    >>> cohort = Cohort(batch_tokens=128)
    >>> cohort.add(Trainee(leg, TrainSpec(), first_state(leg, TrainSpec(), x)))
    >>> for batch in x.split(128):
    ...     cohort.step({Site(0): batch})
    >>> cohort.live, cohort["L0"].state.age
    ([], 512)
    """

    def __init__(self, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self.trainees: dict[str, Trainee] = {}

    def __getitem__(self, leg_id: str) -> Trainee:
        return self.trainees[leg_id]

    def __contains__(self, leg_id: str) -> bool:
        return leg_id in self.trainees

    def add(self, trainee: Trainee) -> None:
        """Add a trainee, which takes part from the next step on."""
        self.trainees[trainee.leg.id] = trainee

    def remove(self, leg_id: str) -> None:
        """Remove a trainee."""
        del self.trainees[leg_id]

    @property
    def live(self) -> list[Trainee]:
        """The trainees with budget left."""
        return [trainee for trainee in self.trainees.values() if not trainee.done]

    def step(
        self,
        activations: Mapping[Site, Tensor],
        repetition: int = 0,
        instead: Mapping[str, Mapping[Site, Tensor]] | None = None,
    ) -> None:
        """Give every live trainee the stream's batch at its site, {site: (B, D)}, cut into batches of its own size.

        `repetition` counts passes over the same block: legs that make fewer passes sit out. `instead` holds other
        batches for some legs, by id.
        """
        others = instead or {}

        def step_one(trainee: Trainee) -> None:
            self._step(trainee, others.get(trainee.leg.id, activations))

        live = [trainee for trainee in self.live if trainee.leg.schedule.reuse > repetition]

        # On a CPU, as many trainees as fill all cores evenly step side by side, one core each; the remaining trainees
        # step one after the other, with all cores each.
        on_cpu = [trainee for trainee in live if activations[trainee.leg.site].device.type == "cpu"]
        n_threads = torch.get_num_threads()
        side_by_side = on_cpu[: len(on_cpu) // n_threads * n_threads]
        for trainee in live:
            if trainee not in side_by_side:
                step_one(trainee)
        with _shared_wall_clock(side_by_side), alone():
            in_parallel(step_one, side_by_side)

    def settle(self) -> None:
        """Wait for the steps queued on a GPU: see `Trainee.settle`."""
        for trainee in self.trainees.values():
            trainee.settle()

    def _step(self, trainee: Trainee, activations: Mapping[Site, Tensor]) -> None:
        leg = trainee.leg
        n_parts = self.batch_tokens // leg.schedule.batch_tokens
        alignment = trainee.state.alignment
        rows = alignment.rows(activations) if alignment else activations[leg.site]
        batches = rows.tensor_split(n_parts)
        targets: Sequence[Tensor | None] = [None] * n_parts
        if leg.is_transcoder:
            targets = activations[leg.site_out].tensor_split(n_parts)
        for x, target in zip(batches, targets, strict=True):
            if not trainee.done:
                trainee.step(x, target)


@contextmanager
def _shared_wall_clock(trainees: Sequence[Trainee]) -> Iterator[None]:
    """Count the time of trainees that step at once only once: each is charged its share of it."""
    before = [trainee.state.seconds for trainee in trainees]
    began = time.perf_counter()
    yield
    elapsed = time.perf_counter() - began
    own = [trainee.state.seconds - seconds for trainee, seconds in zip(trainees, before, strict=True)]
    total = sum(own)
    for trainee, seconds, spent in zip(trainees, before, own, strict=True):
        trainee.state.seconds = seconds + elapsed * spent / total
