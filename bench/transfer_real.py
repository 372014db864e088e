"""The study of a real model in docs/transfer.md: what a hop is worth in ΔCE, against training from scratch.

    python bench/transfer_real.py run --model google/gemma-3-270m --text docs/ --layers 4-11 --out study
    python bench/transfer_real.py run ... --list                       # the jobs and their samples; trains nothing
    python bench/transfer_real.py report --out study --docs docs       # writes docs/transfer-real.json and the tables

Layers may be studied in parts, in folders of their own that overlap in a layer; `report --also` puts them together:

    python bench/transfer_real.py run ... --layers 0-4,11-17 --only scratch,hops,random,budgets --out others
    python bench/transfer_real.py report --out study --also others

Whole suites of all layers, which are compared with `scratch` alone, have a table of their own:

    python bench/transfer_real.py run ... --layers 0-17 --only scratch,suite --out suites
    python bench/transfer_real.py suites --out suites --docs docs      # writes docs/transfer-real-suites.json and it

What hops are worth on one sequence of each of many documents has a table, too (`transfer_real_documents.py`).

Every job is an ordinary run of this tool in a directory of its own, <out>/<job>. The activations (`data.cache`, at
<out>/activations) and the tokens are shared. A study that was stopped goes on with the same command.

- rates-bB: learning rates from scratch at two layers, batches of B tokens.
- scratch-sS: every layer from scratch with the full budget, and with as many tokens as an eighth's hop looks at.
- hops-sS: every pair of neighbours in both directions, with `auto` and an eighth of the full budget; a snapshot at age
  0 is the hop without training. Seed 0 also has each method without training.
- twice-sS: the same hops, trained twice on as many tokens: once on these, and once on those of the map.
- budgets-sS: the methods that `auto` chose there, trained for less and for longer.
- random-s0: a random dictionary at every layer, with the decoder refitted as after a hop.
- suite-NAME, suite-NAME-sS: whole suites, each from one command; some with every seed.
"""

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from transfer import Job, do

from saerelay.errors import Interrupted
from saerelay.lm.facts import read_facts
from saerelay.planning.leg_spec import LegSpec
from saerelay.planning.legs import auto_lr
from saerelay.planning.recipe import DataSpec, EvaluateSpec, ModelSpec, PlanSpec, Recipe, SitesSpec, TrainSpec
from saerelay.runs.dictionaries import read_info
from saerelay.runs.directory import RunDirectory
from saerelay.sae.architectures import TopK
from saerelay.sae.spec import DictionarySpec, Method
from saerelay.spec import format_count

MAP_TOKENS = 131_072
"""Tokens that a map is fitted on."""
REFIT_TOKENS = 65_536
"""Tokens of those that a decoder is refitted on."""
USUAL = 1 / 8
"""Share of the full budget that a hop is trained with."""
OTHER_SHARES = (1 / 32, 1 / 4)
RATES = (0.5, 1.0, 2.0)
"""Learning rates of the sweep, over the one that `auto` gives."""
BATCHES = (512, 4096)
REPEATED = ("hub", "shared", "alternate", "alternate-quarter")
"""Suites that are repeated with every seed."""


@dataclass(frozen=True)
class Study:
    """A model, its text, the layers, and the full budget in tokens."""

    run: Recipe
    layers: Sequence[int]
    full: int
    out: Path
    width: int

    def tokens(self, share: float) -> int:
        """A share of the full budget, in whole batches."""
        return 512 * round(self.full * share / 512)

    @property
    def equal(self) -> int:
        """Tokens that the usual hop looks at in all: those of its map, and those that it is trained on."""
        return self.tokens(USUAL) + MAP_TOKENS

    @property
    def neighbours(self) -> list[tuple[int, int]]:
        """(source, target) of every hop between neighbours, both ways."""
        pairs = [(a, b) for a in self.layers for b in self.layers if abs(a - b) == 1]
        return sorted(pairs, key=lambda pair: (pair[1], pair[0]))


def open_study(model: str, text: Path, layers: Sequence[int], full: int, eval_tokens: int, out: Path) -> Study:
    """The study of a model."""
    run = Recipe(
        model=ModelSpec(name=model),
        sites=SitesSpec(layers=list(layers)),
        data=DataSpec(text=[str(text)], context=256, cache=str(out / "activations"), block_tokens=65_536),
        dictionary=DictionarySpec(n_latents=2560, activation=TopK(k=32)),
        plan=PlanSpec(preset="scratch", root_tokens=full, moment_tokens=MAP_TOKENS, refit_tokens=REFIT_TOKENS),
        train=TrainSpec(batch_tokens=512),
        evaluate=EvaluateSpec(tokens=eval_tokens),
    )
    return Study(run, layers, full, out, read_facts(run.model).d_model)


# --- the jobs -------------------------------------------------------------------------------------------------------


def all_jobs(study: Study, seeds: int) -> Iterator[Job]:
    """What is to be done, the most important first; a job may depend on what those before it found."""
    for seed in range(seeds):
        yield scratch(study, seed)
        yield hops(study, seed)
        if seed == 0:
            yield random_dictionaries(study)
            yield from suites(study, seed)
            yield from budgets(study, seed)
    for batch in BATCHES:
        yield rates(study, batch)
    for seed in range(1, seeds):
        yield from budgets(study, seed)
        names = [f"suite-{name}-s{seed}" for name in REPEATED]
        yield from (job for job in suites(study, seed) if job.name in names)


def with_legs(study: Study, seed: int, legs: Sequence[LegSpec], batch: int = 512) -> Recipe:
    """The study's recipe with an explicit plan."""
    train = study.run.train.changed(seed=seed, batch_tokens=batch)
    return study.run.changed(plan=study.run.plan.changed(legs=list(legs)), train=train)


def rates(study: Study, batch: int) -> Job:
    """Learning rates from scratch, at a layer of the first and one of the last third."""
    full = study.full // batch * batch
    automatic = auto_lr(study.width, full, batch)
    legs = []
    for layer in (study.layers[len(study.layers) // 4], study.layers[-1]):
        for factor in RATES:
            legs.append(LegSpec(id=f"L{layer}-rate-{factor}", layer=layer, tokens=full, lr=factor * automatic))
    return Job(f"rates-b{batch}", with_legs(study, 0, legs, batch))


def scratch(study: Study, seed: int) -> Job:
    """All layers from scratch."""
    budgets = (study.full, study.equal)
    legs = [root(layer, budget) for budget in budgets for layer in study.layers]
    return Job(f"scratch-s{seed}", with_legs(study, seed, legs))


def root(layer: int, budget: int) -> LegSpec:
    """A leg from scratch."""
    return LegSpec(id=f"L{layer}-{format_count(budget)}", layer=layer, tokens=budget)


def hops(study: Study, seed: int) -> Job:
    """All pairs of neighbours, from the full-budget legs of the same seed."""
    legs = []
    for source, target in study.neighbours:
        directory = RunDirectory(study.out / f"scratch-s{seed}").leg(root(source, study.full).id)
        variants = [("auto", study.tokens(USUAL))]
        if seed == 0:
            variants += [(method, 0) for method in get_args(Method)]
        legs += [hop(source, target, directory, method, tokens) for method, tokens in variants]
    run = with_legs(study, seed, legs)
    return Job(f"hops-s{seed}", run.changed(train=run.train.changed(snapshots=[0])))


def hop(source: int, target: int, parent: Path, method: str, tokens: int, reuse: int = 1) -> LegSpec:
    """A leg from a neighbour."""
    keys: dict[str, Any] = {"method": method, "refit": True, "reuse": reuse}
    leg_id = f"L{source}-L{target}-{method}-{format_count(tokens)}"
    return LegSpec(id=leg_id, layer=target, parent=str(parent), tokens=tokens, **keys)


def budgets(study: Study, seed: int) -> Iterator[Job]:
    """The methods that were chosen at a seed, with second passes and at other budgets; nothing until they are."""
    chosen = list(chosen_methods(study, seed))
    if not chosen:
        return
    twice = [hop(*pair, parent, method, 2 * study.tokens(USUAL), reuse=2) for *pair, parent, method in chosen]
    yield Job(f"twice-s{seed}", with_legs(study, seed, twice))
    others = [
        hop(*pair, parent, method, study.tokens(share)) for *pair, parent, method in chosen for share in OTHER_SHARES
    ]
    yield Job(f"budgets-s{seed}", with_legs(study, seed, others))


def chosen_methods(study: Study, seed: int) -> Iterator[tuple[int, int, Path, str]]:
    """(source, target, parent, method) of every hop, as `auto` chose at a seed; nothing until it has."""
    run = RunDirectory(study.out / f"hops-s{seed}")
    if not run.summary.is_file():
        return
    for source, target in study.neighbours:
        leg_id = f"L{source}-L{target}-auto-{format_count(study.tokens(USUAL))}"
        facts = read_info(run.leg(leg_id)).hop
        if facts and facts.method in get_args(Method):
            parent = RunDirectory(study.out / f"scratch-s{seed}").leg(root(source, study.full).id)
            yield source, target, parent, facts.method


def random_dictionaries(study: Study) -> Job:
    """A random dictionary at every layer, in the place of the parent's: what training must be better than.

    See Korznikov et al. 2026, arXiv 2602.14111.
    """
    legs = []
    for layer in study.layers:
        parent = RunDirectory(study.out / "scratch-s0").leg(root(layer, study.full).id)
        legs.append(hop(layer, layer, parent, "random", 0))
    return Job("random-s0", with_legs(study, 0, legs))


def suites(study: Study, seed: int) -> list[Job]:
    """Whole suites: one root (or some), and hops of an eighth of its budget; the name says the seed, if it is not 0."""
    usual = {"root_tokens": study.full, "transfer_tokens": study.tokens(USUAL), "method": "auto", "refit": True}
    n = len(study.layers)
    middle = study.layers[n // 2]
    wanted: dict[str, dict[str, Any]] = {
        "hub": {"preset": "hub", "roots": [middle]},
        "every-third": {"preset": "hub", "roots": list(study.layers[1::3])},
        "alternate": {"preset": "alternate"},
        "chain": {"preset": "backward", "roots": [study.layers[-1]]},
        "shared": {"preset": "shared", "roots": [middle]},
        "shared-untrained": {"preset": "shared", "roots": [middle], "transfer_tokens": 0},
        "two-shared": {"preset": "shared", "roots": [study.layers[n // 4], study.layers[5 * n // 8]]},
        "alternate-quarter": {"preset": "alternate", "transfer_tokens": study.tokens(1 / 4)},
        "scratch-twice": {"preset": "scratch", "root_reuse": 2},
        "alternate-twice": {
            "preset": "alternate",
            "root_reuse": 2,
            "transfer_tokens": study.tokens(1 / 4),
            "reuse": 2,
        },
        "auto": {"preset": "auto"},
    }
    train = study.run.train.changed(seed=seed)
    suffix = f"-s{seed}" if seed else ""
    return [
        Job(f"suite-{name}{suffix}", study.run.changed(plan=study.run.plan.changed(**(usual | keys)), train=train))
        for name, keys in wanted.items()
    ]


# --- doing them -----------------------------------------------------------------------------------------------------


def do_all(study: Study, jobs: Iterable[Job], console: Console) -> None:
    """Do what is not done yet; the tokens are a full budget's, a map's, and some that filters may take."""
    tokens = math.ceil(1.1 * (study.full + 2 * MAP_TOKENS))
    for job in jobs:
        do(job, study.run, tokens, study.out, console, label=job.name)


def layers_of(text: str) -> list[int]:
    """Layers as written on the command line.

    >>> layers_of("4-6,9")
    [4, 5, 6, 9]
    """
    layers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        layers += range(int(first), int(last or first) + 1)
    return layers


def main() -> None:
    """Parse, then run, or list, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report", "suites", "documents"])
    parser.add_argument("--model", default="google/gemma-3-270m")
    parser.add_argument("--text", type=Path, help="a folder of text")
    parser.add_argument("--layers", type=layers_of, default=layers_of("4-11"))
    parser.add_argument("--full", type=int, default=819_200, help="the full budget, in tokens")
    parser.add_argument("--eval-tokens", type=int, default=6_144)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--also", type=Path, nargs="+", default=[], help="of a report: folders with other layers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="jobs whose name begins with one of these, by commas")
    parser.add_argument("--list", action="store_true", help="say what would be done")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    console = Console(stderr=True, highlight=False)
    out = args.out.absolute()
    if args.command == "report":
        from transfer_real_report import report

        report([out, *args.also], args.docs)
        return
    if args.command == "suites":
        from transfer_real_report import report_suites

        report_suites(out, args.docs)
        return
    if args.command == "documents":
        from transfer_real_documents import documents

        documents(out, args.docs)
        return
    if args.text is None:
        raise SystemExit("--text DIR: which text should the model read?")
    study = open_study(args.model, args.text, args.layers, args.full, args.eval_tokens, out)
    wanted = tuple(args.only.split(","))
    jobs = (job for job in all_jobs(study, args.seeds) if job.name.startswith(wanted))
    if args.list:
        for job in jobs:
            console.print(f"{job.name:<18}{len(job.run.plan.legs):>5} legs {job.samples:>12,} samples")
        return
    try:
        do_all(study, jobs, console)
    except Interrupted:
        raise SystemExit("stopped, and saved: the same command goes on") from None


if __name__ == "__main__":
    main()
