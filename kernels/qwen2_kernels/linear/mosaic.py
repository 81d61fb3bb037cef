"""`linear` of 2 and more tokens on Hopper: every multiprocessor streams its share of the kernel through shared memory.

In Pallas Mosaic GPU. A program of the grid runs a warpgroup that copies tiles of the kernel and of the tokens to a
ring in shared memory with TMA, and one to three that multiply them on the tensor cores (wgmma): tokens are the
product's rows, 64 or 128 a warpgroup, and rows of the kernel its columns. Any multiple of 8 of them makes a tile, so
that one wave of programs gets equal shares. Where there are too few rows for that, programs share K, and their float32
partial sums are added by who reads them. With few tokens the kernel's bytes are the limit, and with the last of them
on their way, programs ask for what the next projection reads. With many the tensor cores are: two programs then share
each tile of the kernel, and the ring fills with the next tiles while silu(gate) * up is computed and stored.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen2_kernels.linear.mosaic_config import ALIGNMENT, MAX_ACCUMULATORS, MosaicConfig, default_config
from qwen2_kernels.linear.mosaic_program import Plan, program
from qwen2_kernels.linear.mosaic_support import supported
from qwen2_kernels.linear.xla import add_epilogue
from qwen2_kernels.lowering import lowered_once
from qwen2_kernels.rms_norm.xla import rms_norm_xla


def linear_mosaic(
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
    config: MosaicConfig | None = None,
) -> Array:
    """See `api.linear`; `prefetch` is ignored. XLA normalises before and adds partial sums, bias and residual behind.

    Raises:
        NotImplementedError: what `supported` gives a reason for: dtypes other than bfloat16, features that 16 (N) and
            64 (D) do not divide, an activation other than `"silu"`, a GPU that is not of compute capability 9.0.
        ValueError: a config that does not fit.
    """
    if (reason := supported(x, kernel, activation)) is not None:
        raise NotImplementedError(f"linear: {reason}")
    config = config or default_config(x.shape[0], kernel.shape[-2], x.shape[1], gated=activation is not None)
    if norm_weight is not None:
        x, _ = rms_norm_xla(x, norm_weight, None, eps=eps)
    if config.split_k == 1 and bias is None and residual is None:
        return _run(x, kernel, num_tokens, out_dtype=out_dtype, config=config)
    sums = _run(x, kernel, num_tokens, out_dtype=jnp.dtype(jnp.float32), config=config)
    if config.split_k > 1:
        sums = add_partial_sums(sums)
    return add_epilogue(sums, bias, residual, out_dtype)


def linear_partial_mosaic(
    x: Array, kernel: Array, num_tokens: Array | None = None, *, config: MosaicConfig | None = None
) -> Array:
    """Return float32 [S, T, N], whose sum over S is x [T, D] @ kernel.T [D, N]; S depends on the shapes.

    Raises:
        NotImplementedError: what `supported` gives a reason for.
        ValueError: a config that does not fit.
    """
    if (reason := supported(x, kernel)) is not None:
        raise NotImplementedError(f"linear: {reason}")
    config = config or default_config(x.shape[0], kernel.shape[0], x.shape[1], gated=False)
    sums = _run(x, kernel, num_tokens, out_dtype=jnp.dtype(jnp.float32), config=config)
    return sums if config.split_k > 1 else sums[None]


def add_partial_sums(partial_sums: Array) -> Array:
    """Add [S, T, N] up, one after another: an elementwise fusion in a fixed order."""
    return functools.reduce(operator.add, (partial_sums[part] for part in range(partial_sums.shape[0])))


@functools.partial(jax.jit, static_argnames=("config", "out_dtype"))
def _run(x: Array, kernel: Array, num_tokens: Array | None, *, out_dtype: jnp.dtype, config: MosaicConfig) -> Array:
    """Return [T, N], gated if the kernel is [2, N, D]; with `split_k` > 1 float32 partial sums [split_k, T, N]."""
    tokens, gated = x.shape[0], kernel.ndim == 3
    if tokens > ALIGNMENT:
        x = jnp.pad(x, ((0, -tokens % ALIGNMENT), (0, 0)))
    plan = Plan(config=config, tokens=x.shape[0], out_features=kernel.shape[-2], in_features=x.shape[1], gated=gated)
    check(plan, out_dtype)
    shape = (x.shape[0], plan.out_features)
    out_type = jax.ShapeDtypeStruct((config.split_k, *shape) if config.split_k > 1 else shape, out_dtype)
    counted = () if num_tokens is None or plan.tiles_t == 1 else (num_tokens[None],)
    return _launch(x, kernel, *counted, plan=plan, out_type=out_type)[..., :tokens, :]


@functools.partial(lowered_once, static_argnames=("out_type", "plan"))
def _launch(x: Array, kernel: Array, *num_tokens: Array, plan: Plan, out_type: jax.ShapeDtypeStruct) -> Array:
    body = _some_tiles if num_tokens else program
    return make_kernel(plan, out_type, functools.partial(body, plan=plan))(x, kernel, *num_tokens)


def _some_tiles(x_gmem: Any, kernel_gmem: Any, num_tokens_gmem: Any, out_gmem: Any, **options: Any) -> None:
    program(x_gmem, kernel_gmem, out_gmem, num_tokens_gmem=num_tokens_gmem, **options)


def check(plan: Plan, out_dtype: jnp.dtype) -> None:
    """Raise `ValueError` for a plan that the kernel cannot carry out."""
    config = plan.config
    if plan.gated and config.split_k > 1:
        raise ValueError(f"linear: split_k={config.split_k} is for projections that are not gated; use 1")
    if (needed := config.accumulators(gated=plan.gated)) > MAX_ACCUMULATORS:
        raise ValueError(
            f"linear: block_n={config.block_n} with rows={config.rows} needs {needed} registers for sums; at most "
            f"{MAX_ACCUMULATORS} are there"
        )
    if out_dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"linear: out_dtype bfloat16 or float32, not {out_dtype}")


def make_kernel(plan: Plan, out_type: jax.ShapeDtypeStruct, body: Any, **scratch: Any) -> Any:
    """Return the launch of `body` for `plan`, which gets the arrays, and by name the scratch of `Shared` and more."""
    config = plan.config
    smem = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=swizzled(64, jnp.dtype(jnp.bfloat16)))
    rows = config.block_n * (1 + plan.gated)
    clustered = config.cluster > 1
    empty = functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",)) if clustered else plgpu.Barrier
    out_dtype = jnp.dtype(out_type.dtype)
    columns = config.piece(out_dtype.itemsize)
    can_swizzle = columns * out_dtype.itemsize in (32, 64, 128) and plan.out_features % columns == 0
    out_transforms = swizzled(columns, out_dtype) if can_swizzle else ()
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(plan.clusters,),
        grid_names=("program",),
        cluster=(config.cluster,) if clustered else (),
        cluster_names=("cluster",) if clustered else (),
        num_threads=config.consumers + 1,
        thread_name="warpgroup",
        kernel_name="hopper_linear",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        scratch_types=dict(
            x=smem((config.token_rows(plan.tokens), config.block_k)),
            weights=smem((config.stages, rows, config.block_k)),
            out=plgpu.SMEM((2, config.token_tile, columns), out_dtype, transforms=out_transforms),
            full=plgpu.Barrier(num_arrivals=2 + plan.gated, num_barriers=config.stages),
            empty=empty(num_arrivals=config.consumers, num_barriers=config.stages),
            **scratch,
        ),
    )


def swizzled(columns: int, dtype: jnp.dtype) -> tuple[Any, ...]:
    """Return a layout of shared memory without bank conflicts, for rows of 32, 64 or 128 bytes."""
    return (
        # Pyright takes them for abstract: JAX's own base class has a method that they do not need.
        plgpu.TilingTransform((ALIGNMENT, columns)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(columns * dtype.itemsize),  # pyright: ignore[reportAbstractUsage]
    )
