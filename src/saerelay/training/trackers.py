"""TensorBoard and Weights & Biases, where they are installed and a recipe asks for them (train.loggers).

A logger that fails during a run, because the network is down for example, is dropped, and the run goes on.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from saerelay.errors import RecipeError
from saerelay.files import write_text
from saerelay.planning.plan import Plan
from saerelay.runs.directory import RunDirectory
from saerelay.runs.state import last_ages
from saerelay.spec import seed_from
from saerelay.training import engine
from saerelay.training.progress import Watcher

SHOWN = ("loss", "fvu", "l0", "n_dead", "learning_rate")


class Several:
    """Passes everything on to several watchers."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self.watchers = watchers

    def tick(self, cursor: int) -> None:
        """See `Watcher`."""
        for watcher in self.watchers:
            watcher.tick(cursor)

    def leg(self, leg_id: str, progress: engine.Progress) -> None:
        """See `Watcher`."""
        for watcher in self.watchers:
            watcher.leg(leg_id, progress)


class Loggers:
    """Gives loggers each point of the training log once, even if a resumed run logs the same points again."""

    def __init__(self, loggers: Sequence["TensorBoard | WandB"], logged_ages: Mapping[str, int]) -> None:
        self.loggers = list(loggers)
        self.logged_ages = logged_ages

    def tick(self, cursor: int) -> None:
        """See `Watcher`."""

    def leg(self, leg_id: str, progress: engine.Progress) -> None:
        """See `Watcher`."""
        if progress.age <= self.logged_ages.get(leg_id, 0):
            return
        for logger in tuple(self.loggers):
            try:
                logger.log(leg_id, progress)
            except Exception as error:  # from another library, of any kind
                _warn_of(logger, error)
                self.loggers.remove(logger)


def _warn_of(logger: "TensorBoard | WandB", error: Exception) -> None:
    name = type(logger).__name__
    warnings.warn(
        f"{name} failed ({type(error).__name__}: {error}) and logs nothing from here on; metrics.jsonl has every point",
        stacklevel=3,
    )


class TensorBoard:
    """Scalars by leg over the leg's own age, in <run>/tensorboard."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory / "tensorboard"))

    def log(self, leg_id: str, progress: engine.Progress) -> None:
        """Write one point of a leg."""
        for name in SHOWN:
            self.writer.add_scalar(f"{name}/{leg_id}", getattr(progress, name), progress.age)
        self.writer.flush()

    def close(self) -> None:
        """Close the file of events."""
        self.writer.close()


class WandB:
    """The same scalars in a Weights & Biases run named after the directory; resuming continues it."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        name = directory.resolve().name
        run_id = f"{name}-{seed_from('wandb', str(directory.resolve())):x}"
        config: dict[str, Any] = plan.recipe.model_dump(mode="json")
        self.run: Any = wandb.init(
            project="saerelay", name=name, id=run_id, dir=str(directory), config=config, resume="allow"
        )

    def log(self, leg_id: str, progress: engine.Progress) -> None:
        """Send one point of a leg."""
        values = {f"{name}/{leg_id}": getattr(progress, name) for name in SHOWN}
        values[f"age/{leg_id}"] = progress.age
        self.run.log(values)

    def close(self) -> None:
        """Wait until every point has been sent."""
        self.run.finish()


def check_installed(plan: Plan) -> None:
    """Raise RecipeError if a recipe asks for a logger that is not installed."""
    for name in plan.recipe.train.loggers:
        if find_spec(name) is None:
            raise RecipeError(
                f"train.loggers names {name}, which is not installed; install it with pip install 'saerelay[{name}]', "
                "or remove it from train.loggers (metrics.jsonl is always written)"
            )


@contextmanager
def loggers_of(plan: Plan, paths: RunDirectory) -> Iterator[Watcher]:
    """The loggers that a recipe names; open them before training cuts the log back to the saved state."""
    logged_ages = _ages_told(paths) if plan.recipe.train.loggers else {}
    loggers: list[TensorBoard | WandB] = []
    try:
        for name in plan.recipe.train.loggers:
            loggers.append(_opened(name, plan, paths))
        yield Loggers(loggers, logged_ages)
    finally:
        for logger in loggers:
            try:
                logger.close()
            except Exception as error:
                _warn_of(logger, error)


def _ages_told(paths: RunDirectory) -> dict[str, int]:
    """The last age of each leg that loggers were told of; it is also saved.

    How to see this: training cuts the log back to the saved state, and logs the same points again. If it is killed
    before it reaches the point where it was the first time, the log says less than the loggers were told.
    """
    told = last_ages(paths.metrics)
    if paths.metrics.is_file():
        for leg_id, age in last_ages(paths.told).items():
            told[leg_id] = max(age, told.get(leg_id, 0))
    lines = [json.dumps({"leg": leg_id, "age": age}) + "\n" for leg_id, age in told.items()]
    write_text(paths.told, "".join(lines))
    return told


def _opened(name: str, plan: Plan, paths: RunDirectory) -> "TensorBoard | WandB":
    """A logger; RecipeError if it cannot be opened."""
    try:
        return TensorBoard(paths.root) if name == "tensorboard" else WandB(plan, paths.root)
    except OSError:
        raise
    except Exception as error:
        raise RecipeError(
            f"train.loggers: {name} cannot be opened ({type(error).__name__}: {error}); set it up, or remove it "
            "from train.loggers (metrics.jsonl is always written)"
        ) from error
