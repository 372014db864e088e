"""What a team's exchange takes, in bytes and seconds, against the forward passes and the steps; predicted and measured.

    torchrun --nproc-per-node 2 bench/scale.py run.toml --out runs/scale

trains the recipe and prints one JSON document on rank 0. Bytes are predicted as `saerelay plan --ranks N --timing` does
it, from speeds that are measured after the run; seconds from the bytes and the speed of one exchange of 32 MB before
the run. While it measures, ranks wait for one another before every exchange, so that its seconds are those of moving
bytes, not of waiting for a rank that is still at work.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from saerelay.lm.model import load_model
from saerelay.planning.ranks import spread
from saerelay.planning.recipe import Recipe
from saerelay.runs.directory import read_plan
from saerelay.runs.documents.training import RunCost
from saerelay.team import Team
from saerelay.workflows.launch import train_run
from saerelay.workflows.timing import measured_speeds

PROBE_BYTES = 32 * 2**20


class Meter:
    """Counts what a team exchanges."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self.exchange = team.exchange
        self.seconds = 0.0
        self.waited = 0.0
        self.bytes_sent = 0

    def __call__(self, outbox: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """In the place of `Team.exchange`."""
        began = time.perf_counter()
        self.team.gather(None)
        self.waited += time.perf_counter() - began
        began = time.perf_counter()
        inbox = self.exchange(outbox, sent, received)
        if inbox.is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - began
        self.bytes_sent += sum(sent)
        return inbox

    def bytes_per_second(self) -> float:
        """Of one rank, from the second of two exchanges in which each rank sends as much to every other."""
        others = max(1, self.team.size - 1)
        sizes = [0 if rank == self.team.rank else PROBE_BYTES // others for rank in range(self.team.size)]
        outbox = torch.zeros(sum(sizes), dtype=torch.uint8, device="cuda" if torch.cuda.is_available() else "cpu")
        seconds = 0.0
        for _ in range(2):
            before = self.seconds
            self(outbox, sizes, sizes)
            seconds = self.seconds - before
        self.seconds = self.waited = 0.0
        self.bytes_sent = 0
        return sum(sizes) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    team = Team.joined()
    meter = Meter(team)
    team.exchange = meter  # type: ignore[method-assign]
    speed = meter.bytes_per_second()
    began = time.perf_counter()
    train_run(Recipe.from_toml(options.recipe), options.out)
    total = time.perf_counter() - began

    counts = team.gather((meter.bytes_sent, meter.seconds, meter.waited, speed))
    if not team.leads:
        return
    plan = read_plan(options.out)
    cost = RunCost.load(options.out / "cost.json")
    n_bytes = sum(count[0] for count in counts)
    (speeds,) = measured_speeds([plan], load_model(plan))
    predicted_bytes = spread(plan, team.size, speeds).exchange_bytes
    slowest = min(count[3] for count in counts)
    result = {
        "ranks": team.size,
        "tokens": plan.n_tokens,
        "seconds": {"command": total, **cost.seconds.model_dump()},
        "exchange_bytes": {"predicted": predicted_bytes, "measured": n_bytes},
        "exchange_seconds": {
            "predicted": predicted_bytes / team.size / slowest,
            "measured": max(count[1] for count in counts),
            "waiting": max(count[2] for count in counts),
        },
        "exchange_bytes_per_second": slowest,
    }
    result["exchange_share"] = result["exchange_seconds"]["measured"] / cost.seconds.total
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
