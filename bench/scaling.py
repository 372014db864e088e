"""How the cost of a training step grows with width, latents, k, batch and the number of legs: curves, and a figure.

    python bench/scaling.py --threads 2 --json scaling.json --figure docs/performance.png

One quantity at a time changes from the base shape (768→6144, k=32, B=512; legs: 192→3072, k=24, B=512). Every point is
the median of `--reps` steps of a TopK dictionary with a bf16 encoder product; beside it stands the floor, that product
alone. JSON on stdout.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from report import print_json

from saerelay.planning.leg import Leg, Schedule
from saerelay.planning.recipe import TrainSpec
from saerelay.sae.spec import DictionarySpec
from saerelay.site import Site
from saerelay.training.cohort import Cohort
from saerelay.training.engine import Trainee
from saerelay.training.state import first_state


@dataclass(frozen=True)
class Shape:
    """Widths and sizes of one point."""

    d_model: int = 768
    n_latents: int = 6144
    k: int = 32
    batch: int = 512
    legs: int = 1


SMALL = Shape(192, 3072, 24, 512)
CURVES: dict[str, list[Shape]] = {
    "d_model": [replace(Shape(), d_model=d) for d in (192, 384, 768, 1536)],
    "n_latents": [replace(Shape(), n_latents=f) for f in (1536, 3072, 6144, 12_288, 24_576)],
    "k": [replace(Shape(), k=k) for k in (8, 16, 32, 64, 128)],
    "batch": [replace(Shape(), batch=b) for b in (128, 256, 512, 1024, 2048, 4096)],
    "legs": [replace(SMALL, legs=n) for n in (1, 2, 4, 8, 12)],
}


def leg(shape: Shape, layer: int) -> Leg:
    """A leg that trains on and on, at a rate that moves nothing."""
    dictionary = DictionarySpec.parse({"n_latents": shape.n_latents, "k": shape.k}).sized(shape.d_model)
    schedule = Schedule(budget_tokens=10**9, batch_tokens=shape.batch, lr=1e-7, dead_after_tokens=10**9)
    return Leg(
        id=f"L{layer}",
        role="root",
        layer=layer,
        module="resid_post",
        dictionary=dictionary,
        seed=0,
        schedule=schedule,
    )


def median_ms(call: Callable[[], object], reps: int, device: str) -> float:
    """Wall-clock of a call, after five that are not counted, with the device idle before and after."""
    taken = []
    for rep in range(-5, reps):
        finish(device)
        began = time.perf_counter()
        call()
        finish(device)
        if rep >= 0:
            taken.append(time.perf_counter() - began)
    return round(statistics.median(taken) * 1e3, 3)


def finish(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(shape: Shape, reps: int, device: str) -> dict[str, float]:
    """Milliseconds of a step of one leg, and of its encoder product alone."""
    x = torch.randn(shape.batch, shape.d_model, generator=torch.Generator().manual_seed(0)).to(device)
    cohort = Cohort(shape.batch)
    for layer in range(shape.legs):
        spec = TrainSpec(precision="bfloat16")
        cohort.add(Trainee(leg(shape, layer), spec, first_state(leg(shape, layer), spec, x)))
    batch = {Site(layer): x for layer in range(shape.legs)}
    step = median_ms(lambda: cohort.step(batch), reps, device) / shape.legs
    W, narrow = cohort["L0"].state.dictionary.W_enc.bfloat16().T, x.bfloat16()
    out = torch.empty(shape.batch, shape.n_latents, dtype=torch.bfloat16, device=device)
    floor = median_ms(lambda: torch.mm(narrow, W, out=out), reps, device)
    return {"step_ms": round(step, 3), "floor_ms": floor}


def draw(points: list[dict], path: Path) -> None:
    """One panel a quantity, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(CURVES), figsize=(3.1 * len(CURVES), 3.1), constrained_layout=True)
    names = {"d_model": "width D", "n_latents": "latents F", "k": "active k", "batch": "batch B", "legs": "legs"}
    for panel, name in zip(panels, CURVES, strict=True):
        mine = [point for point in points if point["curve"] == name]
        at = [point[name] for point in mine]
        panel.plot(at, [point["step_ms"] for point in mine], "o-", label="training step")
        panel.plot(at, [point["floor_ms"] for point in mine], "s--", color="grey", label="encoder product alone")
        panel.set(xscale="log", yscale="log", xlabel=names[name], xticks=at, xticklabels=[f"{n:,}" for n in at])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms (per leg)")
    panels[0].legend(fontsize=8)
    panels[-1].set_title("192→3072, k=24, B=512", fontsize=8)
    figure.suptitle("One TopK step on two cores; base 768→6144, k=32, B=512", fontsize=10)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)


def main() -> None:
    """Measure all curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--reps", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    points = []
    for name, shapes in CURVES.items():
        for shape in shapes:
            points.append({"curve": name} | vars(shape) | measure(shape, args.reps, args.device))
    print_json(
        {"device": args.device, "threads": torch.get_num_threads(), "torch": torch.__version__, "points": points},
        args.json,
    )
    if args.figure:
        draw(points, args.figure)


if __name__ == "__main__":
    main()
