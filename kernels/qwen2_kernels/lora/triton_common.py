"""What the second products of `lora` have in common: which tile a program has, and what it reads of a segment's pages.

A segment's pages are passed on as `listed`: pointers to its first item's page and modules, the number of its items, and
the bit of the module in question. Items behind the last one and those without the module are not read, but zeros.
"""

from typing import Any

import triton
import triton.language as tl

from qwen2_kernels.lora.batch import RANKS as PAGE_RANKS

RANKS: Any = tl.constexpr(PAGE_RANKS)


@triton.jit
def load_segment(segment, starts_ptr, items_ptr):
    """Return a segment's first token and number of tokens, and its first item and number of items."""
    start = tl.load(starts_ptr + segment)
    first = tl.load(items_ptr + segment)
    return start, tl.load(starts_ptr + segment + 1) - start, first, tl.load(items_ptr + segment + 1) - first


@triton.jit
def find_tiles(program, HEADS: tl.constexpr, GROUP: tl.constexpr, PER_BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Return the slice, the first tile of it and the tiles' end for one of a segment's programs.

    With a GROUP, a slice's tiles are those of its blocks in all heads, GROUP blocks of slice 0 in a head and one of
    slices 1 and 2, so that a program has one slice.
    """
    if GROUP == 0:
        part = 0
        first = program * TILES
        end = PER_BLOCK
    else:
        QUERY_PROGRAMS: tl.constexpr = (HEADS * GROUP * PER_BLOCK + TILES - 1) // TILES
        OTHER_PROGRAMS: tl.constexpr = (HEADS * PER_BLOCK + TILES - 1) // TILES
        is_query = program < QUERY_PROGRAMS
        other = program - QUERY_PROGRAMS
        part = tl.where(is_query, 0, 1 + other // OTHER_PROGRAMS)
        first = tl.where(is_query, program, other % OTHER_PROGRAMS) * TILES
        end = HEADS * PER_BLOCK * tl.where(is_query, GROUP, 1)
    return part, first, tl.minimum(first + TILES, end)


@triton.jit
def find_columns(part, tile, GROUP: tl.constexpr, WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return a tile's columns and which of them are its block's, for a tile as `find_tiles` counts them."""
    block = tile // PER_BLOCK
    if GROUP > 0:
        query = block // GROUP * (GROUP + 2) + block % GROUP
        block = tl.where(part == 0, query, block * (GROUP + 2) + GROUP + part - 1)
    inner = tile % PER_BLOCK * BLOCK_N + tl.arange(0, BLOCK_N)
    return block * WIDTH + inner, inner < WIDTH


@triton.jit
def _items(rank, chunk, PAGES: tl.constexpr):
    """Return the item of each rank, or that of all of them, so that its tables are read once."""
    return chunk if PAGES == 1 else chunk * PAGES + rank // RANKS


@triton.jit
def load_ranks(
    cells_ptr,
    listed,
    count,
    token,
    chunk,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    PAGES: tl.constexpr,
):
    """Return the first products [tokens, PAGES * RANKS] with PAGES of a segment's pages, from `chunk` * PAGES on.

    `cells_ptr` is where the segment's first row has those of the module.
    """
    _, modules_ptr, length, bit = listed
    rank = tl.arange(0, PAGES * RANKS)
    item = _items(rank, chunk, PAGES)
    modules = tl.load(modules_ptr + item, mask=item < length, other=0)
    ROW: tl.constexpr = SLICES * SPLITS * RANKS
    cells = cells_ptr + (item * count * ROW + rank % RANKS)[None, :] + token[:, None] * ROW
    mask = (((modules >> bit) & 1 == 1) & (rank < PAGES * RANKS))[None, :] & (token < count)[:, None]
    total = tl.load(cells, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(cells + split * RANKS, mask=mask, other=0.0)
    return total


@triton.jit
def load_page_ranks(cells_ptr, has_module, count, token, SLICES: tl.constexpr, SPLITS: tl.constexpr):
    """The same for a segment with one page, which has the module or not: [tokens, RANKS]."""
    ROW: tl.constexpr = SLICES * SPLITS * RANKS
    cells = cells_ptr + tl.arange(0, RANKS)[None, :] + token[:, None] * ROW
    mask = (has_module & (token < count))[:, None]
    total = tl.load(cells, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(cells + split * RANKS, mask=mask, other=0.0)
    return total


@triton.jit
def load_row(cells_ptr, has_module, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return the first product of one token with one page, [RANKS]; BLOCK_S is the next power of two to SPLITS."""
    split = tl.arange(0, BLOCK_S)
    cells = cells_ptr + split[:, None] * RANKS + tl.arange(0, RANKS)[None, :]
    return tl.sum(tl.load(cells, mask=((split < SPLITS) & has_module)[:, None], other=0.0), axis=0)


@triton.jit
def find_page_factors(page, N: tl.constexpr):
    """Return where the rows of a page's second factors start, [RANKS]."""
    return (page.to(tl.int64) * RANKS + tl.arange(0, RANKS)) * N


@triton.jit
def find_factors(listed, chunk, N: tl.constexpr, PAGES: tl.constexpr):
    """Return where the rows of those pages' second factors start, [PAGES * RANKS], and which are to be read."""
    pages_ptr, modules_ptr, length, bit = listed
    rank = tl.arange(0, PAGES * RANKS)
    item = _items(rank, chunk, PAGES)
    page = tl.load(pages_ptr + item, mask=item < length, other=0).to(tl.int64)
    modules = tl.load(modules_ptr + item, mask=item < length, other=0)
    is_read = ((modules >> bit) & 1 == 1) & (rank < PAGES * RANKS)
    return (page * RANKS + rank % RANKS) * N, is_read
