"""Which of a checkpoint's tensors make up each leaf of the model's tree, and how.

Sizes here are the checkpoint's own: D hidden, N query heads, K key-value heads, G = N/K, H head_dim, F intermediate,
V vocabulary, E embedding. A checkpoint stores a projection as [out, in], and so does the tree.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qwen2_jax.config import ModelConfig

LeafPath = tuple[str | int, ...]
Shape = tuple[int, ...]

_ROWS_AT_ONCE = 64


def leaf_name(path: LeafPath) -> str:
    """Return the name of a leaf of the tree, e.g. `model/layers/0/mlp/down_proj/kernel`."""
    return "/".join(map(str, path))


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array of the tree: its path and shape, the tensors it is made of, and how they fill it.

    `fill(out, i, tensor)` writes the i-th of `sources` into `out`, which starts as zeros. A leaf without sources stays
    zero.
    """

    path: LeafPath
    shape: Shape
    sources: dict[str, Shape]
    fill: Callable[[np.ndarray, int, np.ndarray], None]


def leaves(config: ModelConfig) -> list[Leaf]:
    """Return every leaf of the model that `config` describes, in the order of computation."""
    table = [
        _copied(("model", "embed_tokens", "embedding"), "model.embed_tokens", config.vocab_size, config.hidden_size)
    ]
    for layer in range(config.num_hidden_layers):
        table += _layer(config, layer)
    table.append(_copied(("model", "norm", "weight"), "model.norm", config.hidden_size))
    if config.has_lm_head:
        table.append(_copied(("lm_head", "embedding"), "lm_head", config.vocab_size, config.hidden_size))
    if config.is_embedding_model and config.embedding_dim is not None:
        width, d = config.embedding_dim, config.hidden_size
        table.append(_projection(("linear", "kernel"), "linear.weight", width, d, (d, width)))
        bias = Leaf(path=("linear", "bias"), shape=(width,), sources={"linear.bias": (width,)}, fill=_copy)
        table.append(bias)
    return table


def is_ignorable(name: str, config: ModelConfig) -> bool:
    """Whether a checkpoint may hold the tensor `name` although the model has no such weight.

    These are the rotary frequencies, which the config defines, and a language-model head that embeddings do not use.
    """
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.is_embedding_model)


def _layer(config: ModelConfig, layer: int) -> list[Leaf]:
    d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
    n, k, g = config.num_attention_heads, config.num_key_value_heads, config.num_queries_per_kv
    at, hf = ("model", "layers", layer), f"model.layers.{layer}"
    qkv = {f"{hf}.self_attn.{name}_proj.weight": (heads * h, d) for name, heads in (("q", n), ("k", k), ("v", k))}
    biases = {name.removesuffix("weight") + "bias": (rows,) for name, (rows, _) in qkv.items()}
    gate_up = {f"{hf}.mlp.{name}_proj.weight": (f, d) for name in ("gate", "up")}
    return [
        _copied((*at, "input_layernorm", "weight"), f"{hf}.input_layernorm", d),
        Leaf(path=(*at, "self_attn", "qkv_proj", "kernel"), shape=(k, g + 2, h, d), sources=qkv, fill=fill_qkv),
        Leaf(
            path=(*at, "self_attn", "qkv_proj", "bias"),
            shape=(k, g + 2, h),
            sources=biases if config.attention_bias else {},
            fill=fill_qkv,
        ),
        Leaf(
            path=(*at, "self_attn", "o_proj", "kernel"),
            shape=(d, k, g, h),
            sources={f"{hf}.self_attn.o_proj.weight": (d, n * h)},
            fill=_fill_o_proj,
        ),
        _copied((*at, "post_attention_layernorm", "weight"), f"{hf}.post_attention_layernorm", d),
        Leaf(path=(*at, "mlp", "gate_up_proj", "kernel"), shape=(2, f, d), sources=gate_up, fill=_fill_gate_up),
        _copied((*at, "mlp", "down_proj", "kernel"), f"{hf}.mlp.down_proj", d, f),
    ]


def _copied(path: LeafPath, module: str, *shape: int) -> Leaf:
    return Leaf(path=path, shape=shape, sources={f"{module}.weight": shape}, fill=_copy)


def _projection(path: LeafPath, name: str, out_size: int, in_size: int, shape: Shape) -> Leaf:
    return Leaf(path=path, shape=shape, sources={name: (out_size, in_size)}, fill=_transpose)


def _copy(out: np.ndarray, _: int, tensor: np.ndarray) -> None:
    out[...] = tensor


def _transpose(out: np.ndarray, _: int, tensor: np.ndarray) -> None:
    _transpose_into(out.reshape(tensor.shape[::-1]), tensor)


def _fill_gate_up(out: np.ndarray, index: int, tensor: np.ndarray) -> None:
    out[index] = tensor


def fill_qkv(out: np.ndarray, index: int, tensor: np.ndarray) -> None:
    """Deal a projection's heads, rows of the weight or of the bias, out to their slots."""
    for head, rows in enumerate(tensor.reshape(-1, *out.shape[2:])):
        out[_qkv_slot(head, index, out.shape[1] - 2)] = rows


def _fill_o_proj(out: np.ndarray, _: int, tensor: np.ndarray) -> None:
    out[...] = tensor.reshape(out.shape)


def _qkv_slot(head: int, projection: int, group: int) -> tuple[int, int]:
    """Return the key-value head and the slot of a head of the query (0), key (1) or value (2) projection."""
    return divmod(head, group) if projection == 0 else (head, group + projection - 1)


def _transpose_into(out: np.ndarray, tensor: np.ndarray) -> None:
    """Write `tensor.T` into `out`, a few rows at a time, which stays in the processor's cache."""
    for start in range(0, tensor.shape[0], _ROWS_AT_ONCE):
        out[:, start : start + _ROWS_AT_ONCE] = tensor[start : start + _ROWS_AT_ONCE].T
