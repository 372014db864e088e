"""Compilation and launch of Triton kernels; importable where Triton is not installed."""

from typing import Any

import torch
from torch import Tensor

try:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]
except ImportError:  # `available` tells
    triton: Any = None
    tl: Any = None

jit: Any = triton.jit if triton else lambda function: function


def available() -> bool:
    """Whether Triton is installed and has a GPU, or its interpreter, to run on."""
    return triton is not None and (torch.cuda.is_available() or triton.knobs.runtime.interpret)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the GPU of its first tensor; an empty grid launches nothing."""
    if all(grid):
        tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
        with torch.cuda.device_of(tensor):
            kernel[grid](*arguments, **constants)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n.

    >>> power_of_two(768), power_of_two(1)
    (1024, 1)
    """
    return 1 << max(n - 1, 0).bit_length()


def warps_for(block: int) -> int:
    """Return how many warps share a row of `block` numbers: eight numbers per thread, up to eight warps."""
    return min(8, max(1, block // 256))
