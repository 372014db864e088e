"""Nested dictionaries (Matryoshka): the first latents alone reconstruct, too."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from saerelay.planning.leg import Leg, Schedule
from saerelay.planning.recipe import Recipe, TrainSpec
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.initialise import initialise
from saerelay.sae.kernels import cpu, reference, sparse_step
from saerelay.sae.loss import training_loss
from saerelay.sae.quality import fvu
from saerelay.sae.spec import DictionarySpec, SizedDictionarySpec
from saerelay.training.engine import Trainee
from saerelay.training.state import TraineeState, first_state

torch.set_num_threads(1)
D, F = 12, 48
OPS = [pytest.param(reference, id="reference")] + ([pytest.param(cpu, id="mkl")] if cpu.available() else [])


def spec_of(architecture: str, matryoshka: list[float], **keys: Any) -> SizedDictionarySpec:
    keys = {"architecture": architecture, "n_latents": F, "k": 5, "target_l0": 5, "matryoshka": matryoshka} | keys
    return DictionarySpec.parse(keys).sized(D)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "relu", "jumprelu", "gated"])
@pytest.mark.parametrize("n_rows", [33, 600])
def test_the_sparse_step_equals_autograd(ops, architecture: str, n_rows: int) -> None:
    spec = spec_of(architecture, [0.1, 0.5])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, D, generator=generator, dtype=torch.float64)
    d = initialise(spec, x, generator)
    d = replace(d, b_dec=torch.randn(D, generator=generator, dtype=torch.float64))
    dead = torch.arange(F) % 5 == 0 if architecture.endswith("topk") else None

    parameters = {name: tensor.clone().requires_grad_() for name, tensor in d.tensors().items()}
    expected = training_loss(spec, replace(d, **parameters), x, dead=dead)
    expected.total.backward()

    step = sparse_step(spec, d, x, dead=dead, ops=ops)
    assert torch.allclose(step.loss.total, expected.total.detach(), rtol=1e-12)
    assert torch.allclose(step.loss.squared_error, expected.squared_error, rtol=1e-12)
    trained = [name for name in parameters if name != "threshold" or not d.activation.threshold_is_calibrated]
    gradients = {name: torch.full_like(d.tensors()[name], torch.nan) for name in trained}
    for latents in (slice(0, 17), slice(17, F)):  # which cut through a prefix
        step.gradients(latents, {name: g[latents] for name, g in gradients.items() if name != "b_dec"})
    gradients["b_dec"] = step.b_dec
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, parameters[name].grad, rtol=1e-10, atol=1e-14), name  # type: ignore[arg-type]


def test_the_loss_is_the_mean_of_what_each_prefix_loses() -> None:
    spec = spec_of("relu", [0.25, 0.5], l0_weight=0.0)
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    d = initialise(spec, x, torch.Generator().manual_seed(1))
    z = d.encode(x)
    errors = []
    for end in (12, 24, 48):
        x_hat = z[:, :end] @ d.W_dec[:end] + d.b_dec
        errors.append((x - x_hat).square().sum() / x.numel())
    assert torch.allclose(training_loss(spec, d, x, warmth=0.0).total, torch.stack(errors).mean())


def trained(matryoshka: list[float], x: torch.Tensor, *, pause: int = 0) -> Trainee:
    budget = len(x) - len(x) % 64
    schedule = Schedule(budget_tokens=budget, batch_tokens=64, lr=3e-3, dead_after_tokens=budget)
    leg = Leg(
        id="a", role="root", layer=0, module="resid_post", seed=0, schedule=schedule,
        dictionary=spec_of("topk", matryoshka),
    )  # fmt: skip
    trainee = Trainee(leg, TrainSpec(), first_state(leg, TrainSpec(), x[:1024]))
    for number, batch in enumerate(x[:budget].split(64)):
        if number == pause:
            saved = {name: tensor.clone() for name, tensor in trainee.state.tensors().items()}
            trainee = Trainee(leg, TrainSpec(), TraineeState.restore(leg, saved))
        trainee.step(batch)
    return trainee


def first_latents(dictionary: Dictionary, n: int) -> Dictionary:
    """The dictionary of the first n latents, active as in the whole one: without a limit of their number."""
    return replace(
        dictionary,
        architecture="topk",
        k=n,
        W_enc=dictionary.W_enc[:n],
        b_enc=dictionary.b_enc[:n],
        W_dec=dictionary.W_dec[:n],
    )


def activations() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    weights = torch.rand(16384, 40, generator=g) * (torch.rand(16384, 40, generator=g) < 0.1)
    return weights @ torch.randn(40, D, generator=g)


def test_the_first_latents_learn_to_reconstruct_by_themselves() -> None:
    x = activations()
    nested = first_latents(trained([0.25], x).canonical(), 12)
    plain = first_latents(trained([], x).canonical(), 12)
    assert fvu(nested, x[:2048]) < 0.8 * fvu(plain, x[:2048])


def test_a_pause_changes_no_bit() -> None:
    x = activations()[:4096]
    whole = trained([0.25, 0.5], x).canonical().tensors()
    paused = trained([0.25, 0.5], x, pause=20).canonical().tensors()
    assert all(torch.equal(paused[name], tensor) for name, tensor in whole.items())


def test_recipes_ask_for_it_and_refuse_what_is_no_share() -> None:
    recipe = Recipe.parse({"dictionary": {"matryoshka": [0.25], "n_latents": 64}}, source="test")
    assert recipe.dictionary.sized(8).prefixes(64) == [16, 64]
    assert "matryoshka" not in Recipe().dictionary.model_dump(), "plans without it stay as they were"
    with pytest.raises(Exception, match="less than 1"):
        Recipe.parse({"dictionary": {"matryoshka": [2.0]}}, source="test")
