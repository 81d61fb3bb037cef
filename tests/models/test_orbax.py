import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import CheckpointError
from qwen2_jax.models import orbax
from qwen2_jax.models.checkpoint import Checkpoint
from qwen2_jax.models.orbax import save_orbax
from qwen2_jax.models.weight_layout import WeightLayout
from qwen2_jax.models.weights import load_weights, open_checkpoint
from qwen2_jax.parallel import HeadLayout
from scripts.make_tiny_model import make_tiny_model, make_tiny_sentence_transformer, tiny_config, tiny_tensors


def load(checkpoint: Checkpoint, dtype: Any, layout: WeightLayout | None = None) -> dict[tuple[Any, ...], np.ndarray]:
    leaves: dict[tuple[Any, ...], np.ndarray] = {}
    config = ModelConfig.from_hf(checkpoint.config)
    load_weights(checkpoint, config, dtype=dtype, put=leaves.__setitem__, layout=layout, use_tqdm=False)
    return leaves


def convert(source: Path, target: Path, dtype: Any = np.float32) -> Checkpoint:
    checkpoint = open_checkpoint(source)
    config = ModelConfig.from_hf(checkpoint.config)
    params = load_weights(checkpoint, config, dtype=dtype, put=lambda _, array: array, use_tqdm=False)
    save_orbax(target, params, config=checkpoint.config, checkpoint=checkpoint)
    return open_checkpoint(target)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_gives_the_same_bits(tmp_path: Path, dtype: Any):
    source = make_tiny_model(tmp_path / "hf", torch_dtype=np.dtype(dtype).name)
    converted = convert(source, tmp_path / "orbax", dtype)
    assert converted.format == "orbax" and converted.config == {
        **open_checkpoint(source).config,
        "dtype": np.dtype(dtype).name,
    }
    ours, theirs = load(converted, dtype), load(open_checkpoint(source), dtype)
    assert list(ours) == list(theirs)
    for path, leaf in ours.items():
        assert leaf.dtype == dtype and leaf.tobytes() == theirs[path].tobytes()


def test_is_laid_out_for_any_mesh(tmp_path: Path):
    converted = convert(make_tiny_model(tmp_path / "hf"), tmp_path / "orbax")
    layout = WeightLayout(heads=HeadLayout(4, 2, 4), intermediate_size=56, vocab_size=168)
    ours, theirs = (load(c, np.float32, layout) for c in (converted, open_checkpoint(tmp_path / "hf")))
    assert ours["model", "layers", 0, "self_attn", "qkv_proj", "kernel"].shape == (4, 3, 8, 32)
    assert all(np.array_equal(ours[path], theirs[path]) for path in theirs)


def test_keeps_the_tokenizer_and_the_generation_config(tmp_path: Path):
    source = make_tiny_model(tmp_path / "hf")
    (source / "tokenizer.json").write_text('{"a": 1}')
    (source / "chat_template.jinja").write_text("{{ x }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (source / "generation_config.json").write_text('{"top_k": 3}')
    converted = convert(source, tmp_path / "orbax")
    assert converted.tokenizer_source == tmp_path / "orbax"
    assert (tmp_path / "orbax" / "tokenizer.json").read_text() == '{"a": 1}'
    assert (tmp_path / "orbax" / "chat_template.jinja").read_text() == "{{ x }}"
    assert (tmp_path / "orbax" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
    assert converted.generation_config == {"top_k": 3}
    assert not list((tmp_path / "orbax").glob("*.safetensors*"))


def test_keeps_the_metadata_of_a_gguf_file(tmp_path: Path):
    config = tiny_config()
    params = {"model": {"norm": {"weight": np.ones(32, np.float32)}}}
    metadata = {"tokenizer.ggml.tokens": ["é", "b"], "tokenizer.ggml.eos_token_id": 1}
    source = Checkpoint(path=tmp_path, format="gguf", config=config, tokenizer_source=metadata, tensors={})
    save_orbax(tmp_path / "orbax", params, config=config, checkpoint=source)
    assert open_checkpoint(tmp_path / "orbax").tokenizer_source == metadata


def test_keeps_what_makes_embeddings(tmp_path: Path):
    source = make_tiny_sentence_transformer(tmp_path / "hf")
    converted, original = convert(source, tmp_path / "orbax"), open_checkpoint(source)
    assert converted.embedding_modules == original.embedding_modules
    ours, theirs = load(converted, np.float32), load(original, np.float32)
    assert ("linear", "bias") in ours and all(np.array_equal(ours[path], theirs[path]) for path in theirs)


def test_keeps_modules_of_any_name(tmp_path: Path):
    source = make_tiny_sentence_transformer(tmp_path / "hf")
    modules = json.loads((source / "modules.json").read_text())
    for module in (module for module in modules if module["path"]):
        if (source / module["path"]).exists():
            (source / module["path"]).rename(source / f"st{module['path']}")
        module["path"] = f"st{module['path']}"
    (source / "modules.json").write_text(json.dumps(modules))
    assert convert(source, tmp_path / "orbax").embedding_modules == open_checkpoint(source).embedding_modules


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = make_tiny_model(tmp_path / "hf")
    with monkeypatch.context() as patch:
        patch.setattr(orbax, "_copy_files", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            convert(source, tmp_path / "orbax")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    convert(source, tmp_path / "orbax")


def test_the_config_names_the_dtype_that_was_written(tmp_path: Path):
    converted = convert(make_tiny_model(tmp_path / "hf"), tmp_path / "orbax", ml_dtypes.bfloat16)
    assert ModelConfig.from_hf(converted.config).dtype == "bfloat16"
    assert {entry.dtype for entry in converted.tensors.values()} == {"bfloat16"}


def test_never_overwrites(tmp_path: Path):
    source = make_tiny_model(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="is not empty; name a new folder"):
        convert(source, source)


def test_an_unfitting_tree_is_named(tmp_path: Path):
    convert(make_tiny_model(tmp_path / "hf"), tmp_path / "orbax")
    (tmp_path / "orbax" / "config.json").write_text((tmp_path / "hf" / "config.json").read_text().replace("48", "50"))
    with pytest.raises(CheckpointError, match=r"gate_up_proj/kernel' has shape \[2, 48, 32\], .* needs \[2, 50, 32\]"):
        load(open_checkpoint(tmp_path / "orbax"), np.float32)


def test_works_under_a_running_event_loop(tmp_path: Path):
    async def body() -> dict[tuple[Any, ...], np.ndarray]:
        return load(convert(make_tiny_model(tmp_path / "hf"), tmp_path / "orbax"), np.float32)

    assert len(asyncio.run(body())) == 17


# In a process of its own: Orbax closes its event loop at the first array that fails, and other threads complain to
# the closed loop later, in the middle of whatever test is running by then.
_LOAD_DAMAGED = """
import sys, numpy as np
from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import CheckpointError
from qwen2_jax.models.weights import load_weights, open_checkpoint
try:
    checkpoint = open_checkpoint(sys.argv[1])
    config = ModelConfig.from_hf(checkpoint.config)
    load_weights(checkpoint, config, dtype=np.float32, put=lambda _, array: array, use_tqdm=False)
except CheckpointError as error:
    print("refused:", error)
"""


def test_a_damaged_folder_is_named(tmp_path: Path):
    convert(make_tiny_model(tmp_path / "hf"), tmp_path / "orbax")
    params = tmp_path / "orbax" / "params"
    for file in params.rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.unlink()
    command = [sys.executable, "-c", _LOAD_DAMAGED, str(tmp_path / "orbax")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.startswith("refused:") and "convert it again" in done.stdout, done.stderr
    (params / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="is not a whole Orbax checkpoint"):
        open_checkpoint(tmp_path / "orbax")


def test_tiny_tensors_are_reproducible():
    one, two = (tiny_tensors(tiny_config(), seed=5) for _ in range(2))
    assert all(np.array_equal(one[name], two[name]) for name in one)
