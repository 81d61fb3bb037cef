"""From leaves of the checkpoint's sizes to those that a mesh needs: with copied KV heads and zero padding."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qwen2_jax.config import ModelConfig
from qwen2_jax.models.weight_table import LeafPath
from qwen2_jax.parallel import HeadLayout, pad_to_multiple


@dataclass(frozen=True, kw_only=True)
class WeightLayout:
    """The sizes of the model's arrays: how the heads are laid out, F and V with their padding."""

    heads: HeadLayout
    intermediate_size: int
    vocab_size: int

    @classmethod
    def unpadded(cls, config: ModelConfig) -> "WeightLayout":
        """Return the layout of one device, whose arrays have the checkpoint's sizes."""
        return cls.on(config, 1)

    @classmethod
    def on(cls, config: ModelConfig, tp: int) -> "WeightLayout":
        """Return the layout of `tp` devices."""
        return cls(
            heads=HeadLayout(config.num_attention_heads, config.num_key_value_heads, tp),
            intermediate_size=pad_to_multiple(config.intermediate_size, tp),
            vocab_size=pad_to_multiple(config.vocab_size, tp),
        )

    def place(self, path: LeafPath, leaf: np.ndarray) -> np.ndarray:
        """Return `leaf`, which has the checkpoint's sizes, in this layout; `leaf` itself where nothing changes."""
        place = _PLACES.get(path[-2:])
        return leaf if place is None else place(self, leaf)


def _place_qkv(layout: WeightLayout, leaf: np.ndarray) -> np.ndarray:
    """Lay out `leaf` [K, G + 2, ...] by head, the key and value slots last."""
    heads = layout.heads
    if _is_plain(heads):
        return leaf
    placed = np.zeros((heads.padded_kv_heads, heads.padded_group + 2, *leaf.shape[2:]), leaf.dtype)
    for kv_head, source in enumerate(heads.kv_source):
        placed[kv_head, heads.padded_group :] = leaf[source, -2:]
    _place_queries(heads, placed, leaf, leaf.shape[1] - 2)
    return placed


def _place_o_proj(layout: WeightLayout, leaf: np.ndarray) -> np.ndarray:
    heads = layout.heads
    if _is_plain(heads):
        return leaf
    placed = np.zeros((leaf.shape[0], heads.padded_kv_heads, heads.padded_group, leaf.shape[3]), leaf.dtype)
    by_head = np.moveaxis(leaf, 0, 2)
    _place_queries(heads, np.moveaxis(placed, 0, 2), by_head, leaf.shape[2])
    return placed


def _place_queries(heads: HeadLayout, placed: np.ndarray, leaf: np.ndarray, group: int) -> None:
    for kv_head, slots in enumerate(heads.q_source):
        for slot, source in enumerate(slots):
            if source is not None:
                placed[kv_head, slot] = leaf[divmod(source, group)]


def _is_plain(heads: HeadLayout) -> bool:
    return heads.padded_kv_heads == heads.num_key_value_heads


def _pad(leaf: np.ndarray, axis: int, size: int) -> np.ndarray:
    if leaf.shape[axis] == size:
        return leaf
    widths = [(0, size - n if i == axis else 0) for i, n in enumerate(leaf.shape)]
    return np.pad(leaf, widths)


_PLACES: dict[tuple[str | int, ...], Callable[[WeightLayout, np.ndarray], np.ndarray]] = {
    ("embed_tokens", "embedding"): lambda layout, leaf: _pad(leaf, 0, layout.vocab_size),
    ("lm_head", "embedding"): lambda layout, leaf: _pad(leaf, 0, layout.vocab_size),
    ("qkv_proj", "kernel"): _place_qkv,
    ("qkv_proj", "bias"): _place_qkv,
    ("o_proj", "kernel"): _place_o_proj,
    ("gate_up_proj", "kernel"): lambda layout, leaf: _pad(leaf, 1, layout.intermediate_size),
    ("down_proj", "kernel"): lambda layout, leaf: _pad(leaf, 1, layout.intermediate_size),
}
