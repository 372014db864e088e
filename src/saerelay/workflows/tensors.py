"""SAEs in Python: train, transfer and measure them on your own activations, without a language model or files."""

import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from saerelay.analysis.metrics import MetricSums
from saerelay.data.stream import AbstractStream
from saerelay.errors import DataError, LegFailed, RecipeError, TransferError
from saerelay.planning.batches import batch_for
from saerelay.planning.legs import auto_dead_after, auto_lr
from saerelay.planning.plan import Leg, Schedule
from saerelay.planning.recipe import Recipe
from saerelay.runs.documents.quality import EvaluationMetrics
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.maps import AnyMoments, PairedMoments, map_between, rate_share, unexplained
from saerelay.sae.moments import Moments
from saerelay.sae.quality import mean_l0
from saerelay.sae.reshape import Shape
from saerelay.sae.spec import Method, SizedDictionarySpec
from saerelay.sae.transfer import L0_ROWS, Retraining, carry
from saerelay.sae.trials import RANDOM, try_methods
from saerelay.site import Site
from saerelay.training.engine import Trainee
from saerelay.training.state import balance_of, first_state, units_of
from saerelay.training.train import FIRST_ROWS
from saerelay.workflows.keys import sectioned

BUFFER_ROWS = 65_536
"""Number of rows of an iterator that are shuffled together."""

Rows = Tensor | np.ndarray
Activations = Rows | Iterable[Tensor] | Iterable[tuple[Tensor, Tensor]] | AbstractStream


def train(
    x: Activations,
    *,
    target: Rows | None = None,
    tokens: int | None = None,
    site: Site | None = None,
    progress: bool = True,
    **keys: Any,
) -> Dictionary:
    """Train an SAE on activations; the trained SAE reads them raw.

    >>> x = torch.randn(2048, 16, generator=torch.Generator().manual_seed(0))
    >>> sae = train(x, k=4, n_latents=64, batch_tokens=64, progress=False)
    >>> sae.n_latents, sae.encode(x[:3]).count_nonzero(dim=1).tolist()
    (64, [4, 4, 4])

    `x` is a tensor or array (N, D), an iterable of tensors (B, D), or a stream together with the `site` to read. With a
    `target` (N, Dy), or an iterable of pairs, the result is a transcoder. `tokens` is the number of rows to train on:
    by default each row of a tensor once; an iterator needs it. A tensor is read repeatedly, in a new order each time;
    an iterator is shuffled in buffers of 65,536 rows. `keys` are keys of the recipe's sections `[dictionary]` and
    `[train]`. Raises RecipeError for other keys or impossible values, DataError if the activations end too early,
    LegFailed if the loss is not finite.
    """
    recipe = Recipe.parse(sectioned(keys, ("dictionary", "train")), source="train")
    if isinstance(x, np.ndarray):
        x = torch.as_tensor(x)
    budget = tokens if tokens is not None else _n_rows(x)
    source = _Source.of(x, None if target is None else torch.as_tensor(target), site, recipe.train.seed)
    first = source.first
    spec = recipe.dictionary.sized(first.x.shape[1])
    leg = _leg(spec, recipe, first.x, budget, transcoder=first.target is not None)
    state = first_state(leg, recipe.train, first.x, target=first.target)
    return _trained(Trainee(leg, recipe.train, state), source, progress=progress)


def hop(
    sae: Dictionary,
    x_source: Rows,
    x_target: Rows,
    *,
    target: tuple[Rows, Rows] | None = None,
    tokens: int | None = None,
    progress: bool = True,
    **keys: Any,
) -> Dictionary:
    """Transfer a trained SAE to other activations of the same tokens: the whole hop, with the map that measures best.

    >>> x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    >>> sae = train(x, k=4, n_latents=64, batch_tokens=64, progress=False)
    >>> there = hop(sae, x, 3 * x + 1, tokens=0)
    >>> evaluate(there, 3 * x + 1).fvu < 1.1 * evaluate(sae, x).fvu
    True

    `x_source` (N, S) are activations at the site where it was trained and `x_target` (N, T) those at the target; their
    rows belong to the same tokens (only their number is checked). For a transcoder, `target` holds the activations it
    reconstructs, at both sites. A map is fitted on all rows and folded into the SAE, silent latents are revived, the
    decoder is refitted in closed form, and the SAE is trained on `tokens` rows of `x_target` (by default each row once;
    0 for none). `keys` are keys of a recipe's leg and sections: method, refit, k, n_latents, architecture, lr, ...
    Raises TransferError if no map is better than a random dictionary.
    """
    keys = dict(keys)
    method = keys.pop("method", "auto")
    refit = keys.pop("refit", True)
    x_source, x_target = torch.as_tensor(x_source), torch.as_tensor(x_target)
    recipe = Recipe.parse(sectioned(keys, ("dictionary", "train")), source="hop")
    if len(x_source) != len(x_target):
        raise DataError(f"hop: {len(x_source)} rows at the source, {len(x_target)} at the target; give the same tokens")
    spec = _spec_after(sae, recipe, keys, x_source)
    leg = _leg(spec, recipe, x_target, len(x_target) if tokens is None else tokens, transcoder=bool(target))
    source_y, y = map(torch.as_tensor, target) if target else (None, None)

    inputs = _moments(x_source, x_target)
    moments: AnyMoments = inputs
    if source_y is not None and y is not None:
        moments = PairedMoments(inputs, _moments(source_y, y))
    first = _Pair(x_target, y).first(FIRST_ROWS)
    units = units_of(leg, recipe.train, first.x, first.target)
    balance = balance_of(leg, recipe.train)
    on = Retraining(x_target[:BUFFER_ROWS].float(), recipe.train.seed, None if y is None else y[:BUFFER_ROWS].float())
    l0 = sae.k or mean_l0(sae, x_source[:L0_ROWS])
    reshaped = (spec.architecture, spec.n_latents) != (sae.architecture, sae.n_latents) or spec.l0 != sae.k
    if method == "auto":
        fresh = None if reshaped or not leg.budget_tokens else spec
        method = next(iter(try_methods(sae, moments, on, units, fresh, balance=balance, l0=l0)))
        if method == RANDOM:
            raise TransferError(
                "hop: no map is better than a random dictionary; train from scratch: sr.train(x_target)"
            )
    between = map_between(cast(Method, method), sae.d_model, moments, balance)
    shape = Shape(spec.architecture, spec.n_latents, spec.l0 or l0) if reshaped else None
    carried = carry(sae, between, on.rows, units, l0=spec.l0 or l0, shape=shape, retraining=on if refit else None)
    if not leg.budget_tokens:
        return carried.dictionary
    given_lr = "lr" in keys or "transfer_lr" in keys
    share = 1.0 if given_lr else rate_share(unexplained(moments, balance=balance), leg.budget_tokens)
    state = first_state(leg, recipe.train, first.x, carried.dictionary, target=first.target, lr_share=share)
    source = _Source.of(x_target, y, None, recipe.train.seed)
    return _trained(Trainee(leg, recipe.train, state), source, progress=progress)


@torch.no_grad()
def evaluate(sae: Dictionary, x: Rows | Iterable[Tensor], *, target: Rows | None = None) -> EvaluationMetrics:
    """Measure how well, and how sparsely, an SAE reconstructs activations (N, D), or a transcoder its `target` (N, Dy).

    >>> sae = Dictionary(architecture="relu", W_enc=torch.eye(4), b_enc=torch.zeros(4), W_dec=torch.eye(4),
    ...                  b_dec=torch.zeros(4))
    >>> quality = evaluate(sae, torch.rand(100, 4))
    >>> quality.fvu, quality.l0
    (0.0, 4.0)

    The fields are those of `saerelay eval`, except for ΔCE and KL, which need a language model.
    """
    sums = MetricSums()
    batches: Iterable[tuple[Tensor, Tensor]]
    if isinstance(x, Rows):
        x = torch.as_tensor(x)
        y = x if target is None else torch.as_tensor(target)
        _check(x, y, "evaluate")
        batches = zip(x.split(4096), y.split(4096), strict=True)
    else:
        batches = ((batch, batch) for batch in x)
    for batch, goal in batches:
        _check_width(sae, batch)
        sums.add_reconstruction(sae, batch.to(sae.W_enc), goal.to(sae.W_enc))
    if not sums.n_tokens:
        raise DataError("evaluate: there are no activations")
    return sums.metrics(None)


# --- where rows come from -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Pair:
    """Rows of activations to read and, for a transcoder, the rows to reconstruct."""

    x: Tensor
    target: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def first(self, n: int) -> "_Pair":
        return self.at(slice(0, n))

    def at(self, rows: slice | Tensor) -> "_Pair":
        return _Pair(self.x[rows], None if self.target is None else self.target[rows])

    def then(self, other: "_Pair") -> "_Pair":
        if self.target is None or other.target is None:
            return _Pair(torch.cat([self.x, other.x]))
        return _Pair(torch.cat([self.x, other.x]), torch.cat([self.target, other.target]))


@dataclass(eq=False)
class _Source:
    """Buffers of shuffled rows, one after another; the first is looked at before training begins."""

    buffers: Iterator[_Pair]
    ahead: _Pair

    @property
    def first(self) -> _Pair:
        """The rows from which units and initialisation follow, in float32."""
        head = self.ahead.first(FIRST_ROWS)
        return _Pair(head.x.float(), None if head.target is None else head.target.float())

    @classmethod
    def of(cls, x: Activations, target: Tensor | None, site: Site | None, seed: int) -> "_Source":
        """Make a source from a tensor, an iterable or a stream."""
        generator = torch.Generator().manual_seed(seed)
        if isinstance(x, Tensor):
            _check(x, target)
            buffers = _orders(_Pair(x, target), generator)
        elif target is not None:
            raise RecipeError("train: a target belongs to a tensor; an iterable gives pairs (x, target)")
        else:
            rows = _blocks(x, site) if isinstance(x, AbstractStream) else x
            buffers = _shuffled(cast(Iterable[Any], rows), generator)
        ahead = next(buffers, None)
        if ahead is None:
            raise DataError("train: there are no activations")
        return cls(buffers, ahead)

    def batches(self, size: int) -> Iterator[_Pair]:
        """Yield batches of a size while there are rows; the last rows of a buffer come before those of the next."""
        rest = self.ahead
        while True:
            while len(rest) >= size:
                yield rest.first(size)
                rest = rest.at(slice(size, None))
            more = next(self.buffers, None)
            if more is None:
                return
            rest = rest.then(more)


def _check_width(sae: Dictionary, x: Tensor) -> None:
    if x.dim() != 2 or x.shape[1] != sae.d_model:
        raise DataError(
            f"evaluate: activations of the shape {tuple(x.shape)}; this SAE reads (tokens, {sae.d_model}). Was it "
            "trained on another model, or at another kind of site?"
        )


def _check(x: Tensor, target: Tensor | None, of: str = "train") -> None:
    if x.dim() != 2 or not len(x):
        raise DataError(
            f"{of}: activations of the shape {tuple(x.shape)}; expected (tokens, width), at least one token"
        )
    if target is not None and len(target) != len(x):
        raise DataError(f"{of}: {len(x)} rows of x and {len(target)} of the target; give the same tokens")


def _orders(rows: _Pair, generator: torch.Generator) -> Iterator[_Pair]:
    """Yield a tensor's rows in one random order after another."""
    while True:
        for part in torch.randperm(len(rows), generator=generator).split(BUFFER_ROWS):
            yield rows.at(part.to(rows.x.device))


def _shuffled(items: Iterable[Any], generator: torch.Generator) -> Iterator[_Pair]:
    """Yield an iterable's rows in buffers, each of them shuffled."""
    waiting: list[_Pair] = []
    for item in items:
        pair = _Pair(*item) if isinstance(item, tuple) else _Pair(item)
        _check(pair.x, pair.target)
        waiting.append(pair)
        if sum(map(len, waiting)) >= BUFFER_ROWS:
            yield _mixed(waiting, generator)
            waiting = []
    if waiting:
        yield _mixed(waiting, generator)


def _mixed(parts: list[_Pair], generator: torch.Generator) -> _Pair:
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.then(part)
    return whole.at(torch.randperm(len(whole), generator=generator).to(whole.x.device))


def _blocks(stream: AbstractStream, site: Site | None) -> Iterator[Tensor]:
    """Yield the kept rows of a stream's blocks, as copies, since a block is overwritten when the next is asked for."""
    if site is None:
        raise RecipeError("train: a stream gives several sites; say which: site=Site(5)")
    for number in count():
        block = stream.block(number, [site])
        yield block.activations[site][block.keep].clone()


def _n_rows(x: Activations) -> int:
    """Return the number of rows of a tensor, or of a list of tensors."""
    if isinstance(x, Tensor):
        return len(x)
    if isinstance(x, list | tuple):
        return sum(len(part[0] if isinstance(part, tuple) else part) for part in x)
    raise RecipeError("train: an iterator does not say how many rows it has; give the budget: tokens=1_000_000")


# --- training -------------------------------------------------------------------------------------------------------


def _leg(spec: SizedDictionarySpec, recipe: Recipe, x: Tensor, budget: int, *, transcoder: bool) -> Leg:
    """Return the leg to train on rows such as x (B, D); choices that the recipe leaves open are made as in a plan."""
    if spec.l0 is not None and spec.l0 > spec.n_latents:
        raise RecipeError(f"{spec.activation.l0_key} is {spec.l0:g} but there are only {spec.n_latents} latents")
    batch = batch_for(recipe, budget, on_gpu=x.is_cuda)
    batch = min(batch, budget) or batch
    budget = batch * (budget // batch)
    optimizer = recipe.train.optimizer
    dead_after = recipe.train.dead_after
    schedule = Schedule(
        budget_tokens=budget,
        batch_tokens=batch,
        lr=auto_lr(x.shape[1], budget, batch) if optimizer.lr == "auto" else optimizer.lr,
        dead_after_tokens=auto_dead_after(budget, batch) if dead_after == "auto" else dead_after,
    )
    return Leg(
        id="sae",
        role="root",
        layer=0,
        module="mlp_in" if transcoder else "resid_post",
        module_out="mlp_out" if transcoder else None,
        dictionary=spec,
        seed=recipe.train.seed,
        schedule=schedule,
    )


def _spec_after(sae: Dictionary, recipe: Recipe, keys: dict[str, Any], x: Tensor) -> SizedDictionarySpec:
    """Return the spec of a hopped dictionary: that of `sae`, except for the keys that are given."""
    given = sectioned(keys, ("dictionary",), others=("train",)).get("dictionary", {})
    spec = recipe.dictionary.sized(sae.d_model).changed(n_latents=given.get("n_latents", sae.n_latents))
    if "architecture" not in given:
        spec = spec.with_architecture(sae.architecture)
    if not given.keys() & {"k", "target_l0"}:
        spec = spec.with_l0(sae.k or round(mean_l0(sae, x[:L0_ROWS])))
    return spec.changed(skip_connection=sae.W_skip is not None)


def _moments(source: Tensor, target: Tensor) -> Moments:
    moments = Moments.empty(source.shape[1], target.shape[1], target.device)
    moments.add(source, target)
    return moments


def _trained(trainee: Trainee, source: _Source, *, progress: bool) -> Dictionary:
    """Train to the end of the budget, and return the dictionary."""
    began = time.perf_counter()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    schedule = trainee.leg.schedule
    rows = source.first.x
    with bar if progress else nullcontext():
        task = bar.add_task("training", total=schedule.budget_tokens)
        told = began
        for batch in source.batches(schedule.batch_tokens):
            if trainee.done:
                break
            trainee.step(batch.x, batch.target)
            bar.update(task, completed=trainee.state.age)
            if progress and time.perf_counter() - told > 0.5:
                told = time.perf_counter()
                shown = trainee.look()
                if shown:
                    bar.update(task, description=f"FVU in training units {shown.fvu:.4f}, L0 {shown.l0:.1f}")
    trainee.settle()
    if trainee.state.failure:
        raise LegFailed(f"training stopped: {trainee.state.failure}")
    if not trainee.done:
        raise DataError(
            f"the activations ended after {trainee.state.age:,} of {schedule.budget_tokens:,} tokens; give more, or "
            "a smaller budget: tokens=..."
        )
    return trainee.canonical(rows)
