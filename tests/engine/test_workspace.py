"""The reckoned workspace: enough for what XLA reports, and not wasteful."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from qwen2_kernels.specs import QWEN2_5

from qwen2_jax.config import EngineConfig, ModelConfig
from qwen2_jax.engine.workspace import largest_workspace, reported_workspace

OPTIONS = EngineConfig(max_model_len=8192, max_num_seqs=256)
REPORTED = {"7b": 1_093_107_208, "0.5b": 1_092_181_152}
"""Bytes that XLA reports on an H100 for the program that takes most, decode for 256 rows."""


def model(name: str) -> ModelConfig:
    sizes = QWEN2_5[name]
    return ModelConfig.from_hf(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "hidden_size": sizes.hidden_size,
            "intermediate_size": sizes.intermediate_size,
            "num_hidden_layers": 2,
            "num_attention_heads": sizes.num_attention_heads,
            "num_key_value_heads": sizes.num_key_value_heads,
            "vocab_size": sizes.vocab_size,
            "tie_word_embeddings": False,
        }
    )


def reckon(name: str, tp: int = 1, **options: int) -> int:
    config = dataclasses.replace(OPTIONS, **options).resolve(model(name), "gpu")
    return largest_workspace(model(name), config, "bfloat16", tp)


@pytest.mark.parametrize("name", REPORTED)
def test_it_covers_what_xla_reports_with_little_more(name: str) -> None:
    assert REPORTED[name] <= reckon(name) <= 1.3 * REPORTED[name]


def test_it_covers_prompt_log_probabilities_of_a_few_rows() -> None:
    reported = 466_771_800  # on an H100, in either case below: the logits of a chunk of prompt tokens
    assert reported <= reckon("0.5b", max_num_seqs=8, max_num_batched_tokens=512) <= 1.5 * reported


def test_it_follows_tokens_rows_and_devices() -> None:
    assert reckon("7b", max_num_batched_tokens=16384) > 1.5 * reckon("7b")
    assert reckon("0.5b", max_num_seqs=128, max_num_batched_tokens=512) < 0.6 * reckon("0.5b")
    assert reckon("7b", tp=4, max_num_batched_tokens=32768) < 0.5 * reckon("7b", max_num_batched_tokens=32768)


def test_what_a_program_takes_besides_its_arguments() -> None:
    x = jnp.ones((64, 64))
    program = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    assert reported_workspace(program) == 0
    program = jax.jit(lambda x: x + 1).lower(x).compile()
    assert reported_workspace(program) == x.nbytes
