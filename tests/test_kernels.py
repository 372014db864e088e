"""The sparse step equals autograd on the dense loss; sparse products equal dense ones."""

from dataclasses import replace

import pytest
import torch

from saerelay.sae.architectures import BatchTopK, TopK
from saerelay.sae.dictionary import Dictionary
from saerelay.sae.initialise import initialise
from saerelay.sae.kernels import (
    Reading,
    cpu,
    dense_codes,
    encode_sparse,
    join_codes,
    products,
    reference,
    select,
    sparse_step,
    split_codes,
)
from saerelay.sae.kernels.adam import Adam
from saerelay.sae.kernels.codes import row_sums
from saerelay.sae.kernels.pieces import ROWS
from saerelay.sae.kernels.select import (
    GROUP,
    codes_at_least,
    nonzero_codes,
    positive_codes,
    top_codes,
    top_codes_of_batch,
)
from saerelay.sae.loss import Loss, training_loss
from saerelay.sae.spec import DictionarySpec, SizedDictionarySpec
from saerelay.sae.units import Units

OPS = [pytest.param(reference, id="reference")] + ([pytest.param(cpu, id="mkl")] if cpu.available() else [])
D, F, B = 12, 50, 33


def example(
    architecture: str, seed: int, dtype: torch.dtype = torch.float64, *, B: int = B, F: int = F, k: int = 5
) -> tuple[SizedDictionarySpec, Dictionary, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, D, generator=g, dtype=dtype)
    spec = DictionarySpec.parse({"architecture": architecture, "n_latents": F, "k": k, "target_l0": k}).sized(D)
    d = initialise(spec, x, g)
    d = replace(d, b_enc=torch.randn(F, generator=g, dtype=dtype), b_dec=torch.randn(D, generator=g, dtype=dtype))
    if d.r_mag is not None:
        d = replace(d, r_mag=torch.randn(F, generator=g, dtype=dtype))
    return spec, d, x


def stepped(
    spec: SizedDictionarySpec, d: Dictionary, x: torch.Tensor, **options
) -> tuple[Loss, dict[str, torch.Tensor]]:
    """Loss and all gradients of a sparse step, its latents in two pieces."""
    step = sparse_step(spec, d, x, **options)
    trained = d.tensors()
    if d.activation.threshold_is_calibrated:
        del trained["threshold"]
    gradients = {name: torch.full_like(t, torch.nan) for name, t in trained.items()}
    for latents in (slice(0, 17), slice(17, d.n_latents)):
        step.gradients(latents, {name: g[latents] for name, g in gradients.items() if name != "b_dec"})
    return step.loss, gradients | {"b_dec": step.b_dec}


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize(
    ("architecture", "n_dead"),
    [("relu", 0), ("jumprelu", 0), ("gated", 0), *((name, n) for name in ("topk", "batchtopk") for n in (0, 1, 20, F))],
)
@pytest.mark.parametrize("normalise", [True, False])
def test_sparse_step_equals_autograd(ops, architecture: str, n_dead: int, normalise: bool) -> None:
    for seed in range(3):
        spec, d, x = example(architecture, seed)
        spec = spec.changed(normalise=normalise)
        dead = torch.randperm(F, generator=torch.Generator().manual_seed(seed)) < n_dead
        parameters = {name: tensor.clone().requires_grad_() for name, tensor in d.tensors().items()}
        expected = training_loss(spec, replace(d, **parameters), x, dead=dead, warmth=0.7)
        expected.total.backward()
        loss, gradients = stepped(spec, d, x, dead=dead, warmth=0.7, ops=ops)
        assert torch.allclose(loss.total, expected.total.detach(), rtol=1e-12)
        assert torch.allclose(loss.squared_error, expected.squared_error, rtol=1e-12)
        assert int(loss.n_active) == int(expected.n_active) and torch.equal(loss.fired, expected.fired)
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, parameters[name].grad, rtol=1e-10, atol=1e-14), name  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "relu", "jumprelu", "gated"])
def test_a_batch_in_pieces_with_latents_in_groups_equals_autograd(architecture: str) -> None:
    """More tokens than one piece, and enough latents that selection goes by groups."""
    assert ROWS < 600 and 192 >= 4 * GROUP * 3
    spec, d, x = example(architecture, 0, B=600, F=192, k=3)
    dead = torch.arange(192) % 5 == 0 if architecture.endswith("topk") else None
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in d.tensors().items()}
    expected = training_loss(spec, replace(d, **parameters), x, dead=dead)
    expected.total.backward()
    loss, gradients = stepped(spec, d, x, dead=dead)
    assert torch.allclose(loss.total, expected.total.detach(), rtol=1e-12)
    assert torch.equal(loss.fired, expected.fired) and int(loss.n_active) == int(expected.n_active)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, parameters[name].grad, rtol=1e-10, atol=1e-14), name  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "relu", "jumprelu", "gated"])
def test_an_encoder_that_reads_whitened_activations_equals_autograd(architecture: str) -> None:
    spec, d, x = example(architecture, 0)
    whitening = torch.randn(D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dead = torch.arange(F) % 4 == 0
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in d.tensors().items()}
    whitened = replace(d, **parameters | {"W_enc": parameters["W_enc"] @ whitening.T})
    expected = training_loss(spec, whitened, x, dead=dead if architecture.endswith("topk") else None)
    expected.total.backward()
    dead = dead if architecture.endswith("topk") else None
    loss, gradients = stepped(spec, d, x, dead=dead, reading=Reading(whitening=whitening))
    assert torch.allclose(loss.total, expected.total.detach(), rtol=1e-12)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, parameters[name].grad, rtol=1e-9, atol=1e-13), name  # type: ignore[arg-type]


def test_raw_activations_in_units_equal_normalised_ones() -> None:
    spec, d, x = example("topk", 0)
    mean, scale = torch.randn(D, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    expected, wanted = stepped(spec, d, x)
    loss, gradients = stepped(spec, d, x * scale + mean, reading=Reading(units=Units(mean, scale)))
    assert torch.allclose(loss.total, expected.total)
    assert all(torch.allclose(gradients[name], gradient) for name, gradient in wanted.items())


def test_variance_is_about_the_mean_of_the_batch() -> None:
    spec, d, x = example("topk", 0)
    assert torch.allclose(sparse_step(spec, d, x + 5).variance, (x - x.mean(dim=0)).square().sum())


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "relu", "jumprelu", "gated"])
def test_a_bfloat16_encoder_gives_nearly_the_same_gradients(architecture: str) -> None:
    spec, d, x = example(architecture, 0, torch.float32, B=600, F=192, k=3)
    dead = torch.arange(192) % 5 == 0 if architecture.endswith("topk") else None
    _, exact = stepped(spec, d, x, dead=dead)
    _, half = stepped(spec, d, x, dead=dead, reading=Reading(encoder=d.W_enc.bfloat16()))
    for name, gradient in exact.items():
        assert gradient.dtype == half[name].dtype == torch.float32
        assert (half[name] - gradient).norm() < 0.1 * gradient.norm(), name
        assert not torch.equal(half[name], gradient), name


def test_the_largest_of_a_batch_are_found_whatever_the_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of very different sizes of values; and guesses that are far too high."""
    pre = torch.randn(40, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pre[:10] *= 20
    expected = BatchTopK(k=3).training_codes(pre, None)
    parts = list(pre.split([10, 11, 19]))
    assert torch.equal(dense_codes(join_codes(top_codes_of_batch(parts, 120))), expected)
    monkeypatch.setattr(select, "_guessed_bound", lambda pre, k: pre.max() / 2)
    assert torch.equal(dense_codes(join_codes(top_codes_of_batch(parts, 120))), expected)


def test_equal_values_do_not_make_a_batch_keep_more() -> None:
    pre = torch.ones(8, 64)
    assert sum(codes.values.numel() for codes in top_codes_of_batch(list(pre.split(3)), 16)) == 16
    assert dense_codes(top_codes(pre, 1)).sum(dim=1).tolist() == [1.0] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(64, 1), (256, 3), (1024, 16), (100, 7), (64, 64)])
def test_selection_by_groups_equals_topk(dtype: torch.dtype, n: int, k: int) -> None:
    pre = torch.randn(50, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    found = dense_codes(top_codes(pre, k))
    expected = TopK(k=k).activate(pre, None).to(found.dtype)
    assert torch.equal(found.sort(dim=1).values, expected.sort(dim=1).values)  # bfloat16 has ties
    assert torch.equal(found[found > 0], pre.to(found.dtype)[found > 0])


def test_a_row_of_zeros_that_gets_no_gradient_stays() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    triple = (rows, torch.zeros(2, 2), torch.zeros(2, 2))
    adam = Adam(1e-2, (0.9, 0.999), torch.tensor(1.0), None)
    reference.adam_rows(adam, triple, torch.zeros(2, 2), 1.0, unit=True, copy=None)
    assert torch.equal(rows, torch.tensor([[0.0, 0.0], [0.6, 0.8]]))


def test_at_least_is_a_mask() -> None:
    for n in (64, 50):
        pre = torch.randn(30, n, generator=torch.Generator().manual_seed(n))
        found = dense_codes(codes_at_least(pre, torch.tensor(0.7)))
        assert torch.equal(found, pre * (pre >= 0.7))


@pytest.mark.parametrize("room", [0, 1, 700, 800, 2000])
def test_positive_codes_in_limited_room(room: int) -> None:
    pre = torch.randn(30, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pre[3], pre[29] = -1, 0
    codes, n = positive_codes(pre, room)
    whole = nonzero_codes(pre.relu())
    n_kept = min(room, int(n))
    assert int(n) == len(whole.values) and 700 < int(n) < 800
    assert torch.equal(codes.values[:n_kept], whole.values[:n_kept]) and not codes.values[n_kept:].any()
    assert torch.equal(codes.columns[:n_kept], whole.columns[:n_kept]) and not codes.columns[n_kept:].any()
    assert torch.equal(codes.row_starts, whole.row_starts.clamp(max=room))
    pre[3, 7] = torch.nan
    assert int(positive_codes(pre, room)[1]) == int(n) + 1


@pytest.mark.parametrize("n_latents", [50, 2**15])
def test_padded_codes_are_the_same_codes(n_latents: int) -> None:
    z = torch.randn(30, n_latents, generator=torch.Generator().manual_seed(1)).relu()
    z[:, 200:] = 0
    whole = nonzero_codes(z)
    codes, _ = positive_codes(z, len(whole.values) + 11)
    assert torch.equal(dense_codes(codes), z)
    for (starts, rows, order), n in ((codes._by_sorting(), len(whole.values)), (whole._by_sorting(), None)):
        assert torch.equal(starts, whole.transpose()[0])
        assert torch.equal(rows[:n], whole.transpose()[1]) and torch.equal(order[:n].int(), whole.transpose()[2])
    assert torch.equal(row_sums(codes.with_values(codes.values**2)), row_sums(whole.with_values(whole.values**2)))


@pytest.mark.parametrize("ops", OPS)
def test_products_equal_dense_ones(ops) -> None:
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        z = torch.randn(B, F, generator=g, dtype=torch.float64) * (torch.rand(B, F, generator=g) < 0.1)
        W, x = torch.randn(F, D, generator=g, dtype=torch.float64), torch.randn(B, D, generator=g, dtype=torch.float64)
        codes = nonzero_codes(z)
        assert torch.allclose(ops.decode(codes, W), z @ W)
        rest = x.clone()
        ops.subtract_decoded(rest, codes, W)
        assert torch.allclose(rest, x - z @ W)
        assert torch.allclose(ops.decode(codes, W, out=rest), z @ W) and torch.allclose(rest, z @ W)
        assert torch.allclose(ops.decode(codes.transposed()[0], x), z.T @ x)
        rows, columns = codes.rows(), codes.columns.long()
        assert torch.allclose(ops.sampled(codes, x, W), (x @ W.T)[rows, columns])


def test_selections_equal_their_definitions() -> None:
    pre = torch.randn(B, F, generator=torch.Generator().manual_seed(0))
    kept = dense_codes(top_codes(pre, 4))
    for row, source in zip(kept, pre, strict=True):
        floor = source.sort().values[-4]
        assert torch.equal(row, torch.where(source >= floor, source, 0.0).relu())
    floor = pre.flatten().sort().values[-4 * B]
    assert torch.equal(
        dense_codes(join_codes(top_codes_of_batch([pre], 4 * B))), torch.where(pre >= floor, pre, 0.0).relu()
    )


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "relu", "jumprelu", "gated"])
def test_encode_sparse_equals_encode(architecture: str) -> None:
    _, d, x = example(architecture, 0)
    assert torch.equal(dense_codes(encode_sparse(d, x)), d.encode(x))


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_gram_of_codes_is_that_of_dense_ones(architecture: str) -> None:
    _, d, x = example(architecture, 0, B=300, F=2100)
    z = encode_sparse(d, x)
    assert torch.allclose(z.gram(), dense_codes(z).T @ dense_codes(z), rtol=1e-12)


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
    _, exact = stepped(spec, d, x, ops=ops)
    _, single = stepped(spec, d.to(torch.float32), x.float(), ops=ops)
    for name, gradient in exact.items():
        assert (single[name] - gradient).norm() < 1e-5 * gradient.norm(), name
