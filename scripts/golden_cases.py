"""The cases of make_golden.py, as data: configurations of tiny checkpoints, rotary configurations, conversations."""

from dataclasses import dataclass
from typing import Any

BASE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 382,
    "eos_token_id": 383,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True, kw_only=True)
class CausalCase:
    """A FlashQwen2ForCausalLM checkpoint; `control` is the configuration without the feature under test, or None."""

    name: str
    config: dict[str, Any]
    control: dict[str, Any] | None


def case(name: str, *, control: dict[str, Any] | None = None, drop: tuple[str, ...] = (), **changes: Any) -> CausalCase:
    """BASE with `changes` and without the keys of `drop`; `control` holds changes on top of that, or None."""
    config = {key: value for key, value in (BASE | changes).items() if key not in drop}
    return CausalCase(name=name, config=config, control=None if control is None else config | control)


ROPE_DEFAULT = {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
NO_WINDOW = {"use_sliding_window": False, "layer_types": None}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ALTERNATING = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]

CAUSAL_CASES = (
    case("untied", tie_word_embeddings=False, torch_dtype="float32"),
    case("tied", rope_theta=10000.0, control={"rope_theta": 1000000.0}),
    case("heads_14_2", hidden_size=112, num_attention_heads=14),
    case("heads_7_1", hidden_size=56, num_attention_heads=7, num_key_value_heads=1, tie_word_embeddings=False),
    case("heads_4_4", num_key_value_heads=4, rms_norm_eps=1e-05),
    case("head_dim", head_dim=32),
    case("window_all", use_sliding_window=True, sliding_window=16, max_window_layers=0, control=NO_WINDOW),
    case(
        "window_partial",
        num_hidden_layers=4,
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=2,
        control={"max_window_layers": 1},
    ),
    case(
        "window_off",
        sliding_window=16,
        max_window_layers=0,
        control={"use_sliding_window": True},
    ),
    case(
        "window_layer_types",
        num_hidden_layers=4,
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=4,
        layer_types=ALTERNATING,
        control={"layer_types": None},
    ),
    case(
        "yarn_rope_scaling",
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        control=ROPE_DEFAULT,
    ),
    case(
        "yarn_rope_parameters",
        drop=("rope_theta", "torch_dtype"),
        dtype="bfloat16",
        head_dim=32,
        rope_parameters=YARN | {"rope_theta": 10000.0, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False},
        control={"rope_parameters": YARN | {"rope_theta": 10000.0}},
    ),
    case("linear_rope", rope_scaling={"rope_type": "linear", "factor": 4.0}, control=ROPE_DEFAULT),
    case(
        "llama3_rope",
        rope_theta=10000.0,
        rope_scaling=LLAMA3 | {"original_max_position_embeddings": 32},
        control={"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    case("gelu", hidden_act="gelu", control={"hidden_act": "gelu_pytorch_tanh"}),
    case("gelu_tanh", hidden_act="gelu_pytorch_tanh", control={"hidden_act": "silu"}),
)


@dataclass(frozen=True, kw_only=True)
class EmbeddingCase:
    """A FlashQwen2ForEmbeddings checkpoint in sentence-transformers' layout; `prefix` starts its tensors' names."""

    name: str
    config: dict[str, Any]
    prefix: str
    embedding_dim: int | None
    normalize: bool

    def module_files(self) -> dict[str, Any]:
        """Path within the checkpoint -> JSON content: modules.json and the modules' own configurations."""
        hidden_size = self.config["hidden_size"]
        files: dict[str, Any] = {
            "1_Pooling/config.json": {"word_embedding_dimension": hidden_size, "pooling_mode_mean_tokens": True}
        }
        modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
        if self.embedding_dim is not None:
            modules.append(("2_Dense", "Dense"))
            files["2_Dense/config.json"] = {
                "in_features": hidden_size,
                "out_features": self.embedding_dim,
                "bias": True,
                "activation_function": "torch.nn.modules.linear.Identity",
            }
        if self.normalize:
            modules.append((f"{len(modules)}_Normalize", "Normalize"))
        files["modules.json"] = [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(modules)
        ]
        return files


SPECIAL_TOKENS = {"bos_token_id": 254, "eos_token_id": 255}
EMBEDDING_BASE = BASE | {"architectures": ["Qwen2Model"], "vocab_size": 256, "num_hidden_layers": 2} | SPECIAL_TOKENS
EMBEDDING_CASES = (
    EmbeddingCase(name="embed_causal", config=EMBEDDING_BASE, prefix="", embedding_dim=48, normalize=False),
    EmbeddingCase(
        name="embed_bidirectional",
        config=EMBEDDING_BASE | {"architectures": ["Qwen2ForCausalLM"], "is_causal": False},
        prefix="model.",
        embedding_dim=48,
        normalize=True,
    ),
    EmbeddingCase(name="embed_no_dense", config=EMBEDDING_BASE, prefix="", embedding_dim=None, normalize=True),
)

ROPE_BASE = {"hidden_size": 512, "num_attention_heads": 8, "max_position_embeddings": 32768}
QWEN_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
ROPE_CONFIGS: tuple[dict[str, Any], ...] = (
    ROPE_BASE | {"rope_theta": 10000.0},
    ROPE_BASE | {"rope_theta": 1000000.0},
    ROPE_BASE | {"rope_theta": 1000000.0, "head_dim": 128},
    ROPE_BASE | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ROPE_BASE | {"rope_theta": 1000000.0, "rope_scaling": {"type": "linear", "factor": 2.5}},
    ROPE_BASE | {"rope_theta": 1000000.0, "rope_scaling": QWEN_YARN},
    ROPE_BASE | {"rope_theta": 1000000.0, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    ROPE_BASE | {"rope_parameters": QWEN_YARN | {"rope_theta": 10000.0, "truncate": False}},
    ROPE_BASE | {"rope_parameters": QWEN_YARN | {"rope_theta": 10000.0, "beta_fast": 16.0, "beta_slow": 2.0}},
    ROPE_BASE | {"rope_parameters": QWEN_YARN | {"rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 0.5}},
    ROPE_BASE | {"rope_parameters": QWEN_YARN | {"rope_theta": 10000.0, "mscale": 0.7}},
    ROPE_BASE | {"rope_parameters": QWEN_YARN | {"rope_theta": 10000.0, "attention_factor": 1.5}},
    ROPE_BASE | {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0, "original_max_position_embeddings": 8192}},
)

SMOLLM2_CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Write a short story about a lighthouse keeper who befriends a whale."}],
    [
        {"role": "system", "content": "You are a patient teacher. Answer in simple words."},
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Because the air scatters blue light more than red light."},
        {"role": "user", "content": "Then why are sunsets red? 🌅"},
    ],
    [{"role": "user", "content": "Explain, step by step, how to bake a loaf of bread with a crisp crust."}],
)
