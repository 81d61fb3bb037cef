"""The largest logits by sorting."""

import jax
import jax.numpy as jnp
from jax import Array


def top_logits_reference(logits: Array, is_wanted: Array, count: int) -> tuple[Array, ...]:
    """See `api.top_logits`."""
    order = jnp.argsort(-logits, axis=-1, stable=True)[:, :count].astype(jnp.int32)
    values = jnp.take_along_axis(logits, order, axis=-1)
    log_sum = jax.nn.logsumexp(logits - values[:, :1], axis=-1)
    return only_wanted(is_wanted, values, order, log_sum)


def only_wanted(is_wanted: Array, *results: Array) -> tuple[Array, ...]:
    """Return results with zeros in the rows that are not wanted."""
    return tuple(jnp.where(is_wanted.reshape(-1, *[1] * (x.ndim - 1)), x, 0).astype(x.dtype) for x in results)
