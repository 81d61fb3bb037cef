"""Ranks in Triton: a program reads a chunk of a row, and counts there what is larger than each token asked for."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from qwen2_kernels.launch import triton_call

BLOCK = 4096


@triton.jit
def ranks_kernel(
    logits_ptr,
    token_ids_ptr,
    counts_ptr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """logits [R, SIZE], token_ids [R, COLUMNS], counts [R, CHUNKS, COLUMNS]; the grid is (R, CHUNKS).

    Counts behind a row's last token, and of those that are -1, are not written, or mean nothing.
    """
    row, chunk = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, BLOCK_C)
    asked = tl.load(token_ids_ptr + row * COLUMNS + columns, mask=columns < COLUMNS, other=-1)
    stop = tl.max(tl.where(asked >= 0, columns + 1, 0), axis=0)
    if stop > 0:
        line_ptr = logits_ptr + row.to(tl.int64) * SIZE
        places = chunk * BLOCK + tl.arange(0, BLOCK)
        logits = tl.load(line_ptr + places, mask=places < SIZE, other=float("-inf"))
        for column in tl.range(0, stop):
            token = tl.load(token_ids_ptr + row * COLUMNS + column)
            value = tl.load(line_ptr + tl.maximum(token, 0))
            count = tl.sum((logits > value).to(tl.int32), axis=0)
            tl.store(counts_ptr + (row * CHUNKS + chunk) * COLUMNS + column, count)


def token_ranks_triton(logits: Array, token_ids: Array) -> Array:
    """See `api.token_ranks`."""
    rows, size = logits.shape
    columns, chunks = token_ids.shape[1], -(-size // BLOCK)
    counts = triton_call(
        logits,
        token_ids,
        kernel=ranks_kernel,
        out_type=jax.ShapeDtypeStruct((rows, chunks, columns), jnp.int32),
        grid=(rows, chunks),
        num_warps=8,
        num_stages=1,
        SIZE=size,
        COLUMNS=columns,
        CHUNKS=chunks,
        BLOCK=BLOCK,
        BLOCK_C=1 << (columns - 1).bit_length(),
    )
    return jnp.where(token_ids >= 0, counts.sum(axis=1) + 1, 0)
