"""`paged_attention` for rows with one query: split-KV Triton kernels.

A program reads one chunk of one row's context for one KV head, whose G query heads share a tile. With more than one
chunk the last program to arrive combines them by their log-sum-exps (Flash-Decoding, Dao et al. 2023), in a fixed
order: a counter per row and KV head, zero before and after the launch, tells which one is the last.
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
COMBINED_PARTS = 8
"""Partial results that are read at a time: what one program can hold."""


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
def _combine(
    partial_ptr,
    lse_ptr,
    first_part,
    used,
    head,
    lane,
    G: tl.constexpr,
    H: tl.constexpr,
    SPLITS_P: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Return the weighted sum of `used` partial results, [GP, H]. Other programs wrote them: the L1 cache is passed."""
    is_head = head < G
    split = tl.arange(0, SPLITS_P)
    present = (split < used)[:, None] & is_head[None, :]
    every = (first_part + split)[:, None] * G + head[None, :]
    lse = tl.load(lse_ptr + every, mask=present, other=float("-inf"), cache_modifier=".cg")
    top = tl.where(is_head, tl.max(lse, 0), 0.0)
    total = tl.sum(tl.exp2(lse - top[None, :]), 0)
    out = tl.zeros([head.shape[0], lane.shape[0]], tl.float32)
    for base in tl.range(0, used, PARTS):
        few = base + tl.arange(0, PARTS)
        is_part = (few < used)[:, None] & is_head[None, :]
        part = (first_part + few)[:, None] * G + head[None, :]
        weights = tl.load(lse_ptr + part, mask=is_part, other=float("-inf"), cache_modifier=".cg")
        weights = tl.exp2(weights - top[None, :])
        cells = partial_ptr + part[:, :, None] * H + lane[None, None, :]
        values = tl.load(cells, mask=is_part[:, :, None], other=0.0, cache_modifier=".cg")
        out += tl.sum(values * weights[:, :, None], 0)
    return out / tl.where(is_head, total, 1.0)[:, None]


@triton.jit
def _decode_kernel(
    q_ptr,
    k_pool_ptr,
    v_pool_ptr,
    block_tables_ptr,
    context_lens_ptr,
    starts_ptr,
    counters_ptr,
    out_ptr,
    partial_ptr,
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
    SPLITS_P: tl.constexpr,
    PARTS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    RAGGED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Grid (K, splits, R). `out` is [T, K, G, H]; partial results are float32 [R, K, SPLITS, G, H] with their lse."""
    kv_head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context, token, is_single = _row(row, context_lens_ptr, starts_ptr, RAGGED)  # pyright: ignore
    first, chunk = _span(context, WINDOW, SPLITS, MIN_CHUNK, BN)
    start = first + split * chunk
    stop = tl.minimum(start + chunk, context)

    head = tl.arange(0, GP)
    lane = tl.arange(0, H)
    is_head = head < G
    query = (token.to(tl.int64) * K + kv_head) * G * H + head[:, None] * H + lane[None, :]
    if is_single & ((split == 0) | (start < stop)):
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
        used = 1 if SPLITS == 1 else tl.cdiv(context - first, chunk)
        if used <= 1:
            tl.store(out_ptr + query, acc.to(out_ptr.dtype.element_ty), mask=is_head[:, None])
        else:
            pair = (row * K + kv_head).to(tl.int64)
            part = (pair * SPLITS + split) * G + head
            tl.store(partial_ptr + part[:, None] * H + lane[None, :], acc, mask=is_head[:, None])
            tl.store(lse_ptr + part, top + tl.log2(total), mask=is_head)
            tl.debug_barrier()  # every warp's part is written before the program says so
            if tl.atomic_add(counters_ptr + pair, 1, sem="acq_rel") == used - 1:
                tl.store(counters_ptr + pair, 0)
                out = _combine(partial_ptr, lse_ptr, pair * SPLITS, used, head, lane, G, H, SPLITS_P, PARTS)
                tl.store(out_ptr + query, out.to(out_ptr.dtype.element_ty), mask=is_head[:, None])


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
    options: dict[str, Any] = dict(
        kernel=_decode_kernel,
        grid=(kv_heads, splits, rows),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        logit_scale=scale * k_scale * LOG2E,
        v_scale=v_scale,
        K=kv_heads,
        G=group,
        H=head_dim,
        B=k_pool.shape[1],
        M=blocks,
        BN=config.block_n,
        SPLITS=splits,
        SPLITS_P=triton.next_power_of_2(splits),
        PARTS=min(triton.next_power_of_2(splits), COMBINED_PARTS),
        MIN_CHUNK=config.min_chunk,
        WINDOW=window,
        RAGGED=ragged,
        GP=max(16, triton.next_power_of_2(group)),
        COMPUTE=compute,
    )
    # One array of zeros serves every layer of a step: the last program of a pair leaves a zero behind.
    counters = jnp.zeros((rows * kv_heads if splits > 1 else 1,), jnp.int32)
    inputs = (q, k_pool, v_pool, block_tables, context_lens, starts, counters)
    lse_shape = jax.ShapeDtypeStruct((rows, kv_heads, splits, group) if splits > 1 else (1,), jnp.float32)
    partial_shape = jax.ShapeDtypeStruct((*lse_shape.shape, head_dim), jnp.float32)
    if out is None:
        out_shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
        return triton_call(*inputs, out_type=(out_shape, partial_shape, lse_shape), **options)[0]
    ref = jax.new_ref(out)
    triton_call(*inputs, ref, out_type=(partial_shape, lse_shape), **options)
    return jax.freeze(ref)


def compute_type(query_dtype: jnp.dtype, pool_dtype: jnp.dtype) -> tl.dtype:
    """What the tensor cores multiply: 8-bit pools are read as float16, whose conversion is one instruction."""
    if jnp.finfo(pool_dtype).bits == 8:
        return tl.float16 if jnp.finfo(query_dtype).bits == 16 else tl.float32
    return {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}[jnp.dtype(query_dtype).name]
