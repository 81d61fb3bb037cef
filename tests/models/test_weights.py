import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import CheckpointError
from qwen2_jax.models.checkpoint import Checkpoint
from qwen2_jax.models.weight_layout import WeightLayout
from qwen2_jax.models.weights import load_weights, open_checkpoint
from qwen2_jax.parallel import HeadLayout
from scripts.make_tiny_model import (
    make_tiny_model,
    make_tiny_sentence_transformer,
    tiny_config,
    tiny_tensors,
    write_checkpoint,
)

Tree = dict[Any, Any]


def load(checkpoint: Checkpoint, *, dtype: Any = np.float32, layout: WeightLayout | None = None) -> Tree:
    config = ModelConfig.from_hf(checkpoint.config)
    return load_weights(checkpoint, config, dtype=dtype, put=lambda _, array: array, layout=layout, use_tqdm=False)


def flatten(tree: Tree, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], np.ndarray]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {leaf: value for key, below in tree.items() for leaf, value in flatten(below, (*path, key)).items()}


@pytest.mark.parametrize("heads", [(4, 2), (14, 2), (7, 1), (4, 4)])
def test_the_tree_computes_what_the_tensors_compute(tmp_path: Path, heads: tuple[int, int]):
    n, k = heads
    config = tiny_config(num_attention_heads=n, num_key_value_heads=k, head_dim=6)
    tensors = tiny_tensors(config)
    tree = load(open_checkpoint(write_checkpoint(tmp_path, config, tensors)))
    x, y = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    for i in range(2):
        layer, hf = tree["model"]["layers"][i], f"model.layers.{i}."
        qkv = np.einsum("d,kghd->kgh", x, layer["self_attn"]["qkv_proj"]["kernel"])
        qkv += layer["self_attn"]["qkv_proj"]["bias"]
        for name, ours in (("q", qkv[:, :-2]), ("k", qkv[:, -2]), ("v", qkv[:, -1])):
            weight, bias = (tensors[f"{hf}self_attn.{name}_proj.{part}"] for part in ("weight", "bias"))
            np.testing.assert_allclose(ours.reshape(-1), weight @ x + bias, atol=1e-5)
        heads_out = np.random.default_rng(1).normal(size=(k, n // k, 6)).astype(np.float32)
        o_proj = np.einsum("kgh,dkgh->d", heads_out, layer["self_attn"]["o_proj"]["kernel"])
        np.testing.assert_allclose(o_proj, tensors[f"{hf}self_attn.o_proj.weight"] @ heads_out.reshape(-1), atol=1e-5)
        gate, up = np.einsum("d,cfd->cf", y, layer["mlp"]["gate_up_proj"]["kernel"])
        np.testing.assert_allclose(gate, tensors[f"{hf}mlp.gate_proj.weight"] @ y, atol=1e-5)
        np.testing.assert_allclose(up, tensors[f"{hf}mlp.up_proj.weight"] @ y, atol=1e-5)
        np.testing.assert_array_equal(layer["mlp"]["down_proj"]["kernel"], tensors[f"{hf}mlp.down_proj.weight"])
        np.testing.assert_array_equal(layer["input_layernorm"]["weight"], tensors[f"{hf}input_layernorm.weight"])
    np.testing.assert_array_equal(tree["lm_head"]["embedding"], tensors["lm_head.weight"])
    np.testing.assert_array_equal(tree["model"]["embed_tokens"]["embedding"], tensors["model.embed_tokens.weight"])


def test_shards_give_what_one_file_gives(tmp_path: Path):
    one = flatten(load(open_checkpoint(make_tiny_model(tmp_path / "one"))))
    many = flatten(load(open_checkpoint(make_tiny_model(tmp_path / "many", shards=5))))
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[path], many[path]) for path in one)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_dtype_becomes_every_other(tmp_path: Path, stored: str, wanted: Any):
    checkpoint = open_checkpoint(make_tiny_model(tmp_path, torch_dtype=stored))
    assert ModelConfig.from_hf(checkpoint.config).dtype == stored
    norm = checkpoint.tensors["model.norm.weight"].load()
    tree = load(checkpoint, dtype=wanted)
    assert {leaf.dtype for leaf in flatten(tree).values()} == {np.dtype(wanted)}
    np.testing.assert_array_equal(tree["model"]["norm"]["weight"], norm.astype(wanted))


def test_the_tensors_name_a_dtype_that_the_config_lacks(tmp_path: Path):
    config = tiny_config(torch_dtype="bfloat16")
    tensors = tiny_tensors(config)
    del config["torch_dtype"]
    assert open_checkpoint(write_checkpoint(tmp_path, config, tensors)).config["torch_dtype"] == "bfloat16"


def test_put_sees_one_leaf_at_a_time_and_what_it_returns_is_the_tree(tmp_path: Path):
    checkpoint = open_checkpoint(make_tiny_model(tmp_path))
    seen: list[tuple[Any, ...]] = []

    def put(path: tuple[Any, ...], array: np.ndarray) -> str:
        seen.append(path)
        return f"{array.shape}"

    config = ModelConfig.from_hf(checkpoint.config)
    tree = load_weights(checkpoint, config, dtype=np.float32, put=put, use_tqdm=False)
    assert seen == list(flatten(tree))
    assert tree["model"]["layers"][1]["mlp"]["down_proj"]["kernel"] == "(32, 48)"
    assert len(seen) == len(set(seen)) == 2 * 7 + 3


def test_the_host_holds_one_group_at_a_time(tmp_path: Path):
    folder = make_tiny_model(tmp_path, hidden_size=128, intermediate_size=256, vocab_size=1024, num_hidden_layers=12)
    checkpoint = open_checkpoint(folder)
    config = ModelConfig.from_hf(checkpoint.config)
    total = sum(entry.nbytes for entry in checkpoint.tensors.values())
    largest = checkpoint.tensors["model.embed_tokens.weight"].nbytes
    tracemalloc.start()
    load_weights(checkpoint, config, dtype=ml_dtypes.bfloat16, put=lambda *_: None, use_tqdm=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * largest < 0.25 * total


def test_progress_is_shown_unless_it_is_switched_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint = open_checkpoint(make_tiny_model(tmp_path))
    config = ModelConfig.from_hf(checkpoint.config)
    for use_tqdm in (True, False):
        load_weights(checkpoint, config, dtype=np.float32, put=lambda *_: None, use_tqdm=use_tqdm)
        shown = capsys.readouterr().err
        assert ("Loading safetensors shards: 100%" in shown) == use_tqdm


def test_a_tied_head_may_be_stored_too_if_it_is_the_same(tmp_path: Path):
    config = tiny_config(tie_word_embeddings=True)
    tensors = tiny_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tree = load(open_checkpoint(write_checkpoint(tmp_path, config, tensors)))
    assert "lm_head" not in tree
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' holds other values; pass hf_overrides="):
        load(open_checkpoint(write_checkpoint(tmp_path, config, tensors)))


def test_rotary_buffers_are_ignored(tmp_path: Path):
    config = tiny_config()
    tensors = tiny_tensors(config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    assert "lm_head" in load(open_checkpoint(write_checkpoint(tmp_path, config, tensors)))


def test_names_without_the_prefix_get_it(tmp_path: Path):
    config = tiny_config(architectures=["Qwen2Model"])
    tensors = {name.removeprefix("model."): tensor for name, tensor in tiny_tensors(config).items()}
    tree = load(open_checkpoint(write_checkpoint(tmp_path, config, tensors)))
    assert set(tree) == {"model"}
    np.testing.assert_array_equal(tree["model"]["norm"]["weight"], tensors["norm.weight"])


@pytest.mark.parametrize(("heads", "tp"), [((4, 2), 2), ((4, 2), 4), ((14, 2), 4), ((7, 1), 4), ((8, 4), 2)])
def test_a_padded_layout_computes_the_same(tmp_path: Path, heads: tuple[int, int], tp: int):
    n, k = heads
    folder = make_tiny_model(tmp_path, num_attention_heads=n, num_key_value_heads=k, head_dim=6)
    checkpoint = open_checkpoint(folder)
    head_layout = HeadLayout(n, k, tp)
    layout = WeightLayout(heads=head_layout, intermediate_size=56, vocab_size=168)
    plain, placed = load(checkpoint), load(checkpoint, layout=layout)
    rng = np.random.default_rng(0)
    x = rng.normal(size=32).astype(np.float32)
    ours, theirs = placed["model"]["layers"][1], plain["model"]["layers"][1]

    qkv, qkv_plain = (
        np.einsum("d,kghd->kgh", x, layer["self_attn"]["qkv_proj"]["kernel"]) + layer["self_attn"]["qkv_proj"]["bias"]
        for layer in (ours, theirs)
    )
    assert qkv.shape == (head_layout.padded_kv_heads, head_layout.padded_group + 2, 6)
    attended, attended_plain = (np.tanh(q[:, :-2] * q[:, -2:-1]) + q[:, -1:] for q in (qkv, qkv_plain))
    outs = [
        np.einsum("kgh,dkgh->d", a, layer["self_attn"]["o_proj"]["kernel"])
        for a, layer in ((attended, ours), (attended_plain, theirs))
    ]
    np.testing.assert_allclose(*outs, atol=1e-4)

    mlps = []
    for layer in (ours, theirs):
        gate, up = np.einsum("d,cfd->cf", x, layer["mlp"]["gate_up_proj"]["kernel"])
        mlps.append(layer["mlp"]["down_proj"]["kernel"] @ (gate * up))
    assert ours["mlp"]["down_proj"]["kernel"].shape == (32, 56)
    np.testing.assert_allclose(*mlps, atol=1e-4)

    for head in (placed["lm_head"]["embedding"], placed["model"]["embed_tokens"]["embedding"]):
        assert head.shape == (168, 32) and not head[160:].any()


@pytest.mark.parametrize("bias", [True, False])
def test_a_sentence_transformers_folder_gives_embeddings(tmp_path: Path, bias: bool):
    checkpoint = open_checkpoint(make_tiny_sentence_transformer(tmp_path, bias=bias))
    assert checkpoint.embedding_modules is not None and checkpoint.embedding_modules.normalize
    config = ModelConfig.from_hf(checkpoint.config)
    assert (config.architecture, config.embedding_dim) == ("FlashQwen2ForEmbeddings", 12)
    tree = load(checkpoint)
    np.testing.assert_array_equal(tree["linear"]["kernel"], checkpoint.tensors["linear.weight"].load().T)
    assert tree["linear"]["bias"].shape == (12,) and tree["linear"]["bias"].any() == bias
    assert "lm_head" not in tree


def test_a_head_is_ignored_where_embeddings_are_asked_for(tmp_path: Path):
    make_tiny_sentence_transformer(tmp_path)
    config = tiny_config()
    write_checkpoint(tmp_path, config, tiny_tensors(config))
    assert set(load(open_checkpoint(tmp_path))) == {"model", "linear"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "lasttoken"}, r"pooling \['lasttoken'\]"),
        ({"pooling": "cls_token"}, r"pooling \['cls_token'\]"),
        ({"activation": "activation.Tanh"}, "only Identity"),
    ],
)
def test_other_modules_are_refused_by_name(tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(make_tiny_sentence_transformer(tmp_path, **options))


def test_dummy_needs_no_weights(tmp_path: Path):
    make_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    checkpoint = open_checkpoint(tmp_path, "dummy")
    assert checkpoint.format == "dummy" and not checkpoint.tensors
    assert ModelConfig.from_hf(checkpoint.config).hidden_size == 32
