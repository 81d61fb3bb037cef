"""Config keys that change what a model computes in a way that this package does not do."""

from collections.abc import Mapping
from typing import Any

from qwen2_jax.config.fields import shown
from qwen2_jax.errors import ConfigError

_MOE = "mixture-of-experts models are not supported"
_SCALED = "scaled activations or logits are not part of Qwen2"
_CAPPED = "soft-capped logits are not part of Qwen2"
_QK_NORM = "normalised queries and keys belong to Qwen3, which is not supported"
_MULTIMODAL = "only text models are supported"
_MLA = "latent attention is not supported"
_QUANTIZED = "quantised checkpoints are not supported; use the original float weights or a GGUF file"

# key -> (why it is refused, the values besides null that leave the computation as it is)
REFUSED_KEYS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "quantization_config": (_QUANTIZED, ({},)),
    "compression_config": (_QUANTIZED, ({},)),
    "quantization": (_QUANTIZED, ({},)),
    "dual_chunk_attention_config": (
        "dual chunk attention is not supported; pass hf_overrides={'dual_chunk_attention_config': None} to serve the "
        "model as a plain Qwen2, which is right for contexts of up to 262144 tokens",
        (),
    ),
    "mlp_bias": ("the MLP's projections have no bias in Qwen2", (False,)),
    "partial_rotary_factor": ("the rotary embedding covers the whole head in Qwen2", (1,)),
    "rope_interleaved": ("the rotary embedding pairs the two halves of a head in Qwen2", (False,)),
    "rope_interleave": ("the rotary embedding pairs the two halves of a head in Qwen2", (False,)),
    "mrope_section": (_MULTIMODAL, ()),
    "no_rope_layers": ("every layer is rotary in Qwen2", ([],)),
    "alibi": ("positions are rotary in Qwen2", (False,)),
    "use_dynamic_ntk": ("keys already in the cache would change", (False,)),
    "use_logn_attn": ("length-scaled attention belongs to the first Qwen, which is not supported", (False,)),
    "qk_norm": (_QK_NORM, (False,)),
    "use_qk_norm": (_QK_NORM, (False,)),
    "qk_layernorm": (_QK_NORM, (False,)),
    "num_experts": (_MOE, (0,)),
    "num_local_experts": (_MOE, (0,)),
    "n_routed_experts": (_MOE, (0,)),
    "moe_intermediate_size": (_MOE, (0,)),
    "kv_lora_rank": (_MLA, (0,)),
    "q_lora_rank": (_MLA, (0,)),
    "final_logit_softcapping": (_CAPPED, ()),
    "attn_logit_softcapping": (_CAPPED, ()),
    "logits_soft_cap": (_CAPPED, ()),
    "logits_scaling": (_SCALED, (1,)),
    "logit_scale": (_SCALED, (1,)),
    "embedding_multiplier": (_SCALED, (1,)),
    "residual_multiplier": (_SCALED, (1,)),
    "attention_multiplier": (_SCALED, ()),
    "query_pre_attn_scalar": (_SCALED, ()),
    "scale_emb": (_SCALED, (1,)),
    "scale_depth": (_SCALED, ()),
    "attention_chunk_size": ("chunked attention is not part of Qwen2", ()),
    "attn_output_gate": ("gated attention is not part of Qwen2", (False,)),
    "parallel_attn": ("attention and MLP run one after the other in Qwen2", (False,)),
    "use_parallel_residual": ("attention and MLP run one after the other in Qwen2", (False,)),
    "is_encoder_decoder": ("only decoders are supported", (False,)),
    "add_cross_attention": ("cross attention is not part of Qwen2", (False,)),
    "text_config": (_MULTIMODAL, ()),
    "vision_config": (_MULTIMODAL, ()),
    "audio_config": (_MULTIMODAL, ()),
}


def refuse_other_maths(config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for the first key of `config` that asks for a computation other than Qwen2's."""
    for key, (why, harmless) in REFUSED_KEYS.items():
        value = config.get(key)
        if value is None or any(type(value) in _alike(ok) and value == ok for ok in harmless):
            continue
        raise ConfigError(f"{key}={shown(value)} cannot be served: {why}")


def _alike(value: Any) -> tuple[type, ...]:
    return (int, float) if type(value) is int else (type(value),)
