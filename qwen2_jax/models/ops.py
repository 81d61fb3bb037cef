"""The calls of the kernels, those with adapters apart: each is one `shard_map` island over the KV heads.

A kernel that XLA cannot look into has no sharding rule; inside the island it sees one device's heads and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import qwen2_kernels as kernels
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from qwen2_jax.models.batch import StepBatch
from qwen2_jax.parallel import TP

HEADS = P(None, TP)  # q: [T, K, ...]
PARTIAL_HEADS = P(None, None, TP)  # qkv: [S, T, K, ...]
POOL = P(None, None, TP)  # [P, B, K, H]

by_platform = kernels.by_platform
Adapted = kernels.Adapted

KVPair = tuple[Float[Array, "P B K H"], Float[Array, "P B K H"]]


def write_kv_cache(
    qkv: Float[Array, "S T K G+2 H"],
    bias: Float[Array, "K G+2 H"],
    rope: tuple[Array, Array],
    kv_cache: KVPair,
    batch: StepBatch,
    adapted: Adapted | None = None,
) -> tuple[Float[Array, "T K G H"], KVPair]:
    """Add partial sums and `bias`, rotate queries and keys, and write keys and values to the cache.

    `rope` is cosine and sine, [T, H/2] each; `adapted` what adapters change before the bias.
    """
    slots = batch.slot_mapping
    if batch.prefill_cache_indices is not None:
        kept = jnp.zeros(slots.shape, bool).at[batch.prefill_cache_indices].set(True)
        slots = jnp.where(kept, slots, -1)

    def island(qkv: Array, bias: Array, adapted: Adapted | None, *arrays: Array) -> tuple[Array, Array, Array]:
        return kernels.write_kv(qkv, *arrays, bias=bias, adapted=adapted)

    changes = None if adapted is None else Adapted(delta=HEADS, scale_bank=HEADS, scale_rows=P())  # pyright: ignore[reportArgumentType]
    run = sharded(island, (PARTIAL_HEADS, P(TP), changes, P(), P(), POOL, POOL, P()), (HEADS, POOL, POOL))
    q, k, v = run(qkv, bias, adapted, *rope, *kv_cache, slots)
    return q, (k, v)


def attention(
    q: Float[Array, "T K G H"], kv_cache: KVPair, batch: StepBatch, *, window: int | None, causal: bool
) -> Float[Array, "T K G H"]:
    """Attend from each query to its row's tokens in the cache, this step's included."""
    scale = q.shape[-1] ** -0.5
    lengths = (batch.context_lens,) if batch.query_start_loc is None else (batch.context_lens, batch.query_start_loc)

    def island(q: Array, k: Array, v: Array, tables: Array, *lengths: Array) -> Array:
        return kernels.paged_attention(q, k, v, tables, *lengths, scale=scale, window=window, causal=causal)

    run = sharded(island, (HEADS, POOL, POOL, P(), *(P() for _ in lengths)), HEADS)
    return run(q, *kv_cache, batch.block_tables, *lengths)


def rms_norm(
    x: Float[Array, "*S T D"],
    residual: Float[Array, "T D"] | None,
    weight: Float[Array, " D"],
    eps: float,
    adapted: Adapted | None = None,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """Return the norm of `x + residual`, and that sum; `x` may be partial sums. Every device does the same.

    `adapted` is what adapters change in `x` first.
    """

    def island(x: Array, weight: Array, adapted: Adapted | None, *residual: Array) -> tuple[Array, Array]:
        return kernels.rms_norm(x, weight, *residual, eps=eps, adapted=adapted)

    residuals = () if residual is None else (residual,)
    run = sharded(island, (P(), P(), P(), *(P() for _ in residuals)), (P(), P()))
    return run(x, weight, adapted, *residuals)


@dataclass(frozen=True, kw_only=True)
class PendingNorm:
    """The norm of `x + residual`, left to the projection that reads it: a GPU does both in one launch for one token.

    `x` may be partial sums over S.
    """

    x: Float[Array, "*S T D"]
    residual: Float[Array, "T D"] | None
    weight: Float[Array, " D"]
    num_tokens: Int[Array, ""] | None
    """How many of the first tokens matter, see `kernels.linear`; None means all."""
    eps: float

    def project(
        self,
        kernel: Float[Array, "N D"] | Float[Array, "2 N D"],
        prefetch: Array | None,
        **options: Any,
    ) -> tuple[Float[Array, "*S T N"], Float[Array, "T D"]]:
        """Return one device's share of the projection, and `x + residual`; `prefetch` is read next."""
        hints: dict[str, Any] = {"prefetch": prefetch, "num_tokens": self.num_tokens}
        return kernels.norm_linear(self.x, self.weight, kernel, self.residual, eps=self.eps, **hints, **options)


jax.tree_util.register_dataclass(
    PendingNorm, data_fields=["x", "residual", "weight", "num_tokens"], meta_fields=["eps"]
)


def project_qkv(
    norm: PendingNorm, kernel: Float[Array, "K G+2 H D"], o_kernel: Float[Array, "D K G H"]
) -> tuple[Float[Array, "S T K G+2 H"], Float[Array, "T D"]]:
    """Project to each device's heads, without a bias: partial sums; and return the residual. No communication."""

    def island(norm: PendingNorm, kernel: Array, o_kernel: Array) -> tuple[Array, Array]:
        out, residual = norm.project(kernel.reshape(-1, kernel.shape[-1]), o_kernel, partial=True)
        return out.reshape(*out.shape[:2], *kernel.shape[:-1]), residual

    return sharded(island, (P(), P(TP), HEADS), (PARTIAL_HEADS, P()))(norm, kernel, o_kernel)


def project_gated(
    norm: PendingNorm, kernel: Float[Array, "2 F D"], down_kernel: Float[Array, "D F"], activation: str
) -> tuple[Float[Array, "T F"], Float[Array, "T D"]]:
    """Return `act(gate) * up` of each device's columns, and the residual; no communication."""

    def island(norm: PendingNorm, kernel: Array, down_kernel: Array) -> tuple[Array, Array]:
        return norm.project(kernel, down_kernel, activation=activation)

    return sharded(island, (P(), P(None, TP), HEADS), (HEADS, P()))(norm, kernel, down_kernel)


def project_rows(
    x: Float[Array, "T *in"],
    kernel: Float[Array, "D *in"],
    num_tokens: Int[Array, ""] | None,
    *next_kernel: Float[Array, "2 F D"],
) -> Float[Array, "S T D"]:
    """Multiply by a kernel whose inputs, from their first axis on, are split over the devices; one all-reduce.

    One device leaves partial sums for the norm behind to add up. `num_tokens` of the first tokens matter, None means
    all. `next_kernel` is what the layer reads next, if known.
    """

    def island(x: Array, kernel: Array, num_tokens: Array | None, *next_kernel: Array) -> Array:
        x, kernel = x.reshape(x.shape[0], -1), kernel.reshape(kernel.shape[0], -1)
        hints: dict[str, Any] = {"prefetch": next_kernel[0] if next_kernel else None, "num_tokens": num_tokens}
        if jax.sharding.get_abstract_mesh().shape.get(TP, 1) > 1:
            return jax.lax.psum(kernels.linear(x, kernel, **hints), TP)[None]
        return kernels.linear_partial(x, kernel, **hints)

    next_specs = [P(None, TP) for _ in next_kernel]
    return sharded(island, (HEADS, HEADS, P(), *next_specs), P())(x, kernel, num_tokens, *next_kernel)


def skips_padding(dtype: jnp.dtype) -> bool:
    """Return whether, in prefills of many tokens, projections in `dtype` take no time for the padding here."""
    return kernels.skips_padding(dtype)


def project_vocab(x: Float[Array, "T D"], embedding: Float[Array, "V D"]) -> Float[Array, "T V"]:
    """Return each device's share of the logits, float32; no communication."""

    def island(x: Array, embedding: Array) -> Array:
        return kernels.linear(x, embedding, out_dtype=jnp.dtype(jnp.float32))

    return sharded(island, (P(), P(TP)), P(None, TP))(x, embedding)


def top_k_top_p_threshold(
    logits: Float[Array, "R V"],
    k: Int[Array, " R"],
    p: Float[Array, " R"],
    temperature: Float[Array, " R"],
    floor: Float[Array, " R"],
) -> Float[Array, " R"]:
    """Return where top-k and top-p cut each row, see `kernels.top_k_top_p_threshold`. Every device does the same."""
    return _everywhere(kernels.top_k_top_p_threshold, logits, k, p, temperature, floor)


def gumbel_argmax(
    logits: Float[Array, "R V"],
    temperature: Float[Array, " R"],
    threshold: Float[Array, " R"],
    seeds_high: Int[Array, " R"],
    seeds_low: Int[Array, " R"],
    indices: Int[Array, " R"],
) -> Int[Array, " R"]:
    """Draw a token of each row, see `kernels.gumbel_argmax`. Every device does the same."""
    return _everywhere(kernels.gumbel_argmax, logits, temperature, threshold, seeds_high, seeds_low, indices)


def token_ranks(logits: Float[Array, "R V"], token_ids: Int[Array, "R C"]) -> Int[Array, "R C"]:
    """Return where tokens stand among all of their row's, see `kernels.token_ranks`. Every device does the same."""
    return _everywhere(kernels.token_ranks, logits, token_ids)


def top_logits(
    logits: Float[Array, "R V"], is_wanted: Bool[Array, " R"], count: int
) -> tuple[Float[Array, "R K"], Int[Array, "R K"], Float[Array, " R"]]:
    """Return each row's likeliest tokens, see `kernels.top_logits`. Every device does the same."""
    run = sharded(partial(kernels.top_logits, count=count), (P(), P()), (P(), P(), P()))
    return run(logits, is_wanted)


def _everywhere(op: Callable[..., Array], *arrays: Array) -> Array:
    return sharded(op, tuple(P() for _ in arrays), P())(*arrays)


def sharded[**A, O](function: Callable[A, O], in_specs: tuple[Any, ...], out_specs: Any) -> Callable[A, O]:
    """Run `function` on each device's shards, or as it is where no mesh is set; specs are trees like the arguments."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
