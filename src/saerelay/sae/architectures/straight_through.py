"""Straight-through gradients of a step and a jump to their threshold (Rajamanoharan et al. 2024, eq. 11 and 12)."""

import torch
from torch import Tensor


class _Step(torch.autograd.Function):
    """1[pre > θ] with a rectangular straight-through window of width `bandwidth` around θ."""

    @staticmethod
    def forward(ctx, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        window = ((pre - threshold).abs() < ctx.bandwidth / 2).to(pre.dtype)
        return None, -(gradients[0] * window).sum(dim=0) / ctx.bandwidth, None


class _Jump(torch.autograd.Function):
    """pre·1[pre > θ], with the gradient to θ as for `_Step`."""

    @staticmethod
    def forward(ctx, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        window = ((pre - threshold).abs() < ctx.bandwidth / 2).to(pre.dtype)
        to_threshold = -(gradients[0] * window).sum(dim=0) * threshold / ctx.bandwidth
        return gradients[0] * (pre > threshold), to_threshold, None


def step(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Heaviside step of pre (B, F) at threshold (F), differentiable to the threshold."""
    return _Step.apply(pre, threshold, bandwidth)  # type: ignore[return-value]


def jump(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """JumpReLU of pre (B, F) at a non-negative threshold (F)."""
    return _Jump.apply(pre, threshold, bandwidth)  # type: ignore[return-value]
