"""SAELens on a real model, setting by setting, in ΔCE: on the tokens of a run of ours, in the order of that run.

    make bench-env
    .peers/bin/python bench/peer_real.py runs/scratch --layers 5,8 --rates 4e-4,1e-3,2e-3 --scalings none

The run must have one TopK SAE per layer, trained from scratch (`plan.preset = "scratch"`), and its activations in
`data.cache`. Each SAE of SAELens has the same number of latents and the same k, and reads the same batches. It is
trained by SAELens' own step (`peers.SaeLens`) with a warm-up of 2% and a decay over the last 30%, written in SAELens'
format, read by us, and measured on the run's test split beside the run's own SAE.

- `--scalings`: SAELens' `normalize_activations`: none, or expected_average_only_in (what its documentation recommends);
  it refuses layer_norm for TopK.
- `--dead-after`: SAELens' `dead_feature_window`, in steps: after how many steps without firing a latent is dead, and
  takes part in the auxiliary loss.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from peers import SaeLens, Task
from report import machine, print_json
from torch import Tensor

import saerelay as sr
from saerelay.analysis.metrics import Placed, held_out, measure
from saerelay.data.corpus import Corpus
from saerelay.planning.leg import Leg
from saerelay.workflows.activations import open_stream


def training_batches(suite: sr.Suite, leg: Leg) -> Iterator[Tensor]:
    """The batches of activations that a leg was trained on, float32, in its order."""
    stream = open_stream(suite.plan, Corpus.open(suite.directory.tokens))
    for number in itertools.count():
        for rows in stream.block(number, [leg.site]).chunks([leg.site], leg.schedule.batch_tokens):
            yield rows[leg.site]


def train_saelens(suite: sr.Suite, leg: Leg, lr: float, scaling: str, dead_after: int) -> sr.Dictionary:
    """Train an SAE of SAELens on a leg's tokens."""
    batch = leg.schedule.batch_tokens
    task = Task(
        kind="topk",
        d_model=suite.plan.facts.width(leg.site),
        n_latents=leg.dictionary.n_latents,
        k=int(leg.dictionary.l0 or 0),
        batch=batch,
        device="cpu",
        lr=lr,
        steps=leg.budget_tokens // batch,
        dead_after_steps=dead_after,
    )
    batches = islice(training_batches(suite, leg), task.steps)
    first = next(batches)
    peer = SaeLens(task, first, None, scaling=scaling)  # type: ignore[arg-type]
    for step, x in enumerate(itertools.chain([first], batches), start=1):
        peer.step(x)
        if step % 100 == 0:
            print(f"\r{leg.id}, {scaling}, {lr:g}: step {step} of {task.steps}", end="", file=sys.stderr)
    print(file=sys.stderr)
    with TemporaryDirectory() as folder:
        peer.save(folder)
        return sr.load_dictionary(folder, format="saelens")[0]


def main() -> None:
    """Train and measure every setting at every layer; each SAE is printed when it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--layers", default="", help="default: all layers of the run")
    parser.add_argument("--rates", default="4e-4,1e-3,2e-3")
    parser.add_argument("--scalings", default="none,expected_average_only_in")
    parser.add_argument("--dead-after", default="100,1000", help="steps")
    parser.add_argument("--tokens", type=int, default=6_144, help="tokens of the test split")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    suite = sr.load(args.run)
    plan = suite.plan
    model = sr.LanguageModel.load(plan.recipe.model)
    sequences = held_out(plan, Corpus.open(suite.directory.tokens).test, args.tokens)
    wanted = {int(layer) for layer in args.layers.split(",") if layer}
    document = {"machine": machine("cpu"), "run": args.run.name, "saes": []}

    def note(leg: Leg, dictionary: sr.Dictionary, **setting: object) -> None:
        metrics = measure(plan, model, sequences, {"": Placed(leg.site, dictionary)}, ce=True)[""]
        names = ("delta_ce", "delta_ce_se", "balanced_fvu", "fvu", "l0", "frac_alive")
        row = {"layer": leg.layer, "tokens": leg.budget_tokens, **setting}
        row |= {name: getattr(metrics, name) for name in names}
        document["saes"].append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)

    for leg in suite.suite_legs:
        if wanted and leg.layer not in wanted:
            continue
        note(leg, suite.dictionary(leg), tool="saerelay")
        settings = itertools.product(args.rates.split(","), args.scalings.split(","), args.dead_after.split(","))
        for lr, scaling, dead_after in settings:
            dictionary = train_saelens(suite, leg, float(lr), scaling, int(dead_after))
            note(leg, dictionary, tool="sae-lens", lr=float(lr), scaling=scaling, dead_after=int(dead_after))
    print_json(document, args.json)


if __name__ == "__main__":
    main()
