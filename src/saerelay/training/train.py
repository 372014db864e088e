"""Runs a plan: the file to read first.

Each block: one forward pass of the language model feeds all open sites; legs whose parents are ready are folded from
them; every live leg steps in lockstep; legs that have spent their budget are published. The state is saved between any
two batches, and a run that was killed continues from there to the same bits.
"""

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from saerelay.data.stream import AbstractStream, Block
from saerelay.errors import Interrupted, LegFailed, TransferError
from saerelay.files import finite
from saerelay.interop import load_dictionary
from saerelay.planning.plan import COPY_RATE, Leg, Plan
from saerelay.runs.dictionaries import publish
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.training import PhaseSeconds, ReadPositions, RunCost
from saerelay.runs.state import load_state, prefixed, save_state, truncate_metrics, under
from saerelay.sae.dictionary import Dictionary, match_l0
from saerelay.sae.quality import mean_l0
from saerelay.sae.moments import Moments
from saerelay.sae.quality import fvu
from saerelay.sae.threads import side_by_side
from saerelay.sae.maps import LEAST_RATE_SHARE, map_between, rate_share
from saerelay.sae.transfer import fold
from saerelay.sae.refit import refit
from saerelay.sae.reshape import reshape, revive
from saerelay.site import Site
from saerelay.spec import seed_from
from saerelay.training.engine import Cohort, Trainee
from saerelay.training.schedule import goal_is_due
from saerelay.training.progress import Watcher

FIRST_ROWS, L0_ROWS, HELD_OUT_ROWS = 32_768, 8_192, 4_096
"""Rows at which a leg looks when it begins (units, initialisation), on which L0 is measured and set, and of the
validation split on which goals are measured."""
REFIT_GAIN = 0.15
"""What a refit has to gain at the site that its dictionary was trained at: a tenth is won on the documents of the block
alone, and lost on others (docs/log.md)."""


@dataclass
class Training:
    """Everything that changes while a plan runs; `state` and `restore` are all of resume."""

    plan: Plan
    cohort: Cohort
    cursor: int = 0
    moments: dict[str, Moments] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"total": 0.0, "lm": 0.0, "fits": 0.0, "goals": 0.0})
    positions: dict[str, int] = field(default_factory=lambda: {"read": 0, "left_out": 0, "held_out": 0})
    """Token positions read, those not trained on (BOS and outlier norms), and those read to measure goals on."""
    held_out: dict[Site, Tensor] = field(default_factory=dict)
    """Validation activations of all sites, if legs have goals."""

    @property
    def ended(self) -> set[str]:
        """Legs whose time has come and that do not live any more (or never did)."""
        return {leg.id for leg in self.plan.legs if leg.fold_at < self.cursor and leg.id not in self.cohort}

    def save(self, paths: RunDirectory) -> None:
        """Write the resume state."""
        tensors: dict[str, Tensor] = {}
        for leg_id, trainee in self.cohort.trainees.items():
            tensors |= prefixed(f"leg/{leg_id}", trainee.state())
        for leg_id, moments in self.moments.items():
            tensors |= prefixed(f"moments/{leg_id}", moments.state())
        facts: dict[str, Any] = {"cursor": self.cursor, "failures": self.failures}
        facts |= {"seconds": self.seconds, "positions": self.positions}
        facts |= {"live": list(self.cohort.trainees), "moments": list(self.moments), "machine": machine()}
        save_state(paths.state, tensors, facts)

    @classmethod
    def restore(cls, plan: Plan, paths: RunDirectory, device: torch.device) -> "Training":
        """Take up the saved state, or start at zero where there is none."""
        self = cls(plan, Cohort(plan.recipe.train.batch_tokens))
        if saved := load_state(paths.state):
            tensors, facts = saved
            self.cursor, self.failures = facts["cursor"], facts["failures"]
            self.seconds, self.positions = facts["seconds"], facts["positions"]
            for leg_id in facts["live"]:
                state = {name: t.to(device) for name, t in under(f"leg/{leg_id}", tensors).items()}
                self.cohort.add(Trainee.restore(plan.leg(leg_id), plan.recipe.train, state))
            self.moments = {i: Moments.restore(under(f"moments/{i}", tensors)) for i in facts["moments"]}
        return self


def train_plan(
    plan: Plan,
    paths: RunDirectory,
    stream: AbstractStream,
    watcher: Watcher,
    device: torch.device,
    validation: AbstractStream | None = None,
) -> None:
    """Run a plan to its end, from the saved state if there is one; `validation` is for legs with a goal.

    Raises Interrupted after a signal (state saved) and LegFailed at the end if a leg had to stop.
    """
    now = Training.restore(plan, paths, device)
    truncate_metrics(paths.metrics, now.cursor)
    last_saved, began = now.cursor, time.perf_counter() - now.seconds["total"]
    if validation and now.cursor < plan.n_tokens:
        now.held_out, n_read = hold_out(plan, validation)
        now.positions["held_out"] += n_read
    with stop_requests() as stop, paths.metrics.open("a", encoding="utf-8") as log:
        while now.cursor < plan.n_tokens:
            number, offset = divmod(now.cursor, plan.block_tokens)
            sites = plan.open_sites(now.cursor, (number + 1) * plan.block_tokens, now.ended)
            if not sites:
                now.cursor = (number + 1) * plan.block_tokens
                continue
            with timed(now.seconds, "lm"):
                block = stream.block(number, sites)
            if offset == 0:
                with timed(now.seconds, "fits"):
                    begin_legs(now, block, paths, hops=False)
                    gather_moments(now, block)
                now.positions["read"] += block.keep.numel()
                now.positions["left_out"] += int((~block.keep).sum())
            for index in range(offset // block.batch_tokens, block.n_batches):
                now.cursor += block.batch_tokens
                for again in range(max((t.leg.reuse for t in now.cohort.live), default=1)):
                    now.cohort.step(block.again(index, again), again)
                    check_goals(now, again)
                    end_legs(now, block, paths, log, again)
                if now.cursor % plan.block_tokens == 0:
                    with timed(now.seconds, "fits"):
                        begin_legs(now, block, paths, hops=True)
                watcher.tick(now.cursor)
                if stop.is_set() or now.cursor - last_saved >= plan.recipe.train.checkpoint_every:
                    now.seconds["total"] = time.perf_counter() - began
                    log.flush()
                    now.save(paths)
                    last_saved = now.cursor
                if stop.is_set():
                    raise Interrupted(
                        f"saerelay train {quote(str(paths.recipe))} --out {quote(str(paths.root))} --resume"
                    )
            report(now, now.cohort.live, log, watcher)
    now.seconds["total"] = time.perf_counter() - began
    now.save(paths)
    RunCost(seconds=PhaseSeconds(**now.seconds), positions=ReadPositions(**now.positions)).save(paths.cost)
    if now.failures:
        lines = [f"leg {leg_id} stopped: {why}" for leg_id, why in now.failures.items()]
        raise LegFailed(
            "\n".join([*lines, f"its last good state is in {paths.root}/legs/ID/snapshots; all other legs are done"])
        )


def begin_legs(now: Training, block: Block, paths: RunDirectory, *, hops: bool) -> None:
    """Bring to life the legs whose age is 0 here: from scratch or copied at a block's start, or, `hops`, at its end.

    A hop's map and refit are made from the blocks before it, so that its own tokens are all new to it. Several are made
    side by side.
    """
    due = [leg for leg in now.plan.legs if leg.fold_at == now.cursor and hops == (leg.start < leg.fold_at)]
    while due:
        waiting = {leg.id for leg in due}
        ready = [leg for leg in due if leg.parent not in waiting]
        due = [leg for leg in due if leg.parent in waiting]
        begun = side_by_side(lambda leg: begin(now, leg, block, paths), ready, block.keep.device)
        for leg, trainee in zip(ready, begun, strict=True):
            if isinstance(trainee, str):
                now.failures[leg.id] = trainee
                continue
            now.cohort.add(trainee)
            if 0 in leg.snapshots:
                publish_leg(now, trainee, block, paths)


def begin(now: Training, leg: Leg, block: Block, paths: RunDirectory) -> Trainee | str:
    """A leg at age 0, from scratch or from its parent, or why there is none."""
    if leg.parent in now.failures:
        return f"its parent {leg.parent} stopped"
    try:
        inherited, lr_share = inherit(now, leg, block, paths) if leg.parent else (None, 1.0)
    except TransferError as error:
        return str(error)
    return Trainee(leg, now.plan.recipe.train, block.rows(leg.site, FIRST_ROWS), inherited, lr_share=lr_share)


def inherit(now: Training, leg: Leg, block: Block, paths: RunDirectory) -> tuple[Dictionary, float]:
    """The parent as it is now, folded to the leg's site, revived, refitted, at the L0 that is asked for (or it had).

    Also the share of the leg's learning rate that this hop calls for.
    """
    l0 = leg.dictionary.l0
    if leg.parent in now.cohort:
        source = now.cohort[leg.parent].canonical()
        l0 = l0 or mean_l0(source, block.rows(now.plan.parent_site(leg), L0_ROWS))
        source = source.to("cpu")
    else:
        directory = paths.leg(leg.parent) if now.plan.has(leg.parent) else Path(now.plan.externals[leg.parent].path)
        source, origin = load_dictionary(directory)
        l0 = l0 or origin.l0
    assert leg.method is not None
    moments, rows = now.moments.pop(leg.id, None), block.rows(leg.site, L0_ROWS)
    reshaped, at_home = now.plan.reshapes(leg), now.plan.parent_site(leg) == leg.site
    copied = leg.method == "identity" and not reshaped
    if copied and not leg.budget_tokens:  # only looked at: a decoder's norms stay, by which TopK does not rank
        folded = source.to(rows.device)
    else:
        folded = fold(source, map_between(leg.method, now.plan.facts.width(leg.site), moments)).to(rows.device)
    seen = block.rows(leg.site, leg.refit_tokens) if leg.refit_tokens else rows
    seed = seed_from("revive", leg.seed, leg.id)
    if reshaped:
        folded = reshape(folded, seen, leg.dictionary.architecture, leg.dictionary.n_latents, l0, seed)
    best = refitted(folded, seen, seed, checked=at_home) if leg.refit_tokens else folded
    at_rest = copied and best is folded and leg.refit_tokens > 0  # nothing to learn, as far as a refit can tell
    lr_share = rate_share(moments, now.plan.newness(leg)) if moments else LEAST_RATE_SHARE if at_rest else COPY_RATE
    copied = copied and source.architecture != "batchtopk"  # the paper's: its L0 is what it is
    return best if copied or not l0 else match_l0(best, rows, l0), lr_share if leg.lr_by_map else 1.0


def refitted(dictionary: Dictionary, x: Tensor, seed: int, *, checked: bool) -> Dictionary:
    """A dictionary revived and refitted on activations x (B, D).

    `checked`: on three quarters of them, and only if that lowers FVU on the last quarter by REFIT_GAIN.
    """
    n = 3 * len(x) // 4 if checked else len(x)
    better = refit(revive(dictionary, x[:n], seed), x[:n].split(4096))
    return dictionary if checked and fvu(better, x[n:]) > (1 - REFIT_GAIN) * fvu(dictionary, x[n:]) else better


def gather_moments(now: Training, block: Block) -> None:
    """Feed the moments of the hops that are coming."""
    for leg in now.plan.legs:
        if leg.start <= now.cursor < leg.fold_at:
            source, width = now.plan.parent_site(leg), now.plan.facts.width(leg.site)
            moments = now.moments.setdefault(leg.id, Moments.empty(width, width))
            for rows in block.chunks([source, leg.site]):
                moments.add(rows[source], rows[leg.site])


def hold_out(plan: Plan, validation: AbstractStream) -> tuple[dict[Site, Tensor], int]:
    """The rows (at most HELD_OUT_ROWS, D) on which goals are measured, and how many positions were read for them."""
    block = validation.block(0, plan.sites)
    return {site: block.rows(site, HELD_OUT_ROWS) for site in plan.sites}, block.keep.numel()


def check_goals(now: Training, again: int) -> None:
    """Measure the legs with a goal that are due, and let those begin their decay that will meet it."""
    for trainee in now.cohort.live if now.held_out and now.plan.recipe.plan.stop else []:
        if trainee.leg.reuse > again and check_due(trainee.leg, now.plan.recipe.train, trainee.age):
            with timed(now.seconds, "goals"):
                trainee.check(now.held_out[trainee.leg.site])


def end_legs(now: Training, block: Block, paths: RunDirectory, log: Any, again: int) -> None:
    """Publish snapshots that are due, and legs that are done."""
    for trainee in [t for t in now.cohort.trainees.values() if t.leg.reuse > again]:
        if trainee.age in trainee.leg.snapshots or trainee.done:
            publish_leg(now, trainee, block, paths)
        if trainee.failure:
            now.failures[trainee.leg.id] = trainee.failure
        if trainee.done:
            report(now, [trainee], log, None)
            now.cohort.remove(trainee.leg.id)


def publish_leg(now: Training, trainee: Trainee, block: Block, paths: RunDirectory) -> None:
    """Write the dictionary of a leg that is done, or a snapshot of one that is not (or that failed)."""
    plan, leg = now.plan, now.plan.leg(trainee.leg.id)
    finished = trainee.done and not trainee.failure
    info = {
        "leg": leg.model_dump(mode="json"),
        "layer": leg.layer,
        "module": leg.module,
        "model": plan.facts.name,
        "revision": plan.facts.revision,
        "tokens": trainee.age,
        "finished": finished,
        "failure": trainee.failure or None,
        "lr": trainee.lr_share * leg.lr,
        "n_dead": int(trainee.dead().sum()),
        "dead_after_tokens": leg.dead_after_tokens,
        "seconds": round(trainee.seconds, 3),
    }
    directory = paths.leg(leg.id) if finished else paths.snapshot(leg.id, trainee.age)
    rows = block.rows(leg.site, L0_ROWS)
    dictionary = trainee.canonical(rows)
    info["l0"] = mean_l0(dictionary, rows)
    if leg.site in now.held_out:
        info["validation_fvu"] = fvu(dictionary, now.held_out[leg.site])
    publish(directory, dictionary, info)


def report(now: Training, trainees: list[Trainee], log: Any, watcher: Watcher | None) -> None:
    """One line a leg to metrics.jsonl, and to whoever watches."""
    for trainee in trainees:
        if progress := trainee.look():
            line = {"cursor": now.cursor, "leg": trainee.leg.id} | progress._asdict()
            log.write(json.dumps(finite(line)) + "\n")
            if watcher:
                watcher.leg(trainee.leg.id, progress)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time spent inside to `seconds[name]`."""
    began = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - began


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second Ctrl-C interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def machine() -> dict[str, Any]:
    """What bitwise equality depends on."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
