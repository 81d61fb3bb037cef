"""What is written is what is read again: PEFT folders, and safetensors files made tensor by tensor."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from qwen2_jax.errors import AdapterError
from qwen2_jax.lora.adapter import Adapter, LowRank
from qwen2_jax.lora.merge import updates_of
from qwen2_jax.lora.reader import read_adapter
from qwen2_jax.lora.safetensors_writer import Tensor, write_shards
from qwen2_jax.lora.writer import new_folder, write_adapter
from qwen2_jax.models.safetensors_reader import INDEX, open_safetensors
from tests.lora.adapters import ADAPTERS, base_config
from tests.lora.merging import low_rank, make_adapter, product

Q, DOWN = (0, "q_proj"), (2, "down_proj")
PLAIN = (
    "all_linear",
    "rank_40",
    "patterns",
    "rslora_patterns",
    "lora_bias",
    "bias_lora_only",
    "bias_all",
    "embeddings",
)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def assert_same_update(found: LowRank, expected: LowRank) -> None:
    np.testing.assert_array_equal(found.a, expected.a)
    np.testing.assert_array_equal(found.b, expected.b)
    assert found.scaling == pytest.approx(expected.scaling, rel=1e-12)
    assert (found.bias is None) == (expected.bias is None)
    if found.bias is not None and expected.bias is not None:
        np.testing.assert_array_equal(found.bias, expected.bias)


@pytest.mark.parametrize("case", [f"{base}/{name}" for base in ("untied", "tied") for name in PLAIN])
def test_what_is_written_is_read_again(case: str, tmp_path: Path) -> None:
    config = base_config(Path(case).parts[0])
    adapter = read_adapter(ADAPTERS / case, config)
    folder = write_adapter(adapter, tmp_path / "new" / "adapter", base_model_name_or_path="some/model")
    again = read_adapter(folder, config)
    assert updates_of(again).keys() == updates_of(adapter).keys()
    for module, update in updates_of(adapter).items():
        assert_same_update(updates_of(again)[module], update)
    assert again.biases.keys() == adapter.biases.keys()
    assert all(np.array_equal(again.biases[module], bias) for module, bias in adapter.biases.items())


@pytest.mark.parametrize("case", ["all_linear", "bias_lora_only", "bias_all", "lora_bias"])
def test_names_and_config_are_those_of_peft(case: str, tmp_path: Path) -> None:
    golden = ADAPTERS / "untied" / case
    folder = write_adapter(
        read_adapter(golden, base_config()), tmp_path / "adapter", base_model_name_or_path="some/model"
    )
    theirs, ours = (load_file(path / "adapter_model.safetensors") for path in (golden, folder))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == tensor.tobytes() for name, tensor in theirs.items())
    same = ("peft_type", "task_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias", "lora_bias")
    assert {name: config_of(folder)[name] for name in same} == {name: config_of(golden)[name] for name in same}
    assert config_of(folder)["base_model_name_or_path"] == "some/model"


def test_ranks_and_scalings_that_differ_go_into_patterns(tmp_path: Path) -> None:
    config = base_config(num_hidden_layers=12)
    adapter = make_adapter(0, {(layer, "q_proj"): 4 if layer == 1 else 2 for layer in range(12)})
    linear = dict(adapter.linear)
    linear[11, "q_proj"] = low_rank(np.random.default_rng(1), "q_proj", 2, scaling=0.3)
    adapter = make_adapter(0, {}, linear=linear)
    folder = write_adapter(adapter, tmp_path / "adapter", base_model_name_or_path="some/model")
    assert (config_of(folder)["r"], config_of(folder)["lora_alpha"]) == (2, 1)
    assert config_of(folder)["rank_pattern"] == {"layers.1.self_attn.q_proj": 4}
    assert config_of(folder)["alpha_pattern"] == {"layers.1.self_attn.q_proj": 2, "layers.11.self_attn.q_proj": 0.6}
    again = read_adapter(folder, config)
    for module, update in linear.items():
        np.testing.assert_allclose(product(again.linear[module]), product(update), rtol=1e-12)


def test_modules_without_a_bias_of_b_get_zeros_beside_those_with_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    linear = {Q: low_rank(rng, "q_proj", 2, bias=np.ones(64, np.float32)), DOWN: low_rank(rng, "down_proj", 2)}
    folder = write_adapter(make_adapter(0, {}, linear=linear), tmp_path / "adapter", base_model_name_or_path="m")
    again = read_adapter(folder, base_config()).linear
    np.testing.assert_array_equal(np.array(again[Q].bias), np.ones(64))
    np.testing.assert_array_equal(np.array(again[DOWN].bias), np.zeros(64))


def with_embedding_and_bias() -> Adapter:
    rng = np.random.default_rng(0)
    linear = {Q: low_rank(rng, "q_proj", 2, bias=np.ones(64, np.float32))}
    return make_adapter(0, {}, linear=linear, embed_tokens=low_rank(rng, "embed_tokens", 2))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (make_adapter(0, {}), "no low-rank update"),
        (with_embedding_and_bias(), "an update of embed_tokens, which PEFT does not combine"),
        (
            make_adapter(0, {Q: 2}, full_lm_head=np.zeros((384, 64))),
            "the adapter has full_lm_head, which is not written",
        ),
        (make_adapter(0, {Q: 2}, score=np.zeros((2, 64))), "the adapter has score, which is not written"),
        (
            make_adapter(
                0, {}, linear={Q: low_rank(np.random.default_rng(0), "q_proj", 2, magnitude=np.ones(64, np.float32))}
            ),
            "q_proj of layer 0 has a DoRA magnitude, which is not written",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(adapter: Adapter, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        write_adapter(adapter, tmp_path / "adapter", base_model_name_or_path="m")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_content_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(AdapterError, match="is not empty; name a new folder"):
            write_adapter(make_adapter(0, {Q: 2}), taken, base_model_name_or_path="m")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "kept")]


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), new_folder(tmp_path / "new") as folder:
        (folder / "file").write_text("half")
        raise OSError("full")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new").mkdir()
    with new_folder(tmp_path / "new") as folder:
        (folder / "file").write_text("whole")
    assert (tmp_path / "new" / "file").read_text() == "whole"


def test_a_link_and_the_current_folder_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "here")
    for path in (Path(), tmp_path / "link"):
        write_adapter(make_adapter(0, {Q: 2}), path, base_model_name_or_path="m")
        assert (path / "adapter_config.json").is_file()
    with pytest.raises(AdapterError, match="cannot be written"):
        write_adapter(
            make_adapter(0, {Q: 2}), tmp_path / "link" / "adapter_config.json" / "x", base_model_name_or_path="m"
        )


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (60, 3), (1, 4)])
def test_shards_hold_what_was_made(limit: int, files: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (3, 4), "b": (2, 3), "c": (7,), "d": (5, 5)}
    dtypes = (np.float32, np.float16, ml_dtypes.bfloat16, np.float32)
    arrays = {
        name: rng.standard_normal(shape).astype(dtype)
        for (name, shape), dtype in zip(shapes.items(), dtypes, strict=True)
    }
    arrays["b"] = np.asfortranarray(arrays["b"])
    tensors = [
        Tensor(name=name, dtype=array.dtype.name, shape=array.shape, make=lambda array=array: array)
        for name, array in arrays.items()
    ]
    write_shards(tmp_path, tensors, max_shard_bytes=limit)
    (tmp_path / "config.json").write_text("{}")
    shards = {path.name: list(load_file(path)) for path in tmp_path.glob("*.safetensors")}
    assert len(shards) == files
    if files == 1:
        assert shards.keys() == {"model.safetensors"} and not (tmp_path / INDEX).exists()
    else:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["weight_map"] == {name: shard for shard, names in shards.items() for name in names}
        assert index["metadata"] == {"total_size": 4 * 12 + 2 * 6 + 2 * 7 + 4 * 25}
    for name, entry in open_safetensors(tmp_path).tensors.items():
        expected = arrays.pop(name)
        np.testing.assert_array_equal(entry.load(), expected)
        assert entry.dtype == expected.dtype.name
    assert not arrays
