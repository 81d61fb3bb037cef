"""`norm_linear` from its formula, in float32."""

import jax.numpy as jnp
from jax import Array

from qwen2_kernels.linear.reference import linear_reference


def norm_linear_reference(
    x: Array,
    norm_weight: Array,
    kernel: Array,
    residual: Array | None,
    bias: Array | None,
    prefetch: Array | None,
    *,
    eps: float,
    activation: str | None,
) -> tuple[Array, Array]:
    """See `api.norm_linear`."""
    total = x.astype(jnp.float32) + (0.0 if residual is None else residual.astype(jnp.float32))
    out = linear_reference(
        total, kernel, norm_weight, bias, None, prefetch, eps=eps, activation=activation, out_dtype=x.dtype
    )
    return out, total.astype(x.dtype)
