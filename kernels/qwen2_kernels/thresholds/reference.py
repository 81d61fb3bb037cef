"""The thresholds from their definitions, by sorting."""

import jax.numpy as jnp
from jax import Array


def top_k_threshold_reference(logits: Array, k: Array, temperature: Array, floor: Array) -> Array:
    """See `api.top_k_threshold`."""
    falling = -jnp.sort(-kept(logits, temperature, floor), axis=-1)
    kth = jnp.take_along_axis(falling, jnp.clip(k - 1, 0, logits.shape[1] - 1)[:, None], axis=-1)[:, 0]
    return jnp.where((k >= 1) & (k <= logits.shape[1]), kth, -jnp.inf)


def top_p_threshold_reference(logits: Array, p: Array, temperature: Array, floor: Array) -> Array:
    """See `api.top_p_threshold`."""
    falling = -jnp.sort(-kept(logits, temperature, floor), axis=-1)
    weights = jnp.exp(falling - falling[:, :1])
    before = jnp.cumsum(weights, axis=-1) - weights
    is_in = before < p[:, None] * weights.sum(axis=-1, keepdims=True)
    return jnp.where(p < 1, jnp.where(is_in, falling, jnp.inf).min(axis=-1), -jnp.inf)


def kept(logits: Array, temperature: Array, floor: Array) -> Array:
    """Return what the thresholds are searched in: scaled logits, minus infinity for those that are cut already."""
    scaled = logits * (1 / temperature)[:, None]
    return jnp.where(scaled < floor[:, None], -jnp.inf, scaled)
