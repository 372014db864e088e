"""Transcoders: what reads one site and reconstructs another keeps all promises that SAEs keep."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensor_stream import TensorStream
from test_train import Watch, assert_same, run, weights

from saerelay.errors import Interrupted, PlanError, TransferError
from saerelay.planning.compile import compile_plan
from saerelay.planning.facts import ModelFacts
from saerelay.planning.plan import Plan
from saerelay.planning.recipe import Recipe
from saerelay.runs.dictionaries import read_dictionary
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.initialise import initialise
from saerelay.sae.kernels import Reading, reconstruct, reference, sparse_step
from saerelay.sae.loss import training_loss
from saerelay.sae.maps import AffineMap, PairedMoments, crossed, map_between
from saerelay.sae.moments import Moments
from saerelay.sae.quality import fvu
from saerelay.sae.refit import refit, refit_skip
from saerelay.sae.reshape import Shape, reshape, revive
from saerelay.sae.spec import DictionarySpec, SizedDictionarySpec
from saerelay.sae.transfer import Retraining, carry, fold
from saerelay.sae.units import Units
from saerelay.site import Site

ARCHITECTURES = ["topk", "batchtopk", "jumprelu", "gated", "relu"]
D, DY, F, B = 12, 9, 48, 70
SKIP = pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])


def sized(architecture: str, skip: bool) -> SizedDictionarySpec:
    keys = {"architecture": architecture, "n_latents": F, "k": 4, "target_l0": 4, "skip_connection": skip}
    return DictionarySpec.parse(keys).sized(D)


def pair(n: int = 4096, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """What a small MLP reads, and what it makes of it."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, D, generator=g, dtype=dtype) + 1
    hidden = (x @ torch.randn(D, 40, generator=g, dtype=dtype)).relu()
    return x, hidden @ torch.randn(40, DY, generator=g, dtype=dtype) / 6 + x[:, :DY] + 3


def example(architecture: str, skip: bool) -> tuple[SizedDictionarySpec, Dictionary, torch.Tensor, torch.Tensor]:
    spec = sized(architecture, skip)
    x, y = pair(B)
    g = torch.Generator().manual_seed(1)
    d = initialise(spec, x, g, y)
    b_enc = d.b_enc + 0.1 * torch.randn(F, generator=g, dtype=x.dtype)
    return spec, replace(d, b_enc=b_enc), x, y


# --- the object -------------------------------------------------------------------------------------------------------


@SKIP
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_its_formula(architecture: str, skip: bool) -> None:
    _, d, x, _ = example(architecture, skip)
    z = d.encode(x)
    expected = z @ d.W_dec + d.b_dec
    if skip:
        assert d.W_skip is not None and d.W_skip.shape == (DY, D)
        expected = expected + torch.stack([d.W_skip @ row for row in x])
    torch.testing.assert_close(d(x), expected)
    torch.testing.assert_close(reconstruct(d, x)[1], expected)
    torch.testing.assert_close(d.decode(z, x), expected)
    assert (d.d_model, d.d_out) == (D, DY)


def test_a_skip_connection_needs_what_was_read() -> None:
    _, d, x, _ = example("topk", True)
    with pytest.raises(TransferError, match="decode also needs its input"):
        d.decode(d.encode(x))


@SKIP
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_units_are_exact(architecture: str, skip: bool) -> None:
    _, d, x, y = example(architecture, skip)
    units = replace(Units.fitted_to(x, 0.75), target=Units.fitted_to(y, 0.75))
    inside = units.from_canonical(d)
    torch.testing.assert_close(inside(units.normalise(x)), units.out.normalise(d(x)))
    back = units.to_canonical(inside)
    for name, tensor in d.tensors().items():
        torch.testing.assert_close(back.tensors()[name], tensor)


# --- training ---------------------------------------------------------------------------------------------------------


@SKIP
@pytest.mark.parametrize("dead", [0, 9])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_sparse_step_equals_autograd_in_float64(architecture: str, dead: int, skip: bool) -> None:
    spec, d, x, y = example(architecture, skip)
    units = replace(Units.fitted_to(x), target=Units.fitted_to(y))
    marks = torch.arange(F) < dead
    step = sparse_step(spec, d, x, reading=Reading(units, target=y), dead=marks, ops=reference)
    found = {name: torch.full_like(t, torch.nan) for name, t in d.tensors().items() if name not in ("b_dec", "W_skip")}
    if d.activation.threshold_is_calibrated:
        del found["threshold"]
    for latents in (slice(0, 17), slice(17, F)):
        step.gradients(latents, {name: g[latents] for name, g in found.items()})

    trained = {name: t.clone().requires_grad_() for name, t in d.tensors().items()}
    u, v = units.normalise(x), units.out.normalise(y)
    loss = training_loss(spec, d.with_tensors(trained), u, target=v, dead=marks)
    loss.total.backward()
    torch.testing.assert_close(step.loss.total, loss.total.detach())
    for name, gradient in (found | {"b_dec": step.b_dec}).items():
        torch.testing.assert_close(gradient, trained[name].grad, msg=name)
    torch.testing.assert_close(step.variance, (v - v.mean(dim=0)).square().sum())


def test_a_skip_connection_starts_as_the_affine_part() -> None:
    x, y = pair()
    d = initialise(sized("topk", True), x, torch.Generator().manual_seed(0), y)
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    solution = torch.linalg.lstsq(ones, y).solution
    torch.testing.assert_close(d.W_skip, solution[:-1].T, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_one_is_better_than_nothing(architecture: str) -> None:
    x, y = pair(8192)
    units = replace(Units.fitted_to(x), target=Units.fitted_to(y))
    d = initialise(
        sized(architecture, False), units.normalise(x), torch.Generator().manual_seed(0), units.out.normalise(y)
    )
    torch.testing.assert_close(d.W_dec.norm(dim=1), (d.W_dec.norm(dim=1) * 0 + 1))
    assert fvu(units.to_canonical(d), x, target=y) < 0.95


# --- hops -------------------------------------------------------------------------------------------------------------


@SKIP
@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated"])
def test_fold_is_its_definition(architecture: str, skip: bool) -> None:
    """Reads B x + b where it read x, and what it writes goes through A and c: exact in float64."""
    _, d, x, _ = example(architecture, skip)
    g = torch.Generator().manual_seed(2)
    between = AffineMap(
        A=torch.randn(7, DY, generator=g, dtype=x.dtype), c=torch.randn(7, generator=g, dtype=x.dtype),
        B=torch.randn(D, 10, generator=g, dtype=x.dtype), b=torch.randn(D, generator=g, dtype=x.dtype),
    )  # fmt: skip
    elsewhere = torch.randn(50, 10, generator=g, dtype=x.dtype)
    expected = d(elsewhere @ between.B.T + between.b) @ between.A.T + between.c
    folded = fold(d, between)
    torch.testing.assert_close(folded(elsewhere), expected)
    assert (folded.d_model, folded.d_out) == (10, 7)


def test_paired_moments_give_the_maps_of_both_sides() -> None:
    x, y = pair()
    moments = PairedMoments(Moments.empty(D, D), Moments.empty(DY, DY))
    moments.inputs.add(x, 2 * x + 1)
    moments.outputs.add(y, 3 * y - 1)
    between = map_between("affine", D, moments, 0.0)
    inputs, outputs = (map_between("affine", D, m, 0.0) for m in (moments.inputs, moments.outputs))
    for found, expected in zip(vars(between).values(), vars(crossed(inputs, outputs)).values(), strict=True):
        assert torch.equal(found, expected)
    torch.testing.assert_close(between.A, 3 * torch.eye(DY, dtype=x.dtype), atol=0.02, rtol=0)
    torch.testing.assert_close(between.B, 0.5 * torch.eye(D, dtype=x.dtype), atol=0.02, rtol=0)


def test_fold_refuses_another_width() -> None:
    _, d, _, _ = example("topk", False)
    with pytest.raises(TransferError, match="width"):
        fold(d, map_between("identity", D, None))


@SKIP
def test_a_refit_lowers_the_error_on_the_target(skip: bool) -> None:
    _, d, _, _ = example("relu", skip)
    x, y = pair()
    with_skip = refit_skip(d, x, y)
    better = refit(with_skip, x.split(512), target=y.split(512))
    assert fvu(better, x, target=y) < 0.9 * fvu(d, x, target=y)
    assert (with_skip is d) == (not skip)
    if skip:  # what is linear in x is gone from what is left
        rest = (y - with_skip(x)) - (y - with_skip(x)).mean(dim=0)
        linear = torch.linalg.lstsq(x - x.mean(dim=0), rest).solution
        assert float(((x - x.mean(dim=0)) @ linear).square().sum()) < 0.01 * float(rest.square().sum())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_revived_latents_fire_where_something_is_left(architecture: str) -> None:
    _, d, _, _ = example(architecture, False)
    x, y = pair()
    silent = torch.arange(F) < 6
    b_enc = torch.where(silent, -1e6, d.b_enc)
    dead = replace(d, b_enc=b_enc)
    alive = revive(dead, x, target=y)
    assert bool(((alive.encode(x) > 0).any(dim=0) | ~silent).all())
    better = refit(alive, x.split(512), target=y.split(512))
    assert fvu(better, x, target=y) < fvu(dead, x, target=y)


def test_it_can_grow_with_targets_and_says_so_without() -> None:
    _, d, _, _ = example("topk", False)
    x, y = pair()
    grown = reshape(d, x, Shape("topk", F + 8, 4.0), target=y)
    assert grown.W_enc.shape == (F + 8, D) and grown.W_dec.shape == (F + 8, DY)
    units = replace(Units.fitted_to(x), target=Units.fitted_to(y))
    with pytest.raises(TransferError, match="set refit = true"):
        carry(d, None, x, units, shape=Shape("topk", F + 8, 4.0))


def test_a_skip_connection_is_fitted_to_what_is_left_or_dropped_with_its_mean_kept() -> None:
    x, y = pair()
    _, plain, _, _ = example("relu", False)
    gained = reshape(plain, x, Shape("relu", F, None, skip_connection=True), target=y)
    expected = refit_skip(replace(plain, W_skip=torch.zeros(DY, D, dtype=x.dtype)), x, y)
    assert gained.W_skip is not None and expected.W_skip is not None
    torch.testing.assert_close(gained.W_skip, expected.W_skip)
    assert fvu(gained, x, target=y) < 0.8 * fvu(plain, x, target=y)
    dropped = reshape(gained, x, Shape("relu", F, None, skip_connection=False), target=y)
    assert dropped.W_skip is None
    torch.testing.assert_close(dropped(x).mean(dim=0), gained(x).mean(dim=0))
    for same in (None, True):
        kept = reshape(gained, x, Shape("relu", F, None, skip_connection=same))
        assert kept.W_skip is gained.W_skip


def test_a_skip_connection_is_not_fitted_without_a_target() -> None:
    x, y = pair()
    _, d, _, _ = example("topk", False)
    units = replace(Units.fitted_to(x), target=Units.fitted_to(y))
    with pytest.raises(TransferError, match="gets more latents, or a skip connection, must be refitted"):
        carry(d, None, x, units, shape=Shape("topk", F, 4.0, skip_connection=True))


@SKIP
def test_carry_keeps_what_a_change_of_coordinates_does_not_touch(skip: bool) -> None:
    _, d, _, _ = example("relu", skip)
    x, y = pair()
    d = refit(refit_skip(d, x, y), x.split(512), target=y.split(512))
    Qx, _ = torch.linalg.qr(torch.randn(D, D, dtype=x.dtype, generator=torch.Generator().manual_seed(5)))
    Qy, _ = torch.linalg.qr(torch.randn(DY, DY, dtype=x.dtype, generator=torch.Generator().manual_seed(6)))
    there, made = x @ Qx + 1, y @ Qy - 2
    moments = PairedMoments(Moments.empty(D, D), Moments.empty(DY, DY))
    moments.inputs.add(x, there)
    moments.outputs.add(y, made)
    units = replace(Units.fitted_to(there), target=Units.fitted_to(made))
    between = map_between("procrustes", D, moments, 0.0)
    carried = carry(d, between, there, units).dictionary
    assert fvu(carried, there, target=made) == pytest.approx(fvu(d, x, target=y), rel=1e-3)
    refitted = carry(d, between, there, units, retraining=Retraining(there, 0, made)).dictionary
    assert fvu(refitted, there, target=made) <= fvu(carried, there, target=made) * 1.001


# --- runs -------------------------------------------------------------------------------------------------------------

W = 16
SITES = {"layers": [0, 1, 2], "module": "mlp_in", "module_out": "mlp_out"}


def make_plan(facts: ModelFacts, architecture: str = "topk", skip: bool = False, **plan: Any) -> Plan:
    sections = {
        "sites": SITES,
        "data": {"context": 16, "block_tokens": 512, "outlier_norm": 0},
        "dictionary": {
            "n_latents": 48, "k": 4, "target_l0": 4.0, "architecture": architecture, "skip_connection": skip,
        },
        "plan": {"root_tokens": 4096, "transfer_tokens": 2048, "moment_tokens": 1024, "refit_tokens": 512,
                 "roots": [1], "controls": [2], **plan},
        "train": {"batch_tokens": 64, "checkpoint_every": 640, "lr": 3e-3, "transfer_lr": 1e-3},
    }  # fmt: skip
    return compile_plan(Recipe.parse(sections, source="test"), facts)


def stream() -> TensorStream:
    tensors = {}
    for layer in range(3):
        g = torch.Generator().manual_seed(layer)
        x = torch.randn(8192, W, generator=torch.Generator().manual_seed(9)) @ torch.randn(W, W, generator=g) / 4 + 1
        tensors[Site(layer, "mlp_in")] = x
        tensors[Site(layer, "mlp_out")] = torch.tanh(x @ torch.randn(W, W, generator=g)) + 0.5 * x
    return TensorStream(tensors, block_tokens=512, batch_tokens=64)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, facts: ModelFacts) -> Path:
    root = tmp_path_factory.mktemp("transcoders") / "whole"
    run(make_plan(facts, skip=True), root, facts, stream=stream())
    return root


def test_a_plan_reads_both_sites_and_names_its_legs(facts: ModelFacts) -> None:
    plan = make_plan(facts)
    assert [leg.id for leg in plan.legs][:2] == ["L1.transcoder", "L0.transcoder-from-L1"]
    leg = plan.leg("L0.transcoder-from-L1")
    assert (leg.site, leg.site_out) == (Site(0, "mlp_in"), Site(0, "mlp_out"))
    assert {Site(1, "mlp_in"), Site(1, "mlp_out")} <= set(plan.open_sites(0, 512))
    assert make_plan(facts).legs[0].model_dump()["module_out"] == "mlp_out"


@pytest.mark.parametrize("killed_at", [1088, 3136, 4672, 5120])
def test_killed_anywhere_and_resumed_gives_the_same_bits(
    whole: Path, tmp_path: Path, facts: ModelFacts, killed_at: int
) -> None:
    plan = make_plan(facts, skip=True)
    with pytest.raises(MemoryError):
        run(plan, tmp_path / "killed", facts, Watch(kill_at=killed_at), stream())
    run(plan, tmp_path / "killed", facts, stream=stream())
    assert_same(whole, tmp_path / "killed")


@SKIP
@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu"])
def test_ctrl_c_saves_between_any_two_batches(tmp_path: Path, facts: ModelFacts, architecture: str, skip: bool) -> None:
    plan = make_plan(facts, architecture, skip, controls=[])
    run(plan, tmp_path / "whole", facts, stream=stream())
    with pytest.raises(Interrupted):
        run(plan, tmp_path / "asked", facts, Watch(ask_at=4352), stream())
    run(plan, tmp_path / "asked", facts, stream=stream())
    assert_same(tmp_path / "whole", tmp_path / "asked")


def test_legs_alone_equal_legs_in_company(whole: Path, tmp_path: Path, facts: ModelFacts) -> None:
    plan = make_plan(facts, skip=True)
    alone = plan.changed(legs=[leg for leg in plan.legs if leg.id in ("L1.transcoder", "L2.transcoder-from-L1")])
    run(alone, tmp_path / "alone", facts, stream=stream())
    ours, theirs = weights(whole), weights(tmp_path / "alone")
    assert theirs
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_a_published_one_reconstructs_its_target(whole: Path) -> None:
    tensors = stream().tensors
    for leg_id, layer in (("L1.transcoder", 1), ("L0.transcoder-from-L1", 0), ("L2.transcoder-scratch-equal", 2)):
        dictionary, info = read_dictionary(whole / "legs" / leg_id)
        assert (info.module, info.module_out, info.skip_connection) == ("mlp_in", "mlp_out", True)
        x, y = tensors[Site(layer, "mlp_in")], tensors[Site(layer, "mlp_out")]
        x_c, y_c = x - x.mean(dim=0), y - y.mean(dim=0)
        rest = y_c - x_c @ torch.linalg.lstsq(x_c, y_c).solution
        share = float(rest.square().sum() / y_c.square().sum())
        assert fvu(dictionary, x, target=y) < share  # better than the affine part alone
        assert math.isclose(float((dictionary.encode(x[:512]) > 0).sum(dim=1).float().mean()), 4, rel_tol=0.1)


def legs_with_and_without() -> list[dict[str, Any]]:
    """A transcoder without a skip connection, its hops with one, untrained and trained, and a hop that drops it."""
    there = {"method": "procrustes", "module": "transcoder"}
    return [
        {"id": "plain", "layer": 1, "tokens": 2048, "module": "transcoder", "skip_connection": False},
        {"id": "gained", "layer": 0, "tokens": 0, "parent": "plain", "skip_connection": True, **there},
        {"id": "trained", "layer": 2, "tokens": 1024, "parent": "plain", "skip_connection": True, **there},
        {"id": "like-its-parent", "layer": 1, "tokens": 1024, "parent": "trained", **there},
        {"id": "dropped", "layer": 1, "tokens": 1024, "parent": "trained", "skip_connection": False, **there},
    ]


def mixed_plan(facts: ModelFacts, **leg_keys: Any) -> Plan:
    """A plan written leg by leg; `leg_keys` are further keys of its hops."""
    legs = [leg | leg_keys if "parent" in leg else leg for leg in legs_with_and_without()]
    return make_plan(facts, skip=True, roots=[], controls=[], legs=legs)


def test_each_leg_may_have_a_skip_connection_or_none(tmp_path: Path, facts: ModelFacts) -> None:
    plan = mixed_plan(facts)
    with_skip = [leg.id for leg in plan.legs if leg.dictionary.skip_connection]
    assert with_skip == ["gained", "trained", "like-its-parent"]
    assert [leg.id for leg in plan.legs if leg.hop and plan.reshapes(leg)] == ["gained", "trained", "dropped"]
    run(plan, tmp_path / "mixed", facts, stream=stream())
    tensors = stream().tensors
    for leg in plan.legs:
        dictionary, info = read_dictionary(tmp_path / "mixed/legs" / leg.id)
        has_one = leg.id in with_skip
        assert info.skip_connection == has_one == (dictionary.W_skip is not None)
        assert not has_one or bool(dictionary.W_skip.norm() > 0.1)  # type: ignore[union-attr]
        assert fvu(dictionary, tensors[leg.site], target=tensors[leg.site_out]) < 0.6
    with pytest.raises(MemoryError):
        run(plan, tmp_path / "killed", facts, Watch(kill_at=3136), stream())
    run(plan, tmp_path / "killed", facts, stream=stream())
    assert_same(tmp_path / "mixed", tmp_path / "killed")


def test_what_only_a_refit_can_give_a_transcoder_is_refused_without_one(facts: ModelFacts) -> None:
    with pytest.raises(PlanError, match=r"leg gained gets a skip connection that its parent plain does not have"):
        mixed_plan(facts, refit=False)
    with pytest.raises(PlanError, match=r"leg gained gets 16 latents and a skip connection that .* set refit = true"):
        mixed_plan(facts, refit=False, n_latents=64)
    kept = mixed_plan(facts, refit=False, skip_connection=False)
    assert not any(leg.dictionary.skip_connection for leg in kept.legs)


def refused(facts: ModelFacts, match: str, sites: dict[str, Any], **sections: Any) -> None:
    recipe = {"sites": sites, "data": {"context": 16, "outlier_norm": 0}, "dictionary": {"n_latents": 48, "k": 4}}
    recipe |= sections
    with pytest.raises(PlanError, match=match):
        compile_plan(Recipe.parse(recipe, source="test"), facts)


def test_what_makes_no_sense_is_refused(facts: ModelFacts) -> None:
    skip = {"n_latents": 48, "k": 4, "skip_connection": True}
    refused(facts, 'sites.module_out = "mlp_out"', {"layers": [0]}, dictionary=skip)
    asked = {"id": "a", "layer": 0, "tokens": 4096, "module": "mlp_out", "skip_connection": True}
    refused(facts, "leg a: skip_connection belongs to transcoders, and this leg is an SAE", SITES,
            plan={"legs": [asked]})  # fmt: skip
    legs = [
        {"id": "a", "layer": 0, "tokens": 4096},
        {"id": "b", "layer": 1, "tokens": 4096, "parent": "a", "module": "mlp_in", "module_out": "mlp_out"},
    ]
    refused(facts, "is a transcoder from mlp_in to mlp_out, and its parent a is an SAE of", {"layers": [0]},
            plan={"legs": legs, "moment_tokens": 1024})  # fmt: skip


def test_the_same_site_twice_is_an_sae(facts: ModelFacts) -> None:
    recipe = Recipe.parse({
        "sites": {"layers": [0], "module": "mlp_out", "module_out": "mlp_out"},
        "data": {"context": 16, "outlier_norm": 0}, "dictionary": {"n_latents": 48, "k": 4},
    }, source="test")  # fmt: skip
    leg = compile_plan(recipe, facts).legs[0]
    assert not leg.is_transcoder and leg.id == "L0.mlp_out"
