"""Writes a checkpoint with an adapter merged into its weights, as a Hugging Face folder."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # makes bfloat16 a dtype that numpy knows by name
import numpy as np

from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import AdapterError, CheckpointError
from qwen2_jax.lora.adapter import Adapter, LowRank, TokenRows
from qwen2_jax.lora.merge_factors import delta_of
from qwen2_jax.lora.safetensors_writer import Tensor, write_shards
from qwen2_jax.lora.writer import module_path, new_folder
from qwen2_jax.models.checkpoint import Checkpoint, TensorEntry, read_json
from qwen2_jax.models.safetensors_reader import DTYPES, INDEX
from qwen2_jax.models.sentence_transformers import module_folders
from qwen2_jax.models.weights import check_weights, open_checkpoint

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_COPIED = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.txt", "*.model", "LICENSE*")
_NOT_COPIED = ("config.json", "adapter_config.json", INDEX)
_FLOATS = tuple(name for name, _ in DTYPES.values())

Change = Callable[[np.ndarray], np.ndarray]
"""From a tensor in float32 to the tensor with the adapter in it; may work in place."""


@dataclass(frozen=True, kw_only=True)
class _Matrix:
    """What an adapter does to the embedding or the head `[V, D]`; the former's update is of the transposed table."""

    full: np.ndarray | None
    rows: TokenRows | None
    update: LowRank | None
    transposed: bool

    @property
    def changes(self) -> bool:
        return any(part is not None for part in (self.full, self.rows, self.update))

    def apply(self, table: np.ndarray) -> np.ndarray:
        if self.full is not None:
            table = self.full.astype(np.float32)
        if self.rows is not None:
            table[self.rows.token_ids] = self.rows.rows
        if self.update is None:
            return table
        return _updated(self.update, table.T).T if self.transposed else _updated(self.update, table)


def merge_into_checkpoint(base: str | Path, adapter: Adapter, path: str | Path, *, use_tqdm: bool = False) -> Path:
    """Write the checkpoint in the folder `base` with `adapter` in its weights to the new folder `path`; return that.

    The result is a Hugging Face folder with the base's config, tokenizer and dtypes, in shards of at most 5 GB. All
    that an adapter changes is merged, also magnitudes (DoRA), replaced biases, full copies and token rows: computed in
    float32 and rounded once. Where the base ties the head to the embedding and the adapter changes them differently,
    the result has a head of its own, and `tie_word_embeddings` false. The host holds one tensor and its update at a
    time.

    Raises `CheckpointError` for a base that is not a folder with safetensors or that does not fit its config, and
    `AdapterError` where `path` is not empty, the adapter does not fit or has a classification head, or a value is
    beyond the base's dtype.
    """
    checkpoint = open_checkpoint(base)
    check_base(checkpoint)
    config = ModelConfig.from_hf(checkpoint.config)
    check_weights(checkpoint, config)
    if adapter.score is not None:
        raise AdapterError(
            f"the adapter has a classification head (score), for which a {config.architecture} has no place; serve the "
            "adapter beside its base"
        )
    unties = _unties(adapter, config)
    tensors = _tensors(checkpoint, adapter, config, unties=unties)
    with new_folder(path) as folder:
        write_shards(folder, tensors, use_tqdm=use_tqdm)
        changed = {"tie_word_embeddings": False} if unties else {}
        _write_json(folder / "config.json", read_json(checkpoint.path / "config.json") | changed)
        _copy_files(checkpoint.path, folder)
    return Path(path).expanduser()


def check_base(checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` for a checkpoint of a format that no adapter is merged into."""
    if checkpoint.format != "safetensors":
        raise CheckpointError(
            f"{checkpoint.path} holds {checkpoint.format}; an adapter is merged into a Hugging Face folder with "
            "safetensors"
        )


def _tensors(checkpoint: Checkpoint, adapter: Adapter, config: ModelConfig, *, unties: bool) -> list[Tensor]:
    """Return what is written; all checks come before the first tensor is read."""
    # A sentence-transformers dense layer is in a file of its own, which is copied.
    apart = ("linear.weight", "linear.bias") if checkpoint.embedding_modules is not None else ()
    entries = {name: entry for name, entry in checkpoint.tensors.items() if name not in apart}
    if unties and _HEAD not in entries and _EMBEDDING in entries:
        entries[_HEAD] = entries[_EMBEDDING]
    changes = _changes(adapter, config)
    if config.tie_word_embeddings and _HEAD not in entries:
        changes.pop(_HEAD, None)
    elif config.tie_word_embeddings and not unties and _HEAD in changes:
        changes[_HEAD] = changes[_EMBEDDING]  # the same values; its own product could be rounded differently
    for name, (shape, _) in changes.items():
        _check_place(checkpoint, name, entries.get(name), shape)
    for name, entry in entries.items():
        if entry.dtype not in _FLOATS:
            raise CheckpointError(
                f"{checkpoint.path}: the tensor {name!r} has dtype {entry.dtype}; merging needs one of "
                f"{', '.join(_FLOATS)}"
            )
    make = {name: _maker(name, entry, changes[name][1] if name in changes else None) for name, entry in entries.items()}
    return [Tensor(name=name, dtype=entry.dtype, shape=entry.shape, make=make[name]) for name, entry in entries.items()]


def _check_place(checkpoint: Checkpoint, name: str, entry: TensorEntry | None, shape: tuple[int, ...]) -> None:
    if entry is None and name.endswith(".bias"):
        raise AdapterError(
            f"the adapter adds a bias (lora_bias) where {checkpoint.path} has no {name!r}, nor a place for one; serve "
            "the adapter beside the base"
        )
    if entry is None or entry.shape != shape:
        found = "no such tensor" if entry is None else f"it with shape {list(entry.shape)}"
        raise CheckpointError(
            f"the adapter changes {name!r} {list(shape)}, but {checkpoint.path} has {found}; is it the adapter's base?"
        )


def _maker(name: str, entry: TensorEntry, change: Change | None) -> Callable[[], np.ndarray]:
    if change is None:
        return entry.load

    def make() -> np.ndarray:
        with np.errstate(over="ignore"):
            changed = change(entry.load().astype(np.float32)).astype(np.dtype(entry.dtype))
        if not np.isfinite(changed).all():
            raise AdapterError(
                f"{name!r} with the adapter has values beyond {entry.dtype}, the base's dtype; use a base in bfloat16"
            )
        return changed

    return make


def _changes(adapter: Adapter, config: ModelConfig) -> dict[str, tuple[tuple[int, ...], Change]]:
    """Return what happens to the base's tensors, by name, with the shape that each must have."""
    changes: dict[str, tuple[tuple[int, ...], Change]] = {}
    for module, update in adapter.linear.items():
        path = f"model.{module_path(module)}"
        out, inside = update.b.shape[0], update.a.shape[1]
        changes[f"{path}.weight"] = (out, inside), partial(_updated, update)
        if update.bias is not None:
            changes[f"{path}.bias"] = (out,), partial(_biased, adapter.biases.get(module), update)
    for module, bias in adapter.biases.items():
        changes.setdefault(f"model.{module_path(module)}.bias", (bias.shape, partial(_biased, bias, None)))
    tables = {_EMBEDDING: _embedding(adapter), _HEAD: _head(adapter)}
    shape = (config.vocab_size, config.hidden_size)
    return changes | {name: (shape, matrix.apply) for name, matrix in tables.items() if matrix.changes}


def _updated(update: LowRank, weight: np.ndarray) -> np.ndarray:
    weight = weight + delta_of(update)
    if update.magnitude is None:
        return weight
    scale = update.magnitude.astype(np.float32) / np.linalg.norm(weight, axis=1)
    return scale[:, None] * weight


def _biased(replaced: np.ndarray | None, update: LowRank | None, bias: np.ndarray) -> np.ndarray:
    bias = bias if replaced is None else replaced.astype(np.float32)
    if update is None or update.bias is None:
        return bias
    return bias + np.float32(update.scaling) * update.bias.astype(np.float32)


def _embedding(adapter: Adapter) -> _Matrix:
    return _Matrix(
        full=adapter.full_embed_tokens, rows=adapter.embed_token_rows, update=adapter.embed_tokens, transposed=True
    )


def _head(adapter: Adapter) -> _Matrix:
    return _Matrix(full=adapter.full_lm_head, rows=adapter.lm_head_token_rows, update=adapter.lm_head, transposed=False)


def _unties(adapter: Adapter, config: ModelConfig) -> bool:
    """Whether the head, tied to the embedding in the base, is another matrix with the adapter."""
    if config.is_embedding_model or not config.tie_word_embeddings:
        return False
    return not (
        _same(adapter.full_embed_tokens, adapter.full_lm_head)
        and _same_rows(adapter.embed_token_rows, adapter.lm_head_token_rows)
        and _same_update(adapter.embed_tokens, adapter.lm_head)
    )


def _same(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    return first is second or (first is not None and second is not None and np.array_equal(first, second))


def _same_rows(embed: TokenRows | None, head: TokenRows | None) -> bool:
    if embed is None or head is None:
        return embed is head
    return _same(embed.token_ids, head.token_ids) and _same(embed.rows, head.rows)


def _same_update(embed: LowRank | None, head: LowRank | None) -> bool:
    """Whether the head's update is the embedding's, transposed; magnitudes are of rows here and of columns there."""
    if embed is None or head is None:
        return embed is head
    plain = embed.magnitude is None and head.magnitude is None and embed.bias is None and head.bias is None
    return plain and embed.scaling == head.scaling and _same(embed.a.T, head.b) and _same(embed.b.T, head.a)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_files(source: Path, folder: Path) -> None:
    """Copy the tokenizer's and the generation's files, and a sentence-transformers model's modules."""
    patterns = (*_COPIED, *(f"{subfolder}/*" for subfolder in module_folders(source)))
    for file in (file for pattern in patterns for file in sorted(source.glob(pattern))):
        target = folder / file.relative_to(source)
        if file.is_file() and str(file.relative_to(source)) not in _NOT_COPIED:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
