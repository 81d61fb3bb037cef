"""The paged key and value pools on the device: their size, from the memory that is free, and their allocation."""

import logging
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import psutil
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen2_jax.config import CacheConfig, ModelConfig
from qwen2_jax.errors import CapacityError
from qwen2_jax.models.ops import POOL
from qwen2_jax.models.qwen2 import KVCache
from qwen2_jax.parallel import HeadLayout

logger = logging.getLogger(__name__)

CPU_CACHE_BYTES = 2 * 2**30
"""The most that the cache takes on a CPU unless `kv_cache_memory_bytes` says otherwise."""
_ROUND = 16
"""Large caches have a multiple of this many blocks, so that a few free bytes more or less need no other programs."""
FRAGMENTATION = 0.02
"""The share of a GPU's memory that the allocator may lose between its pieces."""


@dataclass(frozen=True, kw_only=True)
class PoolLayout:
    """The shape of the pools: per layer, one of keys and one of values, [P, B, K, H]."""

    num_layers: int
    block_size: int
    kv_heads: int
    head_dim: int
    dtype: str
    tp: int

    @classmethod
    def of(cls, model: ModelConfig, block_size: int, dtype: str, tp: int) -> "PoolLayout":
        """Return the layout for a model whose weights have `dtype`."""
        heads = HeadLayout(model.num_attention_heads, model.num_key_value_heads, tp)
        return cls(
            num_layers=model.num_hidden_layers,
            block_size=block_size,
            kv_heads=heads.padded_kv_heads,
            head_dim=model.head_dim,
            dtype=dtype,
            tp=tp,
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on one device, keys and values of all layers."""
        per_token = 2 * self.num_layers * self.kv_heads // self.tp * self.head_dim * jnp.dtype(self.dtype).itemsize
        return per_token * self.block_size

    def abstract(self, mesh: Mesh, num_blocks: int) -> tuple[tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct], ...]:
        """Return the pools' shapes and shardings."""
        shape = (num_blocks, self.block_size, self.kv_heads, self.head_dim)
        pool = jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype), sharding=NamedSharding(mesh, P(*POOL, None)))
        return tuple((pool, pool) for _ in range(self.num_layers))

    def allocate(self, mesh: Mesh, num_blocks: int) -> KVCache:
        """Return zeroed pools."""
        pool = self.abstract(mesh, num_blocks)[0][0]
        zeros = jax.jit(lambda: jnp.zeros(pool.shape, pool.dtype), out_shardings=pool.sharding)
        return tuple((zeros(), zeros()) for _ in range(self.num_layers))


def count_blocks(
    layout: PoolLayout, cache: CacheConfig, *, workspace_bytes: int, blocks_needed: int, blocks_useful: int
) -> int:
    """Return P, how many blocks fit on each device, the unused block 0 included; the log says how it comes about.

    `workspace_bytes` is what the largest step takes besides its arguments. One sequence of the full length holds
    `blocks_needed` at most: `CapacityError` if they do not fit. More than `blocks_useful` are never filled.
    """
    if cache.num_gpu_blocks_override is not None:
        return cache.num_gpu_blocks_override
    available, account = _available_bytes(cache, workspace_bytes)
    blocks = min(available // layout.block_bytes, blocks_useful + 1)
    blocks -= blocks % _ROUND if blocks > 100 * _ROUND else 0
    if blocks < blocks_needed + 1:
        needed = (blocks_needed + 1) * layout.block_bytes
        raise CapacityError(
            f"one sequence of the longest length needs {needed / 2**30:.3f} GiB of cache, and there are "
            f"{max(available, 0) / 2**30:.3f} GiB ({account}): lower max_model_len, max_num_batched_tokens or "
            "max_num_seqs, raise gpu_memory_utilization, or set kv_cache_memory_bytes"
        )
    logger.info(
        "KV cache: %d blocks of %d tokens, %.2f GiB on each device (%s)",
        blocks, layout.block_size, blocks * layout.block_bytes / 2**30, account,
    )  # fmt: skip
    return int(blocks)


def _available_bytes(cache: CacheConfig, workspace_bytes: int) -> tuple[int, str]:
    """Return the bytes that the pools may take on each device, and how that was reckoned."""
    if cache.kv_cache_memory_bytes is not None:
        return cache.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if device.platform == "cpu" or stats is None:
        free = psutil.virtual_memory().available
        return min(free // 2, CPU_CACHE_BYTES), "half of the free host memory, at most 2 GiB"
    limit, used = stats["bytes_limit"], stats["bytes_in_use"]
    reserve = int(limit * FRAGMENTATION)
    account = (
        f"{limit / 2**30:.2f} GiB given to JAX, less {used / 2**30:.2f} of weights and state, "
        f"{workspace_bytes / 2**30:.2f} of workspace and {reserve / 2**30:.2f} for fragmentation"
    )
    return limit - used - workspace_bytes - reserve, account
