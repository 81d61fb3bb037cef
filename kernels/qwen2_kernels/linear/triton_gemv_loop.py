"""`linear` of one token with as many programs as the GPU holds at once, each of which walks over many tiles.

Reads of the next tiles are in flight while a tile is added up, the token is read and normalised once where a tile holds
whole rows, and all programs end together: what they prefetch then comes while nothing else is read.
"""

import triton
import triton.language as tl

from qwen2_kernels.linear.triton_epilogue import activate, load_addend, load_weights, prefetch


@triton.jit
def gemv_loop_kernel(
    x_ptr,
    kernel_ptr,
    norm_ptr,
    bias_ptr,
    residual_ptr,
    next_ptr,
    out_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    PREFETCH_HALF: tl.constexpr,
    STAGES: tl.constexpr,
    BYPASS_L1: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """As `gemv_kernel`, with grid (PROGRAMS), at most N / BLOCK_N; program p has the tiles p, p + PROGRAMS, ..."""
    GATED: tl.constexpr = ACTIVATION != ""
    STEPS: tl.constexpr = tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up_products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    if STEPS == 1:
        columns = tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
        if HAS_NORM:
            norm = tl.load(norm_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
            x *= norm * tl.rsqrt(tl.sum(x * x, axis=0) / K + EPS)
    # One loop over the steps of all tiles, so that the reads of a tile do not wait for the one before.
    for i in tl.range(0, tl.cdiv(tl.cdiv(N, BLOCK_N) - program, PROGRAMS) * STEPS, num_stages=STAGES):
        rows = (program + i // STEPS * PROGRAMS) * BLOCK_N + tl.arange(0, BLOCK_N)
        columns = i % STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = columns < K
        # Rows past the end read the last one again: a mask would stand in the way of wide loads.
        tile = kernel_ptr + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * K + columns[None, :]
        mask = inside[None, :]
        weights = load_weights(tile, mask, BYPASS_L1)
        if GATED:
            ups = load_weights(tile + N * K, mask, BYPASS_L1)
        if STEPS == 1:
            addend = load_addend(bias_ptr, residual_ptr, rows, rows < N, HAS_BIAS, HAS_RESIDUAL)
            y = tl.sum(weights.to(tl.float32) * x[None, :], axis=1)
            if GATED:
                y = activate(y, ACTIVATION) * tl.sum(ups.to(tl.float32) * x[None, :], axis=1)
            tl.store(out_ptr + rows, (y + addend).to(out_ptr.dtype.element_ty), mask=rows < N)
        else:
            x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            if HAS_NORM:
                squares += x * x
                x *= tl.load(norm_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            products += weights.to(tl.float32) * x[None, :]
            if GATED:
                up_products += ups.to(tl.float32) * x[None, :]
            if i % STEPS == STEPS - 1:
                addend = load_addend(bias_ptr, residual_ptr, rows, rows < N, HAS_BIAS, HAS_RESIDUAL)
                scale = tl.rsqrt(tl.sum(squares, axis=0) / K + EPS) if HAS_NORM else 1.0
                y = tl.sum(products, axis=1) * scale
                if GATED:
                    y = activate(y, ACTIVATION) * (tl.sum(up_products, axis=1) * scale)
                tl.store(out_ptr + rows, (y + addend).to(out_ptr.dtype.element_ty), mask=rows < N)
                products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
                up_products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
                squares = tl.zeros((BLOCK_K,), tl.float32)
    prefetch(next_ptr, program, PREFETCH, PREFETCH_HALF)
