"""`paged_attention` of rows with several queries on Hopper's tensor cores: see `hopper_attention`."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen2_kernels.hopper_attention import ALIGNMENT, Config, Mask, Tile, attend, check, make_tiles


def paged_attention_mosaic(
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
    skip_single: bool = False,
    config: Config | None = None,
) -> Array:
    """See `api.paged_attention`.

    Args:
        skip_single: leave out rows of one query: what is returned for them is not defined.
        config: how the kernel is laid out; None takes what was fastest.

    Raises:
        NotImplementedError: decode, pools of other dtypes than `q`'s bfloat16 or float16, a head dimension other than
            64 and 128, blocks whose size 64 does not divide, or a number of tokens that is no multiple of 8.
    """
    if query_start_loc is None:
        raise NotImplementedError("mosaic: rows of several queries, not decode")
    check(q, k_pool, v_pool)
    blocks, block_size, kv_heads, head_dim = k_pool.shape
    config = config or Config()
    if block_size % 64 or (block_size % config.kv_tile and config.kv_tile % block_size):
        raise NotImplementedError(f"mosaic: blocks of a multiple of 64 that fits {config.kv_tile}, not {block_size}")
    rows, tokens = block_tables.shape[0], q.shape[0]
    query_lens = jnp.diff(query_start_loc)
    positions = context_lens - query_lens
    oldest = jnp.zeros(rows, jnp.int32) if window is None else jnp.maximum(positions - window + 1, 0)
    mask = Mask(causal=causal, window=window, bounded=False)
    tiles = make_tiles(
        query_start_loc,
        tokens,
        positions=positions,
        key_low=jnp.zeros(rows, jnp.int32),
        key_stop=context_lens,
        clean_start=oldest,
        clean_stop=context_lens,
        mask=mask,
        config=config,
        skip_single=skip_single,
    )
    copy = min(block_size, config.kv_tile)
    out = attend(
        q.reshape(tokens, kv_heads * q.shape[2], head_dim),
        k_pool.reshape(blocks * block_size, kv_heads, head_dim),
        v_pool.reshape(blocks * block_size, kv_heads, head_dim),
        tiles,
        block_tables.astype(jnp.int32),
        loader=functools.partial(_load, block_size, copy, config.kv_tile),
        copies=config.kv_tile // copy,
        scale=scale * k_scale,
        out_scale=v_scale,
        mask=mask,
        config=config,
    )
    return out.reshape(q.shape)


def _load(
    block_size: int,
    copy: int,
    kv_tile: int,
    refs: tuple[Any, ...],
    smem: Any,
    barrier: Any,
    position: Array,
    tile: Tile,
    head: Array,
) -> None:
    """Copy block by block. What lies behind the row's last block, whose table entries may be anything, is that block."""
    pool, block_tables = refs
    last = lax.div(tile.clean_stop - 1, jnp.int32(block_size))
    for start in range(0, kv_tile, copy):
        index = jnp.minimum(lax.div(position + start, jnp.int32(block_size)), last)
        slot = block_tables[tile.row, index] * block_size + lax.rem(position + start, jnp.int32(block_size))
        source = pl.ds(pl.multiple_of(slot, ALIGNMENT), copy)
        plgpu.copy_gmem_to_smem(pool.at[source, head], smem.at[pl.ds(start, copy)], barrier)
