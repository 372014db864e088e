"""Who does what in a team: a leg has one owner, activations get to whom they are due, and none is sent in vain."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saerelay.errors import PlanError
from saerelay.planning.compile import compile_plan
from saerelay.planning.cost import model_bytes
from saerelay.planning.facts import ModelFacts, TokenFacts
from saerelay.planning.plan import Plan
from saerelay.planning.ranks import (
    Speeds,
    check_groups,
    deal,
    forward_shares,
    needed_sites,
    owners,
    peers,
    prober,
    spread,
)
from saerelay.planning.recipe import Recipe
from saerelay.rank import restarts_will_fail
from saerelay.team import Team

PAPER = ModelFacts.model_validate(
    {
        "name": "paper-model",
        "revision": "",
        "family": "gpt_neox",
        "dtype": "float32",
        "device": "cpu",
        "n_layers": 6,
        "d_model": 16,
        "d_attn_z": 24,
        "tokens": TokenFacts(vocab_size=101, max_context=64, bos_token_id=0, eos_token_id=0),
        "has_lm_head": True,
        "layer_params": 3000,
        "model_params": 25000,
    }
)


def plan_of(preset: str, n_layers: int, **plan: Any) -> Plan:
    sections = {
        "sites": {"layers": list(range(n_layers))},
        "data": {"context": 16, "block_tokens": 512},
        "dictionary": {"n_latents": 48, "k": 4},
        "plan": {"preset": preset, "root_tokens": 4096, "transfer_tokens": 2048, "moment_tokens": 1024} | plan,
        "train": {"batch_tokens": 64},
    }
    return compile_plan(Recipe.parse(sections, source="test"), PAPER)


plans = st.builds(
    plan_of,
    st.sampled_from(["hub", "forward", "alternate", "scratch"]),
    st.integers(1, 6),
    fork_at=st.sampled_from([0.25, 1.0]),
)


@settings(max_examples=25, deadline=None)
@given(plan=plans, n_ranks=st.integers(1, 9))
def test_every_leg_has_an_owner_who_gets_what_it_needs(plan: Plan, n_ranks: int) -> None:
    owner = owners(plan, n_ranks)
    assert owner.keys() == {leg.id for leg in plan.legs} and set(owner.values()) <= set(range(n_ranks))
    block = plan.block_tokens
    for number in range(plan.n_tokens // block):
        first, stop = number * block, (number + 1) * block
        opened = plan.open_sites(first, stop)
        needed = needed_sites(plan, owner, n_ranks, number, opened)
        everything = {site for sites in needed for site in sites}
        assert everything == set(opened), "what is read is needed by someone, and nothing else is sent"
        for leg in plan.legs:
            if leg.start < stop and first < leg.end:
                assert leg.site in needed[owner[leg.id]]
            if leg.moment_tokens and leg.start < stop and first < leg.fold_at:
                assert plan.parent_site(leg) in needed[owner[leg.id]]
        if opened:
            assert plan.probe_site
            assert plan.probe_site in needed[prober(needed, plan.probe_site)]


@settings(max_examples=60, deadline=None)
@given(
    n_parts=st.integers(0, 70),
    busy=st.lists(st.floats(0, 100), min_size=1, max_size=20),
    seconds=st.floats(1e-6, 10),
)
def test_every_micro_batch_is_dealt_once_and_nobody_waits_longer_than_one(
    n_parts: int, busy: list[float], seconds: float
) -> None:
    shares = deal(n_parts, busy, seconds)
    assert [part for share in shares for part in share] == list(range(n_parts))
    finished = [spent + len(share) * seconds for spent, share in zip(busy, shares, strict=True)]
    for spent, share in zip(finished, shares, strict=True):
        if share:
            assert spent - seconds <= min(finished) + 1e-6 * max(finished), "another would have been done earlier"


@settings(max_examples=60, deadline=None)
@given(
    n_groups=st.integers(1, 5),
    degree=st.integers(1, 4),
    n_parts=st.integers(0, 20),
    data=st.data(),
)
def test_what_each_group_forwards_reaches_every_rank_once(
    n_groups: int, degree: int, n_parts: int, data: st.DataObject
) -> None:
    n_ranks = n_groups * degree
    busy = data.draw(st.lists(st.floats(0, 10), min_size=n_ranks, max_size=n_ranks))
    shares = deal(n_parts, busy, 1.0, degree)
    for rank in range(n_ranks):
        group = rank // degree
        assert shares[rank] == shares[group * degree], "a group forwards the same"
        senders = [other for other in range(n_ranks) if rank in peers(other, n_ranks, degree)]
        assert senders == peers(rank, n_ranks, degree)
        received = [part for other in senders for part in shares[other]]
        assert sorted([*shares[rank], *received]) == list(range(n_parts)), "its own, and each other part once"


@settings(max_examples=30, deadline=None)
@given(n_groups=st.integers(1, 5), degree=st.integers(1, 3), lm=st.floats(0.1, 10), data=st.data())
def test_predicted_shares_are_those_of_many_parts(n_groups: int, degree: int, lm: float, data: st.DataObject) -> None:
    n_ranks = n_groups * degree
    busy = data.draw(st.lists(st.floats(0, 10), min_size=n_ranks, max_size=n_ranks))
    n_parts = 1000
    dealt = deal(n_parts, busy, lm / degree / n_parts, degree)
    predicted = forward_shares(busy, lm, degree)
    assert sum(predicted) == pytest.approx(degree)
    for share, parts in zip(predicted, dealt, strict=True):
        assert share == pytest.approx(len(parts) / n_parts, abs=2 / n_parts * n_groups)


def test_what_is_sent_is_what_others_forward() -> None:
    plan = plan_of("scratch", 1)  # one leg, and one site with the probe's: a rank without legs forwards for the other
    (leg,) = plan.legs
    slow = Speeds(lm=1.0, steps={leg.id: 100.0})
    even = spread(plan, 2).exchange_bytes
    assert spread(plan, 2, slow).exchange_bytes == pytest.approx(2 * even)
    assert spread(plan, 2, Speeds(lm=1.0, steps={leg.id: 0.0})).exchange_bytes == pytest.approx(even)


def test_ranks_that_hold_the_model_together_form_whole_groups() -> None:
    whole = plan_of("scratch", 6)
    model = whole.recipe.model.changed(tensor_parallel=2)
    split = whole.changed(recipe=whole.recipe.changed(model=model))
    for n_ranks, told in ((1, "one process cannot form groups of 2"), (3, "3 ranks cannot form groups of 2")):
        with pytest.raises(PlanError, match=f"model.tensor_parallel is 2, and {told}; start a multiple of 2"):
            spread(split, n_ranks)
    check_groups(model, 4)
    assert model_bytes(split) == 4 * (25_000 - 6 * 3000 / 2), "half of each layer, and all of the rest"
    assert spread(split, 2).exchange_bytes == 0, "both forward the same"
    assert spread(split, 4).exchange_bytes == spread(whole, 4).exchange_bytes * (1 / 2) / (3 / 4)
    assert spread(split, 2).ranks[0].memory_bytes < spread(whole, 2).ranks[0].memory_bytes


def test_legs_that_train_at_the_same_time_are_spread_evenly() -> None:
    plan = plan_of("scratch", 6)
    counts = [list(owners(plan, 3).values()).count(rank) for rank in range(3)]
    assert counts == [2, 2, 2]
    hub = plan_of("hub", 5)
    placed = owners(hub, 2)
    children = [placed[leg.id] for leg in hub.legs if leg.hop]
    assert sorted(children) == [0, 0, 1, 1], "the root is done when its children train, so it is no load to anyone"


def test_more_ranks_shorten_a_plan_until_one_leg_alone_is_the_bound() -> None:
    plan = plan_of("scratch", 4)
    speeds = Speeds(lm=1e-3, steps={leg.id: 2e-3 for leg in plan.legs})
    by_size = [spread(plan, n, speeds).seconds or 0.0 for n in (1, 2, 4, 8)]
    assert by_size[0] == spread(plan, 2, speeds).seconds_of_one == pytest.approx(plan.n_tokens * 9e-3)
    assert by_size[1] == pytest.approx(by_size[0] / 2)
    assert by_size[2] == pytest.approx(by_size[0] / 4)
    assert by_size[3] == pytest.approx(plan.n_tokens * 2e-3)
    alone = spread(plan, 1)
    assert alone.exchange_bytes == 0 and alone.seconds is None
    assert max(share.memory_bytes for share in spread(plan, 4).ranks) < alone.ranks[0].memory_bytes


@given(n=st.integers(0, 30), size=st.integers(1, 12))
def test_work_is_shared_out_whole_and_evenly(n: int, size: int) -> None:
    parts = [Team(rank, size).share(list(range(n))) for rank in range(size)]
    assert [item for part in parts for item in part] == list(range(n))
    assert max(map(len, parts)) <= math.ceil(n / size)


def test_one_process_is_a_team_for_which_all_is_free() -> None:
    team = Team.alone()
    assert team.leads and team.gather("word") == ["word"] and team.any(True, False) == [True, False]
    assert team.once(lambda: 5) == 5 and team.share([1, 2]) == [1, 2]


def test_restarts_that_torch_would_fail_at_are_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.delenv(name, raising=False)
    assert not restarts_will_fail()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert restarts_will_fail()
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    assert not restarts_will_fail()
