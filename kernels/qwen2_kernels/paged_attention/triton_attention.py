"""`paged_attention` through Triton: which kernel attends for which row, and with which tiles."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from qwen2_kernels.paged_attention.triton_decode import DecodeConfig, decode_attention
from qwen2_kernels.paged_attention.triton_ragged import RaggedConfig, ragged_attention
from qwen2_kernels.tuning import tuned

PROGRAMS = 400
"""How many programs fill a GPU: three for each of an H100's multiprocessors."""
LONGEST_CHUNK = 8192
"""Tokens that one program reads at most, so that one long row does not hold up a large batch."""


def paged_attention_triton(
    q: Array,
    k_pool: Array,
    v_pool: Array,
    block_tables: Array,
    context_lens: Array,
    query_start_loc: Array | None,
    *,
    scale: float,
    window: int | None,
    causal: bool,
    k_scale: float,
    v_scale: float,
) -> Array:
    """See `api.paged_attention`. Rows with one query split their context over programs, whatever the step.

    Raises:
        NotImplementedError: a head dim that is not a power of two of at least 16.
    """
    head_dim = q.shape[-1]
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise NotImplementedError(f"paged_attention: triton needs a head dim of 16, 32, 64, ..., not {head_dim}")
    options: dict[str, Any] = {"scale": scale, "window": window, "k_scale": k_scale, "v_scale": v_scale}
    arguments = (k_pool, v_pool, block_tables, context_lens)
    decode = decode_config(q, k_pool, block_tables)
    if query_start_loc is None:
        return decode_attention(q, *arguments, None, None, **options, config=decode)
    out = ragged_attention(
        q, *arguments, query_start_loc, **options, causal=causal, skip_single=True, config=ragged_config(q, k_pool)
    )
    return decode_attention(q, *arguments, query_start_loc, out, **options, config=decode)


def decode_config(q: Array, k_pool: Array, block_tables: Array) -> DecodeConfig:
    """Return the tiles for a step's rows with one query."""
    rows, blocks = block_tables.shape
    kv_heads, group, head_dim = q.shape[1:]
    pairs, longest = rows * kv_heads, blocks * k_pool.shape[1]
    wanted = max(PROGRAMS // pairs if pairs < PROGRAMS // 2 else 1, -(-longest // LONGEST_CHUNK))
    splits = min(wanted, 64, -(-longest // 128))
    many = pairs >= PROGRAMS // 2
    bits = jnp.finfo(k_pool.dtype).bits
    if bits == 8:
        chunk = 1024 if many else 256 if pairs > 16 else 128
        block_n = 64 if head_dim > 64 and chunk == 256 else 32
        default = DecodeConfig(block_n=block_n, num_warps=2, num_stages=6, num_splits=splits, min_chunk=chunk)
    else:
        is_wide = pairs <= 8 if head_dim > 64 else pairs > 32
        block_n, num_stages = (128, 2) if is_wide else (64, 3)
        chunk = 1024 if many else 128 if is_wide or pairs > 32 else 64
        block_n = block_n * 16 // bits  # as many bytes in float32
        default = DecodeConfig(block_n=block_n, num_warps=4, num_stages=num_stages, num_splits=splits, min_chunk=chunk)
    return tuned("paged_attention_decode", f"{k_pool.dtype.name}-{head_dim}-{group}-{pairs}", DecodeConfig, default)


def ragged_config(q: Array, k_pool: Array) -> RaggedConfig:
    """Return the tiles for a step's other rows."""
    group, head_dim = q.shape[2:]
    is_wide = jnp.finfo(q.dtype).bits == 32
    default = RaggedConfig(
        block_m=64 if is_wide else 128, block_n=32 if is_wide else 64, num_warps=4 if is_wide else 8, num_stages=3
    )
    return tuned("paged_attention_ragged", f"{k_pool.dtype.name}-{head_dim}-{group}", RaggedConfig, default)
