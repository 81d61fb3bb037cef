"""`flash_attention` on Hopper's tensor cores: see `hopper_attention`."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from qwen2_kernels.hopper_attention import attend
from qwen2_kernels.hopper_config import Config, Mask, unsupported
from qwen2_kernels.hopper_tiles import Rows, Tile, make_tiles


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
    """See `api.flash_attention`.

    Args:
        q, k, v, query_start_loc, scale, window, causal: the op's.
        config: how the kernel is laid out; None takes what was fastest.

    Raises:
        NotImplementedError: dtypes other than bfloat16 and float16, a head dimension other than 64 and 128, a number
            of tokens that is no multiple of 8, or a GPU that is not of compute capability 9.0.
    """
    if (reason := unsupported(q, k, v)) is not None:
        raise NotImplementedError(reason)
    return _run(q, k, v, query_start_loc, scale=scale, window=window, causal=causal, config=config or Config())


@functools.partial(jax.jit, static_argnames=("causal", "config", "scale", "window"))
def _run(
    q: Array,
    k: Array,
    v: Array,
    query_start_loc: Array,
    *,
    scale: float,
    window: int | None,
    causal: bool,
    config: Config,
) -> Array:
    starts, stops = query_start_loc[:-1], query_start_loc[1:]
    mask = Mask(causal=causal, window=window, bounded=True)
    rows = Rows(
        positions=starts,
        key_low=starts,
        key_stop=stops,
        clean_start=jnp.zeros_like(starts),
        clean_stop=jnp.full_like(starts, query_start_loc[-1]),
    )
    tiles = make_tiles(query_start_loc, q.shape[0], rows, mask=mask, config=config)
    heads = q.reshape(q.shape[0], -1, q.shape[-1])
    return attend(heads, k, v, tiles, locate=_locate, scale=scale, mask=mask, config=config).reshape(q.shape)


def _locate(_: Tile, position: Array) -> tuple[Array]:
    """Positions are tokens of all prompts together: a block lies where its first key does."""
    return (position,)
