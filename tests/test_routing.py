"""Activations on their way through a team: every rank gets those of its own sites, whoever forwards and sends them."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ranks import PAPER, plan_of

from saerelay.data.stream import LiveStream
from saerelay.planning.plan import Plan
from saerelay.site import Site
from saerelay.team import Team
from saerelay.training.team_stream import TeamStream

SEQUENCES = np.random.default_rng(0).integers(1, 101, size=(400, 16)).astype(np.uint16)


class Tables:
    """In the place of a language model: each site's activations are a table's rows, by token."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.n_read = 0
        self.deepest: list[Site] = []

    def harvest(self, tokens: torch.Tensor, sites: list[Site]) -> dict[Site, torch.Tensor]:
        return {site: self._rows(site, tokens) for site in sites}

    def visit(self, tokens: torch.Tensor, visitors: Mapping[Site, Callable[[torch.Tensor], object]]) -> None:
        self.n_read += tokens.numel()
        self.deepest.append(max(visitors))
        for site, visitor in visitors.items():
            visitor(self._rows(site, tokens))

    def _rows(self, site: Site, tokens: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(site.layer)
        return torch.randn(101, PAPER.width(site), generator=generator)[tokens]


class Wire:
    """What the ranks of a team, each in a thread of its own, say to one another."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=30)
        self.words: list[Any] = [None] * size


class Member(Team):
    """A rank whose words go over a wire."""

    def __init__(self, rank: int, size: int, wire: Wire) -> None:
        super().__init__(rank, size)
        self.wire = wire

    def gather(self, mine: Any) -> list[Any]:
        self.wire.words[self.rank] = mine
        self.wire.barrier.wait()
        words = list(self.wire.words)
        self.wire.barrier.wait()
        return words

    def exchange(self, outbox: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        parcels = [parts[self.rank] for parts in self.gather(outbox.split(sent))]
        assert [len(parcel) for parcel in parcels] == received, "both ends know the sizes"
        return torch.cat(parcels)


@settings(max_examples=15, deadline=None)
@given(
    preset=st.sampled_from(["hub", "forward", "scratch"]),
    n_layers=st.integers(1, 4),
    n_groups=st.integers(1, 4),
    degree=st.integers(1, 2),
    data=st.data(),
)
def test_every_rank_has_what_a_process_on_its_own_would_have(
    preset: str, n_layers: int, n_groups: int, degree: int, data: st.DataObject
) -> None:
    plan = plan_of(preset, n_layers).changed(lm_batch_tokens=64)
    model = plan.recipe.model.changed(tensor_parallel=degree)
    plan = plan.changed(recipe=plan.recipe.changed(model=model))
    size = n_groups * degree
    busy = data.draw(st.lists(st.floats(0, 20), min_size=size, max_size=size), label="busy")
    numbers = data.draw(st.lists(st.integers(0, plan.n_tokens // plan.block_tokens - 1), min_size=1, max_size=3))
    wire = Wire(size)
    models = [Tables() for _ in range(size)]

    def rank_of_team(rank: int) -> None:
        team = Member(rank, size, wire)
        team.balance(busy, [1.0] * size)
        live: Any = LiveStream(models[rank], SEQUENCES, plan)  # type: ignore[arg-type]
        alone = LiveStream(Tables(), SEQUENCES, plan)  # type: ignore[arg-type]
        stream = TeamStream(live, team)
        for number in numbers:
            check_block(plan, stream, alone, number)

    with ThreadPoolExecutor(size) as threads:
        for done in [threads.submit(rank_of_team, rank) for rank in range(size)]:
            done.result()

    for first in range(0, size, degree):
        of_group = models[first : first + degree]
        assert len({model.n_read for model in of_group}) == 1, "the ranks of a group forward the same"
        assert all(model.deepest == of_group[0].deepest for model in of_group), "and stop at the same layer"
    opened = [number for number in numbers if open_sites(plan, number)]
    n_read = sum(models[first].n_read for first in range(0, size, degree))
    assert n_read == len(opened) * plan.block_tokens, "each token is forwarded by one group"


def open_sites(plan: Plan, number: int) -> list[Site]:
    return plan.open_sites(number * plan.block_tokens, (number + 1) * plan.block_tokens)


def check_block(plan: Plan, stream: TeamStream, alone: LiveStream, number: int) -> None:
    """A rank's block has, at the sites that it needs, the rows of a process on its own."""
    sites = open_sites(plan, number)
    if not sites:
        return
    block = stream.block(number, sites)
    whole = alone.block(number, sites)
    assert set(block.activations) == set(stream.needs[stream.team.rank])
    for site, x in block.activations.items():
        assert torch.equal(x, whole.activations[site]), site
    assert torch.equal(block.keep, whole.keep)
