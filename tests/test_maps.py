"""Maps between the sites of a run: the same as each pair alone gives, however many passes they take."""

import pytest
import torch

from saerelay.analysis import site_maps as maps
from saerelay.analysis.site_maps import SiteMaps, passes
from saerelay.data.stream import LiveStream
from saerelay.lm.facts import read_facts
from saerelay.lm.model import LanguageModel
from saerelay.planning.compile import compile_plan
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import Recipe
from saerelay.sae.maps import map_between
from saerelay.sae.moments import Moments
from saerelay.site import Site

torch.set_num_threads(1)
A, B, C = Site(0), Site(1), Site(2)


@pytest.fixture(scope="module")
def setting(tiny_model) -> tuple[Plan, LiveStream]:
    data = {"context": 16, "block_tokens": 512}
    model = {"name": str(tiny_model), "dtype": "float32", "device": "cpu"}
    run = Recipe.parse({"model": model, "data": data, "train": {"batch_tokens": 64}}, source="test")
    plan = compile_plan(run, read_facts(run.model))
    sequences = torch.randint(1, 101, (128, 16), generator=torch.Generator().manual_seed(0)).numpy()
    return plan, LiveStream(LanguageModel.load(run.model), sequences, plan)


def test_moments_are_those_of_each_pair_alone(setting) -> None:
    plan, stream = setting
    found = dict(SiteMaps(plan, stream, 1000).moments([(A, C), (B, C)]))
    for a, b in ((A, C), (B, C)):
        alone = Moments.empty(32, 32)
        for number in range(2):
            block = stream.block(number, sorted({a, b, B}))  # B is the probe site, too
            alone.add(block.rows(a), block.rows(b))
        assert found[a, b].n_tokens == alone.n_tokens == 2 * 512 * 15 // 16
        torch.testing.assert_close(found[a, b].mean, alone.mean)
        torch.testing.assert_close(found[a, b].covariance, alone.covariance, rtol=1e-4, atol=1e-6)


def test_maps_are_the_affine_ones_in_both_directions(setting) -> None:
    plan, stream = setting
    fitted = SiteMaps(plan, stream, 1024).between([(B, A), (A, B), (C, C)])
    moments = dict(SiteMaps(plan, stream, 1024).moments([(A, B)]))[A, B]
    expected = map_between("affine", 32, moments, plan.recipe.train.optimizer.balance)
    torch.testing.assert_close(fitted[A, B].A, expected.A)
    torch.testing.assert_close(fitted[B, A].A, expected.B)
    torch.testing.assert_close(fitted[B, A].b, expected.c)
    assert torch.equal(fitted[C, C].A, torch.eye(32, dtype=torch.float64)) and list(fitted) == [(B, A), (A, B), (C, C)]


def test_many_passes_give_what_one_gives(setting, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, stream = setting
    pairs = [(A, B), (B, C), (A, C)]
    once = dict(SiteMaps(plan, stream, 512).moments(pairs))
    monkeypatch.setattr(maps, "MOMENT_BYTES", 8 * 64**2)
    assert passes(plan, pairs) == [[pair] for pair in pairs]
    for pair, moments in SiteMaps(plan, stream, 512).moments(pairs):
        torch.testing.assert_close(moments.covariance, once[pair].covariance, rtol=1e-4, atol=1e-6)


def test_what_was_gathered_is_not_gathered_again(setting, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, stream = setting
    site_maps = SiteMaps(plan, stream, 512)
    first = site_maps.between([(A, B)])[A, B]
    monkeypatch.setattr(maps, "gather", None)
    assert torch.equal(site_maps.between([(A, C), (A, B)])[A, B].A, first.A)
