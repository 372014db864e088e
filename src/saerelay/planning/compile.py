"""From a recipe to a plan: legs with all their choices made, placed on the axis of token positions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saerelay.errors import PlanError
from saerelay.planning.cost import peak_state_bytes, state_bytes
from saerelay.planning.facts import ModelFacts
from saerelay.planning.plan import COPY_RATE, Control, External, Goal, Hop, Leg, Plan, Role, Schedule
from saerelay.planning.presets import preset_legs
from saerelay.planning.recipe import LegSpec, Recipe, tokens_of
from saerelay.sae.spec import Method, SizedDictionarySpec
from saerelay.site import Site
from saerelay.spec import format_count

MAX_BLOCK_TOKENS = 65_536
BLOCK_BYTES = 2**30
"""Activations of one block stay under this, when the recipe leaves its size to us."""


@dataclass(frozen=True)
class _Setting:
    """What all legs of a plan are compiled under."""

    recipe: Recipe
    facts: ModelFacts
    block_tokens: int
    externals: Mapping[str, External] = field(default_factory=dict)
    memory_bytes: float = math.inf
    begin: int = 0
    """Cursor before which nothing new may start."""


def compile_plan(
    recipe: Recipe,
    facts: ModelFacts,
    *,
    externals: dict[str, External] | None = None,
    memory_bytes: float = math.inf,
    finished: Plan | None = None,
) -> Plan:
    """Turn a recipe into a plan; raises PlanError if it cannot be run.

    `externals` describes the parents outside the plan. Legs are started as early as their parents and `memory_bytes`
    (training state of all live legs) allow. With a `finished` plan, its legs stay as they are and what the recipe adds
    starts where it ended: new legs, and for a leg that got a larger budget one that continues it (its rate warms up and
    decays again, so the result is not that of a longer first run).
    """
    layers = _check_layers(recipe, facts)
    if finished and not recipe.plan.roots:
        recipe = _with_roots_of(recipe, finished)
    specs = recipe.plan.legs or preset_legs(recipe, layers)
    if recipe.plan.legs and recipe.plan.controls:
        raise PlanError(
            "plan.controls belongs to the presets; with [[plan.legs]], write controls as legs with control_of"
        )
    setting = _Setting(
        recipe=recipe,
        facts=facts,
        block_tokens=finished.block_tokens if finished else choose_block(recipe, facts, specs),
        externals=externals or {},
        memory_bytes=memory_bytes,
        begin=finished.n_tokens if finished else 0,
    )
    legs = list(finished.legs) if finished else []
    finished_legs = {leg.id: leg for leg in legs}
    for spec in _parents_first(specs):
        leg: Leg | None = _settled(spec, setting, legs)
        if leg.id in finished_legs:
            leg = _continuation(finished_legs[leg.id], leg, legs)
        if leg is not None:
            legs.append(_placed(leg, spec, setting, legs))
    if not finished:
        order = {spec.id: i for i, spec in enumerate(specs)}
        legs.sort(key=lambda leg: order[leg.id])
    plan = Plan(
        recipe=recipe,
        facts=facts,
        block_tokens=setting.block_tokens,
        legs=legs,
        externals=externals or {},
        probe=finished.probe if finished else _probe_layer(recipe, legs),
    )
    _check_widths(plan)
    return plan


def _check_layers(recipe: Recipe, facts: ModelFacts) -> list[int]:
    """The layers asked for; PlanError where the model does not have them, or takes no such context."""
    if facts.max_context and recipe.data.context > facts.max_context:
        raise PlanError(
            f"data.context is {recipe.data.context}; {facts.name} takes at most {facts.max_context} tokens; "
            "lower data.context"
        )
    if recipe.sites.layers == "all":
        layers = list(range(facts.n_layers))
    else:
        layers = sorted(set(recipe.sites.layers))
    if not layers:
        raise PlanError('sites.layers is empty; write "all" or a list such as [0, 1]')
    named = {*layers, *recipe.plan.roots, *recipe.plan.controls, *(leg.layer for leg in recipe.plan.legs)}
    for layer in sorted(named):
        if not 0 <= layer < facts.n_layers:
            raise PlanError(f"layer {layer} is out of range: {facts.name} has layers 0 to {facts.n_layers - 1}")
    return layers


def _with_roots_of(recipe: Recipe, finished: Plan) -> Recipe:
    """The recipe with the roots that a finished plan had, so that more layers do not choose others."""
    roots = sorted({leg.layer for leg in finished.legs if leg.role == "root"})
    plan = recipe.plan.changed(roots=roots)
    return recipe.changed(plan=plan)


def _probe_layer(recipe: Recipe, legs: Sequence[Leg]) -> int | None:
    """The middle one of the layers that are read."""
    if not recipe.data.outlier_norm:
        return None
    sites = sorted({leg.site for leg in legs})
    return sites[len(sites) // 2].layer


def _parents_first(specs: Sequence[LegSpec]) -> list[LegSpec]:
    """The legs in an order in which each follows all it names; PlanError if there is none."""
    by_id = {spec.id: spec for spec in specs}
    if len(by_id) < len(specs):
        ids = [spec.id for spec in specs]
        twice = sorted({leg_id for leg_id in ids if ids.count(leg_id) > 1})
        raise PlanError(f"two legs have the id {', '.join(twice)}; give each its own")
    ordered: dict[str, LegSpec] = {}
    waiting: list[str] = []

    def visit(spec: LegSpec) -> None:
        if spec.id in ordered:
            return
        if spec.id in waiting:
            raise PlanError(f"legs wait for each other: {' -> '.join([*waiting, spec.id])}")
        waiting.append(spec.id)
        for other in (spec.parent, spec.after, spec.control_of):
            outside = other == spec.parent and "/" in other
            if other in by_id:
                visit(by_id[other])
            elif other and not outside:
                raise PlanError(
                    f'leg {spec.id} names "{other}", which is not a leg of this plan ({", ".join(sorted(by_id))}); '
                    "a dictionary outside it is given as a directory, with a slash"
                )
        waiting.pop()
        ordered[spec.id] = spec

    for spec in specs:
        visit(spec)
    return list(ordered.values())


# --- the choices of one leg ---------------------------------------------------------------------------------------


def _settled(spec: LegSpec, setting: _Setting, legs: Sequence[Leg]) -> Leg:
    """A leg with all its choices made, but not yet placed on the axis; `legs` are those compiled before it."""
    recipe = setting.recipe
    site = Site(spec.layer, spec.module or recipe.sites.module)
    by_id = {leg.id: leg for leg in legs}
    parent = by_id.get(spec.parent)
    external = setting.externals.get(spec.parent)
    hop = _settled_hop(spec, setting)
    budget = _settled_budget(spec, setting, by_id)
    if not budget and not hop:
        raise PlanError(f"leg {spec.id} is trained from scratch with 0 tokens; give it some")
    parent_site = parent.site if parent else external.site if external else None
    role: Role = "transfer" if hop else "root"
    return Leg(
        id=spec.id,
        role="control" if spec.control else role,
        layer=site.layer,
        module=site.module,
        dictionary=_settled_dictionary(spec, setting, parent, external),
        seed=recipe.train.seed if spec.seed is None else spec.seed,
        schedule=_settled_schedule(spec, setting, hop, budget, at_home=site == parent_site),
        hop=hop,
        control=Control.model_validate(spec.control.model_dump()) if spec.control else None,
        goal=Goal.model_validate(spec.goal.model_dump()),
    )


def _settled_hop(spec: LegSpec, setting: _Setting) -> Hop | None:
    if not spec.hop:
        return None
    defaults = setting.recipe.plan.hop
    method = spec.hop.method or defaults.method
    refit = defaults.refit if spec.hop.refit is None else spec.hop.refit
    return Hop(
        parent=spec.hop.parent,
        method=method,
        moment_tokens=0 if method == "identity" else _whole_blocks(defaults.moment_tokens, setting.block_tokens),
        refit_tokens=min(defaults.refit_tokens, setting.block_tokens) if refit else 0,
    )


def _settled_budget(spec: LegSpec, setting: _Setting, by_id: Mapping[str, Leg]) -> int:
    """Training tokens, in whole batches; an equal-tokens control gets all tokens that its transfer looks at."""
    batch = _batch_tokens(spec, setting.recipe)
    tokens = spec.tokens
    if spec.control and not tokens:
        transfer = by_id[spec.control.control_of]
        tokens = transfer.moment_tokens + transfer.budget_tokens
    return batch * math.ceil(tokens / batch)


def _batch_tokens(spec: LegSpec, recipe: Recipe) -> int:
    batch = spec.training.batch_tokens or recipe.train.batch_tokens
    if recipe.train.batch_tokens % batch:
        raise PlanError(
            f"leg {spec.id}: batch_tokens {batch} does not divide train.batch_tokens {recipe.train.batch_tokens}"
        )
    return batch


def _settled_schedule(spec: LegSpec, setting: _Setting, hop: Hop | None, budget: int, *, at_home: bool) -> Schedule:
    """How long and how fast; `at_home`: the leg stays at its parent's site."""
    recipe = setting.recipe
    optimizer = recipe.train.optimizer
    batch = _batch_tokens(spec, recipe)
    given = spec.training.lr
    if given is None or given == "auto":
        given = optimizer.transfer_lr if hop else optimizer.lr

    # After a hop the map says how much there is to learn, and at home the check of the refit does. A plain copy to
    # another site has neither: it gets a fixed share of the rate from scratch.
    width = setting.facts.width(Site(spec.layer, spec.module or recipe.sites.module))
    by_map = hop is not None and given == "auto" and (hop.method != "identity" or at_home)
    if given == "auto":
        lr = auto_lr(width, budget, batch)
        if hop and not by_map:
            lr *= COPY_RATE
    else:
        lr = given

    dead_after = recipe.train.dead_after
    if dead_after == "auto":
        dead_after = max(batch, min(10_000_000, budget // 50))
    return Schedule(
        budget_tokens=budget,
        batch_tokens=batch,
        lr=lr,
        dead_after_tokens=dead_after,
        reuse=spec.training.reuse or (recipe.plan.hop.reuse if hop else 1),
        lr_by_map=by_map,
        snapshots=_snapshot_ages(recipe, budget, transferred=hop is not None),
    )


def _settled_dictionary(
    spec: LegSpec, setting: _Setting, parent: Leg | None, external: External | None
) -> SizedDictionarySpec:
    """What a leg's dictionary looks like: as its parent's, or the recipe's, but for what it asks to be changed."""
    width = setting.facts.width(Site(spec.layer, spec.module or setting.recipe.sites.module))
    inherited = parent.dictionary if parent else setting.recipe.dictionary.sized(width)
    n_latents = inherited.n_latents
    architecture = inherited.architecture
    l0 = inherited.l0
    if external:
        n_latents = external.n_latents
        architecture = external.architecture
        l0 = external.k or external.l0 or l0

    changes = spec.dictionary
    dictionary = inherited.with_architecture(changes.architecture or architecture)
    dictionary = dictionary.changed(n_latents=changes.n_latents or n_latents)
    asked_l0 = changes.k
    if asked_l0 is None and (external or changes.architecture):
        asked_l0 = l0
    if asked_l0:
        dictionary = dictionary.with_l0(asked_l0)
    check_sparsity(dictionary, spec.id)
    return dictionary


def check_sparsity(dictionary: SizedDictionarySpec, leg_id: str) -> None:
    """Raise PlanError if more latents are to be active than there are."""
    if dictionary.l0 is not None and dictionary.l0 > dictionary.n_latents:
        key = dictionary.activation.l0_key
        raise PlanError(
            f"leg {leg_id}: dictionary.{key} is {dictionary.l0:g} but there are only {dictionary.n_latents} latents; "
            f"lower {key} or raise n_latents"
        )


def auto_lr(width: int, budget_tokens: int, batch_tokens: int) -> float:
    """Default learning rate from scratch: 5e-3 at width 192, 1M tokens and batches of 512 (decision 007).

    It falls with the square roots of the width (a decoder row's entries are as small) and of the budget.

    >>> auto_lr(192, 1_000_000, 512), auto_lr(768, 4_000_000, 512)
    (0.005, 0.00125)
    """
    best = 5e-3 * math.sqrt(192 / width)
    rate = best * math.sqrt(1e6 / max(1, budget_tokens) * batch_tokens / 512)
    return min(max(rate, best / 6), 2 * best)


def _snapshot_ages(recipe: Recipe, budget: int, *, transferred: bool) -> list[int]:
    """Ages at which a leg is also published, in whole batches; age 0 only after a hop."""
    asked = recipe.train.snapshots
    if not asked and recipe.plan.preset == "paper":
        n_parts = 5 if transferred else 10
        asked = [i / n_parts for i in range(1, n_parts)]
    batch = recipe.train.batch_tokens
    ages = {batch * round(tokens_of(value, budget) / batch) for value in asked}
    return sorted(age for age in ages if age < budget and (age or transferred))


def _whole_blocks(tokens: int, block: int) -> int:
    """Rounded to whole blocks, at least one."""
    return block * max(1, round(tokens / block))


def _continuation(before: Leg, leg: Leg, legs: Sequence[Leg]) -> Leg | None:
    """What a recipe adds to a finished leg: a leg with the tokens it lacks, or None; other changes are refused."""
    changed = _changed_keys(before, leg)
    if changed:
        raise PlanError(
            f"leg {leg.id} is finished and the recipe changes its {', '.join(changed)}; only a larger number of tokens "
            "can be added. Choose another --out."
        )
    last = before
    n_tokens = before.budget_tokens
    by_parent = {other.parent: other for other in legs if other.id.startswith(f"{leg.id}+")}
    while last.id in by_parent:
        last = by_parent[last.id]
        n_tokens += last.budget_tokens
    missing = leg.budget_tokens - n_tokens
    if missing <= 0:
        return None
    changes: dict[str, Any] = {"budget_tokens": missing, "snapshots": []}
    if leg.schedule.lr_by_map:
        changes["lr_by_map"] = False
        changes["lr"] = COPY_RATE * leg.schedule.lr
    added = leg.changed(**changes)
    return added.changed(id=f"{leg.id}+{format_count(leg.budget_tokens)}", hop=Hop(parent=last.id, method="identity"))


def _changed_keys(before: Leg, now: Leg) -> list[str]:
    """The keys, but for those that follow from the schedule, in which two versions of a leg differ."""
    scheduled = {"start", "fork_at_tokens", "snapshots", "dead_after_tokens", "moment_tokens", "budget_tokens"}
    scheduled |= {"lr", "lr_by_map", "goal_fvu", "decay_gain", "predicted_fvu"}
    old = before.model_dump()
    new = now.model_dump()
    return [key for key in new if key not in scheduled and new[key] != old.get(key)]


# --- placing on the axis ------------------------------------------------------------------------------------------


def _placed(leg: Leg, spec: LegSpec, setting: _Setting, legs: Sequence[Leg]) -> Leg:
    """A leg with its start: as early as its parent, `after` and memory allow; `legs` are those placed before it."""
    needed = state_bytes(leg, setting.facts)
    if needed > setting.memory_bytes:
        raise PlanError(
            f"leg {leg.id} alone needs {needed / 2**30:.1f} GiB of training state, more than the "
            f"{setting.memory_bytes / 2**30:.1f} GiB allowed; lower n_latents or raise train.memory_gib"
        )
    by_id = {other.id: other for other in legs}
    parent = by_id.get(leg.parent)
    block = setting.block_tokens
    earliest = setting.begin
    if parent and spec.hop:
        age = tokens_of(spec.hop.fork_at, parent.budget_tokens)
        forked_at = parent.fold_at + math.ceil(age / parent.schedule.reuse)
        moments_start = block * math.ceil(forked_at / block) - leg.moment_tokens
        earliest = max(earliest, parent.start, moments_start)
    if spec.after:
        earliest = max(earliest, block * math.ceil(by_id[spec.after].end / block))

    # Memory only becomes free where another leg ends, so only such blocks are worth trying after the earliest start.
    ends = {block * math.ceil(other.end / block) for other in legs}
    for start in sorted({earliest, *ends}):
        if start < earliest:
            continue
        placed = leg.changed(start=start)
        if peak_state_bytes([*legs, placed], setting.facts) <= setting.memory_bytes:
            break
    else:
        raise AssertionError("after the last leg's end there is room for one")
    if parent:
        age = parent.schedule.reuse * max(0, placed.fold_at - parent.fold_at)
        placed = placed.changed(fork_at_tokens=min(parent.budget_tokens, age))
    return placed


def choose_block(recipe: Recipe, facts: ModelFacts, specs: Sequence[LegSpec]) -> int:
    """Tokens shuffled together: a multiple of the batch and of the context, from shapes alone."""
    step = math.lcm(recipe.train.batch_tokens, recipe.data.context)
    asked = recipe.data.block_tokens
    if asked != "auto":
        if asked % step:
            raise PlanError(
                f"data.block_tokens is {asked}; it must be a multiple of train.batch_tokens "
                f"({recipe.train.batch_tokens}) and data.context ({recipe.data.context}), that is of {step}"
            )
        return asked
    n_sites = max(1, len({(spec.layer, spec.module) for spec in specs}))
    bytes_per_token = 4 * max(facts.d_model, facts.d_attn_z) * n_sites

    # A block has at least 16 batches, and where all legs are hops, the tokens that they are refitted on.
    least = 16 * recipe.train.batch_tokens
    hops_only = all(spec.hop for spec in specs)
    if hops_only and any(_is_refitted(spec, recipe) for spec in specs):
        least = max(least, recipe.plan.hop.refit_tokens)

    # It has at most a quarter of the shortest leg (those that hardly train aside), so that no leg sees but a few
    # sequences; and all blocks of the longest leg are equal, so that the last is not read in vain.
    longest = max(least if hops_only else 0, *(spec.tokens for spec in specs))
    shortest = min([longest, *(spec.tokens for spec in specs if spec.tokens >= longest / 16)])
    largest = min(MAX_BLOCK_TOKENS, BLOCK_BYTES // bytes_per_token, max(shortest // 4, least))
    n_blocks = max(1, math.ceil(longest / max(step, largest)))
    return step * math.ceil(longest / n_blocks / step)


def _is_refitted(spec: LegSpec, recipe: Recipe) -> bool:
    refit = spec.hop.refit if spec.hop else None
    return recipe.plan.hop.refit if refit is None else refit


def _check_widths(plan: Plan) -> None:
    """Raise PlanError where a transfer does not fit: widths, layers of another model, too few tokens for a map."""
    for leg in plan.legs:
        if leg.hop:
            _check_width(plan, leg, leg.hop.method)


def _check_width(plan: Plan, leg: Leg, method: Method) -> None:
    width = plan.facts.width(leg.site)
    external = plan.externals.get(leg.parent)
    source_width = external.d_model if external else plan.facts.width(plan.parent_site(leg))
    if source_width != width:
        raise PlanError(
            f"leg {leg.id}: its parent {leg.parent} reads activations {source_width} wide, {leg.site} is {width} wide; "
            "a transfer needs equal widths"
        )
    if external and external.layer >= plan.facts.n_layers:
        raise PlanError(
            f"leg {leg.id}: its parent {leg.parent} is of layer {external.layer}, and {plan.facts.name} has layers "
            f"0 to {plan.facts.n_layers - 1}; it belongs to another model"
        )
    if method != "identity" and leg.moment_tokens <= 2 * width:
        raise PlanError(
            f"leg {leg.id}: method {method} fits a {width}-dimensional map on {leg.moment_tokens} tokens; "
            f"raise plan.moment_tokens over {2 * width}"
        )
