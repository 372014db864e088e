"""One hop of one trained SAE into a run of its own: of any format, and from any model that reads the same tokens."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from saerelay.analysis.metrics import batches
from saerelay.analysis.suite import Suite
from saerelay.data.stream import trained_on
from saerelay.errors import FormatError, ModelError
from saerelay.interop import read_any, write_dictionary
from saerelay.interop.names import public_name
from saerelay.interop.origin import Origin
from saerelay.lm.model import LanguageModel, load_model
from saerelay.lm.tokens import load_tokenizer
from saerelay.planning.legs import auto_lr
from saerelay.planning.plan import Plan
from saerelay.planning.leg_spec import LegSpec
from saerelay.planning.recipe import ModelSpec, Recipe
from saerelay.runs.directory import RunDirectory
from saerelay.sae.dictionary import Dictionary, match_l0
from saerelay.sae.layer_normed import LayerNormed
from saerelay.sae.quality import mean_l0
from saerelay.sae.moments import Moments
from saerelay.sae.spec import Method
from saerelay.sae.transfer import fold
from saerelay.sae.maps import map_between, rate_share, unexplained
from saerelay.site import Site
from saerelay.sae.transfer import L0_ROWS
from saerelay.workflows.settle import check_directory, plan_run
from saerelay.workflows.activations import tokenise
from saerelay.workflows.launch import train_run


def hop_run(
    source: str | Path,
    layer: int,
    run: Recipe,
    out: str | Path,
    *,
    site: Site | None = None,
    model: str = "",
    format: str = "",
    console: Console | None = None,
    **asked: Any,
) -> Suite:
    """Transfer one trained SAE to a layer, with or without fine-tuning, into a run directory of its own.

    `source` is a directory or file of any format, or hf://user/repo[@revision][/path]; `site` where it reads, if its
    files do not say; `model` another language model that it was trained on, with the same tokens as the recipe's: the
    map is then fitted between the two on the same text. `asked` are keys of a leg of a plan (tokens, method, refit,
    architecture, n_latents, k, lr, ...); what is not asked for is the recipe's. Onto its own site an SAE is copied,
    refitted if that explains tokens better that the refit has not seen, and with tokens = 0 and nothing else asked for
    only measured. Raises FormatError for a source that cannot be read.
    """
    paths, target = RunDirectory(Path(out)), Site(layer, run.sites.module)
    dictionary, origin = read_any(source, format=format, site=site)
    if not origin.site:
        raise FormatError(f"{source}: its files do not say which layer it reads; say it with --from-layer")
    if console and not model and origin.model not in ("", run.model.name, public_name(run.model.name)):
        console.print(f"note: {source} was trained on {origin.model}; it is taken to read {run.model.name} as well")
    named = {"id": f"{target}-from-{origin.site}", "layer": layer, "tokens": run.plan.transfer_tokens}
    leg = LegSpec.parse(named | asked, source=f"hop from {source}")
    changed: dict[str, Any] = {}
    if origin.site == target and not model:
        looked_at = not asked.keys() - {"tokens"} and not leg.tokens
        changed = {"method": leg.method or "identity", "refit": False if looked_at else leg.refit}
    parent = Path(source) if Path(source).exists() else source
    if model or format or site or isinstance(dictionary, LayerNormed):
        check_directory(paths, resume=False)
        parent = paths.root / "parent"
        if model:
            moved = carry(dictionary, origin, run, target, model, leg.method or run.plan.method, console)
            dictionary, origin = moved.dictionary, moved.origin
            scratch = auto_lr(dictionary.d_model, leg.tokens, run.train.batch_tokens)
            lr = leg.lr or run.train.transfer_lr or moved.rate_share * scratch
            changed = {"method": "identity", "lr": lr}
        elif isinstance(dictionary, LayerNormed):
            dictionary = scaled(dictionary, run, origin.site, console)
        write_dictionary(parent, dictionary, origin, "saerelay")
    changed["parent"] = str(parent) if "/" in str(parent) else f"./{parent}"
    return train_run(with_leg(run, leg.changed(**changed)), out, console=console)


def with_leg(run: Recipe, leg: LegSpec) -> Recipe:
    """A recipe for one leg and nothing else."""
    return run.changed(plan=run.plan.changed(legs=[leg], controls=[], roots=[]))


class Carried(NamedTuple):
    """A dictionary that was carried to another model, and what its map leaves unexplained of the learning."""

    dictionary: Dictionary
    origin: Origin
    rate_share: float


@torch.no_grad()
def carry(
    dictionary: Dictionary | LayerNormed,
    origin: Origin,
    run: Recipe,
    target: Site,
    name: str,
    method: Method,
    console: Console | None = None,
) -> Carried:
    """Fold a dictionary of another model's activations into one of the recipe's model, by a map fitted on its text.

    Both models read the first plan.moment_tokens of the training split. Raises ModelError if they do not read the same
    tokens, TransferError if the map cannot be fitted.
    """
    began, site = time.perf_counter(), origin.site
    assert site
    plan = moments_plan(run, target)
    other_spec = run.model.changed(name=name, revision="")
    check_tokens(run, other_spec)
    other = LanguageModel.load(other_spec)
    other.check_site(site)
    moments, x_source, x_target = Moments.empty(other.facts.width(site), plan.facts.width(target)), None, None
    with console.status(f"reading {name} and {run.model.name} side by side") if console else nullcontext():
        for tokens, keep, x_target in kept_rows(plan, target):
            if int(tokens.max()) >= other.facts.tokens.vocab_size:
                raise ModelError(
                    f"{name} has {other.facts.tokens.vocab_size} tokens, the text has token {int(tokens.max())}"
                )
            x_source = other.harvest(tokens.to(other.device), [site])[site][keep.to(other.device)].float()
            moments.add(x_source.to(x_target.device), x_target)
    assert x_source is not None and x_target is not None
    if isinstance(dictionary, LayerNormed):
        dictionary = dictionary.at_scale(x_source.cpu())
    carried = fold(dictionary, map_between(method, max(moments.n_source, plan.facts.width(target)), moments))
    l0 = dictionary.k or origin.l0 or mean_l0(dictionary, x_source[:L0_ROWS].cpu())
    carried = match_l0(carried, x_target[:L0_ROWS].cpu(), l0)
    facts = {"model": name, "site": str(site), "method": method, "moment_tokens": moments.n_tokens}
    facts |= {"lm_tokens": 2 * plan.recipe.plan.moment_tokens, "unexplained": unexplained(moments)}
    facts |= {"seconds": round(time.perf_counter() - began, 3)}
    where = Origin(model=run.model.name, site=target, l0=l0, provenance=origin.provenance | {"carried_from": facts})
    return Carried(carried, where, rate_share(moments))


def scaled(dictionary: LayerNormed, run: Recipe, site: Site, console: Console | None) -> Dictionary:
    """The dictionary of raw activations that is nearest to a layer-normed one on the recipe's text."""
    with console.status("reading the scale of activations") if console else nullcontext():
        _, _, x = next(kept_rows(moments_plan(run, site), site))
    return dictionary.at_scale(x.cpu())


def moments_plan(run: Recipe, site: Site) -> Plan:
    """A plan that reads as many tokens at a site as maps are fitted on."""
    leg = LegSpec(id="moments", layer=site.layer, module=site.module, tokens=run.plan.moment_tokens)
    return plan_run(with_leg(run, leg))


def kept_rows(plan: Plan, site: Site) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of training tokens (B, C), bool (B, C) for the positions that are kept, and their activations (n, D)."""
    model, context = load_model(plan), plan.recipe.data.context
    with TemporaryDirectory(prefix="saerelay-") as place:
        corpus = tokenise(plan, RunDirectory(Path(place)), None)
        for tokens in batches(plan, corpus.train[: math.ceil(plan.recipe.plan.moment_tokens / context)], ce=False):
            tokens = tokens.to(model.device)
            found = model.harvest(tokens, plan.with_probe([site]))
            keep = trained_on(plan, tokens, found)
            yield tokens, keep, found[site][keep].float()


def check_tokens(run: Recipe, other: ModelSpec) -> None:
    """Raise ModelError unless another model's tokenizer gives each token of the recipe's model the same number."""
    if run.data.tokens:
        return
    ours, theirs = load_tokenizer(run.model).get_vocab(), load_tokenizer(other).get_vocab()
    differing = sorted((number, token) for token, number in ours.items() if theirs.get(token, number) != number)
    shared = sum(theirs.get(token) == number for token, number in ours.items())
    if differing or 2 * shared < len(ours):
        number, token = differing[0] if differing else next((n, t) for t, n in ours.items() if t not in theirs)
        raise ModelError(
            f'{run.model.name} and {other.name} do not read the same tokens: "{token}" is {number} in the one and '
            f"{theirs.get(token, 'none')} in the other; a map between two models needs a tokenizer that they share"
        )
