"""Files of a run directory: paths, atomic writes, published dictionaries, resume state.

    run.toml  plan.json  metrics.jsonl  tokens/  legs/<id>/  eval/<id>.json  state/  summary.json  report/

See docs/run-directory.md. safetensors, JSON and TOML only; everything is written under a temporary name and renamed.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import filelock

from saerelay.errors import RunDirectoryError
from saerelay.files import odd_file, reason
from saerelay.planning.plan import Leg, Plan


@dataclass(frozen=True)
class RunDirectory:
    """The paths of a run."""

    root: Path

    @property
    def recipe(self) -> Path:
        """What was asked for."""
        return self.root / "run.toml"

    @property
    def plan(self) -> Path:
        """What it was compiled to."""
        return self.root / "plan.json"

    @property
    def survey(self) -> Path:
        """What the survey behind preset = "auto" measured; its own run is in `survey/` while it lasts."""
        return self.root / "survey.json"

    @property
    def metrics(self) -> Path:
        """The training log."""
        return self.root / "metrics.jsonl"

    @property
    def cost(self) -> Path:
        """What the run took."""
        return self.root / "cost.json"

    @property
    def tokens(self) -> Path:
        """The corpus, tokenised and split."""
        return self.root / "tokens"

    @property
    def state(self) -> Path:
        """Resume state, the lock, and counters."""
        return self.root / "state"

    @property
    def model_digest(self) -> Path:
        """By which another language model in the place of the run's own is noticed."""
        return self.state / "model.json"

    @property
    def told(self) -> Path:
        """What loggers were told of, so that nothing is told twice after a kill."""
        return self.state / "told.jsonl"

    @property
    def resume_command(self) -> str:
        """The command that continues the run, to be pasted into a shell."""
        return f"saerelay train {quote(str(self.recipe))} --out {quote(str(self.root))} --resume"

    def leg(self, leg_id: str) -> Path:
        """A published leg."""
        return self.root / "legs" / leg_id

    def snapshot(self, leg_id: str, age: int) -> Path:
        """A published snapshot of a leg."""
        return self.leg(leg_id) / "snapshots" / str(age)

    def ages(self, leg: Leg) -> list[int]:
        """Ages of a leg's published snapshots."""
        published = []
        for age in leg.schedule.snapshots:
            if (self.snapshot(leg.id, age) / "dictionary.json").is_file():
                published.append(age)
        return published

    def evaluation(self, leg_id: str) -> Path:
        """The quality of a leg."""
        return self.root / "eval" / f"{leg_id}.json"

    @property
    def summary(self) -> Path:
        """The quality of every leg, and the cost of the suite."""
        return self.root / "summary.json"

    @property
    def matrix(self) -> Path:
        """Every dictionary on every layer."""
        return self.root / "matrix.json"

    @property
    def measures(self) -> Path:
        """What dictionaries have in common: the measures of Ghilardi et al. 2024."""
        return self.root / "measures.json"

    @property
    def lineage(self) -> Path:
        """What became of each latent across layers."""
        return self.root / "lineage.json"

    def features(self, leg_id: str) -> Path:
        """What each latent of a leg means."""
        return self.root / "features" / f"{leg_id}.safetensors"

    def circuits(self, task: str) -> Path:
        """The latents that a task rests on."""
        return self.root / "circuits" / f"{task}.json"

    def interpretation(self, leg_id: str) -> Path:
        """What a language model makes of some latents of a leg."""
        return self.root / "interpret" / f"{leg_id}.json"

    @property
    def answers(self) -> Path:
        """Every answer that was paid for."""
        return self.root / "interpret" / "answers.jsonl"

    @property
    def judging(self) -> Path:
        """Pages for judges, their keys, and what judges said."""
        return self.root / "judging"

    @property
    def report(self) -> Path:
        """The page that shows all of it."""
        return self.root / "report"


@contextmanager
def sole_writer(root: Path) -> Iterator[None]:
    """Hold the run's lock: a second process on the same run is refused."""
    lock = filelock.FileLock(root / "state" / "lock")
    try:
        (root / "state").mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise RunDirectoryError(
            f"{root}: another process is training this run; wait for it or stop it, or choose another --out"
        ) from None
    except OSError as error:
        raise RunDirectoryError(f"{root}: cannot be written to ({reason(error)}), or choose another --out") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def one_at_a_time(root: Path) -> Iterator[None]:
    """Let commands that measure a run wait for one another: each writes files that others read.

    A run that can only be read is measured without waiting.
    """
    lock = filelock.FileLock(root / "state" / "measuring.lock")
    with ExitStack() as held:
        if (root / "state").is_dir():
            with suppress(OSError):
                held.enter_context(lock)
        yield


def read_plan(directory: Path) -> Plan:
    """The plan of a run directory; RunDirectoryError if there is none, or if a pipe lies among its files."""
    paths = RunDirectory(directory)
    odd = odd_file(directory, deep=True)
    if odd:
        raise RunDirectoryError(f"{odd}: not a regular file; remove it")
    if not paths.plan.is_file():
        raise RunDirectoryError(
            f"{directory}: no run here (plan.json is missing); `saerelay train --out {directory}` makes one"
        )
    return Plan.load(paths.plan)
