"""Training: one SAE (`Trainee`), and several in lockstep (`Cohort`). Knows no language model, plan file or directory.

Everything scheduled is a pure function of a leg's own age (tokens it has seen); everything else that matters is in
`Trainee.state`. Lockstep is a loop over trainees, so that one that retires cannot change another's bits.
"""

import math
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from saerelay.planning.plan import Leg
from saerelay.planning.recipe import TrainSpec
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.loss import Loss, training_loss
from saerelay.sae.architectures.architecture import with_common_threshold
from saerelay.sae.initialise import initialise
from saerelay.sae.units import to_canonical, to_training_units
from saerelay.sae.kernels import Step, latent_pieces, sparse_step
from saerelay.sae.quality import fvu
from saerelay.sae.spec import takes_sparse_step
from saerelay.sae.threads import alone, in_parallel
from saerelay.site import Site
from saerelay.spec import seed_from

ARCHITECTURES_WITH_AUX = ("topk", "batchtopk")
_scratch = threading.local()


def learning_rate(leg: Leg, spec: TrainSpec, age: int) -> float:
    """Rate of the step that a leg takes at `age`: linear warm-up, constant, linear decay to zero."""
    total = leg.budget_tokens
    rise = (age + leg.batch_tokens) / (spec.warmup * total) if spec.warmup else 1.0
    fall = (total - age) / (spec.decay * total) if spec.decay else 1.0
    return leg.lr * min(1.0, rise, fall)


def parameter_rates(spec: TrainSpec, width: int) -> dict[str, float]:
    """Rate of each parameter of the latents, as a share of the learning rate, which is the decoder's.

    By default biases learn at a rate that does not fall with the width, as they should (Yang et al. 2022, table 8).
    """
    bias = spec.bias_lr or math.sqrt(width) / 5
    return {"W_enc": spec.encoder_lr, "b_enc": bias, "threshold": bias, "W_dec": 1.0}


def sparsity_weight(leg: Leg, spec: TrainSpec, age: int) -> float:
    """Share of the sparsity penalty in force at `age`: a linear warm-up."""
    whole = spec.sparsity_warmup * leg.budget_tokens
    return min(1.0, age / whole) if whole else 1.0


def check_due(leg: Leg, spec: TrainSpec, age: int) -> bool:
    """Whether a leg with a goal is measured at `age`: from a quarter of its budget on, 16 times in all of it."""
    total = leg.budget_tokens
    every = spec.batch_tokens * max(1, total // (16 * spec.batch_tokens))
    earliest = max(0.25, spec.warmup, spec.sparsity_warmup)
    return bool(leg.goal_fvu) and age % every == 0 and earliest * total <= age < (1 - spec.decay) * total


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
    whole: dict[str, Tensor]
    """Gradients of all latents, by name."""

    @property
    def b_dec(self) -> Tensor:
        """∂loss/∂b_dec (D)."""
        return self.whole["b_dec"]

    def gradients(self, latents: slice, into: dict[str, Tensor]) -> None:
        """Write the gradients of some latents, by parameter name, into the tensors given."""
        for name, gradient in into.items():
            gradient.copy_(self.whole[name][latents])


class Adam(NamedTuple):
    """One step of Adam (Kingma and Ba 2015), in one pass over memory."""

    lr: float
    betas: tuple[float, float]
    n_steps: Tensor
    shrink: Tensor | None
    """What gradients are divided by."""

    def move(self, triple: "Triple", gradient: Tensor, share: float = 1.0) -> None:
        """Move a parameter and its moments, at a share of the rate."""
        parameter, mean, square = triple
        torch._fused_adam_(  # pyright: ignore  # what torch.optim.Adam(fused=True) calls, which cannot take parts
            [parameter],
            [gradient],
            [mean],
            [square],
            [],
            [self.n_steps],
            lr=share * self.lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
            grad_scale=self.shrink,
        )


Triple = tuple[Tensor, Tensor, Tensor]
"""A parameter, the running mean of its gradient and that of its square."""


class Part:
    """Some latents of a dictionary in training; parts are worked on side by side."""

    def __init__(self, latents: slice, triples: dict[str, Triple]) -> None:
        self.latents = latents
        self.triples = {name: (p[latents], m[latents], s[latents]) for name, (p, m, s) in triples.items()}

    def differentiate(self, step: "Step | AutogradStep", gradients: dict[str, Tensor]) -> Tensor:
        """Write the gradients of these latents; Σ of their squares."""
        mine = {name: gradient[self.latents] for name, gradient in gradients.items()}
        step.gradients(self.latents, mine)
        return torch.stack([torch.linalg.vector_norm(gradient) for gradient in mine.values()]).square().sum()

    def update(
        self, gradients: dict[str, Tensor], adam: Adam, shares: dict[str, float], encoder: Tensor | None
    ) -> None:
        """Move these latents, each parameter at its share of the rate; `encoder` follows W_enc.

        Decoder rows keep unit norm, thresholds stay positive.
        """
        for name, triple in self.triples.items():
            adam.move(triple, gradients[name][self.latents], shares[name])
        W_dec = self.triples["W_dec"][0]
        W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True))
        if "threshold" in self.triples:
            self.triples["threshold"][0].clamp_(min=0)
        if encoder is not None:
            encoder[self.latents].copy_(self.triples["W_enc"][0])


class Trainee:
    """One dictionary in training, in training units (x − mean)/scale.

    `first` are raw activations (B, D) of its site that fix mean and scale; `inherited` is the folded parent, in
    canonical form, or None to start from scratch; `lr_share` multiplies the leg's learning rate. `dense` forces the
    autograd reference.
    """

    def __init__(
        self,
        leg: Leg,
        spec: TrainSpec,
        first: Tensor,
        inherited: Dictionary | None = None,
        *,
        lr_share: float = 1.0,
        dense: bool = False,
    ) -> None:
        self.leg, self.spec, self.lr_share = leg, spec, lr_share
        self.dense = dense or not takes_sparse_step(first.device.type)
        first = first.float()
        with alone():
            self.mean, self.scale = _units(first) if leg.dictionary.normalise else _no_units(first)
            power = spec.whitening if leg.dictionary.normalise else 0.0
            self.whitening = whitening_matrix(self._normalised(first), power) if power else None
            if inherited is None:
                generator = torch.Generator().manual_seed(seed_from("init", leg.seed, str(leg.site)))
                dictionary = initialise(leg.dictionary, self._normalised(first[:1024]), generator)
            else:
                dictionary = to_training_units(inherited.to(first.device), self.mean, self.scale)
            if self.whitening is not None:
                W_enc = torch.linalg.solve(self.whitening.double(), dictionary.W_enc.double(), left=False)
                dictionary = replace(dictionary, W_enc=W_enc.float())
            self._adopt(dictionary)
        self.age = 0
        self.last_fired = torch.zeros(dictionary.n_latents, dtype=torch.int64, device=first.device)
        self.failure = ""
        self.seconds = 0.0
        self._forget()

    @property
    def done(self) -> bool:
        """Whether the budget is spent, or training failed."""
        return self.age >= self.leg.budget_tokens or bool(self.failure)

    def learning_rate(self, age: int) -> float:
        """Rate of the step that it takes at `age`."""
        return self.lr_share * learning_rate(self.leg, self.spec, age)

    def canonical(self, x: Tensor | None = None) -> Dictionary:
        """The dictionary as it is now, for raw activations.

        A BatchTopK threshold is calibrated on raw activations `x` (B, D) so that mean L0 is k there.
        """
        now = replace(self.dictionary, **{name: t.clone() for name, t in self.dictionary.tensors().items()})
        if self.whitening is not None:
            now = replace(now, W_enc=now.W_enc @ self.whitening)
        dictionary = to_canonical(now, self.mean, self.scale)
        if x is not None and dictionary.architecture == "batchtopk":
            dictionary = calibrate_threshold(dictionary, x[:8192].float(), self.leg.dictionary.k)
        return dictionary

    def step(self, x: Tensor) -> None:
        """Take one gradient step on a batch of raw activations (B, D)."""
        began = time.perf_counter()
        if x.shape[0]:
            with alone():
                self._train(x)
        self.age += 0 if self.failure else self.leg.batch_tokens
        self.seconds += time.perf_counter() - began

    def check(self, x: Tensor) -> None:
        """Begin the decay now if, after it, FVU on held-out activations x (B, D) will meet the leg's goal.

        The budget becomes that of which the tokens seen so far are the share before the decay.
        """
        assert self.leg.goal_fvu
        if fvu(self.canonical(x), x) * self.leg.decay_gain <= self.leg.goal_fvu:
            batch = self.leg.batch_tokens
            total = batch * math.ceil(self.age / (1 - self.spec.decay) / batch)
            self.leg = self.leg.changed(budget_tokens=total, goal_fvu=None)

    def _train(self, x: Tensor) -> None:
        """One gradient step: forward by pieces of the batch, then gradients and Adam by pieces of the latents."""
        dead = self.dead() if self.leg.dictionary.architecture in ARCHITECTURES_WITH_AUX else None
        step = self._dense_step(x, dead) if self.dense else self._sparse_step(x, dead)
        if not bool(torch.isfinite(step.loss.total)):
            self.failure = f"the loss became {float(step.loss.total)} at age {self.age} tokens"
            return
        with torch.no_grad():
            gradients = self._scratch()
            squares = in_parallel(lambda part: part.differentiate(step, gradients), self.parts)
            squares.append(step.b_dec.square().sum())
            norm = torch.stack(squares).sum().sqrt()
            shrink = (norm / self.spec.clip).clamp(min=1) if self.spec.clip else None
            if shrink is not None and shrink.device.type == "cpu" and float(shrink) == 1:
                shrink = None
            self.adam_steps += 1
            adam = Adam(self.learning_rate(self.age), self.spec.betas, self.adam_steps, shrink)
            shares = parameter_rates(self.spec, self.dictionary.d_model)
            in_parallel(lambda part: part.update(gradients, adam, shares, self.encoder), self.parts)
            adam.move(self.bias, step.b_dec)
            self.last_fired[step.loss.fired] = self.age + self.leg.batch_tokens
            seen = (step.loss.total, step.loss.squared_error, step.variance, step.loss.n_active)
            self._sums.append(torch.stack([number.detach().float() for number in seen]))
            self._rows += x.shape[0]

    def _sparse_step(self, x: Tensor, dead: Tensor | None) -> Step:
        return sparse_step(
            self.leg.dictionary,
            self.dictionary,
            x,
            units=(self.mean, self.scale),
            dead=dead,
            sparsity=sparsity_weight(self.leg, self.spec, self.age),
            encoder=self._encoder(x),
            whitening=self.whitening,
        )

    def _dense_step(self, x: Tensor, dead: Tensor | None) -> AutogradStep:
        x = self._normalised(x)
        parameters = {name: t.detach().requires_grad_() for name, t in self.dictionary.tensors().items()}
        sparsity = sparsity_weight(self.leg, self.spec, self.age)
        with torch.enable_grad():
            dictionary = replace(self.dictionary, **parameters)
            if self.whitening is not None:
                dictionary = replace(dictionary, W_enc=dictionary.W_enc @ self.whitening)
            loss = training_loss(self.leg.dictionary, dictionary, x, dead=dead, sparsity=sparsity)
            loss.total.backward()
        gradients = {name: t.grad for name, t in parameters.items() if t.grad is not None}
        return AutogradStep(loss, (x - x.mean(dim=0)).square().sum(), gradients)

    def _encoder(self, x: Tensor) -> Tensor:
        """W_enc in the dtype that the product with it runs in; `Part.update` keeps the copy up to date."""
        half = self.spec.precision == "bfloat16" or (self.spec.precision == "auto" and x.dtype == torch.bfloat16)
        if not half:
            return self.dictionary.W_enc
        if self.encoder is None:
            self.encoder = self.dictionary.W_enc.bfloat16()
        return self.encoder

    def dead(self) -> Tensor:
        """Bool (F): latents that have not fired for the leg's dead window."""
        return self.last_fired <= self.age - self.leg.dead_after_tokens

    def _normalised(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.scale

    def _adopt(self, dictionary: Dictionary) -> None:
        """Train these parameters from now on, with a fresh optimizer; W_enc reads x times `whitening`."""
        self.dictionary = replace(dictionary, **{name: t.detach().clone() for name, t in dictionary.tensors().items()})
        trained = self.dictionary.tensors()
        if dictionary.architecture == "batchtopk":
            del trained["threshold"]  # calibrated when published
        self.encoder: Tensor | None = None
        self.mean_gradients = {name: torch.zeros_like(t) for name, t in trained.items()}
        self.mean_squares = {name: torch.zeros_like(t) for name, t in trained.items()}
        self.adam_steps = torch.zeros((), device=self.dictionary.W_enc.device)
        self._divide()

    def _divide(self) -> None:
        """Cut parameters and Adam's moments into parts, which are views."""
        moments = {name: (self.mean_gradients[name], self.mean_squares[name]) for name in self.mean_gradients}
        triples = {name: (self.dictionary.tensors()[name], *both) for name, both in moments.items()}
        self.bias = triples.pop("b_dec")
        self.parts = [Part(latents, triples) for latents in latent_pieces(self.dictionary)]

    def _scratch(self) -> dict[str, Tensor]:
        """Room for the gradients: what this thread used last, if it fits, since new memory costs as much as a pass."""
        shapes = {name: t.shape for name, t in self.dictionary.tensors().items() if name in self.parts[0].triples}
        last = getattr(_scratch, "gradients", {})
        device = self.dictionary.W_enc.device
        if {name: t.shape for name, t in last.items()} != shapes or last["W_enc"].device != device:
            _scratch.gradients = {name: torch.empty(shape, device=device) for name, shape in shapes.items()}
        return _scratch.gradients

    # --- what the log shows -------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._sums: list[Tensor] = []
        self._rows = 0

    def look(self) -> Progress | None:
        """Averages since the last look, or None if no gradient step was taken."""
        if not self._sums:
            return None
        loss, error, variance, active = torch.stack(self._sums).cpu().double().sum(dim=0).tolist()
        progress = Progress(
            age=self.age,
            loss=loss / len(self._sums),
            fvu=error / max(variance, 1e-30),
            l0=active / self._rows,
            n_dead=int(self.dead().sum()),
            learning_rate=self.learning_rate(self.age - self.leg.batch_tokens),
            seconds=self.seconds,
        )
        self._forget()
        return progress

    # --- resume -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Everything that is not a function of age."""
        state = {f"parameter.{name}": tensor for name, tensor in self.dictionary.tensors().items()}
        state |= {f"adam.exp_avg.{name}": tensor for name, tensor in self.mean_gradients.items()}
        state |= {f"adam.exp_avg_sq.{name}": tensor for name, tensor in self.mean_squares.items()}
        state["adam.step"] = self.adam_steps
        state |= {"mean": self.mean, "scale": self.scale, "last_fired": self.last_fired}
        state |= {} if self.whitening is None else {"whitening": self.whitening}
        state |= {"age": torch.tensor(self.age), "budget": torch.tensor(self.leg.budget_tokens)}
        state |= {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in ("seconds", "lr_share")}
        return state

    @classmethod
    def restore(cls, leg: Leg, spec: TrainSpec, state: Mapping[str, Tensor], failure: str = "") -> "Trainee":
        """Undo `state`."""
        self = cls.__new__(cls)
        budget = int(state["budget"])
        ending = budget < leg.budget_tokens
        self.leg = leg.changed(budget_tokens=budget, goal_fvu=None) if ending else leg
        self.spec = spec
        self.dense = not takes_sparse_step(state["mean"].device.type)
        self.mean, self.scale, self.last_fired = state["mean"], state["scale"], state["last_fired"]
        self.whitening = state.get("whitening")
        self.lr_share = float(state["lr_share"])
        self.age, self.seconds, self.failure = int(state["age"]), float(state["seconds"]), failure
        named = {key.removeprefix("parameter."): t for key, t in state.items() if key.startswith("parameter.")}
        k = leg.dictionary.k if leg.dictionary.architecture in ("topk", "batchtopk") else None
        self._adopt(Dictionary(architecture=leg.dictionary.architecture, k=k, **named))
        self.mean_gradients = {name: state[f"adam.exp_avg.{name}"] for name in self.mean_gradients}
        self.mean_squares = {name: state[f"adam.exp_avg_sq.{name}"] for name in self.mean_squares}
        self.adam_steps = state["adam.step"]
        self._divide()
        self._forget()
        return self


def _units(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D) and scale (scalar): the centred activations over `scale` have mean square 1 in each dimension."""
    parts = x.cpu().split(4096)
    mean = torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0) / len(x)
    square = torch.stack([(part.double() - mean).square().sum() for part in parts]).sum() / x.numel()
    return mean.to(x), square.sqrt().clamp(min=1e-12).to(x)


def whitening_matrix(x: Tensor, power: float) -> Tensor:
    """(C + λI)^-power of the covariance C of x (B, D), in training units; λ is a thousandth of the mean variance.

    An encoder that reads x times this learns as if its gradient were multiplied by C^(-2·power): directions of little
    variance keep up (as in K-FAC, Martens and Grosse 2015, and Shampoo, Gupta et al. 2018, of which this is the
    input's half, held fixed). Entries are rounded to bfloat16, so that products in it change nothing.

    >>> x = torch.randn(4096, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([4.0, 0.5])
    >>> (x @ whitening_matrix(x, 0.5)).std(dim=0).round(decimals=1)
    tensor([1., 1.])
    """
    variances, axes = torch.linalg.eigh((x.T @ x / len(x)).double())
    damped = variances + 1e-3 * variances.mean()
    return ((axes * damped**-power) @ axes.T).bfloat16().float()


def _no_units(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(x[0]), torch.ones_like(x[0, 0])


class Cohort:
    """Trainees stepping in lockstep on one stream's batches.

    >>> from saerelay.planning.plan import Leg
    >>> from saerelay.planning.recipe import TrainSpec
    >>> from saerelay.sae.spec import DictionarySpec
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

    def step(self, activations: Mapping[Site, Tensor], again: int = 0) -> None:
        """Give every live trainee the stream's batch at its site, {site: (B, D)}, cut into its own batches.

        `again`: only those that train on a block more often than that.
        """
        live = [trainee for trainee in self.live if trainee.leg.reuse > again]
        gradient_steps = [t for t in live if activations[t.leg.site].device.type == "cpu"]
        side_by_side = gradient_steps[: len(gradient_steps) // torch.get_num_threads() * torch.get_num_threads()]
        for trainee in live:
            if trainee not in side_by_side:
                self._step(trainee, activations[trainee.leg.site])
        before, began = [t.seconds for t in side_by_side], time.perf_counter()
        with alone():
            in_parallel(lambda t: self._step(t, activations[t.leg.site]), side_by_side)
        took = [t.seconds - was for t, was in zip(side_by_side, before, strict=True)]
        share = (time.perf_counter() - began) / sum(took) if took else 0.0
        for trainee, was, own in zip(side_by_side, before, took, strict=True):
            trainee.seconds = was + own * share

    def _step(self, trainee: Trainee, rows: Tensor) -> None:
        for x in rows.tensor_split(self.batch_tokens // trainee.leg.batch_tokens):
            if not trainee.done:
                trainee.step(x)
