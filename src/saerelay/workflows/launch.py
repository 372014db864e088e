"""From a recipe to a finished run: compile it, take the directory, tokenise, train."""

import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console

from saerelay.analysis.metrics import wants_ce
from saerelay.analysis.suite import Suite, load
from saerelay.data.cache import ActivationCache
from saerelay.data.corpus import Corpus, prepare
from saerelay.data.stream import LM_BATCH_TOKENS, LiveStream
from saerelay.errors import DataError, FormatError, Interrupted, RunDirectoryError, SaeRelayError
from saerelay.files import write_text
from saerelay.interop import load_dictionary
from saerelay.interop.hub import local
from saerelay.lm.facts import read_facts
from saerelay.lm.model import LanguageModel, load_model
from saerelay.lm.tokens import load_tokenizer
from saerelay.planning.choose import Choice, choose, written_out
from saerelay.planning.compile import compile_plan
from saerelay.planning.cost import plan_cost
from saerelay.planning.facts import ModelFacts
from saerelay.planning.plan import External, Plan
from saerelay.planning.recipe import Recipe
from saerelay.planning.toml import annotated_toml
from saerelay.planning.survey import Survey, survey_plan
from saerelay.runs.directory import RunDirectory, read_plan, sole_writer
from saerelay.runs.state import state_facts
from saerelay.spec import format_count
from saerelay.training.engine import Trainee
from saerelay.training.progress import LiveTable, PlainLog, Watcher
from saerelay.training.trackers import Several, asked_for, check_installed
from saerelay.training.train import HELD_OUT_ROWS, train_plan
from saerelay.training.run_state import machine
from saerelay.workflows.pilots import measure_survey


def plan_run(run: Recipe, finished: Plan | None = None) -> Plan:
    """Compile a recipe for the model it names: reads the model's configuration, no weights.

    With a `finished` plan, what the recipe adds to it is placed after its end.
    """
    facts = read_facts(run.model)
    externals = {spec.parent: describe_external(spec.parent) for spec in run.plan.legs if "/" in spec.parent}
    return compile_plan(run, facts, externals=externals, memory_bytes=memory_allowed(run, facts), finished=finished)


def memory_allowed(run: Recipe, facts: ModelFacts) -> float:
    """Bytes that the training state of all live legs may take."""
    return run.train.memory_gib * 2**30 or 0.7 * device_memory(facts.device)


def describe_external(reference: str) -> External:
    """What a plan must know of a parent outside it: a dictionary of any format."""
    dictionary, origin = load_dictionary(reference)
    if not origin.site:
        raise FormatError(
            f"{reference}: its files do not say which layer it reads; `saerelay import {reference} --layer N --out "
            "DIR` makes a copy that does, for parent = DIR"
        )
    return External(
        layer=origin.site.layer,
        module=origin.site.module,
        architecture=dictionary.architecture,
        n_latents=dictionary.n_latents,
        d_model=dictionary.d_model,
        k=dictionary.k,
        l0=origin.l0,
        model=origin.model,
        path=str(local(reference).resolve()),
    )


def device_memory(device: str) -> float:
    """Bytes of memory of a device, free or not."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def train_run(
    run: Recipe, out: str | Path, *, resume: bool = False, extend: bool = False, console: Console | None = None
) -> Suite:
    """Train everything a recipe asks for into a new directory; returns its suite.

    `resume` continues a run that was interrupted (and starts over where there is no state yet); `extend` adds legs, or
    tokens to finished legs, to a run. Raises RunDirectoryError if `out` holds something else, DataError if the corpus
    is too short, LegFailed if a leg had to stop, Interrupted after Ctrl-C.
    """
    paths = RunDirectory(Path(out))
    fresh = not paths.root.exists()
    check_directory(paths, resume=resume or extend)
    with sole_writer(paths.root):
        with remove_on_error(paths.root, fresh):
            plan = settle_plan(run, paths, extend=extend, console=console)
            check_installed(plan)
            wants_ce(plan)
            check_disk(plan, paths)
            corpus = tokenise(plan, paths, console)
            stream = open_stream(plan, corpus.train)
            plan.save(paths.plan)
            write_text(paths.recipe, annotated_toml(plan.recipe))
        validation = open_validation(plan, stream, corpus) if any(leg.predicted_fvu for leg in plan.legs) else None
        with watching(plan, paths, console) as watcher:
            train_plan(plan, paths, stream, watcher, stream.device, validation)
    return load(paths.root)


def check_directory(paths: RunDirectory, *, resume: bool) -> None:
    """Refuse a directory that holds another run, or anything else, before touching it."""
    if not paths.root.exists():
        return
    if not paths.root.is_dir():
        raise RunDirectoryError(f"{paths.root} is a file; choose another --out")
    ours = {"state", "tokens", "tokens.new", ".tokens.new.partial", ".plan.json.tmp", ".saerelay-demo"}
    ours |= {"survey", "survey.json", ".survey.json.tmp", "parent"}
    others = [p.name for p in paths.root.iterdir() if p.name not in ours]
    if paths.plan.is_file():
        if not resume:
            raise RunDirectoryError(
                f"{paths.root} already holds a run; continue it with --resume, or choose another --out"
            )
    elif others:
        raise RunDirectoryError(f"{paths.root} is not empty and holds no run ({others[0]}, ...); choose another --out")
    elif (paths.root / "state").exists() and not resume:
        raise RunDirectoryError(
            f"{paths.root} holds the remains of a run that never began; start it over with --resume"
        )


def settle_plan(run: Recipe, paths: RunDirectory, *, extend: bool, console: Console | None) -> Plan:
    """The plan of a new run, the old plan of one that is resumed, or the old one with what an extension adds."""
    if not paths.plan.is_file():
        if run.plan.surveyed:
            survey, choice = survey_run(run, paths, console)
            return plan_run(written_out(run, survey, choice)).changed(run=run)
        plan = plan_run(run)
        shutil.rmtree(paths.tokens, ignore_errors=True)  # of a run that never began, perhaps with another recipe
        return plan
    old = read_plan(paths.root)
    if not extend:
        check_same(old, run, paths, FREE_TO_CHANGE)
        free = {key: value for key, value in flat(run.model_dump()).items() if key in FREE_TO_CHANGE}
        return old.changed(run=Recipe.parse(nested(flat(old.recipe.model_dump()) | free), source="resume"))
    check_same(old, run, paths, FREE_TO_CHANGE | {"sites.layers"}, but="plan.")
    saved = state_facts(paths.state)
    if saved is None or saved["cursor"] < old.n_tokens:
        raise RunDirectoryError(f"{paths.root} is not finished; finish it with --resume before extending it")
    plan = plan_run(run, finished=old)
    if plan.legs == old.legs:
        raise RunDirectoryError(
            f"{paths.root}: the recipe adds nothing to this run; add legs, layers or tokens to extend it"
        )
    return plan


FREE_TO_CHANGE = {"train.checkpoint_every", "train.loggers", "train.memory_gib", "evaluate.tokens", "evaluate.ce"}


def check_same(old: Plan, run: Recipe, paths: RunDirectory, free: set[str], but: str = "\0") -> None:
    """A run goes on with the recipe it began with, `free` keys and those beginning with `but` aside."""
    before, after = flat(old.recipe.model_dump(mode="json")), flat(run.model_dump(mode="json"))
    watched = [key for key in before | after if key not in free and not key.startswith(but)]
    if changed := [key for key in watched if before.get(key) != after.get(key)]:
        lines = [f"  {key}: {before.get(key)!r} in the run, {after.get(key)!r} in the recipe" for key in changed]
        raise RunDirectoryError(
            f"{paths.root} was begun with another recipe:\n" + "\n".join(lines) + f"\nresume it with {paths.recipe}, "
            "choose another --out, or, to add legs or tokens to a finished run, use --extend"
        )


def nested(data: dict[str, Any]) -> dict[str, Any]:
    """Undo `flat`, one level deep.

    >>> nested({"a.b": 1, "a.c": 2})
    {'a': {'b': 1, 'c': 2}}
    """
    result: dict[str, Any] = {}
    for key, value in data.items():
        section, _, name = key.partition(".")
        result.setdefault(section, {})[name] = value
    return result


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as one with dotted keys.

    >>> flat({"a": {"b": 1}})
    {'a.b': 1}
    """
    result: dict[str, Any] = {}
    for key, value in data.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def check_disk(plan: Plan, paths: RunDirectory) -> None:
    """Refuse to begin what the disk cannot hold."""
    if paths.plan.is_file():
        return  # a run that goes on has taken its space
    needed, free = plan_cost(plan).disk_bytes, shutil.disk_usage(paths.root).free
    if needed > free:
        raise RunDirectoryError(
            f"{paths.root}: the run needs up to {needed / 2**30:.1f} GiB on disk and {free / 2**30:.1f} GiB are free; "
            "free space, choose another --out, or lower n_latents or the number of snapshots"
        )


def survey_run(run: Recipe, paths: RunDirectory, console: Console | None) -> tuple[Survey, Choice]:
    """What a survey measures of a recipe's layers, and the legs chosen by it; a finished survey is not made again.

    It lives in `survey/` of the run directory until it is done, and is resumed there after an interruption.
    """
    facts = read_facts(run.model)
    memory = memory_allowed(run, facts)
    plan, inner = survey_plan(run, facts, memory), RunDirectory(paths.root / "survey")
    survey = Survey.load_if_any(paths.survey)
    if survey is not None:
        if survey_plan(survey.asked, facts, memory) == plan:  # whatever the budget or the ratio was
            return survey, choose(run, facts, survey, memory)
    if not inner.plan.is_file() or read_plan(inner.root) != plan:
        shutil.rmtree(inner.root, ignore_errors=True)
        shutil.rmtree(paths.tokens, ignore_errors=True)
        write_text(inner.recipe, annotated_toml(run))
        plan.save(inner.plan)
    corpus = tokenise(plan, paths, console, at_least=run.plan.root_tokens)
    stream = open_stream(plan, corpus.train)
    if console:
        console.print("surveying the layers")
    try:
        with watching(plan, inner, console) as watcher:
            train_plan(plan, inner, stream, watcher, stream.device)
        survey = measure_survey(run, plan, inner, stream, open_validation(plan, stream, corpus))
    except (Interrupted, KeyboardInterrupt):
        again = f"saerelay train {quote(str(inner.recipe))} --out {quote(str(paths.root))} --resume"
        raise Interrupted(again) from None
    survey.save(paths.survey)
    shutil.rmtree(inner.root)
    return survey, choose(run, facts, survey, memory)


def survey_once(run: Recipe, console: Console | None) -> tuple[Survey, Choice]:
    """A survey, and the legs chosen by it, that leave no files behind."""
    with TemporaryDirectory(prefix="saerelay-survey-") as place:
        try:
            return survey_run(run, RunDirectory(Path(place)), console)
        except Interrupted:
            raise KeyboardInterrupt from None


def open_validation(plan: Plan, stream: LiveStream, corpus: Corpus) -> LiveStream:
    """Blocks of HELD_OUT_ROWS positions of the validation split."""
    context = plan.recipe.data.context
    small = plan.changed(block_tokens=context * math.ceil(HELD_OUT_ROWS / context))
    return LiveStream(stream.model or load_model(plan), corpus.validation, small)


def open_stream(plan: Plan, sequences: np.ndarray) -> LiveStream:
    """The plan's activations of sequences (N, context), with the language model, unless all of them are in data.cache.

    Raises DataError if the cache is damaged, or if what it lacks does not fit on its disk.
    """
    if not plan.recipe.data.cache:
        return LiveStream(load_model(plan), sequences, plan)
    cache = ActivationCache(plan)
    stream = LiveStream(None, sequences, plan, cache)
    needed = stream.uncached_bytes()
    place = next(folder for folder in (cache.folder, *cache.folder.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise DataError(
            f"{cache.folder}: this run adds {needed / 2**30:.1f} GiB of activations and {free / 2**30:.1f} GiB are "
            'free; free space, set data.cache to another disk or to "" (compute them again when needed), or read '
            "fewer tokens or layers"
        )
    if needed:
        stream.model = load_model(plan)
    return stream


def tokenise(plan: Plan, paths: RunDirectory, console: Console | None, *, at_least: int = 0) -> Corpus:
    """The run's tokens: those it has, if they are enough for the plan, or new ones that take their place.

    `at_least` so many are taken if the corpus has them.
    """
    data, context = plan.recipe.data, plan.recipe.data.context
    here = (paths.tokens / "corpus.json").is_file()
    if here and Corpus.open(paths.tokens).train.size * data.epochs >= plan.n_tokens:
        return Corpus.open(paths.tokens)
    tokenizer = None if data.tokens else load_tokenizer(plan.recipe.model)
    fresh = paths.tokens.with_name("tokens.new")
    shutil.rmtree(fresh, ignore_errors=True)
    with console.status("reading the corpus") if console else nullcontext() as status:
        prepare(
            plan.recipe,
            plan.facts,
            tokenizer,
            fresh,
            train_sequences=math.ceil(max(plan.n_tokens, at_least) / context),
            eval_sequences=math.ceil(plan.recipe.evaluate.tokens / context),
            progress=lambda n: status.update(f"reading the corpus: {format_count(n)} tokens") if status else None,
        )
    try:
        check_corpus(plan, Corpus.open(fresh))
    except DataError:
        shutil.rmtree(fresh)
        raise
    shutil.rmtree(paths.tokens, ignore_errors=True)
    fresh.replace(paths.tokens)
    return Corpus.open(paths.tokens)


def check_corpus(plan: Plan, corpus: Corpus) -> None:
    """Enough training tokens for the plan at the epochs given."""
    epochs, available = plan.recipe.data.epochs, corpus.train.size
    if available * epochs < plan.n_tokens:
        needed = math.ceil(plan.n_tokens / available)
        raise DataError(
            f"the plan needs {plan.n_tokens:,} training tokens and the corpus has {available:,}"
            + (f" (x {epochs} epochs)" if epochs > 1 else "")
            + f"; set data.epochs = {needed}, lower plan.root_tokens or transfer_tokens, or give more text"
        )


@contextmanager
def remove_on_error(root: Path, fresh: bool) -> Iterator[None]:
    """Leave nothing behind if a new run could not even begin, its survey aside."""
    try:
        yield
    except (SaeRelayError, KeyboardInterrupt):
        if fresh and not (root / "survey").exists() and not (root / "survey.json").exists():
            shutil.rmtree(root, ignore_errors=True)
        raise


@contextmanager
def watching(plan: Plan, paths: RunDirectory, console: Console | None) -> Iterator[Watcher]:
    """A live table on a terminal, plain lines elsewhere, nothing without a console."""
    saved = state_facts(paths.state)
    cursor = saved["cursor"] if saved else 0
    if saved and console and saved["machine"] != machine():
        console.print(
            f"note: this run was begun with {saved['machine']}, this is {machine()}: it goes on, but not to "
            "bitwise the weights of an uninterrupted run"
        )
    others = asked_for(plan, paths.root)
    if console is None:
        yield Several(others)
    elif console.is_terminal:
        with LiveTable(plan, console, cursor) as table:
            yield Several([table, *others])
    else:
        yield Several([PlainLog(plan, cursor, out=console.file), *others])


# --- how long it will take --------------------------------------------------------------------------------------


def time_plan(plan: Plan, model: LanguageModel) -> dict[str, float]:
    """Seconds a plan should take here, from one forward pass and a few steps of each shape of leg."""
    context, device = plan.recipe.data.context, model.device
    tokens = torch.randint(plan.facts.tokens.vocab_size, (max(1, LM_BATCH_TOKENS // context), context), device=device)
    deepest = plan.sites[-1]
    per_token = _seconds(lambda: model.harvest(tokens, [deepest]), device) / tokens.numel()
    lm = 0.0
    for start in range(0, plan.n_tokens, plan.block_tokens):
        if sites := plan.open_sites(start, start + plan.block_tokens):
            lm += plan.block_tokens * per_token * (sites[-1].layer + 1) / (deepest.layer + 1)
    steps, known = 0.0, {}
    for leg in plan.legs:
        width = plan.facts.width(leg.site)
        shape = (width, leg.batch_tokens, leg.dictionary)
        if shape not in known:
            x = torch.randn(4 * leg.batch_tokens, width, device=device)
            probe = leg.changed(parent="", budget_tokens=10**9)
            trainee = Trainee(probe, plan.recipe.train, x)
            known[shape] = _seconds(lambda t=trainee, x=x, b=leg.batch_tokens: t.step(x[:b]), device) / leg.batch_tokens
        steps += leg.budget_tokens * known[shape]
    return {"lm": lm, "steps": steps, "total": lm + steps}


def _seconds(call: Any, device: torch.device, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[repeats // 2]
