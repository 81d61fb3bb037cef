"""The only caller of the kernels: each call is one `shard_map` island over the KV heads.

A kernel that XLA cannot look into has no sharding rule; inside the island it sees one device's heads and nothing else.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float
from qwen2_kernels import paged_attention, write_kv

from qwen2_jax.models.batch import StepBatch
from qwen2_jax.parallel import TP

HEADS = P(None, TP)  # qkv and q: [T, K, ...]
POOL = P(None, None, TP)  # [P, B, K, H]

KVPair = tuple[Float[Array, "P B K H"], Float[Array, "P B K H"]]


def write_kv_cache(
    qkv: Float[Array, "T K G+2 H"], rope: tuple[Array, Array], kv_cache: KVPair, batch: StepBatch
) -> tuple[Float[Array, "T K G H"], KVPair]:
    """Rotate queries and keys by `rope` (cosine and sine, [T, H/2]) and write keys and values by `slot_mapping`."""
    slots = batch.slot_mapping
    if batch.prefill_cache_indices is not None:
        kept = jnp.zeros(slots.shape, bool).at[batch.prefill_cache_indices].set(True)
        slots = jnp.where(kept, slots, -1)

    def island(qkv: Array, cos: Array, sin: Array, k: Array, v: Array, slots: Array) -> tuple[Array, Array, Array]:
        return write_kv(qkv, cos, sin, k, v, slots)

    run = _sharded(island, (HEADS, P(), P(), POOL, POOL, P()), (HEADS, POOL, POOL))
    q, k, v = run(qkv, *rope, *kv_cache, slots)
    return q, (k, v)


def attention(
    q: Float[Array, "T K G H"], kv_cache: KVPair, batch: StepBatch, *, window: int | None, causal: bool
) -> Float[Array, "T K G H"]:
    """Attend from each query to its row's tokens in the cache, this step's included."""
    scale = q.shape[-1] ** -0.5
    lengths = (batch.context_lens,) if batch.query_start_loc is None else (batch.context_lens, batch.query_start_loc)

    def island(q: Array, k: Array, v: Array, tables: Array, *lengths: Array) -> Array:
        return paged_attention(q, k, v, tables, *lengths, scale=scale, window=window, causal=causal)

    run = _sharded(island, (HEADS, POOL, POOL, P(), *(P() for _ in lengths)), HEADS)
    return run(q, *kv_cache, batch.block_tables, *lengths)


def _sharded[**A, O](function: Callable[A, O], in_specs: tuple[P, ...], out_specs: P | tuple[P, ...]) -> Callable[A, O]:
    """Run `function` on each device's shards, or as it is where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
