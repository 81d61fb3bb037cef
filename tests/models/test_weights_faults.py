"""Damaged and unfitting checkpoints: each ends in a `CheckpointError` that names what is wrong."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import CheckpointError
from qwen2_jax.models.weights import load_weights, open_checkpoint
from scripts.make_tiny_model import (
    make_tiny_model,
    make_tiny_sentence_transformer,
    tiny_config,
    tiny_tensors,
    write_checkpoint,
)

GATE = "model.layers.1.mlp.gate_proj.weight"


def load(folder: Path, dtype: Any = np.float32) -> dict[Any, Any]:
    checkpoint = open_checkpoint(folder)
    config = ModelConfig.from_hf(checkpoint.config)
    return load_weights(checkpoint, config, dtype=dtype, put=lambda _, array: array, use_tqdm=False)


def drop(tensors: dict[str, np.ndarray]) -> None:
    del tensors[GATE]


def drop_head(tensors: dict[str, np.ndarray]) -> None:
    del tensors["lm_head.weight"]


def add(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.2.mlp.gate_proj.weight"] = tensors[GATE]


def reshape(tensors: dict[str, np.ndarray]) -> None:
    tensors[GATE] = tensors[GATE][:-1]


def flip(tensors: dict[str, np.ndarray]) -> None:
    tensors[GATE] = np.ascontiguousarray(tensors[GATE].T)


def integers(tensors: dict[str, np.ndarray]) -> None:
    tensors[GATE] = tensors[GATE].astype(np.int32)


def doubles(tensors: dict[str, np.ndarray]) -> None:
    tensors[GATE] = tensors[GATE].astype(np.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, f"lacks 1 of the tensors .* first '{GATE}' with shape \\[48, 32\\]"),
        (drop_head, "'lm_head.weight' .*hf_overrides={'tie_word_embeddings': True}"),
        (add, "holds 1 tensors .* first 'model.layers.2.mlp.gate_proj.weight' with shape \\[48, 32\\]"),
        (reshape, f"'{GATE}' has shape \\[47, 32\\], the config needs \\[48, 32\\]"),
        (flip, f"'{GATE}' has shape \\[32, 48\\], the config needs \\[48, 32\\]"),
        (integers, f"'{GATE}' has dtype I32; use one of float32, bfloat16, float16"),
        (doubles, f"'{GATE}' has dtype F64"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], None], message: str
):
    config = tiny_config()
    tensors = tiny_tensors(config)
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        load(write_checkpoint(tmp_path, config, tensors))


def test_nothing_is_read_before_everything_fits(tmp_path: Path):
    config = tiny_config()
    tensors = tiny_tensors(config)
    drop_head(tensors)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, config, tensors))
    put: list[Any] = []
    with pytest.raises(CheckpointError):
        load_weights(
            checkpoint,
            ModelConfig.from_hf(config),
            dtype=np.float32,
            put=lambda path, _: put.append(path),
            use_tqdm=False,
        )
    assert not put


def test_float16_that_overflows_is_an_error(tmp_path: Path):
    config = tiny_config()
    tensors = tiny_tensors(config)
    tensors[GATE][0, 0] = 1e6
    with pytest.raises(CheckpointError, match=f"'{GATE}' has values beyond float16's range; use dtype='bfloat16'"):
        load(write_checkpoint(tmp_path, config, tensors), np.float16)


def test_a_truncated_file_is_named(tmp_path: Path):
    file = make_tiny_model(tmp_path) / "model.safetensors"
    for size in (file.stat().st_size - 1, 100, 7, 0):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(CheckpointError, match=r"model.safetensors is not a whole safetensors file"):
            load(tmp_path)


def test_a_bad_header_is_named(tmp_path: Path):
    file = make_tiny_model(tmp_path) / "model.safetensors"
    content = file.read_bytes()
    for damaged in (b"\xff" * 8 + content[8:], content[:8] + b"[" + content[9:], content + b"x"):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
            load(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path):
    make_tiny_model(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00003.safetensors"):
        load(tmp_path)


def test_a_tensor_in_two_shards_is_named(tmp_path: Path):
    make_tiny_model(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(
        (tmp_path / "model-00001-of-00003.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match="which an earlier shard holds too"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no 'weight_map'"),
        ({"weight_map": []}, "no 'weight_map'"),
        ({"weight_map": {"a": "../model.safetensors"}}, "not a safetensors file in this folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "not a safetensors file in this folder"),
        ({"weight_map": {"a": 3}}, "not a safetensors file in this folder"),
        ([], "a JSON list, not an object"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, index: Any, message: str):
    make_tiny_model(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_refused_unopened(tmp_path: Path, name: str):
    make_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "opened")))
    with pytest.raises(CheckpointError, match=f"{name} is a pickle, .*safe_serialization=True"):
        load(tmp_path)
    assert not (tmp_path / "opened").exists()


def test_folders_without_weights_are_explained(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"is not a folder or a .gguf file"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no safetensors file, no GGUF file and no Orbax"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="it is a LoRA adapter"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("content", "message"), [("{", "cannot be read as JSON"), ("[]", "JSON list, not an object")])
def test_a_bad_config_file_is_named(tmp_path: Path, content: str, message: str):
    (make_tiny_model(tmp_path) / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"config.json .*{message}"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        open_checkpoint(tmp_path)


def test_a_named_format_must_be_the_one_found(tmp_path: Path):
    make_tiny_model(tmp_path)
    assert open_checkpoint(tmp_path, "safetensors").format == "safetensors"
    with pytest.raises(CheckpointError, match=r"load_format='orbax', but .* holds safetensors"):
        open_checkpoint(tmp_path, "orbax")
    with pytest.raises(CheckpointError, match="load_format='pickle' is unknown"):
        open_checkpoint(tmp_path, "pickle")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("order", [["Transformer", "Normalize", "Pooling"], ["Transformer", "Normalize"]])
def test_modules_that_mean_something_else_are_refused(tmp_path: Path, order: list[str]) -> None:
    source = make_tiny_sentence_transformer(tmp_path)
    kinds = {module["type"].rpartition(".")[2]: module for module in json.loads((source / "modules.json").read_text())}
    (source / "modules.json").write_text(json.dumps([kinds[name] for name in order]))
    with pytest.raises(CheckpointError, match="are not supported in this order; there must be a Pooling"):
        open_checkpoint(source)
