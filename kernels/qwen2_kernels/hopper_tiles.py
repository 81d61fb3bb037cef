"""The table of tiles that the attention kernel for NVIDIA Hopper works off: see `hopper_attention`."""

from dataclasses import dataclass, fields

import jax.numpy as jnp
from jax import Array

from qwen2_kernels.hopper_config import ALIGNMENT, Config, Mask


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A row of the table, int32. Positions count keys: of all prompts together, or of one row's pages."""

    row: Array
    """The row of the batch."""
    query_start: Array
    """The first query's token, a multiple of 8; it may lie before the row's first."""
    store_start: Array
    """The first token whose result is stored."""
    store_stop: Array
    """Behind the last token whose result is stored."""
    position: Array
    """The first query's position."""
    key_start: Array
    """Where the first block starts."""
    key_low: Array
    """The first position that any query of the tile sees."""
    key_stop: Array
    """Behind the last position that any query of the tile sees."""
    clean_start: Array
    """Values before this position may be NaN."""
    clean_stop: Array
    """Values from this position on may be NaN."""


TILE_FIELDS = tuple(field.name for field in fields(Tile))
"""The columns of the table."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the batch's R rows attend to, int32 [R] each."""

    positions: Array
    """The position of the row's first query."""
    key_low: Array
    """The row's first key."""
    key_stop: Array
    """Behind the row's last key."""
    clean_start: Array
    """From here on the row's values are sure not to be NaN."""
    clean_stop: Array
    """Up to here the row's values are sure not to be NaN."""


def make_tiles(
    query_start_loc: Array, tokens: int, rows: Rows, *, mask: Mask, config: Config, skip_single: bool = False
) -> tuple[Array, Array]:
    """Cut rows into tiles, and what lies behind the last row into tiles that see no key: their results are zeros.

    Args:
        query_start_loc: [R+1], where each row's queries start, and the end.
        tokens: T.
        rows: what they attend to.
        skip_single: leave out rows of one query.

    Returns:
        The table of tiles by falling cost, int32 [tiles, columns], and the number of real ones, [1].
    """
    starts = query_start_loc.astype(jnp.int32)
    lens = jnp.append(jnp.diff(starts), tokens - starts[-1:])
    origins = starts // ALIGNMENT * ALIGNMENT
    counts = jnp.where(lens > 0, -(-(starts + lens - origins) // config.query_tile), 0)
    if skip_single:
        counts = counts.at[:-1].set(jnp.where(lens[:-1] == 1, 0, counts[:-1]))
    ends = jnp.cumsum(counts)
    most = (tokens + lens.shape[0] * (config.query_tile + ALIGNMENT - 2)) // config.query_tile + 1
    index = jnp.arange(most, dtype=jnp.int32)
    row = jnp.minimum((ends[None, :] <= index[:, None]).sum(axis=1, dtype=jnp.int32), lens.shape[0] - 1)
    query_start = origins[row] + (index - (ends - counts)[row]) * config.query_tile
    store_start = jnp.maximum(query_start, starts[row])
    store_stop = jnp.minimum(query_start + config.query_tile, starts[row] + lens[row])

    def of_tile(values: Array) -> Array:  # The tokens behind the last row see no key.
        return jnp.append(values, 0)[row]

    position = of_tile(rows.positions) - starts[row]
    low, stop = of_tile(rows.key_low), of_tile(rows.key_stop)
    if mask.causal:
        stop = jnp.minimum(stop, position + store_stop)
    block = low // ALIGNMENT * ALIGNMENT
    if mask.window is not None:
        low = jnp.maximum(low, position + store_start - mask.window + 1)
        block += jnp.maximum(low - block, 0) // config.kv_tile * config.kv_tile
    stop = jnp.where(stop > low, stop, block)
    tile = Tile(
        row=row,
        query_start=query_start,
        store_start=store_start,
        store_stop=store_stop,
        position=position + query_start,
        key_start=block,
        key_low=low,
        key_stop=stop,
        clean_start=of_tile(rows.clean_start),
        clean_stop=of_tile(rows.clean_stop),
    )
    cost = jnp.where(index < ends[-1], -(-(stop - block) // config.kv_tile), -1)
    table = jnp.stack([getattr(tile, name) for name in TILE_FIELDS], axis=1)
    return table[jnp.argsort(cost, descending=True)], ends[-1:]
