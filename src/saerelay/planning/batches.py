"""How many tokens a training step takes, where the recipe leaves it to the device and the leg (decision 035).

A CPU is as fast with 512 tokens as with more. A GPU trains on 4096 tokens in about twice the time of 512, but each leg
should take enough steps: with fewer than about a thousand, larger batches cost quality.
"""

from collections.abc import Sequence

from saerelay.planning.facts import ModelFacts
from saerelay.planning.leg_spec import LegSpec
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import Recipe

USUAL = 512
"""Tokens per step on a CPU, and of short legs on a GPU."""
LARGEST = 4096
"""Most tokens per step on a GPU."""
LEAST_STEPS = 1000
"""A batch is not made larger where a leg would then take fewer steps than this."""


def auto_batch(tokens: int, *, on_gpu: bool) -> int:
    """Return the tokens per step of a leg that is trained on `tokens`.

    >>> auto_batch(2_000_000, on_gpu=True), auto_batch(10_000_000, on_gpu=True), auto_batch(10_000_000, on_gpu=False)
    (1024, 4096, 512)
    """
    batch = USUAL
    while on_gpu and batch < LARGEST and tokens >= LEAST_STEPS * 2 * batch:
        batch *= 2
    return batch


def batch_for(recipe: Recipe, tokens: int, *, on_gpu: bool) -> int:
    """Return the tokens per step that a recipe asks for, or else those that a budget of `tokens` allows.

    The latter divide the recipe's blocks, if their size is given and 512 divides it.
    """
    asked = recipe.train.batch_tokens
    if asked != "auto":
        return asked
    batch = auto_batch(tokens, on_gpu=on_gpu)
    block = recipe.data.block_tokens
    while block != "auto" and batch > USUAL and block % batch:
        batch //= 2
    return batch


def batch_of(spec: LegSpec, recipe: Recipe, *, on_gpu: bool) -> int:
    """Return the tokens per step of a leg: its own, or else those of `batch_for`."""
    return spec.training.batch_tokens or batch_for(recipe, spec.tokens, on_gpu=on_gpu)


def usual_batch(recipe: Recipe) -> int:
    """Return the tokens per step that a recipe asks for, or else those of a short leg."""
    return batch_for(recipe, 0, on_gpu=False)


def settled_batches(
    recipe: Recipe, facts: ModelFacts, specs: Sequence[LegSpec], finished: Plan | None
) -> tuple[int, Sequence[LegSpec]]:
    """Return the tokens per step of the whole run, and the legs with theirs, where the recipe leaves them open.

    A step of the whole run takes as many tokens as the longest leg's; shorter legs cut these into batches of their own.
    Legs of a finished plan keep theirs, and those that extend it take at most as many as that plan.
    """
    if recipe.train.batch_tokens != "auto":
        return recipe.train.batch_tokens, specs
    by_id = {spec.id: spec for spec in specs}
    batches = []
    for spec in specs:
        transfer = by_id.get(spec.control_of)
        # A control without tokens of its own gets as many as the transfer that it is compared with.
        counted = spec.changed(tokens=transfer.tokens) if transfer and not spec.tokens else spec
        batch = batch_of(counted, recipe, on_gpu=facts.on_gpu)
        if finished and finished.has(spec.id) and not spec.training.batch_tokens:
            batch = finished.leg(spec.id).schedule.batch_tokens
        elif finished:
            batch = min(batch, finished.batch_tokens)
        batches.append(batch)
    of_run = finished.batch_tokens if finished else max(batches, default=USUAL)
    return of_run, [spec.changed(batch_tokens=batch) for spec, batch in zip(specs, batches, strict=True)]
