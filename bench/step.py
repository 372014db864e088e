"""One training step (forward, loss, backward, clip, optimizer, norm constraint) against the tools that people use now.

    python bench/step.py --shapes main,small --kinds topk --reps 20 --threads 2 --json step.json
    python bench/step.py --shapes small --kinds topk,batchtopk --dead 0.2
    python bench/step.py --shapes small --kinds topk,batchtopk --quality --quality-tokens 1000000

All contestants run in one process, in turn: repetition r takes two steps of each and times the second, so that a slow
minute of the machine hits all alike and each finds its own data in the caches, as in training. Every step is that of a
dictionary in mid-training: all start from the directions that generated the activations, with thresholds (JumpReLU) or
biases (ReLU) at which L0 is k, and a learning rate so small that they stay there; L0 at the timed parameters is
measured and printed. With `--dead`, a share of the latents has encoder rows so short that they never fire, and is
marked dead in each tool's own books. The floor is the encoder product x W_encᵀ alone, in bf16, into memory that is
there already.

`--quality` trains every contestant from its own initialisation on the same batches in the same order, with the same
share of warm-up and decay and the same window after which a latent is dead, at each of `--quality-lrs`, and keeps the
best. Activations are scaled as each tool recommends: SAELens to a mean norm of √D ("expected_average_only_in"),
dictionary_learning to a mean squared norm of 1, sparsify not at all; its rates are its own default times each rate over
1e-3, without a schedule. We subtract the mean and they do not: `--quality-centred` subtracts it for all. FVU is
Σ‖x − x_hat‖² / Σ‖x − mean‖² on held-out rows in raw units, through each tool's own inference path; BatchTopK's
threshold is set for all of them, on training rows, to where mean L0 is k (as we do; the peers' running averages lag).
The small shape uses layer 4 of the built-in model, other shapes synthetic activations. JumpReLU and ReLU give (FVU, L0)
pairs.
"""

import argparse
import contextlib
import gc
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from peers import Contestant, Entry, Start, Task, entries, shifted
from report import machine, print_json
from rich.console import Console
from rich.table import Table
from torch import Tensor

from saerelay.sae.dictionary import Dictionary


@dataclass(frozen=True)
class Shape:
    """Widths and sizes of one comparison."""

    d_model: int
    n_latents: int
    k: int
    batch: int

    def __str__(self) -> str:
        return f"{self.d_model}→{self.n_latents}, k={self.k}, B={self.batch}"


CPU_SHAPES = ("small", "main", "main512", "wide", "large")
"""What `--shapes all` means on a processor; the others take it minutes a step."""
SHAPES = {
    "small": Shape(192, 3072, 24, 512),
    "main": Shape(768, 6144, 32, 4096),
    "main512": Shape(768, 6144, 32, 512),
    "wide": Shape(768, 12288, 64, 4096),
    "wide512": Shape(768, 12288, 64, 512),
    "wide8192": Shape(768, 12288, 64, 8192),
    "wide32768": Shape(768, 12288, 64, 32768),
    "large": Shape(2304, 16384, 64, 2048),
    "large4096": Shape(2304, 16384, 64, 4096),
}
KINDS: tuple[str, ...] = ("topk", "batchtopk", "jumprelu", "relu")


@dataclass(frozen=True)
class Synthetic:
    """SAE-like activations: k of F random directions with skewed frequencies, and noise."""

    directions: Tensor
    k: int

    @classmethod
    def of(cls, shape: Shape, device: str) -> "Synthetic":
        """The one for a shape."""
        generator = torch.Generator(device).manual_seed(0)
        rows = torch.randn(shape.n_latents, shape.d_model, generator=generator, device=device)
        return cls(torch.nn.functional.normalize(rows, dim=1), shape.k)

    def rows(self, n: int, seed: int) -> Tensor:
        """Activations (n, D), float32: latent j fires about as often as j^(−1/2), with an exponential tail of sizes."""
        W, device = self.directions, self.directions.device
        generator = torch.Generator(device).manual_seed(1000 + seed)
        columns = torch.rand(n, self.k, generator=generator, device=device).square().mul(W.shape[0]).long()
        sizes = 0.5 - torch.rand(n, self.k, generator=generator, device=device).clamp(min=1e-6).log()
        x = torch.nn.functional.embedding_bag(columns, W, per_sample_weights=sizes, mode="sum")
        return x.add_(torch.randn(x.shape, generator=generator, device=device), alpha=0.5 / W.shape[1] ** 0.5)


def mid_training(kind: str, shape: Shape, data: Synthetic, x: Tensor, dead_share: float) -> Start:
    """The generating directions as a dictionary whose L0 is k, a share of it dead."""
    W_dec, W_enc = data.directions, data.directions.clone()
    dead = torch.zeros(shape.n_latents, dtype=torch.bool, device=x.device)
    dead[
        torch.randperm(shape.n_latents, generator=torch.Generator().manual_seed(0))[: round(dead_share * len(dead))]
    ] = True
    W_enc[dead] *= 0.01
    pre = (x @ W_enc.T).flatten()
    threshold = float(pre.topk(shape.k * x.shape[0], sorted=False).values.min())
    zeros = torch.zeros(shape.n_latents, device=x.device)
    dictionary = Dictionary(
        architecture=kind, k=shape.k if kind in ("topk", "batchtopk") else None,
        W_enc=W_enc, b_enc=zeros, W_dec=W_dec, b_dec=torch.zeros(shape.d_model, device=x.device),
    )  # fmt: skip
    return Start(shifted(dictionary, threshold), dead)


def milliseconds(call: Callable[[], object], device: str) -> float:
    """Wall-clock of one call, with the device idle before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


def time_steps(name: str, kind: str, dead_share: float, args: argparse.Namespace) -> list[dict]:
    """Rows of the timing table for one shape and kind."""
    shape, device = SHAPES[name], args.device
    data = Synthetic.of(shape, device)
    batches = [data.rows(shape.batch, seed) for seed in range(4)]
    start = mid_training(kind, shape, data, batches[0], dead_share)
    task = Task(kind, shape.d_model, shape.n_latents, shape.k, shape.batch, device, lr=1e-7, steps=1_000_000)
    who = entries(kind, device, ours_only=args.ours_only, compiled=args.compile)
    made: dict[Entry, Contestant] = {entry: entry.make(task, batches[0], start) for entry in who}
    narrow = [x.bfloat16() for x in batches]
    W, W16 = data.directions.T, data.directions.T.bfloat16()
    out = torch.empty(shape.batch, shape.n_latents, device=device)  # new memory each time would double the floor
    out16 = out.bfloat16()
    calls: dict[tuple[str, str], Callable[[int], object]] = {
        ("floor", "bf16"): lambda i: torch.mm(narrow[i], W16, out=out16),
        ("floor", "f32"): lambda i: torch.mm(batches[i], W, out=out),
    }
    for entry, contestant in made.items():
        calls[entry.tool, entry.setting] = lambda i, contestant=contestant: contestant.step(batches[i])
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for rep in range(-args.warmup, args.reps):
        which = rep % len(batches)
        for key, call in calls.items():
            call(which)  # what the others left in the caches is not its fault
            ms = milliseconds(lambda call=call, i=which: call(i), device)
            if rep >= 0:
                samples[key].append(ms)
    floor = statistics.median(samples["floor", "bf16"])
    rows = []
    for key, taken in samples.items():
        median = statistics.median(taken)
        rows.append(
            {"shape": name, **asdict(shape), "kind": kind, "dead": dead_share, "tool": key[0], "setting": key[1]}
            | {"median_ms": round(median, 3), "min_ms": round(min(taken), 3), "reps": len(taken)}
            | {"tokens_per_s": round(shape.batch / median * 1e3), "over_floor": round(median / floor, 2)}
        )
    for row, contestant in zip(rows[2:], made.values(), strict=True):
        row |= {"l0": round(contestant.l0(batches[0]), 2), "n_dead": contestant.n_dead()}
    return rows


# --- quality --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """Training rows in order (any float dtype) and held-out rows."""

    train: Tensor
    test: Tensor

    def batches(self, size: int) -> Iterator[Tensor]:
        """The training rows, float32, in batches of equal size."""
        for first in range(0, len(self.train) - size + 1, size):
            yield self.train[first : first + size].float()


def rows_of(name: str, n_train: int, n_test: int, device: str) -> Rows:
    """Real activations for the small shape, synthetic ones for the others."""
    shape = SHAPES[name]
    if name == "small":
        from sweep import harvest

        from saerelay.planning.recipe import Recipe

        train, test = harvest(Recipe(), [4], n_train, n_test)[4]
        return Rows(train[:n_train].to(device), test.to(device))
    data = Synthetic.of(shape, device)
    train = torch.cat([data.rows(min(8192, n_train - i), 10 + i) for i in range(0, n_train, 8192)])
    return Rows(train, data.rows(n_test, 9))


def train_once(entry: Entry, task: Task, data: Rows) -> dict:
    """Train one contestant at one learning rate and measure it."""
    contestant = entry.make(task, data.train[:32768].float(), None)
    taken = [milliseconds(lambda x=x: contestant.step(x), task.device) for x in data.batches(task.batch)]
    fvu, l0 = fidelity(contestant.inference(data.train[:8192].float()), data.test)
    return {"lr": float(f"{task.lr:.3g}"), "fvu": round(fvu, 5), "l0": round(l0, 2), "n_dead": contestant.n_dead()} | {
        "median_ms": round(statistics.median(taken), 3),
        "seconds": round(sum(taken) / 1e3, 1),
    }


@torch.no_grad()
def fidelity(reconstruct: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> tuple[float, float]:
    """FVU and mean L0 on x (N, D)."""
    error = active = 0.0
    for part in x.split(4096):
        x_hat, n_active = reconstruct(part)
        error += float((part.double() - x_hat.double()).square().sum())
        active += float(n_active.sum())
    return error / float((x.double() - x.double().mean(dim=0)).square().sum()), active / len(x)


def compare_quality(name: str, kinds: list[str], args: argparse.Namespace) -> list[dict]:
    """Rows of the quality table for one shape: every contestant at every learning rate, its best one marked."""
    shape = SHAPES[name]
    data = rows_of(name, args.quality_tokens, 65_536 if name == "small" else 16_384, args.device)
    if args.quality_centred:
        mean = data.train.float().mean(dim=0)
        data = Rows((data.train.float() - mean).to(data.train.dtype), data.test - mean)
    steps = len(data.train) // shape.batch
    task = Task(
        "topk", shape.d_model, shape.n_latents, shape.k, shape.batch, args.device, lr=0.0, steps=steps,
        dead_after_steps=max(1, steps // 10),
    )  # fmt: skip
    rows = []
    for kind in kinds:
        for entry in entries(kind, args.device, ours_only=args.ours_only, compiled=False):
            if not entry.trains_alike:
                continue
            runs = []
            for lr in args.quality_lrs:
                scaled = 5e-3 / (shape.n_latents / 2**14) ** 0.5 * lr / 1e-3 if entry.tool == "sparsify" else lr
                runs.append(train_once(entry, replace(task, kind=kind, lr=scaled), data))
                print(
                    json.dumps({"kind": kind, "tool": entry.tool, "setting": entry.setting} | runs[-1]), file=sys.stderr
                )
            best = min(runs, key=lambda run: run["fvu"])
            rows += [
                {"shape": name, **asdict(shape), "kind": kind, "tool": entry.tool, "setting": entry.setting}
                | {"tokens": steps * shape.batch, "centred": args.quality_centred, "best": run is best}
                | run
                for run in runs
            ]
            gc.collect()
    return rows


# --- what is printed ------------------------------------------------------------------------------------------------


def speedups(rows: list[dict], column: str) -> dict[str, float]:
    """How many times longer the fastest setting of each peer takes than ours."""
    fastest: dict[str, float] = {}
    for row in rows:
        fastest[row["tool"]] = min(row[column], fastest.get(row["tool"], float("inf")))
    peers = fastest.keys() - {"saerelay", "floor"}
    return {tool: round(fastest[tool] / fastest["saerelay"], 2) for tool in sorted(peers)}


def show(console: Console, title: str, rows: list[dict], columns: dict[str, str]) -> None:
    """One table: `columns` maps keys of the rows to headings."""
    table = Table("tool", *columns.values(), title=title, title_justify="left")
    for row in rows:
        cells = ["" if row.get(key) is None else f"{row[key]:,}" for key in columns]
        table.add_row(f"{row['tool']} {row['setting']}", *cells, style="bold" if row.get("best") else "")
    console.print(table)


TIMING_COLUMNS = {"median_ms": "median ms", "min_ms": "min ms", "tokens_per_s": "tokens/s", "over_floor": "× floor",
                  "l0": "L0", "n_dead": "dead"}  # fmt: skip
QUALITY_COLUMNS = {"lr": "lr", "fvu": "FVU", "l0": "L0", "n_dead": "dead", "median_ms": "step ms", "seconds": "s"}


def main() -> None:
    """Parse, measure, print: JSON on stdout, tables on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="all", help=f"all, or some of {','.join(SHAPES)}")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--reps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5, help="untimed repetitions before the others")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--dead", type=float, default=0.0, help="TopK, BatchTopK: time also with this share dead")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="SAELens' compile_sae")
    parser.add_argument("--json", type=Path, help="also write the document here")
    parser.add_argument("--quality", action="store_true", help="compare what is learned, instead of timing steps")
    parser.add_argument("--quality-tokens", type=int, default=1_000_000)
    parser.add_argument("--quality-lrs", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--quality-centred", action="store_true", help="subtract the mean for everyone")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch._logging.set_logs(all=logging.ERROR)
    if args.threads:
        torch.set_num_threads(args.threads)
    all_shapes = list(SHAPES) if args.device == "cuda" else list(CPU_SHAPES)
    shapes = all_shapes if args.shapes == "all" else args.shapes.split(",")
    kinds = args.kinds.split(",")
    console = Console(stderr=True, width=110)
    document = {"machine": machine(args.device), "steps": [], "ratios": [], "quality": []}
    with contextlib.redirect_stdout(sys.stderr):  # the peers greet on stdout
        for name in shapes:
            if args.quality:
                rows = compare_quality(name, kinds, args)
                document["quality"] += rows
                for kind in kinds:
                    title = f"{kind}, {SHAPES[name]}: {rows[0]['tokens']:,} tokens; the best rate in bold"
                    show(console, title, [row for row in rows if row["kind"] == kind], QUALITY_COLUMNS)
                continue
            for kind in kinds:
                for dead_share in sorted({0.0, args.dead if kind in ("topk", "batchtopk") else 0.0}):
                    rows = time_steps(name, kind, dead_share, args)
                    ratios = {column: speedups(rows, column) for column in ("median_ms", "min_ms")}
                    document["steps"] += rows
                    document["ratios"].append({"shape": name, "kind": kind, "dead": dead_share} | ratios)
                    show(console, f"{kind}, {SHAPES[name]}, {dead_share:.0%} dead", rows, TIMING_COLUMNS)
                    if not args.ours_only:
                        console.print("fastest setting of each peer over ours:", ratios, end="\n\n")
                    torch._dynamo.reset()
                    gc.collect()
    print_json(document, args.json)


if __name__ == "__main__":
    main()
