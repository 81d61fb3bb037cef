"""Writes safetensors files whose tensors are made one at a time; the library's own writer needs all of them at once.

A file is the length of a header in 8 bytes, the header (JSON, padded with spaces to a multiple of 8), and the tensors
in its order (https://huggingface.co/docs/safetensors).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm.auto import tqdm

from qwen2_jax.models.safetensors_reader import DTYPES, INDEX

_CODES = {name: (code, size) for code, (name, size) in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor to write: `make()` returns it, with `shape` and `dtype`, which is float32, bfloat16 or float16."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return _CODES[self.dtype][1] * prod(self.shape)


def write_shards(
    folder: Path, tensors: Sequence[Tensor], *, max_shard_bytes: int = 5 * 10**9, use_tqdm: bool = False
) -> None:
    """Write `tensors` to `model.safetensors`, or with an index to several shards of at most `max_shard_bytes` each.

    The host holds one tensor at a time. A single tensor that is larger than a shard gets one of its own.
    """
    shards = _split(tensors, max_shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors)
    weight_map: dict[str, str] = {}
    with tqdm(total=total, desc="Writing safetensors", unit="B", unit_scale=True, disable=not use_tqdm) as progress:
        for number, shard in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map |= {tensor.name: name for tensor in shard}
            write_file(folder / name, shard, progress)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: Sequence[Tensor], progress: tqdm | None = None) -> None:
    """Write `tensors` to one file; `progress` counts bytes."""
    with path.open("wb") as file:
        _write_header(file, tensors)
        for tensor in tensors:
            file.write(_bytes(tensor))
            if progress is not None:
                progress.update(tensor.nbytes)


def _split(tensors: Sequence[Tensor], most: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_header(file: BinaryIO, tensors: Sequence[Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        end = start + tensor.nbytes
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype][0],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _bytes(tensor: Tensor) -> memoryview:
    """Return the tensor's bytes, in C order and little-endian, without a second copy of it."""
    array = tensor.make()
    assert array.shape == tensor.shape and array.dtype.name == tensor.dtype, tensor.name
    return memoryview(array.ravel().view(np.uint8))
