"""Validated configuration: the model's, read from Hugging Face's, and the engine's."""

from qwen2_jax.config.engine import CacheConfig, EngineConfig, ResolvedConfig, split_options
from qwen2_jax.config.load import LoadConfig
from qwen2_jax.config.lora import LoRAConfig
from qwen2_jax.config.model import ModelConfig
from qwen2_jax.config.rope import RopeConfig

__all__ = [
    "CacheConfig",
    "EngineConfig",
    "LoRAConfig",
    "LoadConfig",
    "ModelConfig",
    "ResolvedConfig",
    "RopeConfig",
    "split_options",
]
