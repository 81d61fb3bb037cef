"""`paged_attention` for rows with one query: split-KV Triton kernels.

A program reads one chunk of one row's context for one KV head, whose G query heads share a tile; with more than one
chunk a second kernel combines them by their log-sum-exps (Flash-Decoding, Dao et al. 2023).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from qwen2_kernels.launch import triton_call

LOG2E = 1.4426950408889634


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Tile sizes and how a row's context is split."""

    block_n: int
    """Tokens that one iteration reads."""
    num_warps: int
    num_stages: int
    num_splits: int
    """Programs per row and KV head; those that a short row does not need exit at once."""
    min_chunk: int
    """Tokens of a split at least."""


@triton.jit
def _span(context, WINDOW: tl.constexpr, SPLITS: tl.constexpr, MIN_CHUNK: tl.constexpr, BN: tl.constexpr):
    """Return the first visible token of a row and the tokens per split."""
    first = 0
    if WINDOW is not None:
        first = tl.maximum(context - WINDOW, 0)
    chunk = context if SPLITS == 1 else tl.maximum(tl.cdiv(tl.cdiv(context - first, SPLITS), BN) * BN, MIN_CHUNK)
    return first, chunk


@triton.jit
def _row(row, context_lens_ptr, starts_ptr, RAGGED: tl.constexpr):
    """Return the row's context, 0 if it is not one of this kernel's, and the index of its query on T."""
    context = tl.load(context_lens_ptr + row)
    if RAGGED:
        token = tl.load(starts_ptr + row)
        is_single = tl.load(starts_ptr + row + 1) - token == 1
        context = tl.where(is_single, context, 0)
    else:
        token = row
        is_single = row >= 0
    return context, token, is_single


@triton.jit
def _decode_kernel(
    q_ptr,
    k_pool_ptr,
    v_pool_ptr,
    block_tables_ptr,
    context_lens_ptr,
    starts_ptr,
    out_ptr,
    lse_ptr,
    logit_scale: tl.constexpr,
    v_scale: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    B: tl.constexpr,
    M: tl.constexpr,
    GP: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    RAGGED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Grid (K, splits, R). `out` is [T, K, G, H], or partial results float32 [R, K, SPLITS, G, H] with their lse."""
    kv_head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context, token, is_single = _row(row, context_lens_ptr, starts_ptr, RAGGED)  # pyright: ignore
    first, chunk = _span(context, WINDOW, SPLITS, MIN_CHUNK, BN)
    start = first + split * chunk
    stop = tl.minimum(start + chunk, context)

    head = tl.arange(0, GP)
    lane = tl.arange(0, H)
    is_head = head < G
    active = is_single if SPLITS == 1 else start < stop
    if active:
        query = (token.to(tl.int64) * K + kv_head) * G * H + head[:, None] * H + lane[None, :]
        q = tl.load(q_ptr + query, mask=is_head[:, None], other=0.0).to(COMPUTE)
        top = tl.full([GP], float("-inf"), tl.float32)
        total = tl.full([GP], 0.0, tl.float32)
        acc = tl.full([GP, H], 0.0, tl.float32)
        table = block_tables_ptr + row * M
        for base in tl.range(start, stop, BN):
            position = base + tl.arange(0, BN)
            seen = position < stop
            block = tl.load(table + position // B, mask=seen, other=0).to(tl.int64)
            offset = ((block * B + position % B) * K + kv_head) * H
            offset = tl.multiple_of(offset, 16)
            k = tl.load(k_pool_ptr + offset[None, :] + lane[:, None], mask=seen[None, :], other=0.0)
            v = tl.load(v_pool_ptr + offset[:, None] + lane[None, :], mask=seen[:, None], other=0.0)
            logits = tl.dot(q, k.to(COMPUTE), input_precision="ieee") * logit_scale
            logits = tl.where(seen[None, :], logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, 1))
            weights = tl.exp2(logits - new_top[:, None])
            decay = tl.exp2(top - new_top)
            total = total * decay + tl.sum(weights, 1)
            acc = tl.dot(weights.to(COMPUTE), v.to(COMPUTE), acc * decay[:, None], input_precision="ieee")
            top = new_top
        acc = acc * (v_scale / tl.where(total > 0, total, 1.0))[:, None]
        if SPLITS == 1:
            tl.store(out_ptr + query, acc.to(out_ptr.dtype.element_ty), mask=is_head[:, None])
        else:
            part = ((row * K + kv_head) * SPLITS + split).to(tl.int64) * G
            tl.store(out_ptr + (part + head)[:, None] * H + lane[None, :], acc, mask=is_head[:, None])
            tl.store(lse_ptr + part + head, top + tl.log2(total), mask=is_head)


@triton.jit
def _combine_kernel(
    partial_ptr,
    lse_ptr,
    context_lens_ptr,
    starts_ptr,
    out_ptr,
    K: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_P: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Grid (K * G, R): the weighted sum of a head's partial results."""
    head, row = tl.program_id(0), tl.program_id(1)
    context, token, is_single = _row(row, context_lens_ptr, starts_ptr, RAGGED)  # pyright: ignore
    first, chunk = _span(context, WINDOW, SPLITS, MIN_CHUNK, BN)
    lane = tl.arange(0, H)
    if is_single:
        used = tl.cdiv(context - first, chunk)
        split = tl.arange(0, SPLITS_P)
        present = split < used
        part = ((row * K + head // G) * SPLITS + split).to(tl.int64) * G + head % G
        lse = tl.load(lse_ptr + part, mask=present, other=float("-inf"))
        top = tl.max(lse, 0)
        weights = tl.where(present, tl.exp2(lse - top), 0.0)
        weights = weights / tl.maximum(tl.sum(weights, 0), 1e-30)
        partial = tl.load(partial_ptr + part[:, None] * H + lane[None, :], mask=present[:, None], other=0.0)
        out = tl.sum(partial * weights[:, None], 0)
        tl.store(out_ptr + (token.to(tl.int64) * K * G + head) * H + lane, out.to(out_ptr.dtype.element_ty))


def decode_attention(
    q: Array,
    k_pool: Array,
    v_pool: Array,
    block_tables: Array,
    context_lens: Array,
    query_start_loc: Array | None,
    out: Array | None,
    *,
    scale: float,
    window: int | None,
    k_scale: float,
    v_scale: float,
    config: DecodeConfig,
) -> Array:
    """Attend for the rows that have one query.

    With `query_start_loc`, `out` [T, K, G, H] is updated in place at those rows' queries; without, T = R and every row
    has one. A split's chunk is at least `min_chunk` tokens, so that a short row is not cut into pieces.
    """
    rows, blocks = block_tables.shape
    kv_heads, group, head_dim = q.shape[1:]
    ragged = query_start_loc is not None
    starts = query_start_loc if ragged else context_lens
    splits = config.num_splits
    compute = compute_type(q.dtype, k_pool.dtype)
    shared: dict[str, Any] = dict(
        K=kv_heads, G=group, H=head_dim, BN=config.block_n, SPLITS=splits, MIN_CHUNK=config.min_chunk
    )
    shared |= dict(WINDOW=window, RAGGED=ragged)
    kernel_options: dict[str, Any] = dict(
        kernel=_decode_kernel,
        grid=(kv_heads, splits, rows),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        logit_scale=scale * k_scale * LOG2E,
        v_scale=v_scale,
        B=k_pool.shape[1],
        M=blocks,
        GP=max(16, triton.next_power_of_2(group)),
        COMPUTE=compute,
    )
    inputs = (q, k_pool, v_pool, block_tables, context_lens, starts)
    lse_shape = jax.ShapeDtypeStruct((rows, kv_heads, splits, group), jnp.float32)
    out_shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    if splits == 1:
        if out is None:
            return triton_call(*inputs, out_type=(out_shape, lse_shape), **kernel_options, **shared)[0]
        ref = jax.new_ref(out)
        triton_call(*inputs, ref, out_type=lse_shape, **kernel_options, **shared)
        return jax.freeze(ref)
    partial_shape = jax.ShapeDtypeStruct((*lse_shape.shape, head_dim), jnp.float32)
    partial, lse = triton_call(*inputs, out_type=(partial_shape, lse_shape), **kernel_options, **shared)
    combine_options: dict[str, Any] = dict(
        kernel=_combine_kernel,
        grid=(kv_heads * group, rows),
        num_warps=1 if splits <= 8 else 4,
        num_stages=1,
        SPLITS_P=triton.next_power_of_2(splits),
    )
    if out is None:
        return triton_call(partial, lse, context_lens, starts, out_type=out_shape, **combine_options, **shared)
    ref = jax.new_ref(out)
    triton_call(partial, lse, context_lens, starts, ref, **combine_options, **shared)
    return jax.freeze(ref)


def compute_type(query_dtype: jnp.dtype, pool_dtype: jnp.dtype) -> tl.dtype:
    """What the tensor cores multiply: 8-bit pools are read as float16, whose conversion is one instruction."""
    if jnp.finfo(pool_dtype).bits == 8:
        return tl.float16 if jnp.finfo(query_dtype).bits == 16 else tl.float32
    return {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}[jnp.dtype(query_dtype).name]
