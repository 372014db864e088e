"""Training: one SAE (`Trainee`), and several in lockstep (`Cohort`). Knows no language model, plan or directory.

Everything scheduled is a function of a leg's own age (`schedule`); everything else that matters is in `TraineeState`.
Lockstep is a loop over trainees, so that one that retires cannot change another's bits.
"""

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from saerelay.planning.plan import Leg
from saerelay.planning.recipe import TrainSpec
from saerelay.sae.architectures.architecture import with_common_threshold
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.kernels import Reading, Step, latent_pieces, sparse_step
from saerelay.sae.loss import Loss, training_loss
from saerelay.sae.quality import fvu
from saerelay.sae.spec import takes_sparse_step
from saerelay.sae.threads import alone, in_parallel
from saerelay.site import Site
from saerelay.training.adam import Adam, LatentPart, Triple
from saerelay.training.schedule import learning_rate, parameter_rates, penalty_warmth
from saerelay.training.state import TraineeState, balance_of

CALIBRATION_ROWS = 8_192
"""Rows that a published threshold is calibrated on."""
_scratch = threading.local()


class Progress(NamedTuple):
    """How training went since the last look."""

    age: int
    loss: float
    fvu: float
    """Σ‖x − x_hat‖² / Σ‖x − mean of the batch‖², on training tokens."""
    l0: float
    n_dead: int
    learning_rate: float
    seconds: float
    """Time spent in this leg's steps since the run began."""


class AutogradStep(NamedTuple):
    """A batch that went forward and back by autograd on dense codes: what `kernels.Step` is tested against."""

    loss: Loss
    variance: Tensor
    all_gradients: dict[str, Tensor]
    """Gradients of all latents, by name."""

    @property
    def b_dec(self) -> Tensor:
        """∂loss/∂b_dec (D)."""
        return self.all_gradients["b_dec"]

    def gradients(self, latents: slice, into: dict[str, Tensor]) -> None:
        """Write the gradients of some latents, by parameter name, into the tensors given."""
        for name, gradient in into.items():
            gradient.copy_(self.all_gradients[name][latents])


@dataclass
class _Sums:
    """What the training log shows of the batches since the last look."""

    numbers: list[Tensor] = field(default_factory=list)
    """(4) each: loss, Σ error², Σ‖x − mean‖², number active."""
    n_rows: int = 0


class Trainee:
    """One dictionary in training; `dense` forces the autograd reference."""

    def __init__(self, leg: Leg, spec: TrainSpec, state: TraineeState, *, dense: bool = False) -> None:
        self.leg = leg
        self.spec = spec
        self.state = state
        self.dense = dense or not takes_sparse_step(state.n_steps.device.type)
        self.encoder: Tensor | None = None
        self._sums = _Sums()

        # Parameters and Adam's moments, cut into parts, which are views; b_dec is not one of the latents.
        triples: dict[str, Triple] = {}
        parameters = state.dictionary.tensors()
        for name, mean in state.gradient_means.items():
            triples[name] = (parameters[name], mean, state.gradient_squares[name])
        self.bias = triples.pop("b_dec")
        self.parts = [LatentPart(latents, triples) for latents in latent_pieces(state.dictionary)]

    @property
    def done(self) -> bool:
        """Whether the budget is spent, or training failed."""
        return self.state.age >= self.state.budget_tokens or bool(self.state.failure)

    @property
    def seeks_goal(self) -> bool:
        """Whether it has a goal that is not in sight yet."""
        return bool(self.leg.goal.goal_fvu) and self.state.budget_tokens == self.leg.budget_tokens

    def learning_rate(self, age: int) -> float:
        """Rate of the step that it takes at `age`."""
        rate = learning_rate(self.leg, self.spec.optimizer, self.state.budget_tokens, age)
        return self.state.lr_share * rate

    def dead(self) -> Tensor:
        """Bool (F): latents that have not fired for the leg's dead window."""
        return self.state.last_fired <= self.state.age - self.leg.schedule.dead_after_tokens

    def canonical(self, x: Tensor | None = None) -> Dictionary:
        """The dictionary as it is now, for raw activations.

        A BatchTopK threshold is calibrated on raw activations `x` (B, D) so that mean L0 is k there.
        """
        state = self.state
        copies = {name: tensor.clone() for name, tensor in state.dictionary.tensors().items()}
        dictionary = state.dictionary.with_tensors(copies)
        if state.whitening is not None:
            dictionary = replace(dictionary, W_enc=dictionary.W_enc @ state.whitening)
        dictionary = state.units.to_canonical(dictionary)
        activation = self.leg.dictionary.activation
        if x is not None and activation.threshold_is_calibrated:
            assert activation.l0 is not None
            dictionary = with_common_threshold(dictionary, x[:CALIBRATION_ROWS].float(), activation.l0)
        return dictionary

    def check(self, x: Tensor) -> None:
        """Begin the decay now if, after it, FVU on held-out activations x (B, D) will meet the leg's goal.

        The budget becomes that of which the tokens trained on so far are the share before the decay.
        """
        goal = self.leg.goal
        assert goal.goal_fvu
        if fvu(self.canonical(x), x, balance_of(self.leg, self.spec)) * goal.decay_gain <= goal.goal_fvu:
            batch = self.leg.schedule.batch_tokens
            share_before_decay = 1 - self.spec.optimizer.decay
            self.state.budget_tokens = batch * math.ceil(self.state.age / share_before_decay / batch)

    # --- a step ---------------------------------------------------------------------------------------------------

    def step(self, x: Tensor) -> None:
        """Take one gradient step on a batch of raw activations (B, D)."""
        began = time.perf_counter()
        if x.shape[0]:
            with alone():
                self._train(x)
        if not self.state.failure:
            self.state.age += self.leg.schedule.batch_tokens
        self.state.seconds += time.perf_counter() - began

    def _train(self, x: Tensor) -> None:
        """One gradient step: forward by pieces of the batch, then gradients and Adam by pieces of the latents."""
        state = self.state
        dead = self.dead() if self.leg.dictionary.activation.weight_of_aux else None
        step = self._dense_step(x, dead) if self.dense else self._sparse_step(x, dead)
        if not bool(torch.isfinite(step.loss.total)):
            state.failure = f"the loss became {float(step.loss.total)} at age {state.age} tokens"
            return
        with torch.no_grad():
            gradients = self._gradient_buffers()
            squares = in_parallel(lambda part: part.differentiate(step, gradients), self.parts)
            squares.append(step.b_dec.square().sum())
            state.n_steps += 1
            adam = Adam(
                lr=self.learning_rate(state.age),
                betas=self.spec.optimizer.betas,
                n_steps=state.n_steps,
                shrink=self._shrink(torch.stack(squares).sum().sqrt()),
            )
            shares = parameter_rates(self.spec.optimizer, state.dictionary.d_model)
            in_parallel(lambda part: part.update(gradients, adam, shares, self.encoder), self.parts)
            adam.move(self.bias, step.b_dec)
            state.last_fired[step.loss.fired] = state.age + self.leg.schedule.batch_tokens
            numbers = (step.loss.total, step.loss.squared_error, step.variance, step.loss.n_active)
            self._sums.numbers.append(torch.stack([number.detach().float() for number in numbers]))
            self._sums.n_rows += x.shape[0]

    def _shrink(self, norm: Tensor) -> Tensor | None:
        """What gradients are divided by, so that their norm is at most `clip`; None for nothing."""
        if not self.spec.optimizer.clip:
            return None
        shrink = (norm / self.spec.optimizer.clip).clamp(min=1)
        if shrink.device.type == "cpu" and float(shrink) == 1:
            return None
        return shrink

    def _sparse_step(self, x: Tensor, dead: Tensor | None) -> Step:
        state = self.state
        reading = Reading(units=state.units, encoder=self._encoder(x), whitening=state.whitening)
        return sparse_step(self.leg.dictionary, state.dictionary, x, reading=reading, dead=dead, warmth=self._warmth())

    def _dense_step(self, x: Tensor, dead: Tensor | None) -> AutogradStep:
        state = self.state
        x = state.units.normalise(x.float())
        parameters = {name: t.detach().requires_grad_() for name, t in state.dictionary.tensors().items()}
        with torch.enable_grad():
            dictionary = state.dictionary.with_tensors(parameters)
            if state.whitening is not None:
                dictionary = replace(dictionary, W_enc=dictionary.W_enc @ state.whitening)
            loss = training_loss(self.leg.dictionary, dictionary, x, dead=dead, warmth=self._warmth())
            loss.total.backward()
        gradients = {name: t.grad for name, t in parameters.items() if t.grad is not None}
        return AutogradStep(loss, (x - x.mean(dim=0)).square().sum(), gradients)

    def _warmth(self) -> float:
        return penalty_warmth(self.spec.optimizer, self.state.budget_tokens, self.state.age)

    def _encoder(self, x: Tensor) -> Tensor:
        """W_enc in the dtype that the product with it runs in; `LatentPart.update` keeps the copy up to date."""
        asked = self.spec.precision
        half = asked == "bfloat16" or (asked == "auto" and x.dtype == torch.bfloat16)
        if not half:
            return self.state.dictionary.W_enc
        if self.encoder is None:
            self.encoder = self.state.dictionary.W_enc.bfloat16()
        return self.encoder

    def _gradient_buffers(self) -> dict[str, Tensor]:
        """Room for the gradients: what this thread used last, if it fits, since new memory costs as much as a pass."""
        parameters = self.state.dictionary.tensors()
        shapes = {name: parameters[name].shape for name in parameters if name in self.parts[0].triples}
        device = self.state.dictionary.W_enc.device
        last: dict[str, Tensor] = getattr(_scratch, "gradients", {})
        if {name: t.shape for name, t in last.items()} != shapes or last["W_enc"].device != device:
            _scratch.gradients = {name: torch.empty(shape, device=device) for name, shape in shapes.items()}
        return _scratch.gradients

    # --- what the log shows ---------------------------------------------------------------------------------------

    def unreported(self) -> dict[str, Tensor]:
        """What the next `look` will average over, to be saved."""
        numbers = torch.stack(self._sums.numbers) if self._sums.numbers else torch.empty(0, 4)
        return {"numbers": numbers, "n_rows": torch.tensor(self._sums.n_rows)}

    def take_up(self, unreported: Mapping[str, Tensor]) -> None:
        """Undo `unreported`."""
        device = self.state.n_steps.device
        self._sums = _Sums(list(unreported["numbers"].to(device)), int(unreported["n_rows"]))

    def look(self) -> Progress | None:
        """Averages since the last look, or None if no gradient step was taken."""
        sums = self._sums
        if not sums.numbers:
            return None
        loss, error, variance, active = torch.stack(sums.numbers).cpu().double().sum(dim=0).tolist()
        self._sums = _Sums()
        return Progress(
            age=self.state.age,
            loss=loss / len(sums.numbers),
            fvu=error / max(variance, 1e-30),
            l0=active / sums.n_rows,
            n_dead=int(self.dead().sum()),
            learning_rate=self.learning_rate(self.state.age - self.leg.schedule.batch_tokens),
            seconds=self.state.seconds,
        )


# --- several ------------------------------------------------------------------------------------------------------


class Cohort:
    """Trainees stepping in lockstep on one stream's batches.

    >>> from saerelay.planning.plan import Leg, Schedule
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
        """Let a trainee take part from the next step on."""
        self.trainees[trainee.leg.id] = trainee

    def remove(self, leg_id: str) -> None:
        """Forget a trainee."""
        del self.trainees[leg_id]

    @property
    def live(self) -> list[Trainee]:
        """Those with budget left."""
        return [trainee for trainee in self.trainees.values() if not trainee.done]

    def step(self, activations: Mapping[Site, Tensor], repetition: int = 0) -> None:
        """Give every live trainee the stream's batch at its site, {site: (B, D)}, cut into its own batches.

        `repetition` counts passes over the same block: legs that train on a block less often sit out.
        """
        live = [trainee for trainee in self.live if trainee.leg.schedule.reuse > repetition]

        # On a processor as many trainees as fill all cores evenly step side by side, each on one core; the others one
        # after the other, each on all cores.
        on_cpu = [trainee for trainee in live if activations[trainee.leg.site].device.type == "cpu"]
        n_threads = torch.get_num_threads()
        side_by_side = on_cpu[: len(on_cpu) // n_threads * n_threads]
        for trainee in live:
            if trainee not in side_by_side:
                self._step(trainee, activations[trainee.leg.site])
        with _shared_wall_clock(side_by_side), alone():
            in_parallel(lambda trainee: self._step(trainee, activations[trainee.leg.site]), side_by_side)

    def _step(self, trainee: Trainee, rows: Tensor) -> None:
        for x in rows.tensor_split(self.batch_tokens // trainee.leg.schedule.batch_tokens):
            if not trainee.done:
                trainee.step(x)


@contextmanager
def _shared_wall_clock(trainees: Sequence[Trainee]) -> Iterator[None]:
    """Count the time that trainees step at once only once: each is charged its share of it."""
    before = [trainee.state.seconds for trainee in trainees]
    began = time.perf_counter()
    yield
    elapsed = time.perf_counter() - began
    own = [trainee.state.seconds - seconds for trainee, seconds in zip(trainees, before, strict=True)]
    total = sum(own)
    for trainee, seconds, spent in zip(trainees, before, own, strict=True):
        trainee.state.seconds = seconds + elapsed * spent / total
