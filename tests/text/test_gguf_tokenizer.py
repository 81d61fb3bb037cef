"""The tokenizer that a GGUF file describes.

The ids in smollm2_ids.json follow llama.cpp's "smollm" rules, where each digit is a piece of its own. transformers,
reading the same GGUF file, leaves that rule out: it agrees on all texts but the two with digits that are not ASCII.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen2_jax.errors import CheckpointError
from qwen2_jax.text import Tokenizer
from qwen2_jax.text.byte_level import KINDS

TEXTS = json.loads((Path(__file__).parent / "smollm2_ids.json").read_text("utf-8"))


def small_metadata(pre: str = "qwen2", **changes: Any) -> dict[str, Any]:
    """Return metadata of a tokenizer with a few tokens."""
    tokens = ["a", "b", "1", "2", "3", "Ġ", "ab", "12", "123", "<s>", "</s>", "<tool>"]
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [1] * 9 + [3, 3, 4],
        "merges": ["a b", "1 2", "12 3"],
        "bos_token_id": 9,
        "eos_token_id": 10,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


@pytest.mark.parametrize("case", TEXTS)
def test_smollm2_encodes_and_decodes(smollm2: Tokenizer, case: dict[str, Any]) -> None:
    assert smollm2.encode(case["text"]) == case["ids"]
    assert smollm2.decode(case["ids"]) == case["text"]


def test_smollm2_special_tokens(smollm2: Tokenizer) -> None:
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id) == (1, 2, 2)
    assert smollm2.eos_token_ids == (2,)
    assert smollm2.all_special_ids == set(range(17))
    assert len(smollm2) == smollm2.vocab_size == 49152
    assert smollm2.decode([1, 4093, 198, 6004, 2], skip_special_tokens=True) == "user\nhi"


def test_smollm2_chat(smollm2: Tokenizer) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert smollm2.apply_chat_template(question, tokenize=True) == [
        *[1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2],
        *[198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198],
    ]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("qwen2", ["ab", "1", "2", "3", "Ġ", "1"]),
        ("deepseek-r1-qwen", ["ab", "1", "2", "3", "Ġ", "1"]),
        ("smollm", ["ab", "1", "2", "3", "Ġ", "1"]),
        ("llama-bpe", ["<s>", "ab", "123", "Ġ", "1"]),
        ("gpt-2", ["ab", "123", "Ġ", "1"]),
    ],
)
def test_each_pre_tokenizer_splits_digits_its_way(pre: str, pieces: list[str]) -> None:
    tokenizer = Tokenizer.from_gguf(small_metadata(pre))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("ab123 1")) == pieces


def test_bos_and_eos_are_added_if_the_file_says_so() -> None:
    tokenizer = Tokenizer.from_gguf(small_metadata(add_bos_token=True, add_eos_token=True))
    assert tokenizer.encode("ab") == [9, 6, 10]
    assert tokenizer.encode("ab", add_special_tokens=False) == [6]
    assert Tokenizer.from_gguf(small_metadata("llama-bpe", add_bos_token=False)).encode("ab") == [6]


def test_control_tokens_are_special_and_user_defined_ones_are_not() -> None:
    tokenizer = Tokenizer.from_gguf(small_metadata())
    assert tokenizer.encode("a<tool></s>") == [0, 11, 10]
    assert tokenizer.decode([0, 11, 10], skip_special_tokens=True) == "a<tool>"


def test_end_of_turn_ends_answers_too() -> None:
    assert Tokenizer.from_gguf(small_metadata(eot_token_id=11)).eos_token_ids == (10, 11)
    assert Tokenizer.from_gguf(small_metadata(eot_token_id=10)).eos_token_ids == (10,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "only byte-level BPE"),
        ({"pre": "qwen"}, f"did you mean 'qwen2'\\?; supported are {', '.join(KINDS)}"),
        ({"pre": None}, "has no tokenizer.ggml.pre"),
        ({"tokens": None}, "has no tokenizer.ggml.tokens"),
        ({"token_type": [1]}, "1 token types for 12 tokens"),
        ({"tokens": ["a"] * 12}, "11 of the GGUF file's 12 tokens are duplicates"),
        ({"merges": ["a b", "ab"]}, "the line 'ab'"),
        ({"merges": ["a c"]}, "do not fit together"),
        ({"eos_token_id": 12}, "eos_token_id=12 is not one of 12 tokens"),
    ],
)
def test_bad_metadata_is_an_error_that_names_it(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_gguf(small_metadata(**changes))
