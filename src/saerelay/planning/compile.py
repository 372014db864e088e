"""From a recipe to a plan: every leg settled (`legs.py`), then placed on the axis of token positions (`placing.py`).

Commands call it by `workflows.settle.plan_run`, which reads what it must know of the model and of outside parents.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from saerelay.errors import PlanError
from saerelay.planning.batches import settled_batches
from saerelay.planning.facts import ModelFacts
from saerelay.planning.leg import COPY_RATE, External, Hop, Leg
from saerelay.planning.leg_spec import LegSpec
from saerelay.planning.legs import Setting, parts_of, settled_leg, sites_of
from saerelay.planning.placing import choose_block, lm_batch, placed_leg
from saerelay.planning.plan import Plan
from saerelay.planning.presets import Place, preset_legs, with_repeats
from saerelay.planning.recipe import Recipe
from saerelay.sae.spec import WITHOUT_MAP, LegMethod
from saerelay.site import Site
from saerelay.spec import few_of, format_count

MAX_TOKENS = 10**11
"""Most token positions that a plan may read: ten times as many as the largest published SAEs were trained on."""
MAX_HELD_OUT_TOKENS = 10**9
"""Most tokens to measure on. Since one document in 20 is for them, 20 times as many are read from the corpus."""


def compile_plan(
    recipe: Recipe,
    facts: ModelFacts,
    *,
    externals: dict[str, External] | None = None,
    parents: Mapping[Place, str] | None = None,
    memory_bytes: float = math.inf,
    finished: Plan | None = None,
) -> Plan:
    """Turn a recipe into a plan; raises PlanError if it cannot be run.

    `externals` describes the parents outside the plan, and `parents` names the SAEs that `plan.parents` asks for. Legs
    start as early as their parents and `memory_bytes` (training state of all live legs) allow. With a `finished` plan,
    its legs stay as they are, and the recipe's additions start where it ended: new legs, and a continuation for each
    leg with a larger budget (whose learning rate warms up and decays again, so that the result is not that of a longer
    first run).
    """
    layers = _check_layers(recipe, facts)
    externals = {**(finished.externals if finished else {}), **_at_asked_l0(externals or {}, parents or {})}
    if finished and not recipe.plan.roots:
        recipe = _with_roots_of(recipe, finished, layers)
    specs = with_repeats(recipe.plan.legs or preset_legs(recipe, layers, parents), recipe.train)
    if recipe.plan.legs:
        _check_nothing_else(recipe)
        _check_ids(specs, finished)
    for spec in specs:
        for site in sites_of(spec, recipe):
            facts.check_site(site)
    batch_tokens, specs = settled_batches(recipe, facts, specs, finished)
    setting = Setting(
        recipe=recipe,
        facts=facts,
        batch_tokens=batch_tokens,
        block_tokens=finished.block_tokens if finished else choose_block(recipe, facts, specs, batch_tokens),
        externals=externals,
        memory_bytes=memory_bytes,
        begin=finished.n_tokens if finished else 0,
    )
    legs = list(finished.legs) if finished else []
    finished_legs = {leg.id: leg for leg in legs}
    for spec in _parents_first(specs):
        leg: Leg | None = settled_leg(spec, setting, legs)
        if leg.id in finished_legs:
            leg = _continuation(finished_legs[leg.id], leg, legs)
        if leg is not None:
            legs.append(placed_leg(leg, spec, setting, legs))
    if not finished:
        order = {spec.id: i for i, spec in enumerate(specs)}
        legs.sort(key=lambda leg: order[leg.id])
    plan = Plan(
        recipe=recipe,
        facts=facts,
        block_tokens=setting.block_tokens,
        lm_batch_tokens=finished.lm_batch_tokens if finished else lm_batch(facts),
        legs=legs,
        externals=externals,
        probe=finished.probe if finished else _probe_layer(recipe, facts),
        extended_at=[*finished.extended_at, finished.n_tokens] if finished else [],
    )
    _check_length(plan)
    _check_widths(plan)
    return plan


def _at_asked_l0(externals: Mapping[str, External], parents: Mapping[Place, str]) -> dict[str, External]:
    """Return parents outside the plan, those of another run's suite with the L0 that the other run asked for.

    Their files tell the L0 that came out, which is not exactly that where a penalty holds it near a target.
    """
    described = dict(externals)
    for (_, _, l0), reference in parents.items():
        if l0:
            described[reference] = described[reference].changed(l0=l0)
    return described


def _check_nothing_else(recipe: Recipe) -> None:
    """Raise PlanError if a recipe with a plan written leg by leg also sets keys that belong to presets."""
    plan = recipe.plan
    if plan.controls:
        raise PlanError(
            "plan.controls belongs to the presets; with [[plan.legs]], write controls as legs with control_of"
        )
    if plan.tier.tiers:
        raise PlanError(
            "plan.tiers belongs to the presets; with [[plan.legs]], write tiers as legs with a parent and their own k"
        )
    if plan.hop.parents:
        raise PlanError("plan.parents belongs to the presets; with [[plan.legs]], each leg names its own parent")


def _check_ids(specs: Sequence[LegSpec], finished: Plan | None) -> None:
    """Raise PlanError for an id that would pass for what an extension adds to another leg: its id and a plus sign.

    A run that was begun when such ids were allowed may be extended.
    """
    known = set[str]()
    if finished:
        known = {spec.id for spec in with_repeats(finished.recipe.plan.legs, finished.recipe.train)}
    ids = [spec.id for spec in specs]
    for spec in specs:
        other = next((other for other in ids if spec.id.startswith(f"{other}+")), None)
        if other and spec.id not in known:
            raise PlanError(
                f'leg {spec.id}: an id that begins with "{other}+" is for what an extension of the run adds to leg '
                f"{other}; choose another, such as {spec.id.replace('+', '-')}"
            )


def _check_length(plan: Plan) -> None:
    """Raise PlanError for a plan that must be a mistake, because it would take years to run."""
    if plan.n_tokens > MAX_TOKENS:
        raise PlanError(
            f"the plan reads {format_count(plan.n_tokens)} tokens, but at most {format_count(MAX_TOKENS)} are allowed; "
            "lower the tokens of the legs (plan.root_tokens, plan.transfer_tokens), plan.moment_tokens, "
            "train.batch_tokens or data.block_tokens"
        )
    tokens = plan.recipe.evaluate.tokens
    if tokens > MAX_HELD_OUT_TOKENS:
        raise PlanError(
            f"evaluate.tokens is {format_count(tokens)}, but at most {format_count(MAX_HELD_OUT_TOKENS)} are allowed; "
            "lower it: one document in 20 is held out for them, so that 20 times as many tokens are read"
        )


def _check_layers(recipe: Recipe, facts: ModelFacts) -> list[int]:
    """Return the layers asked for; PlanError if the model lacks one of them, or does not take such a long context."""
    if facts.tokens.max_context and recipe.data.context > facts.tokens.max_context:
        raise PlanError(
            f"data.context is {recipe.data.context}; {facts.name} takes at most {facts.tokens.max_context} tokens; "
            "lower data.context"
        )
    if recipe.sites.layers == "all":
        layers = list(range(facts.n_layers))
    else:
        layers = sorted(recipe.sites.layers)
    if not layers:
        raise PlanError('sites.layers is empty; write "all" or a list such as [0, 1]')
    named = {"sites.layers": layers, "plan.roots": recipe.plan.roots, "plan.controls": recipe.plan.controls}
    for leg in recipe.plan.legs:
        named[f"leg {leg.id}"] = [leg.layer, *leg.shared_layers]
    for where, of_key in named.items():
        for layer in of_key:
            if not 0 <= layer < facts.n_layers:
                last = facts.n_layers - 1
                raise PlanError(
                    f"{where}: layer {layer} is out of range: {facts.name} has layers 0 to {last}; name some of these"
                )
    return layers


def _with_roots_of(recipe: Recipe, finished: Plan, layers: Sequence[int]) -> Recipe:
    """Return the recipe with the roots of a finished plan, so that added layers do not change the choice of roots.

    Raises PlanError if the recipe's preset has layers to be transferred, and they do not include these roots.
    """
    roots = sorted({leg.layer for leg in finished.legs if leg.role == "root"})
    lacking = sorted(set(roots) - set(layers))
    if lacking and not recipe.plan.legs:
        raise PlanError(
            f"sites.layers ({few_of(map(str, layers))}) leaves out layer {lacking[0]}, a root of the run that is "
            "extended; add it: what is finished is not trained again"
        )
    plan = recipe.plan.changed(roots=roots)
    return recipe.changed(plan=plan)


def _probe_layer(recipe: Recipe, facts: ModelFacts) -> int | None:
    """Return the middle layer of the model, or the nearest layer that can be read.

    It does not depend on the layers that are read, so that the same positions are left out for all choices of layers.
    """
    if not recipe.data.outlier_norm:
        return None
    module = recipe.sites.first_kind.written
    readable = [layer for layer in range(facts.n_layers) if str(Site(layer, module)) not in facts.sites.refusals]
    if not readable:
        raise PlanError(
            f"no layer of {facts.name} has {module} (sites.module), where outlier norms are looked for; set "
            "sites.module to a module that the model has, or data.outlier_norm = 0"
        )
    return min(readable, key=lambda layer: abs(layer - facts.n_layers // 2))


def _parents_first(specs: Sequence[LegSpec]) -> list[LegSpec]:
    """Return the legs in an order in which each follows all legs that it names; PlanError if there is no such order."""
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
            raise PlanError(
                f"legs wait for each other in a circle: {' -> '.join([*waiting, spec.id])}; change the key "
                "parent, after or control_of of one leg"
            )
        waiting.append(spec.id)
        for other in (spec.parent, spec.after, spec.control_of):
            outside = other == spec.parent and "/" in other
            if other in by_id:
                visit(by_id[other])
            elif other and not outside:
                raise PlanError(
                    f'leg {spec.id} names "{other}", which is not a leg of this plan ({", ".join(sorted(by_id))}); '
                    "to start from an SAE outside the plan, give its directory, with a slash"
                )
        waiting.pop()
        ordered[spec.id] = spec

    for spec in specs:
        visit(spec)
    return list(ordered.values())


def _continuation(before: Leg, leg: Leg, legs: Sequence[Leg]) -> Leg | None:
    """Return a leg with the tokens that a recipe adds to a finished leg, or None; PlanError for any other change."""
    changed = _changed_keys(before, leg)
    if changed:
        raise PlanError(
            f"leg {leg.id} is finished, but the recipe changes its {', '.join(changed)}; a finished leg can only get "
            "more tokens. Choose another --out."
        )
    parts = parts_of(before, legs)
    missing = leg.budget_tokens - sum(part.budget_tokens for part in parts)
    if missing <= 0:
        return None
    if before.shared_layers:
        raise PlanError(
            f"leg {leg.id} is finished, and a leg that several layers share cannot be trained further; leave its "
            "tokens as they were, or choose another --out"
        )
    changes: dict[str, Any] = {"budget_tokens": missing, "snapshots": []}
    if leg.goal.predicted_fvu == before.goal.predicted_fvu:
        changes["predicted_fvu"] = None  # it was predicted for the tokens that the leg had
    if leg.schedule.lr_by_map:
        changes["lr_by_map"] = False
        changes["lr"] = COPY_RATE * leg.schedule.lr
    added = leg.changed(**changes)
    name = f"{leg.id}+{format_count(leg.budget_tokens)}"
    if any(other.id == name for other in legs):  # counts that differ by less than the name shows
        name = f"{leg.id}+{leg.budget_tokens}"
    return added.changed(id=name, hop=Hop(parent=parts[-1].id, method="identity"))


def _changed_keys(before: Leg, now: Leg) -> list[str]:
    """Return the keys in which two versions of a leg differ, except those that follow from the schedule."""
    scheduled = {"start", "fork_at_tokens", "snapshots", "dead_after_tokens", "moment_tokens", "budget_tokens"}
    scheduled |= {"shared_layers", "alignment_tokens", "lr", "lr_by_map", "goal_fvu", "decay_gain", "predicted_fvu"}
    old = before.model_dump()
    new = now.model_dump()
    keys = new | old  # either may have keys that the other lacks: of a parent, of a control, of a transcoder
    return [key for key in keys if key not in scheduled and new.get(key) != old.get(key)]


def _check_widths(plan: Plan) -> None:
    """Raise PlanError if a map is impossible: other widths, a layer the model lacks, too few tokens to fit it."""
    for leg in plan.legs:
        width = plan.facts.width(leg.site)
        if leg.hop:
            _check_width(plan, leg, width)
            _check_map_tokens(leg, width, leg.hop.method)
        elif leg.shared_layers:
            _check_shared_widths(plan, leg, width)
            _check_map_tokens(leg, width, "procrustes")


def _check_shared_widths(plan: Plan, leg: Leg, width: int) -> None:
    for site in leg.shared_sites:
        if plan.facts.width(site) != width:
            raise PlanError(
                f"leg {leg.id}: the activations of {site} have width {plan.facts.width(site)}, but those of {leg.site} "
                f"have width {width}; layers that share a leg need equal widths"
            )


def _check_width(plan: Plan, leg: Leg, width: int) -> None:
    external = plan.externals.get(leg.parent)
    source_width = external.d_model if external else plan.facts.width(plan.parent_site(leg))
    if source_width != width:
        raise PlanError(
            f"leg {leg.id}: its parent {leg.parent} reads activations of width {source_width}, but those of {leg.site} "
            f"have width {width}; a transfer needs equal widths"
        )
    if external and external.layer >= plan.facts.n_layers:
        raise PlanError(
            f"leg {leg.id}: its parent {leg.parent} reads layer {external.layer}, but {plan.facts.name} has layers "
            f"0 to {plan.facts.n_layers - 1}; the parent belongs to another model"
        )
    if external and leg.moment_tokens:  # a map is fitted to what the parent reads and reconstructs
        plan.facts.check_site(external.site)
        plan.facts.check_site(external.site_out)


def _check_map_tokens(leg: Leg, width: int, method: LegMethod) -> None:
    if method not in WITHOUT_MAP and leg.moment_tokens <= 2 * width:
        raise PlanError(
            f"leg {leg.id}: method {method} fits a {width}-dimensional map on {leg.moment_tokens} tokens; "
            f"raise plan.moment_tokens above {2 * width}"
        )
