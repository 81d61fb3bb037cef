"""Builds a step's LoRA tables on the host: tokens sorted by what they add, cut into segments. Needs numpy alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DECODE_TOKENS = 256
"""Up to so many tokens, a segment is small: most are a few tokens of one adapter each."""
WINDOW = 128
"""Tokens of a window where there are more: a tile of the kernel that multiplies the model's own weights, too."""


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
    window: int | None = None
    """Tokens of the windows that segments stay within; see `batch.LoRABatch`."""
    max_entries: int = 0


def table_sizes(
    num_tokens: int,
    *,
    max_groups: int,
    max_pages: int,
    num_pages: int | None = None,
    max_runs: int | None = None,
    tile: int | None = None,
    window: int | None = None,
) -> TableSizes:
    """Return sizes that the tables of no step of `num_tokens` exceed.

    Args:
        num_tokens: T, the step's tokens, padding included.
        max_groups: the most groups that have tokens in a step; those without an adapter are one more.
        max_pages: the most pages that a group has.
        num_pages: the most pages that a step's groups have together, where that is less than each the most.
        max_runs: the most runs of tokens of one group, those without a group too; None means that tokens may alternate.
        tile: the most tokens of a segment; None means 16 up to `DECODE_TOKENS`, and 64 from there on.
        window: tokens of the windows that segments stay within; None means none up to `DECODE_TOKENS`, and `WINDOW`
            from there on.

    Raises:
        ValueError: a size below 1.
    """
    is_small = num_tokens <= DECODE_TOKENS
    tile = (16 if is_small else 64) if tile is None else tile
    window = (None if is_small else WINDOW) if window is None else window
    given = {"num_tokens": num_tokens, "max_groups": max_groups, "max_pages": max_pages, "tile": tile}
    given |= {name: size for name, size in {"max_runs": max_runs, "window": window}.items() if size is not None}
    if min(given.values()) < 1:
        raise ValueError(f"table_sizes: sizes are at least 1, not {given}")
    if window is not None:
        windows = -(-num_tokens // window)
        parts = windows * min(window, max_groups + 1)
        # A window has a part for each run that starts in it, and for the one that goes on there.
        parts = parts if max_runs is None else min(parts, max_runs + windows)
        segments = parts + num_tokens // tile
        items, entries = segments * max_pages, parts * max_pages
        return TableSizes(
            tile=tile,
            max_pages=max_pages,
            max_segments=segments,
            max_items=items,
            window=window,
            max_entries=entries,
        )
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
    windows = np.arange(len(token_groups)) // (sizes.window or len(token_groups))
    keys, kinds = windows * (len(groups) + 1) + token_groups + 1, len(groups) + 1
    order = np.argsort(keys, kind="stable").astype(np.int32)
    counts = np.bincount(keys, minlength=kinds)
    cuts = -(-counts // sizes.tile)
    segment_keys = np.repeat(np.arange(len(counts)), cuts)
    segment_groups = segment_keys % kinds - 1
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

    item_starts = starts[item_segments].astype(np.int32)
    item_counts = (np.append(starts, len(order))[item_segments + 1] - item_starts).astype(np.int32)
    of_first = np.where(per_segment > 0, (np.cumsum(lengths) - lengths)[segment_groups + 1], len(uses))

    def of_segments(values: list[int]) -> np.ndarray:
        return _padded(np.array([*values, 0], np.int32)[of_first], sizes.max_segments, 0)

    def of_items(values: list[float], dtype: type) -> np.ndarray:
        return _padded(np.array(values, dtype)[use], sizes.max_items, 0)

    vectors = np.array([-1, *(group.vector for group in groups)], np.int32)
    return {
        "token_order": order,
        "segment_starts": _padded(starts, sizes.max_segments + 1, len(order)),
        "segment_items": _padded(ends - per_segment, sizes.max_segments + 1, len(item_segments)),
        "segment_vectors": _padded(vectors[segment_groups + 1], sizes.max_segments, -1),
        "segment_pages": of_segments([use.page for use in uses]),
        "segment_modules": of_segments([use.modules for use in uses]),
        "item_starts": _padded(item_starts, sizes.max_items, 0),
        "item_counts": _padded(item_counts, sizes.max_items, 0),
        "item_rows": _padded(item_starts * sizes.max_pages + of_segment * item_counts, sizes.max_items, 0),
        "item_pages": of_items([use.page for use in uses], np.int32),
        "item_segments": _padded(item_segments, sizes.max_items, 0),
        "item_modules": of_items([use.modules for use in uses], np.int32),
        "item_weights": of_items([use.weight for use in uses], np.float32),
        "num_segments": np.array([len(segment_groups)], np.int32),
        "num_items": np.array([len(item_segments)], np.int32),
        **_window_tables(order, counts, cuts, ends - per_segment, lengths, sizes),
    }


def _window_tables(
    order: np.ndarray,
    counts: np.ndarray,
    cuts: np.ndarray,
    segment_items: np.ndarray,
    lengths: np.ndarray,
    sizes: TableSizes,
) -> dict[str, np.ndarray]:
    """Return the tables that there are with windows only, of each window's and group's tokens, segments and pages."""
    if sizes.window is None:
        return {}
    num_windows = -(-len(order) // sizes.window)
    places = np.full(num_windows * sizes.window, -1, np.int32)
    places[order] = np.arange(len(order))
    used = np.flatnonzero(counts)
    pages = lengths[used % len(lengths)]
    nth = np.arange(pages.sum()) - np.repeat(np.cumsum(pages) - pages, pages)
    first_items = segment_items[(np.cumsum(cuts) - cuts)[used]]
    windows = np.repeat(used // len(lengths), pages)
    if len(nth) > sizes.max_entries:
        raise ValueError(f"build_lora_tables: {len(nth)} entries, max_entries={sizes.max_entries}; make it larger")
    return {
        "token_places": places,
        "window_entries": np.searchsorted(windows, np.arange(num_windows + 1)).astype(np.int32),
        "entry_items": _padded(np.repeat(first_items, pages) + nth, sizes.max_entries, 0),
        "entry_tokens": _padded(np.repeat(counts[used], pages), sizes.max_entries, 0),
    }


def _padded(values: np.ndarray, size: int, fill: int) -> np.ndarray:
    dtype = np.float32 if values.dtype == np.float32 else np.int32
    return np.concatenate([values.astype(dtype), np.full(size - len(values), fill, dtype)])
