"""Everything that changes while a plan runs, and how it is saved and restored.

`train` holds it in one `Training` object; where several ranks train, they exchange a `Word` each when they `meet`.
"""

import hashlib
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import IO, Any

import torch
from torch import Tensor

from saerelay.data.stream import Block
from saerelay.errors import RunDirectoryError
from saerelay.planning.leg import Leg
from saerelay.planning.plan import Plan
from saerelay.planning.ranks import owners
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.training import HopFacts
from saerelay.runs.state import append_metrics, commit_state, load_part, prefixed, state_facts, under
from saerelay.sae.moments import Moments
from saerelay.site import Site
from saerelay.team import Team
from saerelay.training.cohort import Cohort
from saerelay.training.engine import Progress, Trainee
from saerelay.training.progress import Watcher
from saerelay.training.saving import StateWriter
from saerelay.training.state import TraineeState


def outputs_key(leg: Leg) -> str:
    """The key of the moments of what a transcoder reconstructs; those of its inputs have the leg's id as their key."""
    return f"{leg.id}@out"


def shared_key(leg: Leg, site: Site) -> str:
    """The key of the moments that align another layer with the leg's own layer, where both share the leg."""
    return f"{leg.id}@{site}"


def leg_of(key: str) -> str:
    """The id of the leg for which the moments under a key are gathered."""
    return key.partition("@")[0]


def _no_seconds() -> dict[str, float]:
    return {"total": 0.0, "processor": 0.0, "lm": 0.0, "fits": 0.0, "goals": 0.0, "exchange": 0.0}


def _no_positions() -> dict[str, int]:
    return {"read": 0, "left_out": 0, "held_out": 0}


@dataclass(frozen=True)
class Line:
    """A line of the training log that is still to be written."""

    cursor: int
    leg: str
    progress: Progress


class Journal:
    """Destination of the training log's lines: a file and a watcher, or nowhere."""

    def __init__(self, log: IO[str] | None, watcher: Watcher) -> None:
        self.log = log
        self.watcher = watcher

    def write(self, lines: Iterable[Line]) -> None:
        """Write some lines, in the order of their cursors."""
        if self.log is None:
            return
        for line in sorted(lines, key=lambda line: line.cursor):
            append_metrics(self.log, line.cursor, line.leg, line.progress._asdict())
            self.watcher.leg(line.leg, line.progress)


@dataclass(frozen=True)
class Word:
    """A rank's message to the others when they meet: all that they must know of its legs."""

    live: list[str]
    """The rank's legs in training."""
    failures: dict[str, str]
    hops: dict[str, HopFacts]
    lines: list[Line]
    seconds: dict[str, float]
    moments: list[str]
    """The keys of the moments that the rank gathers."""
    kept_blocks: list[str]
    """The rank's legs that keep blocks."""
    busy: float
    """Seconds that the rank spent on its legs since its last block arrived."""
    seconds_per_batch: float
    """Seconds per micro-batch of the language model, or 0 if the rank forwarded nothing."""


@dataclass
class Training:
    """A plan in progress; `save` and `restore` are all there is to resuming.

    A rank of a team trains only its own legs, and holds only their state. All it knows of the others' legs was
    exchanged when the ranks last met: `ended`, `failures` and `hops`. These are the same on all ranks.
    """

    plan: Plan
    cohort: Cohort
    team: Team = field(default_factory=Team.alone)
    owner: dict[str, int] = field(default_factory=dict)
    """The rank that trains each leg."""
    cursor: int = 0
    ended: set[str] = field(default_factory=set)
    """Legs whose start has passed and that are no longer in training (or never were), on any rank."""
    moments: dict[str, Moments] = field(default_factory=dict)
    """Moments for upcoming hops, by leg; a transcoder's outputs have their `outputs_key`, and layers that share a leg
    their `shared_key`."""
    kept_blocks: dict[str, list[Block]] = field(default_factory=dict)
    """By leg, the last blocks before its hop, in order, if it uses them again (see `kept_blocks`)."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why legs had to stop."""
    hops: dict[str, HopFacts] = field(default_factory=dict)
    """How transferred legs began."""
    seconds: dict[str, float] = field(default_factory=_no_seconds)
    """Seconds spent so far, by phase."""
    positions: dict[str, int] = field(default_factory=_no_positions)
    """Token positions read, those not trained on (BOS and outlier norms), and those read to measure goals on."""
    lines: list[Line] = field(default_factory=list)
    """Lines of the training log that are not yet written."""
    log_bytes: int = 0
    """Length of the training log when the state was saved."""
    held_out: dict[Site, Tensor] = field(default_factory=dict)
    """Validation activations at the sites of this rank's legs, if there are goals."""
    serial: int = 0
    """Number of the last saved state."""
    uncommitted: dict[str, Any] | None = None
    """Facts of a state whose tensors are being written."""
    writer: StateWriter = field(default_factory=StateWriter)
    began: float = field(default_factory=time.perf_counter)
    """When the run would have begun, by `time.perf_counter`, had it never been interrupted."""
    began_processor: float = field(default_factory=time.process_time)
    """The same by `time.process_time`."""
    block_came: float = 0.0
    """When the last block arrived, by `time.perf_counter`."""

    def trains(self, leg: Leg) -> bool:
        """Whether this rank trains a leg."""
        return self.owner[leg.id] == self.team.rank

    def held_out_target(self, leg: Leg) -> Tensor | None:
        """The held-out rows that a leg reconstructs, if it is a transcoder."""
        return self.held_out.get(leg.site_out) if leg.is_transcoder else None

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to the seconds of a phase."""
        began = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - began

    @property
    def n_repetitions(self) -> int:
        """The greatest number of passes over a block among live legs."""
        return max((trainee.leg.schedule.reuse for trainee in self.cohort.live), default=1)

    def count(self, block: Block) -> None:
        """Count the positions of a block that was read."""
        self.positions["read"] += block.keep.numel()
        self.positions["left_out"] += int((~block.keep).sum())

    def meet(self, journal: Journal) -> list[Word]:
        """Exchange the state of all ranks' legs; rank 0 writes the training log.

        All that decides which sites are read comes from this meeting, so that all ranks read the same.
        """
        self.seconds["total"] = time.perf_counter() - self.began
        self.seconds["processor"] = time.process_time() - self.began_processor
        self.seconds["exchange"] += self.team.seconds_exchanging
        self.team.seconds_exchanging = 0.0
        mine = Word(
            live=list(self.cohort.trainees),
            failures=self.failures,
            hops=self.hops,
            lines=self.lines,
            seconds=self.seconds,
            moments=list(self.moments),
            kept_blocks=list(self.kept_blocks),
            busy=time.perf_counter() - self.block_came,
            seconds_per_batch=self.team.own_seconds_per_batch,
        )
        words = self.team.gather(mine)
        for word in words:
            self.failures |= word.failures
            self.hops |= word.hops
        live = {leg_id for word in words for leg_id in word.live}
        self.ended = {leg.id for leg in self.plan.legs if leg.fold_at < self.cursor and leg.id not in live}
        self.team.balance([word.busy for word in words], [word.seconds_per_batch for word in words])
        journal.write(line for word in words for line in word.lines)
        self.lines = []
        return words

    def save(self, paths: RunDirectory, words: Sequence[Word]) -> None:
        """Begin to write the state, each rank its own part; `commit` makes it the state to resume from.

        `words` are from a meeting at this cursor, so the training log already holds everything reported so far.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for leg_id, trainee in self.cohort.trainees.items():
            tensors = prefixed("leg", trainee.state.tensors())
            parts[f"leg-{leg_id}"] = tensors | prefixed("log", trainee.unreported())
        for key, moments in self.moments.items():
            parts[f"moments-{key}"] = moments.state()
        for leg_id, blocks in self.kept_blocks.items():
            parts[f"blocks-{leg_id}"] = block_tensors(blocks)
        self.serial += 1
        self.writer.write(paths.state / str(self.serial), parts)
        self.uncommitted = {
            "cursor": self.cursor,
            "failures": self.failures.copy(),
            "hops": {leg_id: hop.model_dump(mode="json") for leg_id, hop in self.hops.items()},
            "seconds": slowest([word.seconds for word in words]),
            "positions": self.positions.copy(),
            "live": [leg_id for word in words for leg_id in word.live],
            "moments": [key for word in words for key in word.moments],
            "kept_blocks": [leg_id for word in words for leg_id in word.kept_blocks],
            "machine": machine(torch.device(self.plan.facts.device)),
            "log_bytes": paths.metrics.stat().st_size if paths.metrics.is_file() else 0,
            "legs": {leg.id: leg_digest(leg) for leg in self.plan.legs},
            "serial": self.serial,
        }

    def commit(self, paths: RunDirectory) -> None:
        """Make the saved state the one to resume from, once all ranks have written their parts of it."""
        if self.uncommitted is None:
            return
        digests: dict[str, dict[str, str]] = {}
        for part in self.team.gather(self.writer.wait()):
            digests |= part
        if self.team.leads:
            commit_state(paths.state, {**self.uncommitted, "digests": digests})
        self.uncommitted = None
        self.team.gather(None)  # no rank goes on before the state is there

    @classmethod
    def restore(cls, plan: Plan, paths: RunDirectory, device: torch.device, team: Team) -> "Training":
        """Restore the saved state of this rank's legs, or start at zero if there is none.

        Raises RunDirectoryError if it is damaged, or if it is the state of another plan.
        """
        training = cls(plan, Cohort(plan.batch_tokens), team, owners(plan, team.size))
        facts = team.once(lambda: state_facts(paths.state))
        if facts is None:
            return training
        check_plan(plan, facts["legs"], paths)
        training.log_bytes = facts["log_bytes"]
        training.cursor = facts["cursor"]
        training.failures = facts["failures"]
        training.hops = {leg_id: HopFacts.model_validate(hop) for leg_id, hop in facts["hops"].items()}
        training.seconds |= facts["seconds"]
        training.began -= training.seconds["total"]
        if team.leads:  # the saved time is that of all ranks
            training.began_processor -= training.seconds["processor"]
        training.positions = facts["positions"]
        training.serial = facts["serial"]
        over = {leg.id for leg in plan.legs if leg.fold_at < training.cursor}
        training.ended = over - set(facts["live"])
        for leg_id in facts["live"]:
            leg = plan.leg(leg_id)
            if training.trains(leg):
                tensors = load_part(paths.state, f"leg-{leg_id}", facts)
                own = {name: tensor.to(device) for name, tensor in under("leg", tensors).items()}
                trainee = Trainee(leg, plan.recipe.train, TraineeState.restore(leg, own))
                trainee.take_up(under("log", tensors))
                training.cohort.add(trainee)
        for key in facts["moments"]:
            if training.trains(plan.leg(leg_of(key))):
                tensors = load_part(paths.state, f"moments-{key}", facts)
                own = {name: tensor.to(device) for name, tensor in tensors.items()}
                training.moments[key] = Moments.restore(own)
        for leg_id in facts["kept_blocks"]:
            if training.trains(plan.leg(leg_id)):
                tensors = load_part(paths.state, f"blocks-{leg_id}", facts)
                own = {name: tensor.to(device) for name, tensor in tensors.items()}
                training.kept_blocks[leg_id] = restored_blocks(own, plan.batch_tokens)
        return training


def block_tensors(blocks: Sequence[Block]) -> dict[str, Tensor]:
    """The tensors of some blocks, by the number of the block and the site, or "keep"."""
    tensors: dict[str, Tensor] = {}
    for number, block in enumerate(blocks):
        own = {str(site): x for site, x in block.activations.items()}
        tensors |= prefixed(str(number), own | {"keep": block.keep})
    return tensors


def restored_blocks(tensors: Mapping[str, Tensor], batch_tokens: int) -> list[Block]:
    """Undo `block_tensors`."""
    blocks = []
    while own := under(str(len(blocks)), tensors):
        keep = own.pop("keep")
        blocks.append(Block({Site.parse(name): x for name, x in own.items()}, keep, batch_tokens))
    return blocks


def slowest(seconds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The longest time that any rank spent, per phase; of CPU time, the sum over ranks."""
    longest = {name: max(of_rank[name] for of_rank in seconds) for name in seconds[0]}
    return {**longest, "processor": sum(of_rank["processor"] for of_rank in seconds)}


def check_plan(plan: Plan, expected: dict[str, str], paths: RunDirectory) -> None:
    """Raise RunDirectoryError unless a plan has the legs that the state was saved with; further legs are allowed."""
    digests = {leg.id: leg_digest(leg) for leg in plan.legs}
    changed = sorted(leg_id for leg_id in expected if digests.get(leg_id) != expected[leg_id])
    if changed:
        raise RunDirectoryError(
            f"{paths.plan}: leg {changed[0]} differs from the leg in {paths.state}, so that one of the two files is "
            f"damaged or belongs to another run. Restore that file, or delete {paths.state} to start the run over"
        )


def leg_digest(leg: Leg) -> str:
    """A digest of everything that determines a leg's training."""
    return hashlib.blake2b(leg.model_dump_json().encode(), digest_size=8).hexdigest()


def machine(device: torch.device) -> dict[str, Any]:
    """The facts about this machine that bitwise equality depends on, for a run on a device."""
    processor = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type != "cuda":
        return processor
    major, minor = torch.cuda.get_device_capability(device)
    return {
        **processor,
        "gpu": torch.cuda.get_device_name(device),
        "gpu_capability": f"{major}.{minor}",
        "cuda": torch.version.cuda,
        "cublas": _version_of("nvidia-cublas", "nvidia-cublas-cu13", "nvidia-cublas-cu12"),
        "triton": _version_of("triton"),
    }


def _version_of(*names: str) -> str | None:
    """The version of the first of the given packages that is installed."""
    for name in names:
        with suppress(PackageNotFoundError):
            return version(name)
    return None


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second Ctrl-C interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
