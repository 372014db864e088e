"""The survey behind `preset = "auto"`: a short pass over the training split, on which the choice of a plan is based.

It is a small run of its own (`survey/` in the run directory): pilots from scratch at every layer, and long pilots at a
middle layer (the hub), the first and the last. Every point of a curve is a run with its own decay. The pilots, and all
hops between them without training, refitted or not, are measured on rows of the validation split.
"""

import math
from typing import ClassVar

from saerelay.document import Document
from saerelay.planning.batches import batch_for, usual_batch
from saerelay.planning.compile import compile_plan
from saerelay.planning.facts import ModelFacts
from saerelay.planning.leg import Leg
from saerelay.planning.leg_spec import LegSpec
from saerelay.planning.placing import choose_block
from saerelay.planning.plan import Plan
from saerelay.planning.presets import hub_of
from saerelay.planning.recipe import AutoSpec, Recipe
from saerelay.site import Site
from saerelay.spec import Spec

LONG = "long"
"""Id of the hub's long pilot."""
MAX_ROOT_MULTIPLE = 10
"""Learning curves are not extrapolated beyond this multiple of root_tokens from scratch."""
TOKENS_PER_LATENT = 64
"""Least tokens per latent of the long pilot; if short pilots get less than a quarter of it, curves show no floor."""


class SurveyedLayer(Spec):
    """A layer, and its pilot from scratch."""

    layer: int
    rms_norm: float
    """√ E‖x − E x‖²."""
    fvu: float
    """FVU of the pilot, after `pilot_tokens`."""
    refitted: float
    """FVU of the pilot with its decoder refitted, as after a hop."""
    decay_gain: float
    """FVU of the pilot over its FVU before the learning rate's decay."""


class SurveyedHop(Spec):
    """An affine hop between two layers, without training after it."""

    source: int
    target: int
    r2: float
    """Share of the target's variance that the affine map explains."""
    angle: float
    """Mean angle between the activations of a token at the two layers, divided by π."""
    fvu: float
    """FVU of the source's pilot carried to the target."""
    refitted: float
    """FVU of the same with its decoder refitted."""


class SurveyCost(Spec):
    """The cost of the survey, and the rates from which hours are predicted."""

    lm_tokens: int
    sae_samples: int
    """Activations that the pilots are trained on."""
    flops: float
    """Operations of training, and of measuring: forward passes, maps and refits."""
    lm_flops: float | None = None
    """The language model's part of `flops`; None in files of old versions."""
    seconds: float
    seconds_per_sample: float
    """Time of an SAE's training step, per token."""
    seconds_per_lm_flop: float


class LongPilots(Spec):
    """Pilots with more tokens: at the hub, and at the first and the last layer."""

    long_tokens: int
    long_fvu: float
    """FVU of the hub's long pilot."""
    long_refitted: float
    """FVU of the hub's long pilot with its decoder refitted."""
    long_decay_gain: float
    long_hops: dict[int, float]
    """FVU of the hub's long pilot carried to each other layer and refitted there."""
    ends: dict[int, float]
    """FVU of the long pilots at the first and the last layer, where curves are least like the hub's."""


class Survey(Document):
    """The survey's measurements (`survey.json`). All FVUs are on the same rows of the validation split."""

    inline = ("long",)

    SCHEMA: ClassVar = 3
    MADE_BY: ClassVar = "`saerelay train RECIPE --out RUN --resume`"

    asked: Recipe
    hub: int
    n_latents: int
    block_tokens: int
    """Block size of the pilots. The plan has the same, since the result of few tokens depends on their shuffling."""
    pilot_tokens: int
    layers: list[SurveyedLayer]
    hops: list[SurveyedHop]
    long: LongPilots
    cost: SurveyCost


def survey_plan(recipe: Recipe, facts: ModelFacts, memory_bytes: float = math.inf) -> Plan:
    """Return the pilots, as a plan like any other.

    Raises PlanError for a recipe that cannot be compiled to a plan.
    """
    plain = recipe.plan.changed(preset="hub", auto=AutoSpec(), stop=True, controls=[])
    usual = compile_plan(recipe.changed(plan=plain), facts)
    layers = sorted({leg.layer for leg in usual.legs})
    hub = recipe.plan.roots[0] if recipe.plan.roots else hub_of(layers)

    batch = usual_batch(recipe)
    # The legs that will be chosen may be longer than the pilots, and take larger batches.
    largest = batch_for(recipe, MAX_ROOT_MULTIPLE * recipe.plan.root_tokens, on_gpu=facts.on_gpu)
    recipe = recipe.changed(train=recipe.train.changed(batch_tokens=batch))
    asked = recipe.plan.auto.survey_tokens
    long = batch * max(8, (pilot_tokens(recipe, facts) if asked == "auto" else asked) // batch)
    short = batch * (long // 4 // batch)
    legs = [LegSpec(id=f"L{layer}", layer=layer, tokens=short) for layer in layers]
    legs.append(LegSpec(id=LONG, layer=hub, tokens=long))
    for layer in sorted({layers[0], layers[-1]} - {hub}):
        legs.append(LegSpec(id=f"{LONG}-L{layer}", layer=layer, tokens=long))

    longest = [LegSpec(id=f"L{layer}", layer=layer, tokens=long) for layer in layers]
    block = choose_block(recipe, facts, longest, batch, multiple_of=largest)
    surveying = recipe.changed(
        plan=plain.changed(legs=legs, roots=[]),
        train=recipe.train.changed(snapshots=[], loggers=[], seeds=1),
        data=recipe.data.changed(cache="", block_tokens=block),
        sites=recipe.sites.changed(layers=layers),
    )
    compiled = compile_plan(surveying, facts, memory_bytes=memory_bytes)
    with_snapshots = [leg.changed(snapshots=[before_decay(leg, recipe)]) for leg in compiled.legs]
    return compiled.changed(legs=with_snapshots)


def pilot_tokens(recipe: Recipe, facts: ModelFacts) -> int:
    """Return the tokens of the long pilot: a tenth of a root's, or more if that is too short for a curve to settle."""
    root_tokens = recipe.plan.root_tokens
    width = facts.width(Site(0, recipe.sites.first_kind.module))
    n_latents = recipe.dictionary.sized(width).n_latents
    return max(root_tokens // 10, min(root_tokens // 4, TOKENS_PER_LATENT * n_latents))


def before_decay(leg: Leg, recipe: Recipe) -> int:
    """Return the age at which a leg's decay begins: a number of whole batches, between the leg's ends."""
    batch = usual_batch(recipe)
    n_batches = leg.budget_tokens // batch
    share = 1 - recipe.train.optimizer.decay
    return batch * min(n_batches - 1, max(1, round(share * n_batches)))
