"""Sparse autoencoders: the trained object, and the loss each architecture is trained with. All SAE maths is here.

Shapes: B tokens, D model width, F latents. One row per latent: W_enc (F, D), b_enc (F), W_dec (F, D), b_dec (D),
threshold (F). Canonical form acts on raw activations, with no normalisation factor and no pre-encoder bias:

    pre = x W_encᵀ + b_enc        z = activation(pre)        x_hat = z W_dec + b_dec

Losses are written for training units (see `to_training_units`), with autograd, and are the reference that the sparse
step of `kernels` is tested against.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, assert_never

import torch
from torch import Tensor

from saerelay.sae.architectures import Architecture

from saerelay.sae.spec import DictionarySpec

AUX_EVERY = 16
"""AuxK looks at every 16th token of a batch, a fair sample of shuffled rows: as good, cheaper, and fewer stay dead."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Dictionary:
    """A sparse autoencoder in canonical form.

    >>> sae = Dictionary(architecture="topk", k=2, W_enc=torch.eye(4), b_enc=torch.zeros(4),
    ...                  W_dec=torch.eye(4), b_dec=torch.zeros(4))
    >>> z = sae.encode(torch.tensor([3.0, 1.0, 2.0, -1.0]))
    >>> z, sae.decode(z)
    (tensor([3., 0., 2., 0.]), tensor([3., 0., 2., 0.]))

    `topk` keeps the k largest pre-activations of each token if positive; `relu` all positive ones; `jumprelu` and
    `batchtopk` (at inference) those strictly above the latent's threshold and above zero.
    """

    architecture: Architecture
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    k: int | None = None

    @property
    def n_latents(self) -> int:
        """Number of latents F."""
        return self.W_enc.shape[0]

    @property
    def d_model(self) -> int:
        """Width D of the activations."""
        return self.W_enc.shape[1]

    def pre_activations(self, x: Tensor) -> Tensor:
        """Pre-activations (..., F) of activations x (..., D)."""
        return torch.nn.functional.linear(x, self.W_enc, self.b_enc)

    def encode(self, x: Tensor) -> Tensor:
        """Codes z (..., F) of activations x (..., D): non-negative, mostly zero."""
        pre = self.pre_activations(x)
        match self.architecture:
            case "topk":
                assert self.k is not None
                return keep_top(pre, self.k)
            case "relu":
                return pre.relu()
            case "batchtopk" | "jumprelu":
                assert self.threshold is not None
                return pre.relu() * (pre > self.threshold)
            case unreachable:
                assert_never(unreachable)

    def decode(self, z: Tensor) -> Tensor:
        """Reconstruction x_hat (..., D) of codes z (..., F)."""
        return z @ self.W_dec + self.b_dec

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruct activations x (..., D)."""
        return self.decode(self.encode(x))

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name."""
        named = {name: getattr(self, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device_or_dtype: torch.device | str | torch.dtype) -> "Dictionary":
        """The same dictionary on another device or in another dtype."""
        return replace(self, **{name: tensor.to(device_or_dtype) for name, tensor in self.tensors().items()})


@dataclass(frozen=True, eq=False)
class LayerNormed:
    """A dictionary of activations that are first normalised token by token, as OpenAI's and some of SAELens are.

    With mean m and deviation s (of a token's D values, D − 1 under the root), u = (x − m)/(s + eps) is encoded, and
    x_hat = s·u_hat + m. No dictionary of raw x equals it; `at_scale` is the nearest.

    >>> sae = Dictionary(architecture="relu", W_enc=torch.eye(4), b_enc=torch.zeros(4), W_dec=torch.eye(4),
    ...                  b_dec=torch.zeros(4))
    >>> LayerNormed(sae).encode(torch.tensor([10.0, 12.0, 10.0, 8.0]))
    tensor([0.0000, 1.2247, 0.0000, 0.0000])
    """

    dictionary: Dictionary
    eps: float = 1e-5

    @property
    def d_model(self) -> int:
        """Width D of the activations."""
        return self.dictionary.d_model

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u (..., D), m and s (..., 1) of activations x (..., D)."""
        mean, deviation = x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True)
        return (x - mean) / (deviation + self.eps), mean, deviation

    def encode(self, x: Tensor) -> Tensor:
        """Codes z (..., F) of activations x (..., D)."""
        return self.dictionary.encode(self.normalise(x)[0])

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruct activations x (..., D)."""
        u, mean, deviation = self.normalise(x)
        return self.dictionary(u) * deviation + mean

    def to(self, device_or_dtype: torch.device | str | torch.dtype) -> "LayerNormed":
        """The same on another device or in another dtype."""
        return replace(self, dictionary=self.dictionary.to(device_or_dtype))

    @torch.no_grad()
    def at_scale(self, x: Tensor) -> Dictionary:
        """The dictionary of raw activations that takes all tokens to have the median deviation of x (B, D).

        The mean of each token is taken out exactly; what comes back is their average, the same for all tokens.
        """
        d, (_, means, deviations) = self.dictionary, self.normalise(x)
        scale, mean = deviations.median(), means.mean()
        W_enc = (d.W_enc - d.W_enc.mean(dim=1, keepdim=True)) / (scale + self.eps)
        return replace(d, W_enc=W_enc, W_dec=d.W_dec * scale, b_dec=d.b_dec * scale + mean)


def keep_top(pre: Tensor, k: int) -> Tensor:
    """Zero all but the k largest entries of each row, and negative ones: (..., F) -> (..., F)."""
    values, indices = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, indices, values.relu())


def keep_top_of_batch(pre: Tensor, k: int) -> Tensor:
    """Zero all but the k·B largest entries of a batch (B, F), and negative ones (BatchTopK, Bussmann et al. 2024)."""
    flat = pre.flatten()
    values, indices = flat.topk(k * pre.shape[0], sorted=False)
    return torch.zeros_like(flat).scatter(0, indices, values.relu()).view_as(pre)


@torch.no_grad()
def calibrate_threshold(dictionary: Dictionary, x: Tensor, l0: float) -> Dictionary:
    """Give all latents the one threshold at which mean L0 on activations x (B, D) is `l0` (BatchTopK at inference)."""
    threshold = _reached(dictionary.pre_activations(x), l0).clamp(min=0)
    return replace(dictionary, threshold=threshold.expand(dictionary.n_latents).clone())


@torch.no_grad()
def match_l0(dictionary: Dictionary, x: Tensor, l0: float) -> Dictionary:
    """Shift what decides which latents are active until mean L0 on activations x (B, D) is `l0`.

    BatchTopK: its one threshold. JumpReLU: all thresholds times one factor. ReLU: one number is added to all biases.
    TopK has no other L0 than k. A dictionary that does not reach `l0` with all it has is left at what it reaches.

    >>> sae = Dictionary(architecture="relu", W_enc=torch.eye(4), b_enc=torch.ones(4), W_dec=torch.eye(4),
    ...                  b_dec=torch.zeros(4))
    >>> x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    >>> round(float((match_l0(sae, x, 1.0).encode(x) > 0).sum(dim=1).float().mean()), 2)
    1.0
    """
    d = dictionary
    match d.architecture:
        case "topk":
            return d
        case "batchtopk":
            return calibrate_threshold(d, x, l0)
        case "relu":
            return replace(d, b_enc=d.b_enc - _reached(d.pre_activations(x), l0))
        case "jumprelu":
            assert d.threshold is not None
            factor = _reached(d.pre_activations(x) / d.threshold.clamp(min=1e-12), l0).clamp(min=1e-3)
            return replace(d, threshold=d.threshold * factor)
        case unreachable:
            assert_never(unreachable)


@torch.no_grad()
def mean_l0(dictionary: Dictionary, x: Tensor) -> float:
    """Mean number of active latents on activations x (B, D)."""
    return sum(int((dictionary.encode(part) > 0).sum()) for part in x.split(1024)) / max(1, len(x))


def _reached(scores: Tensor, l0: float) -> Tensor:
    """The level that l0·B of the scores (B, F) are above."""
    n = min(round(l0 * scores.shape[0]), scores.numel() - 1)
    return scores.flatten().topk(n + 1, sorted=False).values.min()


# --- training units ---------------------------------------------------------------------------------------------


def to_training_units(dictionary: Dictionary, mean: Tensor, scale: Tensor) -> Dictionary:
    """Rewrite a dictionary of raw x as one of (x − mean)/scale, exactly; codes are divided by `scale` (a scalar)."""
    d = dictionary
    return replace(
        d,
        b_enc=(d.b_enc + d.W_enc @ mean) / scale,
        b_dec=(d.b_dec - mean) / scale,
        threshold=None if d.threshold is None else d.threshold / scale,
    )


def to_canonical(dictionary: Dictionary, mean: Tensor, scale: Tensor) -> Dictionary:
    """Undo `to_training_units`: a dictionary of (x − mean)/scale becomes one of raw x."""
    d = dictionary
    return replace(
        d,
        b_enc=d.b_enc * scale - d.W_enc @ mean,
        b_dec=d.b_dec * scale + mean,
        threshold=None if d.threshold is None else d.threshold * scale,
    )


def unit_decoder(dictionary: Dictionary) -> Dictionary:
    """Move the norms of decoder rows into the encoder: ReLU and JumpReLU stay the same function, TopK re-ranks."""
    norms = dictionary.W_dec.norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    return scale_latents(replace(dictionary, W_dec=dictionary.W_dec / norms[:, None]), norms)


def scale_latents(dictionary: Dictionary, factor: Tensor) -> Dictionary:
    """Multiply the codes of each latent by a positive factor (F): encoder rows, biases and thresholds."""
    d = dictionary
    return replace(
        d,
        W_enc=d.W_enc * factor[:, None],
        b_enc=d.b_enc * factor,
        threshold=None if d.threshold is None else d.threshold * factor,
    )


def initialise(spec: DictionarySpec, x: Tensor, generator: torch.Generator) -> Dictionary:
    """A fresh dictionary in training units: random unit decoder rows, encoder tied to them at the best common scale.

    `x` (B, D) are activations in training units; the scale α minimises ‖x − α x_hat‖² in closed form, and JumpReLU
    thresholds start where L0 is the target.
    """
    rows = torch.randn(spec.n_latents, x.shape[1], generator=generator, dtype=torch.float32).to(x)
    W_dec = torch.nn.functional.normalize(rows, dim=1)
    zeros = torch.zeros(spec.n_latents).to(x)
    dictionary = Dictionary(
        architecture=spec.architecture,
        W_enc=W_dec.clone(),
        b_enc=zeros,
        W_dec=W_dec,
        b_dec=torch.zeros(x.shape[1]).to(x),
        threshold=zeros.clone() if spec.architecture in ("jumprelu", "batchtopk") else None,
        k=spec.k if spec.architecture in ("topk", "batchtopk") else None,
    )
    if dictionary.threshold is not None:
        assert spec.l0 is not None
        dictionary = calibrate_threshold(dictionary, x, spec.l0)
    x_hat = dictionary(x)
    alpha = ((x * x_hat).sum() / (x_hat * x_hat).sum()).clamp(min=1e-3)
    return scale_latents(dictionary, alpha.expand(spec.n_latents))


# --- losses -----------------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """The loss of a batch and what a training log needs; all but `total` are detached."""

    total: Tensor
    squared_error: Tensor
    """Σ ‖x − x_hat‖² over the batch."""
    n_active: Tensor
    """Non-zero codes in the batch."""
    fired: Tensor
    """Bool (F): latents active on some token."""


def error_divisor(spec: DictionarySpec, x: Tensor) -> float:
    """What Σ‖x − x_hat‖² is divided by in the loss: B·D in normalised units (so that it is close to FVU), else B."""
    return float(x.numel() if spec.normalise else x.shape[0])


def training_loss(
    spec: DictionarySpec,
    dictionary: Dictionary,
    x: Tensor,
    *,
    dead: Tensor | None = None,
    sparsity: float = 1.0,
) -> Loss:
    """The training loss on x (B, D) in training units, differentiable by autograd.

    `topk`, `batchtopk`: ‖x − x_hat‖² plus AuxK on the latents marked in `dead` (F, bool; Gao et al. 2024, eq. 7).
    `relu`: plus l1·Σz (Bricken et al. 2023; decoder rows have unit norm). `jumprelu`: plus
    l0_weight·((L0 − target)/target)² with straight-through gradients (Rajamanoharan et al. 2024, eq. 11 and 12).
    `sparsity` in [0, 1] scales the two penalties (their warm-up).
    """
    d, divisor = dictionary, error_divisor(spec, x)
    pre = d.pre_activations(x)
    penalty = x.new_zeros(())
    match spec.architecture:
        case "topk":
            z = keep_top(pre, spec.k)
        case "batchtopk":
            z = keep_top_of_batch(pre, spec.k)
        case "relu":
            z = pre.relu()
            penalty = sparsity * spec.l1 * z.sum() / divisor
        case "jumprelu":
            assert d.threshold is not None
            z = jump(pre, d.threshold, spec.bandwidth)
            l0 = step(pre, d.threshold, spec.bandwidth).sum() / x.shape[0]
            penalty = sparsity * spec.l0_weight * (l0 / spec.target_l0 - 1) ** 2
        case unreachable:
            assert_never(unreachable)
    residual = x - d.decode(z)
    error = residual.square().sum()
    total = error / divisor + penalty
    if dead is not None and spec.aux_weight:
        some = slice(None, None, AUX_EVERY)
        total = total + spec.aux_weight * aux_loss(d, pre[some], residual[some].detach(), dead)
    return Loss(total, error.detach(), (z > 0).sum().detach(), (z > 0).any(dim=0).detach())


def aux_loss(dictionary: Dictionary, pre: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
    """AuxK: what share of the residual (B, D) the D/2 strongest dead latents of each token fail to explain.

    Σ‖e − e_hat‖² / Σ‖e‖² with e_hat decoded without bias from the dead latents alone (Gao et al. 2024, eq. 6 and 7).
    """
    if not bool(dead.any()):
        return pre.new_zeros(())
    pre_dead = pre[:, dead]
    z = keep_top(pre_dead, k_aux(residual.shape[1], pre_dead.shape[1]))
    return (residual - z @ dictionary.W_dec[dead]).square().sum() / residual.square().sum().clamp(min=1e-30)


def k_aux(d_model: int, n_dead: int) -> int:
    """How many dead latents AuxK uses on each token: half the model's width, if there are as many."""
    return min(max(1, d_model // 2), n_dead)


class _Step(torch.autograd.Function):
    """1[pre > θ] with a rectangular straight-through window of width `bandwidth` around θ."""

    @staticmethod
    def forward(ctx, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[None, Tensor, None]:  # noqa: ANN001
        pre, threshold = ctx.saved_tensors
        window = ((pre - threshold).abs() < ctx.bandwidth / 2).to(pre.dtype)
        return None, -(gradients[0] * window).sum(dim=0) / ctx.bandwidth, None


class _Jump(torch.autograd.Function):
    """pre·1[pre > θ], the gradient to θ as for `_Step`."""

    @staticmethod
    def forward(ctx, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN001
        pre, threshold = ctx.saved_tensors
        window = ((pre - threshold).abs() < ctx.bandwidth / 2).to(pre.dtype)
        to_threshold = -(gradients[0] * window).sum(dim=0) * threshold / ctx.bandwidth
        return gradients[0] * (pre > threshold), to_threshold, None


def step(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Heaviside step of pre (B, F) at threshold (F), differentiable to the threshold."""
    return _Step.apply(pre, threshold, bandwidth)  # type: ignore[return-value]


def jump(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """JumpReLU of pre (B, F) at a non-negative threshold (F)."""
    return _Jump.apply(pre, threshold, bandwidth)  # type: ignore[return-value]
