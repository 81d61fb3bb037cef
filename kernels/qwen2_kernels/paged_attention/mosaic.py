"""`paged_attention` of rows with several queries on Hopper's tensor cores: see `hopper_attention`."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from qwen2_kernels.hopper_attention import attend
from qwen2_kernels.hopper_config import Config, Mask, unsupported
from qwen2_kernels.hopper_tiles import Rows, Tile, make_tiles

PAGE = 64
"""Pages hold a multiple of so many tokens, and tiles of keys are cut at them."""


def supported(
    q: Array | jax.ShapeDtypeStruct, k_pool: Array | jax.ShapeDtypeStruct, config: Config | None = None
) -> str | None:
    """Return why these arrays cannot be attended with, or None if they can.

    Args:
        q: the step's queries [T, K, G, H].
        k_pool: the pool of keys [P, B, K, H]; that of values is like it.
        config: how the kernel is laid out; None takes what was fastest.
    """
    block_size, kv_tile = k_pool.shape[1], (config or Config()).kv_tile
    if block_size % PAGE or (block_size % kv_tile and kv_tile % block_size):
        return f"mosaic: blocks of a multiple of {PAGE} that fits {kv_tile}, not {block_size}"
    return unsupported(q, k_pool)


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
        q, k_pool, v_pool, block_tables, context_lens, query_start_loc: the op's arrays.
        scale, window, causal, k_scale, v_scale: the op's options.
        skip_single: leave out rows of one query: what is returned for them is not defined.
        config: how the kernel is laid out; None takes what was fastest.

    Raises:
        NotImplementedError: decode, or what `supported` gives a reason for: pools of other dtypes than `q`'s bfloat16
            or float16, a head dimension other than 64 and 128, blocks whose size 64 does not divide, a number of
            tokens that is no multiple of 8, or a GPU that is not of compute capability 9.0.
    """
    if query_start_loc is None:
        raise NotImplementedError("mosaic: rows of several queries, not decode")
    config = config or Config()
    if (reason := supported(q, k_pool, config) or unsupported(q, k_pool, v_pool)) is not None:
        raise NotImplementedError(reason)
    return _run(
        q,
        k_pool,
        v_pool,
        block_tables.astype(jnp.int32),
        context_lens,
        query_start_loc,
        scale=scale * k_scale,
        out_scale=v_scale,
        window=window,
        causal=causal,
        skip_single=skip_single,
        config=config,
    )


@functools.partial(jax.jit, static_argnames=("causal", "config", "out_scale", "scale", "skip_single", "window"))
def _run(
    q: Array,
    k_pool: Array,
    v_pool: Array,
    block_tables: Array,
    context_lens: Array,
    query_start_loc: Array,
    *,
    scale: float,
    out_scale: float,
    window: int | None,
    causal: bool,
    skip_single: bool,
    config: Config,
) -> Array:
    block_size, kv_tile = k_pool.shape[1], config.kv_tile
    positions = context_lens - jnp.diff(query_start_loc)
    zeros = jnp.zeros_like(positions)
    mask = Mask(causal=causal, window=window, bounded=False)
    rows = Rows(
        positions=positions,
        key_low=zeros,
        key_stop=context_lens,
        clean_start=zeros if window is None else jnp.maximum(positions - window + 1, 0),
        clean_stop=context_lens,
    )
    out = attend(
        q.reshape(q.shape[0], -1, q.shape[-1]),
        k_pool.reshape(-1, *k_pool.shape[2:]),
        v_pool.reshape(-1, *v_pool.shape[2:]),
        make_tiles(query_start_loc, q.shape[0], rows, mask=mask, config=config, skip_single=skip_single),
        block_tables,
        locate=_Pages(block_size=block_size, kv_tile=kv_tile),
        copies=max(kv_tile // block_size, 1),
        scale=scale,
        out_scale=out_scale,
        mask=mask,
        config=config,
    )
    return out.reshape(q.shape)


@dataclass(frozen=True, kw_only=True)
class _Pages:
    """Where the pages of a block of keys lie."""

    block_size: int
    kv_tile: int

    def __call__(self, tile: Tile, position: Array, block_tables: Array) -> tuple[Array, ...]:
        """Return each page's slot. Behind the row's last one, where the table's entries may be anything, it is that."""
        size = jnp.int32(self.block_size)
        last = lax.div(tile.clean_stop - 1, size)
        slots = []
        for start in range(0, self.kv_tile, min(self.block_size, self.kv_tile)):
            page, offset = lax.div(position + start, size), lax.rem(position + start, size)
            slots.append(block_tables[tile.row, jnp.minimum(page, last)] * self.block_size + offset)
        return tuple(slots)
