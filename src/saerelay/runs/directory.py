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
from saerelay.planning.leg import Leg
from saerelay.planning.plan import Plan


@dataclass(frozen=True)
class RunDirectory:
    """The paths of a run."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The recipe."""
        return self.root / "run.toml"

    @property
    def plan(self) -> Path:
        """The plan that the recipe was compiled to."""
        return self.root / "plan.json"

    @property
    def planned(self) -> Path:
        """The recipe with the legs that a survey chose, written out."""
        return self.root / "planned.toml"

    @property
    def survey(self) -> Path:
        """The measurements of the survey behind preset = "auto"."""
        return self.root / "survey.json"

    @property
    def survey_run(self) -> Path:
        """The survey's own run, while it lasts."""
        return self.root / "survey"

    @property
    def is_surveyed(self) -> bool:
        """Whether a survey was begun."""
        return self.survey.exists() or self.survey_run.exists()

    @property
    def metrics(self) -> Path:
        """The training log."""
        return self.root / "metrics.jsonl"

    @property
    def cost(self) -> Path:
        """The time that the run took, and the positions it read."""
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
        """The digest by which a change of the run's language model is noticed."""
        return self.state / "model.json"

    @property
    def told(self) -> Path:
        """The points that loggers were told of, so that no point is told twice after a kill."""
        return self.state / "told.jsonl"

    @property
    def resume_command(self) -> str:
        """The command that continues the run, to be pasted into a shell."""
        return f"saerelay train {quote(str(self.recipe))} --out {quote(str(self.root))} --resume"

    def unfinished(self, what: str) -> RunDirectoryError:
        """The error of a command that needs more than is finished yet: `what` is missing, and how to go on."""
        return RunDirectoryError(f"{self.root}: {what}. This continues the run: {self.resume_command}")

    def leg(self, leg_id: str) -> Path:
        """The directory of a published leg."""
        return self.root / "legs" / leg_id

    def snapshot(self, leg_id: str, age: int) -> Path:
        """The directory of a published snapshot of a leg."""
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
        """The quality of every dictionary on every layer."""
        return self.root / "matrix.json"

    @property
    def measures(self) -> Path:
        """How much dictionaries have in common: the measures of Ghilardi et al. 2024."""
        return self.root / "measures.json"

    @property
    def lineage(self) -> Path:
        """The lineage of each latent across layers."""
        return self.root / "lineage.json"

    def features(self, leg_id: str) -> Path:
        """The features of a leg: what each of its latents means."""
        return self.root / "features" / f"{leg_id}.safetensors"

    def circuits(self, task: str) -> Path:
        """The latents that a task rests on."""
        return self.root / "circuits" / f"{task}.json"

    def interpretation(self, leg_id: str) -> Path:
        """A language model's explanations of some latents of a leg."""
        return self.root / "interpret" / f"{leg_id}.json"

    @property
    def answers(self) -> Path:
        """All answers that were paid for."""
        return self.root / "interpret" / "answers.jsonl"

    @property
    def judging(self) -> Path:
        """Pages for judges, their keys, and the judges' answers."""
        return self.root / "judging"

    @property
    def report(self) -> Path:
        """The page that shows everything."""
        return self.root / "report"


@contextmanager
def sole_writer(root: Path) -> Iterator[None]:
    """Hold the run's lock; raise RunDirectoryError if another process has it."""
    lock = filelock.FileLock(root / "state" / "lock")
    try:
        (root / "state").mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise RunDirectoryError(
            f"{root}: another process is training this run; wait for it or stop it, or choose another --out"
        ) from None
    except OSError as error:
        raise RunDirectoryError(
            f"{root}: cannot be written to ({reason(error)}); make it writable, or choose another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def one_at_a_time(root: Path) -> Iterator[None]:
    """Make commands that measure a run wait for one another, since each writes files that others read.

    A read-only run directory is measured without waiting.
    """
    lock = filelock.FileLock(root / "state" / "measuring.lock")
    with ExitStack() as held:
        if (root / "state").is_dir():
            with suppress(OSError):
                held.enter_context(lock)
        yield


def read_plan(directory: Path) -> Plan:
    """The plan of a run directory; RunDirectoryError if there is none, or if one of its files is a pipe."""
    paths = RunDirectory(directory)
    odd = odd_file(directory, deep=True)
    if odd:
        raise RunDirectoryError(f"{odd}: not a regular file; remove it")
    if not paths.plan.is_file():
        if (directory / "dictionary.json").is_file():
            raise RunDirectoryError(
                f"{directory}: an SAE, not a run; load_dictionary reads it, and `saerelay hop --from`"
            )
        raise RunDirectoryError(
            f"{directory}: no run here (plan.json is missing); `saerelay train --out {directory}` makes one"
        )
    return Plan.load(paths.plan)
