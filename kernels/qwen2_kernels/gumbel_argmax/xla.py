"""The Gumbel-max trick for any platform, without noise where no row wants any."""

import jax
import jax.numpy as jnp
from jax import Array

from qwen2_kernels.gumbel_argmax.reference import gumbel_argmax_reference


def gumbel_argmax_xla(
    logits: Array, temperature: Array, threshold: Array, seeds_high: Array, seeds_low: Array, indices: Array
) -> Array:
    """See `api.gumbel_argmax`."""

    def greedy() -> Array:
        kept = jnp.where(logits < threshold[:, None], -jnp.inf, logits)
        return jnp.argmax(kept, axis=-1).astype(jnp.int32)

    def random() -> Array:
        return gumbel_argmax_reference(logits, temperature, threshold, seeds_high, seeds_low, indices)

    return jax.lax.cond(jnp.any(temperature != 0), random, greedy)
