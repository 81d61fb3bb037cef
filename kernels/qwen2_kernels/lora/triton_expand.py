"""The second product of `lora_delta`: each segment's first products times its pages' columns, and a bias row."""

import triton
import triton.language as tl

from qwen2_kernels.lora.triton_common import (
    RANKS,
    find_columns,
    find_factors,
    find_page_factors,
    find_tiles,
    load_page_ranks,
    load_ranks,
    load_row,
    load_segment,
)


@triton.jit
def expand_vector_kernel(
    ranks_ptr,
    b_ptr,
    bias_ptr,
    order_ptr,
    starts_ptr,
    items_ptr,
    vectors_ptr,
    first_pages_ptr,
    first_modules_ptr,
    pages_ptr,
    modules_ptr,
    num_segments_ptr,
    out_ptr,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
    FIRST_MODULE: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    LOOP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One tile of columns for a segment's tokens, one after another; the factors of a single page stay in registers.

    ranks [rows, SLICES, SPLITS, RANKS], b [P, RANKS, N], bias [V, N], out [T, N]; N is a block of WIDTH
    columns, or HEADS * (GROUP + 2) of them. Grid (work), PROGRAMS for a segment: without LOOP one for each tile of each
    segment of the tables; the padding has no tokens.
    """
    PER_BLOCK: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    end = tl.program_id(0) + 1
    if LOOP:
        end = tl.load(num_segments_ptr) * PROGRAMS
    for work in tl.range(tl.program_id(0), end, tl.num_programs(0), num_stages=1):  # pyright: ignore
        segment = work // PROGRAMS
        start, count, first, length = load_segment(segment, starts_ptr, items_ptr)  # pyright: ignore
        page = tl.load(first_pages_ptr + segment)
        modules = tl.load(first_modules_ptr + segment)
        part, tile, _ = find_tiles(work % PROGRAMS, HEADS, GROUP, PER_BLOCK, 1)
        columns, inside = find_columns(part, tile, GROUP, WIDTH, PER_BLOCK, BLOCK_N)
        bit = FIRST_MODULE + part
        bias = tl.zeros((BLOCK_N,), tl.float32)
        if HAS_BIAS:
            vector = tl.load(vectors_ptr + segment)
            bias = tl.load(bias_ptr + tl.maximum(vector, 0) * N + columns, mask=inside & (vector >= 0), other=0.0)
        if length <= 1:
            rows, has_module = find_page_factors(page, N), (modules >> bit) & 1 == 1
            b = tl.load(b_ptr + rows[:, None] + columns[None, :], mask=has_module & inside[None, :], other=0.0)
            for index in tl.range(0, count, num_stages=1):
                token = tl.load(order_ptr + start + index).to(tl.int64)
                cells_ptr = ranks_ptr + ((start * MAX_PAGES + index) * SLICES + part) * (SPLITS * RANKS)
                ranks = load_row(cells_ptr, has_module, SPLITS, BLOCK_S)
                total = bias + tl.sum(ranks[:, None] * b.to(tl.float32), axis=0)
                tl.store(out_ptr + token * N + columns, total.to(out_ptr.dtype.element_ty), mask=inside)
        elif MAX_PAGES > 1:
            for index in tl.range(0, count, num_stages=1):
                token = tl.load(order_ptr + start + index).to(tl.int64)
                total = bias
                for item in tl.range(0, length, num_stages=1):
                    rows, is_read = find_factors((pages_ptr + first, modules_ptr + first, length, bit), item, N, 1)
                    cells = b_ptr + rows[:, None] + columns[None, :]
                    b = tl.load(cells, mask=is_read[:, None] & inside[None, :], other=0.0)
                    has_module = (tl.load(modules_ptr + first + item) >> bit) & 1 == 1
                    cells_ptr = ranks_ptr + ((start * MAX_PAGES + item * count + index) * SLICES + part) * (
                        SPLITS * RANKS
                    )
                    ranks = load_row(cells_ptr, has_module, SPLITS, BLOCK_S)
                    total += tl.sum(ranks[:, None] * b.to(tl.float32), axis=0)
                tl.store(out_ptr + token * N + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _expand_tiles(
    cells_ptr,
    b_ptr,
    bias_ptr,
    out_ptr,
    page,
    has_module,
    listed,
    count,
    token,
    out_rows,
    vector,
    part,
    tile,
    end,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PAGES: tl.constexpr,
    IS_LONG: tl.constexpr,
):
    """Multiply a segment that has at most PAGES pages, or more if IS_LONG, tile after tile."""
    PER_BLOCK: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    DTYPE: tl.constexpr = b_ptr.dtype.element_ty
    if PAGES == 1:
        ranks = load_page_ranks(cells_ptr, has_module, count, token, SLICES, SPLITS).to(DTYPE)
        rows = find_page_factors(page, N)
        is_read = (rows >= 0) & has_module
    else:
        ranks = load_ranks(cells_ptr, listed, count, token, 0, SLICES, SPLITS, PAGES).to(DTYPE)
        rows, is_read = find_factors(listed, 0, N, PAGES)
    for index in tl.range(tile, end, num_stages=STAGES):
        columns, inside = find_columns(part, index, GROUP, WIDTH, PER_BLOCK, BLOCK_N)  # pyright: ignore
        b = tl.load(b_ptr + rows[:, None] + columns[None, :], mask=is_read[:, None] & inside[None, :], other=0.0)
        total = tl.dot(ranks, b, input_precision="ieee")
        if IS_LONG:
            for chunk in tl.range(1, tl.cdiv(listed[2], PAGES), num_stages=1):
                more_rows, is_more = find_factors(listed, chunk, N, PAGES)
                cells = b_ptr + more_rows[:, None] + columns[None, :]
                more = tl.load(cells, mask=is_more[:, None] & inside[None, :], other=0.0)
                some = load_ranks(cells_ptr, listed, count, token, chunk, SLICES, SPLITS, PAGES).to(DTYPE)
                total = tl.dot(some, more, total, input_precision="ieee")
        if HAS_BIAS:
            mask = inside & (vector >= 0)
            total += tl.load(bias_ptr + tl.maximum(vector, 0) * N + columns, mask=mask, other=0.0)[None, :]
        mask = (token < count)[:, None] & inside[None, :]
        tl.store(out_ptr + out_rows[:, None] + columns[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def expand_dot_kernel(
    ranks_ptr,
    b_ptr,
    bias_ptr,
    order_ptr,
    starts_ptr,
    items_ptr,
    vectors_ptr,
    first_pages_ptr,
    first_modules_ptr,
    pages_ptr,
    modules_ptr,
    num_segments_ptr,
    out_ptr,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
    FIRST_MODULE: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    LOOP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    PAGES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Up to TILES tiles of columns, one after another, for all tokens of a segment; see the kernel above.

    A segment with one page has a loop of its own: most have one, and multiplying by PAGES of them would cost more.
    """
    PER_BLOCK: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    end = tl.program_id(0) + 1
    if LOOP:
        end = tl.load(num_segments_ptr) * PROGRAMS
    for work in tl.range(tl.program_id(0), end, tl.num_programs(0), num_stages=1):  # pyright: ignore
        segment = work // PROGRAMS
        start, count, first, length = load_segment(segment, starts_ptr, items_ptr)  # pyright: ignore
        page = tl.load(first_pages_ptr + segment)
        modules = tl.load(first_modules_ptr + segment)
        vector = tl.load(vectors_ptr + segment)
        part, tile, last = find_tiles(work % PROGRAMS, HEADS, GROUP, PER_BLOCK, TILES)
        listed = (pages_ptr + first, modules_ptr + first, length, FIRST_MODULE + part)
        has_module = (modules >> (FIRST_MODULE + part)) & 1 == 1
        cells_ptr = ranks_ptr + (start * (MAX_PAGES * SLICES) + part) * (SPLITS * RANKS)
        token = tl.arange(0, TILE)
        out_rows = tl.load(order_ptr + start + token, mask=token < count, other=0).to(tl.int64) * N
        # A segment of the padding has no tokens, and no tiles.
        last = tl.where(count > 0, last, tile)
        if length <= 1:
            _expand_tiles(
                cells_ptr, b_ptr, bias_ptr, out_ptr, page, has_module, listed, count, token, out_rows, vector, part,
                tile, last, N, GROUP, WIDTH, SLICES, SPLITS, HAS_BIAS, BLOCK_N, STAGES, 1, False,
            )  # fmt: skip
        elif MAX_PAGES > 1:
            _expand_tiles(
                cells_ptr, b_ptr, bias_ptr, out_ptr, page, has_module, listed, count, token, out_rows, vector, part,
                tile, last, N, GROUP, WIDTH, SLICES, SPLITS, HAS_BIAS, BLOCK_N, STAGES, PAGES, MAX_PAGES > PAGES,
            )  # fmt: skip
