"""Ranks for any platform: one column of tokens at a time, because a comparison has the vocabulary's width."""

import jax
import jax.numpy as jnp
from jax import Array


def token_ranks_xla(logits: Array, token_ids: Array) -> Array:
    """See `api.token_ranks`. Columns behind the last that some row asks for are left out."""
    values = jnp.take_along_axis(logits, jnp.maximum(token_ids, 0), axis=-1)
    is_asked = token_ids >= 0

    def add_rank(column: Array, ranks: Array) -> Array:
        better = jnp.sum(logits > values[:, column, None], axis=-1)
        return ranks.at[:, column].set(better.astype(jnp.int32) + 1)

    columns = jnp.max(jnp.where(is_asked, jnp.arange(1, token_ids.shape[1] + 1), 0), initial=0)
    ranks = jax.lax.fori_loop(0, columns, add_rank, jnp.zeros(token_ids.shape, jnp.int32))
    return jnp.where(is_asked, ranks, 0)
