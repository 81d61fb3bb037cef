"""What is read against PEFT: the weights that each module computes with, for every golden adapter."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen2_jax.lora.adapter import Adapter, LowRank, TokenRows
from qwen2_jax.lora.reader import read_adapter
from tests.lora.adapters import (
    ADAPTERS,
    CASES,
    DOWN_PROJ,
    GOLDEN,
    Q_PROJ,
    base_config,
    read_tensors,
    small_tensors,
    write_adapter,
    zeros,
)

EMBED, HEAD = "embed_tokens", "lm_head"


@pytest.mark.parametrize("case", CASES)
def test_effective_weights_are_those_of_peft(case: str) -> None:
    base = Path(case).parts[0]
    adapter = read_adapter(ADAPTERS / case, base_config(base))
    with np.load(ADAPTERS / case / "golden.npz") as arrays:
        golden = {name: arrays[name] for name in arrays.files if " " in name}
    assert changed_modules(adapter) == {name.split()[0] for name in golden}
    weights = {name: tensor.astype(np.float64) for name, tensor in read_tensors(GOLDEN / base).items()}
    for key, expected in golden.items():
        module, what = key.split()
        found = effective_bias(adapter, weights, module) if what == "bias" else effective(adapter, weights, module)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6, err_msg=key)


def changed_modules(adapter: Adapter) -> set[str]:
    found = {path_of(layer, name) for layer, name in (*adapter.linear, *adapter.biases)}
    embed = (adapter.embed_tokens, adapter.full_embed_tokens, adapter.embed_token_rows)
    head = (adapter.lm_head, adapter.full_lm_head, adapter.lm_head_token_rows)
    found |= {EMBED} if any(change is not None for change in embed) else set()
    return found | ({HEAD} if any(change is not None for change in head) else set())


def path_of(layer: int, name: str) -> str:
    return f"layers.{layer}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"


def module_of(path: str) -> tuple[int, str]:
    return int(path.split(".")[1]), path.split(".")[-1]


def effective(adapter: Adapter, weights: dict[str, np.ndarray], module: str) -> np.ndarray:
    """Return the module's weight times the golden data's probe."""
    table = weights["model.embed_tokens.weight"]
    if module == EMBED:
        weight = replaced(table, adapter.full_embed_tokens, adapter.embed_token_rows)
        weight = updated(weight.T, adapter.embed_tokens).T
    elif module == HEAD:
        weight = replaced(weights.get("lm_head.weight", table), adapter.full_lm_head, adapter.lm_head_token_rows)
        weight = updated(weight, adapter.lm_head)
    else:
        weight = updated(weights[f"model.{module}.weight"], adapter.linear[module_of(module)])
    return weight @ np.sin(np.arange(1, weight.shape[1] + 1))


def updated(weight: np.ndarray, update: LowRank | None) -> np.ndarray:
    if update is None:
        return weight
    weight = weight + update.scaling * update.b.astype(np.float64) @ update.a.astype(np.float64)
    if update.magnitude is None:
        return weight
    return update.magnitude.astype(np.float64)[:, None] * weight / np.linalg.norm(weight, axis=1, keepdims=True)


def replaced(table: np.ndarray, full: np.ndarray | None, rows: TokenRows | None) -> np.ndarray:
    table = table.copy() if full is None else full.astype(np.float64)
    if rows is not None:
        table[rows.token_ids] = rows.rows
    return table


def effective_bias(adapter: Adapter, weights: dict[str, np.ndarray], module: str) -> np.ndarray | float:
    own = adapter.biases.get(module_of(module))
    bias = weights.get(f"model.{module}.bias", 0.0) if own is None else own.astype(np.float64)
    update = adapter.linear.get(module_of(module))
    return bias if update is None or update.bias is None else bias + update.scaling * update.bias


def test_adapters_that_are_not_tied_leave_the_tied_head_alone() -> None:
    adapter = read_adapter(ADAPTERS / "tied/embed_tokens", base_config("tied"))
    assert adapter.embed_tokens is not None and adapter.lm_head is None
    tied = read_adapter(ADAPTERS / "tied/embeddings_tied", base_config("tied"))
    assert tied.embed_tokens is not None and tied.lm_head is not None
    np.testing.assert_array_equal(tied.lm_head.a, tied.embed_tokens.b.T)


@pytest.mark.parametrize("case", ["embeddings_tied", "save_tied"])
def test_a_tied_head_that_the_file_leaves_out_is_the_embeddings(case: str, tmp_path: Path) -> None:
    folder, base = ADAPTERS / "tied" / case, base_config("tied")
    fields = json.loads((folder / "adapter_config.json").read_text())
    tensors = {name: tensor for name, tensor in read_tensors(folder).items() if HEAD not in name}
    write_adapter(tmp_path, dict.fromkeys(small_tensors()) | tensors, **fields)
    whole, half = read_adapter(folder, base), read_adapter(tmp_path, base)
    assert_same_update(whole.lm_head, half.lm_head)
    np.testing.assert_array_equal(np.array(whole.full_lm_head), np.array(half.full_lm_head))


def assert_same_update(first: LowRank | None, second: LowRank | None) -> None:
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        assert first.scaling == second.scaling
        np.testing.assert_array_equal(first.a, second.a)
        np.testing.assert_array_equal(first.b, second.b)


@pytest.mark.parametrize(
    "spelling",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace("base_model.model.model.", "base_model.model."),
        lambda name: name.removeprefix("base_model.model.model."),
        lambda name: name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
    ],
    ids=["no prefix", "no model", "neither", "adapter name"],
)
def test_every_spelling_of_a_name_is_the_same_module(spelling: Callable[[str], str], tmp_path: Path) -> None:
    respelt: dict[str, np.ndarray | None] = dict.fromkeys(small_tensors())
    respelt |= {spelling(name): tensor for name, tensor in small_tensors().items()}
    write_adapter(tmp_path, respelt, alpha_pattern={"layers.2.mlp.down_proj": 5})
    adapter = read_adapter(tmp_path, base_config())
    assert {module: update.scaling for module, update in adapter.linear.items()} == {
        (0, "q_proj"): 2.0,
        (2, "down_proj"): 2.5,
    }
    np.testing.assert_array_equal(adapter.linear[0, "q_proj"].b, small_tensors()[f"{Q_PROJ}.lora_B.weight"])


@pytest.mark.parametrize("suffix", ["weight", "modules_to_save.weight", "modules_to_save.default.weight"])
def test_a_raw_state_dict_has_a_copy_and_its_original(suffix: str, tmp_path: Path) -> None:
    full, original = np.full((384, 64), 2.0, np.float32), np.ones((384, 64), np.float32)
    head = "base_model.model.lm_head"
    write_adapter(tmp_path, {f"{head}.{suffix}": full, f"{head}.original_module.weight": original})
    np.testing.assert_array_equal(np.array(read_adapter(tmp_path, base_config()).full_lm_head), full)


def test_unembed_tokens_is_the_head(tmp_path: Path) -> None:
    name = "base_model.model.unembed_tokens.lora_{}.weight"
    write_adapter(
        tmp_path, {name.format("A"): np.ones((2, 64), np.float32), name.format("B"): np.ones((384, 2), np.float32)}
    )
    assert read_adapter(tmp_path, base_config()).lm_head is not None


def test_sizes_count_the_true_ranks(tmp_path: Path) -> None:
    wide = {f"{DOWN_PROJ}.lora_A.weight": zeros(5, 96), f"{DOWN_PROJ}.lora_B.weight": zeros(64, 5)}
    adapter = read_adapter(write_adapter(tmp_path, wide, rank_pattern={"down_proj": 5}), base_config())
    assert (adapter.num_modules, adapter.max_rank) == (2, 5)
    assert adapter.nbytes == 4 * (2 * (64 + 64) + 5 * (96 + 64))


def test_rows_that_the_head_shares_count_once() -> None:
    adapter = read_adapter(ADAPTERS / "tied/tokens_list", base_config("tied"))
    assert adapter.embed_token_rows is adapter.lm_head_token_rows
    rest = sum(update.a.nbytes + update.b.nbytes for update in adapter.linear.values())
    assert adapter.nbytes == rest + 3 * 64 * 2 + 3 * 4


@pytest.mark.parametrize(("case", "num_labels"), [("classifier_3", 3), ("classifier_5", 5)])
@pytest.mark.parametrize("base", ["untied", "tied"])
def test_a_classification_head_is_read_as_it_is(base: str, case: str, num_labels: int) -> None:
    adapter = read_adapter(ADAPTERS / base / case, base_config(base))
    expected = read_tensors(ADAPTERS / base / case)["base_model.model.score.weight"]
    assert adapter.score is not None and adapter.score.shape == (num_labels, 64)
    np.testing.assert_array_equal(adapter.score, expected)
    assert adapter.nbytes == sum(array.nbytes for array in read_tensors(ADAPTERS / base / case).values())


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("head", ["score", "classifier"])
@pytest.mark.parametrize("part", ["weight", "modules_to_save.weight", "modules_to_save.default.weight"])
def test_a_classification_head_goes_by_several_names(prefix: str, head: str, part: str, tmp_path: Path) -> None:
    """With the copy of the model's own that a raw state dict has beside it."""
    score = np.arange(128, dtype=np.float32).reshape(2, 64)
    copy = {f"{prefix}{head}.original_module.weight": zeros(2, 64)}
    write_adapter(tmp_path, copy | {f"{prefix}{head}.{part}": score}, modules_to_save=["classifier", "score"])
    np.testing.assert_array_equal(read_adapter(tmp_path, base_config()).score, score)


def test_a_classification_head_alone_is_an_adapter(tmp_path: Path) -> None:
    tensors = dict.fromkeys(small_tensors()) | {"base_model.model.score.weight": np.ones((1, 64), np.float32)}
    adapter = read_adapter(write_adapter(tmp_path, tensors), base_config())
    assert adapter.score is not None and adapter.num_modules == 0
