"""Blocks: what is kept, in which order, that nothing depends on which sites are open, and what memory they take."""

import weakref

import numpy as np
import pytest
import torch
from tensor_stream import TensorStream
from torch.utils._python_dispatch import TorchDispatchMode

from saerelay.data.kept import OutlierCount, kept_positions
from saerelay.data.stream import Block, LiveStream, shuffled
from saerelay.errors import ModelError
from saerelay.lm.facts import read_facts
from saerelay.lm.model import LanguageModel
from saerelay.planning.compile import compile_plan
from saerelay.planning.plan import LM_BATCH_TOKENS, Plan
from saerelay.planning.recipe import Recipe
from saerelay.site import Site

torch.set_num_threads(1)


def make_plan(
    block_tokens: int = 128,
    context: int = 16,
    dtype: str = "float32",
    bos: bool = True,
    layers: tuple[int, ...] = (1, 3),
    outlier_norm: float = 10.0,
) -> Plan:
    sections = {
        "model": {"dtype": dtype, "device": "cpu"},
        "sites": {"layers": list(layers)},
        "data": {
            "context": context,
            "block_tokens": block_tokens,
            "epochs": 3,
            "prepend_bos": bos,
            "outlier_norm": outlier_norm,
        },
        "dictionary": {"n_latents": 64, "k": 8},
        "train": {"batch_tokens": 32},
    }
    run = Recipe.parse(sections, source="test")
    return compile_plan(run, read_facts(run.model))


def make_stream(plan: Plan, n_sequences: int = 20) -> LiveStream:
    shape = (n_sequences, plan.recipe.data.context)
    sequences = np.random.default_rng(0).integers(1, 4096, size=shape).astype(np.uint16)
    sequences[:, 0] = 0
    return LiveStream(LanguageModel.load(plan.recipe.model), sequences, plan)


@pytest.fixture(scope="module")
def setting() -> tuple[Plan, LiveStream]:
    plan = make_plan()
    return plan, make_stream(plan)


def copied(block: Block) -> list[dict[Site, torch.Tensor]]:
    """All batches, so that the next block may take this one's place."""
    return [{site: x.clone() for site, x in block.batch(i).items()} for i in range(block.n_batches)]


def test_rows_do_not_shift_when_sites_come_and_go(setting) -> None:
    _, stream = setting
    two = copied(stream.block(2, [Site(1), Site(3)]))
    three = copied(stream.block(2, [Site(1), Site(3), Site(5)]))
    for ours, theirs in zip(two, three, strict=True):
        for site in (Site(1), Site(3)):
            assert torch.equal(ours[site], theirs[site])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_are_the_kept_rows_in_shuffled_order(dtype: str) -> None:
    """The definition: harvest in corpus order, whole, and take the rows by the order and the mask."""
    plan = make_plan(block_tokens=2 * LM_BATCH_TOKENS, context=64, dtype=dtype)
    stream, sites = make_stream(plan, 200), plan.with_probe([Site(1), Site(3), Site(2, "mlp_out")])
    index = stream.sequences_of(1)
    tokens = torch.from_numpy(stream.sequences[index].astype(np.int64))
    parts = [stream.model.harvest(part, sites) for part in tokens.split(LM_BATCH_TOKENS // 64)]
    whole = {site: torch.cat([part[site].flatten(0, 1) for part in parts]) for site in sites}
    order = shuffled(plan.block_tokens, plan.recipe.train.seed, 1)
    keep = kept_positions(plan, tokens, whole)
    assert not keep[::64].any() and 0.9 < keep.float().mean() < 1
    block = stream.block(1, sites)
    for i, batch in enumerate(copied(block)):
        positions = order[32 * i : 32 * i + 32]
        positions = positions[keep[positions]]
        for site in sites:
            assert torch.equal(batch[site], whole[site][positions])
    everything = order[keep[order]]
    for site in sites:
        assert torch.equal(block.rows(site, n=100), whole[site][everything[:100]].float())
        assert torch.equal(block.rows(site, n=10**9), whole[site][everything].float())
        chunks = list(block.chunks([site, Site(1)], n=1000))
        assert torch.equal(torch.cat([rows[site] for rows in chunks]), block.rows(site))
        assert torch.equal(torch.cat([rows[Site(1)] for rows in chunks]), block.rows(Site(1)))


def test_a_tensor_stream_gives_each_row_once_and_starts_again() -> None:
    x = torch.arange(24.0)[:, None]
    stream = TensorStream({Site(0): x, Site(1): -x}, block_tokens=16, batch_tokens=4)
    blocks = [torch.cat([batch[Site(0)] for batch in copied(stream.block(n, [Site(0)]))]) for n in range(3)]
    assert sorted(torch.cat(blocks).flatten().tolist()) == sorted(2 * list(range(24)))
    assert blocks[1].flatten().tolist() == [(16 + i) % 24 for i in shuffled(16, 0, 1).tolist()]
    assert torch.equal(stream.block(1, [Site(1)]).rows(Site(1)), -blocks[1])


def test_reuse_trains_on_every_batch_once_more_in_each_pass() -> None:
    stream = TensorStream({Site(0): torch.arange(208.0)[:, None]}, block_tokens=208, batch_tokens=16)
    block = stream.block(0, [Site(0)])
    first = [block.batch(i)[Site(0)] for i in range(13)]
    for times in (1, 2):
        again = [block.repeated(i, times)[Site(0)] for i in range(13)]
        assert sorted(torch.cat(again).flatten().tolist()) == sorted(torch.cat(first).flatten().tolist())
        assert not any(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(block.repeated(4, 0)[Site(0)], first[4])


class Large(TorchDispatchMode):
    """Keeps what has a storage of `at_least` bytes, from whichever operation."""

    def __init__(self, at_least: int) -> None:
        super().__init__()
        self.at_least, self.found = at_least, dict[int, torch.Tensor]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= self.at_least:
                self.found[x.untyped_storage().data_ptr()] = x
        return result


@pytest.mark.slow
def test_a_block_is_one_buffer_per_site_and_batches_are_views_of_it() -> None:
    """Nothing else as large as a buffer is ever made, neither in filling nor in reading it."""
    plan = make_plan(block_tokens=6 * LM_BATCH_TOKENS, context=64, bos=False)
    stream, sites = make_stream(plan, 400), plan.with_probe([Site(1), Site(3)])
    size = plan.block_tokens * plan.facts.d_model * 4
    with Large(size) as large:
        block = stream.block(0, sites)
        buffers = {block.activations[site].data_ptr() for site in sites}
        assert set(large.found) == buffers and len(buffers) == 3
        for i in range(block.n_batches):
            block.batch(i)
        assert sum(len(rows[Site(1)]) for rows in block.chunks(sites)) == int(block.keep.sum())
        block.rows(Site(1), n=2048)
        block = stream.block(1, sites)
        assert {x.data_ptr() for x in block.activations.values()} == set(large.found) == buffers
    assert all(x.nbytes == size for x in block.activations.values())
    whole = next(i for i in range(block.n_batches) if block.batch(i)[Site(1)].shape[0] == 32)
    assert block.batch(whole)[Site(1)].untyped_storage().data_ptr() == block.activations[Site(1)].data_ptr()
    closed = weakref.ref(block.activations[Site(1)])
    large.found.clear()
    assert list(stream.block(2, [Site(3)]).activations) == plan.with_probe([Site(3)]) and closed() is None


def test_what_a_block_gives_may_meet_autograd() -> None:
    """Views of the buffers, too."""
    plan = make_plan(bos=False)
    block = make_stream(plan).block(0, [Site(1), Site(3)])
    whole = next(i for i in range(block.n_batches) if block.batch(i)[Site(1)].shape[0] == 32)
    for x in (block.batch(whole)[Site(1)], block.rows(Site(1)), next(block.chunks([Site(1)]))[Site(1)]):
        weight = torch.ones(x.shape[1], requires_grad=True)
        assert not x.is_inference() and not x.requires_grad
        (x @ weight).square().sum().backward()
        assert weight.grad is not None


def test_every_epoch_reads_every_sequence_once_in_a_new_order(setting) -> None:
    _, stream = setting
    whole = stream.read_order(0, 60)
    for epoch in range(3):
        assert sorted(whole[20 * epoch : 20 * epoch + 20]) == list(range(20))
    assert list(whole[:20]) != list(range(20)) != list(whole[20:40]) and list(whole[:20]) != list(whole[20:40])
    pieces = [stream.read_order(first, 8) for first in (0, 8, 16, 24, 32, 40, 48)]
    assert list(np.concatenate(pieces)) == list(whole[:56])


def test_sequences_that_were_added_are_read_after_those_that_were_there(setting) -> None:
    plan, stream = setting
    grown = LiveStream(None, np.zeros((34, 16), np.uint16), plan, grown_from=[20, 26])
    order = grown.read_order(0, 34)
    assert list(order[:20]) == list(stream.read_order(0, 20))
    assert sorted(order[20:26]) == list(range(20, 26)) and sorted(order[26:]) == list(range(26, 34))
    assert list(order[26:]) != list(range(26, 34))


def test_outliers_of_norm_are_left_out_at_every_site(setting) -> None:
    plan, _ = setting
    tokens = torch.ones(2, 16, dtype=torch.long)
    x = torch.randn(32, 192, generator=torch.Generator().manual_seed(0))
    x[5] *= 100
    keep = kept_positions(plan, tokens, {plan.probe_site: x})
    left_out = {i for i in range(32) if not keep[i]}
    assert left_out == {0, 16, 5}
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kept_positions(plan, tokens, {plan.probe_site: x[order]}, order), keep[order])


@pytest.mark.parametrize("dtype, remedy", [(torch.float16, 'Set model.dtype = "bfloat16"'), (torch.float32, "damaged")])
def test_activations_that_are_not_finite_are_no_outliers(setting, dtype: torch.dtype, remedy: str) -> None:
    plan, _ = setting
    tokens = torch.ones(2, 16, dtype=torch.long)
    fine = torch.randn(32, 192, generator=torch.Generator().manual_seed(0)).to(dtype)
    for bad in (torch.nan, torch.inf):
        x = fine.clone()
        x[7, 3] = bad
        told = rf"^L5: 1 of 30 positions have activations that are not finite in {str(dtype)[6:]} .*{remedy}"
        with pytest.raises(ModelError, match=told):
            kept_positions(plan, tokens, {plan.probe_site: fine, Site(5): x})
    x = fine.clone()
    x[0] = torch.inf  # BOS, which is never trained on
    kept_positions(plan, tokens, {plan.probe_site: fine, Site(5): x})


def test_tokens_that_are_left_out_for_their_norm_are_counted_and_named(setting) -> None:
    plan, stream = setting
    count = OutlierCount(plan)
    assert count.left_out().note == ""
    tokens = torch.full((2, 16), 9)
    tokens[:, 3] = 50
    keep = tokens != 50
    keep[:, 0] = False
    count.add(tokens, keep)
    assert (
        "6.2% of the positions read (2, of which 2 hold token 50, the most frequent), by their norm at L4"
        in count.left_out().note
    )
    stream = LiveStream(stream.model, stream.sequences, plan)
    for number in range(2):
        kept = int(stream.block(number, [Site(1)]).keep.sum())
    left_out = stream.outliers.left_out()
    assert left_out.n_read == 2 * plan.block_tokens and kept < plan.block_tokens
    assert left_out.n <= left_out.n_read - 2 * kept


def test_which_positions_are_left_out_does_not_depend_on_the_layers_chosen() -> None:
    keeps = []
    for layers in ((0,), (1, 7)):
        plan = make_plan(layers=layers, outlier_norm=1.2)
        block = make_stream(plan).block(0, [Site(layers[0])])
        assert set(block.activations) == {Site(layers[0]), Site(4)}
        keeps.append(block.keep.clone())
    assert torch.equal(*keeps) and 0.05 < float(keeps[0].float().mean()) < 0.95
