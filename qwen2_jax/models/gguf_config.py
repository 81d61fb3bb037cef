"""Translates a GGUF file's metadata into the keys of a Hugging Face config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen2_jax.errors import CheckpointError

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
# GGUF's key, after the architecture's name -> Hugging Face's
_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.causal": "is_causal",
    "rope.freq_base": "rope_theta",
    "expert_count": "num_experts",
}
_ROPE_KEYS = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
_HARMLESS = ("vocab_size", "rope.scaling.finetuned", "expert_used_count", "tensor_data_layout")


def gguf_config(path: Path, metadata: Mapping[str, Any], *, vocab_size: int, dtype: str) -> dict[str, Any]:
    """Return `metadata` as a Hugging Face config.

    Raises `CheckpointError` for another architecture, or a setting of the architecture that is not known here: it may
    change the mathematics.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise CheckpointError(f"{path} has architecture {architecture!r}; supported: {', '.join(ARCHITECTURES)}")
    prefix = f"{architecture}."
    given = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": vocab_size,
        "torch_dtype": dtype,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_token_ids(metadata),
    }
    config.update({hf: given.pop(key) for key, hf in _KEYS.items() if key in given})
    _take_head_sizes(path, given, config)
    _take_rope(given, config)
    unknown = [key for key in given if key not in _HARMLESS]
    if unknown:
        raise CheckpointError(f"{path} sets {prefix}{unknown[0]}={given[unknown[0]]!r}, which is not supported")
    return config


def _eos_token_ids(metadata: Mapping[str, Any]) -> list[Any]:
    """Return the ids that end a text: of the end of the text and of a turn."""
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return list(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def _take_head_sizes(path: Path, given: dict[str, Any], config: dict[str, Any]) -> None:
    """Move what `given` says about the sizes of a head into `config`."""
    head_dim = config.get("head_dim")
    if given.pop("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{path}: keys and values have heads of different sizes, which is not supported")
    rotary = given.pop("rope.dimension_count", None)
    size, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if head_dim is None and isinstance(size, int) and isinstance(heads, int) and heads > 0:
        head_dim = size // heads
    if rotary not in (None, head_dim):
        raise CheckpointError(f"{path}: rope.dimension_count={rotary!r} is not the size of a head, {head_dim!r}")
    # Absent means as many as query heads, both in GGUF and in Hugging Face's null.
    config.setdefault("num_key_value_heads", None)


def _take_rope(given: dict[str, Any], config: dict[str, Any]) -> None:
    """Move the rotary scaling in `given` into `config`."""
    scaling = {hf: given.pop(key) for key, hf in _ROPE_KEYS.items() if key in given}
    if scaling.get("rope_type", "none") != "none":
        config["rope_scaling"] = scaling
