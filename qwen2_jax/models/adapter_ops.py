"""The calls of the adapters' kernels; as in `ops`, each is one `shard_map` island."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import qwen2_kernels as kernels
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int
from qwen2_kernels import Adapted, LoRABatch
from qwen2_kernels.lora.batch import DOWN_PROJECTION, O_PROJECTION, qkv_projection

from qwen2_jax.models.adapters import LayerAdapters, ProjectionBanks, bank_specs
from qwen2_jax.models.ops import HEADS, PARTIAL_HEADS, project_vocab, sharded
from qwen2_jax.models.vocab_adapters import EMBED, HEAD, VocabAdapters, VocabBanks, VocabTables, vocab_bank_specs
from qwen2_jax.parallel import TP, out_sharding

ROW_PROJECTIONS = {"o": O_PROJECTION, "down": DOWN_PROJECTION}


def adapted_qkv(
    x: Float[Array, "T D"],
    num_tokens: Int[Array, ""] | None,
    kernel: Float[Array, "K G+2 H D"],
    o_kernel: Float[Array, "D K G H"],
    adapters: LayerAdapters,
) -> tuple[Float[Array, "S T K G+2 H"], Adapted]:
    """Project normed tokens as `project_qkv` does; return partial sums, and what their adapters change in them."""

    def island(
        x: Array, num_tokens: Array | None, kernel: Array, o_kernel: Array, banks: ProjectionBanks, tables: LoRABatch
    ) -> tuple[Array, Array]:
        kv_heads, slots, head_dim, _ = kernel.shape
        flat = kernel.reshape(-1, kernel.shape[-1])
        out = kernels.linear_partial(x, flat, prefetch=o_kernel, num_tokens=num_tokens)
        delta = kernels.lora_delta(
            x,
            banks.a,
            banks.b.reshape(*banks.b.shape[:2], -1),
            tables,
            projection=qkv_projection(slots - 2, head_dim),
            bias_bank=banks.bias.reshape(banks.bias.shape[0], -1),
        )
        heads = (kv_heads, slots, head_dim)
        return out.reshape(*out.shape[:2], *heads), delta.reshape(delta.shape[0], *heads)

    banks = adapters.banks.qkv
    specs = (P(), P(), P(TP), HEADS, bank_specs().qkv, _replicated(adapters.tables))
    run = sharded(island, specs, (PARTIAL_HEADS, HEADS))
    out, delta = run(x, num_tokens, kernel, o_kernel, banks, adapters.tables)
    return out, Adapted(delta=delta, scale_bank=banks.scale, scale_rows=adapters.scale_rows)


def adapted_gated(
    x: Float[Array, "T D"],
    num_tokens: Int[Array, ""] | None,
    kernel: Float[Array, "2 F D"],
    adapters: LayerAdapters,
    activation: str,
) -> Float[Array, "T F"]:
    """Return `act(gate) * up` of normed tokens with their adapters, each device's columns; no communication."""

    def island(x: Array, num_tokens: Array | None, kernel: Array, banks: ProjectionBanks, tables: LoRABatch) -> Array:
        options: dict[str, Any] = {"activation": activation, "num_tokens": num_tokens}
        if adapters.has_vectors:
            options |= {"bias_bank": banks.bias, "scale_bank": banks.scale}
        return kernels.lora_linear_gated(x, kernel, banks.a, banks.b, tables, **options)

    specs = (P(), P(), P(None, TP), bank_specs().gate_up, _replicated(adapters.tables))
    return sharded(island, specs, HEADS)(x, num_tokens, kernel, adapters.banks.gate_up, adapters.tables)


def adapted_rows(
    x: Float[Array, "T *in"],
    num_tokens: Int[Array, ""] | None,
    kernel: Float[Array, "D *in"],
    adapters: LayerAdapters,
    name: Literal["o", "down"],
) -> tuple[Float[Array, "S T D"], Adapted | None]:
    """Multiply as `project_rows` does; return partial sums, and what adapters change in them.

    Several devices add it up at once, in the one all-reduce, so that nothing is left to change.
    """
    projection, banks = ROW_PROJECTIONS[name], getattr(adapters.banks, name)
    is_split = jax.sharding.get_abstract_mesh().shape.get(TP, 1) > 1

    def island(
        x: Array, num_tokens: Array | None, kernel: Array, banks: ProjectionBanks, tables: LoRABatch, rows: Array
    ) -> tuple[Array, Array | None]:
        x, kernel = x.reshape(x.shape[0], -1), kernel.reshape(kernel.shape[0], -1)
        a = banks.a.reshape(*banks.a.shape[:3], -1)
        if not is_split:
            delta = kernels.lora_delta(x, a, banks.b, tables, projection=projection, bias_bank=banks.bias)
            return kernels.linear_partial(x, kernel, num_tokens=num_tokens), delta
        delta = kernels.lora_delta(x, a, banks.b, tables, projection=projection)
        change = Adapted(delta=delta, scale_bank=banks.scale, scale_rows=rows)
        base = kernels.linear(x, kernel, num_tokens=num_tokens)
        total = jax.lax.psum(change(base.astype(jnp.float32)), TP)
        bias = jnp.where(rows[:, None] >= 0, banks.bias[jnp.maximum(rows, 0)], 0.0)
        return (total + bias).astype(x.dtype)[None], None

    specs = (HEADS, P(), HEADS, getattr(bank_specs(), name), _replicated(adapters.tables), P())
    out, delta = sharded(island, specs, (P(), None if is_split else P()))(
        x, num_tokens, kernel, banks, adapters.tables, adapters.scale_rows
    )
    if delta is None:
        return out, None
    return out, Adapted(delta=delta, scale_bank=banks.scale, scale_rows=adapters.scale_rows)


def adapted_embedding(
    x: Float[Array, "T D"], input_ids: Int[Array, " T"], adapters: VocabAdapters
) -> Float[Array, "T D"]:
    """Return the tokens' embeddings `x` as their adapters change them."""
    banks, tables = adapters.banks, adapters.tables
    if banks.full_embed.shape[0]:
        slots = jnp.maximum(tables.full_embed_rows, 0)
        own = banks.full_embed.at[slots, input_ids].get(out_sharding=out_sharding(None, None))
        x = jnp.where((tables.full_embed_rows >= 0)[:, None], own, x)
    if not banks.embed_a.shape[0]:
        return x
    ranks = banks.embed_a.at[tables.token_pages, input_ids[:, None]].get(out_sharding=out_sharding(None, None, None))

    def island(ranks: Array, select: Array, b: Array, tables: LoRABatch) -> Array:
        return kernels.lora_delta(ranks, select, b, tables, projection=EMBED)

    run = sharded(island, (P(), P(), P(), _replicated(tables.tables)), P())
    delta = run(ranks.reshape(len(ranks), -1), banks.select, banks.embed_b, tables.tables)
    change = Adapted(delta=delta, scale_bank=banks.embed_scale, scale_rows=tables.vector_rows)
    return change(x.astype(jnp.float32)).astype(x.dtype)


def adapted_logits(
    logits: Float[Array, "T V"], hidden: Float[Array, "T D"], adapters: VocabAdapters
) -> Float[Array, "T V"]:
    """Return the float32 `logits` of final hidden states as adapters change them, each device's share."""
    banks, tables = adapters.banks, adapters.tables

    def island(logits: Array, hidden: Array, banks: VocabBanks, tables: VocabTables) -> Array:
        delta = kernels.lora_delta(hidden, banks.head_a, banks.head_b, tables.tables, projection=HEAD)
        rows = tables.vector_rows
        change = Adapted(delta=delta, scale_bank=banks.head_scale, scale_rows=rows)
        return change(logits) + jnp.where(rows[:, None] >= 0, banks.head_bias[jnp.maximum(rows, 0)], 0.0)

    if banks.head_a.shape[0]:
        specs = (P(None, TP), P(), vocab_bank_specs(), _replicated(tables))
        logits = sharded(island, specs, P(None, TP))(logits, hidden, banks, tables)

    def replace(slot: int, uses: Array, logits: Array) -> Array:
        return jnp.where(uses[:, None], project_vocab(hidden, banks.full_head[slot]), logits)

    for slot in range(banks.full_head.shape[0]):  # a slot that is data would be copied out before it is multiplied
        uses = tables.full_head_rows == slot
        logits = jax.lax.cond(jnp.any(uses), functools.partial(replace, slot), lambda _, logits: logits, uses, logits)
    return logits


def _replicated(tree: Any) -> Any:
    return jax.tree.map(lambda _: P(), tree)
