"""The Gumbel-max trick in Triton: a program looks at a chunk of a row, and draws the noise of what may win there.

Noise is counted, not carried on: that of column v of a row is Threefry-2x32 (Salmon et al. 2011, 20 rounds) of v, as
`jax.random` counts it, so that chunks draw theirs on their own, and a chunk that the threshold cuts whole draws none.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from qwen2_kernels.launch import triton_call

BLOCK = 1024


@triton.jit
def _rounds(x, y, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Four of Threefry's rounds, which rotate by A, B, C and D bits."""
    x += y
    y = x ^ ((y << A) | (y >> (32 - A)))
    x += y
    y = x ^ ((y << B) | (y >> (32 - B)))
    x += y
    y = x ^ ((y << C) | (y >> (32 - C)))
    x += y
    y = x ^ ((y << D) | (y >> (32 - D)))
    return x, y


@triton.jit
def threefry(key_x, key_y, x, y):
    """Threefry-2x32 of the counter (x, y), all uint32."""
    key_z = key_x ^ key_y ^ 0x1BD11BDA
    x, y = _rounds(x + key_x, y + key_y, 13, 15, 26, 6)  # pyright: ignore[reportGeneralTypeIssues]
    x, y = _rounds(x + key_y, y + key_z + 1, 17, 29, 16, 24)
    x, y = _rounds(x + key_z, y + key_x + 2, 13, 15, 26, 6)
    x, y = _rounds(x + key_x, y + key_y + 3, 17, 29, 16, 24)
    x, y = _rounds(x + key_y, y + key_z + 4, 13, 15, 26, 6)
    return x + key_z, y + key_x + 5


@triton.jit
def gumbel_kernel(
    logits_ptr,
    scale_ptr,
    threshold_ptr,
    seeds_high_ptr,
    seeds_low_ptr,
    indices_ptr,
    best_ptr,
    places_ptr,
    SIZE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """logits [R, SIZE], scale [R] (0: greedy), the others [R], best and places [R, CHUNKS]; grid (R, CHUNKS)."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    columns = chunk * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits_ptr + row.to(tl.int64) * SIZE + columns, mask=columns < SIZE, other=float("-inf"))
    scale = tl.load(scale_ptr + row)
    values *= tl.where(scale == 0, 1.0, scale)
    values = tl.where(values < tl.load(threshold_ptr + row), float("-inf"), values)
    if (scale != 0) & (tl.max(values, axis=0) > float("-inf")):
        seed_high = tl.load(seeds_high_ptr + row).to(tl.uint32, bitcast=True)
        seed_low = tl.load(seeds_low_ptr + row).to(tl.uint32, bitcast=True)
        index = tl.load(indices_ptr + row).to(tl.uint32, bitcast=True)
        key_x, key_y = threefry(seed_high, seed_low, 0, index)
        counts = columns.to(tl.uint32, bitcast=True)
        x, y = threefry(key_x, key_y, 0, counts)
        # 23 random bits behind the 1 of a number in [1, 2); the smallest normal number stands for 0.
        uniform = (((x ^ y) >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
        values -= tl.log(-tl.log(tl.maximum(uniform, 1.1754943508222875e-38)))
    values = tl.where(values == values, values, float("inf"))
    best, place = tl.max(values, axis=0, return_indices=True)
    tl.store(best_ptr + row * CHUNKS + chunk, best)
    tl.store(places_ptr + row * CHUNKS + chunk, chunk * BLOCK + place)


def gumbel_argmax_triton(
    logits: Array, temperature: Array, threshold: Array, seeds_high: Array, seeds_low: Array, indices: Array
) -> Array:
    """See `api.gumbel_argmax`."""
    rows, size = logits.shape
    chunks = -(-size // BLOCK)
    # XLA divides, as it does for what thresholds are made of: the least that is kept must be exactly its threshold.
    scale = jnp.where(temperature == 0, 0.0, 1 / temperature)
    best, places = triton_call(
        logits,
        scale,
        threshold,
        seeds_high,
        seeds_low,
        indices,
        kernel=gumbel_kernel,
        out_type=tuple(jax.ShapeDtypeStruct((rows, chunks), dtype) for dtype in (jnp.float32, jnp.int32)),
        grid=(rows, chunks),
        num_warps=4,
        num_stages=1,
        SIZE=size,
        CHUNKS=chunks,
        BLOCK=BLOCK,
    )
    return jnp.take_along_axis(places, jnp.argmax(best, axis=-1)[:, None], axis=-1)[:, 0]
