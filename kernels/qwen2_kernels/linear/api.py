"""`linear`: a projection of a step's tokens, with everything that touches its input and output once."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from qwen2_kernels.dispatch import select
from qwen2_kernels.linear.activations import ACTIVATIONS
from qwen2_kernels.linear.config import GEMV_MAX_TOKENS, Config, tuning_key
from qwen2_kernels.linear.reference import linear_reference
from qwen2_kernels.linear.xla import linear_xla
from qwen2_kernels.tuning import tuned


def _triton(*arrays: Any, **options: Any) -> Array:
    from qwen2_kernels.linear.triton_linear import linear_triton

    return linear_triton(*arrays, **options)


IMPLEMENTATIONS = {"reference": linear_reference, "xla": linear_xla, "triton": _triton}


def linear(
    x: Float[Array, "T D"],
    kernel: Float[Array, "N D"] | Float[Array, "2 N D"],
    *,
    norm_weight: Float[Array, " D"] | None = None,
    eps: float = 1e-6,
    bias: Float[Array, " N"] | None = None,
    residual: Float[Array, "T N"] | None = None,
    activation: str | None = None,
    prefetch: Array | None = None,
    out_dtype: jnp.dtype | None = None,
    implementation: str = "auto",
    config: Config | None = None,
) -> Float[Array, "T N"]:
    """Return `rms_norm(x) @ kernel.T + bias + residual`, or the gated `act(x @ kernel[0].T) * (x @ kernel[1].T)`.

    Sums are in float32 throughout. What is optional is left out where it is not given.

    Args:
        x: the tokens. NaN in one of them (padding) reaches no other.
        kernel: the weights in Hugging Face's layout, [out, in]; gate and up stacked where `activation` is given.
        norm_weight: normalise `x` first, as Hugging Face's Qwen2RMSNorm with this weight.
        eps: what the norm adds to the mean square.
        bias: added to each token; not with `activation`.
        residual: added to the result before it is rounded.
        activation: `"silu"`, `"gelu"` or `"gelu_tanh"`.
        prefetch: the kernel that the next projection reads. A hint: on a GPU its first bytes are on their way to the
            cache while this projection ends and the next is launched.
        out_dtype: the result's dtype; None means `x`'s.
        implementation: `"reference"`, `"xla"`, `"triton"` (CUDA, bfloat16 or float32) or `"auto"`: on a GPU and in
            bfloat16, Triton for one token and for shapes that `tuned/<gpu>.json` lists; XLA otherwise.
        config: the Triton kernel's tiles, for tuning; only with `implementation="triton"`.

    Raises:
        ValueError: shapes that do not fit together, or an unknown activation or implementation.
        NotImplementedError: `"triton"` where it cannot do what is asked.
    """
    gated = activation is not None
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    _check_shapes(x, kernel, norm_weight, bias, residual, gated=gated)
    if config is not None and implementation != "triton":
        raise ValueError(f"linear: config is for implementation='triton', not {implementation!r}")
    gpu, reason = _choice_on_gpu(x, kernel, gated=gated)
    run = select("linear", IMPLEMENTATIONS, implementation, gpu=gpu, elsewhere="xla", reason=reason)
    extra = {} if config is None else {"config": config}
    dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    return run(
        x, kernel, norm_weight, bias, residual, prefetch, eps=eps, activation=activation, out_dtype=dtype, **extra
    )


def _choice_on_gpu(x: Array, kernel: Array, *, gated: bool) -> tuple[str, str]:
    """Return the implementation for a GPU and why: XLA's products of several tokens are beaten only where measured."""
    if not x.dtype == kernel.dtype == jnp.bfloat16:
        return "xla", f"{x.dtype} with {kernel.dtype}"
    if x.shape[0] <= GEMV_MAX_TOKENS:
        return "triton", "one token"
    key = tuning_key(x.shape[0], kernel.shape[-2], kernel.shape[-1], gated=gated)
    return ("triton", "tuned") if tuned("linear", key, Config, None) is not None else ("xla", "not tuned")


def _check_shapes(
    x: Array, kernel: Array, norm_weight: Array | None, bias: Array | None, residual: Array | None, *, gated: bool
) -> None:
    arrays = {"x": x, "kernel": kernel, "norm_weight": norm_weight, "bias": bias, "residual": residual}
    shapes = {name: array.shape for name, array in arrays.items() if array is not None}
    fits = x.ndim == 2 and kernel.ndim == (3 if gated else 2) and kernel.shape[-1] == x.shape[-1] and x.shape[0] > 0
    fits = fits and (not gated or (kernel.shape[0] == 2 and bias is None))
    if fits:
        tokens, features = x.shape[0], kernel.shape[-2]
        expected = {"norm_weight": (x.shape[1],), "bias": (features,), "residual": (tokens, features)}
        fits = all(shapes.get(name, shape) == shape for name, shape in expected.items())
    if not fits:
        kind = "gated" if gated else "plain"
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"linear: shapes do not fit a {kind} projection: {listed}")
