"""`rms_norm` as XLA compiles it: a fusion or two, shared with what is around them where XLA sees fit."""

import jax
import jax.numpy as jnp
from jax import Array

from qwen2_kernels.adapted import Adapted


def rms_norm_xla(
    x: Array, weight: Array, residual: Array | None, adapted: Adapted | None = None, *, eps: float
) -> tuple[Array, Array]:
    """See `api.rms_norm`."""
    total = x.astype(jnp.float32)
    dtype = x.dtype
    if x.ndim == 3:
        total, dtype = total.sum(axis=0), weight.dtype
    if adapted is not None:
        total = adapted(total)
    if residual is not None:
        total = total + residual.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(total), axis=-1, keepdims=True) + eps)
    normed = total * scale * weight.astype(jnp.float32)[None, :]
    return normed.astype(dtype), total.astype(dtype)
