"""How a leg begins from its parent: the parent carried to the leg's site, and the learning rate that follows.

In the blocks before a hop, `train` calls `gather_moments`; when it is due, `parent_of` and then `inherit`, which calls
the closed forms of `sae.transfer` with what the plan says about the leg.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import torch

from saerelay.data.stream import Block
from saerelay.planning.leg import COPY_RATE, Leg
from saerelay.planning.plan import Plan
from saerelay.runs.dictionaries import read_dictionary
from saerelay.runs.directory import RunDirectory
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.initialise import INITIAL_ROWS, initialise
from saerelay.sae.maps import (
    LEAST_RATE_SHARE,
    AffineMap,
    AnyMoments,
    PairedMoments,
    crossed,
    map_between,
    rate_share,
    unexplained,
)
from saerelay.sae.moments import Moments
from saerelay.sae.quality import mean_l0
from saerelay.sae.reshape import Shape
from saerelay.sae.spec import L0_ROWS, Method
from saerelay.sae.threads import side_by_side
from saerelay.sae.transfer import Retraining, carry
from saerelay.sae.trials import RANDOM, best_first, try_methods
from saerelay.sae.units import Units
from saerelay.site import Site
from saerelay.spec import seed_from
from saerelay.training.alignment import Alignment
from saerelay.training.kept_blocks import block_for_refit
from saerelay.training.run_state import Training, leg_of, outputs_key, shared_key
from saerelay.training.state import balance_of


def gather_moments(now: Training, block: Block) -> None:
    """Add a block to the moments of upcoming hops, and of the layers that are to share a leg."""
    for leg in now.plan.legs:
        if not now.trains(leg) or not leg.start <= now.cursor < leg.fold_at:
            continue
        for site in leg.shared_sites:
            _add_moments(now, shared_key(leg, site), block, site, leg.site)
        if leg.hop:
            source = now.plan.parent_site(leg)
            _add_moments(now, leg.id, block, source, leg.site)
            if leg.is_transcoder:
                _add_moments(now, outputs_key(leg), block, leg.out_at(source), leg.site_out)


def _add_moments(now: Training, key: str, block: Block, source: Site, target: Site) -> None:
    """Add a block's activations at a pair of sites to the moments under a key."""
    width = now.plan.facts.width(target)
    moments = now.moments.setdefault(key, Moments.empty(width, width, block.keep.device))
    for rows in block.chunks([source, target]):
        moments.add(rows[source], rows[target])


def align(now: Training, leg: Leg) -> Alignment | None:
    """Fit the maps that make the layers sharing a leg look alike at its own layer; None if the leg is not shared.

    The maps only rotate, shift and scale uniformly (procrustes), so that what is sparse at one layer stays sparse.
    """
    if not leg.shared_layers:
        return None
    balance = balance_of(leg, now.plan.recipe.train)
    width = now.plan.facts.width(leg.site)
    maps = {}
    for site in leg.shared_sites:
        moments = now.moments.pop(shared_key(leg, site))
        maps[site] = map_between("procrustes", width, moments, balance)
    return Alignment.fitted(leg.site, maps, torch.device(now.plan.facts.device))


def _take_moments(now: Training, leg: Leg) -> AnyMoments | None:
    """Return and forget the moments gathered for a leg's hop; a transcoder's are paired."""
    inputs = now.moments.pop(leg.id, None)
    outputs = now.moments.pop(outputs_key(leg), None)
    return PairedMoments(inputs, outputs) if inputs and outputs else inputs


def forget_moments(now: Training, leg: Leg) -> None:
    """Forget what was gathered for a leg, which has begun or will never begin."""
    for key in list(now.moments):
        if leg_of(key) == leg.id:
            del now.moments[key]


class Parent(NamedTuple):
    """The dictionary that a leg is transferred from."""

    dictionary: Dictionary
    """In canonical form."""
    l0: float | None
    """Its mean L0 at its own site; None if its files do not say and that site is not read."""


class Inherited(NamedTuple):
    """The dictionary that a leg begins with, and how it was made."""

    dictionary: Dictionary | None
    """In canonical form; None where the leg should start from scratch instead."""
    lr_share: float
    """Factor on the leg's learning rate that follows from this hop."""
    method: str
    trials: dict[str, float | None]
    """FVU of each method tried, on unseen rows, as `try_methods` measures it; empty if the method was given."""


def inherit(now: Training, leg: Leg, block: Block, source: Parent, units: Units) -> Inherited:
    """Carry the parent `source` to the leg's site: fold, revive, refit, at the leg's L0 (or else the parent's).

    `units` are the units the leg is to be trained in. Raises TransferError if the hop cannot be made.

    How to see this: each of the four things that `carry` may do is decided separately, and is None if it is not wanted:
    `between` (fold through a map), `shape` (another architecture or width), `retraining` (revive and refit), and `l0`
    (match the sparsity). The learning rate then follows from how much is left to learn, as far as that is known.
    """
    assert leg.hop
    moments = _take_moments(now, leg)
    l0 = leg.dictionary.l0 or source.l0
    method = leg.hop.method
    if method == "random":
        return Inherited(_random_dictionary(leg, block, units, l0), 1.0, method, {})
    trials: dict[str, float | None] = {}
    if method == "auto":
        trials.update(_trials(now, leg, block, source, units, moments))
        best = next(iter(trials))
        if best == RANDOM:
            return Inherited(None, 1.0, "scratch", trials)
        method = cast(Method, best)
    reshaped = now.plan.reshapes(leg)
    copied = method == "identity" and not reshaped
    seed = _revival_seed(leg)

    # A copy that is not trained is only measured: its decoder keeps its norms, by which TopK does not rank.
    between = None
    if leg.budget_tokens or not copied:
        between = _map(now, leg, method, moments)
    shape = None
    if reshaped:
        spec = leg.dictionary
        shape = Shape(spec.architecture, spec.n_latents, l0, seed, spec.skip_connection)
    retraining = None
    if leg.refit_tokens:
        checked = _trained_at_home(now.plan, leg)
        whole = block_for_refit(now, leg, block, leg.refit_tokens)
        retraining = _retraining(leg, whole, leg.refit_tokens, seed, checked=checked)
    if _keeps_its_l0(now.plan, leg, source.dictionary):
        l0 = None

    rows = block.rows(leg.site, L0_ROWS)
    carried = carry(source.dictionary, between, rows, units, l0=l0, shape=shape, retraining=retraining)
    refit_was_rejected = retraining is not None and not carried.refitted
    lr_share = _lr_share(now, leg, moments, at_rest=copied and refit_was_rejected)
    return Inherited(carried.dictionary, lr_share, method, trials)


def _trials(
    now: Training, leg: Leg, block: Block, source: Parent, units: Units, moments: AnyMoments | None
) -> dict[str, float]:
    """The FVU of each method on unseen rows, the best first; see `try_methods` and `best_first`."""
    assert moments and source.l0 is not None
    n = max(L0_ROWS, leg.refit_tokens)
    sample = _retraining(leg, block_for_refit(now, leg, block, n), n, _revival_seed(leg))
    # Only a leg that is trained, and keeps its parent's shape, can do without its parent.
    tokens = leg.budget_tokens
    fresh = leg.dictionary if tokens and not now.plan.reshapes(leg) else None
    balance = balance_of(leg, now.plan.recipe.train)
    trials = try_methods(source.dictionary, moments, sample, units, fresh, balance=balance, l0=source.l0)
    return best_first(trials, tokens)


def _lr_share(now: Training, leg: Leg, moments: AnyMoments | None, *, at_rest: bool) -> float:
    """The factor on a leg's learning rate that follows from its hop, where the rate depends on the map.

    A leg is `at_rest` if it is a copy of its parent that a refit did not improve.
    """
    if not leg.schedule.lr_by_map:
        return 1.0
    if moments:
        left = unexplained(moments, balance=balance_of(leg, now.plan.recipe.train))
        return rate_share(left, leg.budget_tokens, now.plan.newness(leg))
    return LEAST_RATE_SHARE if at_rest else COPY_RATE


def _keeps_its_l0(plan: Plan, leg: Leg, parent: Dictionary) -> bool:
    """Whether a leg begins with the L0 that its parent has: the paper's copy, or an SAE that is only measured."""
    assert leg.hop
    papers_copy = leg.hop.method == "identity" and not plan.reshapes(leg)
    if papers_copy and not parent.activation.threshold_is_calibrated:
        return True
    return only_measured(plan, leg)


def _revival_seed(leg: Leg) -> int:
    """The seed for the latents that a leg's hop revives or adds."""
    return seed_from("revive", leg.seed, leg.id)


def _retraining(leg: Leg, block: Block, n: int, seed: int, *, checked: bool = False) -> Retraining:
    """The first n rows of a block at the leg's site, and of what it reconstructs, to revive and refit on."""
    return Retraining(block.rows(leg.site, n), seed, block.target(leg, n), checked)


def only_measured(plan: Plan, leg: Leg) -> bool:
    """Whether a leg is its parent, unchanged and at the parent's site, there only to be measured."""
    if not leg.hop or leg.budget_tokens or leg.refit_tokens or plan.reshapes(leg):
        return False
    return leg.hop.method == "identity" and plan.parent_site(leg) == leg.site


def _trained_at_home(plan: Plan, leg: Leg) -> bool:
    """Whether a leg's parent was trained at the leg's own site; only then can a refit do harm (decision 025)."""
    outside = plan.externals.get(leg.parent)
    return plan.parent_site(leg) == leg.site and not (outside and outside.carried)


def _map(now: Training, leg: Leg, method: Method, moments: AnyMoments | None) -> AffineMap:
    """The map that a leg's parent is folded through."""
    balance = balance_of(leg, now.plan.recipe.train)
    between = map_between(method, now.plan.facts.width(leg.site), moments, balance)
    if leg.is_transcoder and moments is None:
        return crossed(between, map_between(method, now.plan.facts.width(leg.site_out), None, balance))
    return between


def _random_dictionary(leg: Leg, block: Block, units: Units, l0: float | None) -> Dictionary:
    """A random dictionary, revived and refitted as a parent would be, on the same rows and at the same mean L0.

    It is a baseline for training: see Korznikov et al. 2026, arXiv 2602.14111.
    """
    seed = seed_from("random", leg.seed, leg.id)
    generator = torch.Generator().manual_seed(seed)
    on = _retraining(leg, block, max(INITIAL_ROWS, leg.refit_tokens), seed)
    inside = on.normalised(units)
    fresh = units.to_canonical(initialise(leg.dictionary, inside.rows, generator, inside.target))
    return carry(fresh, None, on.rows, units, l0=l0, retraining=on).dictionary


def parent_of(now: Training, block: Block, paths: RunDirectory, leg: Leg) -> Parent | str:
    """A leg's parent as it is now, on the rank that trains or trained the parent; or the reason why there is none."""
    if leg.parent in now.failures:
        return f"its parent {leg.parent} stopped"
    source = now.plan.parent_site(leg)
    if leg.parent in now.cohort:
        rows = block.rows(source, L0_ROWS)
        dictionary = now.cohort[leg.parent].canonical(rows)
        return Parent(dictionary, mean_l0(dictionary, rows))
    directory = paths.leg(leg.parent)
    if not now.plan.has(leg.parent):
        directory = paths.root / now.plan.externals[leg.parent].path
    dictionary, info = read_dictionary(directory)
    l0 = info.l0
    if l0 is None and source in block.activations:
        rows = block.rows(source, L0_ROWS)
        l0 = mean_l0(dictionary.to(rows.device), rows)
    return Parent(dictionary, l0)


def parents_from_elsewhere(
    now: Training, legs: Sequence[Leg], block: Block, paths: RunDirectory
) -> dict[str, Parent | str]:
    """The parents (or why there is none), by leg, of this rank's legs among `legs` whose parent is another rank's.

    Every rank makes this call with the same legs: the rank that has a parent sends it, in the order of the legs.
    """
    parents: dict[str, Parent | str] = {}
    device = block.keep.device
    for leg in legs:
        source = now.owner.get(leg.parent, now.owner[leg.id])  # a parent outside the plan is read by the leg's own rank
        if source == now.owner[leg.id]:
            continue
        if source == now.team.rank:
            (found,) = side_by_side(partial(parent_of, now, block, paths), [leg], device, n_in_all=len(legs))
            now.team.send(_on(torch.device("cpu"), found), now.owner[leg.id])
        elif now.trains(leg):
            parents[leg.id] = _on(device, now.team.receive(source))
    return parents


def _on(device: torch.device, parent: Parent | str) -> Parent | str:
    """Move a parent, if there is one, to a device."""
    if isinstance(parent, str):
        return parent
    return Parent(parent.dictionary.to(device), parent.l0)
