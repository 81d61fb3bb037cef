"""`linear` of one token: each program multiplies a few rows of the kernel with the token and adds up along them.

Nothing but the kernel's read matters here. A program keeps its products apart, [BLOCK_N, BLOCK_K] of them, until the
loop is over, so that warps meet once; small programs, many to a multiprocessor, keep enough reads in flight.
"""

import triton
import triton.language as tl

from qwen2_kernels.linear.triton_epilogue import activate, load_addend, load_weights, prefetch


@triton.jit
def gemv_kernel(
    x_ptr,
    kernel_ptr,
    norm_ptr,
    bias_ptr,
    residual_ptr,
    stream_ptr,
    next_ptr,
    out_ptr,
    total_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_STREAM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    PREFETCH_HALF: tl.constexpr,
    STAGES: tl.constexpr,
    BYPASS_L1: tl.constexpr,
):
    """x [K], kernel [N, K] or [2, N, K], norm [K], bias and residual [N], out [N]; grid (N / BLOCK_N).

    With a stream [K], what is multiplied is `x + stream`, which is also written to total [K].
    """
    GATED: tl.constexpr = ACTIVATION != ""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    addend = load_addend(bias_ptr, residual_ptr, rows, rows < N, HAS_BIAS, HAS_RESIDUAL)
    # Rows past the end read the last one again: a mask would stand in the way of wide loads.
    offsets = tl.minimum(rows, N - 1).to(tl.int64) * K
    products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up_products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for step in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=STAGES):
        columns = step * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = columns < K
        tile = kernel_ptr + offsets[:, None] + columns[None, :]
        mask = inside[None, :]
        weights = load_weights(tile, mask, BYPASS_L1)
        if GATED:
            ups = load_weights(tile + N * K, mask, BYPASS_L1)
        x = tl.load(x_ptr + columns, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if HAS_STREAM:
            x += tl.load(stream_ptr + columns, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
            tl.store(total_ptr + columns, x.to(total_ptr.dtype.element_ty), mask=inside & (tl.program_id(0) == 0))
        if HAS_NORM:
            squares += x * x
            x *= tl.load(norm_ptr + columns, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        products += weights.to(tl.float32) * x[None, :]
        if GATED:
            up_products += ups.to(tl.float32) * x[None, :]
    prefetch(next_ptr, tl.program_id(0), PREFETCH, PREFETCH_HALF)
    y = tl.sum(products, axis=1)
    scale = 1.0
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(squares, axis=0) / K + EPS)
        y *= scale
    if GATED:
        y = activate(y, ACTIVATION) * (tl.sum(up_products, axis=1) * scale)
    tl.store(out_ptr + rows, (y + addend).to(out_ptr.dtype.element_ty), mask=rows < N)
