"""From a leg as it is written (`LegSpec`) to a leg of a plan (`Leg`): every choice that the recipe leaves open is made.

`compile` calls `settled_leg` for one leg after the other, parents first, and then places the leg on the axis
(`placing`). Nothing here depends on when a leg starts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from saerelay.errors import PlanError
from saerelay.planning.facts import ModelFacts
from saerelay.planning.leg import COPY_RATE, Control, External, Goal, Hop, Leg, Role, Schedule
from saerelay.planning.leg_spec import LegSpec, tokens_of
from saerelay.planning.recipe import PlanSpec, Recipe
from saerelay.sae.spec import WITHOUT_MAP, SizedDictionarySpec
from saerelay.site import ModuleKind, Site
from saerelay.spec import rounded_up


@dataclass(frozen=True)
class Setting:
    """What is common to all legs of a plan while they are compiled."""

    recipe: Recipe
    facts: ModelFacts
    batch_tokens: int
    block_tokens: int
    externals: Mapping[str, External] = field(default_factory=dict)
    memory_bytes: float = math.inf
    begin: int = 0
    """Cursor before which no new leg may start."""


def settled_leg(spec: LegSpec, setting: Setting, legs: Sequence[Leg]) -> Leg:
    """Return a leg with all its choices made, but not yet placed on the axis; `legs` were compiled before it."""
    recipe = setting.recipe
    site = site_of(spec, recipe)
    module_out = module_out_of(spec, recipe)
    by_id = {leg.id: leg for leg in legs}
    source = by_id.get(spec.parent) or setting.externals.get(spec.parent)
    hop = _settled_hop(spec, setting)
    budget = _settled_budget(spec, setting, by_id)
    if not budget and not hop:
        raise _without_tokens(spec)
    if source and source.module_out != module_out:
        raise PlanError(
            f"leg {spec.id} {_what(site.module, module_out)}, and its parent {spec.parent} "
            f"{_what(source.module, source.module_out)}; set module and module_out to those of the parent"
        )
    if spec.shared_layers:
        _check_shared(spec, site, module_out)
    dictionary = _settled_dictionary(spec, setting, by_id)
    if dictionary.skip_connection and not module_out:
        _check_skip_is_of_others(spec, recipe)
        dictionary = dictionary.changed(skip_connection=False)
    if hop and hop.method != "random" and module_out and not hop.refit_tokens:
        assert source
        _check_unrefitted(spec, dictionary, source.dictionary if isinstance(source, Leg) else source)
    parent_site = source.site if source else None
    moment_tokens = _whole_blocks(recipe.plan.hop.moment_tokens, setting.block_tokens)
    role: Role = "transfer" if hop else "root"
    return Leg(
        id=spec.id,
        role="control" if spec.control else role,
        layer=site.layer,
        module=site.module,
        module_out=module_out,
        dictionary=dictionary,
        seed=recipe.train.seed if spec.seed is None else spec.seed,
        schedule=_settled_schedule(spec, setting, hop, budget, at_home=site == parent_site),
        hop=hop,
        shared_layers=spec.shared_layers,
        alignment_tokens=moment_tokens if spec.shared_layers else 0,
        control=Control.model_validate(spec.control.model_dump()) if spec.control else None,
        goal=Goal.model_validate(spec.goal.model_dump()),
    )


def _check_skip_is_of_others(spec: LegSpec, recipe: Recipe) -> None:
    """Raise PlanError if skip_connection was asked for an SAE; a recipe may ask it for the transcoders beside SAEs."""
    if spec.dictionary.skip_connection:
        raise PlanError(
            f"leg {spec.id}: skip_connection belongs to transcoders, and this leg is an SAE, which reconstructs what "
            'it reads; set its module = "transcoder", or leave skip_connection out'
        )
    if not any(kind.module_out for kind in recipe.sites.kinds):
        raise PlanError(
            f"leg {spec.id}: dictionary.skip_connection belongs to transcoders, and this SAE reconstructs what it "
            'reads; set sites.module = "mlp_in" and sites.module_out = "mlp_out", or leave it out'
        )


def _check_shared(spec: LegSpec, site: Site, module_out: ModuleKind | None) -> None:
    """Raise PlanError if layers cannot share the leg."""
    if spec.hop:
        raise PlanError(
            f"leg {spec.id} is transferred from {spec.parent}, but shared_layers belong to a leg from scratch; keep "
            "one or the other"
        )
    if module_out:
        raise PlanError(
            f"leg {spec.id} is a transcoder; the MLPs of several layers compute different functions, so layers can "
            'share only SAEs. For transcoders, choose a preset other than "shared", or leave out shared_layers'
        )
    if site.layer in spec.shared_layers or len(set(spec.shared_layers)) < len(spec.shared_layers):
        raise PlanError(
            f"leg {spec.id}: shared_layers must name layers other than its own, {site.layer}, each once; found "
            f"{spec.shared_layers}"
        )


def _check_unrefitted(spec: LegSpec, dictionary: SizedDictionarySpec, before: SizedDictionarySpec | External) -> None:
    """Raise PlanError if a transcoder whose decoder is not refitted gets what only a refit gives it."""
    gained = []
    if dictionary.n_latents > before.n_latents:
        gained.append(f"{dictionary.n_latents - before.n_latents} latents")
    if dictionary.skip_connection and not before.skip_connection:
        gained.append("a skip connection")
    if gained:
        raise PlanError(
            f"leg {spec.id} gets {' and '.join(gained)} that its parent {spec.parent} does not have; in a transcoder "
            "these are fitted during the refit: set refit = true, or keep what the parent has"
        )


def site_of(spec: LegSpec, recipe: Recipe) -> Site:
    """Return the site that a leg reads."""
    return Site(spec.layer, spec.module or recipe.sites.first_kind.module)


def sites_of(spec: LegSpec, recipe: Recipe) -> list[Site]:
    """Return the sites that a leg is trained on: those it reads, shared layers included, and that it reconstructs."""
    site = site_of(spec, recipe)
    shared = [Site(layer, site.module) for layer in spec.shared_layers]
    return [site, *shared, site.at(module_out_of(spec, recipe))]


def module_out_of(spec: LegSpec, recipe: Recipe) -> ModuleKind | None:
    """Return the module a transcoder reconstructs (the recipe's, if the leg names no module); None for an SAE."""
    module_out = spec.module_out
    if module_out is None and spec.module is None:
        module_out = recipe.sites.first_kind.module_out
    site = site_of(spec, recipe)
    return module_out if module_out and module_out != site.module else None


def _what(module: ModuleKind, module_out: ModuleKind | None) -> str:
    return f"is a transcoder from {module} to {module_out}" if module_out else f"is an SAE of {module}"


def _settled_hop(spec: LegSpec, setting: Setting) -> Hop | None:
    if not spec.hop:
        return None
    defaults = setting.recipe.plan.hop
    method = spec.hop.method or defaults.method
    refit = defaults.refit if spec.hop.refit is None else spec.hop.refit
    block = setting.block_tokens
    moment_tokens = 0 if method in WITHOUT_MAP else _whole_blocks(defaults.moment_tokens, block)
    return Hop(
        parent=spec.hop.parent,
        method=method,
        moment_tokens=moment_tokens,
        refit_tokens=min(defaults.refit_tokens, moment_tokens or block) if refit else 0,
    )


def _settled_budget(spec: LegSpec, setting: Setting, by_id: Mapping[str, Leg]) -> int:
    """Return the training tokens, in whole batches; those of a control from scratch follow from its kind."""
    batch = _batch_tokens(spec, setting)
    if not spec.control or spec.hop:
        return rounded_up(spec.tokens, batch)
    if spec.control.control_kind == "full":
        return rounded_up(spec.tokens or setting.recipe.plan.root_tokens, batch)

    equal = rounded_up(_tokens_in_all(by_id[spec.control.control_of], by_id), batch)
    if spec.tokens and rounded_up(spec.tokens, batch) != equal:
        raise PlanError(
            f"leg {spec.id} has {spec.tokens} tokens, but a control with equal tokens has the {equal} that "
            f"{spec.control_of} uses in all; set tokens = 0, which means as many, or, for a control with a root's "
            'budget, control_kind = "full"'
        )
    return equal


def _tokens_in_all(leg: Leg, by_id: Mapping[str, Leg]) -> int:
    """Return the tokens of the maps and of the training of a leg's SAE at its place, where repetitions count.

    They include those of the legs that it continues, up to where it took over, and what extensions have added to it.
    """
    tokens = leg.moment_tokens + sum(part.budget_tokens for part in parts_of(leg, list(by_id.values())))
    while leg.hop and leg.parent in by_id and leg.stays_as(by_id[leg.parent]) == "continuation":
        tokens += leg.hop.fork_at_tokens
        leg = by_id[leg.parent]
        tokens += leg.moment_tokens
    return tokens


def _without_tokens(spec: LegSpec) -> PlanError:
    """Return the error for a leg from scratch without training tokens."""
    if spec.control and spec.control.control_kind == "equal_tokens":
        return PlanError(
            f"leg {spec.id} is to be trained on as many tokens as {spec.control_of}, which is trained on none; leave "
            'the leg out or, for a preset, leave "equal_tokens" out of plan.control_kinds'
        )
    return PlanError(f"leg {spec.id} is trained from scratch with 0 tokens; set its tokens")


def parts_of(first: Leg, legs: Sequence[Leg]) -> list[Leg]:
    """Return a leg followed by the legs that extensions of the run, not the recipe, have continued it with."""
    parts = [first]
    for leg in legs:
        if leg.stays_as(parts[-1]) == "continuation" and leg.id.startswith(f"{first.id}+"):
            parts.append(leg)
    return parts


def _batch_tokens(spec: LegSpec, setting: Setting) -> int:
    batch = spec.training.batch_tokens or setting.batch_tokens
    if setting.batch_tokens % batch:
        raise PlanError(
            f"leg {spec.id}: batch_tokens {batch} does not divide train.batch_tokens {setting.batch_tokens}"
        )
    return batch


def _settled_schedule(spec: LegSpec, setting: Setting, hop: Hop | None, budget: int, *, at_home: bool) -> Schedule:
    """Settle how long and how fast a leg is trained; `at_home`: the leg stays at its parent's site."""
    recipe = setting.recipe
    optimizer = recipe.train.optimizer
    batch = _batch_tokens(spec, setting)
    given = spec.training.lr
    if given is None or given == "auto":
        given = optimizer.transfer_lr if hop else optimizer.lr

    # After a hop, the map tells how much there is to learn; at the parent's own site, the check of the refit does. A
    # plain copy to another site has neither, and gets a fixed share of the rate from scratch.
    width = setting.facts.width(site_of(spec, recipe))
    by_map = hop is not None and given == "auto" and (hop.method != "identity" or at_home)
    if given == "auto":
        lr = auto_lr(width, budget, batch)
        if hop and not by_map:
            lr *= COPY_RATE
    else:
        lr = given

    dead_after = recipe.train.dead_after
    if dead_after == "auto":
        dead_after = auto_dead_after(budget, batch)
    return Schedule(
        budget_tokens=budget,
        batch_tokens=batch,
        lr=lr,
        dead_after_tokens=dead_after,
        reuse=spec.training.reuse or _usual_reuse(spec, recipe.plan),
        lr_by_map=by_map,
        snapshots=_snapshot_ages(setting, budget, transferred=hop is not None),
    )


def _usual_reuse(spec: LegSpec, plan: PlanSpec) -> int:
    """Return how many times a leg that does not say so trains on each block.

    A control with the tokens of a transfer reads each of them once: repetitions would make it worse to compare with.
    """
    if spec.hop:
        return plan.hop.reuse
    if spec.control and spec.control.control_kind == "equal_tokens":
        return 1
    return plan.root_reuse


def _settled_dictionary(spec: LegSpec, setting: Setting, by_id: Mapping[str, Leg]) -> SizedDictionarySpec:
    """Return the spec of a leg's dictionary, with the changes that the leg asks for.

    It begins with the parent's dictionary or, without a parent, the recipe's. A control that takes nothing from a
    parent has the dictionary of the leg that it is compared with.
    """
    parent = by_id.get(spec.parent)
    external = setting.externals.get(spec.parent)
    if spec.control and (not spec.hop or spec.hop.method == "random"):
        parent = by_id[spec.control.control_of]
        external = None
    width = setting.facts.width(site_of(spec, setting.recipe))
    inherited = parent.dictionary if parent else setting.recipe.dictionary.sized(width)
    n_latents = inherited.n_latents
    architecture = inherited.architecture
    l0 = inherited.l0
    if external:
        n_latents = external.n_latents
        architecture = external.architecture
        l0 = external.k or external.l0
        inherited = inherited.changed(skip_connection=external.skip_connection)

    changes = spec.dictionary
    dictionary = inherited.with_architecture(changes.architecture or architecture)
    dictionary = dictionary.changed(n_latents=changes.n_latents or n_latents)
    if changes.skip_connection is not None:
        dictionary = dictionary.changed(skip_connection=changes.skip_connection)
    if changes.k:
        if dictionary.l0 is None:
            raise PlanError(
                f"leg {spec.id}: k is {changes.k}, but the L0 of {dictionary.architecture} follows from a penalty; "
                "leave k out, or choose another architecture"
            )
        dictionary = dictionary.with_l0(changes.k)
    elif l0 and (external or changes.architecture):  # else it has this L0 already
        dictionary = dictionary.with_l0(l0)
    elif spec.hop and dictionary.l0 and not l0:
        why = f"the L0 of its parent {spec.parent} follows from a penalty"
        if external:
            why = f"the files of its parent {spec.parent} do not say how many latents are active, or say none"
        raise PlanError(f"leg {spec.id}: {why}; set k")
    check_sparsity(dictionary, spec.id)
    return dictionary


def check_sparsity(dictionary: SizedDictionarySpec, leg_id: str) -> None:
    """Raise PlanError if more latents are to be active than the dictionary has."""
    if dictionary.l0 is not None and dictionary.l0 > dictionary.n_latents:
        key = dictionary.activation.l0_key
        raise PlanError(
            f"leg {leg_id}: dictionary.{key} is {dictionary.l0:g} but there are only {dictionary.n_latents} latents; "
            f"lower {key} or raise n_latents"
        )


LARGEST_SWEPT_BATCH = 4096
"""Batch size in tokens beyond which the bound on the learning rate stops rising: larger batches were not tried."""


def auto_dead_after(budget_tokens: int, batch_tokens: int) -> int:
    """Return the default of `dead_after`: a fiftieth of the budget, at most 10M tokens and at least one batch."""
    return max(batch_tokens, min(10_000_000, budget_tokens // 50))


def auto_lr(width: int, budget_tokens: int, batch_tokens: int) -> float:
    """Return the default learning rate from scratch: 5e-3 at width 192, 1M tokens and batches of 512 (decision 007).

    It falls with the square root of the width (as do the entries of a decoder row) and of the budget, and rises with
    that of the batch size. For short budgets it is at most twice the value at 1M tokens, except in larger batches.

    >>> auto_lr(192, 1_000_000, 512), auto_lr(768, 4_000_000, 512)
    (0.005, 0.00125)
    """
    best = 5e-3 * math.sqrt(192 / width)
    rate = best * math.sqrt(1e6 / max(1, budget_tokens) * batch_tokens / 512)
    large_batch = math.sqrt(min(max(batch_tokens, 512), LARGEST_SWEPT_BATCH) / 512)
    return min(max(rate, best / 6), 2 * best * large_batch)


def _snapshot_ages(setting: Setting, budget: int, *, transferred: bool) -> list[int]:
    """Return the ages at which a leg is also published, in whole batches; age 0 only after a hop."""
    asked = setting.recipe.train.snapshots
    if not asked and setting.recipe.plan.preset == "paper":
        n_parts = 5 if transferred else 10
        asked = [i / n_parts for i in range(1, n_parts)]
    batch = setting.batch_tokens
    ages = {batch * round(tokens_of(value, budget) / batch) for value in asked}
    return sorted(age for age in ages if age < budget and (age or transferred))


def _whole_blocks(tokens: int, block: int) -> int:
    """Round to whole blocks, to at least one."""
    return block * max(1, round(tokens / block))
