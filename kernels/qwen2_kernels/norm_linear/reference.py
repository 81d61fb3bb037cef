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
    num_tokens: Array | None,
    *,
    eps: float,
    activation: str | None,
    partial: bool,
) -> tuple[Array, Array]:
    """See `api.norm_linear`."""
    total = x.astype(jnp.float32)
    total = total.sum(axis=0) if x.ndim == 3 else total
    total = total if residual is None else total + residual.astype(jnp.float32)
    dtype = norm_weight.dtype if x.ndim == 3 else x.dtype
    out = linear_reference(
        total, kernel, norm_weight, bias, None, prefetch, num_tokens, eps=eps, activation=activation, out_dtype=dtype
    )
    return out[None] if partial else out, total.astype(dtype)
