"""Presets: the legs that one word means, as if they had been written out."""

from collections.abc import Sequence

from saerelay.errors import PlanError
from saerelay.planning.leg_spec import ControlKind, LegControl, LegHop, LegSpec
from saerelay.planning.recipe import Recipe
from saerelay.site import Site


def hub_of(layers: Sequence[int]) -> int:
    """The layer that others are best transferred from, if nothing more is known: a little above the middle."""
    return layers[5 * len(layers) // 8]


def preset_legs(recipe: Recipe, layers: Sequence[int]) -> list[LegSpec]:
    """The legs that the recipe's preset means.

    Raises PlanError where a root is not among the layers, or a control has nothing to be compared with.
    """
    plan = recipe.plan
    strangers = sorted(set(plan.roots) - set(layers))
    if strangers:
        raise PlanError(f"plan.roots names layer {strangers[0]}, which is not among sites.layers ({layers})")
    parents = preset_parents(recipe, layers)
    roots = [layer for layer in sorted(layers) if layer not in parents or plan.preset == "paper"]
    legs = [LegSpec(id=_name(recipe, layer), layer=layer, tokens=plan.root_tokens) for layer in roots]
    for layer, sources in sorted(parents.items()):
        for source in sources:
            parent = _name(recipe, source)
            if source not in roots:
                parent += f"-from-L{parents[source][0]}"
            legs.append(
                LegSpec(
                    id=f"{_name(recipe, layer)}-from-L{source}",
                    layer=layer,
                    tokens=plan.transfer_tokens,
                    hop=LegHop(parent=parent, fork_at=plan.hop.fork_at),
                )
            )
    for layer in plan.controls:
        transfers = [leg for leg in legs if leg.layer == layer and leg.hop]
        legs += control_legs(recipe, layer, transfers)
    return legs


_CONTROL_NAMES: dict[ControlKind, str] = {"equal_tokens": "scratch-equal", "full": "scratch-full", "random": "random"}


def _name(recipe: Recipe, layer: int) -> str:
    sites = recipe.sites
    if (sites.module, sites.module_out) == ("mlp_in", "mlp_out"):
        return f"L{layer}.transcoder"
    site = str(Site(layer, sites.module))
    return f"{site}-to-{sites.written}" if sites.are_of_transcoders else site


def control_legs(recipe: Recipe, layer: int, transfers: list[LegSpec]) -> list[LegSpec]:
    """The controls of a layer that is reached by transfers, of the kinds that the plan asks for."""
    if not transfers:
        raise PlanError(f"plan.controls names layer {layer}, which is not reached by a transfer in this plan")
    transfer = transfers[0]
    legs = []
    for kind in recipe.plan.control_kinds:
        tokens = recipe.plan.root_tokens if kind == "full" else 0  # equal tokens are settled when it is compiled
        hop = None
        if kind == "random":
            assert transfer.hop
            hop = transfer.hop.changed(method="random", refit=True)
        legs.append(
            LegSpec(
                id=f"{_name(recipe, layer)}-{_CONTROL_NAMES[kind]}",
                layer=layer,
                tokens=tokens,
                hop=hop,
                control=LegControl(control_of=transfer.id, control_kind=kind),
            )
        )
    return legs


# --- who is transferred from whom ---------------------------------------------------------------------------------


def preset_parents(recipe: Recipe, layers: Sequence[int]) -> dict[int, list[int]]:
    """For each layer that is not (only) trained from scratch, the layers it is transferred from."""
    match recipe.plan.preset:
        case "scratch":
            return {}
        case "hub":
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
                'preset = "auto" plans from a survey, which this command does not make; write the plan out with '
                "`saerelay plan run.toml --write planned.toml` and use that recipe"
            )


def _hub(layers: Sequence[int], roots: list[int]) -> dict[int, list[int]]:
    """All others straight from the nearest root; of two as near, from the one above."""
    roots = roots or [hub_of(layers)]
    parents = {}
    for layer in layers:
        if layer not in roots:
            parents[layer] = [min(roots, key=lambda root, layer=layer: (abs(root - layer), -root))]
    return parents


def _chain(chain: list[int], roots: list[int]) -> dict[int, list[int]]:
    """Each from its predecessor in the chain; what precedes the first root, from its successor."""
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
    """Every other layer from the neighbour above (or below); the other neighbour, or the nearest root, if none."""
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
    """Each from the layer below, the one above, or both."""
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
    """The layers before and after the i-th."""
    below = layers[i - 1] if i > 0 else None
    above = layers[i + 1] if i + 1 < len(layers) else None
    return below, above
