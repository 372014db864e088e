"""The cross-layer matrix against one evaluation for each of its cells.

    python bench/matrix.py runs/demo --tokens 8192

Three ways to the same numbers, in one process, taking turns: `matrix`, what `saerelay matrix` does; `each`, one
evaluation for each cell, which still starts the language model at the patched layer; `whole`, the same with whole
forward passes (clean, ablated, patched), as evaluations of a single SAE do. Prints JSON: the seconds of each, their
ratio, and the largest difference between their numbers.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from report import machine

import saerelay as sr
from saerelay.analysis.matrix import cells_of
from saerelay.analysis.metrics import held_out, measure
from saerelay.data.corpus import Corpus
from saerelay.lm.model import load_model
from saerelay.runs.documents.quality import EvaluationMetrics

COMPARED = ("fvu", "l0", "delta_ce", "ce_loss_score", "kl_div_with_sae", "kl_div_score")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    suite = sr.load(asked.run)
    plan, model = suite.plan, load_model(suite.plan)
    sequences = held_out(plan, Corpus.open(suite.directory.tokens).test, asked.tokens)
    cells = {f"{c.leg} on {c.target}": (c.target, suite[c.leg]) for c in cells_of(suite, "identity", False)}

    def together() -> dict[str, EvaluationMetrics]:
        return measure(plan, model, sequences, cells, ce=True)

    def each() -> dict[str, EvaluationMetrics]:
        return {key: measure(plan, model, sequences, {key: cell}, ce=True)[key] for key, cell in cells.items()}

    def whole() -> dict[str, EvaluationMetrics]:
        tried = dict(model._resumes)
        model._resumes.update(dict.fromkeys(range(plan.facts.n_layers + 1), False))
        try:
            return each()
        finally:
            model._resumes.clear()
            model._resumes.update(tried)

    ways: dict[str, Callable[[], dict[str, EvaluationMetrics]]] = {"matrix": together, "each": each, "whole": whole}
    seconds = {name: list[float]() for name in ways}
    results = {}
    for _ in range(asked.repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            results[name] = way()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    apart = {name: largest_difference(results[name], results["matrix"]) for name in ("each", "whole")}
    document = {"machine": machine(plan.facts.device), "model": plan.facts.name}
    document |= {"cells": len(cells), "tokens": int(sequences.size)}
    document |= {"seconds": medians, "all_seconds": seconds, "largest_difference": apart}
    document |= {"times_faster": {name: medians[name] / medians["matrix"] for name in ("each", "whole")}}
    print(json.dumps(document, indent=1))


def largest_difference(ours: dict[str, EvaluationMetrics], theirs: dict[str, EvaluationMetrics]) -> float:
    """Over all cells and the metrics compared."""
    return max(abs(getattr(ours[key], name) - getattr(theirs[key], name)) for key in theirs for name in COMPARED)


if __name__ == "__main__":
    main()
