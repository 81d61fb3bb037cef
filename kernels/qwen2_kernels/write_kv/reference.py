"""`write_kv` from its formula, in float32: rotation as a complex product, one token written after another."""

import jax
import jax.numpy as jnp
from jax import Array

from qwen2_kernels.adapted import Adapted


def write_kv_reference(
    qkv: Array,
    cos: Array,
    sin: Array,
    k_pool: Array,
    v_pool: Array,
    slot_mapping: Array,
    bias: Array | None = None,
    adapted: Adapted | None = None,
    *,
    k_scale: float,
    v_scale: float,
) -> tuple[Array, Array, Array]:
    """See `api.write_kv`."""
    half = qkv.shape[-1] // 2
    wide, dtype = qkv.astype(jnp.float32), qkv.dtype
    if bias is not None:
        wide = wide if qkv.ndim == 4 else wide.sum(axis=0)
        wide = wide if adapted is None else adapted(wide)
        wide, dtype = wide + bias.astype(jnp.float32)[None], bias.dtype
    rotated_heads = wide[:, :, :-1]
    pairs = jax.lax.complex(rotated_heads[..., :half], rotated_heads[..., half:])
    pairs = pairs * jax.lax.complex(cos, sin)[:, None, None, :]
    rotated = jnp.concatenate([pairs.real, pairs.imag], axis=-1)
    keys = _quantise(rotated[:, :, -1], k_scale, k_pool.dtype)
    values = _quantise(wide[:, :, -1], v_scale, v_pool.dtype)
    block_size = k_pool.shape[1]

    def write(token: Array, pools: tuple[Array, Array]) -> tuple[Array, Array]:
        slot = slot_mapping[token]
        block, offset = slot // block_size, slot % block_size
        k, v = pools
        written = (k.at[block, offset].set(keys[token]), v.at[block, offset].set(values[token]))
        return jax.tree.map(lambda new, old: jnp.where(slot < 0, old, new), written, pools)

    k_pool, v_pool = jax.lax.fori_loop(0, wide.shape[0], write, (k_pool, v_pool))
    return rotated[:, :, :-1].astype(dtype), k_pool, v_pool


def _quantise(x: Array, scale: float, dtype: jnp.dtype) -> Array:
    limit = float(jnp.finfo(dtype).max) if jnp.finfo(dtype).bits == 8 else jnp.inf
    return jnp.clip(x / scale, -limit, limit).astype(dtype)
