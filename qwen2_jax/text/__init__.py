"""Between text and token ids: tokenizer, chat template, incremental detokenizer, stop strings. No jax here."""

from qwen2_jax.text.detokenizer import IncrementalDetokenizer
from qwen2_jax.text.stop import StopChecker
from qwen2_jax.text.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer", "StopChecker", "Tokenizer"]
