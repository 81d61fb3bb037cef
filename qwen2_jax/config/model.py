"""The model's shape and mathematics, read from a Hugging Face config and validated; no arrays, no jax."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen2_jax.config.fields import (
    merge_overrides,
    read_bool,
    read_choice,
    read_float,
    read_int,
    read_token_ids,
)
from qwen2_jax.config.refused import REFUSED_KEYS, refuse_other_maths
from qwen2_jax.config.rope import RopeConfig
from qwen2_jax.errors import ConfigError, nearest, reject_unknown

CAUSAL_LM_ARCHITECTURES = ("Qwen2ForCausalLM", "FlashQwen2ForCausalLM", "LlamaForCausalLM")
EMBEDDING_ARCHITECTURES = ("Qwen2Model", "Qwen2ForEmbeddings", "FlashQwen2ForEmbeddings")
DTYPES = ("float32", "bfloat16", "float16")
HIDDEN_ACTS = (
    "silu", "swish", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh",
    "gelu_python_tanh", "quick_gelu", "relu", "relu2", "relu6", "leaky_relu", "sigmoid", "tanh", "mish", "linear",
)  # fmt: skip
MODEL_TYPES = ("qwen2", "llama")

_LARGEST_DEPTH = 10_000
_KNOWN_KEYS = (
    *REFUSED_KEYS,
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "use_sliding_window",
    "sliding_window", "max_window_layers", "layer_types", "tie_word_embeddings", "attention_bias", "is_causal",
    "embedding_dim", "torch_dtype", "dtype", "bos_token_id", "eos_token_id", "initializer_range",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the model computes. Names are Hugging Face's; sizes are the checkpoint's, before any padding.

    `layer_windows[i]` is the number of tokens that layer `i` sees, the query's own included, or None for full
    attention. `attention_bias` is False where the q, k and v biases are zero (Llama). `embedding_dim` is the width of
    an embeddings model's dense layer, or None without one. `dtype` is the checkpoint's.
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str = "silu"
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    layer_windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    attention_bias: bool
    is_causal: bool = True
    embedding_dim: int | None = None
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    initializer_range: float = 0.02

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, hf_overrides: Mapping[str, Any] | None = None) -> "ModelConfig":
        """Read the content of a `config.json`, with `hf_overrides` laid over it (objects merge, null removes).

        `dtype` (or `torch_dtype`) counts as float32 where it is absent, as in transformers. Raises `ConfigError` for a
        missing or wrong value, an unsupported architecture, a key that asks for other mathematics than Qwen2's, or
        an override that neither this package nor the config knows, or that would have no effect.
        """
        if not isinstance(config, Mapping) or not isinstance(hf_overrides or {}, Mapping):
            raise ConfigError(f"a model config is an object, not {type(config).__name__}")
        reject_unknown("key in hf_overrides", hf_overrides or {}, {*_KNOWN_KEYS, *config})
        config = merge_overrides(config, hf_overrides or {})
        architecture, model_type = _architecture(config)
        refuse_other_maths(config)
        heads, kv_heads, head_dim = _heads(config)
        vocab_size = read_int(config, "vocab_size")
        max_position_embeddings = read_int(config, "max_position_embeddings")
        bos_token_ids = read_token_ids(config, "bos_token_id", vocab_size)
        layer_windows = _layer_windows(config, model_type)
        _check_window_overrides(hf_overrides or {}, config, layer_windows)
        return cls(
            architecture=architecture,
            model_type=model_type,
            vocab_size=vocab_size,
            hidden_size=read_int(config, "hidden_size"),
            intermediate_size=read_int(config, "intermediate_size"),
            num_hidden_layers=read_int(config, "num_hidden_layers", high=_LARGEST_DEPTH),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            hidden_act=read_choice(config, "hidden_act", HIDDEN_ACTS, default="silu"),
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=read_float(config, "rms_norm_eps"),
            rope=RopeConfig.from_hf(config, max_position_embeddings),
            layer_windows=layer_windows,
            tie_word_embeddings=read_bool(config, "tie_word_embeddings", default=False),
            attention_bias=_attention_bias(config, model_type),
            is_causal=read_bool(config, "is_causal", default=True),
            embedding_dim=read_int(config, "embedding_dim", default=None),
            dtype=_dtype(config),
            bos_token_id=bos_token_ids[0] if bos_token_ids else None,
            eos_token_ids=read_token_ids(config, "eos_token_id", vocab_size),
            initializer_range=read_float(config, "initializer_range", default=0.02),
        )

    @property
    def num_layer_parameters(self) -> int:
        """Weights that every token is multiplied with in the layers: the projections'."""
        attention = 2 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim * self.hidden_size
        return self.num_hidden_layers * (attention + 3 * self.intermediate_size * self.hidden_size)

    @property
    def num_queries_per_kv(self) -> int:
        """G: how many query heads share one key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def is_embedding_model(self) -> bool:
        """Whether the architecture gives embeddings and has no language-model head."""
        return self.architecture in EMBEDDING_ARCHITECTURES

    @property
    def has_lm_head(self) -> bool:
        """Whether the weights hold an output matrix of their own (an untied language model)."""
        return not self.is_embedding_model and not self.tie_word_embeddings

    @property
    def context_length(self) -> int:
        """The longest sequence in tokens: `max_position_embeddings`, times the factor of a linear or YaRN scaling."""
        if self.rope.rope_type == "linear":
            return int(self.max_position_embeddings * self.rope.factor)
        if self.rope.rope_type == "yarn":
            original = self.rope.original_max_position_embeddings or self.max_position_embeddings
            return max(self.max_position_embeddings, int(original * self.rope.factor))
        return self.max_position_embeddings


def _architecture(config: Mapping[str, Any]) -> tuple[str, str]:
    supported = (*CAUSAL_LM_ARCHITECTURES, *EMBEDDING_ARCHITECTURES)
    given, model_type = config.get("architectures"), config.get("model_type")
    if given is None:
        given = {"qwen2": ["Qwen2ForCausalLM"], "llama": ["LlamaForCausalLM"]}.get(str(model_type))
    if not isinstance(given, list) or len(given) != 1 or not isinstance(given[0], str):
        raise ConfigError(
            f"architectures={given!r} with model_type={model_type!r} does not name one model; "
            f"supported: {', '.join(supported)}"
        )
    name = given[0]
    if name not in supported:
        raise ConfigError(
            f"architecture {name!r} is not supported{nearest(name, supported)}; supported: {', '.join(supported)}"
        )
    expected = "llama" if name == "LlamaForCausalLM" else "qwen2"
    if model_type is not None and model_type != expected:
        raise ConfigError(f"model_type={model_type!r} does not fit architecture {name!r}, whose type is {expected!r}")
    return name, expected


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return query heads, key-value heads and head_dim."""
    hidden_size = read_int(config, "hidden_size")
    heads = read_int(config, "num_attention_heads")
    if "num_key_value_heads" not in config:
        raise ConfigError("the config has no 'num_key_value_heads'; null would mean one per query head")
    kv_heads = read_int(config, "num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise ConfigError(f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
    if config.get("head_dim") is None and hidden_size % heads:
        raise ConfigError(f"num_attention_heads={heads} does not divide hidden_size={hidden_size}; give head_dim")
    head_dim = read_int(config, "head_dim", default=hidden_size // heads)
    if head_dim % 2:
        raise ConfigError(f"head_dim={head_dim} is odd; the rotary embedding needs an even one")
    return heads, kv_heads, head_dim


def _layer_windows(config: Mapping[str, Any], model_type: str) -> tuple[int | None, ...]:
    """Return each layer's window, as transformers' `Qwen2Config` derives it."""
    depth = read_int(config, "num_hidden_layers", high=_LARGEST_DEPTH)
    slides = read_bool(config, "use_sliding_window", default=False)
    if slides and config.get("sliding_window", 4096) is None:
        slides = False  # a window that is null is none, one that is not given 4096 tokens
    window = read_int(config, "sliding_window", default=4096) if slides else None
    if slides and model_type == "llama":
        raise ConfigError("use_sliding_window=True is not for Llama; pass hf_overrides={'use_sliding_window': False}")
    layer_types = config.get("layer_types")
    if layer_types is None:
        first = read_int(config, "max_window_layers", low=0, default=28)
        return tuple(window if i >= first else None for i in range(depth))
    known = ("full_attention", "sliding_attention")
    if not isinstance(layer_types, list) or len(layer_types) != depth or any(t not in known for t in layer_types):
        raise ConfigError(f"layer_types={str(layer_types)[:80]} is not a list of {depth} of {', '.join(known)}")
    if window is None and "sliding_attention" in layer_types:
        raise ConfigError(
            "layer_types names 'sliding_attention' but use_sliding_window is not true, so the window has no size; "
            "pass hf_overrides={'use_sliding_window': True, 'sliding_window': ...} or {'layer_types': None}"
        )
    return tuple(window if t == "sliding_attention" else None for t in layer_types)


def _attention_bias(config: Mapping[str, Any], model_type: str) -> bool:
    bias = read_bool(config, "attention_bias", default=model_type == "qwen2")
    if bias and model_type == "llama":
        raise ConfigError("attention_bias=True gives a Llama a bias on o_proj, which Qwen2 does not have")
    return bias


def _dtype(config: Mapping[str, Any]) -> str:
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    value = config.get(key)
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    return read_choice({key: name}, key, DTYPES, default="float32")


def _check_window_overrides(
    overrides: Mapping[str, Any], config: Mapping[str, Any], layer_windows: tuple[int | None, ...]
) -> None:
    """Refuse overrides that change nothing about the layers' windows though they ask for it."""
    if "max_window_layers" in overrides and config.get("layer_types") is not None:
        raise ConfigError(
            "hf_overrides={'max_window_layers': ...} has no effect beside layer_types, which says what each layer "
            "sees; override that, with None to have it follow from max_window_layers"
        )
    asked = {name: overrides.get(name) for name in ("use_sliding_window", "sliding_window")}
    if any(asked.values()) and all(window is None for window in layer_windows):
        raise ConfigError(
            f"hf_overrides={ {name: value for name, value in asked.items() if value} } asks for a window that no layer "
            "has; override use_sliding_window (True), and max_window_layers or layer_types, which say for which layers"
        )
