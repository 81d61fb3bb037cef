"""The second product of `lora_gated`: gate's and up's columns side by side, added to the base and multiplied."""

import triton
import triton.language as tl

from qwen2_kernels.linear.triton_epilogue import activate
from qwen2_kernels.lora.triton_common import (
    RANKS,
    find_factors,
    find_page_factors,
    load_page_ranks,
    load_ranks,
    load_row,
    load_segment,
)


@triton.jit
def _load_vectors(vector_bank_ptr, vector, columns, inside, F: tl.constexpr, OTHERWISE: tl.constexpr):
    """Return gate's and up's `columns` of a row of a bank [V, 2, F], or OTHERWISE without one."""
    cells = vector_bank_ptr + tl.maximum(vector, 0) * (2 * F) + columns
    mask = inside & (vector >= 0)
    return tl.load(cells, mask=mask, other=OTHERWISE), tl.load(cells + F, mask=mask, other=OTHERWISE)


@triton.jit
def _load_base(
    base_ptr,
    bias_ptr,
    scale_ptr,
    token,
    vector,
    columns,
    inside,
    F: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """Return gate's and up's `columns` of one token's base, scaled, and with the bias added."""
    cells = base_ptr + token * (2 * F) + columns
    gate = tl.load(cells, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(cells + F, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        gate_scale, up_scale = _load_vectors(scale_ptr, vector, columns, inside, F, 1.0)  # pyright: ignore
        gate *= gate_scale
        up *= up_scale
    if HAS_BIAS:
        gate_bias, up_bias = _load_vectors(bias_ptr, vector, columns, inside, F, 0.0)  # pyright: ignore
        gate += gate_bias
        up += up_bias
    return gate, up


@triton.jit
def gated_vector_kernel(
    ranks_ptr,
    base_ptr,
    b_ptr,
    bias_ptr,
    scale_ptr,
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
    F: tl.constexpr,
    FIRST_MODULE: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    LOOP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One tile of columns for a segment's tokens, one after another; the factors of a single page stay in registers.

    ranks [rows, 2, SPLITS, RANKS], base [T, 2, F], b [P, RANKS, 2, F], bias and scale [V, 2, F], out
    [T, F]; grid (work), see `triton_expand.expand_vector_kernel`.
    """
    end = tl.program_id(0) + 1
    if LOOP:
        end = tl.load(num_segments_ptr) * PROGRAMS
    for work in tl.range(tl.program_id(0), end, tl.num_programs(0), num_stages=1):  # pyright: ignore
        segment = work // PROGRAMS
        start, count, first, length = load_segment(segment, starts_ptr, items_ptr)  # pyright: ignore
        page = tl.load(first_pages_ptr + segment)
        modules = tl.load(first_modules_ptr + segment) >> FIRST_MODULE
        vector = tl.load(vectors_ptr + segment)
        columns = work % PROGRAMS * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = columns < F
        gate_listed = (pages_ptr + first, modules_ptr + first, length, FIRST_MODULE)
        up_listed = (pages_ptr + first, modules_ptr + first, length, FIRST_MODULE + 1)
        tiles = b_ptr + columns[None, :]
        if length <= 1:
            rows = find_page_factors(page, 2 * F)
            b_gate = tl.load(tiles + rows[:, None], mask=(modules & 1 == 1) & inside[None, :], other=0.0)
            b_up = tl.load(tiles + F + rows[:, None], mask=(modules & 2 == 2) & inside[None, :], other=0.0)
            for index in tl.range(0, count, num_stages=1):
                token = tl.load(order_ptr + start + index).to(tl.int64)
                gate, up = _load_base(
                    base_ptr, bias_ptr, scale_ptr, token, vector, columns, inside, F, HAS_BIAS, HAS_SCALE
                )
                row_ptr = ranks_ptr + (start * MAX_PAGES + index) * (2 * SPLITS * RANKS)
                gate_ranks = load_row(row_ptr, modules & 1 == 1, SPLITS, BLOCK_S)
                up_ranks = load_row(row_ptr + SPLITS * RANKS, modules & 2 == 2, SPLITS, BLOCK_S)
                gate += tl.sum(gate_ranks[:, None] * b_gate.to(tl.float32), axis=0)
                up += tl.sum(up_ranks[:, None] * b_up.to(tl.float32), axis=0)
                result = activate(gate, ACTIVATION) * up
                tl.store(out_ptr + token * F + columns, result.to(out_ptr.dtype.element_ty), mask=inside)
        elif MAX_PAGES > 1:
            for index in tl.range(0, count, num_stages=1):
                token = tl.load(order_ptr + start + index).to(tl.int64)
                gate, up = _load_base(
                    base_ptr, bias_ptr, scale_ptr, token, vector, columns, inside, F, HAS_BIAS, HAS_SCALE
                )
                for item in tl.range(0, length, num_stages=1):
                    rows, has_gate = find_factors(gate_listed, item, 2 * F, 1)
                    rows, has_up = find_factors(up_listed, item, 2 * F, 1)
                    modules = tl.load(modules_ptr + first + item) >> FIRST_MODULE
                    row_ptr = ranks_ptr + (start * MAX_PAGES + item * count + index) * (2 * SPLITS * RANKS)
                    b = tl.load(tiles + rows[:, None], mask=has_gate[:, None] & inside[None, :], other=0.0)
                    ranks = load_row(row_ptr, modules & 1 == 1, SPLITS, BLOCK_S)
                    gate += tl.sum(ranks[:, None] * b.to(tl.float32), axis=0)
                    b = tl.load(tiles + F + rows[:, None], mask=has_up[:, None] & inside[None, :], other=0.0)
                    ranks = load_row(row_ptr + SPLITS * RANKS, modules & 2 == 2, SPLITS, BLOCK_S)
                    up += tl.sum(ranks[:, None] * b.to(tl.float32), axis=0)
                result = activate(gate, ACTIVATION) * up
                tl.store(out_ptr + token * F + columns, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_tiles(
    cells_ptr,
    base_ptr,
    b_ptr,
    bias_ptr,
    scale_ptr,
    out_ptr,
    page,
    modules,
    gate_listed,
    up_listed,
    count,
    token,
    rows,
    vector,
    tile,
    end,
    F: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PAGES: tl.constexpr,
    IS_LONG: tl.constexpr,
):
    """Multiply a segment that has at most PAGES pages, or more if IS_LONG, tile after tile."""
    DTYPE: tl.constexpr = b_ptr.dtype.element_ty
    up_cells_ptr = cells_ptr + SPLITS * RANKS
    if PAGES == 1:
        gate_ranks = load_page_ranks(cells_ptr, modules & 1 == 1, count, token, 2, SPLITS).to(DTYPE)
        up_ranks = load_page_ranks(up_cells_ptr, modules & 2 == 2, count, token, 2, SPLITS).to(DTYPE)
        b_rows = find_page_factors(page, 2 * F)
        has_gate, has_up = (b_rows >= 0) & (modules & 1 == 1), (b_rows >= 0) & (modules & 2 == 2)
    else:
        gate_ranks = load_ranks(cells_ptr, gate_listed, count, token, 0, 2, SPLITS, PAGES).to(DTYPE)
        up_ranks = load_ranks(up_cells_ptr, up_listed, count, token, 0, 2, SPLITS, PAGES).to(DTYPE)
        b_rows, has_gate = find_factors(gate_listed, 0, 2 * F, PAGES)
        b_rows, has_up = find_factors(up_listed, 0, 2 * F, PAGES)
    is_token = token < count
    for index in tl.range(tile, end, num_stages=STAGES):
        columns = index * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = columns < F
        cells = b_ptr + b_rows[:, None] + columns[None, :]
        b_gate = tl.load(cells, mask=has_gate[:, None] & inside[None, :], other=0.0)
        b_up = tl.load(cells + F, mask=has_up[:, None] & inside[None, :], other=0.0)
        base_cells = base_ptr + 2 * rows[:, None] + columns[None, :]
        mask = is_token[:, None] & inside[None, :]
        gate = tl.load(base_cells, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(base_cells + F, mask=mask, other=0.0).to(tl.float32)
        if HAS_SCALE:
            gate_scale, up_scale = _load_vectors(scale_ptr, vector, columns, inside, F, 1.0)
            gate *= gate_scale[None, :]
            up *= up_scale[None, :]
        if HAS_BIAS:
            gate_bias, up_bias = _load_vectors(bias_ptr, vector, columns, inside, F, 0.0)
            gate += gate_bias[None, :]
            up += up_bias[None, :]
        gate += tl.dot(gate_ranks, b_gate, input_precision="ieee")
        up += tl.dot(up_ranks, b_up, input_precision="ieee")
        if IS_LONG:
            for chunk in tl.range(1, tl.cdiv(gate_listed[2], PAGES), num_stages=1):
                more_rows, more_gates = find_factors(gate_listed, chunk, 2 * F, PAGES)
                more_rows, more_ups = find_factors(up_listed, chunk, 2 * F, PAGES)
                cells = b_ptr + more_rows[:, None] + columns[None, :]
                more = tl.load(cells, mask=more_gates[:, None] & inside[None, :], other=0.0)
                some = load_ranks(cells_ptr, gate_listed, count, token, chunk, 2, SPLITS, PAGES)
                gate += tl.dot(some.to(DTYPE), more, input_precision="ieee")
                more = tl.load(cells + F, mask=more_ups[:, None] & inside[None, :], other=0.0)
                some = load_ranks(up_cells_ptr, up_listed, count, token, chunk, 2, SPLITS, PAGES)
                up += tl.dot(some.to(DTYPE), more, input_precision="ieee")
        result = activate(gate, ACTIVATION) * up
        tl.store(out_ptr + rows[:, None] + columns[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_dot_kernel(
    ranks_ptr,
    base_ptr,
    b_ptr,
    bias_ptr,
    scale_ptr,
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
    F: tl.constexpr,
    FIRST_MODULE: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    LOOP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    PAGES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Up to TILES tiles of columns, one after another, for all tokens of a segment; see the kernel above.

    A segment with one page has a loop of its own: most have one, and multiplying by PAGES of them would cost more.
    """
    end = tl.program_id(0) + 1
    if LOOP:
        end = tl.load(num_segments_ptr) * PROGRAMS
    for work in tl.range(tl.program_id(0), end, tl.num_programs(0), num_stages=1):  # pyright: ignore
        segment = work // PROGRAMS
        start, count, first, length = load_segment(segment, starts_ptr, items_ptr)  # pyright: ignore
        page = tl.load(first_pages_ptr + segment)
        modules = tl.load(first_modules_ptr + segment) >> FIRST_MODULE
        vector = tl.load(vectors_ptr + segment)
        tile = work % PROGRAMS * TILES
        # A segment of the padding has no tokens, and no tiles.
        last = tl.where(count > 0, tl.minimum(tile + TILES, (F + BLOCK_N - 1) // BLOCK_N), tile)
        gate_listed = (pages_ptr + first, modules_ptr + first, length, FIRST_MODULE)
        up_listed = (pages_ptr + first, modules_ptr + first, length, FIRST_MODULE + 1)
        cells_ptr = ranks_ptr + start * (MAX_PAGES * 2 * SPLITS * RANKS)
        token = tl.arange(0, TILE)
        rows = tl.load(order_ptr + start + token, mask=token < count, other=0).to(tl.int64) * F
        if length <= 1:
            _gated_tiles(
                cells_ptr, base_ptr, b_ptr, bias_ptr, scale_ptr, out_ptr, page, modules, gate_listed,
                up_listed, count, token, rows, vector, tile, last, F, SPLITS, HAS_BIAS, HAS_SCALE, ACTIVATION, BLOCK_N,
                STAGES, 1, False,
            )  # fmt: skip
        elif MAX_PAGES > 1:
            _gated_tiles(
                cells_ptr, base_ptr, b_ptr, bias_ptr, scale_ptr, out_ptr, page, modules, gate_listed,
                up_listed, count, token, rows, vector, tile, last, F, SPLITS, HAS_BIAS, HAS_SCALE, ACTIVATION, BLOCK_N,
                STAGES, PAGES, MAX_PAGES > PAGES,
            )  # fmt: skip
