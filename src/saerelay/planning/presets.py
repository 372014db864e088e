"""Presets: the legs that one word means, as if they had been written out."""

from collections.abc import Sequence

from saerelay.errors import PlanError
from saerelay.planning.leg_spec import LegSpec
from saerelay.planning.recipe import Recipe
from saerelay.site import Site


def hub_of(layers: Sequence[int]) -> int:
    """The layer that others are best transferred from, if nothing more is known: a little above the middle."""
    return layers[5 * len(layers) // 8]


def preset_legs(run: Recipe, layers: Sequence[int]) -> list[LegSpec]:
    """The legs a preset means, as if they had been written out."""
    p = run.plan
    if outside := sorted(set(p.roots) - set(layers)):
        raise PlanError(f"plan.roots names layer {outside[0]}, which is not among sites.layers ({layers})")
    parents = preset_parents(run, layers)
    roots = sorted({layer for layer in layers if layer not in parents or p.preset == "paper"})
    legs = [LegSpec(id=_name(run, layer), layer=layer, tokens=p.root_tokens) for layer in roots]
    for layer, sources in sorted(parents.items()):
        for source in sources:
            parent = _name(run, source) if source in roots else f"{_name(run, source)}-from-L{parents[source][0]}"
            leg_id = f"{_name(run, layer)}-from-L{source}"
            legs.append(LegSpec(id=leg_id, layer=layer, parent=parent, tokens=p.transfer_tokens, fork_at=p.fork_at))
    for layer in p.controls:
        legs += control_legs(run, layer, [leg for leg in legs if leg.layer == layer and leg.parent])
    return legs


def _name(run: Recipe, layer: int) -> str:
    return str(Site(layer, run.sites.module))


def preset_parents(run: Recipe, layers: Sequence[int]) -> dict[int, list[int]]:
    """For each layer that is not (only) trained from scratch, the layers it is transferred from."""
    p, last = run.plan, len(layers) - 1
    neighbours = {
        layer: (layers[i - 1] if i else None, layers[i + 1] if i < last else None) for i, layer in enumerate(layers)
    }
    match p.preset:
        case "scratch":
            return {}
        case "hub":
            root = p.roots or [hub_of(layers)]
            nearest = {layer: min(root, key=lambda r: (abs(r - layer), -r)) for layer in layers if layer not in root}
            return {layer: [source] for layer, source in nearest.items()}
        case "forward" | "backward":
            chain = list(layers) if p.preset == "forward" else list(reversed(layers))
            roots = p.roots or [chain[0]]
            first = min(chain.index(r) for r in roots)
            onward = {chain[i]: [chain[i - 1]] for i in range(first + 1, len(chain)) if chain[i] not in roots}
            return onward | {chain[i]: [chain[i + 1]] for i in range(first)}
        case "alternate":
            backward = p.direction != "forward"
            roots = p.roots or [layer for i, layer in enumerate(layers) if i % 2 == (1 if backward and last else 0)]
            parents = {}
            for layer in (layer for layer in layers if layer not in roots):
                below, above = neighbours[layer]
                wanted = (above, below) if backward else (below, above)
                parents[layer] = [
                    next((s for s in wanted if s in roots), None) or min(roots, key=lambda r: abs(r - layer))
                ]
            return parents
        case "paper":
            both = {layer: {"forward": below, "backward": above} for layer, (below, above) in neighbours.items()}
            kinds = ("forward", "backward") if p.direction in ("auto", "both") else (p.direction,)
            return {layer: [s for kind in kinds if (s := pair[kind]) is not None] for layer, pair in both.items()}
        case "auto":
            raise PlanError(
                'preset = "auto" plans from a survey, which this command does not make; write the plan out with '
                "`saerelay plan run.toml --write planned.toml` and use that recipe"
            )


def control_legs(run: Recipe, layer: int, transfers: list[LegSpec]) -> list[LegSpec]:
    """From-scratch controls of a layer that is reached by transfers."""
    if not transfers:
        raise PlanError(f"plan.controls names layer {layer}, which is not reached by a transfer in this plan")
    name, common = _name(run, layer), {"layer": layer, "control_of": transfers[0].id}
    return [
        LegSpec(id=f"{name}-scratch-equal", tokens=0, control_kind="equal_tokens", **common),
        LegSpec(id=f"{name}-scratch-full", tokens=run.plan.root_tokens, control_kind="full", **common),
    ]
