"""From text to the stream of activations that a plan trains on: tokens on disk, then a stream over them.

`launch` and `survey` open a run's stream here; `joined_stream` is for several ranks.
"""

import math
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from saerelay.data.corpus import SPLITS, Corpus, prepare
from saerelay.data.remote_cache import open_cache
from saerelay.data.stream import LiveStream
from saerelay.errors import DataError
from saerelay.files import remove_replaced, replace_directory, restore_replaced
from saerelay.lm.model import LanguageModel, load_model
from saerelay.lm.source import pinned
from saerelay.lm.split import check_whole
from saerelay.lm.tokens import load_tokenizer
from saerelay.planning.plan import Plan
from saerelay.runs.directory import RunDirectory
from saerelay.spec import format_count, rounded_up
from saerelay.team import Team
from saerelay.training.team_stream import TeamStream
from saerelay.training.train import HELD_OUT_ROWS

_ROWS_AT_ONCE = 16_384
"""Number of sequences of two corpora that are compared at a time: whole splits may be larger than memory."""


def tokenise(plan: Plan, paths: RunDirectory, console: Console | None, *, at_least: int = 0) -> Corpus:
    """Return the run's tokens: those on disk if they are enough for the plan, else new ones that replace them.

    Text is read again (`data.epochs`) only where there is no more of it. New tokens are at least `at_least`, if the
    corpus has that many. If training has begun, they begin with those on disk, and `grown_from` says so: the stream
    then reads the added ones last. Raises DataError if they do not, or if there is too little text.
    """
    has_begun = paths.plan.is_file()
    if has_begun:
        restore_replaced(paths.tokens)
    remove_replaced(paths.tokens)
    older: Corpus | None = None
    if (paths.tokens / "corpus.json").is_file():
        corpus = Corpus.open(paths.tokens)
        times = plan.recipe.data.epochs if corpus.facts.complete else 1
        if corpus.train.size * times >= plan.n_tokens:
            return corpus
        older = corpus if has_begun else None
    fresh = paths.tokens.with_name("tokens.new")
    shutil.rmtree(fresh, ignore_errors=True)
    corpus = _read_text(plan, fresh, console, max(plan.n_tokens, at_least))
    try:
        _check_corpus(plan, corpus)
        if older:
            _check_begins_with(corpus, older, paths)
            grown_from = [*older.facts.grown_from, older.facts.train_sequences]
            corpus.facts.changed(grown_from=grown_from).save(fresh / "corpus.json")
    except DataError:
        shutil.rmtree(fresh)
        raise
    replace_directory(fresh, paths.tokens)
    corpus = Corpus.open(paths.tokens)
    if console:
        for line in corpus.facts.notes():
            console.print(f"note: {line}", markup=False)
    return corpus


def _read_text(plan: Plan, directory: Path, console: Console | None, n_tokens: int) -> Corpus:
    """Tokenise the plan's text into a new directory, up to `n_tokens` to train on, and show how far it is."""
    recipe = plan.recipe
    tokenizer = None if recipe.data.tokens else load_tokenizer(pinned(recipe.model, plan.facts))
    with console.status("reading the corpus") if console else nullcontext() as status:

        def show(n_so_far: int) -> None:
            if status:
                status.update(f"reading the corpus: {format_count(n_so_far)} tokens")

        return prepare(
            recipe,
            plan.facts,
            tokenizer,
            directory,
            train_sequences=math.ceil(n_tokens / recipe.data.context),
            eval_sequences=math.ceil(recipe.evaluate.tokens / recipe.data.context),
            progress=show,
        )


def _check_corpus(plan: Plan, corpus: Corpus) -> None:
    """Raise DataError unless the corpus has enough training tokens for the plan, given its number of epochs."""
    epochs = plan.recipe.data.epochs
    available = corpus.train.size
    if available * epochs < plan.n_tokens:
        needed = math.ceil(plan.n_tokens / available)
        times = f" (x {epochs} epochs)" if epochs > 1 else ""
        raise DataError(
            f"the plan needs {plan.n_tokens:,} training tokens and the corpus has {available:,}{times}; "
            f"set data.epochs = {needed}, lower plan.root_tokens or transfer_tokens, or give more text"
        )


def _check_begins_with(corpus: Corpus, older: Corpus, paths: RunDirectory) -> None:
    """Raise DataError unless each split of a longer corpus begins with the older split, or is its beginning.

    Otherwise documents that were trained on might now be held out.
    """
    by_older_version = ""
    if not older.facts.train_documents:
        by_older_version = "; this one was begun by an older version, which took other parts of documents"
    for split in SPLITS:
        longer = getattr(corpus, split)
        before = getattr(older, split)
        n = min(len(longer), len(before))
        parts = [slice(start, min(start + _ROWS_AT_ONCE, n)) for start in range(0, n, _ROWS_AT_ONCE)]
        if not all(np.array_equal(longer[part], before[part]) for part in parts):
            raise DataError(
                f"{corpus.facts.source}: not the text that this run began with: the new {split} split does not "
                f"continue {paths.tokens / split}.npy. Restore the text, or begin a new run{by_older_version}"
            )


def open_stream(plan: Plan, corpus: Corpus, cursor: int = 0) -> LiveStream:
    """Return the stream of the plan's activations on the training split; it is read from the cursor's block on.

    The language model is loaded unless all that is read is in data.cache, or several ranks hold the model together (see
    `joined_stream`). Raises DataError if the cache is damaged, or if the activations it lacks do not fit on its disk.
    """
    cache = open_cache(plan) if plan.recipe.data.cache else None
    stream = LiveStream(None, corpus.train, plan, cache, corpus.facts.grown_from)
    if cache:
        needed = stream.uncached_bytes(cursor)
        cache.check_room(needed)
        stream.is_cached = not needed
    if not stream.is_cached and plan.recipe.model.tensor_parallel == 1:
        stream.model = load_model(plan)
    return stream


def joined_stream(plan: Plan, corpus: Corpus, stream: LiveStream | None, team: Team) -> TeamStream:
    """Return the stream of the activations that this rank of a team needs; all ranks compute them together.

    `stream` is rank 0's stream, which has a model if anything has to be computed; it is None on other ranks. One rank
    of each machine loads the model first, so that it is downloaded only once; a model that ranks hold together is
    loaded by all of them at once, if the cache lacks anything or goals are measured.
    """
    model = stream.model if stream else None
    if plan.recipe.model.tensor_parallel > 1:
        if team.once(lambda: stream is not None and (plan.has_goals or not stream.is_cached)):
            model = _loaded_together(plan, team)
    elif team.once(lambda: model is not None):
        model = team.in_turn(lambda: model or load_model(plan))
    cache = open_cache(plan) if plan.recipe.data.cache else None
    return TeamStream(LiveStream(model, corpus.train, plan, cache, corpus.facts.grown_from), team)


def _loaded_together(plan: Plan, team: Team) -> LanguageModel:
    """Load the language model that groups of ranks hold together, and check that each rank gets whole activations."""
    model = load_model(plan, split=True)
    found = model.harvest(torch.zeros(1, 2, dtype=torch.long), plan.with_probe(plan.sites_read))
    by_rank = team.gather({site: x.cpu() for site, x in found.items()})
    check_whole(by_rank, plan.facts, plan.recipe.model.tensor_parallel)
    return model


def open_validation(plan: Plan, stream: LiveStream, corpus: Corpus) -> LiveStream:
    """Return a stream of blocks of HELD_OUT_ROWS positions of the validation split; of all, if it has fewer."""
    context = plan.recipe.data.context
    block_tokens = min(rounded_up(HELD_OUT_ROWS, context), corpus.validation.size)
    small = plan.changed(block_tokens=block_tokens)
    return LiveStream(stream.model or load_model(plan), corpus.validation, small)
