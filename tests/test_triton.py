"""Triton's products, selection and transposition equal the reference: on the GPU, or in Triton's interpreter."""

import importlib
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from saerelay.sae.initialise import initialise
from saerelay.sae.kernels import Reading, reference, select, sparse_step
from saerelay.sae.kernels.adam import Adam
from saerelay.sae.kernels.codes import Codes, dense_codes
from saerelay.sae.loss import training_loss
from saerelay.sae.spec import DictionarySpec

pytestmark = pytest.mark.interpreter
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined: Triton's own, and then ours
    for name in [name for name in sys.modules if name.split(".")[0] == "triton" and "._C" not in name]:
        del sys.modules[name]
    for name in [name for name in sys.modules if name.startswith("saerelay.sae.kernels.triton")]:
        del sys.modules[name]

ops = importlib.import_module("saerelay.sae.kernels.triton")
products = importlib.import_module("saerelay.sae.kernels.triton.products")
selection = importlib.import_module("saerelay.sae.kernels.triton.selection")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def codes_of(z: torch.Tensor) -> Codes:
    """The non-zero entries of dense codes (B, F)."""
    row_starts = torch.zeros(z.shape[0] + 1, dtype=torch.int32, device=DEVICE)
    row_starts[1:] = (z != 0).sum(dim=1).cumsum(0)
    rows, columns = z.nonzero(as_tuple=True)
    return Codes(row_starts, columns.int(), z[rows, columns], z.shape[1])


def random_codes(B: int, F: int, share: float, seed: int, dtype: torch.dtype = torch.float64) -> Codes:
    """Codes of varying length; latent 1 is active on every token, latent 2 on none, and token 1 has none."""
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(B, F, generator=g, dtype=dtype) * (torch.rand(B, F, generator=g) < share)
    z[:, 1:2] = 1 + torch.rand(B, 1, generator=g, dtype=dtype)
    z[:, 2:3] = 0
    z[1:2] = 0
    return codes_of(z.to(DEVICE))


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


def pair(codes: Codes, first: torch.Tensor, x: torch.Tensor, second: torch.Tensor, g: torch.Tensor):
    """Zᵀx and Zᵀg, with `first` and `second` as values of Z."""
    outs = [torch.full((codes.n_latents, x.shape[1]), torch.nan, dtype=first.dtype, device=DEVICE) for _ in range(2)]
    transposed, order = codes.transposed()
    ops.decode_pair(transposed, first[order], x, second[order], g, *outs)
    return outs


SHAPES = [(5, 4, 1), (1, 1, 16), (33, 24, 63), (20, 30, 200), (7, 20, 300)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PIECE", 8)  # so that segments of a few dozen entries are cut


@pytest.mark.parametrize(("B", "F", "D"), SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_products_equal_the_reference(B: int, F: int, D: int, share: float) -> None:
    codes = random_codes(B, F, share, seed=B)
    W, x, g = normal(F, D, seed=1), normal(B, D, seed=2), normal(B, D, seed=3)
    other = codes.with_values(normal(codes.columns.shape[0], seed=4))
    assert torch.allclose(ops.decode(codes, W), reference.decode(codes, W), rtol=1e-12)
    assert torch.allclose(ops.sampled(codes, g, W), reference.sampled(codes, g, W), rtol=1e-12)
    Z = dense_codes(codes)
    into_first, into_second = pair(codes, other.values, x, codes.values, g)
    assert torch.allclose(into_first, dense_codes(other).T @ x, rtol=1e-12)
    assert torch.allclose(into_second, Z.T @ g, rtol=1e-12)
    rest = x.clone()
    ops.subtract_decoded(rest, codes, W)
    assert torch.allclose(rest, x - reference.decode(codes, W), rtol=1e-12)
    for name in ("WIDEST", "CACHE_BYTES"):  # `explain` in two kernels, and weights that go through the cache by slabs
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(products, name, 1)
            assert torch.allclose(ops.sampled(codes, g, W), reference.sampled(codes, g, W), rtol=1e-10)
            check_explain(codes, x, W, rest)
    check_explain(codes, x, W, rest)


def check_explain(codes: Codes, x: torch.Tensor, W: torch.Tensor, rest: torch.Tensor) -> None:
    """`explain` leaves what is left of x, and returns its products with W."""
    left = x.clone()
    assert torch.allclose(ops.explain(left, codes, W), reference.sampled(codes, rest, W), rtol=1e-10)
    assert torch.allclose(left, rest, rtol=1e-12)


def test_which_latents_fired() -> None:
    codes = random_codes(33, 24, 0.1, seed=0)
    codes.values[::3] = 0.0
    assert torch.equal(ops.fired(codes), reference.fired(codes)) and not ops.fired(codes).all()


@pytest.mark.parametrize("n_steps", [1.0, 7.0, 5000.0])
@pytest.mark.parametrize(("unit", "is_copied", "is_shrunk"), [(False, True, True), (True, False, False)])
def test_a_row_moves_as_the_reference_moves_it(n_steps: float, unit: bool, is_copied: bool, is_shrunk: bool) -> None:
    F, D = 5, 37
    given = [normal(F, D, seed=seed, dtype=torch.float32) for seed in range(4)]
    given[3] = given[3].square() / 100
    number = partial(torch.tensor, dtype=torch.float32, device=DEVICE)
    shrink = number(3.0) if is_shrunk else None
    adam = Adam(number(1e-2), (0.9, 0.999), number(n_steps), shrink, failed=number(0.0))
    exact = [tensor.double() for tensor in given]
    reference.adam_rows(adam._replace(lr=1e-2), tuple(exact[1:]), exact[0], 0.5, unit=unit, copy=None)
    gradient, *ours = (tensor.clone() for tensor in given)
    copy = torch.zeros(F, D, dtype=torch.bfloat16, device=DEVICE) if is_copied else None
    ops.adam_rows(adam, tuple(ours), gradient, 0.5, unit=unit, copy=copy)
    for moved, expected, before in zip(ours, exact[1:], given[1:], strict=True):
        assert (moved - expected).norm() <= 1e-6 * expected.norm() < 1e-4 * (expected - before).norm()
    if copy is not None:  # the interpreter cuts where a GPU rounds
        assert torch.allclose(copy.float(), ours[0], rtol=2**-7)


def test_a_row_of_zeros_that_gets_no_gradient_stays() -> None:
    parameter = torch.tensor([[0.0, 0.0], [3.0, 4.0]], device=DEVICE)
    mean, square, gradient = (torch.zeros_like(parameter) for _ in range(3))
    one, zero = torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE)
    adam = Adam(one, (0.9, 0.999), one, None, failed=zero)
    ops.adam_rows(adam, (parameter, mean, square), gradient, 1.0, unit=True, copy=None)
    assert torch.allclose(parameter, torch.tensor([[0.0, 0.0], [0.6, 0.8]], device=DEVICE))


def test_where_a_step_failed_no_row_moves() -> None:
    triple = tuple(normal(3, 8, seed=seed, dtype=torch.float32) for seed in range(3))
    before = [tensor.clone() for tensor in triple]
    one = torch.ones((), device=DEVICE)
    ops.adam_rows(
        Adam(one, (0.9, 0.999), one, None, failed=one), triple, triple[0] * torch.nan, 1.0, unit=True, copy=None
    )
    assert all(map(torch.equal, triple, before))


@pytest.mark.parametrize("n_entries", [7, 8, 9, 16, 17, 40])
def test_long_segments_are_cut_without_loss(n_entries: int) -> None:
    z = torch.zeros(n_entries + 3, 3, dtype=torch.float64, device=DEVICE)
    z[:n_entries, 2], z[:8, 0] = 1.0, 2.0
    g = normal(n_entries + 3, 5, seed=0)
    codes = codes_of(z)
    for gradient in pair(codes, codes.values, g, codes.values, g):
        assert torch.allclose(gradient, z.T @ g, rtol=1e-12)


def test_float32_and_bfloat16_operands_are_summed_in_float32() -> None:
    codes = random_codes(9, 40, 0.5, seed=0, dtype=torch.float32)
    W, x, g = (normal(n, 70, seed=n, dtype=torch.float32) for n in (40, 9, 9))
    for dtype in (torch.float32, torch.bfloat16):
        W_low, x_low, g_low = W.to(dtype), x.to(dtype), g.to(dtype)
        exact = codes.with_values(codes.values.double())
        for ours, expected in [
            (ops.decode(codes, W_low), reference.decode(exact, W_low.double())),
            (ops.sampled(codes, g_low, W_low), reference.sampled(exact, g_low.double(), W_low.double())),
            (pair(codes, codes.values, x_low, codes.values, g)[0], dense_codes(exact).T @ x_low.double()),
        ]:
            assert ours.dtype == torch.float32
            assert (ours - expected).norm() < 1e-6 * expected.norm()


def test_no_entries_and_no_tokens() -> None:
    for B in (0, 3):
        codes = codes_of(torch.zeros(B, 6, dtype=torch.float64, device=DEVICE))
        W, g = normal(6, 4, seed=0), normal(B, 4, seed=1)
        assert torch.equal(ops.decode(codes, W), torch.zeros_like(g)) and ops.sampled(codes, g, W).shape == (0,)
        assert not torch.stack(pair(codes, codes.values, g, codes.values, g)).any()


def same_selection(codes: Codes, pre: torch.Tensor, k: int) -> None:
    """The codes are the k largest of each row, each column once, and ties go to the first columns."""
    B = pre.shape[0]
    columns = codes.columns.view(B, k).long().sort(dim=1).values
    expected = pre.float().sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    assert torch.equal(columns, expected)
    values = pre.float().gather(1, codes.columns.view(B, k).long()).relu()
    torch.testing.assert_close(codes.values.view(B, k), values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes.row_starts, torch.arange(B + 1, dtype=torch.int32, device=pre.device) * k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "F", "k"), [(3, 1, 1), (4, 50, 50), (5, 200, 7), (2, 1025, 64), (2, 3000, 256)])
def test_select_is_top_k(dtype: torch.dtype, B: int, F: int, k: int) -> None:
    pre = normal(B, F, seed=F, dtype=torch.float32).to(dtype)
    same_selection(ops.top_codes(pre, k), pre, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_select_of_equal_negative_and_infinite_values(dtype: torch.dtype) -> None:
    ties = torch.randint(-2, 3, (6, 77), generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    ties[0], ties[1], ties[2] = 0.0, -1.0, -float("inf")
    ties[3, :40], ties[4, 70:] = float("inf"), -float("inf")
    for k in (1, 5, 76):
        same_selection(ops.top_codes(ties, k), ties, k)
    ties[5, 30], ties[5, 50] = float("nan"), -torch.tensor(float("nan"))
    assert ops.top_codes(ties, 2).values.view(6, 2)[5].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_select_of_tokens_in_turn(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Each is searched from where the one before it ended, however far away that is."""
    monkeypatch.setattr(selection, "PROGRAMS", 2)
    scale = torch.tensor([1.0, 1.1, 0.0, 1e30, -1e30, 1e-30, 1.0, -1.0, float("inf"), 1.0, 0.9])
    pre = ((normal(11, 300, seed=0, dtype=torch.float32).abs() + 1) * scale[:, None]).to(DEVICE, dtype)
    pre[6, 7] = torch.nan
    pre[9, 200:] = -torch.inf
    for k in (1, 20, 299):
        same_selection(ops.top_codes(pre, k), pre, k)


@pytest.mark.parametrize("F", [256, 257, 1000])
def test_select_in_slices(monkeypatch: pytest.MonkeyPatch, F: int) -> None:
    monkeypatch.setattr(selection, "SLICE", 128)
    for pre in (normal(4, F, seed=0, dtype=torch.float32), normal(4, F, seed=0, dtype=torch.float32).round()):
        same_selection(ops.top_codes(pre, 12), pre, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_select_of_a_batch(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The largest of all, each once; among equals those that come first, row by row."""
    monkeypatch.setattr(selection, "COUNTED", 64)
    monkeypatch.setattr(selection, "LOOPS", 3)
    smooth = normal(7, 150, seed=0, dtype=torch.float32)
    rough = torch.randint(-2, 3, (7, 150), generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float32)
    rough[3], rough[4, 70:], rough[5] = float("inf"), -float("inf"), -1e30
    for pre in (smooth.to(dtype), rough.to(dtype), torch.zeros(7, 150, device=DEVICE, dtype=dtype)):
        for n in (1, 35, 700, 1049):
            (codes,) = ops.top_codes_of_batch([pre], n)
            expected = pre.float().flatten().sort(descending=True, stable=True).indices[:n].sort().values
            assert torch.equal(codes.rows() * 150 + codes.columns, expected)
            assert torch.equal(codes.values, pre.float().flatten()[expected].relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("room", [0, 400, 2000])
def test_select_of_all_that_is_positive(dtype: torch.dtype, room: int) -> None:
    pre = normal(7, 150, seed=0, dtype=torch.float32).to(dtype)
    pre[1], pre[2, 70:], pre[3, :9], pre[4] = 0, torch.inf, torch.nan, -1
    codes, n = ops.positive_codes(pre, room)
    expected, n_expected = select.positive_codes(pre, room)
    assert codes.is_padded and int(n) == int(n_expected)
    for name in ("row_starts", "columns", "values"):
        found = getattr(codes, name)
        assert found.dtype == getattr(expected, name).dtype and len(found) == len(getattr(expected, name))
        assert torch.allclose(found, getattr(expected, name), rtol=0, atol=0, equal_nan=True), name


def test_products_of_padded_codes_are_those_of_the_same_codes() -> None:
    pre, W, g = normal(9, 40, seed=0, dtype=torch.float32), normal(40, 37, seed=1), normal(9, 37, seed=2)
    codes, _ = ops.positive_codes(pre, 300)
    same = codes_of(pre.relu())
    n = len(same.values)
    assert torch.equal(ops.decode(codes, W), ops.decode(same, W))
    assert torch.equal(ops.sampled(codes, g, W)[:n], ops.sampled(same, g, W))
    assert torch.equal(ops.fired(codes), ops.fired(same))
    padded = pair(codes, codes.values, g, codes.values, g)
    exact = pair(same, same.values, g, same.values, g)
    assert all(torch.equal(a, b) for a, b in zip(padded, exact, strict=True))


def test_what_the_kernel_cannot_select_goes_to_torch() -> None:
    pre = normal(3, 40, seed=0)
    assert torch.equal(dense_codes(ops.top_codes(pre, 4)), dense_codes(select.top_codes(pre, 4)))
    assert torch.equal(dense_codes(ops.positive_codes(pre, 90)[0]), pre.relu())


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "gated", "relu"])
def test_a_step_equals_autograd(architecture: str) -> None:
    B, F, D = 19, 45, 37
    spec = DictionarySpec(architecture=architecture, n_latents=F, k=5, target_l0=5)  # type: ignore[arg-type]
    x = normal(B, D, seed=9, dtype=torch.float32)
    d = initialise(spec, x, torch.Generator().manual_seed(0))
    dead = torch.arange(F, device=DEVICE) % 4 == 0 if architecture.endswith("topk") else None
    parameters = {name: t.clone().requires_grad_() for name, t in d.tensors().items()}
    expected = training_loss(spec, replace(d, **parameters), x, dead=dead)
    expected.total.backward()
    room = None if spec.activation.selects_fixed_number else B * F
    step = sparse_step(spec, d, x, reading=Reading(room=room), dead=dead, ops=ops)
    gradients = {name: torch.empty_like(t) for name, t in parameters.items() if t.grad is not None and name != "b_dec"}
    step.gradients(slice(0, F), gradients)
    assert torch.allclose(step.loss.total, expected.total.detach(), rtol=1e-5)
    assert torch.equal(step.loss.fired, expected.fired)
    for name, gradient in (gradients | {"b_dec": step.b_dec}).items():
        exact = parameters[name].grad
        assert exact is not None and (gradient - exact).norm() <= 1e-5 * exact.norm(), name


def test_sums_are_the_same_bits_twice() -> None:
    codes = random_codes(40, 9, 0.5, seed=0, dtype=torch.float32)
    g = normal(40, 33, seed=1, dtype=torch.float32)
    first, again = (pair(codes, codes.values, g, codes.values, g)[0] for _ in range(2))
    assert torch.equal(first, again)


COMPILE_ALL = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from saerelay.sae.kernels import triton as ops
from saerelay.sae.kernels.triton import adam as adam_kernels, products, selection
from saerelay.sae.kernels.adam import Adam
from saerelay.sae.kernels.codes import Codes

NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64", torch.int8: "*i8"}
done = set()

def compile_only(kernel, grid, *arguments, num_warps=4, **constants):
    signature = [NAMES[a.dtype] if isinstance(a, torch.Tensor) else "fp32" if isinstance(a, float) else "i32"
                 for a in arguments]
    signature = dict(zip(kernel.arg_names, signature + ["constexpr"] * len(constants)))
    source = ASTSource(kernel, signature, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    done.add(kernel)

modules = (products, selection, adam_kernels)
for module in modules:
    module.launch = compile_only
n, D, F, B = 600, 200, 30, 300
codes = Codes(torch.arange(0, n + 1, 2, dtype=torch.int32), torch.zeros(n, dtype=torch.int32), torch.ones(n), F)
latents = Codes(torch.zeros(F + 1, dtype=torch.int32), codes.columns, codes.values, B)
W, x = torch.ones(F, D).bfloat16(), torch.ones(B, D).bfloat16()
ops.decode(codes, W)
ops.subtract_decoded(x.float(), codes, W)
ops.sampled(codes, x, W)
ops.explain(x.float(), codes, W.float())
ops.fired(codes)
one = torch.ones(())
adam = Adam(one, (0.9, 0.999), one, one, failed=one)
for unit, copy in ((True, None), (False, torch.ones(F, D).bfloat16())):
    ops.adam_rows(adam, (W.float(), W.float(), W.float()), W.float(), 1.0, unit=unit, copy=copy)
ops.decode_pair(latents, codes.values, x, codes.values, x.float(), W.float(), W.float())
ops.top_codes(torch.ones(2, 5000).bfloat16(), 64)
ops.top_codes(torch.ones(2, 12288), 64)
ops.top_codes_of_batch([torch.ones(2, 500).bfloat16()], 20)
ops.top_codes_of_batch([torch.ones(2, 500)], 20)
ops.positive_codes(torch.ones(2, 500), 20)
ops.positive_codes(torch.ones(2, 500).bfloat16(), 20)
kernels = [kernel for module in modules for kernel in vars(module).values() if isinstance(kernel, triton.JITFunction)]
assert done == {kernel for kernel in kernels if kernel.__name__.endswith("_kernel")}
"""


def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    """The compiler is stricter than the interpreter, and needs no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", COMPILE_ALL], check=True, env=environment)


def test_it_is_available_where_it_runs() -> None:
    assert ops.available()
