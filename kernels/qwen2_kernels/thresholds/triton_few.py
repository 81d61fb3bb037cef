"""Top-k and top-p together where few tokens are kept: one read of the logits, then one program a row.

The k largest logits of a row lie in the k tiles of 128 tokens that have the largest maxima, ties aside: the k-th
largest maximum is a number that at least k logits reach. The first launch leaves the tiles' maxima; a row's program of
the second one finds that bound among them, reads the tiles that reach it, 64 at most, into registers, and finds both
cuts there, a bit of a key (`xla`) at a time. Rows that keep more tiles, or have no top-k, are searched as a whole.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from qwen2_kernels.launch import triton_call
from qwen2_kernels.ordered_keys import as_float, largest, ordered
from qwen2_kernels.thresholds.triton_thresholds import top_k_threshold_triton, top_p_threshold_triton

TILE = 128
"""Tokens that have one maximum."""
PROGRAM_TILES = 32
"""Tiles of one program of the first launch."""
MOST_TILES = 64
"""Tiles whose logits the second launch's program holds in registers."""


@triton.jit
def maxima_kernel(
    logits_ptr,
    k_ptr,
    maxima_ptr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    PROGRAM_TILES: tl.constexpr,
):
    """logits [R, SIZE], k [R], maxima [R, TILES]. The grid is (R, TILES / PROGRAM_TILES), rounded up."""
    row, program = tl.program_id(0), tl.program_id(1)
    if tl.load(k_ptr + row) > 0:
        tiles = program * PROGRAM_TILES + tl.arange(0, PROGRAM_TILES)
        columns = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
        cells = logits_ptr + row.to(tl.int64) * SIZE + columns
        logits = tl.load(cells, mask=columns < SIZE, other=float("-inf"))
        tl.store(maxima_ptr + row * TILES + tiles, tl.max(logits, 1), mask=tiles < TILES)


@triton.jit
def few_kernel(
    logits_ptr,
    k_ptr,
    p_ptr,
    scale_ptr,
    floor_ptr,
    maxima_ptr,
    threshold_ptr,
    is_found_ptr,
    places_ptr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    TILES_P: tl.constexpr,
    MOST: tl.constexpr,
):
    """logits [R, SIZE], maxima [R, TILES], places [R, MOST], the rest [R]. The grid is (R,)."""
    row = tl.program_id(0)
    k = tl.load(k_ptr + row)
    count = tl.full((), MOST + 1, tl.int32)
    if k > 0:
        scale, floor = tl.load(scale_ptr + row), tl.load(floor_ptr + row)
        tiles = tl.arange(0, TILES_P)
        inside = tiles < TILES
        maxima = tl.load(maxima_ptr + row * TILES + tiles, mask=inside, other=float("-inf")) * scale
        bounds = ordered(maxima)
        target = k.to(tl.float32)
        least = largest(bounds, inside.to(tl.float32), target)
        # What is minus infinity, or below the floor, is cut already.
        least_floor = tl.maximum(ordered(floor), tl.full((), 0x00800000, tl.uint32))
        is_candidate = inside & (bounds >= tl.maximum(least, least_floor))
        count = tl.sum(is_candidate.to(tl.int32))
        if count <= MOST:
            place = tl.cumsum(is_candidate.to(tl.int32), 0) - 1
            tl.store(places_ptr + row * MOST + place, tiles, mask=is_candidate)
            tl.debug_barrier()  # every warp's places are written before any is read
            few = tl.arange(0, MOST)
            tile = tl.load(places_ptr + row * MOST + few, mask=few < count, other=0)
            columns = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
            is_token = (few < count)[:, None] & (columns < SIZE)
            cells = logits_ptr + row.to(tl.int64) * SIZE + columns
            logits = tl.load(cells, mask=is_token, other=float("-inf")) * scale
            keys = ordered(logits)
            cut = tl.maximum(largest(keys, is_token.to(tl.float32), target), ordered(floor))
            p = tl.load(p_ptr + row)
            if p < 1:
                weights = tl.where(keys >= cut, tl.exp(logits - tl.max(maxima, 0)), 0.0)
                cut = tl.maximum(largest(keys, weights, p * tl.sum(weights)), cut)
            tl.store(threshold_ptr + row, as_float(cut))
    tl.store(is_found_ptr + row, (count <= MOST).to(tl.int32))


def top_k_top_p_threshold_triton(logits: Array, k: Array, p: Array, temperature: Array, floor: Array) -> Array:
    """See `api.top_k_top_p_threshold`."""
    few, is_found = _search_few(logits, k, p, 1 / temperature, floor)
    is_done = (is_found != 0) | ((k < 1) & (p >= 1))
    few = jnp.where(is_found != 0, few, floor)

    def search_all() -> Array:
        left = jnp.maximum(floor, top_k_threshold_triton(logits, jnp.where(is_done, 0, k), temperature, floor))
        left = jnp.maximum(left, top_p_threshold_triton(logits, jnp.where(is_done, 1.0, p), temperature, left))
        return jnp.where(is_done, few, left)

    return jax.lax.cond(jnp.all(is_done), lambda: few, search_all)


def _search_few(logits: Array, k: Array, p: Array, scale: Array, floor: Array) -> tuple[Array, Array]:
    """Return the thresholds, and which of them are found."""
    rows, size = logits.shape
    tiles = -(-size // TILE)
    sizes = dict(SIZE=size, TILES=tiles, TILE=TILE)
    maxima = triton_call(
        logits,
        k,
        kernel=maxima_kernel,
        out_type=jax.ShapeDtypeStruct((rows, tiles), jnp.float32),
        grid=(rows, -(-tiles // PROGRAM_TILES)),
        num_warps=4,
        num_stages=1,
        PROGRAM_TILES=PROGRAM_TILES,
        **sizes,
    )
    kinds = ((rows,), jnp.float32), ((rows,), jnp.int32), ((rows, MOST_TILES), jnp.int32)
    threshold, is_found, _ = triton_call(
        logits,
        k,
        p,
        scale,
        floor,
        maxima,
        kernel=few_kernel,
        out_type=tuple(jax.ShapeDtypeStruct(*kind) for kind in kinds),
        grid=(rows,),
        num_warps=16,
        num_stages=1,
        TILES_P=triton.next_power_of_2(tiles),
        MOST=MOST_TILES,
        **sizes,
    )
    return threshold, is_found
