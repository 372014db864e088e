"""`saerelay hop`: one trained SAE, in any format and from any model with the same tokens, into a run of its own.

A hop within one model is a plan of a single leg. An SAE of another model is first carried to the recipe's model here
(`carry_from_model`), and the leg then starts from the result.
"""

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from saerelay.analysis.metrics import batches
from saerelay.analysis.suite import Suite
from saerelay.data.kept import trained_on
from saerelay.errors import FormatError, ModelError, TransferError, printable
from saerelay.interop import read_any, write_dictionary
from saerelay.interop.names import public_name
from saerelay.interop.origin import Origin
from saerelay.lm.model import LanguageModel, load_model
from saerelay.lm.tokens import load_tokenizer
from saerelay.planning.batches import batch_of
from saerelay.planning.leg_spec import LegSpec, LegTraining
from saerelay.planning.legs import auto_lr, site_of
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import ModelSpec, Recipe
from saerelay.runs.directory import RunDirectory
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.layer_normed import LayerNormed
from saerelay.sae.maps import map_between, rate_share, unexplained
from saerelay.sae.moments import Moments
from saerelay.sae.quality import mean_l0
from saerelay.sae.spec import L0_ROWS, TRIAL_ROWS, Method, MethodOrAuto
from saerelay.sae.transfer import Retraining, carry
from saerelay.sae.trials import RANDOM, best_first, try_methods
from saerelay.site import Site
from saerelay.training.state import balance_of, units_of
from saerelay.workflows.activations import tokenise
from saerelay.workflows.launch import train_run
from saerelay.workflows.settle import check_directory, plan_run
from saerelay.workflows.watching import status


def hop_run(
    source: str | Path,
    layer: int,
    recipe: Recipe,
    out: str | Path,
    *,
    site: Site | None = None,
    model: str = "",
    format: str = "",
    console: Console | None = None,
    **leg_keys: Any,
) -> Suite:
    """Transfer one trained SAE to a layer, with or without fine-tuning, into a run directory of its own.

    `source` is a directory or file in any format, or `hf://user/repo[@revision][/path]`. `site` is the site it reads,
    if its files do not say. `model` is the language model it was trained on, if that is not the recipe's; it must have
    the same tokens, and the map is fitted between the two models on the same text. `leg_keys` are keys of a leg of a
    plan (tokens, method, refit, architecture, n_latents, k, lr, ...); the recipe gives the rest. On its own site an SAE
    is copied, and the refit is kept if it is better on tokens it has not seen; with tokens = 0 and no other key, the
    SAE is only measured. An interrupted hop continues if it is given again with the same directory. Raises FormatError
    for a source that cannot be read.
    """
    paths = RunDirectory(Path(out))
    dictionary, origin = read_any(source, format=format, site=site)
    if not origin.site:
        raise FormatError(f"{source}: its files do not say which layer it reads; name it with --from-layer")
    if origin.site_out and model:
        raise TransferError(f"{source}: is a transcoder; transcoders cannot be carried between two models yet")
    recipe = of_one_kind(recipe, origin)
    if not model:
        _note_its_model(source, origin, recipe, console)
    leg = _asked_leg(source, origin, recipe, layer, leg_keys)
    target = site_of(leg, recipe)
    if origin.site == target and not model:
        leg = _at_its_own_site(leg, leg_keys)

    parent = source
    needs_text = _needs_text(dictionary, origin)
    if model or format or site or needs_text:
        # The run reads its parent from files, so a dictionary that only these options can read, or that only text
        # completes, is first written there in canonical form.
        check_directory(paths, resume=True)
        parent = _copy_of_parent(paths, source, model, format, site)
        if model:
            method = _method_between_models(leg, recipe)
            moved = carry_from_model(dictionary, origin, recipe, target, model, method, console)
            leg = _after_move(leg, moved, recipe)
            dictionary = moved.dictionary
            origin = moved.origin
        elif needs_text:
            dictionary, origin = completed(dictionary, origin, recipe, console)
        assert isinstance(dictionary, Dictionary)
        write_dictionary(parent, dictionary, origin, "saerelay")
    # Resume a hop that was killed; a different hop in its directory is refused, because its recipe differs.
    return train_run(with_leg(recipe, leg.changed(parent=_as_parent(parent))), out, resume=True, console=console)


def _note_its_model(source: str | Path, origin: Origin, recipe: Recipe, console: Console | None) -> None:
    """Say it if an SAE was trained on another model than the recipe's, as its files name it."""
    same = ("", recipe.model.name, public_name(recipe.model.name))
    if console and origin.model not in same:
        note = f"note: {source} was trained on {origin.model}; it is assumed to read {recipe.model.name} as well"
        console.print(Text(printable(note)))


def _at_its_own_site(leg: LegSpec, leg_keys: dict[str, Any]) -> LegSpec:
    """Return the leg of an SAE that stays at its site: a copy. Without tokens and other keys it is only measured."""
    assert leg.hop
    is_only_measured = not leg.tokens and not leg_keys.keys() - {"tokens"}
    refit = False if is_only_measured else leg.hop.refit
    return leg.changed(method=leg.hop.method or "identity", refit=refit)


def _method_between_models(leg: LegSpec, recipe: Recipe) -> MethodOrAuto:
    """Return the method of the map between two models: the one asked for, if it is a map, or else the recipe's."""
    assert leg.hop
    if leg.hop.method is None or leg.hop.method == "random":
        return recipe.plan.hop.method
    return leg.hop.method


def _after_move(leg: LegSpec, moved: "CarriedFromModel", recipe: Recipe) -> LegSpec:
    """Return the leg from a parent that is at its site by now, unless a random dictionary takes its place."""
    assert leg.hop
    if leg.hop.method == "random":
        return leg
    return leg.changed(method="identity", lr=_rate_after(moved, leg, recipe))


def _as_parent(source: str | Path) -> str:
    """Return the `parent` of a leg that is read from a file or an address; without a slash it would name a leg."""
    name = str(Path(source)) if Path(source).exists() else str(source)
    return name if "/" in name else f"./{name}"


def _copy_of_parent(paths: RunDirectory, source: str | Path, model: str, format: str, site: Site | None) -> Path:
    """Return where a run keeps its copy of a parent; another parent, or one read in another way, has another place."""
    question = repr((str(source), model, format, str(site or "")))
    digest = hashlib.blake2b(question.encode(), digest_size=4).hexdigest()
    return paths.root / "parents" / f"{Path(source).name}-{digest}"


def of_one_kind(recipe: Recipe, origin: Origin) -> Recipe:
    """Reduce a recipe with several kinds of sites to the SAE's kind, or to the first kind if it has not the SAE's."""
    kinds = recipe.sites.kinds
    if len(kinds) == 1:
        return recipe
    kind = origin.kind if origin.kind in kinds else kinds[0]
    return recipe.changed(sites=recipe.sites.changed(module=kind.module, module_out=kind.module_out or ""))


def _asked_leg(source: str | Path, origin: Origin, recipe: Recipe, layer: int, leg_keys: dict[str, Any]) -> LegSpec:
    """Return the leg that was asked for, named as a plan would name it; its parent is settled later."""
    assert origin.site and origin.kind
    kind = recipe.sites.first_kind
    start = f"L{origin.site.layer}" if origin.kind == kind else origin.kind.leg_name(origin.site.layer)
    keys = {
        "id": f"{kind.leg_name(layer)}-from-{start}",
        "layer": layer,
        "tokens": recipe.plan.transfer_tokens,
        "parent": str(source),
        **leg_keys,
    }
    return LegSpec.parse(keys, source=f"hop from {source}")


def _rate_after(moved: "CarriedFromModel", leg: LegSpec, recipe: Recipe) -> float:
    """Return the learning rate after a hop from another model: as given, or set by what the map leaves unexplained."""
    for given in (leg.training.lr, recipe.train.optimizer.transfer_lr):
        if given is not None and given != "auto":
            return given
    share = rate_share(moved.unexplained, leg.tokens)
    return share * auto_lr(moved.dictionary.d_model, leg.tokens, batch_of(leg, recipe, on_gpu=moved.on_gpu))


def with_leg(recipe: Recipe, leg: LegSpec) -> Recipe:
    """Return the recipe reduced to one leg."""
    plan = recipe.plan.changed(legs=[leg], controls=[], roots=[], tiers=[], parents="")
    return recipe.changed(plan=plan)


class CarriedFromModel(NamedTuple):
    """A dictionary carried from another model, the share of variance that its map leaves unexplained, and where."""

    dictionary: Dictionary
    origin: Origin
    unexplained: float
    on_gpu: bool


@torch.no_grad()
def carry_from_model(
    dictionary: Dictionary | LayerNormed,
    origin: Origin,
    recipe: Recipe,
    target: Site,
    name: str,
    method: MethodOrAuto,
    console: Console | None = None,
) -> CarriedFromModel:
    """Fold a dictionary of another model into one of the recipe's model, by a map fitted on the recipe's text.

    Both models read the first plan.moment_tokens of the training split. Raises ModelError if their tokens differ,
    TransferError if no map can be fitted, or none is better than a random dictionary.
    """
    began = time.perf_counter()
    site = origin.site
    assert site
    plan = moments_plan(recipe, target)
    other_spec = recipe.model.changed(name=name, revision="", gguf_file="", adapter="", tensor_parallel=1)
    with status(console, Text(printable(f"loading {name}"))):
        check_tokens(recipe, other_spec)
        other = LanguageModel.load(other_spec)
    other.check_site(site)
    with status(console, Text(printable(f"reading {name} and {recipe.model.name} side by side"))):
        moments, x_source, x_target = _read_both(plan, target, other, site)
    if isinstance(dictionary, LayerNormed):
        dictionary = dictionary.at_scale(x_source)
    leg = plan.leg("moments")
    balance = balance_of(leg, recipe.train)
    units = units_of(leg, recipe.train, x_target)
    l0 = dictionary.k or origin.l0 or mean_l0(dictionary, x_source[:L0_ROWS])
    trials: dict[str, float] = {}
    if method == "auto":
        on = Retraining(x_target, seed=0)
        spec = recipe.dictionary.sized(plan.facts.width(target)).with_architecture(dictionary.architecture)
        fresh = spec.changed(n_latents=dictionary.n_latents).with_l0(l0)
        trials = best_first(try_methods(dictionary, moments, on, units, fresh, balance=balance, l0=l0), tokens=0)
        method = _best(trials, name, site, target)
    between = map_between(method, max(moments.n_source, plan.facts.width(target)), moments, balance)
    carried = carry(dictionary, between, x_target, units, l0=l0).dictionary
    left = unexplained(moments, balance=balance)
    facts = {
        "model": name,
        "site": str(site),
        "method": method,
        "trials": trials,
        "moment_tokens": moments.n_tokens,
        "lm_tokens": 2 * plan.recipe.plan.hop.moment_tokens,
        "unexplained": left,
        "seconds": round(time.perf_counter() - began, 3),
    }
    return CarriedFromModel(
        dictionary=carried,
        origin=Origin(
            model=recipe.model.name,
            site=target,
            l0=l0,
            provenance={**origin.provenance, "carried_from": facts},
        ),
        unexplained=left,
        on_gpu=plan.facts.on_gpu,
    )


def _read_both(plan: Plan, target: Site, other: LanguageModel, site: Site) -> tuple[Moments, Tensor, Tensor]:
    """Read the plan's text with its model at `target` and with another model at `site`.

    Return the moments of all rows, and about the first TRIAL_ROWS of them: (n, S) of the other, and (n, T).
    Raises ModelError if the text has tokens that the other model does not know.
    """
    moments = Moments.empty(other.facts.width(site), plan.facts.width(target), plan.facts.device)
    sources: list[Tensor] = []
    targets: list[Tensor] = []
    for tokens, keep, x_target in kept_rows(plan, target):
        if int(tokens.max()) >= other.facts.tokens.vocab_size:
            raise ModelError(
                f"{other.facts.name} has a vocabulary of {other.facts.tokens.vocab_size}, but the text contains token "
                f"id {int(tokens.max())}"
            )
        harvested = other.harvest(tokens.to(other.device), [site])[site]
        x_source = harvested[keep.to(other.device)].float()
        moments.add(x_source.to(x_target.device), x_target)
        if sum(map(len, targets)) < TRIAL_ROWS:
            sources.append(x_source.cpu())
            targets.append(x_target.cpu())
    return moments, torch.cat(sources), torch.cat(targets)


def _best(trials: dict[str, float], name: str, site: Site, target: Site) -> Method:
    """Return the method that measured best; TransferError if a random dictionary measured best."""
    best = next(iter(trials))
    if best == RANDOM:
        raise TransferError(
            f"{name}: no map from its {site} to {target} is better than a random dictionary; train from scratch"
        )
    return cast(Method, best)


def _needs_text(dictionary: Dictionary | LayerNormed, origin: Origin) -> bool:
    """Whether the files of a dictionary leave open on what scale it reads, or how many of its latents are active."""
    return isinstance(dictionary, LayerNormed) or not (dictionary.k or origin.l0)


def completed(
    dictionary: Dictionary | LayerNormed, origin: Origin, recipe: Recipe, console: Console | None
) -> tuple[Dictionary, Origin]:
    """Take from the recipe's text what a dictionary's files leave open, and return it with its origin.

    A layer-normed one becomes the dictionary on raw activations that is nearest to it there; L0 is measured. Raises
    TransferError if the recipe's model has activations of another width.
    """
    assert origin.site
    plan = moments_plan(recipe, origin.site)
    width = plan.facts.width(origin.site)
    if dictionary.d_model != width:
        raise TransferError(
            f"the SAE reads activations of width {dictionary.d_model}, but those of {origin.site} have width {width}; "
            "if it belongs to another model, name that with --from-model"
        )
    rows: list[Tensor] = []
    with status(console, "reading the activations that the SAE was trained on"):
        for _, _, x in kept_rows(plan, origin.site):
            rows.append(x.cpu())
            if sum(map(len, rows)) >= L0_ROWS:
                break
    x = torch.cat(rows)[:L0_ROWS]
    if isinstance(dictionary, LayerNormed):
        dictionary = dictionary.at_scale(x)
    if not (dictionary.k or origin.l0):
        origin = replace(origin, l0=mean_l0(dictionary, x))
    return dictionary, origin


def moments_plan(recipe: Recipe, site: Site) -> Plan:
    """Return a plan that reads plan.moment_tokens tokens at a site, each of them once."""
    n_tokens = recipe.plan.hop.moment_tokens
    once = LegTraining(reuse=1)
    leg = LegSpec(id="moments", layer=site.layer, module=site.module, tokens=n_tokens, training=once)
    return plan_run(with_leg(recipe, leg))


def kept_rows(plan: Plan, site: Site) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield batches of training tokens (B, C), a mask (B, C) of the positions kept, and their activations (n, D)."""
    model = load_model(plan)
    context = plan.recipe.data.context
    with TemporaryDirectory(prefix="saerelay-") as place:
        corpus = tokenise(plan, RunDirectory(Path(place)), None)
        sequences = corpus.train[: math.ceil(plan.recipe.plan.hop.moment_tokens / context)]
        for tokens in batches(plan, sequences, model.device):
            tokens = tokens.to(model.device)
            found = model.harvest(tokens, plan.with_probe([site]))
            keep = trained_on(plan, tokens, found)
            yield tokens, keep, found[site][keep].float()


def check_tokens(recipe: Recipe, other: ModelSpec) -> None:
    """Raise ModelError unless the other model's tokenizer gives the tokens of the recipe's model the same ids."""
    if recipe.data.tokens:
        return
    ours = load_tokenizer(recipe.model).get_vocab()
    theirs = load_tokenizer(other).get_vocab()
    lacking = [token for token in ours if token not in theirs]
    differing = [token for token, number in ours.items() if theirs.get(token, number) != number]
    n_shared = len(ours) - len(lacking) - len(differing)
    if differing or 2 * n_shared < len(ours):
        token = min(differing, key=ours.__getitem__) if differing else lacking[0]
        number = ours[token]
        raise ModelError(
            f'{recipe.model.name} and {other.name} do not read the same tokens: "{token}" is {number} in the one and '
            f"{theirs.get(token, 'none')} in the other; a map between two models needs a shared tokenizer"
        )
