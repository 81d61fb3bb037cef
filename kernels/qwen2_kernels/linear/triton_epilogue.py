"""What both Triton kernels of `linear` do behind their loop."""

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
def prefetch(next_ptr, program, NUM_BYTES: tl.constexpr):
    """Ask for this program's share of what the next launch reads first, so that memory does not idle in between."""
    if NUM_BYTES > 0:
        address = next_ptr.to(tl.int64) + program.to(tl.int64) * NUM_BYTES
        size = tl.full((), NUM_BYTES, tl.int32)
        tl.inline_asm_elementwise(_PREFETCH, "=r,l,r", [address, size], dtype=tl.int32, is_pure=False, pack=1)
