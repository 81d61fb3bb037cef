"""What a step takes on a device besides its arguments, reckoned before anything is compiled.

The cache gets what is left, and every program's code depends on the cache's size: asking XLA would mean to compile the
largest step twice. `ModelRunner.compile` compares with what XLA reports.
"""

import jax
import jax.numpy as jnp

from qwen2_jax.config import ModelConfig, ResolvedConfig
from qwen2_jax.engine.programs import PROMPT_LOGPROBS_CHUNK
from qwen2_jax.parallel import HeadLayout, pad_to_multiple

_SAMPLER_COPIES = 7
"""Arrays of the vocabulary's width that sampling holds at once: logits, noise, masks, keys, weights, log-softmax."""
_MATMUL_LIBRARY = 32 << 20
"""Bytes that cuBLAS asks for on Hopper, whatever the product."""
_MARGIN = 1.15


def largest_workspace(model: ModelConfig, config: ResolvedConfig, dtype: str, tp: int) -> int:
    """Return the bytes that the largest step takes on each device, generously."""
    tokens, size = config.max_num_batched_tokens, jnp.dtype(dtype).itemsize
    heads = HeadLayout(model.num_attention_heads, model.num_key_value_heads, tp)
    intermediate = pad_to_multiple(model.intermediate_size, tp) // tp
    qkv = heads.padded_kv_heads // tp * (heads.padded_group + 2) * model.head_dim
    # A layer's input, residual and norm live through it; beside them the MLP's arrays, or the attention's.
    per_token = 4 * model.hidden_size + max(3 * intermediate, 3 * qkv)
    layers = tokens * per_token * size
    rows = max(config.max_num_seqs, PROMPT_LOGPROBS_CHUNK)
    vocabulary = rows * pad_to_multiple(model.vocab_size, tp) * 4 * _SAMPLER_COPIES
    return int(_MARGIN * max(layers, 0 if model.is_embedding_model else vocabulary)) + _MATMUL_LIBRARY


def reported_workspace(program: jax.stages.Compiled) -> int:
    """Return the bytes that a compiled program takes on each device besides its arguments."""
    memory = program.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
