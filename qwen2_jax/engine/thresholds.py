"""Top-k and top-p without sorting: the exact cut is found bit by bit.

A float32's bits, with the sign handled, order like the number; the largest key whose condition still holds is built
from the highest bit down, in 32 passes over the vocabulary. Ties at the cut are all kept.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


def top_k_threshold(logits: Float[Array, "R V"], k: Int[Array, " R"]) -> Float[Array, " R"]:
    """Return each row's k-th largest logit; minus infinity where `k` is more than the row has."""
    keys = _ordered(logits)

    def enough(candidate: Array) -> Array:
        return jnp.sum(keys >= candidate[:, None], axis=-1) >= k

    return _largest(enough, logits.shape[0])


def top_p_threshold(logits: Float[Array, "R V"], p: Float[Array, " R"]) -> Float[Array, " R"]:
    """Return the smallest logit of each row's smallest set of likeliest tokens whose probability reaches `p`."""
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

    key = jax.lax.fori_loop(0, 32, add_bit, jnp.zeros(rows, jnp.uint32))
    bits = jnp.where(key >> 31, key & jnp.uint32(0x7FFFFFFF), ~key)
    values = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isnan(values), -jnp.inf, values)
