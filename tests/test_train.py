"""Running plans: resume to the same bits after any interruption, lockstep, failures, publication."""

import json
import math
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_recipe
import torch
from tensor_stream import TensorStream

from saerelay.analysis.lineage import ancestor, leg_pairs
from saerelay.analysis.suite import load
from saerelay.data.stream import AbstractStream, Block
from saerelay.errors import Interrupted, LegFailed
from saerelay.files import write_text
from saerelay.planning.compile import compile_plan
from saerelay.planning.facts import ModelFacts
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import Recipe
from saerelay.runs.dictionaries import read_dictionary
from saerelay.runs.directory import RunDirectory
from saerelay.runs.state import state_facts
from saerelay.sae.quality import fvu, mean_l0
from saerelay.site import Site
from saerelay.training import inherit, train
from saerelay.training.engine import Progress, Trainee
from saerelay.training.run_state import Training
from saerelay.training.train import train_plan
from saerelay.workflows.launch import train_run

D = 16
REFIT = {"refit_tokens": 512, "refit": True}


class Watch:
    """Stands by, and may pull the plug."""

    def __init__(self, kill_at: int = -1, ask_at: int = -1) -> None:
        self.kill_at, self.ask_at = kill_at, ask_at
        self.seen: list[str] = []

    def tick(self, cursor: int) -> None:
        if cursor == self.kill_at:
            raise MemoryError("killed")
        if cursor == self.ask_at:
            signal.raise_signal(signal.SIGINT)

    def leg(self, leg_id: str, progress: Progress) -> None:
        self.seen.append(leg_id)


def make_plan(facts: ModelFacts, **plan: Any) -> Plan:
    sections = {
        "sites": {"layers": [0, 1, 2]},
        "data": {"context": 16, "block_tokens": 512, "outlier_norm": 0},
        "dictionary": {"n_latents": 48, "k": 4, "target_l0": 4.0, "architecture": plan.pop("architecture", "topk")},
        "plan": {
            "root_tokens": 4096,
            "transfer_tokens": 2048,
            "moment_tokens": 1024,
            "refit_tokens": 512,
            "refit": True,
        }
        | plan,
        "train": {"batch_tokens": 64, "checkpoint_every": 640, "lr": 3e-3, "transfer_lr": 1e-3},
    }
    return compile_plan(Recipe.parse(sections, source="test"), facts)


def make_stream(facts: ModelFacts) -> TensorStream:
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(8192, 30, generator=g) * (torch.rand(8192, 30, generator=g) < 0.1)
    x = weights @ torch.randn(30, D, generator=g) + 4
    tensors = {}
    for layer in range(3):
        x = x + 0.3 * torch.tanh(x @ torch.randn(D, D, generator=g) / 4)
        tensors[Site(layer)] = x
    return TensorStream(tensors, block_tokens=512, batch_tokens=64)


def run(
    plan: Plan, root: Path, facts: ModelFacts, watch: Watch | None = None, stream: AbstractStream | None = None
) -> None:
    paths = RunDirectory(root)
    if not paths.plan.is_file():
        write_text(paths.plan, plan.to_json())
    train_plan(plan, paths, stream or make_stream(facts), watch or Watch(), torch.device("cpu"))


def weights(root: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(root.glob("legs/**/dictionary.json")):
        dictionary, _ = read_dictionary(path.parent)
        found |= {f"{path.parent.relative_to(root)}/{name}": tensor for name, tensor in dictionary.tensors().items()}
    return found


def assert_same(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys() and left
    for name in left:
        assert torch.equal(left[name], right[name]), name


def log(root: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds",)} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, facts: ModelFacts) -> Path:
    """A whole run, made once."""
    root = tmp_path_factory.mktemp("finished") / "whole"
    run(make_plan(facts, controls=[2], preset="hub", roots=[1]), root, facts)
    return root


@pytest.fixture
def whole(tmp_path: Path, finished: Path) -> Path:
    """A whole run, the test's own."""
    return shutil.copytree(finished, tmp_path / "whole")


def test_a_run_leaves_what_it_promises(whole: Path) -> None:
    suite = load(whole)
    assert list(suite) == ["L1", "L0-from-L1", "L2-from-L1", "L2-scratch-equal", "L2-scratch-full"]
    assert suite.leg_at(Site(2)).id == "L2-from-L1" and suite[Site(2)].n_latents == 48
    info = json.loads((whole / "legs/L0-from-L1/dictionary.json").read_text())
    assert (info["tokens"], info["finished"], info["leg"]["method"]) == (2048, True, "auto")
    assert info["hop"]["method"] in info["hop"]["trials"] and len(info["hop"]["trials"]) == 5
    assert log(whole)[0]["leg"] and {line["leg"] for line in log(whole)} == set(suite)


@pytest.mark.parametrize(
    "killed_at",
    [64, 704, 3136, 4096]
    + [pytest.param(at, marks=pytest.mark.slow) for at in (640, 3072, 3584, 4160, 4608, 4672, 6080)],
)
def test_killed_anywhere_and_resumed_gives_the_same_bits(
    whole: Path, tmp_path: Path, facts: ModelFacts, killed_at: int
) -> None:
    plan, root = make_plan(facts, controls=[2], preset="hub", roots=[1]), tmp_path / "killed"
    with pytest.raises(MemoryError):
        run(plan, root, facts, Watch(kill_at=killed_at))
    run(plan, root, facts)
    assert_same(whole, root)


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu", "gated", "relu"])
@pytest.mark.parametrize("asked_at", [3200, 4352])
def test_ctrl_c_saves_between_any_two_batches(
    tmp_path: Path, facts: ModelFacts, architecture: str, asked_at: int
) -> None:
    plan = make_plan(facts, preset="forward", architecture=architecture, fork_at=0.75)
    run(plan, tmp_path / "a", facts)
    with pytest.raises(Interrupted):
        run(plan, tmp_path / "b", facts, Watch(ask_at=asked_at))
    saved = state_facts(tmp_path / "b/state")
    assert saved is not None and asked_at <= saved["cursor"] <= asked_at + 64
    run(plan, tmp_path / "b", facts)
    assert_same(tmp_path / "a", tmp_path / "b")


def test_the_log_is_cut_back_to_the_saved_cursor(whole: Path, tmp_path: Path, facts: ModelFacts) -> None:
    plan, root = make_plan(facts, controls=[2], preset="hub", roots=[1]), tmp_path / "killed"
    with pytest.raises(MemoryError):
        run(plan, root, facts, Watch(kill_at=3008))
    run(plan, root, facts)
    positions = [(line["cursor"], line["leg"]) for line in log(root)]
    assert positions == [(line["cursor"], line["leg"]) for line in log(whole)] and len(set(positions)) == len(positions)


def test_legs_alone_equal_legs_in_company(whole: Path, tmp_path: Path, facts: ModelFacts) -> None:
    """Rows do not shift when legs come and go: the root and a control alone give the same bits."""
    for leg_id, layer in (("L1", 1), ("L2-scratch-full", 2)):
        alone = make_plan(facts, legs=[{"id": leg_id, "layer": layer, "tokens": 4096}])
        run(alone, tmp_path / leg_id, facts)
        for name, tensor in load(whole)[leg_id].tensors().items():
            assert torch.equal(load(tmp_path / leg_id)[leg_id].tensors()[name], tensor), name


def test_a_finished_run_run_again_changes_nothing(whole: Path, facts: ModelFacts) -> None:
    before = weights(whole)
    run(make_plan(facts, controls=[2], preset="hub", roots=[1]), whole, facts)
    after = weights(whole)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_snapshots_are_published_and_change_nothing(whole: Path, tmp_path: Path, facts: ModelFacts) -> None:
    plan = make_plan(facts, controls=[2], preset="hub", roots=[1])
    legs = [leg.changed(snapshots=[0, 1024] if leg.parent else [1024, 2048]) for leg in plan.legs]
    run(plan.changed(legs=legs), tmp_path / "s", facts)
    for leg_id in load(whole):
        for name, tensor in load(whole)[leg_id].tensors().items():
            assert torch.equal(load(tmp_path / "s")[leg_id].tensors()[name], tensor)
    assert (tmp_path / "s/legs/L0-from-L1/snapshots/0/dictionary.json").is_file()
    _, info = read_dictionary(tmp_path / "s/legs/L1/snapshots/1024")
    assert (info.tokens, info.finished) == (1024, False)


def test_a_parent_in_another_directory(whole: Path, tmp_path: Path, facts: ModelFacts) -> None:
    from saerelay.workflows.settle import describe_external

    source = str(whole / "legs/L1")
    leg = {"id": "x", "layer": 2, "parent": source, "tokens": 1024}
    sections = make_plan(facts).recipe.model_dump(mode="json")
    sections["plan"] |= {"legs": [leg]}
    recipe = Recipe.parse(sections, source="test")
    plan = compile_plan(recipe, facts, externals={source: describe_external(source, recipe)})
    run(plan, tmp_path / "x", facts)
    assert load(tmp_path / "x")["x"].n_latents == 48


class Poisoned(AbstractStream):
    """Infinities at one site from one block on."""

    def __init__(self, stream: TensorStream, site: Site, from_block: int) -> None:
        self.stream, self.site, self.from_block = stream, site, from_block

    def block(self, number: int, sites) -> Block:
        block = self.stream.block(number, sites)
        if number >= self.from_block and self.site in block.activations:
            block.activations[self.site].fill_(math.inf)
        return block


def test_a_leg_that_fails_keeps_its_last_good_state(tmp_path: Path, facts: ModelFacts, whole: Path) -> None:
    plan = make_plan(facts, controls=[2], preset="hub", roots=[1])
    with pytest.raises(LegFailed, match="leg L2-scratch-full stopped: the loss became") as caught:
        run(plan, tmp_path / "f", facts, stream=Poisoned(make_stream(facts), Site(2), 6))
    assert caught.value.exit_code == 1
    suite = load(tmp_path / "f")
    assert {"L1", "L0-from-L1", "L2-scratch-equal"} <= set(suite) and "L2-scratch-full" not in set(suite)
    kept, info = read_dictionary(tmp_path / "f/legs/L2-scratch-full/snapshots/3072")
    assert info.failure and all(torch.isfinite(t).all() for t in kept.tensors().values())
    assert "L2-from-L1 stopped: L2: activations are not all finite" in str(caught.value)
    told = re.findall(r"the last good state of (\S+) is in (.*)", str(caught.value))
    kept_in = tmp_path / "f/legs/L2-scratch-full/snapshots"
    assert told == [("L2-scratch-full", str(kept_in))] and str(caught.value).endswith("all other legs are done")
    for name, tensor in load(whole)["L0-from-L1"].tensors().items():
        assert torch.equal(suite["L0-from-L1"].tensors()[name], tensor)


def test_a_leg_whose_activations_do_not_vary_stops_alone_and_says_why(tmp_path: Path, facts: ModelFacts) -> None:
    for constant in (0.0, 3.5):
        plan = make_plan(facts)
        stream = make_stream(facts)
        last = [leg for leg in plan.legs if leg.hop][-1]
        stream.tensors[last.site] = torch.full_like(stream.tensors[last.site], constant)
        out = tmp_path / str(constant)
        with pytest.raises(LegFailed, match=rf"leg {last.id} stopped: {last.site}: activations do not vary"):
            run(plan, out, facts, stream=stream)
        finished = {path.parent.name for path in out.glob("legs/*/dictionary.json")}
        assert finished == {leg.id for leg in plan.legs} - {last.id}


def test_where_all_positions_are_left_out_legs_say_so(tmp_path: Path, facts: ModelFacts) -> None:
    class Nothing(AbstractStream):
        def block(self, number: int, sites) -> Block:
            return replace(make_stream(facts).block(number, sites), keep=torch.zeros(512, dtype=torch.bool))

    with pytest.raises(LegFailed, match="stopped: L1: no position of a block is left to train on; raise data.outlier"):
        run(make_plan(facts), tmp_path, facts, stream=Nothing())


def test_dead_latents_are_not_counted_before_they_can_be_dead(tmp_path: Path, facts: ModelFacts) -> None:
    run(make_plan(facts, preset="hub", roots=[1], transfer_tokens=0, method="affine"), tmp_path, facts)
    suite = load(tmp_path)
    assert suite.info(suite.leg("L1")).n_dead is not None
    assert suite.info(suite.leg("L0-from-L1")).n_dead is None


def test_children_of_unfinished_parents_learn_faster(tmp_path: Path, facts: ModelFacts) -> None:
    plan, lr = make_plan(facts, preset="hub", roots=[1]), {}
    by_map = [leg.changed(lr_by_map=bool(leg.parent), lr=1e-2) for leg in plan.legs]
    for budget in (1024, 40_960):
        young = [leg.changed(fork_at_tokens=budget) if leg.parent else leg for leg in by_map]
        run(plan.changed(legs=young), tmp_path / str(budget), facts)
        lr[budget] = read_dictionary(tmp_path / str(budget) / "legs/L0-from-L1")[1].lr
    assert lr[1024] == pytest.approx(0.75 * 2048 / (1024 + 2048) * 1e-2)
    assert lr[40_960] < lr[1024]


def test_children_of_a_failed_parent_are_named(tmp_path: Path, facts: ModelFacts) -> None:
    plan = make_plan(facts, preset="hub", roots=[1])
    with pytest.raises(LegFailed, match="leg L0-from-L1 stopped: its parent L1 stopped"):
        run(plan, tmp_path / "f", facts, stream=Poisoned(make_stream(facts), Site(1), 2))
    saved = state_facts(RunDirectory(tmp_path / "f").state)
    assert saved and saved["moments"] == []


def test_batchtopk_is_published_with_the_l0_it_was_trained_for(tmp_path: Path, facts: ModelFacts) -> None:
    run(make_plan(facts, preset="hub", roots=[1], architecture="batchtopk"), tmp_path / "b", facts)
    x = make_stream(facts).tensors
    for layer in range(3):
        z = load(tmp_path / "b")[Site(layer)].encode(x[Site(layer)])
        assert float((z > 0).sum(dim=1).float().mean()) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "batchtopk"])
def test_a_parent_in_training_is_handed_over_with_its_l0(
    facts: ModelFacts, tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = []

    def noted(now: Training, block: Block, *others: Any) -> Any:
        parents.append((inherit.parent_of(now, block, *others), block.rows(Site(1))))
        return parents[-1][0]

    monkeypatch.setattr(train, "parent_of", noted)
    run(make_plan(facts, architecture=architecture, preset="hub", roots=[1], fork_at=0.5), tmp_path / "a", facts)
    assert len(parents) == 2
    for parent, x in parents:
        assert parent.l0 == mean_l0(parent.dictionary, x)
        if architecture == "batchtopk":
            assert parent.l0 == pytest.approx(4, abs=0.01)


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated", "batchtopk"])
def test_a_hop_to_larger_activations_starts_at_the_right_l0(
    facts: ModelFacts, tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's layer 10 -> 11: norms jump threefold, and a copy's L0 explodes; not so if a trial chose the copy."""
    monkeypatch.setattr(inherit, "try_methods", lambda *_, **__: {"identity": 0.1})
    stream = make_stream(facts)
    stream.tensors[Site(1)] = 3 * stream.tensors[Site(0)] + 5
    legs = [{"id": "L0", "layer": 0, "tokens": 2048}]
    legs += [{"id": m, "layer": 1, "parent": "L0", "tokens": 0, "method": m} for m in ("identity", "rescale", "auto")]
    plan = make_plan(facts, architecture=architecture, legs=legs, refit=False)
    run(plan, tmp_path / "a", facts, stream=stream)
    l0 = {leg: read_dictionary(tmp_path / "a/legs" / leg)[1].l0 for leg in ("L0", "identity", "rescale", "auto")}
    wanted = l0["L0"] if architecture == "relu" else plan.legs[0].dictionary.l0
    for method in ("rescale", "auto"):
        assert l0[method] == pytest.approx(wanted, rel=0.15)  # set and measured on different 512 tokens
    if architecture != "batchtopk":
        assert l0["identity"] > 1.3 * l0["rescale"]


GOALS = [
    {"id": "a", "layer": 1, "tokens": 6144, "goal_fvu": 0.5, "decay_gain": 0.9},
    {"id": "b", "layer": 0, "parent": "a", "tokens": 4096, "goal_fvu": 1e-4, "predicted_fvu": 0.2},
    {"id": "c", "layer": 2, "parent": "a", "tokens": 4096, "goal_fvu": 0.6},
]


class Counting(AbstractStream):
    """Remembers which sites were asked for."""

    def __init__(self, stream: TensorStream) -> None:
        self.stream, self.asked = stream, list[tuple[int, list[Site]]]()

    def block(self, number: int, sites) -> Block:
        self.asked.append((number, list(sites)))
        return self.stream.block(number, sites)


def run_to_goals(plan: Plan, root: Path, facts: ModelFacts, watch: Watch | None = None) -> Counting:
    paths, stream = RunDirectory(root), Counting(make_stream(facts))
    write_text(paths.plan, plan.to_json())
    train_plan(plan, paths, stream, watch or Watch(), torch.device("cpu"), make_stream(facts))
    return stream


def tokens_seen(root: Path, leg_id: str) -> int:
    return read_dictionary(root / "legs" / leg_id)[1].tokens


@pytest.fixture
def early(tmp_path: Path, facts: ModelFacts) -> Path:
    run_to_goals(make_plan(facts, legs=GOALS), tmp_path / "early", facts)
    return tmp_path / "early"


def test_a_leg_ends_when_it_will_meet_its_goal(early: Path, tmp_path: Path, facts: ModelFacts) -> None:
    """It decays first, the others run to their budgets, and what nobody needs is not read."""
    plan = make_plan(facts, legs=GOALS)
    assert 1536 <= tokens_seen(early, "a") < 6144 and tokens_seen(early, "c") < 4096
    assert tokens_seen(early, "b") == 4096
    info = read_dictionary(early / "legs/a")[1]
    assert info.leg["budget_tokens"] == 6144 and info.validation_fvu <= 0.5
    last = [json.loads(line) for line in (early / "metrics.jsonl").read_text().splitlines() if '"leg": "a"' in line][-1]
    assert last["learning_rate"] < 0.1 * plan.leg("a").schedule.lr
    stream = run_to_goals(plan, tmp_path / "again", facts)
    assert not any(Site(2) in sites for number, sites in stream.asked if number * 512 >= plan.leg("c").fold_at + 3584)
    assert len(stream.asked) < plan.n_tokens // 512


def test_a_goal_needs_no_prediction(tiny_model: Path, tmp_path: Path) -> None:
    leg = {"id": "a", "layer": 1, "tokens": 4096, "goal_fvu": 0.95}
    sections = small_recipe.sections({"name": str(tiny_model)}, tmp_path)
    sections["plan"]["legs"] = [leg]
    suite = train_run(Recipe.parse(sections), tmp_path / "run")
    info = suite.info(suite.leg("a"))
    assert info.tokens < 4096 and info.validation_fvu is not None


@pytest.mark.parametrize("killed_at", [1536, 1600, 2176, 2240, 6144, 7680, 7744, 8192])
def test_killed_around_a_stop_and_resumed_gives_the_same_bits(
    early: Path, tmp_path: Path, facts: ModelFacts, killed_at: int
) -> None:
    plan, root = make_plan(facts, legs=GOALS), tmp_path / "killed"
    with pytest.raises((MemoryError, Interrupted)):
        run_to_goals(plan, root, facts, Watch(ask_at=killed_at) if killed_at % 512 else Watch(kill_at=killed_at))
    run_to_goals(plan, root, facts)
    assert_same(early, root)
    assert [tokens_seen(root, leg.id) for leg in plan.legs] == [tokens_seen(early, leg.id) for leg in plan.legs]


@pytest.mark.slow
def test_goals_that_are_not_met_or_not_to_be_kept_change_nothing(tmp_path: Path, facts: ModelFacts) -> None:
    far = [leg | {"goal_fvu": 1e-4} for leg in GOALS]
    run_to_goals(make_plan(facts, legs=far), tmp_path / "far", facts)
    run_to_goals(make_plan(facts, legs=GOALS, stop=False), tmp_path / "off", facts)
    bare = [{key: value for key, value in leg.items() if "fvu" not in key} for leg in GOALS]
    run(make_plan(facts, legs=bare), tmp_path / "bare", facts)
    assert_same(tmp_path / "far", tmp_path / "bare")
    assert_same(tmp_path / "off", tmp_path / "bare")


REUSE = [
    {"id": "a", "layer": 1, "tokens": 2048},
    {"id": "b", "layer": 0, "parent": "a", "tokens": 3072, "reuse": 3},
    {"id": "c", "layer": 2, "parent": "a", "tokens": 1024},
]


def test_a_block_can_be_trained_on_several_times(tmp_path: Path, facts: ModelFacts, monkeypatch) -> None:
    plan = make_plan(facts, legs=REUSE)
    assert plan.leg("b").end - plan.leg("b").fold_at == 1024 and plan.leg("b").end == plan.leg("c").end
    seen: dict[str, list[torch.Tensor]] = {}
    step = Trainee.step

    def watched(self: Trainee, x: torch.Tensor, target: torch.Tensor | None) -> None:
        seen.setdefault(self.leg.id, []).append(x)
        step(self, x, target)

    monkeypatch.setattr(Trainee, "step", watched)
    run(plan, tmp_path / "whole", facts)
    stream = make_stream(facts)
    layer0 = Site(0)

    def batches(number: int) -> list[torch.Tensor]:
        block = stream.block(number, [layer0])
        return [block.batch(i)[layer0].clone() for i in range(block.n_batches)]

    # After each batch of its two blocks, b trains on one of its map's two blocks, in turn; then on its own block again.
    n_before = plan.leg("b").fold_at // plan.block_tokens
    of_map = [batches(n_before - 2), batches(n_before - 1)]
    expected = []
    for number in (n_before, n_before + 1):
        own = batches(number)
        stride = len(own) * 5 // 13
        for i in range(len(own)):
            n_taken = i if number == n_before else len(own) + i
            expected += [own[i], of_map[n_taken % 2][n_taken // 2], own[(i + 2 * stride) % len(own)]]
    assert len(seen["b"]) == len(expected) == 3 * len(seen["c"])
    assert all(torch.equal(x, y) for x, y in zip(seen["b"], expected, strict=True))
    assert read_dictionary(tmp_path / "whole/legs/b")[1].tokens == 3072
    without = make_plan(facts, legs=[REUSE[0], REUSE[2]])
    run(without, tmp_path / "without", facts)
    assert all(
        torch.equal(t, read_dictionary(tmp_path / "without/legs/c")[0].tensors()[name])
        for name, t in read_dictionary(tmp_path / "whole/legs/c")[0].tensors().items()
    )


@pytest.mark.parametrize("killed_at", [1600, 2112, 2560, 2816, 3008])
def test_a_repeated_block_resumes_to_the_same_bits(tmp_path: Path, facts: ModelFacts, killed_at: int) -> None:
    plan = make_plan(facts, legs=REUSE)
    run(plan, tmp_path / "whole", facts)
    with pytest.raises(Interrupted):
        run(plan, tmp_path / "killed", facts, Watch(ask_at=killed_at))
    run(plan, tmp_path / "killed", facts)
    assert_same(tmp_path / "whole", tmp_path / "killed")


TWO_BLOCKS = [
    {"id": "a", "layer": 1, "tokens": 2048},
    {"id": "b", "layer": 0, "parent": "a", "tokens": 1024, "method": "affine"},
    {"id": "c", "layer": 2, "parent": "a", "tokens": 1024},
]


def test_a_refit_takes_as_many_blocks_as_it_asks_for(tmp_path: Path, facts: ModelFacts, monkeypatch) -> None:
    plan = make_plan(facts, legs=TWO_BLOCKS, refit_tokens=800)
    assert plan.leg("b").refit_tokens == 800 and plan.leg("b").moment_tokens == 1024
    assert make_plan(facts, legs=TWO_BLOCKS, refit_tokens=9999).leg("b").refit_tokens == 1024
    assert make_plan(facts, legs=TWO_BLOCKS, refit_tokens=9999, method="identity").leg("c").refit_tokens == 512
    given = []
    carry = inherit.carry

    def watched(*args: Any, **keys: Any) -> Any:
        given.append(keys["retraining"].rows)
        return carry(*args, **keys)

    monkeypatch.setattr(inherit, "carry", watched)
    alone = make_plan(facts, legs=TWO_BLOCKS[:2], refit_tokens=800)
    run(alone, tmp_path / "run", facts)
    stream = make_stream(facts)
    n_before = alone.leg("b").fold_at // alone.block_tokens
    rows = [stream.block(number, [Site(0)]).rows(Site(0)).clone() for number in (n_before - 2, n_before - 1)]
    assert len(given) == 1 and torch.equal(given[0], torch.cat(rows)[:800])


@pytest.mark.parametrize("killed_at", [1600, 1984, 2112])
def test_a_refit_on_several_blocks_resumes_to_the_same_bits(tmp_path: Path, facts: ModelFacts, killed_at: int) -> None:
    plan = make_plan(facts, legs=TWO_BLOCKS, refit_tokens=1024)
    run(plan, tmp_path / "whole", facts)
    with pytest.raises(Interrupted):
        run(plan, tmp_path / "killed", facts, Watch(ask_at=killed_at))
    kept = state_facts(tmp_path / "killed/state")
    assert kept and kept["kept_blocks"] == ([] if killed_at > 2048 else ["b", "c"])
    run(plan, tmp_path / "killed", facts)
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_a_random_control_is_worse_than_what_it_controls(facts: ModelFacts, tmp_path: Path) -> None:
    plan = make_plan(facts, controls=[0], control_kinds=["random"], preset="hub", roots=[1], method="affine")
    run(plan, tmp_path, facts)
    suite = load(tmp_path)
    random, carried = suite.leg("L0-random"), suite.leg("L0-from-L1")
    info = suite.info(random)
    assert info.tokens == 0 and info.hop and info.hop.method == "random"
    assert suite.made(random) == "random dictionary, refitted" and suite.scratch_counterparts(carried) == []
    assert suite.origin(random) == "random" and not suite.is_transferred(random)
    assert ancestor(suite, carried) == "L1" and ancestor(suite, random) == random.id
    links = {(pair.kind, pair.source.id, pair.target.id) for pair in leg_pairs(suite)}
    assert ("hop", "L1", "L0-from-L1") in links and ("control", "L0-from-L1", "L0-random") in links
    assert not any(kind == "hop" and target == random.id for kind, _, target in links)
    x = make_stream(facts).block(0, [Site(0)]).rows(Site(0), 512).float()
    assert fvu(suite.dictionary(carried), x) < 0.9 * fvu(suite.dictionary(random), x) < 0.5


def test_a_random_control_is_as_sparse_as_what_it_controls(facts: ModelFacts, tmp_path: Path) -> None:
    """Half of the latents of a random ReLU dictionary are active if nothing asks for an L0."""
    keys = {"controls": [0], "control_kinds": ["random"], "preset": "hub", "roots": [1], "transfer_tokens": 0}
    run(make_plan(facts, architecture="relu", method="affine", **keys), tmp_path, facts)
    suite = load(tmp_path)
    l0 = {leg: suite.info(suite.leg(leg)).l0 for leg in ("L1", "L0-from-L1", "L0-random")}
    assert l0["L1"] and l0["L1"] < 15
    assert l0["L0-random"] == pytest.approx(l0["L0-from-L1"], rel=0.1)
