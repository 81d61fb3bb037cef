"""Checkpoints with an adapter in their weights, against PEFT's effective weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import AdapterError, CheckpointError
from qwen2_jax.lora.adapter import Adapter, LowRank
from qwen2_jax.lora.merge_checkpoint import merge_into_checkpoint
from qwen2_jax.lora.reader import read_adapter
from qwen2_jax.models.weights import load_weights, open_checkpoint
from scripts.make_tiny_gguf import write_gguf
from scripts.make_tiny_model import make_tiny_model, tiny_config, tiny_tensors
from tests.lora.adapters import ADAPTERS, CASES, GOLDEN, base_config
from tests.lora.merging import low_rank, make_adapter, product

Q = (0, "q_proj")
Q_WEIGHT, Q_BIAS = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Their lora_bias is for projections that have no bias in a Qwen2.
WITHOUT_PLACE = ("untied/lora_bias", "tied/lora_bias")


def copy_base(base: str, folder: Path, dtype: Any = np.float32) -> Path:
    """Copy a golden checkpoint with its weights in `dtype`, and files that are and are not a tokenizer's."""
    shutil.copytree(GOLDEN / base, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.astype(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text('{"a tokenizer": 1}')
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return folder


def result(folder: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a checkpoint, each of which its config has a place for."""
    checkpoint = open_checkpoint(folder)
    config = ModelConfig.from_hf(checkpoint.config)
    load_weights(checkpoint, config, dtype=np.float32, put=lambda _, leaf: None, use_tqdm=False)
    return {name: entry.load() for name, entry in checkpoint.tensors.items()}


@pytest.mark.parametrize("case", [case for case in CASES if case not in WITHOUT_PLACE])
def test_weights_are_the_effective_ones_of_peft(case: str, tmp_path: Path) -> None:
    base = Path(case).parts[0]
    source = copy_base(base, tmp_path / "base")
    before = load_file(source / "model.safetensors")
    folder = merge_into_checkpoint(source, read_adapter(ADAPTERS / case, base_config(base)), tmp_path / "merged")
    after = result(folder)
    head = after.get(HEAD, after[EMBEDDING])
    changed = set()
    with np.load(ADAPTERS / case / "golden.npz") as golden:
        for key in (name for name in golden.files if " " in name):
            module, what = key.split()
            name = f"{module if module == 'lm_head' else f'model.{module}'}.{what}"
            found = head if name == HEAD else after[name]
            probe = np.sin(np.arange(1, found.shape[-1] + 1))
            found = found.astype(np.float64) @ probe if what == "weight" else found
            np.testing.assert_allclose(found, golden[key], rtol=1e-5, atol=1e-5, err_msg=key)
            changed.add(name)
    for name in before.keys() - changed:
        np.testing.assert_array_equal(after[name], before[name])
    if base == "tied" and HEAD in after and HEAD not in changed:
        np.testing.assert_array_equal(head, before[EMBEDDING])


@pytest.mark.parametrize(
    ("case", "tied"),
    [
        ("qv", True),
        ("save_tied", True),
        ("embeddings_tied", True),
        ("tokens_list", True),
        ("embed_tokens", False),
        ("lm_head", False),
        ("save_both", False),
        ("tokens_both", False),
        ("dora_embeddings", False),
    ],
)
def test_a_tied_head_gets_its_own_matrix_where_it_differs(case: str, tied: bool, tmp_path: Path) -> None:
    adapter = read_adapter(ADAPTERS / "tied" / case, base_config("tied"))
    folder = merge_into_checkpoint(GOLDEN / "tied", adapter, tmp_path / "merged")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] == tied
    tensors = result(folder)
    assert (HEAD in tensors) != tied
    assert tied or not np.array_equal(tensors[HEAD], tensors[EMBEDDING])


@pytest.mark.parametrize("scaling", [0.5, 0.25])
def test_a_tied_head_with_another_scaling_differs(scaling: float, tmp_path: Path) -> None:
    embed = low_rank(np.random.default_rng(0), "embed_tokens", 2, scaling=0.5)
    head = LowRank(a=embed.b.T, b=embed.a.T, scaling=scaling, bias=None, magnitude=None)
    adapter = make_adapter(0, {}, embed_tokens=embed, lm_head=head)
    after = result(merge_into_checkpoint(GOLDEN / "tied", adapter, tmp_path / "merged"))
    assert (HEAD in after) == (scaling != embed.scaling)


@pytest.mark.parametrize("case", ["embeddings_tied", "embed_tokens"])
def test_a_copy_of_the_tied_head_follows_its_own_change(case: str, tmp_path: Path) -> None:
    source = copy_base("tied", tmp_path / "base")
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {HEAD: tensors[EMBEDDING]}, source / "model.safetensors")
    adapter = read_adapter(ADAPTERS / "tied" / case, base_config("tied"))
    after = result(merge_into_checkpoint(source, adapter, tmp_path / "merged"))
    assert np.array_equal(after[HEAD], after[EMBEDDING]) == (case == "embeddings_tied")
    assert np.array_equal(after[HEAD], tensors[EMBEDDING]) == (case == "embed_tokens")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_bases_dtype_stays_and_is_rounded_to_once(dtype: Any, tmp_path: Path) -> None:
    source, adapter = copy_base("untied", tmp_path / "base", dtype), make_adapter(0, {Q: 4})
    before = load_file(source / "model.safetensors")
    after = result(merge_into_checkpoint(source, adapter, tmp_path / "merged"))
    assert {tensor.dtype for tensor in after.values()} == {np.dtype(dtype)}
    exact = before[Q_WEIGHT].astype(np.float64) + product(adapter.linear[Q])
    np.testing.assert_allclose(after[Q_WEIGHT].astype(np.float64), exact, atol=1e-5, rtol=ml_dtypes.finfo(dtype).eps)


def test_files_of_the_tokenizer_are_copied_and_other_weights_are_not(tmp_path: Path) -> None:
    source = copy_base("untied", tmp_path / "base")
    folder = merge_into_checkpoint(source, make_adapter(0, {Q: 4}), tmp_path / "merged")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (folder / "config.json").read_text().split() == (source / "config.json").read_text().split()


def test_replaced_biases_come_before_those_of_b(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    own, added = rng.standard_normal((2, 64), dtype=np.float32)
    linear = {Q: low_rank(rng, "q_proj", 2, bias=added)}
    for biases, expected in (({Q: own}, own), ({}, load_file(GOLDEN / "untied" / "model.safetensors")[Q_BIAS])):
        folder = tmp_path / str(len(biases))
        merge_into_checkpoint(GOLDEN / "untied", make_adapter(0, {}, linear=linear, biases=biases), folder)
        np.testing.assert_allclose(result(folder)[Q_BIAS], expected + 0.5 * added, rtol=1e-6)


def huge() -> Adapter:
    b = np.full((64, 2), 1e5, np.float32)
    return make_adapter(0, {}, linear={Q: low_rank(np.random.default_rng(0), "q_proj", 2, b=b)})


@pytest.mark.parametrize("case", WITHOUT_PLACE)
def test_a_bias_without_a_place_is_refused(case: str, tmp_path: Path) -> None:
    base = Path(case).parts[0]
    with pytest.raises(AdapterError, match=r"adds a bias \(lora_bias\) where .* has no 'model.layers.0.*_proj.bias'"):
        merge_into_checkpoint(GOLDEN / base, read_adapter(ADAPTERS / case, base_config(base)), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_the_bases_dtype_are_refused(tmp_path: Path) -> None:
    source = copy_base("untied", tmp_path / "base", np.float16)
    with pytest.raises(AdapterError, match="has values beyond float16, the base's dtype; use a base in bfloat16"):
        merge_into_checkpoint(source, huge(), tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_classification_head_is_refused(tmp_path: Path) -> None:
    adapter = read_adapter(ADAPTERS / "tied" / "classifier_3", base_config("tied"))
    with pytest.raises(AdapterError, match=r"a classification head \(score\), for which a Qwen2ForC"):
        merge_into_checkpoint(GOLDEN / "tied", adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_bases_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "tiny.gguf", tiny_config(), tiny_tensors(tiny_config()))
    with pytest.raises(CheckpointError, match="holds gguf; an adapter is merged into a Hugging Face folder"):
        merge_into_checkpoint(gguf, make_adapter(0, {Q: 2}), tmp_path / "merged")
    tiny = make_tiny_model(tmp_path / "tiny")
    with pytest.raises(CheckpointError, match=r"changes '.*q_proj.weight' \[64, 64\], but .* with shape \[32, 32\]"):
        merge_into_checkpoint(tiny, make_adapter(0, {Q: 2}), tmp_path / "merged")
    with pytest.raises(CheckpointError, match=r"layers.7.*weight' \[64, 64\], but .* has no such tensor"):
        merge_into_checkpoint(GOLDEN / "untied", make_adapter(0, {(7, "q_proj"): 2}), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    source = copy_base("untied", tmp_path / "base")
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {Q_WEIGHT: tensors[Q_WEIGHT].astype(np.int8)}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="has dtype I8; use one of float32"):
        merge_into_checkpoint(source, make_adapter(0, {Q: 2}), tmp_path / "merged")


@pytest.mark.parametrize("change", ["lacks", "holds"])
def test_a_base_that_does_not_fit_its_config_is_refused(tmp_path: Path, change: str) -> None:
    source, name = copy_base("untied", tmp_path / "base"), "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(source / "model.safetensors")
    other = {"model.layers.99.foo.weight": tensors[name]} if change == "holds" else {}
    kept = {key: array for key, array in tensors.items() if change == "holds" or key != name}
    save_file(kept | other, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{change} 1 (of the )?tensors that its config"):
        merge_into_checkpoint(source, make_adapter(0, {Q: 2}), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_embeddings_model_keeps_its_dense_layer_apart(tmp_path: Path) -> None:
    base = GOLDEN / "embed_causal"
    folder = merge_into_checkpoint(base, make_adapter(0, {Q: 2}), tmp_path / "merged")
    before = {name: entry.load() for name, entry in open_checkpoint(base).tensors.items()}
    after = result(folder)
    assert [name for name in before if not np.array_equal(before[name], after[name])] == [Q_WEIGHT]
    assert "linear.weight" not in load_file(folder / "model.safetensors")
    assert open_checkpoint(folder).embedding_modules == open_checkpoint(base).embedding_modules
