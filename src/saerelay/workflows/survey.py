"""Make the survey behind `preset = "auto"`, if there is none yet, and choose the legs from it."""

import shutil
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory

from rich.console import Console

from saerelay.errors import Interrupted, PlanError
from saerelay.files import remove_directory, write_text
from saerelay.lm.facts import read_facts
from saerelay.lm.identity import check_same_model
from saerelay.lm.source import pinned
from saerelay.planning.choose import Choice, choose
from saerelay.planning.recipe import Recipe
from saerelay.planning.survey import Survey, survey_plan
from saerelay.planning.toml import annotated_toml
from saerelay.runs.directory import RunDirectory, read_plan
from saerelay.training.train import train_plan
from saerelay.workflows.activations import open_stream, open_validation, tokenise
from saerelay.workflows.pilots import measure_survey
from saerelay.workflows.room import check_block, memory_allowed
from saerelay.workflows.watching import status, watching


def survey_run(recipe: Recipe, paths: RunDirectory, console: Console | None) -> tuple[Survey, Choice]:
    """Survey a recipe's layers, and choose the legs from the survey; a finished survey is not made again.

    It lives in `survey/` in the run directory until it is done, and is resumed there after an interruption.
    """
    kinds = recipe.sites.kinds
    if len(kinds) > 1 or kinds[0].module_out:
        raise PlanError(
            'preset = "auto" surveys SAEs of one kind of site, but sites.module and sites.module_out ask for '
            f'{", ".join(f"{kind}" for kind in kinds)}; choose another one, such as "hub"'
        )
    if recipe.plan.tier.tiers or recipe.plan.hop.parents:
        raise PlanError(
            'plan.tiers and plan.parents do not work with preset = "auto"; leave them out, or choose another preset, '
            'such as "hub"'
        )
    facts = read_facts(recipe.model)
    memory = memory_allowed(recipe, facts)
    inner = RunDirectory(paths.survey_run)
    plan = survey_plan(recipe, facts, memory)
    check_block(plan)
    survey = Survey.load_if_any(paths.survey)
    # A survey can be used for any budget and any ratio.
    if survey is not None and survey_plan(survey.asked, facts, memory) == plan:
        remove_directory(inner.root)  # a process may have been killed while removing it
        return survey, choose(recipe, facts, survey, memory)

    if not inner.plan.is_file() or read_plan(inner.root) != plan:
        shutil.rmtree(inner.root, ignore_errors=True)
        shutil.rmtree(paths.tokens, ignore_errors=True)
        write_text(inner.recipe, annotated_toml(recipe))
        plan.save(inner.plan)
    check_same_model(pinned(recipe.model, facts), paths.model_digest, begin=True)
    corpus = tokenise(plan, paths, console, at_least=recipe.plan.root_tokens)
    with status(console, "loading the language model"):
        stream = open_stream(plan, corpus)
    if console:
        console.print("surveying the layers")
    try:
        with watching(plan, inner, console) as watcher:
            train_plan(plan, inner, stream, watcher, stream.device)
        with status(console, "carrying the pilots to other layers"):
            survey = measure_survey(recipe, plan, inner, stream, open_validation(plan, stream, corpus))
    except (Interrupted, KeyboardInterrupt):
        command = f"saerelay train {quote(str(inner.recipe))} --out {quote(str(paths.root))} --resume"
        raise Interrupted(command) from None
    survey.save(paths.survey)
    remove_directory(inner.root)
    return survey, choose(recipe, facts, survey, memory)


def survey_once(recipe: Recipe, console: Console | None) -> tuple[Survey, Choice]:
    """Make a survey and choose the legs from it, leaving no files behind."""
    with TemporaryDirectory(prefix="saerelay-survey-") as directory:
        try:
            return survey_run(recipe, RunDirectory(Path(directory)), console)
        except Interrupted:
            raise KeyboardInterrupt from None
