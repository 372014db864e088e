"""Everything that changes while a plan runs, and how it is saved and taken up again."""

import hashlib
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from saerelay.data.stream import Block
from saerelay.errors import RunDirectoryError
from saerelay.planning.plan import Leg, Plan
from saerelay.runs.directory import RunDirectory
from saerelay.runs.documents.training import HopFacts
from saerelay.runs.state import load_state, prefixed, save_state, under
from saerelay.sae.moments import Moments
from saerelay.site import Site
from saerelay.training.cohort import Cohort
from saerelay.training.engine import Trainee
from saerelay.training.saving import StateWriter
from saerelay.training.state import TraineeState


def _no_seconds() -> dict[str, float]:
    return {"total": 0.0, "lm": 0.0, "fits": 0.0, "goals": 0.0}


def _no_positions() -> dict[str, int]:
    return {"read": 0, "left_out": 0, "held_out": 0}


@dataclass
class Training:
    """A plan under way; `save` and `restore` are all of resume."""

    plan: Plan
    cohort: Cohort
    cursor: int = 0
    moments: dict[str, Moments] = field(default_factory=dict)
    """Of the hops that are coming, by leg."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why legs had to stop."""
    hops: dict[str, HopFacts] = field(default_factory=dict)
    """How transferred legs began."""
    seconds: dict[str, float] = field(default_factory=_no_seconds)
    positions: dict[str, int] = field(default_factory=_no_positions)
    """Token positions read, those not trained on (BOS and outlier norms), and those read to measure goals on."""
    log_bytes: int = 0
    """Length of the training log when the state was saved."""
    held_out: dict[Site, Tensor] = field(default_factory=dict)
    """Validation activations of all sites, if legs have goals."""

    def held_out_target(self, leg: Leg) -> Tensor | None:
        """The held-out rows of what a leg reconstructs, if it is a transcoder."""
        return self.held_out.get(leg.site_out) if leg.is_transcoder else None

    @property
    def ended(self) -> set[str]:
        """Legs whose time has come and that do not live any more (or never did)."""
        return {leg.id for leg in self.plan.legs if leg.fold_at < self.cursor and leg.id not in self.cohort}

    @property
    def n_repetitions(self) -> int:
        """How many times some live leg trains on a block."""
        return max((trainee.leg.schedule.reuse for trainee in self.cohort.live), default=1)

    def count(self, block: Block) -> None:
        """Count the positions of a block that was read."""
        self.positions["read"] += block.keep.numel()
        self.positions["left_out"] += int((~block.keep).sum())

    def save(self, paths: RunDirectory, writer: StateWriter | None = None) -> None:
        """Write the resume state, or leave it to a writer; what was written to the training log must be on file."""
        tensors: dict[str, Tensor] = {}
        for leg_id, trainee in self.cohort.trainees.items():
            tensors.update(prefixed(f"leg/{leg_id}", trainee.state.tensors()))
            tensors.update(prefixed(f"log/{leg_id}", trainee.unreported()))
        for leg_id, moments in self.moments.items():
            tensors.update(prefixed(f"moments/{leg_id}", moments.state()))
        facts = {
            "cursor": self.cursor,
            "failures": self.failures,
            "hops": {leg_id: hop.model_dump(mode="json") for leg_id, hop in self.hops.items()},
            "seconds": self.seconds,
            "positions": self.positions,
            "live": list(self.cohort.trainees),
            "moments": list(self.moments),
            "machine": machine(torch.device(self.plan.facts.device)),
            "log_bytes": paths.metrics.stat().st_size if paths.metrics.is_file() else 0,
            "legs": {leg.id: leg_digest(leg) for leg in self.plan.legs},
        }
        write = writer.write if writer else save_state
        write(paths.state, tensors, facts)

    @classmethod
    def restore(cls, plan: Plan, paths: RunDirectory, device: torch.device) -> "Training":
        """Take up the saved state, or start at zero where there is none.

        Raises RunDirectoryError if it is damaged, or if it is the state of another plan.
        """
        training = cls(plan, Cohort(plan.recipe.train.batch_tokens))
        saved = load_state(paths.state)
        if saved is None:
            return training
        tensors, facts = saved
        check_plan(plan, facts["legs"], paths)
        training.log_bytes = facts["log_bytes"]
        training.cursor = facts["cursor"]
        training.failures = facts["failures"]
        training.hops = {leg_id: HopFacts.model_validate(hop) for leg_id, hop in facts["hops"].items()}
        training.seconds = facts["seconds"]
        training.positions = facts["positions"]
        for leg_id in facts["live"]:
            own = {name: tensor.to(device) for name, tensor in under(f"leg/{leg_id}", tensors).items()}
            leg = plan.leg(leg_id)
            trainee = Trainee(leg, plan.recipe.train, TraineeState.restore(leg, own))
            trainee.take_up(under(f"log/{leg_id}", tensors))
            training.cohort.add(trainee)
        for leg_id in facts["moments"]:
            own = {name: tensor.to(device) for name, tensor in under(f"moments/{leg_id}", tensors).items()}
            training.moments[leg_id] = Moments.restore(own)
        return training


def check_plan(plan: Plan, expected: dict[str, str], paths: RunDirectory) -> None:
    """Raise RunDirectoryError unless a plan has the legs that the state was saved with; it may have more."""
    digests = {leg.id: leg_digest(leg) for leg in plan.legs}
    changed = sorted(leg_id for leg_id in expected if digests.get(leg_id) != expected[leg_id])
    if changed:
        raise RunDirectoryError(
            f"{paths.plan}: leg {changed[0]} is not the one that {paths.state} was saved with; one of the two files "
            f"is damaged or of another run. Restore it, or delete {paths.state} to start the run over"
        )


def leg_digest(leg: Leg) -> str:
    """A digest of all that a leg's training follows from."""
    return hashlib.blake2b(leg.model_dump_json().encode(), digest_size=8).hexdigest()


def machine(device: torch.device) -> dict[str, Any]:
    """What bitwise equality depends on, for a run on a device."""
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
    """The version of the first of some packages that is installed."""
    for name in names:
        with suppress(PackageNotFoundError):
            return version(name)
    return None


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
