"""Writes an adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors` in a folder."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qwen2_jax.errors import AdapterError
from qwen2_jax.lora.adapter import Adapter, LowRank
from qwen2_jax.lora.files import CONFIG, WEIGHTS, as_adapter_error
from qwen2_jax.lora.keys import ATTENTION, EMBED_TOKENS
from qwen2_jax.lora.merge import REPLACING_FIELDS, named, updates_of
from qwen2_jax.lora.reader import ModuleId
from qwen2_jax.lora.safetensors_writer import Tensor, write_file
from qwen2_jax.models import new_folder as folders

_PREFIX = "base_model.model."


def write_adapter(adapter: Adapter, path: str | Path, *, base_model_name_or_path: str) -> Path:
    """Write `adapter` to the new folder `path`, and return that; the arrays keep their dtype.

    PEFT and this package read the same products from it, for a causal language model (names `model.layers...`).
    `r` and `lora_alpha` are what most modules have; `rank_pattern` and `alpha_pattern` say the rest.
    Raises `AdapterError` where the folder is not empty, and for what is not written: magnitudes (DoRA), full copies and
    token rows, and what PEFT's format cannot hold.
    """
    updates = updates_of(adapter)
    _check_can_be_written(adapter, updates)
    config = _config(adapter, updates) | {"base_model_name_or_path": base_model_name_or_path}
    with new_folder(path) as folder:
        write_file(folder / WEIGHTS, [_as_tensor(name, array) for name, array in _arrays(adapter, updates).items()])
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Path(path).expanduser()


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Give a folder to write into, see `models.new_folder`; raises `AdapterError` unless `path` is new or empty."""
    check_new(path)
    with folders.new_folder(path) as folder:
        yield folder


def check_new(path: str | Path) -> None:
    """Raise `AdapterError` unless `path` is an empty folder, or does not exist and can be made."""
    with as_adapter_error():
        folders.check_new(path)


def module_path(module: ModuleId) -> str:
    """Return a module's name in the model, without a leading `model.`: `layers.3.mlp.up_proj`, or `lm_head`."""
    layer, name = module
    return name if layer is None else f"layers.{layer}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"


def _check_can_be_written(adapter: Adapter, updates: Mapping[ModuleId, LowRank]) -> None:
    if not updates:
        raise AdapterError("the adapter has no low-rank update, without which PEFT has no module to adapt")
    for field in (*REPLACING_FIELDS, "score"):
        if getattr(adapter, field) is not None:
            raise AdapterError(f"the adapter has {field}, which is not written; keep the folder that it was read from")
    for module, update in updates.items():
        if update.magnitude is not None:
            raise AdapterError(f"{named(module)} has a DoRA magnitude, which is not written; keep the adapter's folder")
    embed = adapter.embed_tokens is not None
    if embed and any(update.bias is not None for update in updates.values()):
        raise AdapterError(
            f"the adapter has biases of B and an update of {EMBED_TOKENS}, which PEFT does not combine (lora_bias); "
            "merge adapters without one of them"
        )


def _config(adapter: Adapter, updates: Mapping[ModuleId, LowRank]) -> dict[str, Any]:
    ranks = {module_path(module): update.rank for module, update in updates.items()}
    alphas = {module_path(module): _alpha(update) for module, update in updates.items()}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    biases = "none" if not adapter.biases else "lora_only" if adapter.biases.keys() <= adapter.linear.keys() else "all"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: own for path, own in ranks.items() if own != rank},
        "alpha_pattern": {path: own for path, own in alphas.items() if own != alpha},
        "target_modules": sorted(ranks),
        "bias": biases,
        "lora_bias": any(update.bias is not None for update in updates.values()),
        "lora_dropout": 0.0,
    }


def _alpha(update: LowRank) -> float:
    alpha = update.scaling * update.rank
    return int(alpha) if alpha == int(alpha) else alpha


def _most_common[T](values: Mapping[str, T]) -> T:
    return Counter(values.values()).most_common(1)[0][0]


def _arrays(adapter: Adapter, updates: Mapping[ModuleId, LowRank]) -> dict[str, np.ndarray]:
    has_bias = any(update.bias is not None for update in updates.values())
    tensors: dict[str, np.ndarray] = {}
    for module, update in updates.items():
        path = _in_model(module)
        if module[1] == EMBED_TOKENS:
            tensors |= {f"{path}.lora_embedding_A": update.a, f"{path}.lora_embedding_B": update.b}
            continue
        tensors |= {f"{path}.lora_A.weight": update.a, f"{path}.lora_B.weight": update.b}
        if has_bias:
            zeros = np.zeros(update.b.shape[0], update.b.dtype)
            tensors[f"{path}.lora_B.bias"] = zeros if update.bias is None else update.bias
    for module, bias in adapter.biases.items():
        tensors[f"{_in_model(module)}{'.base_layer' if module in updates else ''}.bias"] = bias
    return tensors


def _as_tensor(name: str, array: np.ndarray) -> Tensor:
    return Tensor(name=name, dtype=array.dtype.name, shape=array.shape, make=lambda: array)


def _in_model(module: ModuleId) -> str:
    path = module_path(module)
    return f"{_PREFIX}{path}" if path == "lm_head" else f"{_PREFIX}model.{path}"
