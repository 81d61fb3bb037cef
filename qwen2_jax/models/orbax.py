"""Writes and reads the model's own tree with Orbax, beside the config and the tokenizer's files.

A folder holds `params/` (the tree with the checkpoint's sizes, whatever the mesh), `config.json`, and either the
tokenizer's files or, converted from GGUF, `gguf_metadata.json`.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from qwen2_jax.errors import CheckpointError
from qwen2_jax.models.checkpoint import ORBAX_PARAMS, Checkpoint, TensorEntry, read_generation_config, read_json
from qwen2_jax.models.new_folder import new_folder
from qwen2_jax.models.sentence_transformers import module_folders, read_modules
from qwen2_jax.models.weight_table import leaf_name

_GGUF_METADATA = "gguf_metadata.json"
_COPIED = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.txt", "*.model", "LICENSE*")
_NOT_COPIED = ("config.json", "model.safetensors.index.json")


def save_orbax(folder: Path, params: Mapping[Any, Any], *, config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Write `params`, a tree in the checkpoint's own sizes, `config` in Hugging Face's keys, and the tokenizer.

    The config that is written names the dtype of the arrays. Raises `CheckpointError` where `folder` is not empty.
    """
    with new_folder(folder) as written:
        with ocp.PyTreeCheckpointer() as checkpointer:
            _in_thread(partial(checkpointer.save, written.absolute() / ORBAX_PARAMS, _string_keys(params)))
        dtype = np.dtype(_walk(params)[0][1].dtype).name
        _write_json(written / "config.json", {**config, "torch_dtype": dtype, "dtype": dtype})
        source = checkpoint.tokenizer_source
        if isinstance(source, Path):
            _copy_files(source, written)
        else:
            _write_json(written / _GGUF_METADATA, source)


def open_orbax(folder: Path) -> Checkpoint:
    """Open a folder that `save_orbax` wrote. Raises `CheckpointError` where it is damaged."""
    directory = folder.absolute() / ORBAX_PARAMS
    checkpointer = ocp.PyTreeCheckpointer()
    try:
        metadata = _in_thread(partial(checkpointer.metadata, directory)).item_metadata
        if metadata is None:
            raise ValueError("it does not say which arrays it holds")
        tensors = {leaf_name(path): _entry(checkpointer, directory, path, leaf) for path, leaf in _walk(metadata.tree)}
    # Orbax raises whatever the damaged part leads to: its own, tensorstore's and Python's types.
    except Exception as error:
        raise CheckpointError(f"{folder} is not a whole Orbax checkpoint ({error}); convert it again") from error
    gguf_metadata = folder / _GGUF_METADATA
    return Checkpoint(
        path=folder,
        format="orbax",
        config=read_json(folder / "config.json"),
        generation_config=read_generation_config(folder),
        tokenizer_source=read_json(gguf_metadata) if gguf_metadata.is_file() else folder,
        tensors=tensors,
        embedding_modules=read_modules(folder)[0] if (folder / "modules.json").is_file() else None,
    )


def _entry(checkpointer: ocp.PyTreeCheckpointer, directory: Path, path: tuple[str, ...], leaf: Any) -> TensorEntry:
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    return TensorEntry(
        shape=shape,
        dtype=dtype.name,
        nbytes=dtype.itemsize * int(np.prod(shape)),
        load=_loader(checkpointer, directory, path),
    )


def _loader(checkpointer: ocp.PyTreeCheckpointer, directory: Path, path: tuple[str, ...]) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        args = ocp.args.PyTreeRestore(
            item=_nest(path, 0),
            restore_args=_nest(path, ocp.RestoreArgs(restore_type=np.ndarray)),
            partial_restore=True,
        )
        try:
            value = _in_thread(partial(checkpointer.restore, directory, args=args))
        # As in `open_orbax`.
        except Exception as error:
            raise CheckpointError(
                f"{directory}: {leaf_name(path)!r} cannot be read ({error}); convert it again"
            ) from error
        for key in path:
            value = value[key]
        return value

    return load


def _in_thread[T](call: Callable[[], T]) -> T:
    """Return `call()`, made in a thread: Orbax starts an event loop, which it cannot where a notebook's is running."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(call).result()


def _walk(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, Mapping):
        return [(path, tree)]
    return [found for key, below in tree.items() for found in _walk(below, (*path, key))]


def _nest(path: tuple[str, ...], value: Any) -> Any:
    for key in reversed(path):
        value = {key: value}
    return value


def _string_keys(tree: Any) -> Any:
    return {str(key): _string_keys(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_files(source: Path, folder: Path) -> None:
    """Copy the tokenizer's and the generation's files, and what sentence-transformers says of its modules."""
    for pattern in (*_COPIED, *(f"{subfolder}/config.json" for subfolder in module_folders(source))):
        for file in sorted(source.glob(pattern)):
            target = folder / file.relative_to(source)
            if str(file.relative_to(source)) not in _NOT_COPIED:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
