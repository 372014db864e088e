"""SAELens on a real model, setting by setting, in ΔCE: on the tokens of a run of ours, in the order of that run.

    make bench-env
    .peers/bin/python bench/peer_real.py runs/scratch --layers 5,8 --rates 4e-4,1e-3,2e-3 --scalings none

The run must have one TopK SAE per layer, trained from scratch (`plan.preset = "scratch"`), and its activations in
`data.cache`. Each SAE of SAELens gets the same number of latents, the same k and the same tokens in batches of the same
size, and is trained by SAELens' own step (see peers.py) with a warm-up of 2% and a decay over the last 30%. Then it is
spliced into the language model on the run's test split, as is the run's own SAE. Printed are, per SAE: ΔCE with its
standard error over sequences, FVU, L0, and the share of latents that fired on the test split.

- `--scalings`: SAELens' `normalize_activations`: none, or expected_average_only_in (what its documentation recommends);
  it refuses layer_norm for TopK.
- `--dead-after`: SAELens' `dead_feature_window`, in steps: after how many steps without firing a latent is dead, and
  takes part in the auxiliary loss.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from report import machine, print_json
from torch import Tensor

import saerelay as sr
from saerelay.analysis.logits import CleanStates
from saerelay.analysis.metrics import batches, held_out
from saerelay.data.corpus import Corpus
from saerelay.data.kept import kept_positions
from saerelay.lm.model import LanguageModel
from saerelay.planning.leg import Leg
from saerelay.workflows.activations import open_stream

Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Activations (n, D) to their reconstruction (n, D) and the codes (n, F)."""


@dataclass(frozen=True)
class Setting:
    """What is tried."""

    scaling: str
    lr: float
    dead_after: int


@dataclass(frozen=True)
class Quality:
    """How good an SAE is on held-out text."""

    delta_ce: float
    delta_ce_se: float
    fvu: float
    l0: float
    alive: float


def training_batches(suite: sr.Suite, leg: Leg, batch_tokens: int) -> Iterator[Tensor]:
    """The kept activations that a leg was trained on, in its order, float32, in batches of another size."""
    stream = open_stream(suite.plan, Corpus.open(suite.directory.tokens))
    n_blocks = math.ceil(leg.budget_tokens / suite.plan.block_tokens)
    left = leg.budget_tokens
    for number in range(n_blocks):
        block = stream.block(number, [leg.site])
        positions = min(left, suite.plan.block_tokens)
        rows = block.activations[leg.site][:positions][block.keep[:positions]].float()
        yield from rows.split(batch_tokens)
        left -= positions


def train_saelens(suite: sr.Suite, leg: Leg, setting: Setting, batch_tokens: int) -> Reconstruct:
    """Train an SAE of SAELens on a leg's tokens; returns its inference on raw activations."""
    import sae_lens as sl
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(leg.seed)
    width = suite.plan.facts.width(leg.site)
    config = sl.TopKTrainingSAEConfig(
        d_in=width,
        d_sae=leg.dictionary.n_latents,
        k=int(leg.dictionary.l0 or 0),
        normalize_activations=setting.scaling,
        device="cpu",
        dtype="float32",
    )
    sae = sl.TopKTrainingSAE(config)
    n_steps = leg.budget_tokens // batch_tokens
    trainer_config = SAETrainerConfig(
        total_training_samples=n_steps * batch_tokens,
        train_batch_size_samples=batch_tokens,
        lr=setting.lr,
        lr_end=setting.lr / 10,
        lr_warm_up_steps=round(0.02 * n_steps),
        lr_decay_steps=round(0.3 * n_steps),
        device="cpu",
        autocast=False,
        dead_feature_window=setting.dead_after,
    )
    trainer = SAETrainer(cfg=trainer_config, sae=sae, data_provider=iter(()))
    scale = 1.0
    for step, x in enumerate(training_batches(suite, leg, batch_tokens)):
        if step == 0 and setting.scaling == "expected_average_only_in":
            scale = width**0.5 / float(x.norm(dim=1).mean())
            trainer.activation_scaler.scaling_factor = scale
        trainer.step(x)
        trainer.n_training_steps += 1
        if step % 100 == 0:
            print(f"\r{leg.id} {setting}: step {step} of {n_steps}", end="", file=sys.stderr)
    print(file=sys.stderr)
    if scale != 1.0:
        sae.fold_activation_norm_scaling_factor(scale)
    sae.eval()

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = sae.encode(x)
        return sae.decode(codes), codes.to_dense() if codes.is_sparse else codes

    return reconstruct


@torch.no_grad()
def measure(suite: sr.Suite, model: LanguageModel, leg: Leg, reconstruct: Reconstruct, tokens: int) -> Quality:
    """Splice reconstructions into the model on the test split, with the positions that `saerelay eval` keeps."""
    plan = suite.plan
    read = plan.with_probe([leg.site])
    deltas: list[Tensor] = []
    fired = torch.zeros(leg.dictionary.n_latents, dtype=torch.bool)
    n_active = 0
    rows: list[Tensor] = []
    errors = 0.0
    sequences = held_out(plan, Corpus.open(suite.directory.tokens).test, tokens)
    for ids in batches(plan, sequences, model.device):
        clean = model.forward(ids, read)
        flat = {site: x.flatten(0, 1) for site, x in clean.activations.items()}
        keep = kept_positions(plan, ids, flat)
        x = flat[leg.site][keep].float()
        x_hat, codes = reconstruct(x)
        fired |= (codes != 0).any(dim=0)
        n_active += int((codes != 0).sum())
        errors += float((x - x_hat).double().square().sum())
        rows.append(x.double())

        spliced = clean.activations[leg.site].clone()
        spliced.view(-1, spliced.shape[-1])[keep] = x_hat.to(spliced.dtype)
        with model.resuming(clean, leg.site) as states_with:
            changed = states_with(spliced)
        kept = keep.view_as(ids)
        own, loss = CleanStates(model.head, clean.states, ids, kept).losses([changed])
        deltas.append((loss.ce - own.ce).sum(dim=1) / kept[:, :-1].sum(dim=1))

    delta = torch.cat(deltas).double()
    x = torch.cat(rows)
    return Quality(
        delta_ce=float(delta.mean()),
        delta_ce_se=float(delta.std() / math.sqrt(len(delta))),
        fvu=errors / float((x - x.mean(dim=0)).square().sum()),
        l0=n_active / len(x),
        alive=float(fired.float().mean()),
    )


def main() -> None:
    """Train and measure every setting at every layer; each line is printed when it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--layers", default="", help="default: all layers of the run")
    parser.add_argument("--rates", default="4e-4,1e-3,2e-3")
    parser.add_argument("--scalings", default="none,expected_average_only_in")
    parser.add_argument("--dead-after", default="100,1000", help="steps")
    parser.add_argument("--batch", type=int, default=512, help="tokens per step of SAELens")
    parser.add_argument("--tokens", type=int, default=6_144, help="tokens of the test split")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    suite = sr.load(args.run)
    model = LanguageModel.load(suite.plan.recipe.model)
    wanted = {int(layer) for layer in args.layers.split(",") if layer}
    settings = [
        Setting(scaling, float(lr), int(dead_after))
        for scaling, lr, dead_after in itertools.product(
            args.scalings.split(","), args.rates.split(","), args.dead_after.split(",")
        )
    ]
    document = {"machine": machine("cpu"), "run": args.run.name, "batch": args.batch, "saes": []}

    def note(leg: Leg, tool: str, setting: Setting | None, quality: Quality) -> None:
        row = {"layer": leg.layer, "tool": tool, "tokens": leg.budget_tokens, **asdict(quality)}
        document["saes"].append(row | (asdict(setting) if setting else {}))
        print(json.dumps(document["saes"][-1]), file=sys.stderr, flush=True)

    for leg in suite.suite_legs:
        if wanted and leg.layer not in wanted:
            continue
        own = suite.dictionary(leg)

        def ours(x: Tensor, own: sr.Dictionary = own) -> tuple[Tensor, Tensor]:
            codes = own.encode(x)
            return own.decode(codes), codes

        note(leg, "saerelay", None, measure(suite, model, leg, ours, args.tokens))
        for setting in settings:
            reconstruct = train_saelens(suite, leg, setting, args.batch)
            note(leg, "sae-lens", setting, measure(suite, model, leg, reconstruct, args.tokens))
    print_json(document, args.json)


if __name__ == "__main__":
    main()
