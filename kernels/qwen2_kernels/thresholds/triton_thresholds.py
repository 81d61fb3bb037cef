"""The thresholds in Triton: each launch finds four bits of every row's cut, as a key (`xla`) of 32.

A program reads a chunk of one row and adds up, for each of the 15 values that the four bits can have besides 0, what
is at least as large: ones for top-k, weights for top-p. The next launch's programs add up the chunks of their row, see
how many of those sums reach the target, which are the four bits, and go on with the four below. A row's sums are added
in an order that does not depend on how many rows there are.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from qwen2_kernels.launch import triton_call
from qwen2_kernels.thresholds.xla import as_float

BLOCK = 4096
BITS, VALUES = 4, 16
TOP = 32 - BITS
"""The shift of the first launch."""


@triton.jit
def digit_kernel(
    logits_ptr,
    maxima_ptr,
    targets_ptr,
    keys_ptr,
    sums_ptr,
    size,
    shift,
    new_keys_ptr,
    new_sums_ptr,
    CHUNKS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """logits [R, size], maxima, targets, keys [R] (as int32), sums [R, CHUNKS, 16], whose first is not used.

    The grid is (R, CHUNKS). keys have the bits from shift + 8 on, sums decide the four below, which new_keys have too.
    """
    row, chunk = tl.program_id(0), tl.program_id(1)
    target = tl.load(targets_ptr + row)
    values, chunks = tl.arange(0, 16), tl.arange(0, BLOCK_C)
    cells = (row * CHUNKS + chunks[:, None]) * 16 + values[None, :]
    sums = tl.sum(tl.load(sums_ptr + cells, mask=(chunks < CHUNKS)[:, None] & (values > 0)[None, :], other=0.0), axis=0)
    reached = (values > 0) & (sums >= target) & (shift < 28)
    found = tl.sum(reached.to(tl.int32), axis=0).to(tl.uint32)
    key = tl.load(keys_ptr + row).to(tl.uint32, bitcast=True) | (found << tl.minimum(shift + 4, 31).to(tl.uint32))
    if chunk == 0:
        tl.store(new_keys_ptr + row, key.to(tl.int32, bitcast=True))
    columns = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    logits = tl.load(logits_ptr + row.to(tl.int64) * size + columns, mask=inside, other=0.0)
    bits = logits.to(tl.uint32, bitcast=True)
    keys = bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
    if HAS_WEIGHTS:
        weights = tl.where(inside, tl.exp(logits - tl.load(maxima_ptr + row)), 0.0)
    else:
        weights = inside.to(tl.float32)
    out_ptr = new_sums_ptr + (row * CHUNKS + chunk) * 16
    for value in tl.static_range(1, 16):  # pyright: ignore[reportGeneralTypeIssues]
        least = key | (tl.full((), value, tl.uint32) << shift.to(tl.uint32))
        tl.store(out_ptr + value, tl.sum(tl.where(keys >= least, weights, 0.0), axis=0))


def top_k_threshold_triton(logits: Array, k: Array) -> Array:
    """See `api.top_k_threshold`. Counts are float32, which has every integer up to 2^24."""
    targets = k.astype(jnp.float32)
    return _search(logits, targets, targets, has_weights=False)


def top_p_threshold_triton(logits: Array, p: Array) -> Array:
    """See `api.top_p_threshold`."""
    maxima = logits.max(axis=-1)
    targets = p * jnp.exp(logits - maxima[:, None]).sum(axis=-1)
    return _search(logits, maxima, targets, has_weights=True)


def _search(logits: Array, maxima: Array, targets: Array, *, has_weights: bool) -> Array:
    rows, size = logits.shape
    chunks = -(-size // BLOCK)
    keys, sums = jnp.zeros(rows, jnp.int32), jnp.zeros((rows, chunks, VALUES))
    results = jax.ShapeDtypeStruct(keys.shape, keys.dtype), jax.ShapeDtypeStruct(sums.shape, sums.dtype)
    for shift in range(TOP, -1, -BITS):
        keys, sums = triton_call(
            logits,
            maxima,
            targets,
            keys,
            sums,
            size,
            shift,
            kernel=digit_kernel,
            out_type=results,
            grid=(rows, chunks),
            num_warps=8,
            num_stages=1,
            CHUNKS=chunks,
            HAS_WEIGHTS=has_weights,
            BLOCK=BLOCK,
            BLOCK_C=1 << (chunks - 1).bit_length(),
        )
    reached = sums.sum(axis=1)[:, 1:] >= targets[:, None]
    return as_float(jax.lax.bitcast_convert_type(keys, jnp.uint32) | reached.sum(axis=-1).astype(jnp.uint32))
