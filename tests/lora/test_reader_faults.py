"""Adapters that are not what they say or do not fit the base: the message names the tensor or the field."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2_jax.errors import AdapterError
from qwen2_jax.lora.reader import read_adapter
from tests.lora.adapters import ADAPTERS, Q_PROJ, base_config, small_tensors, write_adapter, zeros

A, B = f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_B.weight"
TOP = "base_model.model"
EMBED, HEAD, SCORE = f"{TOP}.model.embed_tokens", f"{TOP}.lm_head", f"{TOP}.score.weight"
NOT_FINITE = zeros(2, 64)
NOT_FINITE[1, 3] = np.nan
EMBED_LORA = {f"{EMBED}.lora_embedding_A": zeros(2, 384), f"{EMBED}.lora_embedding_B": zeros(64, 2)}

TENSOR_FAULTS: dict[str, tuple[Mapping[str, np.ndarray | None], str]] = {
    "no B": ({B: None}, "there is no lora_B of its module"),
    "no A": ({A: None}, "there is no lora_A of its module"),
    "rank": ({A: zeros(4, 64)}, r"q_proj\.lora_A.* has shape \[4, 64\] where \[2, 64\] is needed: .*the rank 2 \(r or"),
    "rank of B": ({B: zeros(64, 4)}, r"q_proj\.lora_B.* has shape \[64, 4\] where \[64, 2\]"),
    "hidden size": ({A: zeros(2, 128)}, r"\[2, 128\] where \[2, 64\] is needed.*hidden_size=64"),
    "one dimension": ({A: zeros(128)}, r"\[128\] where \[2, 64\]"),
    "empty": ({A: zeros(0)}, r"\[0\] where \[2, 64\]"),
    "not finite": ({A: NOT_FINITE}, r"q_proj\.lora_A.* has values that are not finite"),
    "float64": ({A: zeros(2, 64, dtype=np.float64)}, r"q_proj\.lora_A.* has dtype F64; use one of float32"),
    "integers": ({A: zeros(2, 64, dtype=np.int8)}, r"has dtype I8"),
    "layer": ({f"{TOP}.model.layers.3.mlp.up_proj.lora_A.weight": zeros(2, 64)}, "layer 3, but the base has 3 layers"),
    "architecture": (
        {f"{TOP}.transformer.h.0.attn.c_attn.lora_A.weight": zeros(2, 64)},
        "c_attn.*another architecture",
    ),
    "part": ({f"{Q_PROJ}.lora_C.weight": zeros(2)}, "lora_C.*is no part of a LoRA adapter; for q_proj it has lora_A"),
    "expert": ({f"{TOP}.model.layers.0.mlp.experts.0.up_proj.lora_A.weight": zeros(2, 64)}, "experts.0.*no module"),
    "width of a head": ({SCORE: zeros(2, 96)}, r"score.weight.*\[2, 96\] where a .*head is \[num_labels, 64\]"),
    "no labels": ({SCORE: zeros(0, 64)}, r"score.weight.* has shape \[0, 64\] where"),
    "dimensions of a head": ({SCORE: zeros(64)}, r"score.weight.* has shape \[64\] where"),
    "two heads": ({SCORE: zeros(2, 64), f"{TOP}.classifier.weight": zeros(2, 64)}, "are the same part of score"),
    "bias of a head": ({SCORE: zeros(2, 64), f"{TOP}.score.bias": zeros(2)}, "score.bias.* is a bias, which the head"),
    "LoRA of a head": ({f"{TOP}.score.lora_A.weight": zeros(2, 64)}, "score.lora_A.* update of a classification head"),
    "part of a head": ({f"{TOP}.score.dense.weight": zeros(2, 64)}, "score.dense.weight.* for score it has weight"),
    "integers as a head": ({SCORE: zeros(2, 64, dtype=np.int8)}, "score.weight.* has dtype I8"),
    "infinite head": ({SCORE: np.full((2, 64), np.inf, np.float32)}, "score.weight.* values that are not finite"),
    "norm": ({f"{TOP}.model.norm.weight": zeros(64)}, "model.norm.weight.*a norm as one of modules_to_save"),
    "projection": ({f"{Q_PROJ}.weight": zeros(64, 64)}, "q_proj.weight.*replaces a whole projection"),
    "base bias": ({f"{TOP}.model.layers.0.mlp.up_proj.bias": zeros(96)}, "which the base's up_proj does not have"),
    "two adapters": ({f"{Q_PROJ}.lora_A.second.weight": zeros(2, 64)}, "are the same part of q_proj"),
    "vocabulary": ({f"{HEAD}.base_layer.weight": zeros(386, 64)}, r"\[386, 64\], the base's has \[384, 64\]"),
    "full": ({f"{HEAD}.weight": zeros(384, 32)}, r"lm_head.weight.* has shape \[384, 32\], the base's has"),
    "embedding as a projection": ({f"{EMBED}.lora_A.weight": zeros(2, 64)}, "for embed_tokens it has lora_embedding_A"),
    "magnitude without use_dora": (
        {f"{Q_PROJ}.lora_magnitude_vector": zeros(64)},
        "use_dora=false, but beside.* a mag",
    ),
    "bias without lora_bias": (
        {f"{Q_PROJ}.lora_B.bias": zeros(64)},
        "lora_bias=false, but beside.* a lora_bias tensor",
    ),
    "rows without tokens": ({f"{EMBED}.token_adapter.trainable_tokens_delta": zeros(2, 64)}, "names no tokens"),
    "two changes": (EMBED_LORA | {f"{EMBED}.weight": zeros(384, 64)}, "embed_tokens has more than one of a LoRA"),
    "nothing": (dict.fromkeys(small_tensors()), "changes no module of the base"),
    "copies alone": (dict.fromkeys(small_tensors()) | {f"{HEAD}.base_layer.weight": zeros(384, 64)}, "changes no mod"),
}
FIELD_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "r": ({"r": 4}, r"\[2, 64\] where \[4, 64\] is needed: .*the rank 4 \(r or rank_pattern\)"),
    "rank_pattern": ({"rank_pattern": {"down_proj": 3}}, r"down_proj.* has shape \[2, 96\] where \[3, 96\]"),
    "use_dora": ({"use_dora": True}, "use_dora=true, but beside .*q_proj.*there is no magnitude tensor"),
    "lora_bias": ({"lora_bias": True}, "lora_bias=true, but beside .*there is no lora_bias tensor"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save names 'lm_head', but there is no tensor"),
    "head": ({"modules_to_save": ["score"]}, "modules_to_save names 'score', but there is no tensor for it"),
    "saved norm": ({"modules_to_save": ["model.norm"]}, "modules_to_save names 'norm', which is not served"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "names tokens of embed_tokens, but there is no tensor"),
    "vocabulary": ({"trainable_token_indices": [384]}, "has 384 for embed_tokens.*vocabulary has 384 tokens"),
}


@pytest.mark.parametrize(("tensors", "message"), TENSOR_FAULTS.values(), ids=TENSOR_FAULTS)
def test_a_tensor_that_does_not_fit(tensors: dict[str, np.ndarray | None], message: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, tensors)
    with pytest.raises(AdapterError, match=message) as caught:
        read_adapter(tmp_path, base_config())
    assert "adapter_model.safetensors" in str(caught.value)


@pytest.mark.parametrize(("fields", "message"), FIELD_FAULTS.values(), ids=FIELD_FAULTS)
def test_a_field_that_does_not_fit_the_tensors(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, **fields)
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path, base_config())


@pytest.mark.parametrize(
    ("case", "overrides", "message"),
    [
        ("qv", {"hidden_size": 32, "head_dim": 16}, r"\[8, 64\] where \[8, 32\] is needed: .*hidden_size=32"),
        ("qv", {"num_key_value_heads": 4}, r"v_proj\.lora_B.* has shape \[32, 8\] where \[64, 8\]"),
        ("qv", {"num_hidden_layers": 2}, "for layer 2, but the base has 2 layers"),
        ("bias_all", {"attention_bias": False}, "replaces a bias, which the base's [kqv]_proj does not have"),
        ("embed_tokens", {"vocab_size": 400, "bos_token_id": 0}, r"has shape \[384, 64\], the base's has \[400, 64\]"),
        ("lm_head", {"architectures": ["Qwen2Model"]}, "is for lm_head, which a Qwen2Model does not have"),
    ],
)
def test_another_base(case: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        read_adapter(ADAPTERS / "untied" / case, base_config(**overrides))
