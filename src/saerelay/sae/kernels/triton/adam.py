"""Adam on the rows of a matrix, in one pass over memory; each program updates one row."""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import math

from torch import Tensor

from saerelay.sae.kernels import reference
from saerelay.sae.kernels.adam import EPS, Adam, Triple
from saerelay.sae.kernels.triton.launching import jit, launch, power_of_two, tl, warps_for

WIDEST = 8192
"""The most columns of a row that are kept in registers."""


@jit
def _one_minus_exp(x):
    """Return 1 − eˣ for x ≤ 0, accurate also where the result is tiny."""
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5))))
    return tl.where(x > -0.1, series, 1 - tl.exp(x))


@jit
def _adam_kernel(
    parameter, mean, square, gradient, copy, rate, n_steps, shrink, failed, D, rate_share,
    beta1, complement1, log_beta1, beta2, complement2, log_beta2, eps,
    UNIT: tl.constexpr, SHRINK: tl.constexpr, COPY: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if tl.load(failed) == 0:
        d = tl.arange(0, BLOCK_D)
        at = tl.program_id(0).to(tl.int64) * D + d
        g = tl.load(gradient + at, mask=d < D, other=0.0)
        if SHRINK:
            g /= tl.load(shrink)
        m = beta1 * tl.load(mean + at, mask=d < D, other=0.0) + complement1 * g
        v = beta2 * tl.load(square + at, mask=d < D, other=0.0) + complement2 * g * g
        n = tl.load(n_steps)
        unbiased_m = m / _one_minus_exp(n * log_beta1)
        unbiased_v = v / _one_minus_exp(n * log_beta2)
        p = tl.load(parameter + at, mask=d < D, other=0.0)
        p -= rate_share * tl.load(rate) * unbiased_m / (tl.sqrt(unbiased_v) + eps)
        if UNIT:
            norm = tl.sqrt(tl.sum(p * p, axis=0))
            p /= tl.where(norm > 0, norm, 1.0)
        tl.store(parameter + at, p, mask=d < D)
        tl.store(mean + at, m, mask=d < D)
        tl.store(square + at, v, mask=d < D)
        if COPY:
            tl.store(copy + at, p, mask=d < D)


def adam_rows(
    adam: Adam, triple: Triple, gradient: Tensor, rate_share: float, *, unit: bool, copy: Tensor | None
) -> None:
    """Update the rows of a matrix (F, D) at a share of the rate, normalise them if `unit`, and update their copy."""
    F, D = triple[0].shape
    tensors = (*triple, gradient) if copy is None else (*triple, gradient, copy)
    is_plain = isinstance(adam.lr, Tensor) and adam.failed is not None and all(t.is_contiguous() for t in tensors)
    if not is_plain or D > WIDEST:
        reference.adam_rows(adam, triple, gradient, rate_share, unit=unit, copy=copy)
        return
    unread = adam.lr  # a placeholder for pointers that the kernel does not read
    arguments = (*triple, gradient, unread if copy is None else copy)
    arguments += (adam.lr, adam.n_steps, unread if adam.shrink is None else adam.shrink, adam.failed, D, rate_share)
    for beta in adam.betas:
        arguments += (beta, 1 - beta, math.log(max(beta, 1e-30)))
    marks = {"UNIT": unit, "SHRINK": adam.shrink is not None, "COPY": copy is not None}
    block = max(16, power_of_two(D))
    launch(_adam_kernel, (F,), *arguments, EPS, **marks, BLOCK_D=block, num_warps=warps_for(block))
