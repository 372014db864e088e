"""SAEs in Python: train, transfer and measure them on your own activations, without a language model or files.

`sr.train`, `sr.hop` and `sr.evaluate`. They train a single leg with the engine of a run.
"""

import time
from contextlib import nullcontext
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from saerelay.analysis.sums import MetricSums
from saerelay.errors import DataError, LegFailed, RecipeError, TransferError
from saerelay.planning.batches import batch_for
from saerelay.planning.leg import Leg, Schedule
from saerelay.planning.leg_spec import LegSpec
from saerelay.planning.legs import auto_dead_after, auto_lr
from saerelay.planning.recipe import HopSpec, Recipe
from saerelay.runs.documents.quality import EvaluationMetrics
from saerelay.sae.architectures import ARCHITECTURES, TopK
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.maps import AnyMoments, PairedMoments, map_between, rate_share, unexplained
from saerelay.sae.moments import Moments
from saerelay.sae.quality import mean_l0
from saerelay.sae.reshape import Shape
from saerelay.sae.spec import L0_ROWS, DictionarySpec, Method, SizedDictionarySpec
from saerelay.sae.transfer import Retraining, carry
from saerelay.sae.trials import RANDOM, best_first, try_methods
from saerelay.site import Site
from saerelay.spec import Auto
from saerelay.training.engine import Trainee
from saerelay.training.state import balance_of, first_state, units_of
from saerelay.training.train import FIRST_ROWS
from saerelay.workflows.keys import sectioned
from saerelay.workflows.rows import BUFFER_ROWS, Activations, Batches, Pair, Rows, Source, each_pair, n_rows

L0_KEYS = {kind.l0_key for kind in ARCHITECTURES if kind.l0_key}
"""The keys by which architectures ask for a number of active latents."""
RUN_KEYS = {"seeds", "checkpoint_every", "snapshots", "memory_gib", "loggers"}
"""Keys of [train] that only a run can follow."""


def train(
    x: Activations,
    *,
    target: Rows | None = None,
    tokens: int | str | None = None,
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
    `[train]`; `k` is the number of active latents of any architecture (the target_l0 of JumpReLU and Gated). Raises
    RecipeError for keys of other sections or architectures, for keys that only a run can follow, and for impossible
    values; DataError if nothing can be learned from the activations, or they end too early; LegFailed if the loss is
    not finite.
    """
    recipe = _recipe(keys, "train")
    budget = _budget(tokens, x, "train")
    if not budget:
        raise RecipeError("train: 0 tokens leave an SAE as random as it starts; give a budget: tokens=1_000_000")
    source = Source.of(x, target, site, recipe.train.seed)
    first = source.first
    first.check_learnable("train: x")
    spec = recipe.dictionary.sized(first.x.shape[1])
    lr = recipe.train.optimizer.lr
    leg = _leg(spec, recipe, first.x, budget, lr=lr, transcoder=first.target is not None)
    state = first_state(leg, recipe.train, first.x, target=first.target)
    return _trained(Trainee(leg, recipe.train, state), source, progress=progress)


def hop(
    sae: Dictionary,
    x_source: Rows,
    x_target: Rows,
    *,
    target: tuple[Rows, Rows] | None = None,
    tokens: int | str | None = None,
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
    0 for none). `keys` are keys of a recipe's leg and sections: method, refit, k, n_latents, architecture, lr, ... The
    SAE keeps its architecture, number of latents, mean L0 and skip connection (or the lack of one) unless you give
    others. It does not know how it was trained, so give the other keys again (matryoshka, l1, bandwidth, ...). An lr or
    transfer_lr that you give is the learning rate; otherwise it follows from what the map leaves unexplained. Raises
    RecipeError and DataError as `train` does, and TransferError if no map is better than a random dictionary.
    """
    chosen = {key: value for key, value in keys.items() if key in ("method", "refit")}
    how = HopSpec.parse(chosen, source="hop")
    recipe = _recipe({key: value for key, value in keys.items() if key not in chosen}, "hop", sae.architecture)
    source, there = _ends(sae, x_source, x_target, target)
    sae = sae.to(there.x.device).to(torch.float32)
    l0 = sae.k or mean_l0(sae, source.x[:L0_ROWS])
    if not l0:
        raise TransferError("hop: none of the SAE's latents fires on x_source; was it trained on such activations?")
    spec = _spec_after(sae, l0, recipe, there.x.shape[1])
    optimizer = recipe.train.optimizer
    lr = optimizer.transfer_lr if optimizer.lr == "auto" else optimizer.lr
    budget = _budget(tokens, there.x, "hop")
    leg = _leg(spec, recipe, there.x, budget, lr=lr, transcoder=there.target is not None)

    moments = _moments_between(source, there)
    first = there.first(FIRST_ROWS)
    units = units_of(leg, recipe.train, first.x, first.target)
    balance = balance_of(leg, recipe.train)
    refitting = there.first(BUFFER_ROWS).in_float32()
    on = Retraining(refitting.x, recipe.train.seed, refitting.target)
    asked_shape = (spec.architecture, spec.n_latents, spec.skip_connection)
    reshaped = asked_shape != (sae.architecture, sae.n_latents, sae.W_skip is not None) or spec.l0 not in (None, l0)
    method = how.method
    if method == "auto":
        fresh = spec if leg.budget_tokens and not reshaped else None
        trials = try_methods(sae, moments, on, units, fresh, balance=balance, l0=l0)
        method = _best(best_first(trials, leg.budget_tokens))
    between = map_between(method, sae.d_model, moments, balance)
    shape = None
    if reshaped:
        shape = Shape(spec.architecture, spec.n_latents, spec.l0 or l0, skip_connection=spec.skip_connection)
    carried = carry(sae, between, on.rows, units, l0=spec.l0 or l0, shape=shape, retraining=on if how.refit else None)
    if not leg.budget_tokens:
        return carried.dictionary
    share = 1.0
    if lr == "auto":
        share = rate_share(unexplained(moments, balance=balance), leg.budget_tokens)
    state = first_state(leg, recipe.train, first.x, carried.dictionary, target=first.target, lr_share=share)
    return _trained(
        Trainee(leg, recipe.train, state), Source.of(there.x, there.target, None, recipe.train.seed), progress=progress
    )


@torch.no_grad()
def evaluate(sae: Dictionary, x: Rows | Batches, *, target: Rows | None = None) -> EvaluationMetrics:
    """Measure how well, and how sparsely, an SAE reconstructs activations (N, D), or a transcoder its `target` (N, Dy).

    >>> sae = Dictionary(architecture="relu", W_enc=torch.eye(4), b_enc=torch.zeros(4), W_dec=torch.eye(4),
    ...                  b_dec=torch.zeros(4))
    >>> quality = evaluate(sae, torch.rand(100, 4))
    >>> quality.fvu, quality.l0
    (0.0, 4.0)

    `x` may also be an iterable of batches; for a transcoder, of pairs. The fields are those of `saerelay eval`, except
    for ΔCE and KL, which need a language model.
    """
    sae = sae.to(torch.float32)
    sums = MetricSums()
    for rows in each_pair(x, target, caller="evaluate"):
        _check_width(sae, rows.x, "evaluate")
        for part in rows.split(4096):
            goal = sae.goal_of(part.x, part.target)
            sums.add_reconstruction(sae, part.x.to(sae.W_enc), goal.to(sae.W_enc))
    if not sums.n_tokens:
        raise DataError("evaluate: there are no activations")
    return sums.metrics(None)


# --- training -------------------------------------------------------------------------------------------------------


def _recipe(keys: dict[str, Any], caller: str, architecture: str = TopK.name) -> Recipe:
    """Parse keys of [dictionary] and [train]; the SAE is of this architecture unless a key names another.

    `k` and `target_l0` are the number of active latents of any architecture that has one. Raises RecipeError for keys
    of runs, and for keys that the architecture does not have: a recipe ignores the latter, since `saerelay init` prints
    the keys of all.
    """
    sections = sectioned(keys, ("dictionary", "train"))
    of_runs = sorted(RUN_KEYS & sections.get("train", {}).keys())
    if of_runs:
        raise RecipeError(f"{caller}: only a run can follow {' and '.join(of_runs)}; see sr.train_suite")
    given = {"architecture": architecture, **sections.get("dictionary", {})}
    kind = type(DictionarySpec.parse({"architecture": given["architecture"]}, source=caller).activation)
    if len({given[key] for key in L0_KEYS & given.keys()}) > 1:
        raise RecipeError(f"{caller}: {' and '.join(sorted(L0_KEYS))} mean the same, and differ; give one of them")
    if kind.l0_key:
        for key in L0_KEYS & given.keys() - {kind.l0_key}:
            given.setdefault(kind.l0_key, given.pop(key))
    shared = {"architecture", *DictionarySpec.model_fields}
    foreign = given.keys() & set(DictionarySpec.all_keys()) - shared - kind.model_fields.keys()
    if foreign:
        raise RecipeError(
            f"{caller}: {kind.name} has no {' and no '.join(sorted(foreign))}; its own keys: "
            f"{', '.join(kind.model_fields)}"
        )
    return Recipe.parse({**sections, "dictionary": given}, source=caller)


def _budget(tokens: int | str | None, rows: Activations, caller: str) -> int:
    """Return the number of rows to train on, which may be given as "100k", as in a leg of a plan."""
    given = n_rows(rows) if tokens is None else tokens
    return LegSpec.parse({"id": "sae", "layer": 0, "tokens": given}, source=caller).tokens


def _leg(
    spec: SizedDictionarySpec, recipe: Recipe, x: Tensor, budget: int, *, lr: float | Auto, transcoder: bool
) -> Leg:
    """Return the leg to train on rows such as x (B, D); choices that the recipe leaves open are made as in a plan."""
    if spec.l0 is not None and spec.l0 > spec.n_latents:
        raise RecipeError(f"{spec.activation.l0_key} is {spec.l0:g} but there are only {spec.n_latents} latents")
    if spec.skip_connection and not transcoder:
        raise RecipeError("skip_connection belongs to transcoders; give a target, or leave it out")
    batch = batch_for(recipe, budget, on_gpu=x.is_cuda)
    batch = min(batch, budget) or batch
    budget = batch * (budget // batch)
    dead_after = recipe.train.dead_after
    schedule = Schedule(
        budget_tokens=budget,
        batch_tokens=batch,
        lr=auto_lr(x.shape[1], budget, batch) if lr == "auto" else lr,
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


def _best(trials: dict[str, float]) -> Method:
    """Return the method that measured best; TransferError if a random dictionary measured best."""
    best = next(iter(trials))
    if best == RANDOM:
        raise TransferError("hop: no map is better than a random dictionary; train from scratch: sr.train(x_target)")
    return cast(Method, best)


def _spec_after(sae: Dictionary, l0: float, recipe: Recipe, width: int) -> SizedDictionarySpec:
    """Return the spec of a dictionary hopped to a width: as `sae`, whose mean L0 is `l0`, but for the keys given."""
    asked = recipe.dictionary
    spec = asked.sized(width)
    if not asked.model_fields_set & {"n_latents", "expansion"}:
        spec = spec.changed(n_latents=sae.n_latents)
    if spec.activation.l0_key not in spec.activation.model_fields_set:
        spec = spec.with_l0(l0)
    if "skip_connection" in asked.model_fields_set:
        return spec
    return spec.changed(skip_connection=sae.W_skip is not None)


def _ends(sae: Dictionary, x_source: Rows, x_target: Rows, target: tuple[Rows, Rows] | None) -> tuple[Pair, Pair]:
    """Return the rows at the source and at the target, all on the device of `x_target`.

    Raises DataError unless they fit the SAE and each other.
    """
    if target is not None and (isinstance(target, Rows) or len(target) != 2):
        raise DataError("hop: a target is a pair, at the source and at the target: target=(y_source, y_target)")
    y_source, y_target = target or (None, None)
    there = Pair.of(x_target, y_target, caller="hop")
    source = Pair.of(x_source, y_source, caller="hop").on(there.x.device)
    if len(source) != len(there):
        raise DataError(f"hop: {len(source)} rows at the source, {len(there)} at the target; give the same tokens")
    _check_width(sae, source.x, "hop")
    sae.goal_of(source.x, source.target)
    source.check_learnable("hop: x_source")
    there.check_learnable("hop: x_target")
    return source, there


def _check_width(sae: Dictionary, x: Tensor, caller: str) -> None:
    if x.shape[1] != sae.d_model:
        raise DataError(
            f"{caller}: activations of the shape {tuple(x.shape)}; this SAE reads (tokens, {sae.d_model}). Was it "
            "trained on another model, or at another kind of site?"
        )


def _moments_between(source: Pair, there: Pair) -> AnyMoments:
    """Return the moments of all rows; a transcoder's are paired."""
    inputs = _moments(source.x, there.x)
    if source.target is None or there.target is None:
        return inputs
    return PairedMoments(inputs, _moments(source.target, there.target))


def _moments(source: Tensor, target: Tensor) -> Moments:
    moments = Moments.empty(source.shape[1], target.shape[1], target.device)
    moments.add(source, target)
    return moments


def _trained(trainee: Trainee, source: Source, *, progress: bool) -> Dictionary:
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
