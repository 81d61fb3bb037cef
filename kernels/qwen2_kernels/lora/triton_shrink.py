"""The first product of `lora`: every item's page times its segment's tokens, [rows, C, SPLITS, RANKS] in float32.

What SPLITS programs compute along K stays apart: whoever reads it adds it up, in order, so that results repeat.
"""

import triton
import triton.language as tl

from qwen2_kernels.lora.triton_common import RANKS


@triton.jit
def shrink_vector_kernel(
    x_ptr,
    a_ptr,
    order_ptr,
    starts_ptr,
    counts_ptr,
    rows_ptr,
    pages_ptr,
    modules_ptr,
    weights_ptr,
    num_items_ptr,
    ranks_ptr,
    K: tl.constexpr,
    SLICES: tl.constexpr,
    FIRST_MODULE: tl.constexpr,
    SPLITS: tl.constexpr,
    LOOP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one module's matrix, held in registers, times one token after another.

    x [T, K], a [P, SLICES, RANKS, K], ranks [rows, SLICES, SPLITS, RANKS]; grid (work). Without LOOP there is a
    program for each item of the tables; the padding has no modules.
    """
    end = tl.program_id(0) + 1
    if LOOP:
        end = tl.load(num_items_ptr) * (SPLITS * SLICES)
    for work in tl.range(tl.program_id(0), end, tl.num_programs(0), num_stages=1):  # pyright: ignore
        split = work % SPLITS
        part = work // SPLITS % SLICES
        item = work // (SPLITS * SLICES)
        # One round of reads: what they give does not lead to another table.
        start = tl.load(starts_ptr + item)
        count = tl.load(counts_ptr + item)
        row = tl.load(rows_ptr + item)
        page = tl.load(pages_ptr + item).to(tl.int64)
        modules = tl.load(modules_ptr + item)
        weight = tl.load(weights_ptr + item)
        has_module = (modules >> (FIRST_MODULE + part)) & 1
        rank = tl.arange(0, RANKS)
        columns = split * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = columns < K
        tile = a_ptr + (page * SLICES + part) * (RANKS * K) + rank[:, None] * K + columns[None, :]
        a = tl.load(tile, mask=inside[None, :] & (has_module == 1), other=0.0, eviction_policy="evict_first")
        for index in tl.range(0, count * has_module, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
            token = tl.load(order_ptr + start + index).to(tl.int64)
            x = tl.load(x_ptr + token * K + columns, mask=inside, other=0.0).to(tl.float32)
            product = tl.sum(a.to(tl.float32) * x[None, :], axis=1) * weight
            cells = ranks_ptr + (((row + index) * SLICES + part) * SPLITS + split) * RANKS
            tl.store(cells + rank, product)


@triton.jit
def shrink_dot_kernel(
    x_ptr,
    a_ptr,
    order_ptr,
    starts_ptr,
    counts_ptr,
    rows_ptr,
    pages_ptr,
    modules_ptr,
    weights_ptr,
    num_items_ptr,
    ranks_ptr,
    K: tl.constexpr,
    SLICES: tl.constexpr,
    FIRST_MODULE: tl.constexpr,
    SPLITS: tl.constexpr,
    LOOP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All tokens of a segment times the rows of SLICES / PARTS modules, BLOCK_R with padding; see the kernel above."""
    end = tl.program_id(0) + 1
    if LOOP:
        end = tl.load(num_items_ptr) * (SPLITS * PARTS)
    for work in tl.range(tl.program_id(0), end, tl.num_programs(0), num_stages=1):  # pyright: ignore
        split = work % SPLITS
        part = work // SPLITS % PARTS
        item = work // (SPLITS * PARTS)
        # One round of reads: what they give does not lead to another table.
        start = tl.load(starts_ptr + item)
        count = tl.load(counts_ptr + item)
        row = tl.load(rows_ptr + item)
        page = tl.load(pages_ptr + item).to(tl.int64)
        modules = tl.load(modules_ptr + item)
        token = tl.arange(0, TILE)
        is_token = token < count
        rank = tl.arange(0, BLOCK_R)
        first_rank = part * (SLICES // PARTS * RANKS)
        has_module = (rank < SLICES // PARTS * RANKS) & (
            (modules >> (FIRST_MODULE + (first_rank + rank) // RANKS)) & 1 == 1
        )
        x_rows = tl.load(order_ptr + start + token, mask=is_token, other=0).to(tl.int64) * K
        a_rows = (page * (SLICES * RANKS) + first_rank + rank) * K
        total = tl.zeros((TILE, BLOCK_R), tl.float32)
        # An item of the padding has no tokens, and no tiles.
        for block in tl.range(0, tl.where(count > 0, NUM_BLOCKS, 0), num_stages=STAGES):
            columns = (split * NUM_BLOCKS + block) * BLOCK_K + tl.arange(0, BLOCK_K)
            inside = columns < K
            x = tl.load(x_ptr + x_rows[:, None] + columns[None, :], mask=is_token[:, None] & inside[None, :], other=0.0)
            a = tl.load(
                a_ptr + a_rows[:, None] + columns[None, :], mask=has_module[:, None] & inside[None, :], other=0.0
            )
            total = tl.dot(x, tl.trans(a), total, input_precision="ieee")
        total *= tl.load(weights_ptr + item)
        columns = ((first_rank + rank) // RANKS * SPLITS + split) * RANKS + rank % RANKS
        cells = (row + token)[:, None] * (SLICES * SPLITS * RANKS) + columns[None, :]
        tl.store(ranks_ptr + cells, total, mask=is_token[:, None] & has_module[None, :])
