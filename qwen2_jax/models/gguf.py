"""Reads GGUF files of the qwen2 and llama architectures, giving their config and tensors Hugging Face's names.

The file's format and its quantised types are the `gguf` library's business; a tensor is dequantised when it is loaded.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf.constants import GGUFValueType
from gguf.quants import dequantize

from qwen2_jax.errors import CheckpointError
from qwen2_jax.models.checkpoint import Checkpoint, TensorEntry
from qwen2_jax.models.gguf_config import gguf_config

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# The types whose values are not floats once they are dequantised, or that hold more than float32 can.
_NOT_WEIGHTS = ("F64", "I8", "I16", "I32", "I64")


class _Reader(gguf.GGUFReader):
    """The library's reader over a plain buffer: quick with a tokenizer's strings, and nothing is cut short."""

    def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: Any = None) -> npt.NDArray[Any]:
        size = int(count) * np.dtype(dtype).itemsize
        if size > self.data.nbytes - int(offset):
            raise ValueError(f"it ends before byte {int(offset) + size}")
        array = np.ndarray((int(count),), dtype, buffer=self.data, offset=int(offset)) if size else np.empty(0, dtype)
        return array.view(array.dtype.newbyteorder(override_order or self.byte_order))

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        kind, count, start = GGUFValueType(head[0][0]), int(head[1][0]), orig_offs + 12
        if kind == GGUFValueType.STRING:
            values, end = self._strings(start, count)
        elif kind in self.gguf_scalar_to_np:
            values = [self._get(start, self.gguf_scalar_to_np[kind], count)]
            end = start + values[0].nbytes
        else:
            raise ValueError(f"it holds an array of {kind.name}")
        indices = list(range(2, 2 + len(values)))
        return end - orig_offs, [*head, *values], indices, [GGUFValueType.ARRAY, kind]

    def _strings(self, offset: int, count: int) -> tuple[list[Any], int]:
        """Return `count` strings' bytes from `offset` on, and where they end."""
        view, values = memoryview(self.data), []
        for _ in range(count):
            (size,) = struct.unpack_from("<Q", view, offset)
            values.append(view[offset + 8 : offset + 8 + size])
            offset += 8 + size
        if offset > len(view):
            raise ValueError(f"it ends before byte {offset}")
        return values, offset


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file. Its metadata is the tokenizer's source.

    Raises `CheckpointError` for a damaged or split file, another architecture, or a tensor or a setting without a place
    in a Qwen2 model.
    """
    reader, metadata = _read(path)
    if metadata.get("split.count", 1) not in (0, 1):  # 0 where parts have been joined
        raise CheckpointError(f"{path} is one of several parts; join them with llama-gguf-split --merge")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "rope_freqs.weight" in tensors:
        raise CheckpointError(
            f"{path} scales its rotary frequencies one by one, which is not supported; use safetensors"
        )
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{path} has no tensor 'token_embd.weight'; is it a language model, and whole?")
    embedding = tensors["token_embd.weight"]
    config = gguf_config(path, metadata, vocab_size=int(embedding.shape[-1]), dtype=_dtype(embedding.tensor_type.name))
    config["tie_word_embeddings"] = "output.weight" not in tensors
    return Checkpoint(
        path=path,
        format="gguf",
        config=config,
        tokenizer_source=metadata,
        tensors={_hf_name(name): _entry(path, tensor, config) for name, tensor in tensors.items()},
    )


def _read(path: Path) -> tuple[gguf.GGUFReader, dict[str, Any]]:
    try:
        reader = _Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    # The reader raises whatever a wrong byte leads to, numpy's and Python's own types alike.
    except Exception as error:
        raise CheckpointError(f"{path} is not a whole GGUF file ({error}); download it again") from error
    if reader.byte_order != "I":
        raise CheckpointError(f"{path} has the other byte order than this machine; convert it")
    return reader, metadata


def _dtype(tensor_type: str) -> str:
    return {"F32": "float32", "F16": "float16"}.get(tensor_type, "bfloat16")


def _hf_name(name: str) -> str:
    """Return Hugging Face's name for a GGUF tensor; one that has none keeps its own."""
    if name in _NAMES:
        return _NAMES[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _LAYER_NAMES:
        return name
    return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"


def _entry(path: Path, tensor: gguf.ReaderTensor, config: dict[str, Any]) -> TensorEntry:
    kind = tensor.tensor_type
    if kind.name in _NOT_WEIGHTS:
        raise CheckpointError(f"{path}: the tensor {tensor.name!r} has type {kind.name}, which weights cannot have")
    heads = _permuted_heads(tensor.name, config)
    return TensorEntry(
        shape=tuple(reversed([int(size) for size in tensor.shape])),
        dtype=kind.name,
        nbytes=int(tensor.n_bytes),
        load=_loader(path, tensor, heads),
    )


def _loader(path: Path, tensor: gguf.ReaderTensor, heads: int | None) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            array = tensor.data.view(ml_dtypes.bfloat16)
        elif tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            array = tensor.data
        else:
            try:
                array = dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError as error:
                raise CheckpointError(f"{path}: the tensor {tensor.name!r}: {error}; quantise it otherwise") from error
        return array if heads is None else _half_split(array, heads)

    return load


def _permuted_heads(name: str, config: dict[str, Any]) -> int | None:
    """Return the heads whose rows are interleaved: a Llama's query and key projections, not a Qwen2's."""
    if config["model_type"] != "llama":
        return None
    heads, kind = config["num_attention_heads"], "".join(name.split(".")[2:3])
    return {"attn_q": heads, "attn_k": config["num_key_value_heads"] or heads}.get(kind)


def _half_split(array: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of a head's rows, which pairs neighbours, for rotary's two halves."""
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
