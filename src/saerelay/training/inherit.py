"""How a leg begins from its parent: the parent carried to the leg's site, and the learning rate that this calls for."""

from saerelay.data.stream import Block
from saerelay.planning.plan import COPY_RATE, Leg
from saerelay.runs.dictionaries import read_dictionary
from saerelay.runs.directory import RunDirectory
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.maps import LEAST_RATE_SHARE, map_between, rate_share
from saerelay.sae.moments import Moments
from saerelay.sae.quality import mean_l0
from saerelay.sae.reshape import Shape
from saerelay.sae.transfer import L0_ROWS, Retraining, carry
from saerelay.spec import seed_from
from saerelay.training.run_state import Training


def gather_moments(now: Training, block: Block) -> None:
    """Feed the moments of the hops that are coming."""
    for leg in now.plan.legs:
        if leg.start <= now.cursor < leg.fold_at:
            source = now.plan.parent_site(leg)
            width = now.plan.facts.width(leg.site)
            moments = now.moments.setdefault(leg.id, Moments.empty(width, width, block.keep.device))
            for rows in block.chunks([source, leg.site]):
                moments.add(rows[source], rows[leg.site])


def inherit(now: Training, leg: Leg, block: Block, paths: RunDirectory) -> tuple[Dictionary, float]:
    """The parent folded to the leg's site, revived, refitted, at the L0 that is asked for (or that it had).

    Also the share of the leg's learning rate that this hop calls for. Raises TransferError if the hop cannot be made.
    """
    assert leg.hop
    parent, parent_l0 = parent_of(now, leg, block, paths)
    moments = now.moments.pop(leg.id, None)
    rows = block.rows(leg.site, L0_ROWS)
    l0 = leg.dictionary.l0 or parent_l0
    seed = seed_from("revive", leg.seed, leg.id)
    reshaped = now.plan.reshapes(leg)
    copied = leg.hop.method == "identity" and not reshaped

    # What is copied and not trained is only looked at: its decoder keeps its norms, by which TopK does not rank.
    between = None
    if not copied or leg.budget_tokens:
        between = map_between(leg.hop.method, now.plan.facts.width(leg.site), moments)
    shape = None
    if reshaped:
        shape = Shape(leg.dictionary.architecture, leg.dictionary.n_latents, l0, seed)
    retraining = None
    if leg.refit_tokens:
        at_home = now.plan.parent_site(leg) == leg.site
        retraining = Retraining(block.rows(leg.site, leg.refit_tokens), seed, checked=at_home)
    if copied and not parent.activation.threshold_is_calibrated:
        l0 = None  # the paper's copy: its L0 is what it is

    carried = carry(parent, between, rows, l0=l0, shape=shape, retraining=retraining)
    if not leg.schedule.lr_by_map:
        return carried.dictionary, 1.0
    if moments:
        return carried.dictionary, rate_share(moments, now.plan.newness(leg))
    # Without a map a refit tells: where it gained nothing, there is nothing to learn.
    at_rest = copied and retraining is not None and not carried.refitted
    return carried.dictionary, LEAST_RATE_SHARE if at_rest else COPY_RATE


def parent_of(now: Training, leg: Leg, block: Block, paths: RunDirectory) -> tuple[Dictionary, float | None]:
    """A leg's parent as it is now, and its mean L0 at its own site, where that is needed and known."""
    if leg.parent in now.cohort:
        dictionary = now.cohort[leg.parent].canonical()
        l0 = None
        if leg.dictionary.l0 is None:
            l0 = mean_l0(dictionary, block.rows(now.plan.parent_site(leg), L0_ROWS))
        return dictionary, l0
    directory = paths.leg(leg.parent)
    if not now.plan.has(leg.parent):
        directory = paths.root / now.plan.externals[leg.parent].path
    dictionary, info = read_dictionary(directory)
    return dictionary, info.l0
