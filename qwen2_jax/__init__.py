"""Serve Qwen2 and Qwen2.5 from JAX: `LLM` and vLLM's request types, and the Flax modules that the engine runs.

Names are imported when they are first used, so that `import qwen2_jax` costs nothing and does not start JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2_jax.config import ModelConfig
    from qwen2_jax.errors import (
        AdapterError,
        CapacityError,
        CheckpointError,
        ConfigError,
        Qwen2JaxError,
        RequestError,
    )
    from qwen2_jax.llm import LLM
    from qwen2_jax.models.qwen2 import (
        FlashQwen2Attention,
        FlashQwen2ForCausalLM,
        FlashQwen2ForEmbeddings,
        FlashQwen2Layer,
        FlashQwen2Model,
        Qwen2MLP,
        Qwen2RMSNorm,
    )
    from qwen2_jax.types import (
        ClassificationOutput,
        ClassificationRequestOutput,
        CompletionOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        Logprob,
        LoRARequest,
        MergedLoRARequest,
        MergeOptions,
        RequestOutput,
        SamplingParams,
    )

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AdapterError",
    "CapacityError",
    "CheckpointError",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "ConfigError",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "FlashQwen2Attention",
    "FlashQwen2ForCausalLM",
    "FlashQwen2ForEmbeddings",
    "FlashQwen2Layer",
    "FlashQwen2Model",
    "LoRARequest",
    "Logprob",
    "MergeOptions",
    "MergedLoRARequest",
    "ModelConfig",
    "Qwen2JaxError",
    "Qwen2MLP",
    "Qwen2RMSNorm",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

_EXPORTS = {
    "qwen2_jax.config": ("ModelConfig",),
    "qwen2_jax.errors": (
        "AdapterError",
        "CapacityError",
        "CheckpointError",
        "ConfigError",
        "Qwen2JaxError",
        "RequestError",
    ),
    "qwen2_jax.llm": ("LLM",),
    "qwen2_jax.models.qwen2": (
        "FlashQwen2Attention",
        "FlashQwen2ForCausalLM",
        "FlashQwen2ForEmbeddings",
        "FlashQwen2Layer",
        "FlashQwen2Model",
        "Qwen2MLP",
        "Qwen2RMSNorm",
    ),
    "qwen2_jax.types": (
        "ClassificationOutput",
        "ClassificationRequestOutput",
        "CompletionOutput",
        "EmbeddingOutput",
        "EmbeddingRequestOutput",
        "LoRARequest",
        "Logprob",
        "MergeOptions",
        "MergedLoRARequest",
        "RequestOutput",
        "SamplingParams",
    ),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted(__all__)
