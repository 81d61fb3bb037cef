"""Which adapters a step's tokens use, as arrays, and how a projection's modules lie in the banks.

Adapters lie in pages. A page holds `RANKS` ranks of one adapter for all modules of a fused projection: in the `a` bank
[P, C, RANKS, K] a matrix for each of C modules, in the `b` bank [P, RANKS, N] the columns of all of them. The scaling
is folded into `b`. Unused ranks and modules are zeros. A page that no item lists is never read: it may hold NaN.
"""

from dataclasses import dataclass, field

import jax
from jax import Array
from jaxtyping import Float, Int

RANKS = 16
"""Ranks of a page: an adapter of rank r has ceil(r / RANKS) of them."""

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What adapters change, in the order of `item_modules`' bits."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LoRABatch:
    """The tables of one step, as `segments.build_lora_tables` makes them: T tokens, G segments, I items.

    A segment is at most `tile` tokens that add the same pages; an item is one page of one segment. Behind the numbers
    of segments and items in use, the tables are padding that nothing reads.
    """

    token_order: Int[Array, " T"]
    """A permutation of the tokens, one segment after another."""
    segment_starts: Int[Array, " G+1"]
    """Where each segment starts in `token_order`; all segments together are all tokens."""
    segment_items: Int[Array, " G+1"]
    """Where each segment's items start; a segment without items adds no product."""
    segment_vectors: Int[Array, " G"]
    """The row of a bias or scale bank that a segment uses; -1 is none."""
    segment_pages: Int[Array, " G"]
    segment_modules: Int[Array, " G"]
    """The page and the modules of a segment's first item, for most segments its only one; 0 where there is none."""
    item_pages: Int[Array, " I"]
    item_segments: Int[Array, " I"]
    item_starts: Int[Array, " I"]
    item_counts: Int[Array, " I"]
    """Where the item's segment starts in `token_order`, and its tokens."""
    item_rows: Int[Array, " I"]
    """The first row of the item's products, of `T * max_pages` in all: behind those of the segment's earlier items."""
    item_modules: Int[Array, " I"]
    """Bit m is set where the page has module m of `MODULES`; the others are not read."""
    item_weights: Float[Array, " I"]
    """What the page's product is multiplied by, float32: 1, or the weight of an adapter in a merge."""
    num_segments: Int[Array, " 1"]
    num_items: Int[Array, " 1"]
    token_places: Int[Array, " W*window"] | None = None
    """Where each token is in `token_order`, -1 behind the last; with windows only, as the next."""
    window_entries: Int[Array, " W+1"] | None = None
    """Where the entries of each window start: of `window` tokens that are neighbours in the step."""
    entry_items: Int[Array, " E"] | None = None
    """An entry is a page that some of a window's tokens add: the page's item in the first of their segments."""
    entry_tokens: Int[Array, " E"] | None = None
    """How many of the window's tokens add it."""
    window: int | None = field(default=None, metadata={"static": True})
    """Segments stay within windows of so many tokens."""
    tile: int = field(metadata={"static": True})
    max_pages: int = field(metadata={"static": True})
    """The most items that a segment has."""


@dataclass(frozen=True, kw_only=True)
class LoRAProjection:
    """Which modules the C slices of an `a` bank belong to, and which columns of the `b` bank."""

    modules: tuple[int, ...]
    """Of each slice, its bit in `item_modules`: consecutive numbers."""
    heads: tuple[int, int] | None = None
    """(G, H) where the columns are [heads, G + 2, H], G queries, a key and a value; else each module's are together."""

    def blocks(self, num_columns: int) -> tuple[int, ...]:
        """Return the slice of each block of equally many columns, of `num_columns` in all.

        Raises:
            ValueError: the columns do not divide into blocks.
        """
        if self.heads is None:
            pattern, width = tuple(range(len(self.modules))), num_columns // len(self.modules)
        else:
            group, width = self.heads
            pattern = (*(0,) * group, 1, 2)
        if num_columns % (width * len(pattern)):
            raise ValueError(f"lora: {num_columns} columns are not a multiple of {width} x {len(pattern)} for {self}")
        return pattern * (num_columns // (width * len(pattern)))


def qkv_projection(group: int, head_dim: int) -> LoRAProjection:
    """Return the fused projection of queries, keys and values, [heads, group + 2, head_dim]."""
    return LoRAProjection(modules=(0, 1, 2), heads=(group, head_dim))


O_PROJECTION = LoRAProjection(modules=(3,))
GATE_UP_PROJECTION = LoRAProjection(modules=(4, 5))
DOWN_PROJECTION = LoRAProjection(modules=(6,))
