"""`flash_attention` from its formula, softmax(q k^T * scale) v in float32, with one dense mask over all tokens."""

import jax.numpy as jnp
from jax import Array


def flash_attention_reference(
    q: Array, k: Array, v: Array, query_start_loc: Array, *, scale: float, window: int | None, causal: bool
) -> Array:
    """See `api.flash_attention`."""
    tokens = jnp.arange(q.shape[0])
    prompt = jnp.searchsorted(query_start_loc, tokens, side="right")
    is_real = tokens < query_start_loc[-1]
    seen = (prompt[:, None] == prompt[None, :]) & is_real[:, None]
    if causal:
        seen &= tokens[None, :] <= tokens[:, None]
    if window is not None:
        seen &= tokens[None, :] > tokens[:, None] - window
    q, k, v, dtype = q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32), q.dtype
    logits = jnp.einsum("qkgh,skh->kgqs", q, k) * scale
    weights = jnp.where(seen, jnp.exp(logits - logits.max(-1, keepdims=True, where=seen, initial=-1e30)), 0.0)
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-37)
    return jnp.einsum("kgqs,skh->qkgh", weights, jnp.where(is_real[:, None, None], v, 0.0)).astype(dtype)
