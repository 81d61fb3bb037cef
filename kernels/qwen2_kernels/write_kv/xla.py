"""`write_kv` as XLA compiles it: elementwise rotation and one scatter for each pool."""

import jax
import jax.numpy as jnp
from jax import Array

from qwen2_kernels.adapted import Adapted


def write_kv_xla(
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
    dtype = qkv.dtype
    if bias is not None:
        qkv = qkv.astype(jnp.float32) if qkv.ndim == 4 else qkv.astype(jnp.float32).sum(axis=0)
        qkv = qkv if adapted is None else adapted(qkv)
        qkv, dtype = qkv + bias.astype(jnp.float32)[None], bias.dtype
    q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
    q = _rotate(q, cos[:, None, None, :], sin[:, None, None, :]).astype(dtype)
    k = _rotate(k, cos[:, None, :], sin[:, None, :])
    return q, _scatter(k_pool, slot_mapping, k, k_scale), _scatter(v_pool, slot_mapping, v, v_scale)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _scatter(pool: Array, slot_mapping: Array, rows: Array, scale: float) -> Array:
    blocks, block_size, *row_shape = pool.shape
    if scale != 1.0:
        rows = rows.astype(jnp.float32) / scale
    if jnp.finfo(pool.dtype).bits == 8:
        limit = float(jnp.finfo(pool.dtype).max)
        rows = jnp.clip(rows, -limit, limit)
    rows = rows.astype(pool.dtype)
    if slot_mapping.shape == (1,):
        # XLA makes a lone dropped write a choice between two whole pools; writing the old row back needs no copy.
        slot = jnp.maximum(slot_mapping[0], 0)
        start = (slot // block_size, slot % block_size, *(0 for _ in row_shape))
        old = jax.lax.dynamic_slice(pool, start, (1, 1, *row_shape))
        return jax.lax.dynamic_update_slice(pool, jnp.where(slot_mapping[0] < 0, old, rows[None]), start)
    # A negative index would count from the end: -1 becomes one past the last slot, which "drop" leaves out.
    slots = jnp.where(slot_mapping < 0, blocks * block_size, slot_mapping)
    # Indexed by block and offset, because XLA copies a pool that is reshaped first where a row is a single head.
    return pool.at[slots // block_size, slots % block_size].set(rows, mode="drop")
