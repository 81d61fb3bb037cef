"""First products of `lora` as another kernel multiplies them: a matrix for each entry, of all its window's tokens."""

import triton
import triton.language as tl

from qwen2_kernels.lora.triton_common import RANKS


@triton.jit
def window_ranks_kernel(
    ranks_ptr,
    order_ptr,
    places_ptr,
    starts_ptr,
    items_ptr,
    segments_ptr,
    modules_ptr,
    entry_items_ptr,
    entry_tokens_ptr,
    window_entries_ptr,
    out_ptr,
    WINDOWS: tl.constexpr,
    SLICES: tl.constexpr,
    FIRST_MODULE: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Add up a part of an entry's tokens over SPLITS; the window's other tokens, and modules that it lacks, are zeros.

    ranks [rows, SLICES, SPLITS, RANKS], see `triton_shrink`; out [E, SLICES, WINDOW, RANKS]; grid (entries, parts).
    """
    entry = tl.program_id(0)
    if entry < tl.load(window_entries_ptr + WINDOWS):
        item = tl.load(entry_items_ptr + entry)
        first = tl.load(segments_ptr + item)
        nth_page = item - tl.load(items_ptr + first)
        modules = tl.load(modules_ptr + item)
        start = tl.load(starts_ptr + first)
        end = start + tl.load(entry_tokens_ptr + entry)
        index = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
        place = tl.load(places_ptr + tl.load(order_ptr + start) // WINDOW * WINDOW + index)
        is_used = (place >= start) & (place < end)
        segment_start = start + (place - start) // TILE * TILE
        row = segment_start * MAX_PAGES + nth_page * tl.minimum(end - segment_start, TILE) + place - segment_start
        column = tl.arange(0, SLICES * RANKS)
        part = column // RANKS
        mask = is_used[:, None] & (modules >> (FIRST_MODULE + part) & 1 == 1)
        cells = (row[:, None] * SLICES + part) * (SPLITS * RANKS) + column % RANKS
        total = tl.zeros((BLOCK_T, SLICES * RANKS), tl.float32)
        for split in tl.static_range(SPLITS):
            total += tl.load(ranks_ptr + cells + split * RANKS, mask=mask, other=0.0)
        cells = ((entry.to(tl.int64) * SLICES + part) * WINDOW + index[:, None]) * RANKS + column % RANKS
        tl.store(out_ptr + cells, total.to(out_ptr.dtype.element_ty))
