"""Training: one SAE (`Trainee`), and several in lockstep (`Cohort`). Knows no language model, plan file or directory.

Everything scheduled is a pure function of a leg's own age (tokens it has seen); everything else that matters is in
`Trainee.state`. Lockstep is a loop over trainees, so that one that retires cannot change another's bits.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from saerelay.dictionaries import (
    Dictionary,
    Loss,
    calibrate_threshold,
    initialise,
    to_canonical,
    to_training_units,
    training_loss,
)
from saerelay.kernels import sparse_step
from saerelay.plan import ARCHITECTURES_WITH_SPARSE_STEP, Leg, takes_sparse_step
from saerelay.recipe import TrainSpec
from saerelay.site import Site
from saerelay.spec import seed_from
from saerelay.transfer import Refit


def learning_rate(leg: Leg, spec: TrainSpec, age: int) -> float:
    """Rate of the step that a leg takes at `age`: linear warm-up, constant, linear decay to zero."""
    trained, total = age - leg.refit_tokens, leg.budget_tokens - leg.refit_tokens
    rise = (trained + leg.batch_tokens) / (spec.warmup * total) if spec.warmup else 1.0
    fall = (total - trained) / (spec.decay * total) if spec.decay else 1.0
    return leg.lr * min(1.0, rise, fall)


def sparsity_weight(leg: Leg, spec: TrainSpec, age: int) -> float:
    """Share of the sparsity penalty in force at `age`: a linear warm-up."""
    whole = spec.sparsity_warmup * (leg.budget_tokens - leg.refit_tokens)
    return min(1.0, (age - leg.refit_tokens) / whole) if whole else 1.0


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


class Trainee:
    """One dictionary in training, in training units (x − mean)/scale.

    `first` are raw activations (B, D) of its site that fix mean and scale; `inherited` is the folded parent, in
    canonical form, or None to start from scratch. `dense` forces the autograd reference.
    """

    def __init__(
        self, leg: Leg, spec: TrainSpec, first: Tensor, inherited: Dictionary | None = None, *, dense: bool = False
    ) -> None:
        self.leg, self.spec = leg, spec
        self.dense = dense or not takes_sparse_step(leg.dictionary.architecture, first.device.type)
        first = first.float()
        self.mean, self.scale = _units(first) if leg.dictionary.normalise else _no_units(first)
        if inherited is None:
            generator = torch.Generator().manual_seed(seed_from("init", leg.seed, str(leg.site)))
            dictionary = initialise(leg.dictionary, self._normalised(first[:4096]), generator)
        else:
            dictionary = to_training_units(inherited.to(first.device), self.mean, self.scale)
        self._adopt(dictionary)
        self.age = 0
        self.last_fired = torch.zeros(dictionary.n_latents, dtype=torch.int64, device=first.device)
        self.refit = Refit(self.dictionary) if leg.refit_tokens else None
        self.failure = ""
        self.seconds = 0.0
        self._forget()

    @property
    def done(self) -> bool:
        """Whether the budget is spent, or training failed."""
        return self.age >= self.leg.budget_tokens or bool(self.failure)

    def canonical(self, x: Tensor | None = None) -> Dictionary:
        """The dictionary as it is now, for raw activations.

        A BatchTopK threshold is calibrated on raw activations `x` (B, D) so that mean L0 is k there.
        """
        detached = replace(self.dictionary, **{n: t.detach().clone() for n, t in self.dictionary.tensors().items()})
        dictionary = to_canonical(detached, self.mean, self.scale)
        if x is not None and dictionary.architecture == "batchtopk":
            dictionary = calibrate_threshold(dictionary, x[:8192].float(), self.leg.dictionary.k)
        return dictionary

    def step(self, x: Tensor) -> None:
        """Take in one batch of raw activations (B, D): a refit step first, then gradient steps."""
        began = time.perf_counter()
        x = self._normalised(x)
        if self.refit is not None:
            self._refit(self.refit, x)
        elif x.shape[0]:
            self._train(x)
        self.age += 0 if self.failure else self.leg.batch_tokens
        self.seconds += time.perf_counter() - began

    def _refit(self, refit: Refit, x: Tensor) -> None:
        """Gather for the refit; solve it with the last batch."""
        codes, age = refit.add(x), self.age + self.leg.batch_tokens
        self.last_fired[codes.columns[codes.values > 0].long()] = age
        if not bool(torch.isfinite(refit.residual).all()):
            self.failure = f"activations that are not finite at age {self.age} tokens"
        elif age >= self.leg.refit_tokens:
            self._adopt(refit.solve())
            self.refit = None

    def _train(self, x: Tensor) -> None:
        loss = self._gradients(x)
        if not bool(torch.isfinite(loss.total)):
            self.failure = f"the loss became {float(loss.total)} at age {self.age} tokens"
            return
        with torch.no_grad():
            self._constrain_gradients()
            self.optimizer.param_groups[0]["lr"] = learning_rate(self.leg, self.spec, self.age)
            self.optimizer.step()
            self._constrain_parameters()
            self.last_fired[loss.fired] = self.age + self.leg.batch_tokens
            variance = (x - x.mean(dim=0)).square().sum()
            self._sums.append(torch.stack([loss.total.detach(), loss.squared_error, variance, loss.n_active.float()]))
            self._rows += x.shape[0]

    def _gradients(self, x: Tensor) -> Loss:
        """Set the gradient of every parameter."""
        spec, d = self.leg.dictionary, self.dictionary
        dead = self.dead() if spec.architecture in ARCHITECTURES_WITH_SPARSE_STEP else None
        if self.dense:
            self.optimizer.zero_grad()
            loss = training_loss(spec, d, x, dead=dead, sparsity=sparsity_weight(self.leg, self.spec, self.age))
            loss.total.backward()
            return loss
        with torch.no_grad():
            loss, gradients = sparse_step(spec, d, x, dead=dead)
        for name, gradient in gradients.items():
            getattr(d, name).grad = gradient
        return loss

    def dead(self) -> Tensor:
        """Bool (F): latents that have not fired for the leg's dead window."""
        return self.last_fired <= self.age - self.leg.dead_after_tokens

    def _constrain_gradients(self) -> None:
        """Clip the common norm; drop what would only lengthen decoder rows."""
        d = self.dictionary
        if self.spec.clip:
            torch.nn.utils.clip_grad_norm_([p for p in d.tensors().values() if p.grad is not None], self.spec.clip)
        assert d.W_dec.grad is not None
        d.W_dec.grad -= torch.linalg.vecdot(d.W_dec.grad, d.W_dec)[:, None] * d.W_dec

    def _constrain_parameters(self) -> None:
        self.dictionary.W_dec.div_(self.dictionary.W_dec.norm(dim=1, keepdim=True))
        if self.dictionary.threshold is not None:
            self.dictionary.threshold.clamp_(min=0)

    def _normalised(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.scale

    def _adopt(self, dictionary: Dictionary) -> None:
        """Train this dictionary from now on, with a fresh optimizer."""
        parameters = {name: t.detach().clone().requires_grad_() for name, t in dictionary.tensors().items()}
        self.dictionary = replace(dictionary, **parameters)
        self.optimizer = torch.optim.Adam(list(parameters.values()), lr=self.leg.lr, betas=self.spec.betas, fused=True)

    # --- what the log shows -------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._sums: list[Tensor] = []
        self._rows = 0

    def look(self) -> Progress | None:
        """Averages since the last look, or None if no gradient step was taken."""
        if not self._sums:
            return None
        loss, error, variance, active = torch.stack(self._sums).cpu().double().sum(dim=0).tolist()
        rate = learning_rate(self.leg, self.spec, self.age - self.leg.batch_tokens)
        progress = Progress(
            age=self.age,
            loss=loss / len(self._sums),
            fvu=error / max(variance, 1e-30),
            l0=active / self._rows,
            n_dead=int(self.dead().sum()),
            learning_rate=rate,
            seconds=self.seconds,
        )
        self._forget()
        return progress

    # --- resume -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Everything that is not a function of age."""
        state = {f"parameter.{name}": tensor.detach() for name, tensor in self.dictionary.tensors().items()}
        for name, parameter in self.dictionary.tensors().items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"adam.{key}.{name}"] = value
        state |= {"mean": self.mean, "scale": self.scale, "last_fired": self.last_fired}
        state |= {"age": torch.tensor(self.age), "seconds": torch.tensor(self.seconds, dtype=torch.float64)}
        if self.refit is not None:
            state |= {f"refit.{key}": value for key, value in self.refit.state().items()}
        return state

    @classmethod
    def restore(cls, leg: Leg, spec: TrainSpec, state: Mapping[str, Tensor], failure: str = "") -> "Trainee":
        """Undo `state`."""
        self = cls.__new__(cls)
        self.leg, self.spec = leg, spec
        self.dense = not takes_sparse_step(leg.dictionary.architecture, state["mean"].device.type)
        self.mean, self.scale, self.last_fired = state["mean"], state["scale"], state["last_fired"]
        self.age, self.seconds, self.failure = int(state["age"]), float(state["seconds"]), failure
        named = {key.removeprefix("parameter."): t for key, t in state.items() if key.startswith("parameter.")}
        k = leg.dictionary.k if leg.dictionary.architecture in ("topk", "batchtopk") else None
        self._adopt(Dictionary(architecture=leg.dictionary.architecture, k=k, **named))
        for name, parameter in self.dictionary.tensors().items():
            moments = {
                key: state[f"adam.{key}.{name}"]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"adam.{key}.{name}" in state
            }
            if moments:
                self.optimizer.state[parameter] = moments
        self.refit = None
        if "refit.target" in state:
            self.refit = Refit(self.dictionary)
            self.refit.restore({key.removeprefix("refit."): t for key, t in state.items() if key.startswith("refit.")})
        self._forget()
        return self


def _units(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D) and scale (scalar): the centred activations over `scale` have mean square 1 in each dimension."""
    exact = x.cpu().double()
    mean = exact.mean(dim=0)
    scale = (exact - mean).square().mean().sqrt().clamp(min=1e-12)
    return mean.to(x), scale.to(x)


def _no_units(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(x[0]), torch.ones_like(x[0, 0])


class Cohort:
    """Trainees stepping in lockstep on one stream's batches.

    >>> from saerelay.plan import Leg
    >>> from saerelay.recipe import DictionarySpec, TrainSpec
    >>> spec = DictionarySpec(n_latents=32, k=4)
    >>> leg = Leg(id="L0", role="root", layer=0, module="resid_post", dictionary=spec, budget_tokens=512,
    ...           batch_tokens=64, lr=1e-2, dead_after_tokens=512, seed=0)
    >>> x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    >>> cohort = Cohort(batch_tokens=128)
    >>> cohort.add(Trainee(leg, TrainSpec(), x))
    >>> for batch in x.split(128):
    ...     cohort.step({Site(0): batch})
    >>> cohort.live, cohort["L0"].age
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

    def step(self, activations: Mapping[Site, Tensor]) -> None:
        """Give every live trainee the stream's batch at its site, {site: (B, D)}, cut into its own batches."""
        for trainee in self.live:
            parts = self.batch_tokens // trainee.leg.batch_tokens
            for x in activations[trainee.leg.site].tensor_split(parts):
                if not trainee.done:
                    trainee.step(x)
