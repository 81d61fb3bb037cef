"""The thresholds for any platform: a cut is found bit by bit.

A float32's bits, with the sign handled, order like the number; the largest key whose condition still holds is built
from the highest bit down, in 32 passes over the vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from qwen2_kernels.thresholds.reference import kept


def top_k_threshold_xla(logits: Array, k: Array, temperature: Array, floor: Array) -> Array:
    """See `api.top_k_threshold`."""

    def search() -> Array:
        keys = _ordered(kept(logits, temperature, floor))
        return _largest(lambda candidate: jnp.sum(keys >= candidate[:, None], axis=-1) >= k, len(keys))

    return _where(k > 0, search)


def top_p_threshold_xla(logits: Array, p: Array, temperature: Array, floor: Array) -> Array:
    """See `api.top_p_threshold`."""

    def search() -> Array:
        scaled = kept(logits, temperature, floor)
        keys = _ordered(scaled)
        weights = jnp.exp(scaled - scaled.max(axis=-1, keepdims=True))
        target = p * weights.sum(axis=-1)

        def enough(candidate: Array) -> Array:
            return jnp.sum(jnp.where(keys >= candidate[:, None], weights, 0.0), axis=-1) >= target

        return _largest(enough, len(keys))

    return _where(p < 1, search)


def _where(wanted: Array, search: Callable[[], Array]) -> Array:
    """Return what `search` finds for the rows that want it; it is left out where none does."""
    nothing = jnp.full(wanted.shape, -jnp.inf)
    return jax.lax.cond(jnp.any(wanted), lambda: jnp.where(wanted, search(), nothing), lambda: nothing)


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
