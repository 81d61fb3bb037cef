"""The modules on their own, as a notebook uses them: no engine, no mesh, weights drawn by Flax."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from qwen2_kernels.linear import api as linear_api
from qwen2_kernels.linear.xla import linear_xla

from qwen2_jax.config import ModelConfig
from qwen2_jax.models import qwen2
from qwen2_jax.models.adapters import (
    LoRABatch,
    PageUse,
    StepAdapters,
    TokenGroup,
    build_lora_tables,
    init_banks,
    table_sizes,
)
from qwen2_jax.models.batch import StepBatch
from qwen2_jax.models.qwen2 import FlashQwen2ForCausalLM, FlashQwen2ForEmbeddings, KVCache, pool_sum
from scripts.make_tiny_model import tiny_config

BLOCK_SIZE, NUM_BLOCKS = 4, 8
PROMPTS = ([5, 6, 7, 8, 9], [11, 12, 13])


def make_config(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf(tiny_config(**changes))


def make_cache(config: ModelConfig) -> KVCache:
    shape = (NUM_BLOCKS, BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
    return tuple((jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.num_hidden_layers))


def make_batch(**changes: Any) -> StepBatch:
    """The two prompts as one fresh prefill: blocks 1 and 2, and 3."""
    tables, lens = np.array([[1, 2], [3, 0]]), [len(prompt) for prompt in PROMPTS]
    positions = np.concatenate([np.arange(length) for length in lens])
    rows = np.repeat([0, 1], lens)
    batch = StepBatch(
        input_ids=jnp.array([token for prompt in PROMPTS for token in prompt]),
        position_ids=jnp.array(positions),
        block_tables=jnp.array(tables),
        slot_mapping=jnp.array(tables[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE),
        context_lens=jnp.array(lens),
        query_start_loc=jnp.array([0, *np.cumsum(lens)]),
    )
    return dataclasses.replace(batch, **changes)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return make_config(tie_word_embeddings=False)


@pytest.fixture(scope="module")
def model(config: ModelConfig) -> FlashQwen2ForCausalLM:
    return FlashQwen2ForCausalLM(config, rngs=nnx.Rngs(0))


def test_lm_head_indices_pick_rows_of_all_logits(model: FlashQwen2ForCausalLM, config: ModelConfig) -> None:
    (every, speculative), _ = model(make_batch(), make_cache(config))
    (some, _), _ = model(make_batch(), make_cache(config), lm_head_indices=jnp.array([4, 7]))
    assert every.shape == (8, config.vocab_size) and every.dtype == jnp.float32 and speculative is None
    np.testing.assert_allclose(some, every[jnp.array([4, 7])], rtol=1e-5, atol=1e-6)


def test_skip_lm_head_gives_the_hidden_states_of_these_logits(
    model: FlashQwen2ForCausalLM, config: ModelConfig
) -> None:
    (hidden, _), _ = model(make_batch(), make_cache(config), skip_lm_head=True)
    (logits, _), _ = model(make_batch(), make_cache(config))
    assert hidden.shape == (8, config.hidden_size)
    np.testing.assert_allclose(model.compute_logits(hidden), logits, rtol=1e-5, atol=1e-6)


def test_prefill_cache_indices_choose_what_is_written(model: FlashQwen2ForCausalLM, config: ModelConfig) -> None:
    batch = make_batch()
    _, whole = model(batch, make_cache(config))
    kept = jnp.array([3, 4, 7])
    _, partial = model(dataclasses.replace(batch, prefill_cache_indices=kept), make_cache(config))
    written = set(np.asarray(batch.slot_mapping)[np.asarray(kept)].tolist())
    for full, some in zip(jax.tree.leaves(whole[0]), jax.tree.leaves(partial[0]), strict=True):
        full, some = (np.asarray(pool).reshape(NUM_BLOCKS * BLOCK_SIZE, -1) for pool in (full, some))
        for slot in range(NUM_BLOCKS * BLOCK_SIZE):
            np.testing.assert_array_equal(some[slot], full[slot] if slot in written else np.zeros_like(full[slot]))


def test_decode_continues_a_prefill(model: FlashQwen2ForCausalLM, config: ModelConfig) -> None:
    """Prefill all but each prompt's last token, decode that one, and get the whole prefill's logits."""
    (whole, _), _ = model(make_batch(), make_cache(config), lm_head_indices=jnp.array([4, 7]))
    slots = make_batch().slot_mapping
    _, cache = model(make_batch(slot_mapping=slots.at[jnp.array([4, 7])].set(-1)), make_cache(config))
    step = StepBatch(
        input_ids=jnp.array([PROMPTS[0][-1], PROMPTS[1][-1]]),
        position_ids=jnp.array([4, 2]),
        block_tables=make_batch().block_tables,
        slot_mapping=slots[jnp.array([4, 7])],
        context_lens=jnp.array([5, 3]),
    )
    (decoded, _), _ = model(step, cache)
    np.testing.assert_allclose(decoded, whole, rtol=1e-4, atol=1e-5)


def test_embeddings_are_the_projected_means_of_each_prompt() -> None:
    config = make_config(architectures=["FlashQwen2ForEmbeddings"], embedding_dim=10)
    model = FlashQwen2ForEmbeddings(config, rngs=nnx.Rngs(1))
    (embeddings, none), _ = model(make_batch(), make_cache(config))
    hidden, _ = model.model(make_batch(), make_cache(config))
    means = np.stack([np.asarray(hidden)[:5].mean(0), np.asarray(hidden)[5:].mean(0)])
    kernel, bias = (np.asarray(part[...]) for part in (model.linear.kernel, model.linear.bias))
    assert none is None
    np.testing.assert_allclose(embeddings, means @ kernel + bias, rtol=1e-4, atol=1e-6)


def test_pooling_leaves_padding_out() -> None:
    hidden = jnp.concatenate([jnp.ones((8, 3)), jnp.full((2, 3), jnp.nan)])
    np.testing.assert_array_equal(pool_sum(hidden, make_batch()), [[5.0] * 3, [3.0] * 3])


def make_adapters(config: ModelConfig, tokens: np.ndarray) -> StepAdapters:
    """Random banks of two pages; `tokens` says which tokens use page 1 (0) and which none (-1)."""
    rng = np.random.default_rng(0)
    empty = init_banks(config, 1, "float32", num_pages=2, num_vectors=1)
    sizes = table_sizes(len(tokens), max_groups=1, max_pages=1)
    tables = build_lora_tables(tokens, [TokenGroup(pages=(PageUse(page=1, modules=127),))], sizes)
    return StepAdapters(
        layers=jax.tree.map(lambda bank: jnp.array(rng.normal(0, 0.2, bank.shape), bank.dtype), empty),
        tables=LoRABatch(**jax.tree.map(jnp.array, tables), tile=sizes.tile, max_pages=1),
        scale_rows=jnp.full(len(tokens), -1),
    )


@pytest.mark.parametrize("adapted", [False, True])
def test_padding_reaches_nothing(config: ModelConfig, adapted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Projections may leave anything behind a step's tokens: NaN there changes neither logits nor the cache."""
    model = FlashQwen2ForCausalLM(config, rngs=nnx.Rngs(0))
    calls: list[Any] = []

    def poisoned(x: Any, kernel: Any, *others: Any, **options: Any) -> Any:
        out, num_tokens = linear_xla(x, kernel, *others, **options), others[-1]
        if num_tokens is None:
            return out
        calls.append(kernel.shape)
        return jnp.where(jnp.arange(len(x))[:, None] < num_tokens, out, jnp.nan)

    def run() -> Any:
        whole, padding = make_batch(), jnp.zeros(8, int)
        batch = dataclasses.replace(
            whole,
            input_ids=jnp.concatenate([whole.input_ids, padding]),
            position_ids=jnp.concatenate([whole.position_ids, padding]),
            slot_mapping=jnp.concatenate([whole.slot_mapping, padding - 1]),
        )
        adapters = make_adapters(config, np.array([0] * 5 + [-1] * 11)) if adapted else None
        (logits, _), cache = model(batch, make_cache(config), adapters=adapters, lm_head_indices=jnp.arange(8))
        return logits, cache

    # A GPU's choices, in XLA's implementation.
    monkeypatch.setattr(qwen2, "by_platform", lambda *arrays, gpu, elsewhere: gpu(*arrays))
    expected = run()
    monkeypatch.setitem(linear_api.IMPLEMENTATIONS, "xla", poisoned)
    jax.clear_caches()
    found = run()
    jax.clear_caches()
    assert len(calls) >= 4
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_adapters_are_added_for_their_tokens_alone(model: FlashQwen2ForCausalLM, config: ModelConfig) -> None:
    """The first prompt's tokens use page 1: their logits are those of a model with that page in its weights."""
    adapters = make_adapters(config, np.array([0] * 5 + [-1] * 3))
    merged = nnx.clone(model)
    for layer, bank in zip(merged.model.layers, adapters.layers, strict=True):
        attention, mlp, slots = layer.self_attn, layer.mlp, [0] * config.num_queries_per_kv + [1, 2]
        kernels = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        parts = (bank.qkv, bank.o, bank.gate_up, bank.down)
        equations = ("srd,rksh->kshd", "rkgh,rd->dkgh", "crd,rcf->cfd", "rf,rd->df")
        for kernel, part, equation in zip(kernels, parts, equations, strict=True):
            a = {1: part.a[1, 0], 2: part.a[1], 3: part.a[1][jnp.array(slots)]}[part.a.shape[1]]
            kernel.kernel[...] += jnp.einsum(equation, a, part.b[1])
    (found, _), _ = model(make_batch(), make_cache(config), adapters=adapters)
    (changed, _), _ = merged(make_batch(), make_cache(config))
    (plain, _), _ = model(make_batch(), make_cache(config))
    np.testing.assert_allclose(found[:5], changed[:5], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found[5:], plain[5:], rtol=1e-4, atol=1e-5)
    assert np.abs(changed[:5] - plain[:5]).max() > 0.1
