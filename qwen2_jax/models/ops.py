"""The only caller of the kernels: each call is one `shard_map` island over the KV heads.

A kernel that XLA cannot look into has no sharding rule; inside the island it sees one device's heads and nothing else.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import qwen2_kernels as kernels
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

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
        return kernels.write_kv(qkv, cos, sin, k, v, slots)

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
        return kernels.paged_attention(q, k, v, tables, *lengths, scale=scale, window=window, causal=causal)

    run = _sharded(island, (HEADS, POOL, POOL, P(), *(P() for _ in lengths)), HEADS)
    return run(q, *kv_cache, batch.block_tables, *lengths)


def rms_norm(
    x: Float[Array, "T D"], residual: Float[Array, "T D"] | None, weight: Float[Array, " D"], eps: float
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """Return the norm of `x + residual`, and that sum; every device does the same."""

    def island(x: Array, weight: Array, *residual: Array) -> tuple[Array, Array]:
        return kernels.rms_norm(x, weight, *residual, eps=eps)

    arrays = (x, weight) if residual is None else (x, weight, residual)
    return _sharded(island, tuple(P() for _ in arrays), (P(), P()))(*arrays)


def project_qkv(
    x: Float[Array, "T D"], kernel: Float[Array, "K G+2 H D"], bias: Float[Array, "K G+2 H"]
) -> Float[Array, "T K G+2 H"]:
    """Project to each device's heads; no communication."""

    def island(x: Array, kernel: Array, bias: Array) -> Array:
        out = kernels.linear(x, kernel.reshape(-1, kernel.shape[-1]), bias=bias.reshape(-1))
        return out.reshape(-1, *bias.shape)

    return _sharded(island, (P(), P(TP), P(TP)), HEADS)(x, kernel, bias)


def project_gated(x: Float[Array, "T D"], kernel: Float[Array, "2 F D"], activation: str) -> Float[Array, "T F"]:
    """Return `act(gate) * up` of each device's columns; no communication."""

    def island(x: Array, kernel: Array) -> Array:
        return kernels.linear(x, kernel, activation=activation)

    return _sharded(island, (P(), P(None, TP)), HEADS)(x, kernel)


def project_rows(x: Float[Array, "T *in"], kernel: Float[Array, "D *in"]) -> Float[Array, "T D"]:
    """Multiply by a kernel whose inputs, from their first axis on, are split over the devices; one all-reduce."""

    def island(x: Array, kernel: Array) -> Array:
        out = kernels.linear(x.reshape(x.shape[0], -1), kernel.reshape(kernel.shape[0], -1))
        return jax.lax.psum(out, TP) if jax.sharding.get_abstract_mesh().shape.get(TP, 1) > 1 else out

    return _sharded(island, (HEADS, HEADS), P())(x, kernel)


def _sharded[**A, O](function: Callable[A, O], in_specs: tuple[P, ...], out_specs: P | tuple[P, ...]) -> Callable[A, O]:
    """Run `function` on each device's shards, or as it is where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
