import dataclasses
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import CheckpointError, ConfigError
from qwen2_jax.models.embedded import embedded_model
from qwen2_jax.models.gguf import open_gguf
from qwen2_jax.models.weights import load_weights, open_checkpoint
from scripts.make_tiny_gguf import write_gguf
from scripts.make_tiny_model import make_tiny_model, tiny_config, tiny_tensors

QUANT = gguf.GGMLQuantizationType


def llama_config(**changes: Any) -> dict[str, Any]:
    return tiny_config(architectures=["LlamaForCausalLM"], model_type="llama", **changes)


def load(path: Path, **overrides: Any) -> dict[Any, Any]:
    checkpoint = open_checkpoint(path)
    config = ModelConfig.from_hf(checkpoint.config, hf_overrides=overrides)
    return load_weights(checkpoint, config, dtype=np.float32, put=lambda _, array: array, use_tqdm=False)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", [tiny_config(), llama_config()], ids=["qwen2", "llama"])
def test_a_gguf_file_holds_what_the_folder_holds(tmp_path: Path, config: dict[str, Any], tied: bool):
    config = {**config, "tie_word_embeddings": tied}
    tensors = tiny_tensors(config)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, tensors))
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, entry in checkpoint.tensors.items():
        assert entry.shape == tensors[name].shape
        np.testing.assert_array_equal(entry.load(), tensors[name])

    ours = ModelConfig.from_hf(checkpoint.config)
    theirs = ModelConfig.from_hf({**config, "eos_token_id": [1, 2], "rms_norm_eps": float(np.float32(1e-6))})
    assert ours == dataclasses.replace(theirs, initializer_range=0.02)


def test_a_llama_with_as_many_key_heads_need_not_say_so(tmp_path: Path):
    config = llama_config(num_key_value_heads=llama_config()["num_attention_heads"])
    tensors = tiny_tensors(config)
    path = write_gguf(tmp_path / "m.gguf", config | {"num_key_value_heads": None}, tensors)
    for name, entry in open_checkpoint(path).tensors.items():
        np.testing.assert_array_equal(entry.load(), tensors[name])


def test_joined_parts_are_a_whole(tmp_path: Path):
    config = tiny_config()
    path = write_gguf(tmp_path / "m.gguf", config, tiny_tensors(config), extra={"split.count": 0})
    assert open_checkpoint(path).tensors.keys() == tiny_tensors(config).keys()


def test_a_llama_gets_zero_biases(tmp_path: Path):
    config = llama_config()
    tree = load(write_gguf(tmp_path / "m.gguf", config, tiny_tensors(config)))
    bias = tree["model"]["layers"][1]["self_attn"]["qkv_proj"]["bias"]
    assert bias.shape == (2, 4, 8) and not bias.any()


@pytest.mark.parametrize("quant", [QUANT.Q8_0, QUANT.Q4_1, QUANT.BF16, QUANT.F16])
def test_quantised_tensors_come_near_the_originals(tmp_path: Path, quant: QUANT):
    config = llama_config(intermediate_size=64)
    tensors = tiny_tensors(config)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, tensors, quant=quant))
    tolerance = {QUANT.Q8_0: 0.01, QUANT.Q4_1: 0.1, QUANT.BF16: 0.005, QUANT.F16: 0.001}[quant]
    for name, entry in checkpoint.tensors.items():
        np.testing.assert_allclose(entry.load().astype(np.float32), tensors[name], atol=tolerance)
    exact = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].load()
    if quant is QUANT.BF16:
        np.testing.assert_array_equal(exact, tensors["model.layers.0.mlp.up_proj.weight"].astype(ml_dtypes.bfloat16))
    assert checkpoint.config["torch_dtype"] == ("float16" if quant is QUANT.F16 else "bfloat16")


def test_metadata_is_the_tokenizers_source(tmp_path: Path):
    config = tiny_config()
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, tiny_tensors(config)))
    assert isinstance(checkpoint.tokenizer_source, dict)
    assert checkpoint.tokenizer_source["tokenizer.ggml.tokens"] == ["<|endoftext|>", "<|im_end|>", "é"]
    assert checkpoint.tokenizer_source["tokenizer.ggml.eos_token_id"] == 1


def test_rotary_scaling_and_windows_come_through(tmp_path: Path):
    config = tiny_config()
    extra = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 64,
        "qwen2.rope.dimension_count": 8,
    }
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, tiny_tensors(config), extra=extra))
    rope = ModelConfig.from_hf(checkpoint.config).rope
    assert (rope.rope_type, rope.factor, rope.original_max_position_embeddings) == ("yarn", 4.0, 64)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"qwen2.attention.scale": 0.3}, "sets qwen2.attention.scale"),
        ({"qwen2.rope.dimension_count": 4}, "rope.dimension_count=4 is not the size of a head, 8"),
        ({"qwen2.attention.value_length": 4}, "heads of different sizes"),
        ({"split.count": 2}, "join them"),
    ],
)
def test_an_unsupported_setting_is_named(tmp_path: Path, extra: dict[str, Any], message: str):
    config = tiny_config()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", config, tiny_tensors(config), extra=extra))


@pytest.mark.parametrize(
    ("extra", "message"),
    [({"qwen2.expert_count": 4}, "mixture"), ({"qwen2.rope.scaling.type": "longrope"}, "'longrope'")],
)
def test_other_maths_is_refused_by_the_config(tmp_path: Path, extra: dict[str, Any], message: str):
    config = tiny_config()
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, tiny_tensors(config), extra=extra))
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(checkpoint.config)


def test_another_architecture_is_refused(tmp_path: Path):
    config = tiny_config(model_type="gemma")
    path = write_gguf(tmp_path / "m.gguf", config, tiny_tensors({**config, "model_type": "qwen2"}))
    with pytest.raises(CheckpointError, match="architecture 'gemma'; supported: qwen2, llama"):
        open_checkpoint(path)


def test_a_tensor_without_a_place_is_named(tmp_path: Path):
    config = tiny_config()
    path = write_gguf(tmp_path / "m.gguf", config, tiny_tensors(config))
    with pytest.raises(CheckpointError, match=r"holds 12 tensors .* first 'model.layers.1\."):
        load(path, num_hidden_layers=1)


def test_a_truncated_file_is_named(tmp_path: Path):
    config = tiny_config()
    path = write_gguf(tmp_path / "m.gguf", config, tiny_tensors(config))
    content = path.read_bytes()
    for size in (len(content) - 1, len(content) // 2, 200, 20, 3):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"m.gguf is not a whole GGUF file"):
            open_gguf(path)


def test_a_folder_may_hold_one_gguf_file(tmp_path: Path):
    config = tiny_config()
    path = write_gguf(tmp_path / "a.gguf", config, tiny_tensors(config))
    assert open_checkpoint(tmp_path).path == path
    (tmp_path / "b.gguf").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"several GGUF files; pass the path of one of a.gguf, b.gguf"):
        open_checkpoint(tmp_path)
    make_tiny_model(tmp_path)
    assert open_checkpoint(tmp_path).format == "safetensors"


def test_the_embedded_model_opens():
    checkpoint = open_checkpoint(embedded_model("smollm2"))
    config = ModelConfig.from_hf(checkpoint.config)
    assert (config.num_hidden_layers, config.head_dim, config.tie_word_embeddings) == (30, 64, True)
    assert (config.rope.rope_theta, config.eos_token_ids, config.vocab_size) == (1e5, (2,), 49152)
    assert checkpoint.tensors["model.layers.29.mlp.down_proj.weight"].load().shape == (576, 1536)
