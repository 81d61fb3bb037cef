"""`rms_norm` in Triton: a program holds one token in registers, so that each array is read or written once."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from qwen2_kernels.adapted import Adapted
from qwen2_kernels.launch import triton_call


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    delta_ptr,
    scale_bank_ptr,
    scale_rows_ptr,
    normed_ptr,
    total_ptr,
    part_size,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_ADAPTED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x [PARTS, T, D], residual, delta, normed and total [T, D], weight [D]; part_size is T * D; grid (T).

    BLOCK_D is D's next power of two: the columns past D are zeros, which add nothing to the mean.
    """
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    offsets = tl.program_id(0).to(tl.int64) * D + columns
    # All reads start before the first of them is needed.
    total = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    for part in tl.static_range(1, PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(x_ptr + part * part_size + offsets, mask=inside, other=0.0).to(tl.float32)
    if IS_ADAPTED:
        row = tl.load(scale_rows_ptr + tl.program_id(0))
        is_scaled = inside & (row >= 0)
        total *= tl.load(scale_bank_ptr + row.to(tl.int64) * D + columns, mask=is_scaled, other=1.0)
        total += tl.load(delta_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(total_ptr + offsets, total.to(total_ptr.dtype.element_ty), mask=inside)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / D + EPS)
    tl.store(normed_ptr + offsets, (total * scale * weight).to(normed_ptr.dtype.element_ty), mask=inside)


def rms_norm_triton(
    x: Array, weight: Array, residual: Array | None, adapted: Adapted | None = None, *, eps: float
) -> tuple[Array, Array]:
    """See `api.rms_norm`.

    Raises:
        NotImplementedError: `x` in another dtype than bfloat16, float16 or float32.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"rms_norm: 'triton' takes bfloat16, float16 or float32, not {x.dtype}")
    tokens, size = x.shape[-2:]
    block = 1 << (size - 1).bit_length()
    result = jax.ShapeDtypeStruct((tokens, size), weight.dtype if x.ndim == 3 else x.dtype)
    return triton_call(
        x,
        weight,
        # What is not there is never read: `x` stands in for it.
        x if residual is None else residual,
        *((x, x, x) if adapted is None else (adapted.delta, adapted.scale_bank, adapted.scale_rows)),
        kernel=rms_norm_kernel,
        out_type=(result, result),
        grid=(tokens,),
        # Sixteen features a thread, two wide reads of each array: enough in flight for one token as for thousands.
        num_warps=min(max(block // 512, 1), 16),
        num_stages=1,
        part_size=tokens * size,
        PARTS=x.shape[0] if x.ndim == 3 else 1,
        D=size,
        EPS=eps,
        HAS_RESIDUAL=residual is not None,
        IS_ADAPTED=adapted is not None,
        BLOCK_D=block,
    )
