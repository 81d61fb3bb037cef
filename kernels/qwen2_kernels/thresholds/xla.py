"""The thresholds for any platform: a cut is found bit by bit.

A float32's bits, with the sign handled, order like the number; the largest key whose condition still holds is built
from the highest bit down, in 32 passes over the vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def top_k_threshold_xla(logits: Array, k: Array) -> Array:
    """See `api.top_k_threshold`."""
    keys = _ordered(logits)

    def enough(candidate: Array) -> Array:
        return jnp.sum(keys >= candidate[:, None], axis=-1) >= k

    return _largest(enough, logits.shape[0])


def top_p_threshold_xla(logits: Array, p: Array) -> Array:
    """See `api.top_p_threshold`."""
    keys = _ordered(logits)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    target = p * weights.sum(axis=-1)

    def enough(candidate: Array) -> Array:
        return jnp.sum(jnp.where(keys >= candidate[:, None], weights, 0.0), axis=-1) >= target

    return _largest(enough, logits.shape[0])


def _ordered(x: Array) -> Array:
    """Map float32 to uint32 so that order is kept."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _largest(condition: Callable[[Array], Array], rows: int) -> Array:
    """Return, as a float32 per row, the largest key for which `condition`, true up to some key, holds."""

    def add_bit(index: Array, key: Array) -> Array:
        candidate = key | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        return jnp.where(condition(candidate), candidate, key)

    return as_float(jax.lax.fori_loop(0, 32, add_bit, jnp.zeros(rows, jnp.uint32)))


def as_float(keys: Array) -> Array:
    """Return the float32 that each key stands for, minus infinity for those that no number has."""
    bits = jnp.where(keys >> 31, keys & jnp.uint32(0x7FFFFFFF), ~keys)
    values = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isnan(values), -jnp.inf, values)
