"""`lora_delta` and `lora_gated` from their formulas in float32, one token and one page after another."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qwen2_kernels.linear.activations import ACTIVATIONS
from qwen2_kernels.lora.batch import GATE_UP_PROJECTION, LoRABatch, LoRAProjection


def lora_delta_reference(
    x: Array, a_bank: Array, b_bank: Array, bias_bank: Array | None, batch: LoRABatch, *, projection: LoRAProjection
) -> Array:
    """See `api.lora_delta`."""
    return _sums(x, a_bank, b_bank, bias_bank, batch, projection).astype(x.dtype)


def lora_gated_reference(
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
    flat_bias = None if bias_bank is None else bias_bank.reshape(len(bias_bank), -1)
    delta = _sums(x, a_bank, flat_bank, flat_bias, batch, GATE_UP_PROJECTION).reshape(base.shape)
    total = base.astype(jnp.float32)
    if scale_bank is not None:
        vectors = batch.segment_vectors[_segments(batch)]
        total = total * jnp.where((vectors >= 0)[:, None, None], scale_bank[vectors], 1.0)
    total = total + delta
    return (ACTIVATIONS[activation](total[:, 0]) * total[:, 1]).astype(x.dtype)


def _segments(batch: LoRABatch) -> Array:
    """Return each token's segment, [T]."""
    places = jnp.arange(len(batch.token_order))
    segments = (batch.segment_starts[None, 1:] <= places[:, None]).sum(1)
    return jnp.zeros_like(segments).at[batch.token_order].set(segments)


def _sums(
    x: Array, a_bank: Array, b_bank: Array, bias_bank: Array | None, batch: LoRABatch, projection: LoRAProjection
) -> Array:
    """Return the sum over each token's pages, float32 [T, N]."""
    num_columns = b_bank.shape[-1]
    blocks = np.array(projection.blocks(num_columns))
    column_slices = np.repeat(blocks, num_columns // len(blocks))

    def one_token(token_and_segment: tuple[Array, Array]) -> Array:
        token, segment = token_and_segment
        row = x[token].astype(jnp.float32)

        def add_page(item: Array, total: Array) -> Array:
            a = a_bank[batch.item_pages[item]].astype(jnp.float32)
            b = b_bank[batch.item_pages[item]].astype(jnp.float32)
            has_module = (batch.item_modules[item] >> np.array(projection.modules)) & 1
            ranks = jnp.where(has_module[:, None] == 1, jnp.einsum("crk,k->cr", a, row, precision="highest"), 0.0)
            product = jnp.einsum("nr,rn->n", ranks[column_slices], b, precision="highest")
            return total + batch.item_weights[item] * product

        first, last = batch.segment_items[segment], batch.segment_items[segment + 1]
        total = lax.fori_loop(first, last, add_page, jnp.zeros(num_columns, jnp.float32))
        vector = batch.segment_vectors[segment]
        return total if bias_bank is None else total + jnp.where(vector >= 0, bias_bank[vector], 0.0)

    return lax.map(one_token, (jnp.arange(len(x)), _segments(batch)))
