"""`paged_attention` for any platform: online softmax over chunks of the context, in loops that XLA compiles.

The loops' trip counts are data, so that work and memory follow the real contexts, never the tables' width, and one
compiled program serves every length. Rows with a single query (decodes) go through the pools together; the others in
tiles of queries, one tile after another.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from qwen2_kernels.dispatch import mesh_platform

# Tokens of context per iteration, and queries per tile, by platform. On a CPU a larger chunk falls out of its caches
# (16 rows of SmolLM2: 17 ms for 64 tokens, 131 ms for 256); on a GPU each iteration costs several launches.
CHUNK = {"cpu": 64, "gpu": 512}
TILE = {"cpu": 64, "gpu": 512}


class _Mask(NamedTuple):
    window: int | None
    causal: bool

    def seen(self, query_positions: Array, key_positions: Array, context_lens: Array) -> Array:
        """Which keys each query may see; the three arrays broadcast against each other."""
        seen = key_positions < context_lens
        if self.causal:
            seen &= key_positions <= query_positions
        if self.window is not None:
            seen &= key_positions > query_positions - self.window
        return seen


def paged_attention_xla(
    q: Array,
    k_pool: Array,
    v_pool: Array,
    block_tables: Array,
    context_lens: Array,
    query_start_loc: Array | None,
    *,
    scale: float,
    window: int | None,
    causal: bool,
    k_scale: float,
    v_scale: float,
) -> Array:
    """See `api.paged_attention`."""
    mask = _Mask(window, causal)
    pools = (k_pool, v_pool)
    scaled = (q.astype(jnp.float32) * (scale * k_scale)).astype(q.dtype)
    blocks = min(max(1, CHUNK[_platform()] // k_pool.shape[1]), block_tables.shape[1])
    tables = jnp.pad(block_tables, ((0, 0), (0, -block_tables.shape[1] % blocks)))
    if query_start_loc is None:
        out = _decode(scaled, pools, tables, context_lens, blocks, mask)
    else:
        query_lens = jnp.diff(query_start_loc)
        single = query_lens == 1
        rows = jnp.minimum(query_start_loc[:-1], q.shape[0] - 1)
        decoded = _decode(scaled[rows], pools, tables, jnp.where(single, context_lens, 0), blocks, mask)
        out = _tiles(scaled, pools, tables, context_lens, query_start_loc, blocks, mask)
        out = out.at[jnp.where(single, rows, q.shape[0])].set(decoded, mode="drop")
    return (out * v_scale).astype(q.dtype)


def _decode(q: Array, pools: tuple[Array, Array], tables: Array, lens: Array, blocks: int, mask: _Mask) -> Array:
    """One query a row: q [R, K, G, H], all rows together. A row of length 0 gives zeros."""
    rows, chunk = q.shape[0], blocks * pools[0].shape[1]
    first = jnp.zeros((), jnp.int32)
    if mask.window is not None:
        oldest = jnp.where(lens > 0, lens - mask.window, jnp.iinfo(jnp.int32).max)
        first = jnp.maximum(jnp.min(oldest), 0) // chunk

    def step(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        table = jax.lax.dynamic_slice_in_dim(tables, index * blocks, blocks, axis=1)
        k, v = (pool[table].reshape(rows, chunk, *pool.shape[2:]) for pool in pools)
        positions = index * chunk + jnp.arange(chunk)
        seen = mask.seen(lens[:, None] - 1, positions[None, :], lens[:, None])
        logits = jnp.einsum("rkgh,rskh->rkgs", q, k.astype(q.dtype), preferred_element_type=jnp.float32)
        values = jnp.where(seen[:, :, None, None], v.astype(q.dtype), 0)
        return _accumulate(carry, logits, seen[:, None, None, :], values, "rkgs,rskh->rkgh")

    return _finish(jax.lax.fori_loop(first, _chunks(jnp.max(lens), chunk), step, _start(q.shape)))


def _tiles(
    q: Array,
    pools: tuple[Array, Array],
    tables: Array,
    lens: Array,
    query_start_loc: Array,
    blocks: int,
    mask: _Mask,
) -> Array:
    """Rows of several queries: q [T, K, G, H], tile after tile. Zeros for every other token."""
    tile = min(TILE[_platform()], q.shape[0])
    query_lens = jnp.diff(query_start_loc)
    ends = jnp.cumsum(jnp.where(query_lens > 1, -(-query_lens // tile), 0))
    padded = jnp.pad(q, ((0, tile), (0, 0), (0, 0), (0, 0)))
    out = jnp.zeros(padded.shape, jnp.float32)

    def attend(index: Array, out: Array) -> Array:
        row = jnp.searchsorted(ends, index, side="right")
        offset = (index - jnp.where(row > 0, ends[row - 1], 0)) * tile
        start = query_start_loc[row] + offset
        queries = jax.lax.dynamic_slice_in_dim(padded, start, tile)
        inside = offset + jnp.arange(tile) < query_lens[row]
        positions = lens[row] - query_lens[row] + offset + jnp.arange(tile)
        result = _attend_tile(queries, pools, tables[row], lens[row], positions, blocks, mask)
        old = jax.lax.dynamic_slice_in_dim(out, start, tile)
        result = jnp.where(inside[:, None, None, None], jnp.moveaxis(result, 2, 0), old)
        return jax.lax.dynamic_update_slice_in_dim(out, result, start, axis=0)

    return jax.lax.fori_loop(0, ends[-1], attend, out)[: q.shape[0]]


def _attend_tile(
    q: Array, pools: tuple[Array, Array], table: Array, length: Array, positions: Array, blocks: int, mask: _Mask
) -> Array:
    """One tile of one row's queries, [Q, K, G, H], over that row's context; returns [K, G, Q, H]."""
    chunk = blocks * pools[0].shape[1]
    end = jnp.minimum(length, positions[-1] + 1) if mask.causal else length
    oldest = jnp.zeros((), jnp.int32) if mask.window is None else jnp.maximum(positions[0] - mask.window + 1, 0)

    def step(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        part = jax.lax.dynamic_slice_in_dim(table, index * blocks, blocks)
        k, v = (pool[part].reshape(chunk, *pool.shape[2:]) for pool in pools)
        keys = index * chunk + jnp.arange(chunk)
        seen = mask.seen(positions[:, None], keys[None, :], length)
        logits = jnp.einsum("qkgh,skh->kgqs", q, k.astype(q.dtype), preferred_element_type=jnp.float32)
        # A weight of 0 does not hide a NaN: what no query of the tile sees may be anything.
        values = jnp.where(((keys >= oldest) & (keys < length))[:, None, None], v.astype(q.dtype), 0)
        return _accumulate(carry, logits, seen[None, None], values, "kgqs,skh->kgqh")

    tile, kv_heads, group, head_dim = q.shape
    start = _start((kv_heads, group, tile, head_dim))
    return _finish(jax.lax.fori_loop(oldest // chunk, _chunks(end, chunk), step, start))


def _platform() -> str:
    return "cpu" if (mesh_platform() or jax.default_backend()) == "cpu" else "gpu"


def _chunks(tokens: Array, chunk: int) -> Array:
    return (tokens + chunk - 1) // chunk


def _start(shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """The running maximum, sum of weights and weighted values of an online softmax that has seen nothing."""
    return jnp.full(shape[:-1], -jnp.inf), jnp.zeros(shape[:-1]), jnp.zeros(shape)


def _accumulate(
    carry: tuple[Array, Array, Array], logits: Array, seen: Array, values: Array, contraction: str
) -> tuple[Array, Array, Array]:
    """Add one chunk to an online softmax (Milakov and Gimelshein 2018, as in FlashAttention)."""
    maximum, total, weighted = carry
    logits = jnp.where(seen, logits, -jnp.inf)
    new_maximum = jnp.maximum(maximum, jnp.max(logits, axis=-1))
    safe = jnp.where(jnp.isfinite(new_maximum), new_maximum, 0.0)  # a query that has seen no key yet
    weights = jnp.exp(logits - safe[..., None])
    decay = jnp.exp(maximum - safe)
    part = jnp.einsum(contraction, weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return new_maximum, total * decay + weights.sum(-1), weighted * decay[..., None] + part


def _finish(carry: tuple[Array, Array, Array]) -> Array:
    _, total, weighted = carry
    return jnp.where(total[..., None] > 0, weighted / jnp.maximum(total, 1e-37)[..., None], 0.0)
