"""`saerelay train`: settle the plan, take the directory, tokenise, train.

`train_run` is what the command, `sr.train_run`, `sr.train_suite`, `saerelay hop` and `saerelay demo` call.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from saerelay.analysis.metrics import wants_ce
from saerelay.analysis.suite import Suite, load
from saerelay.data.corpus import Corpus
from saerelay.data.stream import LiveStream
from saerelay.errors import RecipeError, RunDirectoryError, SaeRelayError
from saerelay.files import reason, write_text
from saerelay.lm.identity import check_same_model
from saerelay.lm.source import pinned
from saerelay.planning.choose import written_out
from saerelay.planning.plan import Plan
from saerelay.planning.ranks import check_groups
from saerelay.planning.recipe import Recipe
from saerelay.planning.toml import annotated_toml
from saerelay.rank import restarts_will_fail
from saerelay.runs.directory import RunDirectory, sole_writer
from saerelay.runs.state import state_facts
from saerelay.team import Team
from saerelay.training.progress import Watcher
from saerelay.training.run_state import machine
from saerelay.training.trackers import Several, check_installed
from saerelay.training.train import train_plan
from saerelay.views.tables.plan import inherited_note
from saerelay.workflows.activations import joined_stream, open_stream, open_validation, tokenise
from saerelay.workflows.room import check_disk
from saerelay.workflows.settle import (
    check_directory,
    extended_plan,
    new_plan,
    plan_run,
    resumed_plan,
    with_canonical_parents,
)
from saerelay.workflows.survey import survey_run
from saerelay.workflows.watching import status, watching


class Start(NamedTuple):
    """A run's plan, tokens and activations, with which it begins or continues."""

    plan: Plan
    corpus: Corpus
    stream: LiveStream


def train_run(
    recipe: Recipe, out: str | Path, *, resume: bool = False, extend: bool = False, console: Console | None = None
) -> Suite:
    """Train all SAEs of a recipe into a new run directory; returns its suite.

    `resume` continues an interrupted run (from the start if there is no state yet); `extend` adds legs, or tokens of
    finished legs, to a run, and continues an interrupted extension. Called in each of several processes started by
    torchrun, it trains a share of the legs in each; an existing run is then resumed without `resume`.

    Raises RunDirectoryError if `out` holds other files or cannot be written to, DataError if the corpus is too short,
    LegFailed if a leg had to stop, Interrupted after Ctrl-C, TeamError if another process is gone.
    """
    paths = RunDirectory(Path(out))
    team = Team.joined()
    if not team.leads:
        console = None
    start: Start | None = None
    with ExitStack() as held:

        def lead() -> Plan:
            """Take the directory and settle the plan: rank 0 does this before the others begin."""
            nonlocal start
            _check_ranks(recipe, team)
            goes_on = resume or extend or (team.control is not None and paths.plan.is_file())
            fresh = not paths.root.exists()
            check_directory(paths, resume=goes_on)
            held.enter_context(sole_writer(paths.root))
            with _nothing_left_on_error(paths, fresh):
                start = _begun(recipe, paths, extend=extend, console=console)
            return start.plan

        plan = team.once(lead)
        team.check_shared(paths.root)
        stream, validation = _streams(plan, paths, start, team)
        watcher: Watcher = Several([])
        if team.leads:
            watcher = held.enter_context(watching(plan, paths, console))
        _say_what_differs(team, plan, console)
        try:
            train_plan(plan, paths, stream, watcher, stream.device, validation, team)
        except OSError as error:
            raise RunDirectoryError(f"{reason(error)}. This continues the run: {paths.resume_command}") from None
        finally:
            note = stream.outliers.left_out().note
            if console and note:
                console.print(f"note: {note}", markup=False)
    return load(paths.root)


def _check_ranks(recipe: Recipe, team: Team) -> None:
    """Raise RecipeError or PlanError if this number of ranks cannot train the recipe together."""
    if team.size > 1 and ":" in recipe.model.device:
        raise RecipeError(
            f'model.device is "{recipe.model.device}", but each of {team.size} ranks takes a GPU of its own; '
            'write "cuda" or "auto"'
        )
    if recipe.model.tensor_parallel > 1 and recipe.plan.surveyed:
        raise RecipeError(
            'a survey (plan.preset = "auto") runs in one process, but model.tensor_parallel is '
            f"{recipe.model.tensor_parallel}; choose another preset"
        )
    check_groups(recipe.model, team.size)


def _begun(recipe: Recipe, paths: RunDirectory, *, extend: bool, console: Console | None) -> Start:
    """Prepare a run's plan, tokens and language model; plan.json is written once all of them are ready."""
    plan = _settled_plan(recipe, paths, extend=extend, console=console)
    note = inherited_note(plan)
    if console and note:
        console.print(f"note: {note}", markup=False)
    check_same_model(pinned(plan.recipe.model, plan.facts), paths.model_digest, begin=True)
    check_installed(plan)
    wants_ce(plan)
    check_disk(plan, paths)
    corpus = tokenise(plan, paths, console)
    saved = state_facts(paths.state)
    cursor = saved["cursor"] if saved else 0
    with status(console, "loading the language model"):
        stream = open_stream(plan, corpus, cursor)
    if extend:
        paths.cost.unlink(missing_ok=True)  # cost.json marks a finished run
    plan.save(paths.plan)
    write_text(paths.recipe, annotated_toml(plan.recipe))  # see `mend_recipe`
    return Start(plan, corpus, stream)


def _streams(plan: Plan, paths: RunDirectory, start: Start | None, team: Team) -> tuple[LiveStream, LiveStream | None]:
    """Return the streams of the activations to train on, and to measure goals on if the plan has goals."""
    corpus = start.corpus if start else Corpus.open(paths.tokens)
    if team.control is None:
        assert start
        stream = start.stream
    else:
        stream = joined_stream(plan, corpus, start.stream if start else None, team)
    if not plan.has_goals:
        return stream, None
    return stream, open_validation(plan, stream, corpus)


def _say_what_differs(team: Team, plan: Plan, console: Console | None) -> None:
    """Print how the machines of a team differ, and what torchrun's environment lacks for its restarts to work."""
    machines = team.gather(machine(torch.device(plan.facts.device)))
    for rank, other in enumerate(machines):
        different = []
        for key, value in machines[0].items():
            if other.get(key) != value:
                different.append(f"{key}: {value} and {other.get(key)}")
        if different and console:
            console.print(
                f"note: rank 0 and rank {rank} differ ({'; '.join(different)}): the bits of a leg depend on its rank",
                markup=False,
            )
    if console and restarts_will_fail():
        console.print(
            "note: torchrun was started with --max-restarts, and its restarts fail unless its environment has "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )


def _settled_plan(recipe: Recipe, paths: RunDirectory, *, extend: bool, console: Console | None) -> Plan:
    """Return the plan of a new run, the saved plan of a resumed run, or the saved plan with the extension added."""
    is_new = not paths.plan.is_file()
    if is_new and recipe.plan.surveyed:
        survey, choice = survey_run(recipe, paths, console)
        explicit = written_out(recipe, survey, choice)
        chosen = plan_run(explicit)
        write_text(paths.planned, annotated_toml(explicit))
        return chosen.changed(recipe=recipe)
    with status(console, "planning"):
        if is_new:
            return with_canonical_parents(new_plan(recipe, paths), paths)
        if extend:
            return with_canonical_parents(extended_plan(recipe, paths), paths)
        return resumed_plan(recipe, paths)


@contextmanager
def _nothing_left_on_error(paths: RunDirectory, fresh: bool) -> Iterator[None]:
    """Remove a new run's directory if preparing the run fails, unless it holds a survey."""
    try:
        yield
    except (SaeRelayError, OSError, MemoryError, KeyboardInterrupt):
        if fresh and not paths.is_surveyed:
            shutil.rmtree(paths.root, ignore_errors=True)
        raise
