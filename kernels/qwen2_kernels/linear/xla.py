"""`linear` as XLA compiles it: a fusion for the norm, a library's or its own matrix product, and an epilogue."""

import jax.numpy as jnp
from jax import Array

from qwen2_kernels.linear.activations import ACTIVATIONS
from qwen2_kernels.rms_norm.xla import rms_norm_xla


def linear_xla(
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
    """See `api.linear`; `prefetch` and `num_tokens` are ignored.

    The product itself is rounded to `out_dtype` once, as Hugging Face's layers do it.
    """
    if norm_weight is not None:
        x, _ = rms_norm_xla(x, norm_weight, None, eps=eps)
    if activation is None:
        out = jnp.einsum("td,nd->tn", x, kernel, preferred_element_type=out_dtype)
    else:
        # One product for both halves: the kernel lies in memory as [2F, D].
        flat = kernel.reshape(-1, kernel.shape[-1])
        gate, up = jnp.split(jnp.einsum("td,nd->tn", x, flat, preferred_element_type=out_dtype), 2, axis=1)
        out = ACTIVATIONS[activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return add_epilogue(out, bias, residual, out_dtype)


def add_epilogue(out: Array, bias: Array | None, residual: Array | None, out_dtype: jnp.dtype) -> Array:
    """Return `out + bias + residual`, added in float32 and rounded to `out_dtype`."""
    if bias is not None:
        out = out.astype(jnp.float32) + bias.astype(jnp.float32)[None, :]
    if residual is not None:
        out = out.astype(jnp.float32) + residual.astype(jnp.float32)
    return out.astype(out_dtype)
