"""Learning-rate sweep: one dictionary from scratch, or hopped, on activations held in memory; a JSON line for each run.

    python bench/sweep.py --layer 4 --tokens 1000000 --lr 1e-3 2e-3 4e-3 --batch 512
    python bench/sweep.py --layer 4 --source 5 --source-tokens 2000000 --tokens 250000 --lr 3e-4 1e-3

Held out by document; FVU on `--eval-tokens` of the test split. Any model and corpus of a recipe: --recipe run.toml.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from saerelay.analysis.sums import MetricSums
from saerelay.data.corpus import prepare
from saerelay.data.stream import LiveStream
from saerelay.lm.model import LanguageModel
from saerelay.lm.tokens import load_tokenizer
from saerelay.planning.leg import Leg, Schedule
from saerelay.planning.plan import LM_BATCH_TOKENS
from saerelay.planning.recipe import Recipe, TrainSpec
from saerelay.sae.maps import map_between
from saerelay.sae.moments import Moments
from saerelay.sae.refit import refit
from saerelay.sae.spec import DictionarySpec
from saerelay.sae.transfer import fold
from saerelay.site import Site
from saerelay.training.engine import Trainee
from saerelay.training.state import first_state
from saerelay.workflows.settle import plan_run


def harvest(run: Recipe, layers: list[int], n_train: int, n_test: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Shuffled training rows and test rows of each layer."""
    run = run.changed(sites=run.sites.changed(layers=layers))
    plan = plan_run(run)
    sites = [Site(layer, run.sites.first_kind.module) for layer in layers]
    model = LanguageModel.load(run.model)
    context = run.data.context
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = None if run.data.tokens else load_tokenizer(run.model)
        wanted = {"train_sequences": n_train // context + 512, "eval_sequences": n_test // context}
        corpus = prepare(run, plan.facts, tokenizer, Path(folder) / "tokens", **wanted)
        stream = LiveStream(model, corpus.train, plan)
        train: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        for number in range(-(-n_train // plan.block_tokens)):
            block = stream.block(number, sorted({*sites, *([plan.probe_site] if plan.probe_site else [])}))
            for layer, site in zip(layers, sites, strict=True):
                train[layer] += [rows[site].bfloat16() for rows in block.chunks([site])]
        test: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        tokens = torch.from_numpy(corpus.test.astype("int64"))
        skip = int(run.data.prepend_bos)
        for part in tokens.split(max(1, LM_BATCH_TOKENS // context)):
            for site, x in model.harvest(part, sites).items():
                test[site.layer].append(x[:, skip:].flatten(0, 1).float())
        seen = corpus.train.size
    print(json.dumps({"training_tokens_unique": seen, "test_tokens": tokens.numel()}), flush=True)
    return {layer: (torch.cat(train[layer]), torch.cat(test[layer])) for layer in layers}


def train(leg: Leg, spec: TrainSpec, x: torch.Tensor, inherited=None) -> Trainee:
    """Train to the budget; rows are reused when they run out."""
    trainee = Trainee(leg, spec, first_state(leg, spec, x[:32768].float(), inherited))
    batch = leg.schedule.batch_tokens
    position = 0
    while not trainee.done:
        trainee.step(x[position : position + batch].float())
        position = (position + batch) % (len(x) - batch)
    return trainee


def quality(trainee: Trainee, x_train: torch.Tensor, x_test: torch.Tensor) -> dict[str, float]:
    """FVU, L0 and live latents on the test rows."""
    dictionary, sums = trainee.canonical(x_train[:8192].float()), MetricSums()
    for part in x_test.split(4096):
        sums.add_reconstruction(dictionary, part)
    metrics = sums.metrics(None)
    rounded = {name: round(getattr(metrics, name), 5) for name in ("fvu", "l0", "frac_alive")}
    return {**rounded, "n_dead": int(trainee.dead().sum())}


def settings() -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--layer", type=int, default=4)
    parser.add_argument("--source", type=int)
    parser.add_argument("--source-tokens", type=int, default=2_000_000)
    parser.add_argument("--source-lr", type=float, default=2e-3)
    parser.add_argument("--method", nargs="+", default=["affine"])
    parser.add_argument("--refit", type=int, nargs="+", choices=[0, 1], default=[1])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--batch", type=int, nargs="+", default=[512])
    parser.add_argument("--decay", type=float, nargs="+", default=[0.3])
    parser.add_argument("--warmup", type=float, nargs="+", default=[0.02])
    parser.add_argument("--aux", type=float, nargs="+", default=[1 / 32])
    parser.add_argument("--beta1", type=float, nargs="+", default=[0.8])
    parser.add_argument("--beta2", type=float, nargs="+", default=[0.99])
    parser.add_argument("--encoder-lr", type=float, nargs="+", default=[0.5])
    parser.add_argument("--bias-lr", type=float, nargs="+", default=["auto"])
    parser.add_argument("--whitening", type=float, nargs="+", default=[0.25])
    parser.add_argument("--dead-after", type=int, default=0)
    parser.add_argument("--architecture", default="topk")
    parser.add_argument("--n-latents", type=int, default=3072)
    parser.add_argument("--k", type=int, default=24)
    parser.add_argument("--l1", type=float, nargs="+", default=[1.0])
    parser.add_argument("--bandwidth", type=float, nargs="+", default=[0.3])
    parser.add_argument("--eval-tokens", type=int, default=65_536)
    return parser.parse_args()


SWEPT = (
    "method", "refit", "tokens", "lr", "batch", "decay", "warmup", "aux", "beta1", "beta2", "whitening", "encoder_lr",
    "bias_lr", "l1", "bandwidth",
)  # fmt: skip
"""Options that take several values; the last varies fastest."""


def grid(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every combination of the values that are swept; without a source there is nothing to fold or to refit."""
    values = {name: getattr(args, name) for name in SWEPT}
    if args.source is None:
        values |= {"method": [""], "refit": [0]}
    for combination in product(*values.values()):
        yield dict(zip(SWEPT, combination, strict=True))


def source_leg(args: argparse.Namespace, run: Recipe, width: int) -> Leg:
    """The SAE that a hop starts from, trained from scratch."""
    keys = {"architecture": args.architecture, "n_latents": args.n_latents, "k": args.k}
    n = args.source_tokens
    return Leg(
        id="source",
        role="root",
        layer=args.source,
        module=run.sites.first_kind.module,
        dictionary=DictionarySpec.parse(keys).sized(width),
        seed=0,
        schedule=Schedule(budget_tokens=n, batch_tokens=512, lr=args.source_lr, dead_after_tokens=n // 50),
    )


def swept_leg(args: argparse.Namespace, run: Recipe, width: int, chosen: dict[str, Any]) -> Leg:
    """The SAE of one combination of the swept values."""
    keys = {
        "architecture": args.architecture,
        "n_latents": args.n_latents,
        "k": args.k,
        "target_l0": args.k,
        "aux_weight": chosen["aux"],
        "l1": chosen["l1"],
        "bandwidth": chosen["bandwidth"],
    }
    batch = chosen["batch"]
    budget = max(batch, chosen["tokens"] // batch * batch)
    return Leg(
        id="x",
        role="root",
        layer=args.layer,
        module=run.sites.first_kind.module,
        dictionary=DictionarySpec.parse(keys).sized(width),
        seed=0,
        schedule=Schedule(
            budget_tokens=budget,
            batch_tokens=batch,
            lr=chosen["lr"],
            dead_after_tokens=args.dead_after or max(batch, budget // 50),
        ),
    )


def swept_spec(chosen: dict[str, Any]) -> TrainSpec:
    """How it is trained."""
    names = ("decay", "warmup", "whitening", "encoder_lr", "bias_lr")
    given = {name: chosen[name] for name in names}
    return TrainSpec.parse({"batch_tokens": chosen["batch"], "betas": (chosen["beta1"], chosen["beta2"]), **given})


def main() -> None:
    """Parse, sweep, print."""
    args = settings()
    run = Recipe.from_toml(args.recipe) if args.recipe else Recipe()
    hops = args.source is not None
    layers = {args.layer, args.source} if hops else {args.layer}
    n_rows = max([*args.tokens, args.source_tokens if hops else 0])
    rows = harvest(run, sorted(layers), n_rows, args.eval_tokens)
    x, x_test = rows[args.layer]
    width = x.shape[1]

    parent = None
    moments = Moments.empty(width, width)
    if hops:
        source_x, source_test = rows[args.source]
        source = train(source_leg(args, run, width), TrainSpec(), source_x)
        print(json.dumps({"source": args.source, **quality(source, source_x, source_test)}), flush=True)
        parent = source.canonical(source_x[:8192].float())
        moments.add(source_x[:200_000].float(), x[:200_000].float())

    for chosen in grid(args):
        began = time.perf_counter()
        inherited = fold(parent, map_between(chosen["method"], width, moments)) if parent else None
        if inherited and chosen["refit"]:
            inherited = refit(inherited, x[:65_536].float().split(4096))
        trainee = train(swept_leg(args, run, width, chosen), swept_spec(chosen), x, inherited)
        seconds = time.perf_counter() - began
        print(json.dumps(chosen | quality(trainee, x, x_test) | {"seconds": round(seconds, 1)}), flush=True)


if __name__ == "__main__":
    main()
