"""What every kind of checkpoint offers: a config, a tokenizer's source, and named tensors that load when asked."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qwen2_jax.errors import CheckpointError

ORBAX_PARAMS = "params"
"""The subfolder of an Orbax checkpoint that holds the model's tree."""

CheckpointFormat = Literal["safetensors", "gguf", "orbax", "dummy"]


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """A tensor in a file: its shape, its element type's name, its size on disk in bytes, and how to read it.

    `load()` returns a host array of `shape`; it raises `CheckpointError` where the file cannot give it.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    load: Callable[[], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class EmbeddingModules:
    """What a sentence-transformers folder says happens after the transformer."""

    pooling: Literal["mean"]
    normalize: bool


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint; nothing of its weights is in memory yet.

    `config` and `generation_config` have Hugging Face's keys whatever the format. `tokenizer_source` is the folder with
    the tokenizer's files, or a GGUF file's metadata. `tensors` has Hugging Face's names (`model.layers.0...`), but an
    Orbax checkpoint's are the leaves of the model's own tree (`model/layers/0/...`), and a dummy's has none.
    """

    path: Path
    format: CheckpointFormat
    config: dict[str, Any]
    generation_config: dict[str, Any] = field(default_factory=dict)
    tokenizer_source: Path | dict[str, Any]
    tensors: Mapping[str, TensorEntry]
    embedding_modules: EmbeddingModules | None = None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; raises `CheckpointError` where there is none."""
    content = read_json_value(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, not an object; download it again")
    return content


def read_json_value(path: Path) -> Any:
    """Return the JSON value in `path`; raises `CheckpointError` where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a checkpoint's folder needs it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download it again") from error


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Return the content of the folder's `generation_config.json`, or nothing where there is none."""
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}
