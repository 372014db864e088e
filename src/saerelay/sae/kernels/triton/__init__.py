"""Sparse products, selection and Adam on NVIDIA GPUs, in Triton: same names and shapes as `reference`.

Sums run in float32 (float64 if the codes are), results have that type, and `W`, `x` and `g` may be bfloat16. No
floating-point atomics: the same inputs give the same bits. Nothing here waits for the GPU. Block sizes are fixed
rather than tuned, since another block size is another order of summation: a warp reads 16 bytes per lane.
"""

from saerelay.sae.kernels.select import codes_at_least, nonzero_codes
from saerelay.sae.kernels.triton.adam import adam_rows
from saerelay.sae.kernels.triton.launching import available
from saerelay.sae.kernels.triton.products import decode, decode_pair, explain, fired, sampled, subtract_decoded
from saerelay.sae.kernels.triton.selection import top_codes, top_codes_of_batch

__all__ = [
    "adam_rows",
    "available",
    "codes_at_least",
    "decode",
    "decode_pair",
    "explain",
    "fired",
    "nonzero_codes",
    "sampled",
    "subtract_decoded",
    "top_codes",
    "top_codes_of_batch",
]
