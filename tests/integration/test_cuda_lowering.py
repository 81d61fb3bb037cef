"""Whole steps of Qwen2.5-0.5B's geometry lower for an H100 on a machine without one, through the kernels."""

from typing import Any

import jax_triton
import pytest
from qwen2_kernels.specs import QWEN2_5

from qwen2_jax.config import ModelConfig
from qwen2_jax.lora.sizes import LoRASizes
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


LORA = LoRASizes(
    num_pages=8,
    num_vectors=8,
    max_pages=1,
    max_rank=16,
    max_on_host=8,
    num_vocab_pages=0,
    num_vocab_vectors=0,
    num_full_vocab=0,
)


@pytest.mark.parametrize(
    "name, size, has_mosaic", [("decode_greedy", 1, False), ("decode_greedy", 64, True), ("prefill", 512, True)]
)
def test_a_step_lowers_through_the_kernels(name: str, size: int, has_mosaic: bool) -> None:
    text = lower_step(MODEL, (name, size), max_model_len=2048).as_text()
    assert "triton_kernel_call_ffi" in text
    assert ("mosaic_gpu" in text) is has_mosaic


@pytest.mark.parametrize(
    "name, size, gated",
    [
        ("decode_greedy_lora", 8, "gated_dot_kernel"),
        ("prefill_lora", 512, "window_ranks_kernel"),
        ("prefill_lora_vectors", 512, "gated_dot_kernel"),
    ],
)
def test_a_step_with_adapters_lowers_through_theirs(
    name: str, size: int, gated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: set[str] = set()
    call = jax_triton.triton_call

    def record(*arguments: Any, kernel: Any, **options: Any) -> Any:
        launched.add(kernel.fn.__name__)
        return call(*arguments, kernel=kernel, **options)

    monkeypatch.setattr(jax_triton, "triton_call", record)
    lower_step(MODEL, (name, size), lora=LORA, max_model_len=2048)
    assert {"shrink_dot_kernel", "expand_dot_kernel", gated} <= launched
    assert len(launched & {"gated_dot_kernel", "window_ranks_kernel"}) == 1
