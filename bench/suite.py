"""The whole job, tokens in to SAEs out: every layer of a model from scratch, against SAELens' multi-SAE training.

    python bench/suite.py --tokens 1000000 --reps 3 --threads 2 --json suite.json
    python bench/suite.py --models pythia --batch 4096 --contestants saerelay,saelens-bf16
    python bench/suite.py --models demo --quality

Models: `demo`, the built-in one (8 layers, 192 wide), and `pythia`, random weights in the shape of Pythia-160M (12
layers, 768 wide). TopK at every layer's output, all layers in lockstep from one pass over the built-in corpus. Both
tools read the same sequences, tokenised beforehand, 4096 tokens to a forward pass of SAELens (ours chooses by device);
each contestant runs in a process of its own, in turn. On a GPU (`--device cuda`) `peak_mib` is that of the device.

- saerelay: preset "scratch" and the defaults, which leave out the BOS position (1 of 256) and outliers; its run
  directory, saved states included, is written within the time measured.
- SAELens: `MultiSAETrainingRunner` on the Hugging Face model, which it stops behind the deepest layer. In its favour:
  activations not scaled (the recommended scaling holds many batches of all layers in memory), nothing excluded, no
  logging, no checkpoint, nothing written, no key-value cache in the model, and the small shuffle buffer of its defaults
  (5120 tokens; ours shuffles up to 65536). `autocast` is that of the language model and of the SAEs; `bf16` also loads
  the language model in bfloat16, as ours does where processors multiply it fast.

`wall_s` is training alone: imports, loading and tokenising come before it. `peak_mib` is that of the process, and
`baseline_mib` what it held before training. Parts: SAELens' by timers around its calls; ours from the run directory
(`lm` includes the shuffle: activations go from the forward to their shuffled place). `--quality` trains SAELens as it
recommends instead (scaled, BOS left out, latents dead after a tenth of the run, as ours) and adds the mean FVU over
layers, on the same held-out activations, in float32.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from report import machine, memory, print_json

CONTEXT, LM_TOKENS, TEST_TOKENS = 256, 4096, 16_384
SPARE_TOKENS = 65_536
"""Read beyond the budget: by us to fill the last block, by SAELens to fill its buffer."""


@dataclass(frozen=True)
class Shape:
    """A model and its SAEs."""

    n_layers: int
    d_model: int
    n_latents: int
    k: int


SHAPES = {"demo": Shape(8, 192, 3072, 24), "pythia": Shape(12, 768, 6144, 32)}


@dataclass(frozen=True)
class Job:
    """What every contestant is asked to do; `folder` holds the models and the corpus."""

    folder: str
    model: str
    layers: list[int]
    tokens: int
    batch: int
    quality: bool
    peer_lr: float
    our_lr: float
    device: str

    @property
    def shape(self) -> Shape:
        """Of the model."""
        return SHAPES[self.model]

    @property
    def directory(self) -> str:
        """The model's."""
        return str(Path(self.folder) / self.model)


def mebibytes(name: str) -> float:
    """VmRSS or VmHWM of this process."""
    return round(memory(name) / 2**20, 1)


def finish(job: Job) -> None:
    """Wait for the device."""
    import torch

    if job.device == "cuda":
        torch.cuda.synchronize()


def peak_mebibytes(job: Job) -> float:
    """The most memory that this process has held: of the GPU, if it is on one."""
    import torch

    if job.device == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return mebibytes("VmHWM")


@dataclass
class Clock:
    """Seconds spent in functions, by name; on a GPU, seconds in which the host was busy with them."""

    seconds: dict[str, float] = field(default_factory=dict)

    def wrap(self, name: str, function: Callable) -> Callable:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

        return timed


def prepare(job: Job) -> dict:
    """Write the model and, if it is not there yet, the corpus into the job's folder."""
    import saerelay
    from saerelay.data.corpus import prepare
    from saerelay.lm.facts import read_facts
    from saerelay.lm.tokens import load_tokenizer
    from saerelay.planning.recipe import ModelSpec, Recipe

    demo = Path(saerelay.__file__).parent / "demo"
    if job.model == "demo":
        shutil.copytree(demo, job.directory)
    else:
        import torch
        from harvest import PYTHIA_160M
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        torch.manual_seed(0)
        GPTNeoXForCausalLM(GPTNeoXConfig(**PYTHIA_160M)).save_pretrained(job.directory)
        shutil.copy(demo / "tokenizer.json", job.directory)  # SAELens loads one, and has no use for it here
    run, spec = Recipe.parse({"data": {"context": CONTEXT}}, source="bench"), ModelSpec()
    wanted = {"train_sequences": (job.tokens + SPARE_TOKENS) // CONTEXT, "eval_sequences": TEST_TOKENS // CONTEXT}
    corpus = prepare(run, read_facts(spec), load_tokenizer(spec), Path(job.folder) / "tokens", **wanted)
    return {"train_tokens": corpus.train.size, "source": corpus.facts.source}


def sequences(job: Job, split: str) -> Any:
    """The split's token ids (N, context)."""
    import numpy as np

    return np.load(Path(job.folder) / "tokens" / f"{split}.npy", mmap_mode="r")


def ours(job: Job, dtype: str = "auto") -> dict:
    """`train_plan`, as `saerelay train` calls it."""
    from saerelay.data.stream import LiveStream
    from saerelay.lm.model import load_model
    from saerelay.planning.recipe import Recipe
    from saerelay.runs.dictionaries import read_dictionary
    from saerelay.runs.directory import RunDirectory
    from saerelay.runs.documents.training import RunCost
    from saerelay.training.trackers import Several
    from saerelay.training.train import train_plan
    from saerelay.workflows.settle import plan_run

    recipe = {
        "model": {"name": job.directory, "dtype": dtype, "device": job.device},
        "sites": {"layers": job.layers},
        "data": {"context": CONTEXT},
        "dictionary": {"n_latents": job.shape.n_latents, "k": job.shape.k},
        "plan": {"preset": "scratch", "root_tokens": job.tokens},
        "train": {"batch_tokens": job.batch, "lr": job.our_lr or "auto"},
    }
    plan = plan_run(Recipe.parse(recipe, source="bench"))
    stream = LiveStream(load_model(plan), sequences(job, "train")[: plan.n_tokens // CONTEXT], plan)
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        paths = RunDirectory(Path(folder))
        baseline, began = mebibytes("VmRSS"), time.perf_counter()
        train_plan(plan, paths, stream, Several([]), stream.device)
        finish(job)
        wall, peak = time.perf_counter() - began, peak_mebibytes(job)
        legs = {leg.layer: read_dictionary(paths.leg(leg.id)) for leg in plan.legs}
        lm = RunCost.load(paths.cost).seconds.lm
    steps = sum(info.seconds for _, info in legs.values())
    parts = {"lm": lm, "shuffle": None, "sae_step": steps, "rest": wall - lm - steps}
    result = {"wall_s": wall, "peak_mib": peak, "baseline_mib": baseline, "parts": parts}
    if job.quality:
        result["fvu"] = fvu(job, {layer: lambda x, d=d: d.decode(d.encode(x)) for layer, (d, _) in legs.items()})
    return result


def saelens(
    job: Job, *, dtype: str = "float32", autocast: bool = False, sparse: bool = False, prefetch: bool = False
) -> dict:
    """`MultiSAETrainingRunner.run`, with timers."""
    import sae_lens as sl
    from datasets import Dataset
    from sae_lens.config import LoggingConfig
    from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    steps, names = math.ceil(job.tokens / job.batch), {f"L{layer}": layer for layer in job.layers}
    options = {"use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": not sparse}
    options["normalize_activations"] = "expected_average_only_in" if job.quality else "none"
    shape = {"d_in": job.shape.d_model, "d_sae": job.shape.n_latents, "k": job.shape.k}
    config = MultiSAETrainingRunnerConfig(
        saes={name: sl.TopKTrainingSAEConfig(**shape, **options) for name in names},
        hook_names={name: f"gpt_neox.layers.{layer}" for name, layer in names.items()},
        model_name=job.directory,
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"dtype": dtype, "use_cache": False},
        context_size=CONTEXT,
        store_batch_size_prompts=LM_TOKENS // CONTEXT,
        n_batches_in_buffer=max(20, math.ceil(2 * job.batch / CONTEXT)),  # 20 is its default; counted in sequences
        device=job.device,
        training_tokens=steps * job.batch,
        train_batch_size_tokens=job.batch,
        prefetch_llm_batches=prefetch,
        autocast=autocast,
        autocast_lm=autocast,
        lr=job.peer_lr,
        lr_warm_up_steps=round(0.02 * steps),
        lr_decay_steps=round(0.3 * steps),
        exclude_special_tokens=[0] if job.quality else False,
        dead_feature_window=max(1, steps // 10) if job.quality else 1000,
        n_batches_for_norm_estimate=16,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
    )
    dataset = Dataset.from_dict({"input_ids": sequences(job, "train")})
    runner, clock = MultiSAETrainingRunner(config, override_dataset=dataset), Clock()
    store, loader = runner.activations_store, runner.activations_store.get_multi_hook_data_loader
    store.get_multi_hook_activations = clock.wrap("lm", store.get_multi_hook_activations)
    store.get_batch_tokens = clock.wrap("tokens", store.get_batch_tokens)
    store.get_multi_hook_data_loader = lambda: iter(clock.wrap("loader", partial(next, loader())), None)
    SAETrainer.step = clock.wrap("sae_step", SAETrainer.step)
    baseline, began = mebibytes("VmRSS"), time.perf_counter()
    saes = runner.run()
    finish(job)
    wall, peak, spent = time.perf_counter() - began, peak_mebibytes(job), clock.seconds
    parts = {"lm": spent["lm"], "shuffle": spent["loader"] - spent["lm"] - spent["tokens"]}
    parts |= {"sae_step": spent["sae_step"], "rest": wall - spent["loader"] - spent["sae_step"] + spent["tokens"]}
    result = {"wall_s": wall, "peak_mib": peak, "baseline_mib": baseline, "parts": parts}
    if job.quality:
        result["fvu"] = fvu(job, {layer: saes[name].eval().to("cpu") for name, layer in names.items()})
    return result


def fvu(job: Job, reconstruct: dict[int, Callable]) -> float:
    """Mean over layers of Σ‖x − x_hat‖² / Σ‖x − mean‖² on the test split's activations, BOS left out."""
    import torch

    from saerelay.lm.model import LanguageModel
    from saerelay.planning.recipe import ModelSpec
    from saerelay.site import Site

    model = LanguageModel.load(ModelSpec(name=job.directory, dtype="float32", device="cpu"))
    tokens = torch.from_numpy(sequences(job, "test")[: TEST_TOKENS // CONTEXT].astype("int64"))
    error, square, total = dict.fromkeys(job.layers, 0.0), dict.fromkeys(job.layers, 0.0), dict.fromkeys(job.layers, 0)
    with torch.no_grad():
        for part in tokens.split(LM_TOKENS // CONTEXT):
            for site, x in model.harvest(part, [Site(layer) for layer in job.layers]).items():
                x = x[:, 1:].flatten(0, 1)
                error[site.layer] += float((x - reconstruct[site.layer](x)).double().square().sum())
                square[site.layer] += float(x.double().square().sum())
                total[site.layer] = total[site.layer] + x.double().sum(dim=0)
    n = tokens[:, 1:].numel()
    return statistics.mean(error[i] / (square[i] - float(total[i].square().sum()) / n) for i in job.layers)


CONTESTANTS: dict[str, Callable[[Job], dict]] = {
    "saerelay": ours,
    "saerelay-f32": partial(ours, dtype="float32"),
    "saelens-f32": saelens,
    "saelens-f32-sparse": partial(saelens, sparse=True),
    "saelens-autocast": partial(saelens, autocast=True),
    "saelens-bf16": partial(saelens, dtype="bfloat16", autocast=True),
    "saelens-bf16-prefetch": partial(saelens, dtype="bfloat16", autocast=True, prefetch=True),
}
DEFAULT = ["saerelay", "saerelay-f32", "saelens-f32", "saelens-autocast", "saelens-bf16"]


def child(name: str, job: Job, threads: int) -> None:
    """Run one contestant in this process and print its result as the last line of stdout."""
    with contextlib.redirect_stdout(sys.stderr):  # the peers greet on stdout
        import torch

        if threads:
            torch.set_num_threads(threads)
        result = prepare(job) if name == "prepare" else CONTESTANTS[name](job)
    if "wall_s" in result:
        result = {"model": job.model, "contestant": name, "tokens": job.tokens, "batch": job.batch} | result
        result["tokens_per_s"] = job.tokens / result["wall_s"]
    print(json.dumps(result))


def spawn(name: str, job: Job, threads: int) -> dict:
    """Run one contestant in a process of its own."""
    command = [sys.executable, __file__, "--contestant", name, "--job", json.dumps(asdict(job))]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled"}
    few = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    done = subprocess.run(
        [*command, "--threads", str(threads)], env=os.environ | offline | few, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{name} on {job.model} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def median(runs: list[dict]) -> dict:
    """One row of several runs' medians; the numbers of single runs stay in `wall_s_all`."""

    def middle(values: list) -> Any:
        if isinstance(values[0], dict):
            return {key: middle([value[key] for value in values]) for key in values[0]}
        return round(statistics.median(values), 4) if isinstance(values[0], float) else values[0]

    return middle(runs) | {"wall_s_all": [round(run["wall_s"], 3) for run in runs]}


def compare(rows: list[dict]) -> None:
    """Add to each row our wall-clock and peak memory (of the faster of our settings) over the row's."""
    mine = [row for row in rows if row["contestant"].startswith("saerelay")]
    if mine:
        best = min(mine, key=lambda row: row["wall_s"])
        for row in rows:
            row["ours_over_wall"] = round(best["wall_s"] / row["wall_s"], 3)
            row["ours_over_peak"] = round(best["peak_mib"] / row["peak_mib"], 3)


def show(rows: list[dict], job: Job) -> None:
    """One table on stderr."""
    from rich.console import Console
    from rich.table import Table

    shape = job.shape
    title = f"{job.model}: {len(job.layers)} layers, {shape.d_model}→{shape.n_latents}, k={shape.k}, B={job.batch}"
    heads = ["wall s", "tokens/s", "ours ÷", "lm", "shuffle", "steps", "rest", "peak MiB", "before", "ours ÷", "FVU"]
    table = Table("contestant", title=f"{title}, {job.tokens:,} tokens a layer", title_justify="left")
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        p = row["parts"]
        cells = [f"{row['wall_s']:.1f}", f"{row['tokens_per_s']:,.0f}", f"{row.get('ours_over_wall', math.nan):.2f}"]
        cells += ["" if p[name] is None else f"{p[name]:.1f}" for name in ("lm", "shuffle", "sae_step", "rest")]
        cells += [f"{row['peak_mib']:,.0f}", f"{row['baseline_mib']:,.0f}"]
        cells += [f"{row.get('ours_over_peak', math.nan):.2f}", f"{row['fvu']:.4f}" if "fvu" in row else ""]
        table.add_row(row["contestant"], *cells)
    Console(stderr=True, width=130).print(table)


def main() -> None:
    """Prepare, run the contestants in turn, print: JSON on stdout, tables on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--contestants", default=",".join(DEFAULT), help=f"some of {','.join(CONTESTANTS)}")
    parser.add_argument("--layers", default="all", help="all, or some, such as 0,3")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="training tokens of each layer")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--quality", action="store_true", help="SAELens as it recommends, and held-out FVU")
    parser.add_argument("--peer-lr", type=float, default=1e-3, help="SAELens' learning rate")
    parser.add_argument("--our-lr", type=float, default=0.0, help="ours; 0: as it chooses")
    parser.add_argument("--json", type=Path, help="also write the document here")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        child(args.contestant, Job(**json.loads(args.job)), args.threads)
        return
    names, document = args.contestants.split(","), {"settings": {}, "runs": [], "rows": []}
    if unknown := set(names) - CONTESTANTS.keys():
        parser.error(f"no contestant {', '.join(sorted(unknown))}; there are {', '.join(CONTESTANTS)}")
    document["settings"] = {"threads": args.threads, "reps": args.reps, "context": CONTEXT, "quality": args.quality}
    tokens = args.batch * math.ceil(args.tokens / args.batch)
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models.split(","):
            layers = list(range(SHAPES[model].n_layers)) if args.layers == "all" else args.layers.split(",")
            sites = [int(layer) for layer in layers]
            options = (args.quality, args.peer_lr, args.our_lr, args.device)
            job = Job(folder, model, sites, tokens, args.batch, *options)
            document["settings"] |= spawn("prepare", job, args.threads)
            runs: dict[str, list[dict]] = {name: [] for name in names}
            for rep in range(args.reps):
                for name in names:
                    runs[name].append(spawn(name, job, args.threads))
                    print(f"{model} {name} {rep + 1}/{args.reps}: {runs[name][-1]['wall_s']:.1f} s", file=sys.stderr)
            rows = [median(taken) for taken in runs.values()]
            compare(rows)
            show(rows, job)
            document["runs"] += [run for taken in runs.values() for run in taken]
            document["rows"] += rows
    document["machine"] = machine(args.device)
    print_json(document, args.json)


if __name__ == "__main__":
    main()
