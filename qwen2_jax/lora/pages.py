"""From an adapter in host memory to the pages and vectors that its device banks take, laid out as the model's kernels.

A page has 16 ranks of every module, of all layers. What an adapter lacks is zeros there.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qwen2_jax.config import ModelConfig
from qwen2_jax.lora.adapter import Adapter
from qwen2_jax.lora.threads import threads
from qwen2_jax.models.adapters import MODULES, PROJECTIONS, RANKS
from qwen2_jax.models.weight_layout import WeightLayout
from qwen2_jax.models.weight_table import fill_qkv


@dataclass(frozen=True, kw_only=True)
class Factors:
    """A projection's part of a page, all layers stacked; the device multiplies `b` by `scaling` and transposes it."""

    a: np.ndarray
    """[L, C, R, *in]"""
    b: np.ndarray
    """[L, *out, R]"""
    scaling: np.ndarray
    """Float32, one per layer and module, in the shape that `b` is multiplied by."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """One page of an adapter."""

    factors: dict[str, Factors]
    """By projection."""
    modules: int
    """Bit m is set where some layer has module m of `MODULES` in this page."""


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """What an adapter has besides factors, by projection [L, *out], float32."""

    bias: dict[str, np.ndarray]
    """Added to the result."""
    magnitude: dict[str, np.ndarray]
    """DoRA's magnitudes; NaN where there is none."""
    replaced_bias: np.ndarray
    """Of queries, keys and values: what stands in for the model's own bias; NaN where it stays."""


class PageLayout:
    """Lays adapters out for one model on one mesh."""

    def __init__(self, config: ModelConfig, layout: WeightLayout, dtype: npt.DTypeLike) -> None:
        """`layout` is that of the model's weights on its mesh, `dtype` that of the banks."""
        self._config, self._layout, self._dtype = config, layout, np.dtype(dtype)
        self._rows = {
            "q_proj": config.num_attention_heads * config.head_dim,
            "k_proj": config.num_key_value_heads * config.head_dim,
            "v_proj": config.num_key_value_heads * config.head_dim,
            "gate_proj": config.intermediate_size,
            "up_proj": config.intermediate_size,
            "o_proj": config.hidden_size,
            "down_proj": config.hidden_size,
        }

    def pages(self, adapter: Adapter) -> list[Page]:
        """Return the adapter's pages, as many as its largest rank takes."""
        ranks = max((update.rank for update in adapter.linear.values()), default=0)
        return [self._page(adapter, start) for start in range(0, ranks, RANKS)]

    def vectors(self, adapter: Adapter) -> Vectors | None:
        """Return the adapter's vectors, or None if it has none."""
        updates = adapter.linear.values()
        if not adapter.biases and all(u.bias is None and u.magnitude is None for u in updates):
            return None
        return Vectors(
            bias={name: self._stack(adapter, name, "bias") for name in PROJECTIONS},
            magnitude={name: self._stack(adapter, name, "magnitude") for name in PROJECTIONS},
            replaced_bias=self._stack(adapter, "qkv", "replaced_bias"),
        )

    def _page(self, adapter: Adapter, start: int) -> Page:
        found = {name for (_, name), update in adapter.linear.items() if update.rank > start}
        factors = threads().map(lambda projection: self._factors(adapter, projection, start), PROJECTIONS)
        return Page(
            factors=dict(zip(PROJECTIONS, factors, strict=True)),
            modules=sum(1 << bit for bit, name in enumerate(MODULES) if name in found),
        )

    def _factors(self, adapter: Adapter, projection: str, start: int) -> Factors:
        """Return one projection's part of the page whose first rank is `start`. Arrays are filled once, as they lie."""
        modules, layers = PROJECTIONS[projection], self._config.num_hidden_layers
        wide = {"o": self._rows["q_proj"], "down": self._config.intermediate_size}
        width = wide.get(projection, self._config.hidden_size)
        a = np.zeros((layers, len(modules), RANKS, width), self._dtype)
        b = np.zeros((layers, *self._outputs(projection), RANKS), self._dtype)
        scaling = np.ones((layers, len(modules)), np.float32)
        for layer in range(layers):
            for index, name in enumerate(modules):
                update = adapter.linear.get((layer, name))
                if update is None or update.rank <= start:
                    continue
                stop = min(update.rank, start + RANKS)
                a[layer, index, : stop - start] = update.a[start:stop]
                self._fill(projection, b[layer][..., : stop - start], index, update.b[:, start:stop])
                scaling[layer, index] = update.scaling
        b = self._place(projection, b)
        return Factors(a=self._place_inputs(projection, a), b=b, scaling=_spread(projection, scaling, b))

    def _outputs(self, projection: str) -> tuple[int, ...]:
        """The axes of a projection's outputs, before padding."""
        config = self._config
        if projection == "qkv":
            return config.num_key_value_heads, config.num_queries_per_kv + 2, config.head_dim
        return (2, config.intermediate_size) if projection == "gate_up" else (config.hidden_size,)

    def _fill(self, projection: str, out: np.ndarray, index: int, rows: np.ndarray) -> None:
        """Write a module's rows [out, ...] to where its fused projection has them."""
        if projection == "qkv":
            fill_qkv(out, index, rows)
        elif projection == "gate_up":
            out[index] = rows
        else:
            out[...] = rows

    def _place_inputs(self, projection: str, a: np.ndarray) -> np.ndarray:
        """Lay out the inputs of `a` [L, C, R, in] as the projection's kernel has them."""
        lead = a.shape[:-1]
        if projection == "o":
            config = self._config
            a = a.reshape(-1, config.num_key_value_heads, config.num_queries_per_kv, config.head_dim)
            a = self._layout.place(("o_proj", "kernel"), a)
        elif projection == "down":
            a = self._layout.place(("down_proj", "kernel"), a.reshape(-1, a.shape[-1]))
        return a.reshape(*lead, *a.shape[1:]) if projection in ("o", "down") else a

    def _place(self, projection: str, stacked: np.ndarray) -> np.ndarray:
        """Lay out the outputs of `stacked` [L, *out, ...] as the mesh has them."""
        name = {"qkv": "qkv_proj", "gate_up": "gate_up_proj"}.get(projection)
        if name is None:
            return stacked
        placed = [self._layout.place((name, "kernel"), layer) for layer in stacked]
        unchanged = all(one is other for one, other in zip(placed, stacked, strict=True))
        return stacked if unchanged or placed[0].shape == stacked.shape[1:] else np.stack(placed)

    def _stack(self, adapter: Adapter, projection: str, kind: str) -> np.ndarray:
        """Return one kind of vector of one projection, [L, *out]."""
        out = np.full(
            (self._config.num_hidden_layers, *self._outputs(projection)), 0.0 if kind == "bias" else np.nan, np.float32
        )
        for layer in range(len(out)):
            for index, name in enumerate(PROJECTIONS[projection]):
                vector = _vector(adapter, layer, name, kind)
                if vector is not None:
                    self._fill(projection, out[layer], index, vector.astype(np.float32))
        placed = self._place(projection, out)
        if kind != "bias":  # padding has none
            placed = np.where(self._place(projection, np.ones_like(out)) == 0, np.float32(np.nan), placed)
        return placed


def _vector(adapter: Adapter, layer: int, name: str, kind: str) -> np.ndarray | None:
    update = adapter.linear.get((layer, name))
    if kind == "replaced_bias":
        return adapter.biases.get((layer, name))
    if update is None:
        return None
    if kind == "magnitude":
        return update.magnitude
    return None if update.bias is None else update.bias.astype(np.float32) * np.float32(update.scaling)


def _spread(projection: str, scaling: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return scaling [L, C] in the shape that `b` [L, *out, R] is multiplied by."""
    if projection == "qkv":
        slots = [0] * (b.shape[2] - 2) + [1, 2]
        return scaling[:, slots][:, None, :, None, None]
    return scaling.reshape(*scaling.shape, 1, 1) if projection == "gate_up" else scaling.reshape(-1, 1, 1)
