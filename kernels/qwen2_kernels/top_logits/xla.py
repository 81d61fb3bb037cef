"""The largest logits without sorting rows as a whole."""

import jax
import jax.numpy as jnp
from jax import Array

from qwen2_kernels.top_logits.reference import only_wanted

TILE = 128
"""Logits that are looked at together."""


def top_logits_xla(logits: Array, is_wanted: Array, count: int) -> tuple[Array, ...]:
    """See `api.top_logits`."""
    values, places = _largest(logits, count)
    log_sum = jnp.log(jnp.exp(logits - values[:, :1]).sum(axis=-1))
    return only_wanted(is_wanted, values, places.astype(jnp.int32), log_sum)


def _largest(logits: Array, count: int) -> tuple[Array, Array]:
    """Return what `jax.lax.top_k` does.

    A logit that is among the K largest lies in one of the K tiles that have the largest maxima: where it did not, each
    of those would have a larger one, or an equal one before it.
    """
    rows, size = logits.shape
    tiles = -(-size // TILE)
    if tiles <= count:
        return jax.lax.top_k(logits, count)
    padding = ((0, 0), (0, tiles * TILE - size))
    tiled = jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(rows, tiles, TILE)
    best = jnp.sort(jax.lax.top_k(tiled.max(axis=-1), count)[1], axis=-1)
    candidates = jnp.take_along_axis(tiled, best[:, :, None], axis=1).reshape(rows, -1)
    found, places = jax.lax.top_k(candidates, count)
    return found, jnp.take_along_axis(best, places // TILE, axis=1) * TILE + places % TILE
