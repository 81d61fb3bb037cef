"""`lora_delta` and `lora_gated` as XLA compiles them: for each item in use a gather, two products and a scatter.

The loop's length is data, so that the time follows the adapters of the step, not the size of its tables.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qwen2_kernels.linear.activations import ACTIVATIONS
from qwen2_kernels.lora.batch import GATE_UP_PROJECTION, LoRABatch, LoRAProjection


def lora_delta_xla(
    x: Array, a_bank: Array, b_bank: Array, bias_bank: Array | None, batch: LoRABatch, *, projection: LoRAProjection
) -> Array:
    """See `api.lora_delta`."""
    total = add_bias(product_sums(x, a_bank, b_bank, batch, projection), bias_bank, batch)
    return total.astype(x.dtype)


def lora_gated_xla(
    x: Array,
    base: Array,
    a_bank: Array,
    b_bank: Array,
    bias_bank: Array | None,
    scale_bank: Array | None,
    batch: LoRABatch,
    *,
    activation: str,
) -> Array:
    """See `api.lora_gated`."""
    flat_bank = b_bank.reshape(*b_bank.shape[:2], -1)
    delta = product_sums(x, a_bank, flat_bank, batch, GATE_UP_PROJECTION).reshape(base.shape)
    delta = add_bias(delta, bias_bank, batch)
    total = base.astype(jnp.float32)
    if scale_bank is not None:
        vectors = _token_vectors(batch)
        total *= jnp.where((vectors >= 0)[:, None, None], scale_bank[vectors], 1.0)
    total += delta
    return (ACTIVATIONS[activation](total[:, 0]) * total[:, 1]).astype(x.dtype)


def product_sums(x: Array, a_bank: Array, b_bank: Array, batch: LoRABatch, projection: LoRAProjection) -> Array:
    """Return the sum over each token's pages of their weighted products, float32 [T, N]."""
    tokens, num_columns = x.shape[0], b_bank.shape[-1]
    blocks = np.array(projection.blocks(num_columns))
    lanes = jnp.arange(min(batch.tile, tokens))

    def add_item(item: Array, total: Array) -> Array:
        segment = batch.item_segments[item]
        places = batch.segment_starts[segment] + lanes
        inside = places < batch.segment_starts[segment + 1]
        rows = jnp.where(inside, batch.token_order[places], tokens)
        some_x = x.at[rows].get(mode="fill", fill_value=0).astype(jnp.float32)
        a, b = (lax.dynamic_index_in_dim(bank, batch.item_pages[item], keepdims=False) for bank in (a_bank, b_bank))
        ranks = jnp.einsum("tk,crk->tcr", some_x, a.astype(jnp.float32), precision="highest")
        has_module = (batch.item_modules[item] >> np.array(projection.modules)) & 1
        ranks = jnp.where(has_module[None, :, None] == 1, ranks * batch.item_weights[item], 0.0)
        b = b.astype(jnp.float32).reshape(b.shape[0], len(blocks), -1)
        product = jnp.einsum("tcr,rcw->tcw", ranks[:, blocks], b, precision="highest")
        return total.at[rows].add(product.reshape(-1, num_columns), mode="drop")

    return lax.fori_loop(0, batch.num_items[0], add_item, jnp.zeros((tokens, num_columns), jnp.float32))


def add_bias(delta: Array, bias_bank: Array | None, batch: LoRABatch) -> Array:
    """Return `delta` with the row of `bias_bank` that each token's segment names."""
    if bias_bank is None:
        return delta
    vectors = _token_vectors(batch)
    return delta + jnp.where((vectors >= 0).reshape(-1, *[1] * (delta.ndim - 1)), bias_bank[vectors], 0.0)


def _token_vectors(batch: LoRABatch) -> Array:
    """Return the row of the bias and scale banks of each token, [T]; -1 is none."""
    places = jnp.arange(len(batch.token_order))
    segments = jnp.searchsorted(batch.segment_starts[1:], places, side="right")
    return jnp.zeros_like(places).at[batch.token_order].set(batch.segment_vectors[segments])
