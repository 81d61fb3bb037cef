"""Asks for the first columns of a kernel while a short launch before its projection leaves memory idle.

The Hopper kernel of `linear` reads all rows at once, each program a few of them from their first column on. So what
helps it is the beginning of every row, not that of the array.
"""

import math
from typing import Any

import triton
import triton.language as tl
from jax import Array

from qwen2_kernels.hopper_config import unsupported_gpu

MIN_TOKENS, MAX_TOKENS = 2, 128
"""Tokens of a step whose projections wait for memory and read all rows at once: one token's take them in turn."""
NUM_BYTES = 6 << 20
"""What an H100 reads while a norm or a cache write runs, launches included."""
LINE = 128
"""Bytes that memory is read in."""
PROGRAM_ROWS = 256
"""Rows that one program of a launch asks for."""

_PREFETCH: Any = tl.constexpr("""{
    cp.async.bulk.prefetch.L2.global [$1], $2;
    mov.u32 $0, 0;
}""")


@triton.jit
def prefetch_rows(
    array_ptr,
    program,
    NUM_ROWS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    NUM_BYTES: tl.constexpr,
    PROGRAM_ROWS: tl.constexpr,
):
    """Ask for the first NUM_BYTES of this program's rows; those past the end ask for the last row's again."""
    rows = tl.minimum(program * PROGRAM_ROWS + tl.arange(0, PROGRAM_ROWS), NUM_ROWS - 1)
    addresses = array_ptr.to(tl.int64) + rows.to(tl.int64) * ROW_BYTES
    sizes = tl.full((PROGRAM_ROWS,), NUM_BYTES, tl.int32)
    tl.inline_asm_elementwise(_PREFETCH, "=r,l,r", [addresses, sizes], dtype=tl.int32, is_pure=False, pack=1)


def prefetch_programs(array: Array | None, tokens: int) -> tuple[int, dict[str, int]]:
    """Return how many programs a launch for `tokens` tokens has besides its own, and the sizes that they need.

    There are none without an array [..., N, D], for one token or many, or on a GPU that cannot be asked.
    """
    none = {"NEXT_ROWS": 0, "NEXT_ROW_BYTES": 0, "NEXT_BYTES": 0, "NEXT_PROGRAM_ROWS": PROGRAM_ROWS}
    if array is None or not MIN_TOKENS <= tokens <= MAX_TOKENS or unsupported_gpu() is not None:
        return 0, none
    rows, row_bytes = math.prod(array.shape[:-1]), array.shape[-1] * array.dtype.itemsize
    size = min(max(NUM_BYTES // rows // LINE * LINE, LINE), row_bytes)
    if row_bytes % 16 or size % 16:
        return 0, none
    return -(-rows // PROGRAM_ROWS), none | {"NEXT_ROWS": rows, "NEXT_ROW_BYTES": row_bytes, "NEXT_BYTES": size}
