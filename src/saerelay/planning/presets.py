"""Presets: the legs that the name of a preset stands for, as if they had been written out in `[[plan.legs]]`.

`compile` settles both in the same way; `choose` takes its controls from here.
"""

from collections.abc import Mapping, Sequence

from saerelay.errors import PlanError
from saerelay.planning.leg_spec import ControlKind, LegControl, LegDictionary, LegHop, LegSpec, repeat_name
from saerelay.planning.recipe import Recipe, TrainSpec
from saerelay.site import SiteKind


def hub_of(layers: Sequence[int]) -> int:
    """Return the layer to transfer the others from if nothing more is known: a little above the middle."""
    return layers[5 * len(layers) // 8]


Place = tuple[SiteKind, int, float | None]
"""A kind of site, a layer, and the L0 that the recipe asks for there."""


def preset_legs(recipe: Recipe, layers: Sequence[int], parents: Mapping[Place, str] | None) -> list[LegSpec]:
    """Return the legs of the recipe's preset: for each kind of site its suite, then its tiers, then its controls.

    With `parents`, the directories of another run's SAEs, each layer instead continues its SAE of that run.
    Raises PlanError if a root is not among the layers, or a control has no transfer to be compared with.
    """
    plan = recipe.plan
    assert (parents is not None) == bool(plan.hop.parents)
    strangers = sorted(set(plan.roots) - set(layers))
    if strangers:
        raise PlanError(f"plan.roots names layer {strangers[0]}, which is not among sites.layers ({layers})")
    legs = []
    for kind in recipe.sites.kinds:
        if parents is None:
            suite = _suite_legs(recipe, kind, layers)
        else:
            suite = _continuing_legs(recipe, kind, layers, parents)
        legs += suite
        legs += _tier_legs(recipe, kind, suite, parents or {})
        for layer in plan.controls:
            transfers = [leg for leg in suite if leg.layer == layer and leg.hop]
            legs += control_legs(recipe, kind.leg_name(layer), transfers)
    return legs


def _suite_legs(recipe: Recipe, kind: SiteKind, layers: Sequence[int]) -> list[LegSpec]:
    """Return the roots and the transfers of one kind of site."""
    plan = recipe.plan
    if plan.preset == "shared":
        return _shared_legs(recipe, kind, layers)
    parents = preset_parents(recipe, layers)
    roots = [layer for layer in sorted(layers) if layer not in parents or plan.preset == "paper"]
    legs = [_leg(kind, layer, kind.leg_name(layer), plan.root_tokens) for layer in roots]
    for layer, sources in sorted(parents.items()):
        for source in sources:
            parent = kind.leg_name(source)
            if source not in roots:
                parent += f"-from-L{parents[source][0]}"
            hop = LegHop(parent=parent, fork_at=plan.hop.fork_at)
            legs.append(_leg(kind, layer, f"{kind.leg_name(layer)}-from-L{source}", plan.transfer_tokens, hop))
    return legs


def _shared_legs(recipe: Recipe, kind: SiteKind, layers: Sequence[int]) -> list[LegSpec]:
    """Return, for each root, one SAE that the layers nearest to it share, and its hops to each of these layers.

    The root's own layer is one of them.
    """
    plan = recipe.plan
    nearest = preset_parents(recipe, layers)
    legs = []
    for root in sorted(set(layers) - set(nearest)):
        others = [layer for layer in layers if nearest.get(layer) == [root]]
        if not others:
            legs.append(_leg(kind, root, kind.leg_name(root), plan.root_tokens))
            continue
        name = f"{kind.leg_name(root)}-shared"
        legs.append(_leg(kind, root, name, plan.root_tokens).changed(shared_layers=others))
        hop = LegHop(parent=name, fork_at=plan.hop.fork_at)
        legs.append(_leg(kind, root, kind.leg_name(root), plan.transfer_tokens, hop.changed(method="identity")))
        for layer in others:
            legs.append(_leg(kind, layer, f"{kind.leg_name(layer)}-from-L{root}", plan.transfer_tokens, hop))
    return legs


def _leg(kind: SiteKind, layer: int, name: str, tokens: int, hop: LegHop | None = None) -> LegSpec:
    return LegSpec(
        id=name,
        layer=layer,
        module=kind.module,
        module_out=kind.module_out or "",
        tokens=tokens,
        hop=hop,
    )


def _continuing_legs(
    recipe: Recipe, kind: SiteKind, layers: Sequence[int], parents: Mapping[Place, str]
) -> list[LegSpec]:
    """Return legs that train copies of another run's SAEs further, for an instruction-tuned model, for example."""
    own = recipe.dictionary.l0
    legs = []
    for layer in layers:
        if (kind, layer, own) not in parents:
            others = [f"{l0:g}" for of_kind, at, l0 in parents if (of_kind, at) == (kind, layer) and l0]
            at_l0 = f" with {own:g} active latents, only with {', '.join(others)}" if own and others else ""
            raise PlanError(
                f"plan.parents: {recipe.plan.hop.parents} has no SAE at {kind.leg_name(layer)}{at_l0}; set "
                "sites and dictionary.k to those of that run"
            )
        hop = LegHop(parent=parents[kind, layer, own], method="identity")
        legs.append(_leg(kind, layer, kind.leg_name(layer), recipe.plan.transfer_tokens, hop))
    return legs


# --- tiers and controls -------------------------------------------------------------------------------------------


def _tier_legs(recipe: Recipe, kind: SiteKind, suite: Sequence[LegSpec], parents: Mapping[Place, str]) -> list[LegSpec]:
    """Return, for each leg, its copies at the other L0s of `plan.tiers`.

    A leg that several layers share has none, since each of these layers has a leg of its own. A copy starts from the
    parent that has this L0, or, if there is none, from the leg itself. Raises PlanError for an architecture whose L0
    follows from a penalty.
    """
    own = recipe.dictionary.l0
    tiers = recipe.plan.tier.tiers
    if tiers and own is None:
        raise PlanError(
            f"plan.tiers asks for L0 {tiers}, but the L0 of {recipe.dictionary.architecture} follows from a penalty; "
            "choose another architecture, or leave plan.tiers out"
        )
    tokens = recipe.plan.tier.tier_tokens
    if tokens == "auto":
        tokens = recipe.plan.transfer_tokens
    legs = []
    for leg in suite:
        for k in sorted(tiers):
            if k == own or leg.shared_layers:
                continue
            hop = LegHop(parent=parents.get((kind, leg.layer, k), leg.id), method="identity")
            legs.append(leg.changed(id=f"{leg.id}-k{k}", tokens=tokens, hop=hop, dictionary=LegDictionary(k=k)))
    return legs


_CONTROL_NAMES: dict[ControlKind, str] = {"equal_tokens": "scratch-equal", "full": "scratch-full", "random": "random"}


def control_legs(recipe: Recipe, name: str, transfers: Sequence[LegSpec]) -> list[LegSpec]:
    """Return the controls of the transfers to a site, of the kinds that the plan asks for; `name` begins their ids.

    Raises PlanError if there is no transfer.
    """
    if not transfers:
        raise PlanError(f"plan.controls names {name}, which no transfer in this plan reaches; leave it out")
    transfer = transfers[0]
    legs = []
    for kind in recipe.plan.control_kinds:
        tokens = recipe.plan.root_tokens if kind == "full" else 0  # compiling settles "equal_tokens"
        hop = None
        if kind == "random":
            assert transfer.hop
            hop = transfer.hop.changed(method="random", refit=True)
        legs.append(
            LegSpec(
                id=f"{name}-{_CONTROL_NAMES[kind]}",
                layer=transfer.layer,
                module=transfer.module,
                module_out=transfer.module_out,
                tokens=tokens,
                hop=hop,
                control=LegControl(control_of=transfer.id, control_kind=kind),
            )
        )
    return legs


def with_repeats(specs: Sequence[LegSpec], train: TrainSpec) -> list[LegSpec]:
    """Return the legs, followed by their repeats with other seeds if `train.seeds` asks for any.

    A repeat of a transfer starts from the repeat of its parent; all repeats share a parent outside the plan.
    """
    repeated = list(specs)
    firsts = {spec.id: train.seed if spec.seed is None else spec.seed for spec in specs}
    for i in range(1, train.seeds):
        names = {leg_id: repeat_name(leg_id, first + i) for leg_id, first in firsts.items()}
        for spec in specs:
            hop = spec.hop
            if hop is not None:
                hop = hop.changed(parent=names.get(hop.parent, hop.parent))
            control = spec.control
            if control is not None:
                control = control.changed(control_of=names.get(control.control_of, control.control_of))
            repeated.append(
                spec.changed(
                    id=names[spec.id],
                    seed=firsts[spec.id] + i,
                    after=names.get(spec.after, spec.after),
                    hop=hop,
                    control=control,
                )
            )
    return repeated


# --- who is transferred from whom ---------------------------------------------------------------------------------


def preset_parents(recipe: Recipe, layers: Sequence[int]) -> dict[int, list[int]]:
    """Return, for each layer that is not (only) trained from scratch, the layers it is transferred from."""
    match recipe.plan.preset:
        case "scratch":
            return {}
        case "hub" | "shared":
            return _hub(layers, recipe.plan.roots)
        case "forward":
            return _chain(list(layers), recipe.plan.roots)
        case "backward":
            return _chain(list(reversed(layers)), recipe.plan.roots)
        case "alternate":
            return _alternate(layers, recipe.plan.roots, backward=recipe.plan.direction != "forward")
        case "paper":
            return _both_neighbours(layers, recipe.plan.direction)
        case "auto":
            raise PlanError(
                'preset = "auto" plans from a survey, which this command does not run; write the plan out with '
                "`saerelay plan run.toml --write planned.toml` and use that recipe"
            )


def _hub(layers: Sequence[int], roots: list[int]) -> dict[int, list[int]]:
    """Transfer every other layer directly from the nearest root; of two equally near roots, from the upper one."""
    roots = roots or [hub_of(layers)]
    parents = {}
    for layer in layers:
        if layer not in roots:
            parents[layer] = [min(roots, key=lambda root, layer=layer: (abs(root - layer), -root))]
    return parents


def _chain(chain: list[int], roots: list[int]) -> dict[int, list[int]]:
    """Transfer each layer from its predecessor in the chain; layers before the first root, from their successor."""
    roots = roots or [chain[0]]
    first = min(chain.index(root) for root in roots)
    parents = {}
    for i in range(first + 1, len(chain)):
        if chain[i] not in roots:
            parents[chain[i]] = [chain[i - 1]]
    for i in range(first):
        parents[chain[i]] = [chain[i + 1]]
    return parents


def _alternate(layers: Sequence[int], roots: list[int], *, backward: bool) -> dict[int, list[int]]:
    """Transfer every other layer from its neighbour above (or below), else from its other neighbour or nearest root."""
    if not roots:
        first = 1 if backward and len(layers) > 1 else 0
        roots = list(layers[first::2])
    parents = {}
    for i, layer in enumerate(layers):
        if layer in roots:
            continue
        below, above = _neighbours(layers, i)
        preferred = (above, below) if backward else (below, above)
        nearest = min(roots, key=lambda root, layer=layer: abs(root - layer))
        parents[layer] = [next((other for other in preferred if other in roots), nearest)]
    return parents


def _both_neighbours(layers: Sequence[int], direction: str) -> dict[int, list[int]]:
    """Transfer each layer from the layer below, the layer above, or both."""
    parents = {}
    for i, layer in enumerate(layers):
        below, above = _neighbours(layers, i)
        sources = []
        if below is not None and direction != "backward":
            sources.append(below)
        if above is not None and direction != "forward":
            sources.append(above)
        parents[layer] = sources
    return parents


def _neighbours(layers: Sequence[int], i: int) -> tuple[int | None, int | None]:
    """Return the layers before and after the i-th; None where there is none."""
    below = layers[i - 1] if i > 0 else None
    above = layers[i + 1] if i + 1 < len(layers) else None
    return below, above
