"""The largest logits in Triton: one read of them, and one program a row that puts the few that matter in order.

The K largest of a row lie in K tiles of 128 logits: those whose maximum is above the K-th largest maximum, and the
first of those that have it. The first launch leaves the tiles' maxima, and for each program's tiles their sum of
exponentials; a row's program of the second one finds these tiles, holds them in registers, and takes the largest out
K times.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from qwen2_kernels.launch import triton_call
from qwen2_kernels.ordered_keys import as_float, largest, ordered

TILE = 128
PROGRAM_TILES = 32
"""Tiles of one program of the first launch."""


@triton.jit
def sums_kernel(
    logits_ptr,
    wanted_ptr,
    maxima_ptr,
    sums_ptr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    PROGRAM_TILES: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """logits [R, SIZE], wanted [R], maxima [R, TILES], sums [2, R, PROGRAMS]: largest logits, and sums beside them.

    The grid is (R, PROGRAMS).
    """
    row, program = tl.program_id(0), tl.program_id(1)
    if tl.load(wanted_ptr + row) != 0:
        tiles = program * PROGRAM_TILES + tl.arange(0, PROGRAM_TILES)
        columns = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
        cells = logits_ptr + row.to(tl.int64) * SIZE + columns
        logits = tl.load(cells, mask=columns < SIZE, other=float("-inf"))
        maxima = tl.max(logits, 1)
        top = tl.max(maxima, 0)
        weights = tl.where(logits > float("-inf"), tl.exp(logits - top), 0.0)
        tl.store(maxima_ptr + row * TILES + tiles, maxima, mask=tiles < TILES)
        cell = sums_ptr + row * PROGRAMS + program
        tl.store(cell, top)
        tl.store(cell + tl.num_programs(0) * PROGRAMS, tl.sum(weights))


@triton.jit
def top_kernel(
    logits_ptr,
    wanted_ptr,
    maxima_ptr,
    sums_ptr,
    values_ptr,
    columns_ptr,
    log_sum_ptr,
    places_ptr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TILES_P: tl.constexpr,
    PROGRAMS_P: tl.constexpr,
    COUNT: tl.constexpr,
    COUNT_P: tl.constexpr,
):
    """logits, wanted, maxima and sums as above; values, columns, places [R, COUNT], log_sum [R]. The grid is (R,)."""
    row = tl.program_id(0)
    few = tl.arange(0, COUNT_P)
    if tl.load(wanted_ptr + row) == 0:
        tl.store(values_ptr + row * COUNT + few, tl.zeros([COUNT_P], tl.float32), mask=few < COUNT)
        tl.store(columns_ptr + row * COUNT + few, tl.zeros([COUNT_P], tl.int32), mask=few < COUNT)
        tl.store(log_sum_ptr + row, 0.0)
    else:
        tiles = tl.arange(0, TILES_P)
        inside = tiles < TILES
        bounds = ordered(tl.load(maxima_ptr + row * TILES + tiles, mask=inside, other=float("-inf")))
        least = largest(bounds, inside.to(tl.float32), COUNT * 1.0)
        is_above = inside & (bounds > least)
        is_tied = inside & (bounds == least)
        left = COUNT - tl.sum(is_above.to(tl.int32))
        is_taken = is_above | (is_tied & (tl.cumsum(is_tied.to(tl.int32), 0) <= left))
        taken = tl.sum(is_taken.to(tl.int32))
        tl.store(places_ptr + row * COUNT + tl.cumsum(is_taken.to(tl.int32), 0) - 1, tiles, mask=is_taken)
        tl.debug_barrier()  # every warp's places are written before any is read
        tile = tl.load(places_ptr + row * COUNT + few, mask=few < taken, other=0)
        columns = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
        is_logit = (few < taken)[:, None] & (columns < SIZE)
        logits = tl.load(logits_ptr + row.to(tl.int64) * SIZE + columns, mask=is_logit, other=0.0)
        # Of equal logits the first column is the largest. No logit is 0.
        keys = (ordered(logits).to(tl.uint64) << 32) | (0x7FFFFFFF - columns).to(tl.uint64)
        keys = tl.where(is_logit, keys, 0)
        for place in range(COUNT):
            best = tl.max(tl.max(keys, 1), 0)
            tl.store(values_ptr + row * COUNT + place, as_float((best >> 32).to(tl.uint32)))
            tl.store(columns_ptr + row * COUNT + place, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32))
            keys = tl.where(keys == best, 0, keys)
        programs = tl.arange(0, PROGRAMS_P)
        cells = sums_ptr + row * PROGRAMS + programs
        tops = tl.load(cells, mask=programs < PROGRAMS, other=float("-inf"))
        sums = tl.load(cells + tl.num_programs(0) * PROGRAMS, mask=programs < PROGRAMS, other=0.0)
        scales = tl.where(tops > float("-inf"), tl.exp(tops - tl.max(tops, 0)), 0.0)
        tl.store(log_sum_ptr + row, tl.log(tl.sum(sums * scales, 0)))


def top_logits_triton(logits: Array, is_wanted: Array, count: int) -> tuple[Array, ...]:
    """See `api.top_logits`."""
    rows, size = logits.shape
    tiles = -(-size // TILE)
    programs = -(-tiles // PROGRAM_TILES)
    wanted = is_wanted.astype(jnp.int32)
    sizes = dict(SIZE=size, TILES=tiles, TILE=TILE, PROGRAMS=programs)
    maxima, sums = triton_call(
        logits,
        wanted,
        kernel=sums_kernel,
        out_type=(
            jax.ShapeDtypeStruct((rows, tiles), jnp.float32),
            jax.ShapeDtypeStruct((2, rows, programs), jnp.float32),
        ),
        grid=(rows, programs),
        num_warps=4,
        num_stages=1,
        PROGRAM_TILES=PROGRAM_TILES,
        **sizes,
    )
    kinds = ((rows, count), jnp.float32), ((rows, count), jnp.int32), ((rows,), jnp.float32), ((rows, count), jnp.int32)
    return triton_call(
        logits,
        wanted,
        maxima,
        sums,
        kernel=top_kernel,
        out_type=tuple(jax.ShapeDtypeStruct(*kind) for kind in kinds),
        grid=(rows,),
        num_warps=8,
        num_stages=1,
        TILES_P=triton.next_power_of_2(tiles),
        PROGRAMS_P=triton.next_power_of_2(programs),
        COUNT=count,
        COUNT_P=max(triton.next_power_of_2(count), 2),
        **sizes,
    )[:3]
