"""`linear` in Triton: which kernel, its grid, and what XLA does before and behind it."""

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qwen2_kernels.hopper_config import unsupported_gpu
from qwen2_kernels.launch import triton_call
from qwen2_kernels.linear.activations import ACTIVATIONS
from qwen2_kernels.linear.config import Config, default_config, tuning_key
from qwen2_kernels.linear.triton_dot import dot_kernel
from qwen2_kernels.linear.triton_gemv import gemv_kernel
from qwen2_kernels.linear.xla import add_epilogue
from qwen2_kernels.rms_norm.xla import rms_norm_xla
from qwen2_kernels.tuning import tuned


def norm_gemv(
    x: Array,
    norm_weight: Array,
    kernel: Array,
    stream: Array | None,
    bias: Array | None,
    prefetch: Array | None,
    num_tokens: Array | None,
    *,
    eps: float,
    activation: str | None,
    partial: bool,
) -> tuple[Array, Array]:
    """Multiply one token, normalised after `stream` was added to it, by a kernel; also return that sum.

    `NotImplementedError` for several tokens or partial sums; shapes and dtypes as `linear_triton` takes them.
    """
    if x.ndim == 3 or x.shape[0] > 1:
        raise NotImplementedError(f"norm_linear: 'triton' takes one token, not {x.shape}")
    tokens, size = x.shape
    _check_dtypes(x, kernel)
    config = _config((tokens, kernel.shape[-2], size), gated=activation is not None)
    more = (norm_weight, bias, None, stream, prefetch)
    out, total = _run_gemv(x, kernel, *more, eps=eps, activation=activation, out_dtype=x.dtype, config=config)
    return out[None] if partial else out, x if stream is None else total


def linear_triton(
    x: Array,
    kernel: Array,
    norm_weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    prefetch: Array | None,
    num_tokens: Array | None = None,
    *,
    eps: float,
    activation: str | None,
    out_dtype: jnp.dtype,
    config: Config | None = None,
) -> Array:
    """See `api.linear`; `num_tokens` is ignored.

    Raises:
        NotImplementedError: dtypes other than bfloat16 and float32, or a kernel's that is not `x`'s; several tokens
            with a multiply-reduce config.
    """
    _check_dtypes(x, kernel)
    tokens, features = x.shape[0], kernel.shape[-2]
    config = config or _config((tokens, features, x.shape[1]), gated=activation is not None)
    if config.block_t == 1 and tokens > 1:
        raise NotImplementedError(f"linear: the multiply-reduce kernel takes one token, not {tokens}")
    if norm_weight is not None and (config.split_k > 1 or not config.fuse_norm):
        x, norm_weight = rms_norm_xla(x, norm_weight, None, eps=eps)[0], None
    if config.block_t == 1:
        more = (norm_weight, bias, residual, None, prefetch)
        return _run_gemv(x, kernel, *more, eps=eps, activation=activation, out_dtype=out_dtype, config=config)[0]
    grid = (-(-tokens // config.block_t), -(-features // config.block_n), config.split_k)
    run = functools.partial(
        triton_call,
        *_operands(x, kernel, norm_weight, bias, residual, prefetch),
        kernel=dot_kernel,
        grid=grid,
        T=tokens,
        BLOCK_T=config.block_t,
        SLICES=config.slices_k,
        SPLIT_K=config.split_k,
        HAS_NORM=norm_weight is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        **_options(kernel, prefetch, config, math.prod(grid), eps, activation),
    )
    if config.split_k == 1:
        return run(out_type=jax.ShapeDtypeStruct((tokens, features), out_dtype))
    partials = (config.split_k, *kernel.shape[:-2], tokens, features)
    partial_sums = run(out_type=jax.ShapeDtypeStruct(partials, jnp.float32))
    # One addition after another, in order, is one elementwise fusion with the epilogue.
    total = functools.reduce(operator.add, (partial_sums[part] for part in range(config.split_k)))
    if activation is not None:
        total = ACTIVATIONS[activation](total[0]) * total[1]
    return add_epilogue(total, bias, residual, out_dtype)


def _run_gemv(
    x: Array,
    kernel: Array,
    *more: Array | None,
    eps: float,
    activation: str | None,
    out_dtype: jnp.dtype,
    config: Config,
) -> tuple[Array, Array]:
    """Run the multiply-reduce kernel on norm, bias, residual, stream and prefetch; return its result and total."""
    norm_weight, bias, residual, stream, prefetch = more
    features = kernel.shape[-2]
    programs = -(-features // config.block_n)
    total = (1, 1) if stream is None else x.shape
    return triton_call(
        *_operands(x, kernel, *more),
        kernel=gemv_kernel,
        out_type=(jax.ShapeDtypeStruct((1, features), out_dtype), jax.ShapeDtypeStruct(total, x.dtype)),
        grid=(programs,),
        HAS_NORM=norm_weight is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_STREAM=stream is not None,
        STAGES=config.num_stages,
        BYPASS_L1=config.bypass_l1,
        **_options(kernel, prefetch, config, programs, eps, activation),
    )


def _operands(x: Array, *more: Array | None) -> tuple[Array, ...]:
    """An operand that is not there is never read: `x` stands in for it."""
    return (x, *(x if array is None else array for array in more))


def _options(
    kernel: Array, prefetch: Array | None, config: Config, programs: int, eps: float, activation: str | None
) -> dict[str, Any]:
    return {
        "N": kernel.shape[-2],
        "K": kernel.shape[-1],
        "EPS": eps,
        "ACTIVATION": activation or "",
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        **_prefetch_options(prefetch, config, programs),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _check_dtypes(x: Array, kernel: Array) -> None:
    if x.dtype != kernel.dtype or x.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(
            f"linear: 'triton' multiplies bfloat16 or float32, not x {x.dtype} with kernel {kernel.dtype}"
        )


def _config(shape: tuple[int, int, int], *, gated: bool) -> Config:
    """Return the tuned or default tiles for (tokens, out features, in features)."""
    return tuned("linear", tuning_key(*shape, gated=gated), Config, default_config(*shape, gated=gated))


def _prefetch_options(array: Array | None, config: Config, programs: int) -> dict[str, int]:
    """Return what each program asks for, a multiple of 16 bytes, and how far behind the gate the up kernel lies.

    GPUs before Hopper have no such request.
    """
    if array is None or unsupported_gpu() is not None:
        return {"PREFETCH": 0, "PREFETCH_HALF": 0}
    size = array.size * array.dtype.itemsize
    half = size // 2 if array.ndim == 3 else 0
    # Half of the programs, rounded up, share a half: with less than it asked for, the last of them stays inside.
    wanted = min(config.prefetch_bytes, half or size)
    return {"PREFETCH": wanted // programs // 16 * 16, "PREFETCH_HALF": half}
