"""Sparse products, selection and Adam on NVIDIA GPUs, in Triton, with the names and shapes of `reference`.

Sums and results are float32 (float64 if the codes are); `W`, `x` and `g` may be bfloat16. There are no floating-point
atomics, so the same inputs give the same bits. Nothing here waits for the GPU. Block sizes are fixed rather than tuned,
since another block size would be another order of summation. Each thread loads 16 bytes at once.
"""

from saerelay.sae.kernels.select import codes_at_least, nonzero_codes
from saerelay.sae.kernels.triton.adam import adam_rows
from saerelay.sae.kernels.triton.launching import available
from saerelay.sae.kernels.triton.products import decode, decode_pair, explain, fired, sampled, subtract_decoded
from saerelay.sae.kernels.triton.selection import positive_codes, top_codes, top_codes_of_batch

__all__ = [
    "adam_rows",
    "available",
    "codes_at_least",
    "decode",
    "decode_pair",
    "explain",
    "fired",
    "nonzero_codes",
    "positive_codes",
    "sampled",
    "subtract_decoded",
    "top_codes",
    "top_codes_of_batch",
]
