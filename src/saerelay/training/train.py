"""Runs a plan: the file to read first.

Each block: one forward pass of the language model feeds all open sites; legs whose parents are ready are folded from
them; every live leg steps in lockstep; legs that have spent their budget are published. The state is saved between any
two batches, and a run that was killed continues from there to the same bits.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from saerelay.data.stream import AbstractStream, Block
from saerelay.errors import Interrupted, LegFailed, TransferError
from saerelay.planning.leg import Leg
from saerelay.planning.plan import Plan
from saerelay.runs.dictionaries import publish
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.training import HopFacts, PhaseSeconds, ReadPositions, RunCost
from saerelay.runs.state import truncate_metrics
from saerelay.sae.quality import fvu, mean_l0
from saerelay.sae.spec import L0_ROWS
from saerelay.sae.threads import side_by_side
from saerelay.site import Site
from saerelay.team import Team
from saerelay.training.engine import Trainee
from saerelay.training.inherit import (
    Parent,
    align,
    forget_moments,
    gather_moments,
    inherit,
    only_measured,
    parent_of,
    parents_from_elsewhere,
)
from saerelay.training.kept_blocks import batches_of_kept_blocks, forget_blocks, keep_block
from saerelay.training.progress import Watcher
from saerelay.training.run_state import Journal, Line, Training, slowest, stop_requests
from saerelay.training.saving import SavingTimes
from saerelay.training.schedule import goal_is_due
from saerelay.training.state import TraineeState, balance_of, first_state, units_of

FIRST_ROWS = 32_768
"""Number of rows that a leg's units and initialisation are based on."""
HELD_OUT_ROWS = 4_096
"""Number of rows of the validation split that goals are measured on."""


def train_plan(
    plan: Plan,
    paths: RunDirectory,
    stream: AbstractStream,
    watcher: Watcher,
    device: torch.device,
    validation: AbstractStream | None = None,
    team: Team | None = None,
) -> None:
    """Run a plan to its end, from the saved state if there is one; `validation` is for legs with a goal.

    Each rank of a `team` calls this, with a stream that gives the sites of its own legs (`TeamStream`).

    Raises Interrupted after a signal (state saved) and LegFailed at the end if a leg had to stop.
    """
    team = team or Team.alone()
    now = Training.restore(plan, paths, device, team)
    saving = SavingTimes(plan.recipe.train, now.cursor)
    read_held_out(now, validation)
    with stop_requests() as stop, journal_of(now, paths, watcher) as journal:
        while now.cursor < plan.n_tokens:
            number, offset = divmod(now.cursor, plan.block_tokens)
            end_of_block = (number + 1) * plan.block_tokens
            sites = plan.open_sites(now.cursor, end_of_block, now.ended)
            if not sites:
                now.cursor = end_of_block
                continue
            with now.timed("lm"):
                block = stream.block(number, sites)
            now.block_came = time.perf_counter()
            if offset == 0:
                begin_block(now, block, paths)
            for index in range(offset // block.batch_tokens, block.n_batches):
                now.cursor += block.batch_tokens
                for repetition in range(now.n_repetitions):
                    kept = batches_of_kept_blocks(now, number, index, repetition)
                    now.cohort.step(block.repeated(index, repetition), repetition, kept)
                    check_goals(now, repetition)
                    end_legs(now, block, paths, repetition)
                watcher.tick(now.cursor)
                if now.cursor == end_of_block:
                    end_block(now, block, paths, journal)
                if now.cursor == end_of_block or team.size == 1:  # ranks agree once per block on what follows
                    save_if_due(now, block, paths, journal, saving, stop)
        now.commit(paths)
        words = now.meet(journal)
        now.save(paths, words)
        now.commit(paths)
    if team.leads:
        seconds = PhaseSeconds(**slowest([word.seconds for word in words]))
        RunCost(seconds=seconds, positions=ReadPositions(**now.positions), ranks=team.size).save(paths.cost)
    complain_of_failures(now, paths)
    if team.leads:
        complain_of_missing(plan, paths)


def begin_block(now: Training, block: Block, paths: RunDirectory) -> None:
    """Do the work due before a block's first batch: start legs, and add to the moments of upcoming hops."""
    with now.timed("fits"):
        begin_legs(now, block, paths, hops=False)
        gather_moments(now, block)
        keep_block(now, block)
    now.count(block)


def end_block(now: Training, block: Block, paths: RunDirectory, journal: Journal) -> None:
    """Do the work due after a block's last batch: all ranks meet, then make the hops whose parents are there."""
    drop_failed(now, block, paths)
    report(now, now.cohort.live)
    now.meet(journal)
    with now.timed("fits"):
        begin_legs(now, block, paths, hops=True)
    forget_blocks(now)


def save_if_due(
    now: Training, block: Block, paths: RunDirectory, journal: Journal, saving: SavingTimes, stop: threading.Event
) -> None:
    """Save the state if it is time, or if any rank was asked to stop; in that case raise Interrupted on all ranks."""
    stopping, due = now.team.any(stop.is_set(), saving.due(now.cursor))
    if stopping or due:
        now.commit(paths)
        drop_failed(now, block, paths)
        now.save(paths, now.meet(journal))
        saving.saved(now.cursor)
    if now.uncommitted and (stopping or not any(now.team.any(not now.writer.is_idle))):
        now.commit(paths)
    if stopping:
        raise Interrupted(paths.resume_command)


@contextmanager
def journal_of(now: Training, paths: RunDirectory, watcher: Watcher) -> Iterator[Journal]:
    """The training log, cut back to the saved state, and the watcher; on rank 0, which writes for all."""
    if not now.team.leads:
        yield Journal(None, watcher)
        return
    truncate_metrics(paths.metrics, now.log_bytes)
    with paths.metrics.open("a", encoding="utf-8") as log:
        yield Journal(log, watcher)


def complain_of_failures(now: Training, paths: RunDirectory) -> None:
    """Raise LegFailed if a leg had to stop."""
    if now.failures:
        lines = [f"leg {leg_id} stopped: {reason}" for leg_id, reason in now.failures.items()]
        lines += [
            f"the last good state of {leg_id} is in {paths.leg(leg_id)}/snapshots"
            for leg_id in now.failures
            if (paths.leg(leg_id) / "snapshots").is_dir()  # a leg that could not begin has none
        ]
        lines.append("all other legs are done")
        raise LegFailed("\n".join(lines))


def complain_of_missing(plan: Plan, paths: RunDirectory) -> None:
    """Raise LegFailed if a leg is not published though the run has ended."""
    missing = [leg.id for leg in plan.legs if not (paths.leg(leg.id) / "dictionary.json").is_file()]
    if missing:
        raise LegFailed(
            f"{paths.root}: training has ended, but the files of these legs are missing: {', '.join(missing)}; they "
            f"were removed after training. Put them back, or delete {paths.state} and resume to train all legs again"
        )


def begin_legs(now: Training, block: Block, paths: RunDirectory, *, hops: bool) -> None:
    """Begin the legs whose age is 0 here: from scratch or as copies at a block's start; with `hops`, at its end.

    A hop's map and refit are made from earlier blocks, so that all its own tokens are new to it. Hops that begin at the
    same time are made in parallel, parents before their children.
    """
    due = [leg for leg in now.plan.legs if leg.fold_at == now.cursor and hops == (leg.start < leg.fold_at)]
    while due:
        waiting = {leg.id for leg in due}
        ready = [leg for leg in due if leg.parent not in waiting]
        due = [leg for leg in due if leg.parent in waiting]
        begin_one = partial(begin, now, block, paths, parents_from_elsewhere(now, ready, block, paths))
        mine = [leg for leg in ready if now.trains(leg)]
        begun = side_by_side(begin_one, mine, block.keep.device, n_in_all=len(ready))
        for leg, trainee in zip(mine, begun, strict=True):
            forget_moments(now, leg)
            if isinstance(trainee, str):
                now.failures[leg.id] = trainee
                continue
            now.cohort.add(trainee)
            if 0 in leg.schedule.snapshots:
                publish_leg(now, trainee, block, paths)


def begin(
    now: Training, block: Block, paths: RunDirectory, sent: Mapping[str, Parent | str], leg: Leg
) -> Trainee | str:
    """Return a leg at age 0, from scratch or from its parent, or the reason why it cannot start.

    `sent` holds, by leg, the parents received from other ranks, or why there is none.
    """
    parent = None
    if leg.hop:
        parent = sent.get(leg.id) or parent_of(now, block, paths, leg)
    if isinstance(parent, str):
        return parent
    rows = block.rows(leg.site, FIRST_ROWS)
    target = block.target(leg, FIRST_ROWS)
    reason = why_not(leg.site, rows)
    if target is not None and not reason:
        reason = why_not(leg.site_out, target)
    if reason:
        return reason
    try:
        if parent is None:
            state = state_from_scratch(now, block, leg, rows, target)
        else:
            state = state_from_parent(now, block, leg, parent, rows, target)
    except TransferError as error:
        return str(error)
    return Trainee(leg, now.plan.recipe.train, state)


def state_from_scratch(now: Training, block: Block, leg: Leg, rows: Tensor, target: Tensor | None) -> TraineeState:
    """The state at age 0 of a leg without a parent; the layers that share it are aligned first.

    `rows` (B, D) are the first activations of its site, and `target` (B, Dy) of what a transcoder reconstructs.
    """
    alignment = align(now, leg)
    if alignment:
        rows = alignment.rows({site: block.rows(site, FIRST_ROWS) for site in (leg.site, *leg.shared_sites)})
    state = first_state(leg, now.plan.recipe.train, rows, target=target)
    state.alignment = alignment
    return state


def state_from_parent(
    now: Training, block: Block, leg: Leg, parent: Parent, rows: Tensor, target: Tensor | None
) -> TraineeState:
    """The state at age 0 of a leg that is transferred from a parent; the rows are as for `state_from_scratch`."""
    spec = now.plan.recipe.train
    inherited = inherit(now, leg, block, parent, units_of(leg, spec, rows, target))
    now.hops[leg.id] = HopFacts(method=inherited.method, trials=inherited.trials)
    return first_state(leg, spec, rows, inherited.dictionary, target=target, lr_share=inherited.lr_share)


def why_not(where: Site | str, x: Tensor) -> str:
    """Why nothing can be learned from rows (B, D) of a site; "" if something can."""
    if not len(x):
        return f"{where}: no position of a block is left to train on; raise data.outlier_norm"
    if not bool(torch.isfinite(x).all()):
        return f"{where}: activations are not all finite; run the model in float32 or bfloat16, not float16"
    if bool((x - x[:1]).abs().max() > 1e-6 * x.abs().max()):
        return ""
    what = "all zero" if not x.any() else "the same at every token"
    return f"{where}: activations do not vary ({what}); there is nothing to learn"


def read_held_out(now: Training, validation: AbstractStream | None) -> None:
    """Read the rows that goals are measured on, if there is anything left to train."""
    if validation and now.cursor < now.plan.n_tokens:
        rows, n_read = hold_out(now.plan, validation)
        own = [leg for leg in now.plan.legs if now.trains(leg)]
        now.held_out = {site: rows[site] for leg in own for site in (leg.site, leg.site_out)}
        now.positions["held_out"] = n_read * now.plan.held_out_passes(now.cursor)


def hold_out(plan: Plan, validation: AbstractStream) -> tuple[dict[Site, Tensor], int]:
    """The rows (at most HELD_OUT_ROWS, D) that goals are measured on, and how many positions were read for them."""
    block = validation.block(0, plan.sites)
    rows = {site: block.rows(site, HELD_OUT_ROWS) for site in plan.sites}
    return rows, block.keep.numel()


def check_goals(now: Training, repetition: int) -> None:
    """Measure the legs whose goal is due for a check, and begin the decay of those that will meet it."""
    if not now.held_out or not now.plan.recipe.plan.stop:
        return
    train = now.plan.recipe.train
    for trainee in now.cohort.live:
        if trainee.leg.schedule.reuse <= repetition or not trainee.seeks_goal:
            continue
        if goal_is_due(trainee.leg, train.optimizer, now.plan.batch_tokens, trainee.state.age):
            with now.timed("goals"):
                trainee.check(now.held_out[trainee.leg.site], now.held_out_target(trainee.leg))


def end_legs(now: Training, block: Block, paths: RunDirectory, repetition: int) -> None:
    """Publish snapshots that are due, and legs that are done."""
    stepped = [t for t in now.cohort.trainees.values() if t.leg.schedule.reuse > repetition]
    for trainee in stepped:
        if trainee.done:
            retire(now, trainee, block, paths)
        elif trainee.state.age in trainee.leg.schedule.snapshots:
            publish_leg(now, trainee, block, paths)


def drop_failed(now: Training, block: Block, paths: RunDirectory) -> None:
    """Find out which legs failed on a device that the host did not wait for, and retire them."""
    now.cohort.settle()
    for trainee in list(now.cohort.trainees.values()):
        if trainee.state.failure:
            retire(now, trainee, block, paths)


def retire(now: Training, trainee: Trainee, block: Block, paths: RunDirectory) -> None:
    """Publish a leg that is done, or the last good state of a leg that failed, and forget it."""
    publish_leg(now, trainee, block, paths)
    if trainee.state.failure:
        now.failures[trainee.leg.id] = trainee.state.failure
    report(now, [trainee])
    now.cohort.remove(trainee.leg.id)


def publish_leg(now: Training, trainee: Trainee, block: Block, paths: RunDirectory) -> None:
    """Write the dictionary of a finished leg, or a snapshot of a leg that is unfinished (or failed)."""
    trainee.settle()
    leg = trainee.leg
    state = trainee.state
    finished = trainee.done and not state.failure
    rows = block.rows(leg.site, L0_ROWS)
    dictionary = trainee.canonical(None if only_measured(now.plan, leg) else rows)
    info = {
        "leg": leg.model_dump(mode="json"),
        "layer": leg.layer,
        "module": leg.module,
        "module_out": leg.module_out,
        "model": now.plan.facts.name,
        "revision": now.plan.facts.revision,
        "tokens": state.age,
        "finished": finished,
        "failure": state.failure or None,
        "lr": state.lr_share * leg.schedule.lr,
        "n_dead": int(trainee.dead().sum()) if state.age >= leg.schedule.dead_after_tokens else None,
        "dead_after_tokens": leg.schedule.dead_after_tokens,
        "seconds": round(state.seconds, 3),
        "l0": mean_l0(dictionary, rows),
    }
    if leg.id in now.hops:
        info["hop"] = now.hops[leg.id].model_dump(mode="json")
    if leg.site in now.held_out:
        balance = balance_of(leg, trainee.spec)
        target = now.held_out_target(leg)
        info["validation_fvu"] = fvu(dictionary, now.held_out[leg.site], balance, target=target)
    directory = paths.leg(leg.id) if finished else paths.snapshot(leg.id, state.age)
    publish(directory, dictionary, info)


def report(now: Training, trainees: list[Trainee]) -> None:
    """Add one line per leg to the training log, which watchers see too."""
    for trainee in trainees:
        progress = trainee.look()
        if progress is not None:
            now.lines.append(Line(now.cursor, trainee.leg.id, progress))
