"""Ranks from their definition."""

import jax.numpy as jnp
from jax import Array


def token_ranks_reference(logits: Array, token_ids: Array) -> Array:
    """See `api.token_ranks`."""
    values = jnp.take_along_axis(logits, jnp.maximum(token_ids, 0), axis=-1)
    better = (logits[:, None, :] > values[:, :, None]).sum(axis=-1)
    return jnp.where(token_ids >= 0, better + 1, 0).astype(jnp.int32)
