"""The thresholds in Triton: each launch finds four bits of every row's cut, as a key (`xla`) of 32.

A program reads a chunk of one row and adds up, for each of the 16 values that the four bits can have, what is at least
as large: ones for top-k, weights for top-p. The next launch's programs add up the chunks of their row, see how many of
those sums reach the target, which are the four bits, and go on with the four below. A row's sums are added in an order
that does not depend on how many rows there are.

The sum of the value 0 is what the launch before has found for its own four bits: a chunk that had nothing there is not
read again. The first launch adds everything up, and the second one makes that the target of top-p.
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
    asked_ptr,
    scale_ptr,
    floor_ptr,
    maxima_ptr,
    targets_ptr,
    keys_ptr,
    sums_ptr,
    shift,
    new_targets_ptr,
    new_keys_ptr,
    new_sums_ptr,
    SIZE: tl.constexpr,
    CHUNKS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """logits [R, SIZE], asked, scale, floor, maxima, targets, keys [R] (as int32), sums [R, CHUNKS, 16].

    The grid is (R, CHUNKS). keys have the bits from shift + 8 on, sums decide the four below, which new_keys have too.
    In the first launch, whose shift is 28, there are no sums yet.
    """
    row, chunk = tl.program_id(0), tl.program_id(1)
    asked = tl.load(asked_ptr + row)
    wanted = asked < 1 if HAS_WEIGHTS else asked > 0
    if wanted:
        is_first = shift == 28
        values, chunks = tl.arange(0, 16), tl.arange(0, BLOCK_C)
        cells = sums_ptr + (row * CHUNKS + chunks[:, None]) * 16 + values[None, :]
        sums = tl.sum(tl.load(cells, mask=(chunks < CHUNKS)[:, None] & (shift < 28), other=0.0), axis=0)
        target = tl.load(targets_ptr + row)
        if HAS_WEIGHTS:
            target *= tl.where(shift == 24, tl.sum(tl.where(values == 0, sums, 0.0), axis=0), 1.0)
        reached = (values > 0) & (sums >= target) & (shift < 28)
        found = tl.sum(reached.to(tl.int32), axis=0)
        key = tl.load(keys_ptr + row).to(tl.uint32, bitcast=True)
        key |= found.to(tl.uint32) << tl.minimum(shift + 4, 31).to(tl.uint32)
        if chunk == 0:
            tl.store(new_targets_ptr + row, target)
            tl.store(new_keys_ptr + row, key.to(tl.int32, bitcast=True))
        out_ptr = new_sums_ptr + (row * CHUNKS + chunk) * 16
        left = tl.load(sums_ptr + (row * CHUNKS + chunk) * 16 + found, mask=shift < 28, other=1.0)
        if left == 0:
            tl.store(out_ptr + values, tl.zeros([16], tl.float32))
        else:
            columns = chunk * BLOCK + tl.arange(0, BLOCK)
            inside = columns < SIZE
            logits = tl.load(logits_ptr + row.to(tl.int64) * SIZE + columns, mask=inside, other=0.0)
            logits *= tl.load(scale_ptr + row)
            logits = tl.where(logits < tl.load(floor_ptr + row), float("-inf"), logits)
            bits = logits.to(tl.uint32, bitcast=True)
            keys = bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
            if HAS_WEIGHTS:
                weights = tl.where(inside, tl.exp(logits - tl.load(maxima_ptr + row)), 0.0)
            else:
                weights = inside.to(tl.float32)
            tl.store(out_ptr, tl.where(is_first, tl.sum(weights, axis=0), left))
            for value in tl.static_range(1, 16):  # pyright: ignore[reportGeneralTypeIssues]
                least = key | (tl.full((), value, tl.uint32) << shift.to(tl.uint32))
                tl.store(out_ptr + value, tl.sum(tl.where(keys >= least, weights, 0.0), axis=0))


def top_k_threshold_triton(logits: Array, k: Array, temperature: Array, floor: Array) -> Array:
    """See `api.top_k_threshold`. Counts are float32, which has every integer up to 2^24."""
    # Nothing reads the maxima.
    found = _search(logits, k.astype(jnp.float32), 1 / temperature, floor, floor, has_weights=False)
    return jnp.where(k > 0, found, -jnp.inf)


def top_p_threshold_triton(logits: Array, p: Array, temperature: Array, floor: Array) -> Array:
    """See `api.top_p_threshold`."""
    scale = 1 / temperature
    found = _search(logits, p, scale, floor, logits.max(axis=-1) * scale, has_weights=True)
    return jnp.where(p < 1, found, -jnp.inf)


def _search(logits: Array, asked: Array, scale: Array, floor: Array, maxima: Array, *, has_weights: bool) -> Array:
    rows, size = logits.shape
    chunks = -(-size // BLOCK)
    targets, keys, sums = asked, jnp.zeros(rows, jnp.int32), jnp.zeros((rows, chunks, VALUES))
    results = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (targets, keys, sums))
    for shift in range(TOP, -1, -BITS):
        targets, keys, sums = triton_call(
            logits,
            asked,
            scale,
            floor,
            maxima,
            targets,
            keys,
            sums,
            shift,
            kernel=digit_kernel,
            out_type=results,
            grid=(rows, chunks),
            num_warps=8,
            num_stages=1,
            SIZE=size,
            CHUNKS=chunks,
            HAS_WEIGHTS=has_weights,
            BLOCK=BLOCK,
            BLOCK_C=1 << (chunks - 1).bit_length(),
        )
    reached = sums.sum(axis=1)[:, 1:] >= targets[:, None]
    return as_float(jax.lax.bitcast_convert_type(keys, jnp.uint32) | reached.sum(axis=-1).astype(jnp.uint32))
