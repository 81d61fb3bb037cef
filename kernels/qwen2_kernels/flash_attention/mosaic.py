"""`flash_attention` on Hopper's tensor cores: see `hopper_attention`."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen2_kernels.hopper_attention import ALIGNMENT, Config, Mask, Tile, attend, check, make_tiles


def flash_attention_mosaic(
    q: Array,
    k: Array,
    v: Array,
    query_start_loc: Array,
    *,
    scale: float,
    window: int | None,
    causal: bool,
    config: Config | None = None,
) -> Array:
    """See `api.flash_attention`. `config` is how the kernel is laid out; None takes what was fastest.

    Raises:
        NotImplementedError: dtypes other than bfloat16 and float16, a head dimension other than 64 and 128, or a number
            of tokens that is no multiple of 8.
    """
    tokens, kv_heads, group, head_dim = q.shape
    check(q, k, v)
    config = config or Config()
    starts, stops = query_start_loc[:-1], query_start_loc[1:]
    mask = Mask(causal=causal, window=window, bounded=True)
    tiles = make_tiles(
        query_start_loc,
        tokens,
        positions=starts,
        key_low=starts,
        key_stop=stops,
        clean_start=jnp.zeros_like(starts),
        clean_stop=jnp.full_like(starts, query_start_loc[-1]),
        mask=mask,
        config=config,
    )
    out = attend(
        q.reshape(tokens, kv_heads * group, head_dim),
        k,
        v,
        tiles,
        loader=functools.partial(_load, config.kv_tile),
        scale=scale,
        mask=mask,
        config=config,
    )
    return out.reshape(q.shape)


def _load(kv_tile: int, refs: tuple[Any, ...], smem: Any, barrier: Any, position: Array, _: Tile, head: Array) -> None:
    source = pl.ds(pl.multiple_of(position, ALIGNMENT), kv_tile)
    plgpu.copy_gmem_to_smem(refs[0].at[source, head], smem, barrier)
