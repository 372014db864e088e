"""TensorBoard and Weights & Biases, where they are installed and a recipe asks for them (train.loggers)."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from saerelay.errors import RecipeError
from saerelay.planning.plan import Plan
from saerelay.spec import seed_from
from saerelay.training import engine
from saerelay.training.progress import Watcher

SHOWN = ("loss", "fvu", "l0", "n_dead", "learning_rate")


class Several:
    """Tells several watchers."""

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


class TensorBoard:
    """Scalars by leg over the leg's own age, in <run>/tensorboard."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory / "tensorboard"))

    def tick(self, cursor: int) -> None:
        """See `Watcher`."""

    def leg(self, leg_id: str, progress: engine.Progress) -> None:
        """See `Watcher`."""
        for name in SHOWN:
            self.writer.add_scalar(f"{name}/{leg_id}", getattr(progress, name), progress.age)
        self.writer.flush()


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

    def tick(self, cursor: int) -> None:
        """See `Watcher`."""

    def leg(self, leg_id: str, progress: engine.Progress) -> None:
        """See `Watcher`."""
        values = {f"{name}/{leg_id}": getattr(progress, name) for name in SHOWN}
        self.run.log(values | {f"age/{leg_id}": progress.age})


def check_installed(plan: Plan) -> None:
    """Refuse a recipe that asks for a logger which is not there."""
    for name in plan.recipe.train.loggers:
        if find_spec(name) is None:
            raise RecipeError(
                f"train.loggers asks for {name}, which is not installed; pip install 'saerelay[{name}]', or take it "
                "out (metrics.jsonl is always written)"
            )


def asked_for(plan: Plan, directory: Path) -> list[Watcher]:
    """The loggers a recipe names."""
    makers = {"tensorboard": lambda: TensorBoard(directory), "wandb": lambda: WandB(plan, directory)}
    return [makers[name]() for name in plan.recipe.train.loggers]
