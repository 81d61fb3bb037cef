"""`paged_attention` from its formula, softmax(q k^T * scale) v in float32, over every slot of a row's table at once."""

import jax
import jax.numpy as jnp
from jax import Array


def paged_attention_reference(
    q: Array,
    k_pool: Array,
    v_pool: Array,
    block_tables: Array,
    context_lens: Array,
    query_start_loc: Array | None,
    *,
    scale: float,
    window: int | None,
    causal: bool,
    k_scale: float,
    v_scale: float,
) -> Array:
    """See `api.paged_attention`."""
    rows, tokens = block_tables.shape[0], q.shape[0]
    starts = jnp.arange(rows + 1) if query_start_loc is None else query_start_loc

    def attend(token: Array, query: Array) -> Array:
        row = jnp.clip(jnp.searchsorted(starts, token, side="right") - 1, 0, rows - 1)
        position = context_lens[row] - (starts[row + 1] - token)
        keys, values = (
            pool[block_tables[row]].reshape(-1, *pool.shape[2:]).astype(jnp.float32) * pool_scale
            for pool, pool_scale in ((k_pool, k_scale), (v_pool, v_scale))
        )
        key_positions = jnp.arange(keys.shape[0])
        seen = (key_positions < context_lens[row]) & (token < starts[rows])
        if causal:
            seen &= key_positions <= position
        if window is not None:
            seen &= key_positions > position - window
        logits = jnp.einsum("kgh,skh->kgs", query.astype(jnp.float32), keys) * scale
        weights = jax.nn.softmax(logits, axis=-1, where=seen[None, None])
        weights = jnp.where(seen[None, None], weights, 0.0)
        return jnp.einsum("kgs,skh->kgh", weights, jnp.where(seen[:, None, None], values, 0.0))

    return jax.vmap(attend)(jnp.arange(tokens), q).astype(q.dtype)
