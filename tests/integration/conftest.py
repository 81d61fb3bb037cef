"""Engines that several files share: building one takes seconds."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen2_jax.llm import LLM
from tests.engine.processing import tokenizer
from tests.integration.golden import load


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer; the golden models' vocabulary is larger than its own."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer().save(folder)
    return folder


@pytest.fixture(scope="session")
def llm(tokenizer_folder: Path) -> Iterator[LLM]:
    """A small model with full attention and a tokenizer: 4 rows, chunks of 32 tokens, contexts of 256."""
    engine = load("tied", tokenizer=tokenizer_folder)
    yield engine
    engine.shutdown()
