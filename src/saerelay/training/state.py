"""Everything about an SAE in training that is not a function of its age: parameters, units, optimizer and counts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saerelay.planning.leg import Leg
from saerelay.planning.recipe import TrainSpec
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.initialise import initialise
from saerelay.sae.threads import alone
from saerelay.sae.units import Balance, Units
from saerelay.spec import seed_from
from saerelay.training.alignment import Alignment


@dataclass
class TraineeState:
    """Everything about a trainee that is not a function of its age; exactly this is saved."""

    dictionary: Dictionary
    """In training units; W_enc reads activations times `whitening`."""
    units: Units
    whitening: Tensor | None
    """(D, D); None if the encoder reads activations as they are."""
    gradient_means: dict[str, Tensor]
    """Adam's first moments, by parameter; parameters that are not trained have none."""
    gradient_squares: dict[str, Tensor]
    """Adam's second moments."""
    n_steps: Tensor
    """float32 scalar: the steps taken."""
    last_fired: Tensor
    """int64 (F): age at which each latent last fired."""
    budget_tokens: int
    """The leg's budget, or less once its goal is in sight."""
    age: int = 0
    lr_share: float = 1.0
    """Factor on the leg's learning rate."""
    seconds: float = 0.0
    """Seconds spent in steps."""
    failure: str = ""
    """Why training stopped; "" while it goes on."""
    alignment: Alignment | None = None
    """Alignment of the layers that share the leg, if several do."""

    @classmethod
    def begin(
        cls,
        dictionary: Dictionary,
        units: Units,
        whitening: Tensor | None,
        *,
        budget_tokens: int,
        lr_share: float = 1.0,
    ) -> "TraineeState":
        """The state at age 0, with its own copy of the parameters and a fresh optimizer."""
        own = {}
        for name, tensor in dictionary.tensors().items():
            own[name] = tensor.detach().clone(memory_format=torch.contiguous_format)  # as the GPU's kernels read it
        trained = {name: tensor for name, tensor in own.items() if name != "W_skip"}  # W_skip is set in closed form
        if dictionary.activation.threshold_is_calibrated:
            del trained["threshold"]
        device = dictionary.W_enc.device
        return cls(
            dictionary=dictionary.with_tensors(own),
            units=units,
            whitening=whitening,
            gradient_means={name: torch.zeros_like(tensor) for name, tensor in trained.items()},
            gradient_squares={name: torch.zeros_like(tensor) for name, tensor in trained.items()},
            n_steps=torch.zeros((), device=device),
            last_fired=torch.zeros(dictionary.n_latents, dtype=torch.int64, device=device),
            budget_tokens=budget_tokens,
            lr_share=lr_share,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything but a failure, as tensors; a failed leg is not saved."""
        tensors = {f"parameter.{name}": tensor for name, tensor in self.dictionary.tensors().items()}
        for name, tensor in self.gradient_means.items():
            tensors[f"adam.exp_avg.{name}"] = tensor
        for name, tensor in self.gradient_squares.items():
            tensors[f"adam.exp_avg_sq.{name}"] = tensor
        if self.whitening is not None:
            tensors["whitening"] = self.whitening
        if self.alignment is not None:
            tensors |= {f"alignment.{name}": tensor for name, tensor in self.alignment.tensors().items()}
        tensors["adam.step"] = self.n_steps
        tensors["mean"] = self.units.mean
        tensors["scale"] = self.units.scale
        if self.units.target:
            tensors["target_mean"] = self.units.target.mean
            tensors["target_scale"] = self.units.target.scale
        tensors["last_fired"] = self.last_fired
        tensors["age"] = torch.tensor(self.age)
        tensors["budget"] = torch.tensor(self.budget_tokens)
        tensors["seconds"] = torch.tensor(self.seconds, dtype=torch.float64)
        tensors["lr_share"] = torch.tensor(self.lr_share, dtype=torch.float64)
        return tensors

    @classmethod
    def restore(cls, leg: Leg, tensors: Mapping[str, Tensor]) -> "TraineeState":
        """Undo `tensors`."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}

        activation = leg.dictionary.activation
        target = Units(tensors["target_mean"], tensors["target_scale"]) if "target_mean" in tensors else None
        return cls(
            dictionary=Dictionary(architecture=activation.name, k=activation.published_k, **under("parameter.")),
            units=Units(tensors["mean"], tensors["scale"], target),
            whitening=tensors.get("whitening"),
            gradient_means=under("adam.exp_avg."),
            gradient_squares=under("adam.exp_avg_sq."),
            n_steps=tensors["adam.step"],
            last_fired=tensors["last_fired"],
            budget_tokens=int(tensors["budget"]),
            age=int(tensors["age"]),
            lr_share=float(tensors["lr_share"]),
            seconds=float(tensors["seconds"]),
            alignment=Alignment.restore(leg.site, leg.shared_sites, under("alignment.")),
        )


def balance_of(leg: Leg, spec: TrainSpec) -> Balance:
    """The power by which a leg's dimensions are balanced."""
    return spec.optimizer.balance if leg.dictionary.normalise else 0.0


def units_of(leg: Leg, spec: TrainSpec, first: Tensor, target: Tensor | None = None) -> Units:
    """The units that a leg trains in, fixed by the first raw activations (B, D) of its site.

    `target` (B, Dy) are the first activations that a transcoder reconstructs.
    """
    if target is not None:
        return replace(units_of(leg, spec, first), target=units_of(leg, spec, target))
    if not leg.dictionary.normalise:
        return Units.raw(first.float())
    return Units.fitted_to(first.float(), balance_of(leg, spec))


def first_state(
    leg: Leg,
    spec: TrainSpec,
    first: Tensor,
    inherited: Dictionary | None = None,
    *,
    target: Tensor | None = None,
    lr_share: float = 1.0,
) -> TraineeState:
    """The state at age 0.

    `first` are raw activations (B, D) of the leg's site that fix its units, and `target` (B, Dy) the activations that a
    transcoder reconstructs; `inherited` is the folded parent, in canonical form, or None to start from scratch.
    """
    first = first.float()
    with alone():
        units = units_of(leg, spec, first, target)
        normalised = units.normalise(first)
        if inherited is None:
            generator = torch.Generator().manual_seed(seed_from("init", leg.seed, str(leg.site)))
            goal = None if target is None else units.out.normalise(target.float())
            dictionary = initialise(leg.dictionary, normalised, generator, goal)
        else:
            dictionary = units.from_canonical(inherited.to(first.device))
        whitening = None
        power = spec.optimizer.whitening
        if power and leg.dictionary.normalise:
            whitening = whitening_matrix(normalised, power)
            W_enc = torch.linalg.solve(whitening.double(), dictionary.W_enc.double(), left=False)
            dictionary = replace(dictionary, W_enc=W_enc.float())
        return TraineeState.begin(dictionary, units, whitening, budget_tokens=leg.budget_tokens, lr_share=lr_share)


def whitening_matrix(x: Tensor, power: float) -> Tensor:
    """(C + λI)^-power of the covariance C of x (B, D), in training units; λ is a thousandth of the mean variance.

    An encoder that reads x times this matrix learns as if its gradient were multiplied by C^(-2·power): directions of
    low variance keep up (as in K-FAC, Martens and Grosse 2015, and Shampoo, Gupta et al. 2018, of which this is the
    input side, held fixed). Entries are rounded to bfloat16, so that products in bfloat16 change nothing.

    >>> x = torch.randn(4096, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([4.0, 0.5])
    >>> (x @ whitening_matrix(x, 0.5)).std(dim=0).round(decimals=1)
    tensor([1., 1.])
    """
    variances, axes = torch.linalg.eigh((x.T @ x / len(x)).double())
    damped = variances + 1e-3 * variances.mean()
    return ((axes * damped**-power) @ axes.T).bfloat16().float()
