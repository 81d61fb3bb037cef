"""Opens a checkpoint of any kind and streams its weights into the model's tree, one leaf at a time."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import CheckpointError
from qwen2_jax.models.checkpoint import (
    ORBAX_PARAMS,
    Checkpoint,
    CheckpointFormat,
    TensorEntry,
    read_generation_config,
    read_json,
)
from qwen2_jax.models.safetensors_reader import open_safetensors
from qwen2_jax.models.weight_layout import WeightLayout
from qwen2_jax.models.weight_table import Leaf, LeafPath, Shape, is_ignorable, leaf_name, leaves

LoadFormat = Literal["auto", "safetensors", "gguf", "orbax", "dummy"]

_TIED_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
_FLOATS = ("float32", "bfloat16", "float16")
_PROGRESS = {
    "safetensors": "Loading safetensors shards",
    "gguf": "Loading GGUF tensors",
    "orbax": "Loading Orbax leaves",
}


def open_checkpoint(path: Path | str, load_format: LoadFormat = "auto") -> Checkpoint:
    """Open a local checkpoint: a Hugging Face folder, a GGUF file (or a folder with one), or an Orbax folder.

    `auto` goes by the files that are there; a named format must be the one found; `dummy` reads the config and the
    tokenizer alone. Raises `CheckpointError` for files that are missing, damaged, of another format, or pickled.
    """
    path = Path(path)
    if load_format not in get_args(LoadFormat):
        raise CheckpointError(f"load_format={load_format!r} is unknown; use one of {', '.join(get_args(LoadFormat))}")
    found, source = ("dummy", path) if load_format == "dummy" else _find(path)
    if load_format not in ("auto", found):
        raise CheckpointError(f"load_format={load_format!r}, but {path} holds {found}; use load_format='auto'")
    return _open(found, source)


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    dtype: npt.DTypeLike,
    put: Callable[[LeafPath, np.ndarray], Any],
    layout: WeightLayout | None = None,
    use_tqdm: bool = True,
) -> dict[str, Any]:
    """Return the model's tree, each leaf what `put(path, host_array)` returned for it.

    `host_array` has `dtype` and the sizes of `layout` (the checkpoint's own without one). Every tensor in the files
    must be one that the model needs, with its shape and a float type: this is checked before the first one is read.
    The host holds one leaf and the tensor being read at a time, as long as `put` keeps nothing on the host.
    Raises `CheckpointError`, which names the tensor.
    """
    table = leaves(config)
    if checkpoint.format == "orbax":
        table = [_stored_leaf(leaf) for leaf in table]
    check_weights(checkpoint, config, table)
    layout = layout or WeightLayout.unpadded(config)
    dtype = np.dtype(dtype)
    total = sum(checkpoint.tensors[name].nbytes for leaf in table for name in leaf.sources)
    tree: dict[str, Any] = {}
    with tqdm(
        total=total, desc=_PROGRESS[checkpoint.format], unit="B", unit_scale=True, disable=not use_tqdm
    ) as progress:
        for leaf in table:
            array = _assemble(checkpoint, leaf, dtype, progress.update)
            if config.tie_word_embeddings and _TIED_HEAD in checkpoint.tensors and _EMBEDDING in leaf.sources:
                _check_tied_head(checkpoint, array)
            _insert(tree, leaf.path, put(leaf.path, layout.place(leaf.path, array)))
    return tree


def _open(found: CheckpointFormat, path: Path) -> Checkpoint:
    # The libraries of the rarer formats take seconds to import.
    if found == "gguf" or path.suffix == ".gguf":
        from qwen2_jax.models.gguf import open_gguf

        return open_gguf(path)
    if found == "orbax":
        from qwen2_jax.models.orbax import open_orbax

        return open_orbax(path)
    return open_safetensors(path) if found == "safetensors" else _open_dummy(path)


def _open_dummy(path: Path) -> Checkpoint:
    return Checkpoint(
        path=path,
        format="dummy",
        config=read_json(path / "config.json"),
        generation_config=read_generation_config(path),
        tokenizer_source=path,
        tensors={},
    )


def _find(path: Path) -> tuple[CheckpointFormat, Path]:
    """Return the format of what is at `path`, and the folder or file that its reader opens."""
    if path.is_file() and path.suffix == ".gguf":
        return "gguf", path
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder or a .gguf file; pass the folder that holds config.json")
    if (path / ORBAX_PARAMS / "_CHECKPOINT_METADATA").is_file():
        return "orbax", path
    names = sorted(entry.name for entry in path.iterdir())
    if any(name.endswith(".safetensors") and not name.startswith("adapter_model") for name in names):
        return "safetensors", path
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return "gguf", path / ggufs[0]
    raise CheckpointError(f"{path} holds no weights that can be read: {_advice(names, ggufs)}")


def _advice(names: list[str], ggufs: list[str]) -> str:
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if ggufs:
        return f"it has several GGUF files; pass the path of one of {', '.join(ggufs)}"
    if "adapter_config.json" in names:
        return "it is a LoRA adapter; pass its base model, and the adapter as a LoRARequest"
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which can run code when it is opened and is refused; save the model with "
            "safe_serialization=True in transformers, or use a revision with safetensors"
        )
    return "there is no safetensors file, no GGUF file and no Orbax checkpoint; is the download complete?"


def _stored_leaf(leaf: Leaf) -> Leaf:
    """Return `leaf` as an Orbax checkpoint holds it: whole, under its own path."""
    name = leaf_name(leaf.path)
    return Leaf(path=leaf.path, shape=leaf.shape, sources={name: leaf.shape}, fill=lambda out, _, t: np.copyto(out, t))


def check_weights(checkpoint: Checkpoint, config: ModelConfig, table: Iterable[Leaf] | None = None) -> None:
    """Raise `CheckpointError` unless a checkpoint has the tensors of `table`, and no others; None is the config's."""
    table = leaves(config) if table is None else table
    expected: dict[str, Shape] = {name: shape for leaf in table for name, shape in leaf.sources.items()}
    if config.tie_word_embeddings and not config.is_embedding_model and _TIED_HEAD in checkpoint.tensors:
        expected[_TIED_HEAD] = (config.vocab_size, config.hidden_size)
    found = {name: entry for name, entry in checkpoint.tensors.items() if not is_ignorable(name, config)}
    _check_names(checkpoint, expected, found)
    for name, shape in expected.items():
        entry = found[name]
        if entry.shape != shape:
            raise CheckpointError(
                f"{checkpoint.path}: the tensor {name!r} has shape {list(entry.shape)}, the config needs {list(shape)}"
            )
        if checkpoint.format != "gguf" and entry.dtype not in _FLOATS:
            raise CheckpointError(
                f"{checkpoint.path}: the tensor {name!r} has dtype {entry.dtype}; use one of {', '.join(_FLOATS)}"
            )


def _check_names(checkpoint: Checkpoint, expected: Mapping[str, Shape], found: Mapping[str, TensorEntry]) -> None:
    missing = [name for name in expected if name not in found]
    if missing:
        name = missing[0]
        advice = "; if the head is tied, pass hf_overrides={'tie_word_embeddings': True}" if name == _TIED_HEAD else ""
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} of the tensors that its config needs, first {name!r} with shape "
            f"{list(expected[name])}{advice}"
        )
    extra = [name for name in found if name not in expected]
    if extra:
        raise CheckpointError(
            f"{checkpoint.path} holds {len(extra)} tensors that its config has no place for, first {extra[0]!r} with "
            f"shape {list(found[extra[0]].shape)}"
        )


def _assemble(checkpoint: Checkpoint, leaf: Leaf, dtype: np.dtype, done: Callable[[int], Any]) -> np.ndarray:
    out = np.zeros(leaf.shape, dtype)
    for index, name in enumerate(leaf.sources):
        entry = checkpoint.tensors[name]
        leaf.fill(out, index, _cast(checkpoint, name, entry.load(), dtype))
        done(entry.nbytes)
    return out


def _cast(checkpoint: Checkpoint, name: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return `tensor` in `dtype`; raises where float16 cannot hold one of its values."""
    if tensor.dtype == dtype:
        return tensor
    with np.errstate(over="ignore"):
        cast = tensor.astype(dtype)
    if dtype == np.float16 and np.isinf(cast).any():
        raise CheckpointError(
            f"{checkpoint.path}: the tensor {name!r} has values beyond float16's range; use dtype='bfloat16'"
        )
    return cast


def _check_tied_head(checkpoint: Checkpoint, embedding: np.ndarray) -> None:
    head = _cast(checkpoint, _TIED_HEAD, checkpoint.tensors[_TIED_HEAD].load(), embedding.dtype)
    if not np.array_equal(head, embedding):
        raise CheckpointError(
            f"{checkpoint.path}: the config ties the head to the embedding, but {_TIED_HEAD!r} holds other values; "
            "pass hf_overrides={'tie_word_embeddings': False} to use them"
        )


def _insert(tree: dict[Any, Any], path: LeafPath, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
