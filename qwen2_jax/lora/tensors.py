"""An adapter's tensors in host memory, read from their file once: what is hashed is what is served.

Reading, hashing and looking for infinities are few calls of megabytes, in threads that do not hold Python's lock
meanwhile. Hundreds of short calls, a tensor each, would wait for that lock hundreds of times beside other threads.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from qwen2_jax.errors import AdapterError
from qwen2_jax.lora.config import AdapterConfig
from qwen2_jax.lora.threads import threads
from qwen2_jax.models.checkpoint import TensorEntry

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_PIECE = 4 << 20
"""Bytes that a thread reads, hashes or looks at in a call."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The tensors of one file."""

    arrays: Mapping[str, np.ndarray]
    """By name; they share the memory of the whole file."""
    not_finite: frozenset[str]
    """Those that hold an infinity or a NaN."""
    digest: str
    """Hexadecimal SHA-256 of the whole file and of the fields of the config that matter to it: the adapter's identity.
    It is that of the pieces' own, so that threads can hash them beside one another."""


def read_weights(config: AdapterConfig, file: Path, entries: Mapping[str, TensorEntry]) -> Weights:
    """Return the tensors `entries` of a safetensors file, as `files.read_entries` found them there.

    Raises `AdapterError` for a file that cannot be read, or that has others by now.
    """
    try:
        with file.open("rb") as stream:
            content = np.empty(os.fstat(stream.fileno()).st_size, np.uint8)
            starts = range(0, len(content), _PIECE)
            digests = list(threads().map(partial(_read_piece, stream.fileno()), _pieces(content), starts))
        arrays, runs = _views(content, entries)
    except OSError as error:
        raise AdapterError(f"{file} cannot be read: {error}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise AdapterError(f"{file} has changed while it was read ({error}); send the request again") from error
    all_finite = all(threads().map(_is_finite, [piece for run in runs for piece in _pieces(run)]))
    return Weights(
        arrays=arrays,
        not_finite=frozenset(() if all_finite else (name for name in arrays if not _is_finite(arrays[name]))),
        digest=hashlib.sha256(b"".join(digests) + config.canonical()).hexdigest(),
    )


def _pieces(array: np.ndarray) -> list[np.ndarray]:
    """Return an array [N] in pieces of `_PIECE` bytes."""
    size = _PIECE // array.itemsize
    return [array[start : start + size] for start in range(0, len(array), size)]


def _read_piece(descriptor: int, piece: np.ndarray, start: int) -> bytes:
    """Fill `piece` [bytes] from `start` of the file on; return its SHA-256. Raises `OSError`."""
    filled = 0
    while filled < len(piece):
        count = os.preadv(descriptor, [piece[filled:]], start + filled)
        if count == 0:
            raise OSError(f"it ends after {start + filled} bytes, and had more when it was opened")
        filled += count
    return hashlib.sha256(piece).digest()


def _views(content: np.ndarray, entries: Mapping[str, TensorEntry]) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Return the tensors by name, and the same memory in as few arrays [N] as there are runs of one dtype.

    `content` is a safetensors file: the header's length in 8 bytes, the header in JSON, the data. Raises `ValueError`,
    `LookupError` or `TypeError` where the file does not have these entries.
    """
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header, data = json.loads(content[8:start].tobytes()), content[start:]
    arrays: dict[str, np.ndarray] = {}
    runs: list[tuple[np.dtype, int, int]] = []
    for name in sorted(entries, key=lambda name: header[name]["data_offsets"]):
        entry, found = entries[name], header[name]
        dtype, (first, end) = _DTYPES[found["dtype"]], found["data_offsets"]
        if (dtype.name, tuple(found["shape"])) != (entry.dtype, entry.shape):
            raise ValueError(f"the tensor {name!r} is another")
        arrays[name] = data[first:end].view(dtype).reshape(entry.shape)
        if runs and (runs[-1][0], runs[-1][2]) == (dtype, first):
            first = runs.pop()[1]
        runs.append((dtype, first, end))
    return arrays, [data[first:end].view(dtype) for dtype, first, end in runs]


def _is_finite(array: np.ndarray) -> bool:
    """Return whether all values are finite; those of two bytes by their exponents, which is five times as fast."""
    if array.dtype.itemsize != 2:
        return bool(np.isfinite(array).all())
    exponent = np.uint16(0x7C00 if array.dtype == np.float16 else 0x7F80)
    return not ((array.view(np.uint16) & exponent) == exponent).any()
