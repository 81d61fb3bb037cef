"""Reads a Hugging Face folder: `config.json` and one or several safetensors files."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from qwen2_jax.errors import CheckpointError
from qwen2_jax.models.checkpoint import Checkpoint, TensorEntry, read_generation_config, read_json
from qwen2_jax.models.sentence_transformers import read_modules

INDEX = "model.safetensors.index.json"
# safetensors' element types by their name in the file -> (our name, bytes per element)
DTYPES = {"F32": ("float32", 4), "BF16": ("bfloat16", 2), "F16": ("float16", 2)}
_NOT_IN_MODEL = ("model.", "lm_head.", "linear.")


def open_safetensors(folder: Path) -> Checkpoint:
    """Open a Hugging Face or sentence-transformers folder.

    Names without the prefix `model.` (a bare `Qwen2Model`) get it. A sentence-transformers folder becomes
    `FlashQwen2ForEmbeddings`, its dense layer the tensors `linear.weight` and `linear.bias`. A config without a dtype
    gets that of the tensors. Raises `CheckpointError` for files that are missing or damaged.
    """
    config = read_json(folder / "config.json")
    tensors = _with_prefix(read_tensors(_shards(folder)))
    modules = None
    if (folder / "modules.json").is_file():
        modules, dense = read_modules(folder)
        config["architectures"] = ["FlashQwen2ForEmbeddings"]
        tensors.update(_dense_tensors(folder / dense) if dense else {})
    if "linear.weight" in tensors:
        config.setdefault("embedding_dim", tensors["linear.weight"].shape[0])
    if config.get("torch_dtype") is None and config.get("dtype") is None and "model.embed_tokens.weight" in tensors:
        config["torch_dtype"] = tensors["model.embed_tokens.weight"].dtype
    return Checkpoint(
        path=folder,
        format="safetensors",
        config=config,
        generation_config=read_generation_config(folder),
        tokenizer_source=folder,
        tensors=tensors,
        embedding_modules=modules,
    )


def read_tensors(shards: Iterable[Path]) -> dict[str, TensorEntry]:
    """Return all shards' tensors by name; raises `CheckpointError` for a bad file or a name that comes twice."""
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        for name, entry in _read_shard(shard):
            if name in tensors:
                raise CheckpointError(f"{shard} holds the tensor {name!r}, which an earlier shard holds too")
            tensors[name] = entry
    return tensors


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no 'weight_map' from tensor names to files; download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {str(name)[:80]!r}, which is not a safetensors file in this folder")
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names; download it again")
    return shards


def _read_shard(shard: Path) -> list[tuple[str, TensorEntry]]:
    try:
        handle = safe_open(shard, framework="numpy")
        return [(name, _entry(shard, handle, name)) for name in handle.keys()]  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{shard} is not a whole safetensors file ({error}); download it again") from error


def _entry(shard: Path, handle: Any, name: str) -> TensorEntry:
    view = handle.get_slice(name)
    shape = tuple(view.get_shape())
    dtype, size = DTYPES.get(view.get_dtype(), (view.get_dtype(), 0))
    return TensorEntry(shape=shape, dtype=dtype, nbytes=size * math.prod(shape), load=_loader(shard, handle, name))


def _loader(shard: Path, handle: Any, name: str) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        try:
            return handle.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{shard}: the tensor {name!r} cannot be read ({error})") from error

    return load


def _with_prefix(tensors: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    if "embed_tokens.weight" not in tensors:
        return tensors
    return {name if name.startswith(_NOT_IN_MODEL) else f"model.{name}": entry for name, entry in tensors.items()}


def _dense_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a sentence-transformers dense layer; one without a bias gets zeros."""
    tensors = read_tensors([folder / "model.safetensors"])
    if "linear.weight" in tensors and "linear.bias" not in tensors:
        size = tensors["linear.weight"].shape[0]
        zeros = TensorEntry(shape=(size,), dtype="float32", nbytes=0, load=lambda: np.zeros(size, np.float32))
        tensors["linear.bias"] = zeros
    return tensors
