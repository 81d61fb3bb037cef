"""A tiny tokenizer and model, and random adapters, for the tests of what goes into the engine and what comes out."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from qwen2_jax.config import EngineConfig, ModelConfig
from qwen2_jax.engine.input_processor import InputProcessor, ProcessedInput, Prompt
from qwen2_jax.lora.keys import ATTENTION, MLP
from qwen2_jax.lora.targets import targets
from qwen2_jax.text.tokenizer import Tokenizer
from qwen2_jax.types import SamplingParams

MERGES = [("h", "i"), ("Ġ", "x"), ("Ġ", "y"), ("Ġy", "z"), ("a", "b")]
EOS, THINK, THINK_END, LATE = 261, 262, 263, 264
VOCAB_SIZE = 264  # the tokenizer's last token, LATE, is not in the model's vocabulary

MODEL: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}


@functools.cache
def tokenizer() -> Tokenizer:
    """A byte-level tokenizer: 256 bytes, five merges, an end token, and tokens around a model's thinking."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *("".join(merge) for merge in MERGES)]
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    backend.add_tokens([AddedToken(token) for token in ("<think>", "</think>", "<late>")])
    return Tokenizer(backend, special_tokens={"eos_token": "<|im_end|>"})


def ids(text: str) -> list[int]:
    return tokenizer().encode(text)


def token_id(token: str) -> int:
    (found,) = ids(token)
    return found


def make_processor(
    *,
    with_tokenizer: bool = True,
    model: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    eos: Sequence[int] = (EOS,),
) -> InputProcessor:
    config = ModelConfig.from_hf(MODEL | (model or {}))
    resolved = EngineConfig(**(engine or {})).resolve(config, "cpu")
    return InputProcessor(config, resolved, tokenizer() if with_tokenizer else None, tuple(eos))


def generation(prompt: Prompt = "hi", processor: InputProcessor | None = None, **params: Any) -> ProcessedInput:
    return (processor or make_processor()).generation("r", prompt, SamplingParams(**params))


def adapter_tensors(
    config: ModelConfig, *, seed: int, rank: int, extra: Literal["magnitude", "bias"] | None = None
) -> dict[str, np.ndarray]:
    """Random tensors of a PEFT adapter for every projection, with magnitudes or with biases of B if asked for."""
    rng, tensors = np.random.default_rng(seed), {}
    for layer in range(config.num_hidden_layers):
        for name in (*ATTENTION, *MLP):
            target = targets(config)[name]
            block = "self_attn" if name in ATTENTION else "mlp"
            path = f"base_model.model.model.layers.{layer}.{block}.{name}"
            tensors[f"{path}.lora_A.weight"] = rng.normal(0, 0.2, (rank, target.in_features))
            tensors[f"{path}.lora_B.weight"] = rng.normal(0, 0.2, (target.out_features, rank))
            if extra == "magnitude":
                tensors[f"{path}.lora_magnitude_vector"] = rng.uniform(0.5, 1.5, target.out_features)
            if extra == "bias":
                tensors[f"{path}.lora_B.bias"] = rng.normal(0, 0.2, target.out_features)
    return {name: array.astype(np.float32) for name, array in tensors.items()}
