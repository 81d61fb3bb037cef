import dataclasses
import math
from typing import Any

import pytest

from qwen2_jax.config import ModelConfig, RopeConfig
from qwen2_jax.config.model import HIDDEN_ACTS
from qwen2_jax.errors import ConfigError
from scripts.make_tiny_model import tiny_config


def read(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf(tiny_config(**changes))


def without(key: str) -> dict[str, Any]:
    config = tiny_config()
    del config[key]
    return config


def test_reads_a_qwen2_config():
    config = read(eos_token_id=[1, 2, 1], torch_dtype="bfloat16", num_attention_heads=8)
    assert (config.architecture, config.model_type) == ("Qwen2ForCausalLM", "qwen2")
    assert (config.head_dim, config.num_queries_per_kv) == (4, 4)
    assert config.eos_token_ids == (1, 2)
    assert config.dtype == "bfloat16"
    assert config.attention_bias and config.is_causal and config.has_lm_head and not config.is_embedding_model
    assert config.layer_windows == (None, None)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        read().vocab_size = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"head_dim": 16}, "head_dim", 16),
        ({"head_dim": None}, "head_dim", 8),
        ({"num_key_value_heads": None}, "num_key_value_heads", 4),
        ({"torch_dtype": None, "dtype": "torch.float16"}, "dtype", "float16"),
        ({"torch_dtype": None}, "dtype", "float32"),
        ({"eos_token_id": None, "bos_token_id": None}, "eos_token_ids", ()),
        ({"is_causal": False}, "is_causal", False),
        ({"attention_bias": False}, "attention_bias", False),
        ({"architectures": None}, "architecture", "Qwen2ForCausalLM"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "attention_bias", False),
        ({"architectures": ["Qwen2Model"], "embedding_dim": 7}, "embedding_dim", 7),
        ({"quantization_config": None, "mlp_bias": False, "partial_rotary_factor": 1.0}, "hidden_size", 32),
        ({"attention_dropout": 0.1, "use_cache": True, "transformers_version": "5.0"}, "hidden_size", 32),
    ],
)
def test_reads_optional_keys(changes: dict[str, Any], field: str, value: Any):
    assert getattr(read(**changes), field) == value


@pytest.mark.parametrize("act", HIDDEN_ACTS)
def test_takes_every_activation(act: str):
    assert read(hidden_act=act).hidden_act == act


@pytest.mark.parametrize("architecture", ["Qwen2Model", "Qwen2ForEmbeddings", "FlashQwen2ForEmbeddings"])
def test_embedding_architectures_have_no_head(architecture: str):
    config = read(architectures=[architecture])
    assert config.is_embedding_model and not config.has_lm_head


YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "yarn", **YARN}},
        {"rope_scaling": {"rope_type": "yarn", "type": "yarn", **YARN}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **YARN}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000, **YARN}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": {"type": "yarn", **YARN}},
        {
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1},
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_every_spelling_of_rope_gives_the_same(changes: dict[str, Any]):
    wanted = RopeConfig(rope_theta=1e4, rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    assert read(**changes).rope == wanted


def test_rope_details():
    default = read(rope_theta=5.0).rope
    assert default == RopeConfig(rope_theta=5.0)
    linear = read(rope_scaling={"type": "linear", "factor": 2})
    assert (linear.rope.rope_type, linear.rope.factor, linear.context_length) == ("linear", 2.0, 512)
    yarn = read(rope_scaling={"type": "yarn", "factor": 4.0, "beta_fast": 16, "truncate": False, "mscale": 0.7})
    assert yarn.rope.original_max_position_embeddings == 256
    assert (yarn.rope.beta_fast, yarn.rope.truncate, yarn.rope.mscale, yarn.context_length) == (16.0, False, 0.7, 1024)
    derived = read(rope_scaling={"type": "yarn", "factor": None, "original_max_position_embeddings": 64})
    assert derived.rope.factor == 4.0
    llama3 = {"factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 6.0, "original_max_position_embeddings": 64}
    rope = read(rope_parameters={"rope_type": "llama3", **llama3}).rope
    assert (rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings) == (2.0, 6.0, 64)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({}, (None,) * 4),
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, (None,) * 4),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, (8,) * 4),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, (None, None, None, 8)),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}, (None,) * 4),
        ({"use_sliding_window": True, "sliding_window": 8}, (None,) * 4),
        ({"use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 4096)),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, (None,) * 4),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 4,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
    ],
)
def test_windows_follow_transformers(changes: dict[str, Any], windows: tuple[int | None, ...]):
    assert read(num_hidden_layers=4, **changes).layer_windows == windows


def test_overrides_merge_and_remove():
    base = tiny_config(rope_scaling={"type": "yarn", "factor": 2.0}, dual_chunk_attention_config={"chunk_size": 1})
    overrides = {"rope_scaling": {"factor": 4.0}, "dual_chunk_attention_config": None, "tie_word_embeddings": True}
    config = ModelConfig.from_hf(base, hf_overrides=overrides)
    assert (config.rope.rope_type, config.rope.factor, config.tie_word_embeddings) == ("yarn", 4.0, True)
    assert base["rope_scaling"]["factor"] == 2.0


def test_an_unknown_override_names_the_nearest():
    with pytest.raises(ConfigError, match="'rope_thetta'; did you mean 'rope_theta'"):
        ModelConfig.from_hf(tiny_config(), hf_overrides={"rope_thetta": 1.0})
    with pytest.raises(ConfigError, match="'facto'; did you mean 'factor'"):
        read(rope_scaling={"type": "yarn", "facto": 4.0})


WINDOWED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
TYPES = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({}, {"sliding_window": 16}, "{'sliding_window': 16} asks for a window that no layer has"),
        ({"max_window_layers": 2}, {"use_sliding_window": True}, "asks for a window that no layer has"),
        (WINDOWED | {"layer_types": TYPES[:1] * 2}, {"sliding_window": 16}, "asks for a window that no layer has"),
        (WINDOWED | {"layer_types": TYPES}, {"max_window_layers": 0}, "no effect beside layer_types"),
    ],
)
def test_window_overrides_without_effect_are_refused(
    changes: dict[str, Any], overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(tiny_config(num_hidden_layers=2, **changes), hf_overrides=overrides)


@pytest.mark.parametrize(
    ("changes", "overrides", "windows"),
    [
        ({}, {"sliding_window": None}, (None, None)),
        ({}, WINDOWED, (None, 8)),
        (WINDOWED, {"use_sliding_window": False}, (None, None)),
        (WINDOWED, {"sliding_window": None}, (None, None)),
        (WINDOWED | {"layer_types": TYPES}, {"sliding_window": 16}, (None, 16)),
        (WINDOWED | {"layer_types": TYPES}, {"layer_types": None, "sliding_window": 4}, (None, 4)),
        (WINDOWED | {"layer_types": TYPES}, {"layer_types": None, "max_window_layers": 0}, (8, 8)),
    ],
)
def test_window_overrides_take_effect(
    changes: dict[str, Any], overrides: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    config = ModelConfig.from_hf(tiny_config(num_hidden_layers=2, **changes), hf_overrides=overrides)
    assert config.layer_windows == windows


NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
)


@pytest.mark.parametrize("key", NEEDED)
def test_a_missing_key_is_named(key: str):
    with pytest.raises(ConfigError, match=f"no '{key}'"):
        ModelConfig.from_hf(without(key))


SIZES = [key for key in NEEDED if key not in ("rms_norm_eps", "rope_theta")]


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", ["32", True, 32.0, math.nan, 0, -4, 2**40, [32], {"a": 1}])
def test_a_wrong_size_is_named(key: str, value: Any):
    with pytest.raises(ConfigError, match=f"{key}="):
        read(**{key: value})


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "initializer_range"])
@pytest.mark.parametrize("value", ["1", True, math.nan, math.inf, 0, -1.0, 10**400, [1.0]])
def test_a_wrong_number_is_named(key: str, value: Any):
    with pytest.raises(ConfigError, match=f"{key}="):
        read(**{key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "'Qwen3ForCausalLM' is not supported; did you mean"),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "supported: Qwen2ForCausalLM"),
        ({"architectures": []}, "does not name one model"),
        ({"architectures": "Qwen2ForCausalLM"}, "does not name one model"),
        ({"architectures": None, "model_type": None}, "does not name one model"),
        ({"model_type": "qwen3"}, "'qwen3' does not fit"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
        ({"hidden_size": 33}, "does not divide hidden_size=33"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"hidden_act": "swiglu"}, "hidden_act='swiglu' is not one of 'silu'"),
        ({"torch_dtype": "float64"}, "torch_dtype='float64' is not one of"),
        ({"torch_dtype": 3}, "torch_dtype=3"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' is not true or false"),
        ({"eos_token_id": 160}, "eos_token_id=160 is not a token id"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id=-1"),
        ({"rope_theta": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "it is never assumed"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported: .* cache would change"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope' is not supported"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "Qwen2-VL"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type='ntk' is unknown; use one of 'default'"),
        ({"rope_scaling": {"type": ["yarn"]}}, "is unknown"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}}, "contradicts type='yarn'"),
        ({"rope_scaling": {"type": "yarn"}}, "no 'factor'"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor=0.5"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' is not an object"),
        ({"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_theta": 2.0}}, "rope_theta as .* keep one"),
        (
            {
                "rope_scaling": {"type": "yarn", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 2.0},
            },
            "contradicts rope_parameters",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "no 'low_freq_factor'"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window=0"),
        ({"use_sliding_window": "true"}, "use_sliding_window='true'"),
        ({"layer_types": ["full_attention"]}, "not a list of 2"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "not a list of 2"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "the window has no size"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config=.*GGUF"),
        ({"dual_chunk_attention_config": {"chunk_size": 1}}, "hf_overrides={'dual_chunk_attention_config': None}"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"num_experts": 8}, "mixture-of-experts"),
        ({"use_qk_norm": True}, "Qwen3"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"vision_config": {}}, "only text models"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": True}, "bias on o_proj"),
    ],
)
def test_refuses_by_name(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        read(**changes)


def test_refuses_what_is_not_an_object():
    with pytest.raises(ConfigError, match="is an object, not list"):
        ModelConfig.from_hf([])  # pyright: ignore[reportArgumentType]
