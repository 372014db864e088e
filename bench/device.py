"""Everything that a GPU has to show, in one command of under four minutes: is it right there, and how fast is it?

    python bench/device.py --json device.json --markdown device.md
    python bench/device.py --only correct,digests,steps --budget 120
    python bench/device.py --device cpu --quick          # does the script run? On a processor, with tiny shapes

Sections, in the order of what matters most; none begins once `--budget` seconds have passed:

- `correct`: products, selection and gradients against float64.
- `digests`: a small run of every architecture twice, once interrupted: the same bits?
- `steps`: a training step against SAELens, dictionary_learning and sparsify, and where the host waits (bench/step.py).
- `kernels`: the parts of a step, those in one pass beside the passes they stand for.
- `legs`: 12 legs in lockstep.
- `hops`: what a hop costs beside its training: units, moments, map, fold, refit.
- `states`: a saved state.
- `forward`: the language model's forward, by tokens at once.
- `suite`: all layers against SAELens' multi-SAE training on the same model and tokens (bench/suite.py).

After every section the document is written again, so that what was measured is there whatever happens next. A section
that raises leaves its traceback in the document, and the script ends with exit code 1.

Beside this package it needs torch for CUDA with Triton, and the peers of bench/peers.txt: sae-lens, dictionary-learning
(with --no-deps, and einops and tqdm), eai-sparsify with schedulefree, transformers, datasets. Without them,
`--ours-only`.
"""

import argparse
import gc
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from report import machine
from step import SHAPES, Shape, Synthetic, mid_training, speedups, time_steps
from torch import Tensor

from saerelay.planning.leg import Leg, Schedule
from saerelay.planning.recipe import ModelSpec, Recipe, TrainSpec
from saerelay.sae.initialise import initialise
from saerelay.sae.kernels import Reading, dense_codes, products, reference, sparse_step
from saerelay.sae.kernels.adam import Adam
from saerelay.sae.loss import training_loss
from saerelay.sae.maps import affine
from saerelay.sae.moments import Moments
from saerelay.sae.refit import refit
from saerelay.sae.reshape import revive
from saerelay.sae.spec import DictionarySpec
from saerelay.sae.transfer import fold
from saerelay.sae.units import Units
from saerelay.site import Site
from saerelay.training.cohort import Cohort
from saerelay.training.engine import Trainee
from saerelay.training.state import first_state

KINDS = ("topk", "batchtopk", "jumprelu", "relu")
TINY = Shape(32, 128, 4, 64)
Rows = list[dict]


def finish(args: Namespace) -> None:
    """Wait for the device."""
    if args.device == "cuda":
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], object], args: Namespace, reps: int = 5) -> float:
    """Median wall-clock of a call, with the device idle before and after."""
    call()
    taken = []
    for _ in range(1 if args.quick else reps):
        finish(args)
        began = time.perf_counter()
        call()
        finish(args)
        taken.append(1e3 * (time.perf_counter() - began))
    return round(statistics.median(taken), 4)


def shapes(args: Namespace, *names: str) -> dict[str, Shape]:
    """Some shapes of bench/step.py, or a tiny one."""
    return {"tiny": TINY} if args.quick else {name: SHAPES[name] for name in names}


def a_leg(shape: Shape, layer: int = 0) -> Leg:
    """A leg that trains on and on, at a rate that moves nothing."""
    return Leg(
        id=f"L{layer}",
        role="root",
        layer=layer,
        module="resid_post",
        dictionary=DictionarySpec.parse({"n_latents": shape.n_latents, "k": shape.k}).sized(shape.d_model),
        seed=0,
        schedule=Schedule(budget_tokens=10**10, batch_tokens=shape.batch, lr=1e-7, dead_after_tokens=10**9),
    )


# --- correct ----------------------------------------------------------------------------------------------------------


def off(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖."""
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-300))


def correct(args: Namespace) -> Rows:
    """Relative errors of the products, and of the gradients of each architecture; whether selection is exact."""
    rows: Rows = []
    sizes = [(67, 12289, 770, 64), (4096, 12288, 768, 64), (1024, 24576, 4096, 128)]
    if args.quick:
        sizes = [(33, 257, 33, 7)]
    for size in sizes:
        rows.append(errors_of_products(*size, args))
    rows += [gradient_errors(kind, args) for kind in KINDS]
    return rows


def errors_of_products(B: int, F: int, D: int, k: int, args: Namespace) -> dict:
    """Relative errors of the products on the k largest of random pre-activations; whether these are the largest."""
    ops = products(torch.device(args.device))
    generator = torch.Generator(args.device).manual_seed(0)
    pre = torch.randn(B, F, generator=generator, device=args.device)
    x = torch.randn(B, D, generator=generator, device=args.device)
    W = torch.randn(F, D, generator=generator, device=args.device)
    codes = ops.top_codes(pre, k)
    values = codes.values.view(B, k).sort(dim=1).values
    Z = dense_codes(codes).double()
    sampled = (x.double() @ W.double().T)[codes.rows(), codes.columns.long()]
    left = x.clone()
    explained = ops.explain(left, codes, W)
    rest = x.double() - Z @ W.double()
    transposed, _ = codes.transposed()
    outs = [torch.full((F, D), torch.nan, device=args.device) for _ in range(4)]
    ops.decode_pair(transposed, transposed.values, x, transposed.values, x, *outs[:2])
    ops.decode_pair(transposed, transposed.values, x, transposed.values, x, *outs[2:])
    return {
        "what": f"{D}→{F}, k={k}, B={B}",
        "selection": bool(torch.equal(values, pre.topk(k, dim=1).values.relu().sort(dim=1).values)),
        "decode": off(ops.decode(codes, W), Z @ W.double()),
        "sampled": off(ops.sampled(codes, x, W), sampled),
        "residual": off(left, rest),
        "explained": off(explained, (rest @ W.double().T)[codes.rows(), codes.columns.long()]),
        "fired": bool(torch.equal(ops.fired(codes), (Z > 0).any(dim=0))),
        "adam": error_of_adam(W, ops),
        "pair": off(outs[0], Z.T @ x.double()),
        "same_bits": bool(torch.equal(outs[0], outs[2])),
    }


def an_adam(like: Tensor) -> Adam:
    """A step of Adam on a device."""
    one = torch.ones((), device=like.device)
    return Adam(1e-3 * one, (0.9, 0.999), 10 * one, 2 * one, failed=torch.zeros_like(one))


def error_of_adam(W: Tensor, ops: ModuleType) -> float:
    """The largest relative error of what a step of Adam on rows that keep unit norm leaves."""
    triple = (W / 100, W.roll(1, dims=0), W.roll(2, dims=0).square())
    exact = tuple(tensor.double() for tensor in triple)
    reference.adam_rows(an_adam(W)._replace(lr=1e-3), exact, W.double(), 1.0, unit=True, copy=None)
    ops.adam_rows(an_adam(W), triple, W.clone(), 1.0, unit=True, copy=None)
    return max(map(off, triple, exact))


def gradient_errors(kind: str, args: Namespace) -> dict:
    """The sparse step's gradients against autograd in float64."""
    B, D, F, k = (33, 20, 96, 5) if args.quick else (1000, 768, 6144, 32)
    spec = DictionarySpec.parse({"architecture": kind, "n_latents": F, "k": k, "target_l0": k}).sized(D)
    x = torch.randn(B, D, generator=torch.Generator(args.device).manual_seed(0), device=args.device)
    dictionary = initialise(spec, x, torch.Generator().manual_seed(0))
    if kind == "relu":  # as sparse as in training
        level = dictionary.pre_activations(x).flatten().topk(k * B).values.min()
        dictionary = replace(dictionary, b_enc=dictionary.b_enc - level)
    dead = torch.arange(F, device=args.device) % 5 == 0 if kind.endswith("topk") else None
    parameters = {name: t.double().requires_grad_() for name, t in dictionary.tensors().items()}
    expected = training_loss(spec, replace(dictionary, **parameters), x.double(), dead=dead)
    expected.total.backward()
    room = None if spec.activation.selects_fixed_number else 4 * B * k
    step = sparse_step(spec, dictionary, x, reading=Reading(room=room), dead=dead)
    wanted = {name: t for name, t in parameters.items() if t.grad is not None and name != "b_dec"}
    into = {name: torch.full_like(t, torch.nan, dtype=torch.float32) for name, t in wanted.items()}
    step.gradients(slice(0, F), into)
    return {"what": kind} | {name: off(into[name], t.grad) for name, t in wanted.items() if t.grad is not None}


# --- digests ----------------------------------------------------------------------------------------------------------


def digests(args: Namespace) -> Rows:
    """Whether the same recipe gives the same bits twice, and after an interruption, for each architecture."""
    from saerelay.training.trackers import Several
    from saerelay.workflows.launch import train_run

    rows: Rows = []
    n = 8192 if args.quick else 65_536
    for kind in KINDS[:1] if args.quick else KINDS:
        sections = {
            "model": {"device": args.device},
            "sites": {"layers": [3, 4]},
            "dictionary": {"architecture": kind, "n_latents": 512, "k": 16, "target_l0": 16, "l1": 1.0},
            "plan": {"preset": "hub", "root_tokens": n, "transfer_tokens": n // 2, "moment_tokens": n // 2},
            "train": {"batch_tokens": 512, "dead_after": n // 8},
        }
        recipe = Recipe.parse(sections, source="bench")
        with tempfile.TemporaryDirectory() as folder:
            for name in ("a", "b"):
                train_run(recipe, Path(folder) / name)
            tick = Several.tick
            try:
                Several.tick = interrupting_at(n)  # type: ignore[method-assign]
                train_run(recipe, Path(folder) / "c")
            except KeyboardInterrupt:
                pass
            finally:
                Several.tick = tick  # type: ignore[method-assign]
            train_run(recipe, Path(folder) / "c", resume=True)
            found = [list(hashes(Path(folder) / name)) for name in ("a", "b", "c")]
        rows.append(
            {"kind": kind, "twice": found[0] == found[1], "resumed": found[0] == found[2], "first": found[0][0]}
        )
    return rows


def interrupting_at(cursor: int) -> Callable:
    """A watcher's `tick` that kills the run at a cursor."""

    def tick(self: object, now: int) -> None:
        if now >= cursor:
            raise KeyboardInterrupt

    return tick


def hashes(run: Path) -> Iterator[str]:
    """SHA-256 of each dictionary of a run."""
    for path in sorted(run.glob("legs/*/dictionary.safetensors")):
        yield hashlib.sha256(path.read_bytes()).hexdigest()[:16]


# --- steps ------------------------------------------------------------------------------------------------------------


def steps(args: Namespace) -> Rows:
    """The table of bench/step.py for the shapes of docs/performance.md, with its ratios, and our waits."""
    wanted = [("main", "topk", 0.0), ("wide", "topk", 0.0), ("wide512", "topk", 0.0), ("wide", "topk", 0.2)]
    wanted += [("main", kind, 0.0) for kind in KINDS[1:]]
    wanted += [(name, "topk", 0.0) for name in ("large4096", "wide8192", "wide32768")]
    if args.quick:
        SHAPES["tiny"] = TINY
        wanted = [("tiny", "topk", 0.0)]
    rows: Rows = []
    for name, kind, dead in wanted:
        if late(args):
            break
        options = {"device": args.device, "ours_only": args.ours_only, "compile": False}
        found = time_steps(name, kind, dead, Namespace(reps=1 if args.quick else 12, warmup=5, **options))
        ratios = speedups(found, "median_ms") if not args.ours_only else {}
        ours = min((row for row in found if row["tool"] == "saerelay"), key=lambda row: row["median_ms"])
        rows.append(
            {"shape": name, "kind": kind, "dead": dead, "ours_ms": ours["median_ms"], "l0": ours["l0"], **ratios}
            | {"floor_ms": found[0]["median_ms"], "waits": waits(name, kind, dead, args), "all": found}
        )
        free(args)
    return rows


def waits(name: str, kind: str, dead: float, args: Namespace) -> dict[str, int]:
    """Where the host waits for the device in one of our steps, by line."""
    if args.device != "cuda":
        return {}
    from peers import Ours, Task

    shape = SHAPES[name]
    data = Synthetic.of(shape, args.device)
    x = data.rows(shape.batch, 0)
    start = mid_training(kind, shape, data, x[:2048], dead)
    task = Task(kind, shape.d_model, shape.n_latents, shape.k, shape.batch, args.device, lr=1e-7, steps=1_000_000)
    ours = Ours(task, x, start, precision="bfloat16")
    for _ in range(6):
        ours.step(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        ours.step(x)
        torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message).lower())


def kernels(args: Namespace) -> Rows:
    """Milliseconds of the parts of a step; where one kernel stands for several passes, of these as well."""
    return [
        {"shape": name} | parts_of_a_step(shape, args)
        for name, shape in shapes(args, "wide512", "main", "wide", "large4096").items()
    ]


def parts_of_a_step(shape: Shape, args: Namespace) -> dict[str, float]:
    """Milliseconds by part, each launched 20 times in a row."""
    ops = products(torch.device(args.device))
    generator = torch.Generator(args.device).manual_seed(0)
    x = torch.randn(shape.batch, shape.d_model, generator=generator, device=args.device)
    W = torch.randn(shape.n_latents, shape.d_model, generator=generator, device=args.device) / shape.d_model**0.5
    half, low = x.bfloat16(), W.bfloat16()
    pre = half @ low.T
    codes = ops.top_codes(pre, shape.k)
    n = shape.batch * shape.k
    above = (pre.float() - codes.values.view(shape.batch, shape.k).min()).to(pre)  # a little more than k positive
    transposed, _ = codes.transposed()
    triple = (W.clone(), W.clone(), W.square())
    outs = (torch.empty_like(W), torch.empty_like(W))
    adam = an_adam(W)

    def decode_then_sample() -> None:
        left = x.clone()
        ops.subtract_decoded(left, codes, W)
        ops.sampled(codes, left, W)

    parts: dict[str, Callable[[], object]] = {
        "product": lambda: half @ low.T,
        "select": lambda: ops.top_codes(pre, shape.k),
        "select_torch": lambda: pre.topk(shape.k, dim=1, sorted=False),
        "select_batch": lambda: ops.top_codes_of_batch([pre], n),
        "select_batch_torch": lambda: reference.top_codes_of_batch([pre], n),
        "select_positive": lambda: ops.positive_codes(above, 4 * n),
        "select_positive_torch": lambda: reference.codes_at_least(above, above.new_zeros(1, 1)),
        "explain": lambda: ops.explain(x.clone(), codes, W),
        "explain_in_two": decode_then_sample,
        "pair": lambda: ops.decode_pair(transposed, transposed.values, x, transposed.values, x, *outs),
        "adam": lambda: ops.adam_rows(adam, triple, W, 1.0, unit=True, copy=low),
        "adam_in_passes": lambda: reference.adam_rows(adam, triple, W.clone(), 1.0, unit=True, copy=low),
        "fired": lambda: ops.fired(codes),
        "fired_torch": lambda: reference.fired(codes),
    }
    repeats = 1 if args.quick else 20
    return {
        name: milliseconds(lambda part=part: [part() for _ in range(repeats)], args) / repeats
        for name, part in parts.items()
    }


def legs(args: Namespace) -> Rows:
    """Milliseconds of a leg's step with one leg and with 12 in lockstep."""
    rows: Rows = []
    for name, shape in shapes(args, "wide512", "main", "wide").items():
        x = torch.randn(shape.batch, shape.d_model, device=args.device).bfloat16()
        spec = TrainSpec(precision="bfloat16")
        took = {}
        for n in (1, 12):
            cohort = Cohort(shape.batch)
            for layer in range(n):
                leg = a_leg(shape, layer)
                cohort.add(Trainee(leg, spec, first_state(leg, spec, x[:2048])))
            batch = {Site(layer): x for layer in range(n)}
            for _ in range(4):
                cohort.step(batch)
            took[n] = milliseconds(lambda cohort=cohort, batch=batch: cohort.step(batch), args, 9) / n
            del cohort
            free(args)
        rows.append({"shape": name, "one_ms": took[1], "twelve_ms_a_leg": took[12], "ratio": took[12] / took[1]})
    return rows


# --- hops and states --------------------------------------------------------------------------------------------------


def hops(args: Namespace) -> Rows:
    """Seconds of each fit of a hop, and of all together."""
    rows: Rows = []
    for name, shape in shapes(args, "wide", "large4096").items():
        rows.append({"shape": name} | seconds_of_a_hop(shape, args))
        free(args)
    return rows


def seconds_of_a_hop(shape: Shape, args: Namespace) -> dict[str, float]:
    """Seconds by part, the second time that it is done: the first compiles kernels and claims memory."""
    n = 256 if args.quick else 32_768
    generator = torch.Generator(args.device).manual_seed(0)
    x = torch.randn(n, shape.d_model, generator=generator, device=args.device)
    x *= torch.logspace(0, -1, shape.d_model, device=args.device)
    y = x.roll(1, dims=1) + 0.3 * torch.randn(x.shape, generator=generator, device=args.device)
    leg = a_leg(shape)
    dictionary = initialise(leg.dictionary, x[:1024], torch.Generator().manual_seed(0))
    moments = Moments.empty(shape.d_model, shape.d_model, args.device)
    moments.add(x, y)
    folded = fold(dictionary, affine(moments))

    def fit_moments() -> None:
        Moments.empty(shape.d_model, shape.d_model, args.device).add(x, y)

    def fit_map() -> None:
        moments._covariance = None
        affine(moments)

    parts: dict[str, Callable[[], object]] = {
        "moments": fit_moments,
        "map": fit_map,
        "fold": lambda: fold(dictionary, affine(moments)),
        "revive": lambda: revive(folded, y),
        "refit": lambda: refit(folded, y.split(4096)),
        "units": lambda: Units.fitted_to(y),
        "first state": lambda: first_state(leg, TrainSpec(), y, folded),
    }
    seconds = {what: milliseconds(call, args, reps=2) / 1e3 for what, call in parts.items()}
    return seconds | {"all": sum(seconds.values())}


def states(args: Namespace) -> Rows:
    """Seconds that saving the state of 12 legs takes, and its size."""
    from saerelay.runs.state import save_part

    rows: Rows = []
    for name, shape in shapes(args, "main").items():
        x = torch.randn(2048, shape.d_model, device=args.device)
        spec = TrainSpec()
        parts: dict[str, dict[str, Tensor]] = {}
        for layer in range(2 if args.quick else 12):
            leg = a_leg(shape, layer)
            parts[leg.id] = first_state(leg, spec, x).tensors()
        with tempfile.TemporaryDirectory() as folder:

            def save(parts: dict[str, dict[str, Tensor]] = parts, folder: str = folder) -> None:
                for name, tensors in parts.items():
                    save_part(Path(folder), name, tensors)

            took = milliseconds(save, args, 2)
        size = sum(tensor.numel() * tensor.element_size() for tensors in parts.values() for tensor in tensors.values())
        rows.append({"shape": name, "legs": 12, "seconds": round(took / 1e3, 2), "MB": round(size / 1e6)})
        del parts
        free(args)
    return rows


# --- the language model, and the whole job ------------------------------------------------------------------------


def forward(args: Namespace) -> Rows:
    """Tokens per second of a forward that reads all layers, Pythia-160M's shape, by tokens at once."""
    from harvest import PYTHIA_160M
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from saerelay.lm.facts import read_facts
    from saerelay.lm.model import LanguageModel

    torch.manual_seed(0)
    config = GPTNeoXConfig(**PYTHIA_160M)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    network = GPTNeoXForCausalLM(config).to(args.device, dtype)
    demo = read_facts(ModelSpec(device=args.device))
    facts = demo.changed(n_layers=config.num_hidden_layers, d_model=config.hidden_size, d_attn_z=config.hidden_size)
    model = LanguageModel(network, facts)
    visitors = {Site(layer): (lambda x: None) for layer in range(config.num_hidden_layers)}
    rows: Rows = []
    for tokens in (256,) if args.quick else (4096, 16_384, 32_768, 65_536):
        ids = torch.randint(config.vocab_size, (tokens // 256, 256), device=args.device)
        took = milliseconds(lambda ids=ids: model.visit(ids, visitors), args)
        rows.append({"tokens": tokens, "ms": took, "tokens_per_s": round(tokens / took * 1e3)})
    return rows


def suite(args: Namespace) -> Rows:
    """bench/suite.py on the built-in model and Pythia-160M's shape, once, against the fastest setting of SAELens."""
    contestants = "saerelay" if args.ours_only else "saerelay,saelens-bf16"
    rows: Rows = []
    for model, tokens, batch in (("demo", 2_000_000, 4096), ("pythia", 1_000_000, 4096)):
        if late(args):
            break
        if args.quick:
            model, tokens, batch = "demo", 8192, 512
        options = ["--models", model, "--tokens", tokens, "--batch", batch, "--reps", 1, "--device", args.device]
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, Path(__file__).with_name("suite.py"), *options, "--contestants", contestants]
            done = subprocess.run([*map(str, command), "--json", file.name], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-3000:])
            rows += json.loads(Path(file.name).read_text())["rows"]
        if args.quick:
            break
    return rows


# --- all of it --------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Namespace], Rows]] = {
    "correct": correct,
    "digests": digests,
    "steps": steps,
    "kernels": kernels,
    "legs": legs,
    "hops": hops,
    "states": states,
    "forward": forward,
    "suite": suite,
}


def late(args: Namespace) -> bool:
    """Whether the time is up."""
    return time.time() - args.began > args.budget


def free(args: Namespace) -> None:
    """Give memory back that nothing uses."""
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()


def markdown(document: dict) -> str:
    """The sections as tables for docs/performance.md."""
    lines = [f"{document['machine']['device']}, torch {document['machine']['versions']['torch']}", ""]
    for name, rows in document["sections"].items():
        columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("all", "parts")))
        if not columns:
            continue
        lines += [f"**{name}**", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        for row in rows:
            cells = [row.get(key, "") for key in columns]
            lines.append(f"| {' | '.join(f'{c:.3g}' if isinstance(c, float) else str(c) for c in cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure section by section, and write everything down after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--only", default=",".join(SECTIONS), help="some sections, with commas between them")
    parser.add_argument("--budget", type=float, default=200.0, help="seconds after which nothing new begins")
    parser.add_argument("--ours-only", action="store_true", help="without the peers")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does the script run?")
    parser.add_argument("--json", type=Path, help="write the document here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    args = parser.parse_args()
    args.began = time.time()
    names = args.only.split(",")
    if unknown := set(names) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    document = {"machine": machine(args.device), "sections": {}, "seconds": {}, "failed": {}}
    for name in names:
        if late(args):
            document["failed"][name] = "no time was left"
            continue
        began = time.time()
        try:
            document["sections"][name] = SECTIONS[name](args)
        except Exception:
            document["failed"][name] = traceback.format_exc()
            print(traceback.format_exc(), file=sys.stderr)
        free(args)
        document["seconds"][name] = round(time.time() - began, 1)
        print(f"{name}: {document['seconds'][name]} s", file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        if args.markdown:
            args.markdown.write_text(markdown(document) + "\n", encoding="utf-8")
    print(markdown(document))
    sys.exit(bool(document["failed"]))


if __name__ == "__main__":
    main()
