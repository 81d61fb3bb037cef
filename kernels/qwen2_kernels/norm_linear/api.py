"""`norm_linear`: what stands between two residual additions, up to the projection's result."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from qwen2_kernels.dispatch import select
from qwen2_kernels.linear.api import linear, linear_partial
from qwen2_kernels.norm_linear.reference import norm_linear_reference
from qwen2_kernels.rms_norm.api import rms_norm


def _separate(
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
    normed, total = rms_norm(x, norm_weight, residual, eps=eps)
    if partial:
        return linear_partial(normed, kernel, prefetch=prefetch, num_tokens=num_tokens), total
    out = linear(normed, kernel, bias=bias, activation=activation, prefetch=prefetch, num_tokens=num_tokens)
    return out, total


def _triton(*arrays: Any, **options: Any) -> tuple[Array, Array]:
    from qwen2_kernels.linear.triton_linear import norm_gemv

    return norm_gemv(*arrays, **options)


LARGEST_FUSED_BYTES = 32 << 20
"""Kernels up to this size are multiplied as fast as launches follow one another; with larger ones, each of their many
programs normalising the token again costs more than a launch."""

IMPLEMENTATIONS = {"reference": norm_linear_reference, "separate": _separate, "triton": _triton}


def norm_linear(
    x: Float[Array, "T D"] | Float[Array, "P T D"],
    norm_weight: Float[Array, " D"],
    kernel: Float[Array, "N D"] | Float[Array, "2 N D"],
    residual: Float[Array, "T D"] | None = None,
    *,
    eps: float,
    bias: Float[Array, " N"] | None = None,
    activation: str | None = None,
    prefetch: Array | None = None,
    num_tokens: Int[Array, ""] | None = None,
    partial: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Array, "T N"] | Float[Array, "S T N"], Float[Array, "T D"]]:
    """Return `(linear(rms_norm(total)), total)`, where `total` is `x + residual`.

    Args:
        x: the tokens, or partial sums of them, see `rms_norm`. NaN in one (padding) reaches no other.
        norm_weight: the norm's weight, see `rms_norm`.
        kernel: the projection's weights, see `linear`.
        residual: added to `x` first; None leaves `x` as `total`.
        eps: what the norm adds to the mean square.
        bias, activation, prefetch, num_tokens: see `linear`.
        partial: return what `linear_partial` does, without bias and activation.
        implementation: `"reference"`, `"separate"` (the ops `rms_norm` and `linear`, each by its own choice),
            `"triton"` (CUDA, one token, bfloat16 or float32; one launch) or `"auto"`: on a GPU `"triton"` for one token
            in bfloat16 and a small kernel, else `"separate"`.

    Raises:
        ValueError: shapes that do not fit together, or an unknown activation or implementation.
        NotImplementedError: `"triton"` where it cannot do what is asked.
    """
    size = x.shape[-1]
    given = {"x": x, "norm_weight": norm_weight, "kernel": kernel, "residual": residual, "bias": bias}
    arrays = {name: array.shape for name, array in given.items() if array is not None}
    expected = {"norm_weight": (size,), "residual": x.shape[-2:], "bias": (kernel.shape[-2],)}
    fits = x.ndim in (2, 3) and kernel.ndim == 2 + (activation is not None) and kernel.shape[-1] == size
    if not fits or any(arrays.get(name, shape) != shape for name, shape in expected.items()):
        listed = ", ".join(f"{name} {shape}" for name, shape in arrays.items())
        raise ValueError(f"norm_linear: shapes do not fit: {listed}")
    if partial and (bias is not None or activation is not None):
        raise ValueError("norm_linear: partial sums have neither bias nor activation")
    if x.shape[:-1] == (1, 1) and x.dtype == kernel.dtype:
        x = x[0]  # the sum of one token has one part
    gpu, reason = _choice_on_gpu(x, kernel)
    run = select("norm_linear", IMPLEMENTATIONS, implementation, gpu=gpu, elsewhere="separate", reason=reason)
    arrays = (x, norm_weight, kernel, residual, bias, prefetch, num_tokens)
    return run(*arrays, eps=eps, activation=activation, partial=partial)


def _choice_on_gpu(x: Array, kernel: Array) -> tuple[str, str]:
    """Return the implementation for a GPU, and why."""
    if x.ndim == 3 or x.shape[0] > 1 or not x.dtype == kernel.dtype == jnp.bfloat16:
        return "separate", f"{x.shape[-2]} tokens in {x.dtype}"
    size = kernel.size * kernel.dtype.itemsize
    return ("triton" if size <= LARGEST_FUSED_BYTES else "separate"), f"one token and {size} bytes"
