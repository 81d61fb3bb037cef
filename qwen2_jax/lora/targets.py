"""The modules of a base model that an adapter may change, and their sizes."""

from dataclasses import dataclass

from qwen2_jax.config import ModelConfig
from qwen2_jax.lora.keys import EMBED_TOKENS, LM_HEAD


@dataclass(frozen=True, kw_only=True)
class Target:
    """A module with a weight `[out_features, in_features]`; an embedding's inputs are the vocabulary."""

    in_features: int
    out_features: int
    has_bias: bool = False


def targets(base: ModelConfig) -> dict[str, Target]:
    """Return the modules by name; each projection is in every layer. An embeddings model has no `lm_head`."""
    hidden, inner, vocabulary = base.hidden_size, base.intermediate_size, base.vocab_size
    queries, keys = base.num_attention_heads * base.head_dim, base.num_key_value_heads * base.head_dim
    bias = base.attention_bias
    found = {
        "q_proj": Target(in_features=hidden, out_features=queries, has_bias=bias),
        "k_proj": Target(in_features=hidden, out_features=keys, has_bias=bias),
        "v_proj": Target(in_features=hidden, out_features=keys, has_bias=bias),
        "o_proj": Target(in_features=queries, out_features=hidden),
        "gate_proj": Target(in_features=hidden, out_features=inner),
        "up_proj": Target(in_features=hidden, out_features=inner),
        "down_proj": Target(in_features=inner, out_features=hidden),
        EMBED_TOKENS: Target(in_features=vocabulary, out_features=hidden),
    }
    if not base.is_embedding_model:
        found[LM_HEAD] = Target(in_features=hidden, out_features=vocabulary)
    return found
