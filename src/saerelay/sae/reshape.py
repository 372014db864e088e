"""Change a dictionary's shape: revive silent latents, add or remove latents or the skip connection, convert.

`transfer.carry` calls it for a leg whose dictionary is to differ from its parent's.
Shapes: B tokens, D model width, F latents, N silent latents.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saerelay.sae.architectures import architecture_named
from saerelay.sae.dictionary import LATENT_PARAMETERS, ROWS_AT_ONCE, Dictionary, check_rows, match_l0, widened
from saerelay.sae.kernels import encode_sparse, join_codes, latent_sums, reconstruct
from saerelay.sae.maps import RIDGE, regress
from saerelay.sae.refit import with_skip, without_skip

SAMPLE_ROWS = 8_192
"""Number of tokens on which the firing frequency of revived latents is set."""
SILENT_BELOW = 1 / 16_384
"""A latent that fires on a smaller share of tokens is silent."""
REVIVED_FREQUENCY = 1 / 3
"""How often revived latents fire at first, relative to the mean latent."""
ADDED_FREQUENCY = 0.1
"""The same for latents that are added to a dictionary: at a third they would displace too much (decision 026)."""


@dataclass(frozen=True)
class Shape:
    """What a dictionary is reshaped to."""

    architecture: str
    n_latents: int
    l0: float | None
    """Mean number of active latents; None where the architecture and its threshold stay as they are."""
    seed: int = 0
    skip_connection: bool | None = None
    """Whether a transcoder has a skip connection; None where that stays as it is."""


@torch.no_grad()
def revive(
    dictionary: Dictionary,
    x: Tensor,
    seed: int = 0,
    frequency: float = REVIVED_FREQUENCY,
    *,
    target: Tensor | None = None,
    first: int = 0,
) -> Dictionary:
    """Give latents that are silent on activations x (B, D) new directions; the other latents stay as they are.

    The latents before the index `first` stay in any case.

    Each takes as its decoder row the residual r of a token drawn with probability ∝ ‖r‖², as in Bricken et al. 2023,
    but its encoder is the matched filter for r against the rest of x, C⁻¹r / rᵀC⁻¹r with C the covariance of x (Capon
    1969), and its bias lets it fire `frequency` times as often as the mean latent. The decoder is best refitted after
    this.

    In a transcoder, r is the residual of the token's `target` (B, Dy), and the encoder is the matched filter for the
    activation that the transcoder read at that token. Raises DataError as `Dictionary.goal_of` does.
    """
    check_rows(x, "revive")
    x = widened(x)
    counts, residual = _firing_and_residual(dictionary, x, dictionary.goal_of(x, target))
    silent = first + (counts[first:] < SILENT_BELOW * len(x)).nonzero()[:, 0]
    if not len(silent):
        return dictionary
    chances = residual.square().sum(dim=1).double().cpu()
    if not bool(chances.sum() > 0) or not bool(torch.isfinite(chances).all()):
        return dictionary

    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(chances, len(silent), replacement=True, generator=generator)
    drawn = drawn.to(x.device)
    directions = torch.nn.functional.normalize(residual[drawn], dim=1)

    mean = x.mean(dim=0)
    sought = directions
    if target is not None:
        sought = torch.nn.functional.normalize(x[drawn] - mean, dim=1)
    filters = _matched_filters(x - mean, sought).to(x)

    # A filter responds to x with (x − mean)·filter. It fires on the `n_firing` tokens of the sample with the strongest
    # responses if its bias puts the weakest of these responses at the level that a latent must exceed to fire.
    sample = x[:SAMPLE_ROWS]
    n_fired = float(counts.sum())
    n_firing = max(1, round(frequency * n_fired / len(x) / dictionary.n_latents * len(sample)))
    answers = [((sample - mean) @ part.T).topk(n_firing, dim=0).values[-1] for part in filters.split(1024)]
    level = dictionary.activation.firing_level(dictionary, sample, silent)
    biases = level - torch.cat(answers) - filters @ mean
    r_mag = dictionary.r_mag
    return replace(
        dictionary,
        r_mag=None if r_mag is None else r_mag.index_fill(0, silent, 0.0),
        W_enc=dictionary.W_enc.index_copy(0, silent, filters.to(dictionary.W_enc.dtype)),
        b_enc=dictionary.b_enc.index_copy(0, silent, biases.to(dictionary.b_enc.dtype)),
        W_dec=dictionary.W_dec.index_copy(0, silent, directions.to(dictionary.W_dec.dtype)),
    )


def _firing_and_residual(dictionary: Dictionary, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return on how many of the tokens x (B, D) each latent fires (F), and the residual (B, Dy) of y (B, Dy)."""
    counts = torch.zeros_like(dictionary.b_enc)
    residuals = []
    for part, goal in zip(x.split(ROWS_AT_ONCE), y.split(ROWS_AT_ONCE), strict=True):
        codes, y_hat = reconstruct(dictionary, part)
        active = codes.columns[codes.values > 0].long()
        counts += torch.bincount(active, minlength=dictionary.n_latents)
        residuals.append(goal - y_hat)
    return counts, torch.cat(residuals)


def _matched_filters(centred: Tensor, directions: Tensor) -> Tensor:
    """C⁻¹r / rᵀC⁻¹r for directions r (N, D), with C the covariance of centred activations (B, D); float64."""
    cov = centred.T.double() @ centred.double() / len(centred)
    filters = regress(cov, directions.T.double(), RIDGE).T
    return filters / (filters * directions).sum(dim=1, keepdim=True)


@torch.no_grad()
def reshape(dictionary: Dictionary, x: Tensor, shape: Shape, *, target: Tensor | None = None) -> Dictionary:
    """Give a dictionary another architecture, number of latents, or mean L0 on activations x (B, D).

    With fewer latents, the ones that contribute most to reconstructions, by Σ z²‖w‖², stay in their order; new latents
    are added behind the others and revived (see `revive`). Other weights stay; `shape.l0` sets k, thresholds or (ReLU)
    biases. `target` (B, Dy) is what a transcoder reconstructs; its skip connection is fitted or dropped as `shape`
    asks. Raises DataError if it has to be fitted, or latents added, without a target.

    >>> sae = Dictionary(architecture="topk", k=1, W_enc=torch.eye(4), b_enc=torch.zeros(4), W_dec=torch.eye(4),
    ...                  b_dec=torch.zeros(4))
    >>> x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 2.0, 0.1])
    >>> smaller = reshape(sae, x, Shape("jumprelu", 2, 0.5))
    >>> smaller.W_dec.argmax(dim=1).tolist(), float((smaller.encode(x) > 0).sum(dim=1).float().mean())
    ([1, 2], 0.5)
    """
    sample = x[:SAMPLE_ROWS]
    n_before = dictionary.n_latents
    if shape.n_latents < n_before:
        dictionary = _pruned(dictionary, x, shape.n_latents)
    dictionary = _converted(dictionary, shape)
    if shape.l0:
        dictionary = match_l0(dictionary, sample, shape.l0)
    if shape.skip_connection and dictionary.W_skip is None:
        dictionary = with_skip(dictionary, x, dictionary.goal_of(x, target))
    elif shape.skip_connection is False:
        dictionary = without_skip(dictionary, x)
    if shape.n_latents > n_before:
        grown = _with_empty_latents(dictionary, shape.n_latents - n_before)
        dictionary = revive(grown, x, shape.seed, ADDED_FREQUENCY, target=target, first=dictionary.n_latents)
        if shape.l0:
            dictionary = match_l0(dictionary, sample, shape.l0)
    return dictionary


def _pruned(dictionary: Dictionary, x: Tensor, n_latents: int) -> Dictionary:
    """Keep only the latents that contribute most to reconstructions of x (B, D), in their order."""
    codes = join_codes([encode_sparse(dictionary, part) for part in x.split(ROWS_AT_ONCE)])
    squares = latent_sums(codes.with_values(codes.values.square()))
    contribution = squares * dictionary.W_dec.square().sum(dim=1)
    best = contribution.topk(n_latents).indices.sort().values
    rows = {name: tensor[best] for name, tensor in dictionary.tensors().items() if name in LATENT_PARAMETERS}
    return dictionary.with_tensors(rows)


def _converted(dictionary: Dictionary, shape: Shape) -> Dictionary:
    """The same weights under another architecture; k becomes the L0 asked for, or else stays."""
    kind = architecture_named(shape.architecture)
    activation = kind.of_dictionary(dictionary.k)
    if shape.l0:
        activation = activation.with_l0(shape.l0)
    return replace(
        dictionary,
        architecture=kind.name,
        k=activation.published_k,
        threshold=dictionary.threshold if kind.has_threshold else None,
        r_mag=_gate_scale(dictionary) if kind.has_gate else None,
    )


def _gate_scale(dictionary: Dictionary) -> Tensor:
    """r_mag of a dictionary: 0 where it had no gate."""
    return torch.zeros_like(dictionary.b_enc) if dictionary.r_mag is None else dictionary.r_mag


def _with_empty_latents(dictionary: Dictionary, n_added: int) -> Dictionary:
    """Append latents that never fire."""
    wider: dict[str, Tensor] = {}
    for name, tensor in dictionary.tensors().items():
        if name not in LATENT_PARAMETERS:
            continue
        added = tensor.new_zeros(n_added, *tensor.shape[1:])
        if name == "threshold":
            added += tensor.median()
        wider[name] = torch.cat([tensor, added])
    return dictionary.with_tensors(wider)
