"""What the Triton kernels of `linear` have in common in front of and behind their loop."""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Return the activation called `ACTIVATION` of `x`, float32."""
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # tanh(u) = 2 sigmoid(2 u) - 1
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return y


@triton.jit
def load_addend(
    bias_ptr,
    residual_ptr,
    rows,
    mask,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Return bias + residual of one token's `rows`, float32, zeros where there is neither.

    To be called before the loop: what is read behind it is waited for with nothing else under way.
    """
    addend = tl.zeros(rows.shape, tl.float32)
    if HAS_BIAS:
        addend += tl.load(bias_ptr + rows, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        addend += tl.load(residual_ptr + rows, mask=mask, other=0.0).to(tl.float32)
    return addend


@triton.jit
def load_weights(pointers, mask, BYPASS_L1: tl.constexpr):
    """Read a tile that no other program reads, past the first-level cache or as the first to leave the caches."""
    if BYPASS_L1:
        weights = tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
    else:
        weights = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")
    return weights


# One thread of the program asks for `size` bytes at an address; the request outlives the program.
_PREFETCH: Any = tl.constexpr("""{
    .reg .pred first;
    .reg .u32 thread;
    mov.u32 thread, %tid.x;
    setp.eq.u32 first, thread, 0;
    @first cp.async.bulk.prefetch.L2.global [$1], $2;
    mov.u32 $0, 0;
}""")


@triton.jit
def prefetch(next_ptr, program, NUM_BYTES: tl.constexpr, HALF: tl.constexpr):
    """Ask for this program's share of what the next launch reads first, so that memory does not idle in between.

    Programs take turns at the start of the array and at `HALF` bytes behind it, where the up kernel lies; 0 is no half.
    """
    if NUM_BYTES > 0:
        address = next_ptr.to(tl.int64)
        if HALF > 0:
            address += (program % 2).to(tl.int64) * HALF + (program // 2).to(tl.int64) * NUM_BYTES
        else:
            address += program.to(tl.int64) * NUM_BYTES
        size = tl.full((), NUM_BYTES, tl.int32)
        tl.inline_asm_elementwise(_PREFETCH, "=r,l,r", [address, size], dtype=tl.int32, is_pure=False, pack=1)
