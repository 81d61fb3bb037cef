"""The Gumbel-max trick with `jax.random`'s noise."""

import jax
import jax.numpy as jnp
from jax import Array


def gumbel_argmax_reference(
    logits: Array, temperature: Array, threshold: Array, seeds_high: Array, seeds_low: Array, indices: Array
) -> Array:
    """See `api.gumbel_argmax`."""
    is_greedy = temperature == 0
    scaled = logits * (1 / jnp.where(is_greedy, 1.0, temperature))[:, None]
    kept = jnp.where(scaled < threshold[:, None], -jnp.inf, scaled)
    noise = jax.vmap(_gumbel, in_axes=(0, 0, 0, None))(seeds_high, seeds_low, indices, logits.shape[1])
    return jnp.argmax(jnp.where(is_greedy[:, None], kept, kept + noise), axis=-1).astype(jnp.int32)


def _gumbel(seed_high: Array, seed_low: Array, index: Array, size: int) -> Array:
    words = jnp.stack([seed_high, seed_low]).astype(jnp.uint32)
    key = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), index)
    return jax.random.gumbel(key, (size,), jnp.float32, mode="low")
