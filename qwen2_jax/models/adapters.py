"""Adapters on the device: banks of their weights, page by page, and what a step's tokens use of them.

`qwen2_kernels.lora` says how a page is laid out. Each bank has the axes of the kernel that it goes with, so that it is
sharded alike; a bank's pages are counted over all layers together: page p of every bank is of one adapter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int
from qwen2_kernels import Adapted, LoRABatch
from qwen2_kernels.lora.batch import MODULES, RANKS
from qwen2_kernels.lora.segments import PageUse, TableSizes, TokenGroup, build_lora_tables, table_sizes

from qwen2_jax.config import ModelConfig
from qwen2_jax.models.vocab_adapters import VocabAdapters, VocabBanks
from qwen2_jax.parallel import TP, HeadLayout, pad_to_multiple

__all__ = [
    "MODULES",
    "RANKS",
    "Adapted",
    "Banks",
    "LayerBanks",
    "LoRABatch",
    "PageUse",
    "ProjectionBanks",
    "StepAdapters",
    "TableSizes",
    "TokenGroup",
    "bank_shapes",
    "bank_specs",
    "build_lora_tables",
    "init_banks",
    "table_sizes",
]

PROJECTIONS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""The fused projections and their modules."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ProjectionBanks:
    """One projection's weights of all adapters on the device, P pages and V rows of vectors."""

    a: Float[Array, "P C R *in"]
    """First factors of the C modules."""
    b: Float[Array, "P R *out"]
    """Second factors, times their scaling (and magnitudes)."""
    bias: Float[Array, "V *out"]
    """What is added to the result, float32."""
    scale: Float[Array, "V *out"]
    """What the model's own product is multiplied by, float32 (DoRA)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LayerBanks:
    """One layer's banks, by the name of the projection."""

    qkv: ProjectionBanks
    o: ProjectionBanks
    gate_up: ProjectionBanks
    down: ProjectionBanks


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Banks:
    """All banks of an engine."""

    layers: tuple[LayerBanks, ...]
    vocab: VocabBanks | None
    """Of embeddings and head; None where there is no room for adapters of these."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepAdapters:
    """What the model takes in a step with adapters."""

    layers: tuple[LayerBanks, ...]
    tables: LoRABatch
    scale_rows: Int[Array, " T"]
    """The row of vectors that each token uses, -1 for none."""
    vocab: VocabAdapters | None = None
    """What changes embeddings and head; None in an engine without room for that."""
    has_vectors: bool = field(default=True, metadata={"static": True})
    """Whether adapters of this step may have biases or magnitudes; gate and up are faster without."""

    def of_layer(self, index: int) -> "LayerAdapters":
        """Return what layer `index` needs."""
        return LayerAdapters(
            banks=self.layers[index],
            tables=self.tables,
            scale_rows=self.scale_rows,
            has_vectors=self.has_vectors,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LayerAdapters:
    """One layer's banks and the step's tables."""

    banks: LayerBanks
    tables: LoRABatch
    scale_rows: Int[Array, " T"]
    has_vectors: bool = field(default=True, metadata={"static": True})


def bank_shapes(config: ModelConfig, tp: int, *, num_pages: int, num_vectors: int) -> LayerBanks:
    """Return the shapes of one layer's banks."""
    heads = HeadLayout(config.num_attention_heads, config.num_key_value_heads, tp)
    size, inner = config.hidden_size, pad_to_multiple(config.intermediate_size, tp)
    queries = (heads.padded_kv_heads, heads.padded_group, config.head_dim)
    qkv = (heads.padded_kv_heads, heads.padded_group + 2, config.head_dim)
    sizes = {
        "qkv": ((size,), qkv),
        "o": (queries, (size,)),
        "gate_up": ((size,), (2, inner)),
        "down": ((inner,), (size,)),
    }

    def of(name: str) -> ProjectionBanks:
        inputs, outputs = sizes[name]
        a, b = (num_pages, len(PROJECTIONS[name]), RANKS, *inputs), (num_pages, RANKS, *outputs)
        vectors = (num_vectors, *outputs)
        return ProjectionBanks(a=a, b=b, bias=vectors, scale=vectors)  # pyright: ignore[reportArgumentType]

    return LayerBanks(**{name: of(name) for name in PROJECTIONS})


def bank_specs() -> LayerBanks:
    """Return the shardings of one layer's banks: heads and columns as the kernels', and row-parallel inputs."""
    axes: Mapping[str, tuple[P, P, P]] = {
        "qkv": (P(), P(None, None, TP), P(None, TP)),
        "o": (P(None, None, None, TP), P(), P()),
        "gate_up": (P(), P(None, None, None, TP), P(None, None, TP)),
        "down": (P(None, None, None, TP), P(), P()),
    }
    return LayerBanks(
        **{
            name: ProjectionBanks(a=a, b=b, bias=vector, scale=vector)  # pyright: ignore[reportArgumentType]
            for name, (a, b, vector) in axes.items()
        }
    )


def init_banks(config: ModelConfig, tp: int, dtype: str, *, num_pages: int, num_vectors: int) -> tuple[LayerBanks, ...]:
    """Return empty banks for every layer."""
    shapes = bank_shapes(config, tp, num_pages=num_pages, num_vectors=num_vectors)

    def empty(shapes: ProjectionBanks) -> ProjectionBanks:
        factors = {name: jnp.zeros(getattr(shapes, name), dtype) for name in ("a", "b")}
        vectors = {name: jnp.zeros(getattr(shapes, name), jnp.float32) for name in ("bias", "scale")}
        return ProjectionBanks(**factors, **vectors)

    def layer() -> LayerBanks:
        return LayerBanks(**{name: empty(getattr(shapes, name)) for name in PROJECTIONS})

    return tuple(layer() for _ in range(config.num_hidden_layers))
