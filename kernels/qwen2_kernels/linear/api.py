"""`linear`: a projection of a step's tokens, with everything that touches its input and output once."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from qwen2_kernels.dispatch import mesh_platform, select
from qwen2_kernels.hopper_config import unsupported_gpu
from qwen2_kernels.launch import has_triton
from qwen2_kernels.linear.activations import ACTIVATIONS
from qwen2_kernels.linear.config import GEMV_MAX_TOKENS, Config, tuning_key
from qwen2_kernels.linear.mosaic_config import MosaicConfig
from qwen2_kernels.linear.mosaic_support import supported
from qwen2_kernels.linear.reference import linear_reference
from qwen2_kernels.linear.xla import linear_xla
from qwen2_kernels.tuning import tuned


def _triton(*arrays: Any, **options: Any) -> Array:
    from qwen2_kernels.linear.triton_linear import linear_triton

    return linear_triton(*arrays, **options)


def _mosaic(*arrays: Any, **options: Any) -> Array:
    from qwen2_kernels.linear.mosaic import linear_mosaic

    return linear_mosaic(*arrays, **options)


IMPLEMENTATIONS = {"reference": linear_reference, "xla": linear_xla, "triton": _triton, "mosaic": _mosaic}
MANY_TOKENS = 2048
"""From so many on, the Mosaic kernel beats XLA's products, as it does for few; gated projections, whose activation is
part of it, are always Mosaic's."""
LARGE_KERNEL = 1 << 23
"""Of so many elements on, a kernel is slow enough to read that XLA's products catch up at fewer tokens."""
MOSAIC_MAX_FEATURES = 65536
"""Of so many features on, XLA's products are at the limit themselves."""
CONFIGS = {"triton": Config, "mosaic": MosaicConfig}


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
    num_tokens: Int[Array, ""] | None = None,
    out_dtype: jnp.dtype | None = None,
    implementation: str = "auto",
    config: Config | MosaicConfig | None = None,
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
        prefetch: the kernel that the next projection reads. A hint, which only Triton's kernels follow: its first
            bytes are on their way to the cache while this projection ends and the next is launched.
        num_tokens: how many of the first tokens matter; None means all. The others' results are undefined, which the
            Mosaic kernel makes use of: it takes no time for them.
        out_dtype: the result's dtype; None means `x`'s.
        implementation: `"reference"`, `"xla"`, `"triton"` (CUDA, bfloat16 or float32), `"mosaic"` (Hopper, bfloat16)
            or `"auto"`: on a GPU and in bfloat16, Triton for one token and for shapes that `tuned/<gpu>.json` lists,
            Mosaic on Hopper for 2 to 64 tokens (128 where the kernel is small), from 2048 on and for any number where
            gated, unless the kernel is a vocabulary; XLA otherwise.
        config: a kernel's tiles, for tuning: a `Config` for `"triton"`, a `MosaicConfig` for `"mosaic"`.

    Raises:
        ValueError: shapes that do not fit together, or an unknown activation or implementation.
        NotImplementedError: `"triton"` or `"mosaic"` where it cannot do what is asked.
    """
    gated = activation is not None
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    _check_shapes(x, kernel, norm_weight, bias, residual, gated=gated)
    if config is not None and not isinstance(config, CONFIGS.get(implementation, ())):
        raise ValueError(f"linear: a {type(config).__name__} is not for implementation={implementation!r}")
    gpu, reason = _choice_on_gpu(x, kernel, activation)
    run = select("linear", IMPLEMENTATIONS, implementation, gpu=gpu, elsewhere="xla", reason=reason)
    extra = {} if config is None else {"config": config}
    dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    arrays = (x, kernel, norm_weight, bias, residual, prefetch, num_tokens)
    return run(*arrays, eps=eps, activation=activation, out_dtype=dtype, **extra)


def linear_partial(
    x: Float[Array, "T D"],
    kernel: Float[Array, "N D"],
    *,
    prefetch: Array | None = None,
    num_tokens: Int[Array, ""] | None = None,
    implementation: str = "auto",
    config: MosaicConfig | None = None,
) -> Float[Array, "S T N"]:
    """Return partial sums of `x @ kernel.T`, for who reads them to add up over S.

    Args:
        x: the tokens. NaN in one of them (padding) reaches no other.
        kernel: the weights in Hugging Face's layout, [out, in].
        prefetch, num_tokens: see `linear`.
        implementation: `"mosaic"` (Hopper, bfloat16; float32 sums), `"whole"` (what `linear` gives, S = 1), or
            `"auto"`: `"mosaic"` for few tokens where `linear` would choose it and the program is traced for a mesh of
            such GPUs.
        config: the Mosaic kernel's tiles, for tuning, with `implementation="mosaic"`; S is its `split_k`.

    Raises:
        ValueError: shapes that do not fit together, an unknown implementation, or a config that does not fit.
        NotImplementedError: what the Mosaic kernel cannot do.
    """
    _check_shapes(x, kernel, None, None, None, gated=False)
    if config is not None and implementation != "mosaic":
        raise ValueError(f"linear_partial: config is for implementation='mosaic', not {implementation!r}")
    if implementation == "auto":
        splits = mesh_platform() == "gpu" and has_triton()
        splits = splits and x.shape[0] <= _few_tokens(kernel) and _choice_on_gpu(x, kernel, None)[0] == "mosaic"
        implementation = "mosaic" if splits else "whole"
    if implementation == "whole":
        return linear(x, kernel, prefetch=prefetch, num_tokens=num_tokens)[None]
    if implementation != "mosaic":
        raise ValueError(f"linear_partial has no implementation {implementation!r}; use one of auto, mosaic, whole")
    from qwen2_kernels.linear.mosaic import linear_partial_mosaic

    return linear_partial_mosaic(x, kernel, num_tokens, config=config)


def skips_padding(dtype: jnp.dtype) -> bool:
    """Return whether, for many tokens of `dtype`, this machine takes no time for those behind `num_tokens`.

    That is what the Mosaic kernel does: on Hopper, in bfloat16.
    """
    return dtype == jnp.bfloat16 and jax.default_backend() == "gpu" and has_triton() and unsupported_gpu() is None


def _few_tokens(kernel: Array) -> int:
    """Return up to how many tokens the Mosaic kernel beats XLA's product with `kernel`."""
    return 64 if kernel.size >= LARGE_KERNEL else 128


def _choice_on_gpu(x: Array, kernel: Array, activation: str | None) -> tuple[str, str]:
    """Return the implementation for a GPU and why."""
    if not x.dtype == kernel.dtype == jnp.bfloat16:
        return "xla", f"{x.dtype} with {kernel.dtype}"
    if x.shape[0] <= GEMV_MAX_TOKENS:
        return "triton", "one token"
    key = tuning_key(x.shape[0], kernel.shape[-2], kernel.shape[-1], gated=activation is not None)
    if tuned("linear", key, Config, None) is not None:
        return "triton", "tuned"
    is_between = activation is None and _few_tokens(kernel) < x.shape[0] < MANY_TOKENS
    if is_between or kernel.shape[-2] >= MOSAIC_MAX_FEATURES:
        return "xla", f"{x.shape[0]} tokens, {kernel.shape[-2]} features"
    reason = supported(x, kernel, activation)
    return ("mosaic", "on Hopper") if reason is None else ("xla", reason)


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
