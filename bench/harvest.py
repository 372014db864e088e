"""What reading activations costs over the bare forward of the same layers: time, memory, and a cache; prints JSON.

    python bench/harvest.py [--threads 2] [--repeats 15] [--tokens 8192]

Blocks of the demo model and of one shaped as Pythia-160M (random weights), one site and all. `bare` is the model's own
forward over the same token batches, stopped behind the same layer. Repetitions are interleaved; times are medians.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import memory
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from saerelay.data.cache import ActivationCache
from saerelay.data.stream import LiveStream
from saerelay.lm.facts import read_facts
from saerelay.lm.model import LanguageModel
from saerelay.planning.compile import compile_plan
from saerelay.planning.plan import LM_BATCH_TOKENS
from saerelay.planning.recipe import Recipe
from saerelay.site import Site

PYTHIA_160M = {"vocab_size": 50304, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
PYTHIA_160M |= {"intermediate_size": 3072, "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 0}


class Stop(Exception):
    """Ends the bare forward."""


def bare(stream: LiveStream, number: int, layer: int) -> None:
    """The forward over a block's tokens, up to and with a layer, and nothing else."""
    model = stream.model
    assert model

    def stop(*_: object) -> None:
        raise Stop

    handle = model._layers[layer].register_forward_hook(stop)
    tokens = torch.from_numpy(stream.sequences[stream.sequences_of(number)].astype(np.int64))
    with torch.inference_mode():
        for part in tokens.split(LM_BATCH_TOKENS // tokens.shape[1]):
            with suppress(Stop):
                model._model.base_model(input_ids=part.to(model.device), use_cache=False)
    handle.remove()


def peak(call: Callable[[], object]) -> int:
    """Bytes by which memory rises at most while a call runs."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    call()
    return memory("VmHWM") - before


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and processor time of one call; the latter is the steadier on a busy machine."""
    began, used = time.perf_counter(), time.process_time()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, time.process_time() - used


def overhead(times: dict[str, list[tuple[float, float]]], clock: int) -> float:
    """Percent that a block takes over the bare forward: the median over pairs of neighbours."""
    ratios = [block[clock] / bare[clock] for block, bare in zip(times["block"], times["bare"], strict=True)]
    return round(100 * (statistics.median(ratios) - 1), 2)


def measure(run: Recipe, layers: list[int], repeats: int) -> dict[str, Any]:
    """One model, some layers: a block live, from the cache, and the bare forward."""
    run = run.changed(sites=run.sites.changed(layers=layers))
    plan = compile_plan(run, read_facts(run.model))
    sites = [Site(layer) for layer in layers]
    shape = (2 * plan.block_tokens // run.data.context, run.data.context)
    sequences = np.random.default_rng(0).integers(1, plan.facts.tokens.vocab_size, size=shape, dtype=np.uint16)
    live = LiveStream(LanguageModel.load(run.model), sequences, plan)
    bare(live, 0, layers[-1])
    peaks = {"bare": peak(lambda: bare(live, 0, layers[-1])), "block": peak(lambda: live.block(0, sites))}
    calls: dict[str, Callable[[], object]] = {
        "bare": lambda: bare(live, 0, layers[-1]),
        "block": lambda: live.block(0, sites),
    }
    with tempfile.TemporaryDirectory() as folder:
        with_cache = run.changed(data=run.data.changed(cache=folder))
        cached_plan = plan.changed(recipe=with_cache)
        cached = LiveStream(live.model, sequences, cached_plan, ActivationCache(cached_plan))
        first, _ = seconds(lambda: cached.block(0, sites))
        calls["cache"] = lambda: cached.block(0, sites)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                times[name].append(seconds(call))
    median = {name: statistics.median(wall for wall, _ in values) for name, values in times.items()}
    return {
        "model": Path(run.model.name).name,
        "dtype": plan.facts.dtype,
        "sites": len(sites),
        "block_tokens": plan.block_tokens,
        "seconds": {name: round(value, 4) for name, value in median.items()} | {"into_cache": round(first, 4)},
        "tokens_per_second": {name: round(plan.block_tokens / value) for name, value in median.items()},
        "overhead_percent": {"wall": overhead(times, 0), "processor": overhead(times, 1)},
        "peak_bytes": peaks,
        "buffer_bytes": sum(x.nbytes for x in live.buffers.values()),
    }


def main() -> None:
    """Print one JSON line for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=8192, help="of one block")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--models", nargs="+", default=["demo", "pythia-160m-shaped"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            path = name
            if name == "pythia-160m-shaped":
                path = f"{folder}/{name}"
                GPTNeoXForCausalLM(GPTNeoXConfig(**PYTHIA_160M)).save_pretrained(path)
            sections = {"model": {"name": path, "dtype": args.dtype}, "data": {"block_tokens": args.tokens}}
            run = Recipe.parse(sections, source="bench")
            n_layers = read_facts(run.model).n_layers
            for layers in ([n_layers - 1], list(range(n_layers))):
                print(json.dumps(measure(run, layers, args.repeats)), flush=True)


if __name__ == "__main__":
    main()
