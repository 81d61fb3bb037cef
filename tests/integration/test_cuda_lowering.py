"""Whole steps of Qwen2.5-0.5B's geometry lower for an H100 on a machine without one, through the kernels."""

import pytest
from qwen2_kernels.specs import QWEN2_5

from qwen2_jax.config import ModelConfig
from tests.integration.cuda_lowering import lower_step

SIZES = QWEN2_5["0.5b"]
MODEL = ModelConfig.from_hf(
    {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_size": SIZES.hidden_size,
        "intermediate_size": SIZES.intermediate_size,
        "num_hidden_layers": 2,
        "num_attention_heads": SIZES.num_attention_heads,
        "num_key_value_heads": SIZES.num_key_value_heads,
        "vocab_size": SIZES.vocab_size,
        "tie_word_embeddings": True,
    }
)


@pytest.mark.parametrize(
    "name, size, has_mosaic", [("decode_greedy", 1, False), ("decode_greedy", 64, True), ("prefill", 256, True)]
)
def test_a_step_lowers_through_the_kernels(name: str, size: int, has_mosaic: bool) -> None:
    text = lower_step(MODEL, name, size, max_model_len=2048).as_text()
    assert "triton_kernel_call_ffi" in text
    assert ("mosaic_gpu" in text) is has_mosaic
