"""Which class serves which architecture."""

from qwen2_jax.config import ModelConfig
from qwen2_jax.models.qwen2 import FlashQwen2ForCausalLM, FlashQwen2ForEmbeddings

MODELS: dict[str, type[FlashQwen2ForCausalLM] | type[FlashQwen2ForEmbeddings]] = {
    "Qwen2ForCausalLM": FlashQwen2ForCausalLM,
    "FlashQwen2ForCausalLM": FlashQwen2ForCausalLM,
    "LlamaForCausalLM": FlashQwen2ForCausalLM,
    "Qwen2Model": FlashQwen2ForEmbeddings,
    "Qwen2ForEmbeddings": FlashQwen2ForEmbeddings,
    "FlashQwen2ForEmbeddings": FlashQwen2ForEmbeddings,
}


def model_class(config: ModelConfig) -> type[FlashQwen2ForCausalLM] | type[FlashQwen2ForEmbeddings]:
    """Return the class that serves `config.architecture`, which `ModelConfig.from_hf` has checked."""
    return MODELS[config.architecture]
