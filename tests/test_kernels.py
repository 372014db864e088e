"""The sparse step equals autograd on the dense loss; sparse products equal dense ones."""

from dataclasses import replace

import pytest
import torch

from saerelay.dictionaries import Dictionary, initialise, training_loss
from saerelay.kernels import cpu, dense_codes, encode_sparse, join_codes, products, reference, sparse_step, split_codes
from saerelay.kernels.codes import nonzero_codes, top_codes, top_codes_of_batch
from saerelay.recipe import DictionarySpec

OPS = [pytest.param(reference, id="reference")] + ([pytest.param(cpu, id="mkl")] if cpu.available() else [])
D, F, B = 12, 50, 33


def example(
    architecture: str, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[DictionarySpec, Dictionary, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, D, generator=g, dtype=dtype)
    spec = DictionarySpec(architecture=architecture, n_latents=F, k=5)  # type: ignore[arg-type]
    d = initialise(spec, x, g)
    return (
        spec,
        replace(d, b_enc=torch.randn(F, generator=g, dtype=dtype), b_dec=torch.randn(D, generator=g, dtype=dtype)),
        x,
    )


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
@pytest.mark.parametrize("n_dead", [0, 1, 20, F])
@pytest.mark.parametrize("normalise", [True, False])
def test_sparse_step_equals_autograd(ops, architecture: str, n_dead: int, normalise: bool) -> None:
    for seed in range(3):
        spec, d, x = example(architecture, seed)
        spec = spec.model_copy(update={"normalise": normalise})
        dead = torch.randperm(F, generator=torch.Generator().manual_seed(seed)) < n_dead
        parameters = {name: tensor.clone().requires_grad_() for name, tensor in d.tensors().items()}
        expected = training_loss(spec, replace(d, **parameters), x, dead=dead)
        expected.total.backward()
        loss, gradients = sparse_step(spec, d, x, dead=dead, ops=ops)
        assert torch.allclose(loss.total, expected.total.detach(), rtol=1e-12)
        assert torch.allclose(loss.squared_error, expected.squared_error, rtol=1e-12)
        assert int(loss.n_active) == int(expected.n_active) and torch.equal(loss.fired, expected.fired)
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, parameters[name].grad, rtol=1e-10, atol=1e-14), name  # type: ignore[arg-type]


@pytest.mark.parametrize("ops", OPS)
def test_products_equal_dense_ones(ops) -> None:
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        z = torch.randn(B, F, generator=g, dtype=torch.float64) * (torch.rand(B, F, generator=g) < 0.1)
        W, x = torch.randn(F, D, generator=g, dtype=torch.float64), torch.randn(B, D, generator=g, dtype=torch.float64)
        codes = nonzero_codes(z)
        assert torch.allclose(ops.decode(codes, W), z @ W)
        assert torch.allclose(ops.transposed(codes, x), z.T @ x)
        rows, columns = codes.rows(), codes.columns.long()
        assert torch.allclose(ops.sampled(codes, x, W), (x @ W.T)[rows, columns])


def test_selections_equal_their_definitions() -> None:
    pre = torch.randn(B, F, generator=torch.Generator().manual_seed(0))
    kept = dense_codes(top_codes(pre, 4))
    for row, source in zip(kept, pre, strict=True):
        floor = source.sort().values[-4]
        assert torch.equal(row, torch.where(source >= floor, source, 0.0).relu())
    floor = pre.flatten().sort().values[-4 * B]
    assert torch.equal(dense_codes(top_codes_of_batch(pre, 4)), torch.where(pre >= floor, pre, 0.0).relu())


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "relu", "jumprelu"])
def test_encode_sparse_equals_encode(architecture: str) -> None:
    _, d, x = example(architecture, 0)
    assert torch.equal(dense_codes(encode_sparse(d, x)), d.encode(x))


def test_joined_codes_are_the_batches_one_after_the_other() -> None:
    z = torch.randn(B, F).relu()
    parts = [nonzero_codes(z[:10]), nonzero_codes(z[10:11]), nonzero_codes(z[11:])]
    assert torch.equal(dense_codes(join_codes(parts)), z)
    for part, expected in zip(split_codes(join_codes(parts), 7), z.split(7), strict=True):
        assert torch.equal(dense_codes(part), expected)


def test_without_mkl_the_reference_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert products(torch.device("cpu")) is reference


@pytest.mark.parametrize("ops", OPS)
def test_float32_is_close_to_float64(ops) -> None:
    spec, d, x = example("topk", 0)
    _, exact = sparse_step(spec, d, x, ops=ops)
    _, single = sparse_step(spec, d.to(torch.float32), x.float(), ops=ops)
    for name, gradient in exact.items():
        assert (single[name] - gradient).norm() < 1e-5 * gradient.norm(), name
