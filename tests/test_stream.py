"""Blocks: what is kept, in which order, and that nothing depends on which sites are open."""

import numpy as np
import pytest
import torch

from saerelay.model import LanguageModel, read_facts
from saerelay.plan import Plan, compile_plan
from saerelay.recipe import Run
from saerelay.site import Site
from saerelay.stream import LiveStream, kept_positions

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def setting() -> tuple[Plan, LiveStream]:
    sections = {
        "model": {"dtype": "float32", "device": "cpu"},
        "sites": {"layers": [1, 3]},
        "data": {"context": 16, "block_tokens": 128, "epochs": 3},
        "dictionary": {"n_latents": 64, "k": 8},
        "train": {"batch_tokens": 32},
    }
    run = Run.parse(sections, source="test")
    plan = compile_plan(run, read_facts(run.model))
    sequences = np.random.default_rng(0).integers(1, 4096, size=(20, 16)).astype(np.uint16)
    sequences[:, 0] = 0
    return plan, LiveStream(LanguageModel.load(run.model), sequences, plan)


def test_rows_do_not_shift_when_sites_come_and_go(setting) -> None:
    _, stream = setting
    both, one = stream.block(2, [Site(1), Site(3)]), stream.block(2, [Site(1), Site(3), Site(5)])
    for index in range(both.n_batches):
        for site in (Site(1), Site(3)):
            assert torch.equal(both.batch(index)[site], one.batch(index)[site])


def test_batches_are_the_kept_rows_each_once_and_sites_stay_aligned(setting) -> None:
    plan, stream = setting
    block = stream.block(0, [Site(1), Site(3)])
    rows = torch.cat([block.batch(i)[Site(3)] for i in range(block.n_batches)])
    assert torch.equal(rows, block.rows(Site(3))) and rows.shape[0] == 128 - 8
    tokens = torch.from_numpy(stream.sequences[stream.read_order(0, 8)].astype(np.int64))
    flat = stream.model.harvest(tokens, [Site(1)])[Site(1)].flatten(0, 1)
    order = block.order[block.keep[block.order]]
    assert torch.allclose(block.rows(Site(1)), flat[order], atol=1e-3) and 0 not in (order % 16)


def test_every_epoch_reads_every_sequence_once_in_a_new_order(setting) -> None:
    _, stream = setting
    whole = stream.read_order(0, 60)
    for epoch in range(3):
        assert sorted(whole[20 * epoch : 20 * epoch + 20]) == list(range(20))
    assert list(whole[:20]) != list(range(20)) != list(whole[20:40]) and list(whole[:20]) != list(whole[20:40])
    pieces = [stream.read_order(first, 8) for first in (0, 8, 16, 24, 32, 40, 48)]
    assert list(np.concatenate(pieces)) == list(whole[:56])


def test_outliers_of_norm_are_left_out_at_every_site(setting) -> None:
    plan, _ = setting
    tokens = torch.ones(2, 16, dtype=torch.long)
    x = torch.randn(32, 192, generator=torch.Generator().manual_seed(0))
    x[5] *= 100
    x[7] = torch.nan
    keep = kept_positions(plan, tokens, {plan.probe_site: x})
    left_out = {i for i in range(32) if not keep[i]}
    assert left_out == {0, 16, 5, 7}
