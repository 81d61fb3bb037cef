"""Builds a step's LoRA tables on the host: tokens sorted by what they add, cut into segments. Needs numpy alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DECODE_TOKENS = 256
"""Up to so many tokens, a segment is small: most are a few tokens of one adapter each."""


@dataclass(frozen=True, kw_only=True)
class PageUse:
    """A page that a group of tokens adds."""

    page: int
    modules: int
    """Bit m is set where the page has module m of `batch.MODULES`."""
    weight: float = 1.0
    """What the page's product is multiplied by."""


@dataclass(frozen=True, kw_only=True)
class TokenGroup:
    """What the tokens of one adapter, or of one set of merged adapters, add."""

    pages: tuple[PageUse, ...] = ()
    vector: int = -1
    """The row of the bias and scale banks; -1 is none."""


@dataclass(frozen=True, kw_only=True)
class TableSizes:
    """The static sizes of a step's tables: a program is compiled for them."""

    tile: int
    """Tokens that a segment has at most."""
    max_pages: int
    """Pages that a group has at most."""
    max_segments: int
    max_items: int


def table_sizes(
    num_tokens: int, *, max_groups: int, max_pages: int, num_pages: int | None = None, tile: int | None = None
) -> TableSizes:
    """Return sizes that the tables of no step of `num_tokens` exceed.

    Args:
        num_tokens: T, the step's tokens, padding included.
        max_groups: the most groups that have tokens in a step; those without an adapter are one more.
        max_pages: the most pages that a group has.
        num_pages: the most pages that a step's groups have together, where that is less than each the most.
        tile: the most tokens of a segment; None means 16 up to `DECODE_TOKENS`, and 64 from there on.

    Raises:
        ValueError: a size below 1.
    """
    tile = (16 if num_tokens <= DECODE_TOKENS else 64) if tile is None else tile
    given = {"num_tokens": num_tokens, "max_groups": max_groups, "max_pages": max_pages, "tile": tile}
    if min(given.values()) < 1:
        raise ValueError(f"table_sizes: sizes are at least 1, not {given}")
    # Of g groups with a token each, the tokens that are left fill at most so many segments more.
    groups = min(num_tokens, max_groups + 1)
    segments = groups + (num_tokens - groups) // tile
    groups = min(num_tokens, max_groups)
    listed = groups * max_pages if num_pages is None else min(num_pages, groups * max_pages)
    # Each group's pages once, and again for each segment that it has more than one of.
    items = max(1, min(segments * max_pages, listed + (num_tokens - 1) // tile * max_pages))
    return TableSizes(tile=tile, max_pages=max_pages, max_segments=segments, max_items=items)


def build_lora_tables(
    token_groups: np.ndarray, groups: Sequence[TokenGroup], sizes: TableSizes
) -> dict[str, np.ndarray]:
    """Return the arrays of a `batch.LoRABatch` by name; its `tile` and `max_pages` are those of `sizes`.

    Args:
        token_groups: for each of T tokens the index of its group; -1 is none, as padding has.
        groups: what each group adds.
        sizes: see `table_sizes`.

    Raises:
        ValueError: a token of a group that is not there, or more pages, segments or items than `sizes` allows.
    """
    token_groups = np.asarray(token_groups)
    if token_groups.size and not -1 <= token_groups.min() <= token_groups.max() < len(groups):
        raise ValueError(f"build_lora_tables: groups are -1 to {len(groups) - 1}, not {np.unique(token_groups)}")
    order = np.argsort(token_groups, kind="stable").astype(np.int32)
    counts = np.bincount(token_groups + 1, minlength=len(groups) + 1)
    cuts = -(-counts // sizes.tile)
    segment_groups = np.repeat(np.arange(-1, len(groups)), cuts)
    nth = np.arange(len(segment_groups)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    starts = np.repeat(np.cumsum(counts) - counts, cuts) + nth * sizes.tile

    lists = [(), *(group.pages for group in groups)]
    uses = [use for pages in lists for use in pages]
    lengths = np.array([len(pages) for pages in lists])
    per_segment = lengths[segment_groups + 1]
    item_segments = np.repeat(np.arange(len(segment_groups)), per_segment)
    ends = np.cumsum(per_segment)
    of_segment = np.arange(len(item_segments)) - np.repeat(ends - per_segment, per_segment)
    use = (np.cumsum(lengths) - lengths)[segment_groups[item_segments] + 1] + of_segment
    found = {"pages": int(per_segment.max(initial=0)), "segments": len(segment_groups), "items": len(item_segments)}
    allowed = {"pages": sizes.max_pages, "segments": sizes.max_segments, "items": sizes.max_items}
    if any(found[name] > allowed[name] for name in found):
        raise ValueError(f"build_lora_tables: {found} do not fit {allowed}; make table_sizes larger")

    def of_items(values: list[float], dtype: type) -> np.ndarray:
        return _padded(np.array(values, dtype)[use], sizes.max_items, 0)

    vectors = np.array([-1, *(group.vector for group in groups)], np.int32)
    return {
        "token_order": order,
        "segment_starts": _padded(starts, sizes.max_segments + 1, len(order)),
        "segment_items": _padded(ends - per_segment, sizes.max_segments + 1, len(item_segments)),
        "segment_vectors": _padded(vectors[segment_groups + 1], sizes.max_segments, -1),
        "item_pages": of_items([use.page for use in uses], np.int32),
        "item_segments": _padded(item_segments, sizes.max_items, 0),
        "item_modules": of_items([use.modules for use in uses], np.int32),
        "item_weights": of_items([use.weight for use in uses], np.float32),
        "num_segments": np.array([len(segment_groups)], np.int32),
        "num_items": np.array([len(item_segments)], np.int32),
    }


def _padded(values: np.ndarray, size: int, fill: int) -> np.ndarray:
    dtype = np.float32 if values.dtype == np.float32 else np.int32
    return np.concatenate([values.astype(dtype), np.full(size - len(values), fill, dtype)])
