"""From a recipe to a plan: legs with all their choices made, placed on the axis of token positions."""

import math
from collections.abc import Sequence
from typing import Literal

from saerelay.errors import PlanError
from saerelay.planning.cost import peak_state_bytes, state_bytes
from saerelay.planning.facts import ModelFacts
from saerelay.planning.plan import COPY_RATE, External, Leg, Plan
from saerelay.planning.presets import preset_legs
from saerelay.planning.leg_spec import LegSpec, tokens_of
from saerelay.planning.recipe import Recipe
from saerelay.sae.spec import DictionarySpec
from saerelay.site import Site
from saerelay.spec import format_count

MAX_BLOCK_TOKENS = 65_536


BLOCK_BYTES = 2**30
"""Activations of one block stay under this, when the recipe lets us choose its size."""


def compile_plan(
    run: Recipe,
    facts: ModelFacts,
    *,
    externals: dict[str, External] | None = None,
    memory_bytes: float = math.inf,
    finished: "Plan | None" = None,
) -> Plan:
    """Turn a recipe into a plan; raises PlanError if it cannot be run.

    `externals` describes the parents that are directories. Legs are started as early as their parents and
    `memory_bytes` (training state of all live legs) allow. With a `finished` plan, its legs stay as they are and what
    the recipe adds starts where it ended: new legs, and for a leg that got a larger budget one that continues it (its
    rate warms up and decays again, so the result is not that of a longer first run).
    """
    if facts.tokens.max_context and run.data.context > facts.tokens.max_context:
        raise PlanError(
            f"data.context is {run.data.context}; {facts.name} takes at most {facts.tokens.max_context} tokens; "
            "lower data.context"
        )
    layers = list(range(facts.n_layers)) if run.sites.layers == "all" else sorted(set(run.sites.layers))
    if not layers:
        raise PlanError('sites.layers is empty; write "all" or a list such as [0, 1]')
    wanted = {*layers, *run.plan.roots, *run.plan.controls, *(leg.layer for leg in run.plan.legs)}
    for layer in sorted(wanted):
        if not 0 <= layer < facts.n_layers:
            raise PlanError(f"layer {layer} is out of range: {facts.name} has layers 0 to {facts.n_layers - 1}")
    if finished and not run.plan.roots:
        roots = sorted({leg.layer for leg in finished.legs if leg.role == "root"})
        run = run.changed(plan=run.plan.changed(roots=roots))
    specs = run.plan.legs or preset_legs(run, layers)
    if run.plan.legs and run.plan.controls:
        raise PlanError(
            "plan.controls belongs to the presets; with [[plan.legs]], write controls as legs with control_of"
        )
    block_tokens = finished.block_tokens if finished else choose_block(run, facts, specs)
    begin = finished.n_tokens if finished else 0
    legs = list(finished.legs) if finished else []
    for spec in _parents_first(specs):
        leg = _leg(spec, run, facts, block_tokens, legs, externals or {})
        before = next((old for old in (finished.legs if finished else ()) if old.id == leg.id), None)
        added = _continuation(before, leg, legs) if before else leg
        if added is None:
            continue
        legs.append(added)
        _schedule(legs, spec, block_tokens, memory_bytes, facts, begin)
    if not finished:
        order = {spec.id: i for i, spec in enumerate(specs)}
        legs.sort(key=lambda leg: order[leg.id])
    sites = sorted({leg.site for leg in legs})
    probe = finished.probe if finished else sites[len(sites) // 2].layer if run.data.outlier_norm else None
    plan = Plan(run=run, facts=facts, block_tokens=block_tokens, legs=legs, externals=externals or {}, probe=probe)
    _check_widths(plan)
    return plan


def _continuation(before: Leg, leg: Leg, legs: Sequence[Leg]) -> Leg | None:
    """What a recipe adds to a finished leg: a leg with the tokens it lacks, or nothing; other changes are refused."""
    scheduled = {"start", "fork_at_tokens", "snapshots", "dead_after_tokens", "moment_tokens", "budget_tokens"}
    scheduled |= {"lr", "lr_by_map", "goal_fvu", "decay_gain", "predicted_fvu"}
    old, new = before.model_dump(exclude=scheduled), leg.model_dump(exclude=scheduled)
    if changed := [key for key in new if new[key] != old[key]]:
        raise PlanError(
            f"leg {leg.id} is finished and the recipe changes its {', '.join(changed)}; only a larger number of tokens "
            "can be added. Choose another --out."
        )
    last, seen = before, before.budget_tokens
    while more := next(
        (other for other in legs if other.parent == last.id and other.id.startswith(f"{leg.id}+")), None
    ):
        last, seen = more, seen + more.budget_tokens
    extra = leg.budget_tokens - seen
    if extra <= 0:
        return None
    added = {"id": f"{leg.id}+{format_count(leg.budget_tokens)}", "parent": last.id, "method": "identity"}
    if leg.lr_by_map:
        added |= {"lr_by_map": False, "lr": COPY_RATE * leg.lr}
    return leg.model_copy(
        update=added | {"budget_tokens": extra, "moment_tokens": 0, "refit_tokens": 0, "snapshots": []}
    )


def choose_block(run: Recipe, facts: ModelFacts, specs: Sequence[LegSpec]) -> int:
    """Tokens shuffled together: a multiple of the batch and of the context, from shapes alone."""
    step = math.lcm(run.train.batch_tokens, run.data.context)
    if run.data.block_tokens:
        if run.data.block_tokens % step:
            raise PlanError(
                f"data.block_tokens is {run.data.block_tokens}; it must be a multiple of train.batch_tokens "
                f"({run.train.batch_tokens}) and data.context ({run.data.context}), that is of {step}"
            )
        return run.data.block_tokens
    bytes_per_token = 4 * max(facts.d_model, facts.d_attn_z) * max(1, len({(s.layer, s.module) for s in specs}))
    hops_only = all(spec.parent for spec in specs)  # then what they are refitted on counts
    refitted = any(run.plan.refit if spec.refit is None else spec.refit for spec in specs)
    least = max(16 * run.train.batch_tokens, run.plan.refit_tokens if hops_only and refitted else 0)
    longest = max(least if hops_only else 0, *(spec.tokens for spec in specs))
    shortest = min([longest, *(spec.tokens for spec in specs if spec.tokens >= longest / 16)])  # others hardly train
    wanted = min(MAX_BLOCK_TOKENS, BLOCK_BYTES // bytes_per_token, max(shortest // 4, least))
    wanted = max(step, wanted)
    n_blocks = max(1, math.ceil(longest / wanted))
    return step * math.ceil(longest / n_blocks / step)  # equal blocks: the last is not read in vain


def _parents_first(specs: Sequence[LegSpec]) -> list[LegSpec]:
    by_id = {spec.id: spec for spec in specs}
    if len(by_id) < len(specs):
        twice = sorted({spec.id for spec in specs if sum(s.id == spec.id for s in specs) > 1})
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
            if other in by_id:
                visit(by_id[other])
            elif other and (other != spec.parent or "/" not in other):
                raise PlanError(
                    f'leg {spec.id} names "{other}", which is no leg of this plan ({", ".join(sorted(by_id))}); '
                    "a dictionary outside it is given as a directory, with a slash"
                )
        waiting.pop()
        ordered[spec.id] = spec

    for spec in specs:
        visit(spec)
    return list(ordered.values())


def _leg(
    spec: LegSpec, run: Recipe, facts: ModelFacts, block: int, legs: Sequence[Leg], externals: dict[str, External]
) -> Leg:
    """A leg with all its choices made, but not yet placed on the axis."""
    p, t = run.plan, run.train
    site = Site(spec.layer, spec.module or run.sites.module)
    parent = next((leg for leg in legs if leg.id == spec.parent), None)
    dictionary = _dictionary(spec, parent.dictionary if parent else run.dictionary, externals.get(spec.parent))
    dictionary = dictionary.changed(n_latents=dictionary.latents(facts.width(site)))
    check_sparsity(dictionary, spec.id)
    batch = spec.batch_tokens or t.batch_tokens
    if t.batch_tokens % batch:
        raise PlanError(f"leg {spec.id}: batch_tokens {batch} does not divide train.batch_tokens {t.batch_tokens}")
    method = (spec.method or p.method) if spec.parent else None
    refit = bool(spec.parent) and (p.refit if spec.refit is None else spec.refit)
    budget = batch * math.ceil(spec.tokens / batch)
    if spec.control_of and not budget:
        transfer = next(leg for leg in legs if leg.id == spec.control_of)
        budget = batch * math.ceil((transfer.moment_tokens + transfer.budget_tokens) / batch)
    if not budget and not spec.parent:
        raise PlanError(f"leg {spec.id} is trained from scratch with 0 tokens; give it some")
    role: Literal["root", "transfer", "control"] = (
        "control" if spec.control_of else "transfer" if spec.parent else "root"
    )
    given_lr = spec.lr or (t.transfer_lr if spec.parent else t.lr)
    outside = externals.get(spec.parent)
    at_home = site in (parent.site if parent else None, Site(outside.layer, outside.module) if outside else None)
    by_map = bool(spec.parent) and not given_lr and (method != "identity" or at_home)
    lr = given_lr or auto_lr(facts.width(site), budget, batch) * (1 if by_map or not spec.parent else COPY_RATE)
    return Leg(
        id=spec.id,
        role=role,
        control_of=spec.control_of,
        control_kind=spec.control_kind if spec.control_of else "",
        layer=site.layer,
        module=site.module,
        dictionary=dictionary,
        parent=spec.parent,
        method=method,
        moment_tokens=_blocks(p.moment_tokens, block) if method not in (None, "identity") else 0,
        refit_tokens=min(p.refit_tokens, block) if refit else 0,
        budget_tokens=budget,
        reuse=spec.reuse or (p.reuse if spec.parent else 1),
        batch_tokens=batch,
        lr=lr,
        lr_by_map=by_map,
        dead_after_tokens=t.dead_after or max(batch, min(10_000_000, budget // 50)),
        snapshots=_snapshots(run, budget, bool(spec.parent)),
        seed=t.seed if spec.seed is None else spec.seed,
        goal_fvu=spec.goal_fvu,
        decay_gain=spec.decay_gain,
        predicted_fvu=spec.predicted_fvu,
    )


def _dictionary(spec: LegSpec, inherited: DictionarySpec, external: External | None) -> DictionarySpec:
    """What a leg's dictionary looks like: as its parent's, or the recipe's, but for what it asks to be changed."""
    changed, l0 = spec.model_dump(include={"architecture", "n_latents"}, exclude_none=True), inherited.l0
    if external:
        changed = {"architecture": external.architecture, "n_latents": external.n_latents} | changed
        l0 = external.k or external.l0 or l0
    if wanted := spec.k or (l0 if external or spec.architecture else None):
        changed |= {"k": max(1, round(wanted)), "target_l0": float(wanted)}
    return inherited.changed(**changed)


def check_sparsity(dictionary: DictionarySpec, leg_id: str) -> None:
    """No more active latents than there are."""
    if dictionary.l0 is not None and dictionary.l0 > dictionary.n_latents:
        key = "target_l0" if dictionary.architecture == "jumprelu" else "k"
        raise PlanError(
            f"leg {leg_id}: dictionary.{key} is {dictionary.l0:g} but there are only {dictionary.n_latents} latents; "
            f"lower {key} or raise n_latents"
        )


def auto_lr(width: int, budget_tokens: int, batch_tokens: int) -> float:
    """Default learning rate from scratch: 5e-3 at width 192, 1M tokens and batches of 512, from docs/log.md's sweeps.

    It falls with the square roots of the width (a decoder row's entries are as small) and of the budget.

    >>> auto_lr(192, 1_000_000, 512), auto_lr(768, 4_000_000, 512)
    (0.005, 0.00125)
    """
    best = 5e-3 * math.sqrt(192 / width)
    rate = best * math.sqrt(1e6 / max(1, budget_tokens) * batch_tokens / 512)
    return min(max(rate, best / 6), 2 * best)


def _snapshots(run: Recipe, budget: int, transferred: bool) -> list[int]:
    wanted = run.train.snapshots
    if not wanted and run.plan.preset == "paper":
        n = 5 if transferred else 10
        wanted = [i / n for i in range(1, n)]
    batch = run.train.batch_tokens
    ages = {batch * round(tokens_of(value, budget) / batch) for value in wanted}
    return sorted(age for age in ages if age < budget and (age or transferred))


def _blocks(tokens: int, block: int) -> int:
    """Rounded to whole blocks, at least one."""
    return block * max(1, round(tokens / block))


def _schedule(legs: list[Leg], spec: LegSpec, block: int, memory_bytes: float, facts: ModelFacts, begin: int) -> None:
    """Place the last leg on the axis: from `begin` on, as early as its parent, `after` and memory allow."""
    leg = legs.pop()
    parent = next((other for other in legs if other.id == leg.parent), None)
    earliest = begin
    if parent:
        forked = parent.fold_at + math.ceil(tokens_of(spec.fork_at, parent.budget_tokens) / parent.reuse)
        earliest = max(begin, parent.start, block * math.ceil(forked / block) - leg.moment_tokens)
    if spec.after:
        earliest = max(earliest, block * math.ceil(next(o for o in legs if o.id == spec.after).end / block))
    needed = state_bytes(leg, facts)
    if needed > memory_bytes:
        raise PlanError(
            f"leg {leg.id} alone needs {needed / 2**30:.1f} GiB of training state, more than the "
            f"{memory_bytes / 2**30:.1f} GiB allowed; lower n_latents or raise train.memory_gib"
        )
    candidates = sorted({earliest, *(block * math.ceil(other.end / block) for other in legs)})
    for start in (s for s in candidates if s >= earliest):
        placed = leg.changed(start=start)
        if peak_state_bytes([*legs, placed], facts) <= memory_bytes:
            break
    else:
        raise AssertionError("after the last leg's end there is room for one")
    if parent:
        age = min(parent.budget_tokens, parent.reuse * max(0, placed.fold_at - parent.fold_at))
        placed = placed.changed(fork_at_tokens=age)
    legs.append(placed)


def _check_widths(plan: Plan) -> None:
    for leg in plan.legs:
        if not leg.parent:
            continue
        source, target = plan.parent_site(leg), plan.facts.width(leg.site)
        outside = plan.externals.get(leg.parent)
        found = outside.d_model if outside else plan.facts.width(source)
        if found != target:
            raise PlanError(
                f"leg {leg.id}: its parent {leg.parent} reads activations {found} wide, {leg.site} is {target} wide; "
                "a transfer needs equal widths"
            )
        if outside and outside.layer >= plan.facts.n_layers:
            raise PlanError(
                f"leg {leg.id}: its parent {leg.parent} is of layer {outside.layer}, and {plan.facts.name} has layers "
                f"0 to {plan.facts.n_layers - 1}; it belongs to another model"
            )
        if leg.method != "identity" and leg.moment_tokens <= 2 * target:
            raise PlanError(
                f"leg {leg.id}: method {leg.method} fits a {target}-dimensional map on {leg.moment_tokens} tokens; "
                f"raise plan.moment_tokens over {2 * target}"
            )
