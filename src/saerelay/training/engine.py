"""Training of one SAE. Knows nothing of language models, plans or directories.

Every schedule is a function of the leg's own age (`schedule`); everything else that matters is in `TraineeState`.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from saerelay.planning.leg import Leg
from saerelay.planning.recipe import TrainSpec
from saerelay.sae.architectures.architecture import with_common_threshold
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.kernels import Reading, Step, latent_pieces, sparse_step
from saerelay.sae.kernels.adam import Adam, Triple
from saerelay.sae.loss import Loss, training_loss
from saerelay.sae.quality import fvu
from saerelay.sae.spec import L0_ROWS, takes_sparse_step
from saerelay.sae.threads import alone, in_parallel
from saerelay.spec import rounded_up
from saerelay.training.device import STEPS_AHEAD, Launcher, Now, Verdict
from saerelay.training.latent_part import LatentPart
from saerelay.training.schedule import learning_rate, parameter_rates, penalty_warmth
from saerelay.training.state import TraineeState, balance_of

_scratch = threading.local()


class Progress(NamedTuple):
    """Averages of training since the last report."""

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
    """A batch after forward and backward passes by autograd on dense codes; `kernels.Step` is tested against it."""

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
    """Sums over the batches since the last report, for the training log."""

    numbers: Tensor
    """float64 (4): Σ over batches of loss, Σ error², Σ‖x − mean‖², number active."""
    n_batches: int = 0
    n_rows: int = 0

    @classmethod
    def nothing(cls, device: torch.device) -> "_Sums":
        """Sums before the first batch."""
        return cls(torch.zeros(4, dtype=torch.float64, device=device))

    def clear(self) -> None:
        """Forget all batches."""
        self.numbers.zero_()
        self.n_batches = 0
        self.n_rows = 0


class Trainee:
    """One dictionary in training; `dense` forces the autograd reference.

    On a GPU a step is only launched: the state's age runs ahead of the device, while its seconds and any failure are as
    of the last `settle`. Parameters and all other tensors may still be read at any time.
    """

    def __init__(self, leg: Leg, spec: TrainSpec, state: TraineeState, *, dense: bool = False) -> None:
        self.leg = leg
        self.spec = spec
        self.state = state
        self.dense = dense or not takes_sparse_step(state.n_steps.device.type)
        self.half_encoder: Tensor | None = None
        """W_enc in bfloat16, once a step has used it; each update keeps it up to date."""
        device = state.n_steps.device
        self._sums = _Sums.nothing(device)

        # Parameters and Adam's moments, cut into parts, which are views. b_dec has no entry per latent.
        triples: dict[str, Triple] = {}
        parameters = state.dictionary.tensors()
        for name, mean in state.gradient_means.items():
            triples[name] = (parameters[name], mean, state.gradient_squares[name])
        self.bias = triples.pop("b_dec")
        self.parts = [LatentPart(latents, triples) for latents in latent_pieces(state.dictionary)]
        self._launched: Launcher | None = None
        if device.type == "cuda":
            activation = leg.dictionary.activation
            is_recorded = not leg.dictionary.matryoshka and not self.dense
            limits_room = is_recorded and not activation.selects_fixed_number
            self._launched = Launcher(device, state.age, is_recorded=is_recorded, limits_room=limits_room)

    @property
    def done(self) -> bool:
        """Whether the budget is spent, or training failed."""
        return self.state.age >= self.state.budget_tokens or bool(self.state.failure)

    @property
    def seeks_goal(self) -> bool:
        """Whether the leg has a goal that is not in sight yet."""
        return bool(self.leg.goal.goal_fvu) and self.state.budget_tokens == self.leg.budget_tokens

    def learning_rate(self, age: int) -> float:
        """Learning rate of the step at `age`."""
        rate = learning_rate(self.leg, self.spec.optimizer, self.state.budget_tokens, age)
        return self.state.lr_share * rate

    def dead(self, age: int | Tensor | None = None) -> Tensor:
        """Bool (F): latents that have not fired for the leg's dead window, at the current or a given age."""
        now = self.state.age if age is None else age
        return self.state.last_fired <= now - self.leg.schedule.dead_after_tokens

    def canonical(self, x: Tensor | None = None) -> Dictionary:
        """The current dictionary, for raw activations.

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
            dictionary = with_common_threshold(dictionary, x[:L0_ROWS].float(), activation.l0)
        return dictionary

    def check(self, x: Tensor, target: Tensor | None = None) -> None:
        """Begin the decay now if FVU on held-out activations x (B, D) is expected to meet the leg's goal after it.

        The budget is then set so that the tokens trained on so far are its share before the decay.
        """
        goal = self.leg.goal
        assert goal.goal_fvu
        self.settle()
        left = fvu(self.canonical(x), x, balance_of(self.leg, self.spec), target=target)
        if left * goal.decay_gain <= goal.goal_fvu:
            batch = self.leg.schedule.batch_tokens
            share_before_decay = 1 - self.spec.optimizer.decay
            self.state.budget_tokens = rounded_up(self.state.age / share_before_decay, batch)
            if self._launched:
                self._launched.clock.n_left = 0  # its rates are those of the old budget

    # --- a step ---------------------------------------------------------------------------------------------------

    def step(self, x: Tensor, target: Tensor | None = None) -> None:
        """Take one gradient step on a batch of raw activations (B, D); a transcoder reconstructs `target` (B, Dy)."""
        if self._launched:
            self._launch(self._launched, x, target)
            return
        began = time.perf_counter()
        if x.shape[0]:
            with alone():
                self._train(x, target, self._now(self.state.age))
        if not self.state.failure:
            self.state.age += self.leg.schedule.batch_tokens
        self.state.seconds += time.perf_counter() - began

    def _launch(self, launched: Launcher, x: Tensor, target: Tensor | None) -> None:
        """Queue one step on the device."""
        batch = self.leg.schedule.batch_tokens
        if x.shape[0]:
            if not launched.clock.n_left:
                launched.clock.set([self._now(self.state.age + i * batch) for i in range(STEPS_AHEAD)])
            with torch.cuda.device(launched.device):  # graphs and events belong to the current one
                launched.stopwatch.start()
                launched.launch(self._launched_step, x, target)
                launched.stopwatch.stop()
            launched.clock.n_left -= 1
            self._sums.n_batches += 1
            self._sums.n_rows += x.shape[0]
        else:
            launched.clock.n_left = 0  # the clock did not tick
        if launched.limits_room:
            launched.unsettled.append((x, target))
        self.state.age += batch

    def _launched_step(self, x: Tensor, target: Tensor | None) -> None:
        """The device's work in a step; nothing here depends on the host but the shape of x."""
        assert self._launched
        clock = self._launched.clock
        self._train(x, target, clock.now())
        clock.tick()

    def settle(self) -> None:
        """Wait for the launched steps and learn whether they succeeded; on a CPU there is nothing to do.

        A leg whose loss was not finite in some step stays as it was before that step. Steps whose codes found too
        little room are repeated.
        """
        launched = self._launched
        if launched is None:
            return
        self.state.seconds += launched.stopwatch.read()
        verdict = launched.fate.verdict()
        if not verdict.failed:
            launched.settled(verdict, self.state.age)
        elif not self.state.failure:
            self._go_back(launched, verdict)

    def _go_back(self, launched: Launcher, verdict: Verdict) -> None:
        """Go back to the last step that was taken: for good, or to repeat the next ones with more room for codes."""
        n_lost = (self.state.age - verdict.age) // self.leg.schedule.batch_tokens
        self._sums.n_rows -= n_lost * self._sums.n_rows // max(1, self._sums.n_batches)
        self._sums.n_batches -= n_lost
        self.state.age = verdict.age
        if not verdict.lacked_room:
            self._fail(verdict.loss)
            return
        for x, target in launched.start_again(verdict, n_lost):
            self._launch(launched, x, target)
        self.settle()

    def _fail(self, loss: float) -> None:
        self.state.failure = f"the loss became {loss} at age {self.state.age} tokens"

    def _now(self, age: int) -> Now:
        optimizer = self.spec.optimizer
        return Now(age, self.learning_rate(age), penalty_warmth(optimizer, self.state.budget_tokens, age))

    def _train(self, x: Tensor, target: Tensor | None, now: Now) -> None:
        """Take one gradient step: forward by pieces of the batch, then gradients and Adam by pieces of the latents."""
        age_after = now.age + self.leg.schedule.batch_tokens
        dead = self.dead(now.age) if self.leg.dictionary.activation.weight_of_aux else None
        forward = self._dense_step if self.dense else self._sparse_step
        step = forward(x, target, dead, now)
        failed = None
        if self._launched:
            assert isinstance(age_after, Tensor)
            self._judge(self._launched, step, age_after)
            failed = self._launched.fate.failed
        elif not bool(torch.isfinite(step.loss.total)):
            self._fail(float(step.loss.total))
            return
        with torch.no_grad():
            self._update(step, now, failed)
            self._count(step, x.shape[0], age_after, failed)

    def _update(self, step: Step | AutogradStep, now: Now, failed: Tensor | None) -> None:
        """Compute the gradients of all parameters, clip them, and let Adam move the parameters.

        On a GPU nothing changes if `failed` (0 or 1) is 1.
        """
        state = self.state
        gradients = self._gradient_buffers()
        squares = in_parallel(lambda part: part.differentiate(step, gradients), self.parts)
        squares.append(step.b_dec.square().sum())
        state.n_steps += 1 if failed is None else 1 - failed
        adam = Adam(
            lr=now.learning_rate,
            betas=self.spec.optimizer.betas,
            n_steps=state.n_steps,
            shrink=self._shrink(torch.stack(squares).sum().sqrt()),
            failed=failed,
        )
        shares = parameter_rates(self.spec.optimizer, state.dictionary.d_model)
        in_parallel(lambda part: part.update(gradients, adam, shares, self.half_encoder), self.parts)
        adam.move(self.bias, step.b_dec)

    def _count(self, step: Step | AutogradStep, n_rows: int, age_after: int | Tensor, failed: Tensor | None) -> None:
        """Note which latents fired, and add the batch to the sums for the log; a failed step adds nothing."""
        loss = step.loss
        of_batch = (loss.total, loss.squared_error, step.variance, loss.n_active)
        numbers = torch.stack([number.detach().float() for number in of_batch])
        fired = loss.fired
        if failed is None:
            self._sums.n_batches += 1
            self._sums.n_rows += n_rows
        else:  # batches were counted when the step was launched
            fired = fired & (failed == 0)
            numbers = numbers.masked_fill(failed > 0, 0.0)
        last_fired = self.state.last_fired
        last_fired.copy_(torch.where(fired, age_after, last_fired))
        self._sums.numbers += numbers

    def _judge(self, launched: Launcher, step: Step | AutogradStep, age_after: Tensor) -> None:
        """Let the device note whether a step can be taken; the first one of a leg tells how much room codes need."""
        n_selected = step.n_selected if isinstance(step, Step) else None
        launched.fate.judge(step.loss.total.detach(), age_after, n_selected, launched.room)
        if launched.limits_room and launched.room is None:
            assert isinstance(step, Step)
            launched.make_room(step.codes.columns.shape[0])

    def _shrink(self, norm: Tensor) -> Tensor | None:
        """The divisor of gradients that keeps their norm at `clip` or below; None if none is needed."""
        if not self.spec.optimizer.clip:
            return None
        shrink = (norm / self.spec.optimizer.clip).clamp(min=1)
        if shrink.device.type == "cpu" and float(shrink) == 1:
            return None
        return shrink

    def _sparse_step(self, x: Tensor, target: Tensor | None, dead: Tensor | None, now: Now) -> Step:
        state = self.state
        room = self._launched.room if self._launched else None
        reading = Reading(state.units, self._encoder(x), state.whitening, target, room)
        return sparse_step(self.leg.dictionary, state.dictionary, x, reading=reading, dead=dead, warmth=now.warmth)

    def _dense_step(self, x: Tensor, target: Tensor | None, dead: Tensor | None, now: Now) -> AutogradStep:
        state = self.state
        x = state.units.normalise(x.float())
        if target is not None:
            target = state.units.out.normalise(target.float())
        parameters = {name: t.detach().requires_grad_() for name, t in state.dictionary.tensors().items()}
        with torch.enable_grad():
            dictionary = state.dictionary.with_tensors(parameters)
            if state.whitening is not None:
                dictionary = replace(dictionary, W_enc=dictionary.W_enc @ state.whitening)
            loss = training_loss(self.leg.dictionary, dictionary, x, target=target, dead=dead, warmth=now.warmth)
            loss.total.backward()
        gradients = {name: t.grad for name, t in parameters.items() if t.grad is not None}
        y = x if target is None else target
        return AutogradStep(loss, (y - y.mean(dim=0)).square().sum(), gradients)

    def _encoder(self, x: Tensor) -> Tensor:
        """W_enc in the dtype of the product with it."""
        asked = self.spec.precision
        half = asked == "bfloat16" or (asked == "auto" and x.dtype == torch.bfloat16)
        if not half:
            return self.state.dictionary.W_enc
        if self.half_encoder is None:
            self.half_encoder = self.state.dictionary.W_enc.bfloat16()
        return self.half_encoder

    def _gradient_buffers(self) -> dict[str, Tensor]:
        """Memory for gradients: this thread's last buffers, if they fit, since new memory costs as much as a pass."""
        parameters = self.state.dictionary.tensors()
        shapes = {name: parameters[name].shape for name in parameters if name in self.parts[0].triples}
        device = self.state.dictionary.W_enc.device
        last: dict[str, Tensor] = getattr(_scratch, "gradients", {})
        if {name: t.shape for name, t in last.items()} != shapes or last["W_enc"].device != device:
            _scratch.gradients = {name: torch.empty(shape, device=device) for name, shape in shapes.items()}
        if self._launched:
            self._launched.gradients = _scratch.gradients
        return _scratch.gradients

    # --- the training log -----------------------------------------------------------------------------------------

    def unreported(self) -> dict[str, Tensor]:
        """The sums that the next `look` will average, to be saved."""
        sums = self._sums
        counts = torch.tensor([sums.n_batches, sums.n_rows])
        return {"numbers": sums.numbers.clone(), "counts": counts}

    def take_up(self, unreported: Mapping[str, Tensor]) -> None:
        """Undo `unreported`."""
        n_batches, n_rows = unreported["counts"].tolist()
        self._sums.numbers.copy_(unreported["numbers"])
        self._sums.n_batches = n_batches
        self._sums.n_rows = n_rows

    def look(self) -> Progress | None:
        """Return averages since the last look, or None if no gradient step was taken."""
        sums = self._sums
        if not sums.n_batches:
            return None
        loss, error, variance, active = sums.numbers.tolist()
        n_batches = sums.n_batches
        n_rows = sums.n_rows
        sums.clear()
        return Progress(
            age=self.state.age,
            loss=loss / n_batches,
            fvu=error / max(variance, 1e-30),
            l0=active / n_rows,
            n_dead=int(self.dead().sum()),
            learning_rate=self.learning_rate(self.state.age - self.leg.schedule.batch_tokens),
            seconds=self.state.seconds,
        )
