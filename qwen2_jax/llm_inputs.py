"""What `LLM` makes of its arguments before the engine sees them, and of its outputs after."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from qwen2_jax.engine.input_processor import Prompt
from qwen2_jax.errors import ConfigError, RequestError
from qwen2_jax.models.checkpoint import read_json
from qwen2_jax.text.tokenizer import Tokenizer
from qwen2_jax.types import EmbeddingOutput, EmbeddingRequestOutput


def read_tokenizer(source: Path | dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of a folder, or of a GGUF file's metadata."""
    if isinstance(source, dict):
        return Tokenizer.from_gguf(source)
    return Tokenizer.from_dir(source)


def generation_defaults(choice: str, of_model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's defaults, none ("vllm"), or those of another folder; `ConfigError` where it has none."""
    if choice == "auto":
        return dict(of_model)
    if choice == "vllm":
        return {}
    path = Path(choice) / "generation_config.json"
    if not path.is_file():
        raise ConfigError(
            f"generation_config={choice!r} is not 'auto', 'vllm', or a folder with generation_config.json"
        )
    return read_json(path)


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts as a list; a text, a dict or a list of token ids is one prompt."""
    if isinstance(prompts, str | dict):
        return [prompts]
    items = list(prompts)
    return cast(list[Prompt], [items] if items and isinstance(items[0], int) else items)


def check_length(name: str, found: int, expected: int) -> None:
    """Raise `RequestError` unless there is one entry per prompt."""
    if found != expected:
        raise RequestError(f"{name} has {found} entries for {expected} prompts; pass one per prompt")


def normalized(output: EmbeddingRequestOutput) -> EmbeddingRequestOutput:
    """Return the output with a vector of length 1."""
    vector = np.asarray(output.outputs.embedding)
    unit = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return EmbeddingRequestOutput(
        request_id=output.request_id,
        outputs=EmbeddingOutput(embedding=unit.tolist()),
        prompt_token_ids=output.prompt_token_ids,
        finished=output.finished,
    )
