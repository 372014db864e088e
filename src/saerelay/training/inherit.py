"""How a leg begins from its parent: the parent carried to the leg's site, and the learning rate that this calls for."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import torch

from saerelay.data.stream import Block
from saerelay.planning.plan import COPY_RATE, Leg
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
from saerelay.sae.spec import Method
from saerelay.sae.threads import side_by_side
from saerelay.sae.transfer import L0_ROWS, Retraining, carry
from saerelay.sae.trials import RANDOM, try_methods
from saerelay.sae.units import Units
from saerelay.site import Site
from saerelay.spec import seed_from
from saerelay.training.alignment import Alignment
from saerelay.training.run_state import OUTPUTS, Training, shared_key
from saerelay.training.state import balance_of


def gather_moments(now: Training, block: Block) -> None:
    """Feed the moments of the hops that are coming, and of the layers that are to share a leg."""
    for leg in now.plan.legs:
        if not now.trains(leg) or not leg.start <= now.cursor < leg.fold_at:
            continue
        for site in leg.shared_sites:
            _add_moments(now, shared_key(leg, site), block, site, leg.site)
        if leg.hop:
            source = now.plan.parent_site(leg)
            _add_moments(now, leg.id, block, source, leg.site)
            if leg.is_transcoder:
                _add_moments(now, f"{leg.id}{OUTPUTS}", block, leg.out_at(source), leg.site_out)


def _add_moments(now: Training, key: str, block: Block, source: Site, target: Site) -> None:
    """Take a block's activations at a pair of sites into the moments under a key."""
    width = now.plan.facts.width(target)
    moments = now.moments.setdefault(key, Moments.empty(width, width, block.keep.device))
    for rows in block.chunks([source, target]):
        moments.add(rows[source], rows[target])


def align(now: Training, leg: Leg) -> Alignment | None:
    """How the layers that share a leg look alike at its own; None if it is not shared.

    They are only turned, shifted and stretched as one (procrustes), so that what is sparse at one stays sparse.
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
    """The moments that were gathered for a leg's hop, and forget them; a transcoder's are paired."""
    inputs = now.moments.pop(leg.id, None)
    outputs = now.moments.pop(f"{leg.id}{OUTPUTS}", None)
    return PairedMoments(inputs, outputs) if inputs and outputs else inputs


class Parent(NamedTuple):
    """What a leg is transferred from."""

    dictionary: Dictionary
    """Canonical."""
    l0: float | None
    """Its mean L0 at its own site, where that is needed and known."""


class Inherited(NamedTuple):
    """What a leg begins with, and how that was made."""

    dictionary: Dictionary | None
    """Canonical; None where the leg had better start from scratch."""
    lr_share: float
    """Share of the leg's learning rate that this hop calls for."""
    method: str
    trials: dict[str, float | None]
    """FVU in training units of each method tried, on rows not seen; empty if the method was given."""


def inherit(now: Training, leg: Leg, block: Block, source: Parent, units: Units) -> Inherited:
    """The parent `source` folded to the leg's site, revived, refitted, at the L0 that is asked for (or that it had).

    `units` are those that it is to be trained in. Raises TransferError if the hop cannot be made.

    How to see this: each of the four things that `carry` may do is decided by itself, and is None if it is not wanted:
    `between` (fold through a map), `shape` (another architecture or width), `retraining` (revive and refit), and `l0`
    (match the sparsity). The learning rate then follows from what is known of how much is left to learn.
    """
    assert leg.hop
    parent, parent_l0 = source
    moments = _take_moments(now, leg)
    rows = block.rows(leg.site, L0_ROWS)
    l0 = leg.dictionary.l0 or parent_l0
    seed = seed_from("revive", leg.seed, leg.id)
    balance = balance_of(leg, now.plan.recipe.train)
    reshaped = now.plan.reshapes(leg)

    method = leg.hop.method
    if method == "random":
        return Inherited(_random_dictionary(leg, block, units), 1.0, method, {})
    trials: dict[str, float | None] = {}
    if method == "auto":
        assert moments
        n = max(L0_ROWS, leg.refit_tokens)
        sample = Retraining(block.rows(leg.site, n), seed, block.target(leg, n))
        # Only a leg that is trained, and from the start, can do without its parent.
        fresh = leg.dictionary if leg.budget_tokens and not reshaped else None
        trials.update(try_methods(parent, moments, sample, units, fresh, balance=balance, l0=parent_l0))
        best = next(iter(trials))
        if best == RANDOM:
            return Inherited(None, 1.0, "scratch", trials)
        method = cast(Method, best)
    copied = method == "identity" and not reshaped

    # What is copied and not trained is only looked at: its decoder keeps its norms, by which TopK does not rank.
    between = None
    if not copied or leg.budget_tokens:
        between = _map(now, leg, method, moments)
    shape = None
    if reshaped:
        shape = Shape(leg.dictionary.architecture, leg.dictionary.n_latents, l0, seed)
    retraining = None
    if leg.refit_tokens:
        at_home = now.plan.parent_site(leg) == leg.site
        target = block.target(leg, leg.refit_tokens)
        retraining = Retraining(block.rows(leg.site, leg.refit_tokens), seed, target, checked=at_home)
    if copied and not parent.activation.threshold_is_calibrated:
        l0 = None  # the paper's copy: its L0 is what it is

    carried = carry(parent, between, rows, units, l0=l0, shape=shape, retraining=retraining)
    lr_share = 1.0
    if leg.schedule.lr_by_map and moments:
        left = unexplained(moments, balance=balance)
        lr_share = rate_share(left, leg.budget_tokens, now.plan.newness(leg))
    elif leg.schedule.lr_by_map:
        # Without a map a refit tells: where it gained nothing, there is nothing to learn.
        at_rest = copied and retraining is not None and not carried.refitted
        lr_share = LEAST_RATE_SHARE if at_rest else COPY_RATE
    return Inherited(carried.dictionary, lr_share, method, trials)


def _map(now: Training, leg: Leg, method: Method, moments: AnyMoments | None) -> AffineMap:
    """The map that a leg's parent is folded through."""
    balance = balance_of(leg, now.plan.recipe.train)
    between = map_between(method, now.plan.facts.width(leg.site), moments, balance)
    if leg.is_transcoder and moments is None:
        return crossed(between, map_between(method, now.plan.facts.width(leg.site_out), None, balance))
    return between


def _random_dictionary(leg: Leg, block: Block, units: Units) -> Dictionary:
    """A random dictionary, revived and refitted on the rows that a parent's would be: what training has to beat.

    See Korznikov et al. 2026, arXiv 2602.14111.
    """
    seed = seed_from("random", leg.seed, leg.id)
    generator = torch.Generator().manual_seed(seed)
    n = max(INITIAL_ROWS, leg.refit_tokens)
    on = Retraining(block.rows(leg.site, n), seed, block.target(leg, n))
    inside = on.normalised(units)
    fresh = units.to_canonical(initialise(leg.dictionary, inside.rows, generator, inside.target))
    return carry(fresh, None, on.rows, units, l0=leg.dictionary.l0, retraining=on).dictionary


def parent_of(now: Training, block: Block, paths: RunDirectory, leg: Leg) -> Parent | str:
    """A leg's parent as it is now, on the rank that trains it, or trained it; or why there is none."""
    if leg.parent in now.failures:
        return f"its parent {leg.parent} stopped"
    if leg.parent in now.cohort:
        dictionary = now.cohort[leg.parent].canonical()
        l0 = None
        if leg.dictionary.l0 is None:
            l0 = mean_l0(dictionary, block.rows(now.plan.parent_site(leg), L0_ROWS))
        return Parent(dictionary, l0)
    directory = paths.leg(leg.parent)
    if not now.plan.has(leg.parent):
        directory = paths.root / now.plan.externals[leg.parent].path
    dictionary, info = read_dictionary(directory)
    return Parent(dictionary, info.l0)


def parents_from_elsewhere(
    now: Training, legs: Sequence[Leg], block: Block, paths: RunDirectory
) -> dict[str, Parent | str]:
    """The parents of this rank's legs among `legs` that another rank trains, or trained, or why there is none; by leg.

    Every rank makes this call with the same legs: whoever has a parent sends it, in the order of the legs.
    """
    parents: dict[str, Parent | str] = {}
    device = block.keep.device
    for leg in legs:
        source = now.owner.get(leg.parent, now.owner[leg.id])  # what is outside the plan is read by whoever needs it
        if source == now.owner[leg.id]:
            continue
        if source == now.team.rank:
            (found,) = side_by_side(partial(parent_of, now, block, paths), [leg], device, n_in_all=len(legs))
            now.team.send(_on(torch.device("cpu"), found), now.owner[leg.id])
        elif now.trains(leg):
            parents[leg.id] = _on(device, now.team.receive(source))
    return parents


def _on(device: torch.device, parent: Parent | str) -> Parent | str:
    """A parent, if there is one, in the memory of a device."""
    if isinstance(parent, str):
        return parent
    return Parent(parent.dictionary.to(device), parent.l0)
