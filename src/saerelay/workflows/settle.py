"""Settle the plan of a run before it starts: compile it from a recipe, resume it, or extend it.

`launch` calls `new_plan`, `resumed_plan` or `extended_plan`; commands that only show or time a plan call `plan_run`.
"""

import hashlib
import shutil
import warnings
from itertools import pairwise
from pathlib import Path
from shlex import quote
from typing import Any

from saerelay.data.sources import tokens_file
from saerelay.data.text import check_text
from saerelay.errors import FormatError, RunDirectoryError
from saerelay.files import odd_file, write_text
from saerelay.interop import load_dictionary, own, write_dictionary
from saerelay.interop.hub import local
from saerelay.interop.names import site_named
from saerelay.interop.origin import Origin
from saerelay.lm.facts import read_facts, resolve_device
from saerelay.lm.ports import module_paths, other_module
from saerelay.lm.source import pinned
from saerelay.planning.compile import compile_plan
from saerelay.planning.leg import External
from saerelay.planning.legs import parts_of
from saerelay.planning.plan import Plan
from saerelay.planning.presets import Place
from saerelay.planning.recipe import Recipe
from saerelay.planning.toml import annotated_toml
from saerelay.runs.directory import RunDirectory, read_plan
from saerelay.runs.documents.training import DictionaryInfo
from saerelay.runs.state import state_facts
from saerelay.runs.suite import PublishedSuite
from saerelay.sae.dictionary import Dictionary
from saerelay.spec import few_of
from saerelay.workflows.room import check_block, memory_allowed

FREE_TO_CHANGE = {
    "train": ("checkpoint_every", "loggers", "memory_gib"),
    "evaluate": ("tokens", "ce"),
}
"""Keys that may differ between a run's recipe and the recipe it is resumed with."""
FREE_TO_EXTEND = {("sites", "layers"), ("data", "epochs")}
"""Further keys that an extension may change, besides those of [plan]; no order of reading depends on `epochs`."""
LEFT_BY_A_FAILED_START = {
    "state",
    "tokens",
    "tokens.new",
    ".tokens.old",
    ".tokens.new.partial",
    "run.toml",
    ".run.toml.tmp",
    ".plan.json.tmp",
    ".saerelay-demo",
    "..saerelay-demo.tmp",
    "survey",
    "survey.json",
    ".survey.json.tmp",
    "planned.toml",
    ".planned.toml.tmp",
    "parents",
    "model",
}


def check_data(recipe: Recipe) -> None:
    """Raise DataError if text or tokens that a recipe names do not exist, or a directory has no text in it.

    A plan itself needs none, nor does a resumed run.
    """
    check_text(recipe.data.text)
    if recipe.data.tokens:
        tokens_file(recipe.data.tokens)


def plan_run(recipe: Recipe, finished: Plan | None = None) -> Plan:
    """Compile a recipe for the model it names; reads the model's configuration, but no weights.

    With a `finished` plan, the recipe's additions are placed after its end, and its model is that plan's: at the same
    commit, if it is on the hub, though the name may have moved on to another one.
    """
    facts = read_facts(pinned(recipe.model, finished.facts) if finished else recipe.model)
    named = [leg.parent for leg in recipe.plan.legs if "/" in leg.parent]
    parents = None
    if recipe.plan.hop.parents:
        parents = parents_in(Path(recipe.plan.hop.parents), recipe)
        named += parents.values()
    externals = {reference: describe_external(reference, recipe) for reference in named}
    plan = compile_plan(
        recipe,
        facts,
        externals=externals,
        parents=parents,
        memory_bytes=memory_allowed(recipe, facts),
        finished=finished,
    )
    check_block(plan)
    return plan


def parents_in(directory: Path, recipe: Recipe) -> dict[Place, str]:
    """Return the directory of a finished run's SAE for each place (kind, layer, L0) that a recipe asks for.

    Raises RunDirectoryError if there is no run in `directory`.
    """
    suite = PublishedSuite(directory, read_plan(directory))
    sites = recipe.sites
    wanted = {recipe.dictionary.l0, *recipe.plan.tier.tiers}
    parents: dict[Place, str] = {}
    for leg in suite.final_legs:
        asked_for = leg.kind in sites.kinds and (sites.layers == "all" or leg.layer in sites.layers)
        if asked_for and leg.dictionary.l0 in wanted:
            name = str(suite.directory.leg(leg.id))
            reference = name if "/" in name else f"./{name}"
            parents.setdefault((leg.kind, leg.layer, leg.dictionary.l0), reference)
    return parents


# --- parents outside the plan ------------------------------------------------------------------------------------


def describe_external(reference: str, recipe: Recipe) -> External:
    """Return what a plan must know about a parent outside it: a dictionary in any format.

    Raises FormatError if the parent reads a module of this model that is not a site; warns if it was trained on text
    prepared in another way.
    """
    dictionary, origin = _load_with_site(reference)
    assert origin.site
    _check_module(reference, origin, recipe)
    _compare_text(reference, origin, recipe)
    return External(
        layer=origin.site.layer,
        module=origin.site.module,
        module_out=origin.module_out,
        architecture=dictionary.architecture,
        n_latents=dictionary.n_latents,
        d_model=dictionary.d_model,
        k=dictionary.k,
        skip_connection=dictionary.W_skip is not None,
        l0=origin.l0,
        model=origin.model,
        carried="carried_from" in origin.provenance,
        path=str(local(reference).resolve()),
    )


def _check_module(reference: str, origin: Origin, recipe: Recipe) -> None:
    """Raise FormatError if a parent's files name a module whose output is not what its site reads in this model."""
    assert origin.site
    if not origin.module_path or site_named(origin.module_path) != origin.site:
        return
    if other_module(recipe.model, origin.site, origin.module_path):
        here = module_paths(recipe.model, [origin.site])[origin.site]
        raise FormatError(
            f"{reference}: reads what the module {origin.module_path} returns, and in "
            f'"{recipe.model.name}" that is not what {origin.site} reads ({here}: what is added to '
            "the residual stream as it is). saerelay has no such site, so this SAE cannot be used "
            "with this model."
        )


def _compare_text(reference: str, origin: Origin, recipe: Recipe) -> None:
    """Warn if a parent was trained on sequences of another form than the recipe's."""
    differences = []
    if origin.prepend_bos is not None and origin.prepend_bos != recipe.data.prepend_bos:
        without = "with" if origin.prepend_bos else "without"
        now = str(recipe.data.prepend_bos).lower()
        differences.append(f"on sequences {without} a BOS token in front, but data.prepend_bos is {now}")
    if origin.context and origin.context != recipe.data.context:
        differences.append(f"on {origin.context} tokens at a time, but data.context is {recipe.data.context}")
    if differences:
        warnings.warn(f"{reference}: was trained {'; '.join(differences)}", stacklevel=2)


def _load_with_site(reference: str) -> tuple[Dictionary, Origin]:
    dictionary, origin = load_dictionary(reference)
    if not origin.site:
        raise FormatError(
            f"{reference}: its files do not say which layer it reads; `saerelay import {reference} --layer N --out "
            "DIR` makes a copy that does, for parent = DIR"
        )
    return dictionary, origin


def with_canonical_parents(plan: Plan, paths: RunDirectory) -> Plan:
    """Return the plan with parents of other formats copied into the run in canonical form, the only one training reads.

    Parents in our own format are read where they are.
    """
    externals = {}
    for reference, external in plan.externals.items():
        if not own.recognises(paths.root / external.path):
            digest = hashlib.blake2b(reference.encode(), digest_size=8).hexdigest()
            dictionary, origin = _load_with_site(reference)
            write_dictionary(paths.root / "parents" / digest, dictionary, origin, own.NAME)
            external = external.changed(path=f"parents/{digest}")
        externals[reference] = external
    return plan.changed(externals=externals)


# --- a run directory -----------------------------------------------------------------------------------------------


def check_directory(paths: RunDirectory, *, resume: bool) -> None:
    """Refuse a directory that holds another run, or anything else, before touching it."""
    if not paths.root.exists():
        return
    if not paths.root.is_dir():
        raise RunDirectoryError(f"{paths.root} is a file; choose another --out")
    odd = odd_file(paths.root, deep=True)
    if odd:
        raise RunDirectoryError(f"{odd}: not a regular file; remove it")
    if paths.plan.is_file():
        if not resume:
            raise RunDirectoryError(
                f"{paths.root} already holds a run; continue it with --resume, or choose another --out. "
                f"This continues it: {paths.resume_command}"
            )
        return
    others = [path.name for path in paths.root.iterdir() if path.name not in LEFT_BY_A_FAILED_START]
    if others:
        raise RunDirectoryError(f"{paths.root} is not empty and holds no run ({others[0]}, ...); choose another --out")


def mend_recipe(root: Path) -> None:
    """Write run.toml again if a process was killed between writing plan.json and run.toml."""
    paths = RunDirectory(root)
    if not paths.plan.is_file():
        return
    if paths.recipe.is_file() and paths.recipe.stat().st_mtime_ns >= paths.plan.stat().st_mtime_ns:
        return
    write_text(paths.recipe, annotated_toml(read_plan(paths.root).recipe))


def new_plan(recipe: Recipe, paths: RunDirectory) -> Plan:
    """Return the plan of a new run, and remove tokens left by a run that never began (perhaps of another recipe).

    Raises RunDirectoryError if such a run left a survey: it took long, and its cost is not that of this recipe's run.
    """
    if paths.is_surveyed:
        raise RunDirectoryError(
            f'{paths.root} holds the survey of a recipe with preset = "auto", and this recipe does not plan from it; '
            "choose another --out, or remove this directory"
        )
    plan = plan_run(recipe)
    shutil.rmtree(paths.tokens, ignore_errors=True)
    return plan


def resumed_plan(recipe: Recipe, paths: RunDirectory) -> Plan:
    """Return the plan that a run was begun with, with the recipe's keys that are free to change, and today's device.

    Raises ModelError if the recipe names a device that is not available.
    """
    old = read_plan(paths.root)
    _check_same(old, recipe, paths)
    sections: dict[str, Any] = {}
    for name, keys in FREE_TO_CHANGE.items():
        now = getattr(recipe, name)
        sections[name] = getattr(old.recipe, name).changed(**{key: getattr(now, key) for key in keys})
    facts = old.facts.changed(device=str(resolve_device(recipe.model.device)))
    return old.changed(recipe=old.recipe.changed(**sections), facts=facts)


def extended_plan(recipe: Recipe, paths: RunDirectory) -> Plan:
    """Return the plan of a finished run with the recipe's additions: legs, layers, or tokens of a leg.

    For an interrupted extension, it is the plan that the extension was begun with.
    """
    old = read_plan(paths.root)
    is_in_training = not paths.cost.is_file()
    if is_in_training and not _differences(old, recipe):
        return resumed_plan(recipe, paths)
    _check_same(old, recipe, paths, extending=True)
    if recipe.plan.surveyed:
        raise RunDirectoryError(
            f'{paths.root}: preset = "auto" chooses the legs of a new run, not those of an extension. '
            f"{_written_legs(paths)}"
        )
    saved = state_facts(paths.state)
    if saved is None or saved["cursor"] < old.n_tokens:
        raise RunDirectoryError(
            f"{paths.root} is not finished; finish it before extending it. This continues it: {paths.resume_command}"
        )
    plan = plan_run(recipe, finished=old)
    _check_goals(plan, old, paths)
    if plan.legs == old.legs:
        was_extended_by_it = not _differences(old, recipe) and plan_run(recipe).legs != old.legs
        if was_extended_by_it:  # and killed before it was told so
            return resumed_plan(recipe, paths)
        raise RunDirectoryError(
            f"{paths.root}: the recipe adds nothing to this run; add legs, layers or tokens to extend it"
        )
    return plan


def _written_legs(paths: RunDirectory) -> str:
    """Say how a run whose legs a survey chose is extended."""
    if not paths.planned.is_file():
        return "Write [[plan.legs]] into the recipe: those that the run has (see plan.json), and what is to be added"
    command = f"saerelay train {quote(str(paths.planned))} --out {quote(str(paths.root))} --extend"
    return (
        f"Raise tokens or add legs in {paths.planned}, where the legs of this run are written out, and then: {command}"
    )


def _check_goals(plan: Plan, old: Plan, paths: RunDirectory) -> None:
    """Raise RunDirectoryError if legs that ended at their goal are to be trained further towards the same goal."""
    if not plan.recipe.plan.stop:
        return
    reached = []
    for first in old.legs:
        for before, leg in pairwise(parts_of(first, plan.legs)):
            goal, goal_before = leg.goal.goal_fvu, before.goal.goal_fvu
            if old.has(leg.id) or not goal or not goal_before or goal < goal_before:
                continue
            info = DictionaryInfo.load_if_any(paths.leg(before.id) / "dictionary.json")  # a failed leg has none
            if info and info.tokens < before.budget_tokens:
                reached.append(before.id)
    if reached:
        raise RunDirectoryError(
            f"{paths.root}: the recipe gives more tokens to legs that have reached their goal and so ended early: "
            f"{few_of(reached)}; lower their goal_fvu, or set stop = false in [plan] to train on all tokens"
        )


def _check_same(old: Plan, new: Recipe, paths: RunDirectory, *, extending: bool = False) -> None:
    """Raise RunDirectoryError if the recipes differ in fixed keys; an extension may change the layers and the plan."""
    lines = _differences(old, new, extending=extending)
    if not lines:
        return
    continued = f"This continues the run as it was begun: {paths.resume_command}"
    if extending:
        remedy = (
            "an extension adds layers, legs or tokens; set these keys back to what the run has, or choose another --out"
        )
    elif _differences(old, new, extending=True):
        remedy = f"choose another --out. {continued}"
    else:
        remedy = f"choose another --out, or, to add this to the run when it is finished, use --extend. {continued}"
    raise RunDirectoryError("\n".join([f"{paths.root} was begun with another recipe:", *lines, remedy]))


def _differences(old: Plan, new: Recipe, *, extending: bool = False) -> list[str]:
    """Return the differences between a run's recipe and another recipe, one line per key."""
    before = old.recipe.model_dump(mode="json")
    after = new.model_dump(mode="json")
    if not new.plan.roots and old.extended_at:  # an extension takes its roots from the run it extends
        after["plan"]["roots"] = before["plan"]["roots"]
    if extending and new.data.block_tokens in ("auto", old.block_tokens):  # it stays that of the run
        after["data"]["block_tokens"] = before["data"]["block_tokens"]
    lines = []
    for section, values in after.items():
        for key, value in values.items():
            free = key in FREE_TO_CHANGE.get(section, ())
            if extending:
                free = free or section == "plan" or (section, key) in FREE_TO_EXTEND
            if not free and before[section].get(key) != value:
                lines.append(f"  {section}.{key}: {before[section].get(key)!r} in the run, {value!r} in the recipe")
    return lines
