"""`linear` from its formula in float32: norm, matrix product, bias, gate and residual, each on its own."""

import jax.numpy as jnp
from jax import Array

from qwen2_kernels.linear.activations import ACTIVATIONS


def linear_reference(
    x: Array,
    kernel: Array,
    norm_weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    prefetch: Array | None = None,
    num_tokens: Array | None = None,
    *,
    eps: float,
    activation: str | None,
    out_dtype: jnp.dtype,
) -> Array:
    """See `api.linear`. `prefetch` and `num_tokens` are hints that have no meaning here."""
    wide = x.astype(jnp.float32)
    if norm_weight is not None:
        rms = jnp.sqrt(jnp.square(wide).mean(axis=-1) + eps)
        wide = wide / rms[:, None] * norm_weight.astype(jnp.float32)[None, :]
        wide = wide.astype(x.dtype).astype(jnp.float32)
    weights = jnp.matrix_transpose(kernel.astype(jnp.float32))
    out = jnp.matmul(wide[None] if weights.ndim == 3 else wide, weights, precision="highest")
    if activation is not None:
        out = ACTIVATIONS[activation](out[0]) * out[1]
    for term in (None if bias is None else bias[None, :], residual):
        out = out if term is None else out + term.astype(jnp.float32)
    return out.astype(out_dtype)
