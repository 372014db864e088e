"""From a recipe to a finished run: settle the plan, take the directory, tokenise, train."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from saerelay.analysis.evaluate import wants_ce
from saerelay.analysis.suite import Suite, load
from saerelay.errors import RunDirectoryError, SaeRelayError
from saerelay.files import reason, write_text
from saerelay.lm.identity import check_same_model
from saerelay.planning.choose import written_out
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import Recipe
from saerelay.planning.toml import annotated_toml
from saerelay.runs.directory import RunDirectory, sole_writer
from saerelay.training.trackers import check_installed
from saerelay.training.train import train_plan
from saerelay.workflows.activations import open_stream, open_validation, tokenise
from saerelay.workflows.settle import (
    check_directory,
    check_disk,
    extended_plan,
    new_plan,
    plan_run,
    resumed_plan,
    with_canonical_parents,
)
from saerelay.workflows.survey import survey_run
from saerelay.workflows.watching import watching


def train_run(
    recipe: Recipe, out: str | Path, *, resume: bool = False, extend: bool = False, console: Console | None = None
) -> Suite:
    """Train everything a recipe asks for into a new directory; returns its suite.

    `resume` continues a run that was interrupted (and starts over where there is no state yet); `extend` adds legs, or
    tokens to finished legs, to a run, and continues an extension that was interrupted. Raises RunDirectoryError if
    `out` holds something else or cannot be written to, DataError if the corpus is too short, LegFailed if a leg had to
    stop, Interrupted after Ctrl-C.
    """
    paths = RunDirectory(Path(out))
    fresh = not paths.root.exists()
    check_directory(paths, resume=resume or extend)
    with sole_writer(paths.root):
        with _nothing_left_on_error(paths.root, fresh):
            plan = _settled_plan(recipe, paths, extend=extend, console=console)
            check_same_model(plan.recipe.model, paths.model_digest, begin=True)
            check_installed(plan)
            wants_ce(plan)
            check_disk(plan, paths)
            corpus = tokenise(plan, paths, console)
            stream = open_stream(plan, corpus.train)
            if extend:
                paths.cost.unlink(missing_ok=True)  # which says that the run has ended
            plan.save(paths.plan)
            write_text(paths.recipe, annotated_toml(plan.recipe))  # see `mend_recipe`
        validation = None
        if any(leg.goal.predicted_fvu for leg in plan.legs):
            validation = open_validation(plan, stream, corpus)
        try:
            with watching(plan, paths, console) as watcher:
                train_plan(plan, paths, stream, watcher, stream.device, validation)
        except OSError as error:
            raise RunDirectoryError(f"{reason(error)}. This continues the run: {paths.resume_command}") from None
        finally:
            note = stream.outliers.left_out().note
            if console and note:
                console.print(f"note: {note}", markup=False)
    return load(paths.root)


def _settled_plan(recipe: Recipe, paths: RunDirectory, *, extend: bool, console: Console | None) -> Plan:
    """The plan of a new run, the old plan of one that is resumed, or the old one with what an extension adds."""
    if not paths.plan.is_file():
        if recipe.plan.surveyed:
            survey, choice = survey_run(recipe, paths, console)
            chosen = plan_run(written_out(recipe, survey, choice))
            return chosen.changed(recipe=recipe)
        return with_canonical_parents(new_plan(recipe, paths), paths)
    if extend:
        return with_canonical_parents(extended_plan(recipe, paths), paths)
    return resumed_plan(recipe, paths)


@contextmanager
def _nothing_left_on_error(root: Path, fresh: bool) -> Iterator[None]:
    """Remove a new run's directory if it could not even begin, unless a survey was made in it."""
    try:
        yield
    except (SaeRelayError, OSError, MemoryError, KeyboardInterrupt):
        surveyed = (root / "survey").exists() or (root / "survey.json").exists()
        if fresh and not surveyed:
            shutil.rmtree(root, ignore_errors=True)
        raise
