"""`linear` of a few to a few hundred tokens: the kernel's rows are the left operand of the tensor cores' product.

    out^T [BLOCK_N, BLOCK_T] = kernel [BLOCK_N, K] @ x^T [K, BLOCK_T]

With the rows on the left, 8 to 256 tokens fit the product without padding to 64. Tiles of both operands pass through
shared memory, several in flight. Where N is small, programs get enough to read by splitting K: among a program's
warps (SLICES: the product has a batch axis of K's slices) or among programs (SPLIT_K: float32 partial sums).
"""

import triton
import triton.language as tl

from qwen2_kernels.linear.triton_epilogue import activate, prefetch


@triton.jit
def dot_kernel(
    x_ptr,
    kernel_ptr,
    norm_ptr,
    bias_ptr,
    residual_ptr,
    next_ptr,
    out_ptr,
    T,
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
    BLOCK_T: tl.constexpr,
    SLICES: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """x [T, K], kernel [N, K] or [2, N, K], norm [K], bias [N], residual [T, N].

    out is [T, N], or with SPLIT_K > 1 float32 [SPLIT_K, T, N], gated [SPLIT_K, 2, T, N], without epilogue.
    Grid (T / BLOCK_T, N / BLOCK_N, SPLIT_K): programs that share rows run side by side and read them once.
    """
    GATED: tl.constexpr = ACTIVATION != ""
    STEP: tl.constexpr = SLICES * BLOCK_K
    STEPS: tl.constexpr = tl.cdiv(tl.cdiv(K, STEP), SPLIT_K)
    EVEN: tl.constexpr = STEPS * STEP * SPLIT_K == K
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(2) * (STEPS * STEP)
    # Rows past the end read the last one again; tokens past the end count as zeros.
    row_offsets = tl.minimum(rows, N - 1).to(tl.int64) * K
    token_offsets = tokens * K
    is_token = tokens < T
    if SLICES == 1:
        columns = tl.arange(0, BLOCK_K)[None, :]
        row_offsets = row_offsets[:, None]
        token_offsets = token_offsets[:, None]
        is_token = is_token[:, None]
        acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        up_acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        squares = tl.zeros((BLOCK_T,), tl.float32)
    else:
        columns = (tl.arange(0, SLICES) * BLOCK_K)[:, None, None] + tl.arange(0, BLOCK_K)[None, None, :]
        row_offsets = row_offsets[None, :, None]
        token_offsets = token_offsets[None, :, None]
        is_token = is_token[None, :, None]
        acc = tl.zeros((SLICES, BLOCK_N, BLOCK_T), tl.float32)
        up_acc = tl.zeros((SLICES, BLOCK_N, BLOCK_T), tl.float32)
        squares = tl.zeros((SLICES, BLOCK_T), tl.float32)
    for step in tl.range(0, STEPS):
        k = first + step * STEP + columns
        x_mask = is_token if EVEN else is_token & (k < K)
        x = tl.load(x_ptr + token_offsets + k, mask=x_mask, other=0.0, eviction_policy="evict_last")
        if HAS_NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1 if SLICES == 1 else 2)
            weight = tl.load(norm_ptr + k, mask=None if EVEN else k < K, other=None if EVEN else 0.0)
            x = (wide * weight.to(tl.float32)).to(x.dtype)
        x = tl.trans(x, (1, 0)) if SLICES == 1 else tl.trans(x, (0, 2, 1))
        if EVEN:
            weights = tl.load(kernel_ptr + row_offsets + k, eviction_policy="evict_first")
        else:
            weights = tl.load(kernel_ptr + row_offsets + k, mask=k < K, other=0.0, eviction_policy="evict_first")
        acc = tl.dot(weights, x, acc, input_precision="ieee")
        if GATED:
            if EVEN:
                weights = tl.load(kernel_ptr + N * K + row_offsets + k, eviction_policy="evict_first")
            else:
                weights = tl.load(
                    kernel_ptr + N * K + row_offsets + k, mask=k < K, other=0.0, eviction_policy="evict_first"
                )
            up_acc = tl.dot(weights, x, up_acc, input_precision="ieee")
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    prefetch(next_ptr, program, PREFETCH, PREFETCH_HALF)
    if SLICES > 1:
        acc = tl.sum(acc, axis=0)
        up_acc = tl.sum(up_acc, axis=0)
        squares = tl.sum(squares, axis=0)
    out_offsets = tokens[None, :].to(tl.int64) * N + rows[:, None]
    mask = (rows < N)[:, None] & (tokens < T)[None, :]
    if SPLIT_K > 1:
        PARTS: tl.constexpr = 2 if GATED else 1
        part = out_ptr + tl.program_id(2).to(tl.int64) * PARTS * T * N
        tl.store(part + out_offsets, acc, mask=mask)
        if GATED:
            tl.store(part + T * N + out_offsets, up_acc, mask=mask)
    else:
        if HAS_NORM:
            scale = tl.rsqrt(squares / K + EPS)[None, :]
            acc *= scale
            up_acc *= scale
        if GATED:
            acc = activate(acc, ACTIVATION) * up_acc
        if HAS_BIAS:
            acc += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
        if HAS_RESIDUAL:
            acc += tl.load(residual_ptr + out_offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + out_offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)
