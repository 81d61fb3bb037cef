"""`paged_attention` for rows of any number of queries, as one Triton launch over query tiles.

A tile is BQ consecutive queries of one row for one KV head; its G query heads lie side by side in the tile's rows, so
that each key and value is read once for all of them (FlashAttention-2's loop, Dao 2023, over paged keys).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array
from jaxtyping import Int

from qwen2_kernels.launch import triton_call
from qwen2_kernels.paged_attention.triton_decode import LOG2E, compute_type


@dataclass(frozen=True, kw_only=True)
class RaggedConfig:
    """Tile sizes."""

    block_m: int
    """Rows of a tile: its queries times their heads, rounded up to this power of two."""
    block_n: int
    """Tokens that one iteration reads."""
    num_warps: int
    num_stages: int


def tile_rows(
    query_start_loc: Int[Array, " R+1"], num_tokens: int, queries: int, *, skip_single: bool
) -> tuple[Int[Array, " N"], Int[Array, " N"]]:
    """Cut each row's queries into tiles of `queries`, and what follows the last row, too.

    Returns each tile's row and the index on T of its first query. Row R is the padding; R + 1 means that a tile is not
    needed. `skip_single` leaves out rows with one query. N is the most tiles that any lengths need.
    """
    rows = query_start_loc.shape[0] - 1
    ends = jnp.append(query_start_loc[1:], num_tokens)
    lengths = ends - query_start_loc
    tiles = -(-lengths // queries)
    if skip_single:
        tiles = jnp.where((lengths == 1) & (jnp.arange(rows + 1) < rows), 0, tiles)
    last = jnp.cumsum(tiles)
    index = jnp.arange(-(-num_tokens // queries) + min(rows + 1, num_tokens), dtype=jnp.int32)
    row = jnp.sum(index[:, None] >= last[None, :], axis=1, dtype=jnp.int32)
    clipped = jnp.minimum(row, rows)
    start = query_start_loc[clipped] + (index - (last - tiles)[clipped]) * queries
    return row, start.astype(jnp.int32)


@triton.jit
def _attend(
    q, acc, total, top, base, stop, table, k_pool_ptr, v_pool_ptr, kv_head, lane, low, high,
    logit_scale: tl.constexpr, K: tl.constexpr, H: tl.constexpr, B: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One iteration: tokens from `base`, of which each tile row sees those in [low, high)."""
    position = base + tl.arange(0, BN)
    present = position < stop
    block = tl.load(table + position // B, mask=present, other=0).to(tl.int64)
    offset = tl.multiple_of(((block * B + position % B) * K + kv_head) * H, 16)
    if MASKED:
        k = tl.load(k_pool_ptr + offset[None, :] + lane[:, None], mask=present[None, :], other=0.0)
        v = tl.load(v_pool_ptr + offset[:, None] + lane[None, :], mask=present[:, None], other=0.0)
    else:
        k = tl.load(k_pool_ptr + offset[None, :] + lane[:, None])
        v = tl.load(v_pool_ptr + offset[:, None] + lane[None, :])
    logits = tl.dot(q, k.to(COMPUTE), input_precision="ieee") * logit_scale
    if MASKED:
        seen = (position[None, :] >= low[:, None]) & (position[None, :] < high[:, None])
        logits = tl.where(seen, logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    shift = new_top
    if MASKED:
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - shift[:, None])
    decay = tl.exp2(top - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(COMPUTE), v.to(COMPUTE), acc * decay[:, None], input_precision="ieee")
    return acc, total, new_top


@triton.jit
def _ragged_kernel(
    q_ptr,
    k_pool_ptr,
    v_pool_ptr,
    block_tables_ptr,
    context_lens_ptr,
    starts_ptr,
    tile_row_ptr,
    tile_start_ptr,
    out_ptr,
    num_tokens: tl.constexpr,
    num_rows: tl.constexpr,
    logit_scale: tl.constexpr,
    v_scale: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    B: tl.constexpr,
    M: tl.constexpr,
    BQ: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Grid (K, tiles), the last tile first: the later a causal query, the longer it takes."""
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    row = tl.load(tile_row_ptr + tile)
    if row <= num_rows:
        is_padding = row == num_rows
        start = tl.load(tile_start_ptr + tile)
        end = tl.where(is_padding, num_tokens, tl.load(starts_ptr + row + 1, mask=row < num_rows, other=0))
        context = tl.load(context_lens_ptr + row, mask=row < num_rows, other=0)
        index = tl.arange(0, BM)
        token = start + index // G
        is_query = (index < BQ * G) & (token < end)
        position = context - (end - token)
        lane = tl.arange(0, H)
        query = (token.to(tl.int64) * K + kv_head) * G * H + (index % G) * H
        query = tl.multiple_of(query, 16)[:, None] + lane[None, :]
        q = tl.load(q_ptr + query, mask=is_query[:, None], other=0.0).to(COMPUTE)

        first_position = context - (end - start)
        last_position = tl.minimum(first_position + BQ, context) - 1
        stop, full_stop, first = context, context, 0
        high = tl.full([BM], 0, tl.int32) + context
        low = tl.full([BM], 0, tl.int32)
        if CAUSAL:
            stop = last_position + 1
            full_stop = first_position + 1
            high = tl.minimum(position + 1, context)
        if WINDOW is not None:
            first = tl.maximum(first_position - WINDOW + 1, 0)
            low = tl.maximum(position - WINDOW + 1, 0)
            full_stop = first
        full_stop = tl.maximum(first + (full_stop - first) // BN * BN, first)
        stop = tl.where(is_padding, 0, stop)
        full_stop = tl.where(is_padding, 0, full_stop)

        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.full([BM], 0.0, tl.float32)
        acc = tl.full([BM, H], 0.0, tl.float32)
        table = block_tables_ptr + tl.where(is_padding, 0, row) * M
        for base in tl.range(first, full_stop, BN):  # pyright: ignore
            acc, total, top = _attend(  # pyright: ignore
                q, acc, total, top, base, stop, table, k_pool_ptr, v_pool_ptr, kv_head, lane, low, high,
                logit_scale, K, H, B, BN, False, COMPUTE,
            )  # fmt: skip
        for base in tl.range(full_stop, stop, BN):  # pyright: ignore
            acc, total, top = _attend(  # pyright: ignore
                q, acc, total, top, base, stop, table, k_pool_ptr, v_pool_ptr, kv_head, lane, low, high,
                logit_scale, K, H, B, BN, True, COMPUTE,
            )  # fmt: skip
        acc = acc * (v_scale / tl.where(total > 0, total, 1.0))[:, None]
        tl.store(out_ptr + query, acc.to(out_ptr.dtype.element_ty), mask=is_query[:, None])


def ragged_attention(
    q: Array,
    k_pool: Array,
    v_pool: Array,
    block_tables: Array,
    context_lens: Array,
    query_start_loc: Array,
    *,
    scale: float,
    window: int | None,
    causal: bool,
    k_scale: float,
    v_scale: float,
    skip_single: bool,
    config: RaggedConfig,
) -> Array:
    """Attend for every row; with `skip_single`, rows with one query are left undefined."""
    tokens, kv_heads, group, head_dim = q.shape
    rows, blocks = block_tables.shape
    block_m: int = max(config.block_m, 1 << (group - 1).bit_length())
    queries = block_m // group
    row, start = tile_rows(query_start_loc, tokens, queries, skip_single=skip_single)
    return triton_call(
        q,
        k_pool,
        v_pool,
        block_tables,
        context_lens,
        query_start_loc,
        row,
        start,
        kernel=_ragged_kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(kv_heads, row.shape[0]),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        num_tokens=tokens,
        num_rows=rows,
        logit_scale=scale * k_scale * LOG2E,
        v_scale=v_scale,
        K=kv_heads,
        G=group,
        H=head_dim,
        B=k_pool.shape[1],
        M=blocks,
        BQ=queries,
        BM=block_m,
        BN=config.block_n,
        WINDOW=window,
        CAUSAL=causal,
        COMPUTE=compute_type(q.dtype, k_pool.dtype),
    )
