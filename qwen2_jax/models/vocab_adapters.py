"""What adapters change in the token embeddings and the head: low-rank updates in pages, and whole matrices.

The embedding's update of a token is a product, too: the token's row of `embed_a` times `embed_b`. Replaced rows of
single tokens are low-rank updates whose first (embedding) or second (head) factor picks the tokens.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int
from qwen2_kernels import LoRABatch
from qwen2_kernels.lora.batch import RANKS, LoRAProjection

from qwen2_jax.config import ModelConfig
from qwen2_jax.parallel import TP, pad_to_multiple

EMBED, HEAD = LoRAProjection(modules=(0,)), LoRAProjection(modules=(1,))
"""The two modules of a page of this kind, by their bits."""
WIDE = ("embed_scale", "head_scale", "head_bias")
"""The banks that are float32 whatever the model's dtype."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class VocabBanks:
    """The weights of all adapters on the device that change embeddings or head: P pages, and F whole matrices each."""

    embed_a: Float[Array, "P V R"]
    embed_b: Float[Array, "P R D"]
    select: Float[Array, "P 1 R M*R"]
    """Picks, of a token's M rows of `embed_a`, the one that is the page's: 1 at the ranks of its place."""
    head_a: Float[Array, "P 1 R D"]
    head_b: Float[Array, "P R V"]
    full_embed: Float[Array, "F V D"]
    full_head: Float[Array, "F V D"]
    embed_scale: Float[Array, "S D"]
    """What the model's own embeddings are multiplied by, float32 (DoRA)."""
    head_scale: Float[Array, "S V"]
    """The same of its logits."""
    head_bias: Float[Array, "S V"]
    """What is added to the logits, float32."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class VocabTables:
    """Which of them a step's tokens use."""

    tables: LoRABatch
    token_pages: Int[Array, "T M"]
    """Each token's pages; what is behind its last is some page, and adds nothing."""
    full_embed_rows: Int[Array, " T"]
    """Which whole embedding matrix a token is looked up in; -1 is the model's."""
    vector_rows: Int[Array, " T"]
    """The row of the scales and the bias that a token uses; -1 is none."""
    full_head_rows: Int[Array, " T"]
    """Which whole head gives a token's logits; -1 is the model's."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class VocabAdapters:
    """What a step with such adapters takes."""

    banks: VocabBanks
    tables: VocabTables


def vocab_bank_shapes(
    config: ModelConfig, tp: int, *, num_pages: int, num_full: int, num_vectors: int, max_pages: int
) -> VocabBanks:
    """Return the banks' shapes."""
    vocab, size = pad_to_multiple(config.vocab_size, tp), config.hidden_size
    shapes = {
        "embed_a": (num_pages, vocab, RANKS),
        "embed_b": (num_pages, RANKS, size),
        "select": (num_pages, 1, RANKS, max_pages * RANKS),
        "head_a": (num_pages, 1, RANKS, size),
        "head_b": (num_pages, RANKS, vocab),
        "full_embed": (num_full, vocab, size),
        "full_head": (num_full, vocab, size),
        "embed_scale": (num_vectors, size),
        "head_scale": (num_vectors, vocab),
        "head_bias": (num_vectors, vocab),
    }
    return VocabBanks(**shapes)  # pyright: ignore[reportArgumentType]


def vocab_bank_specs() -> VocabBanks:
    """Return the banks' shardings: the vocabulary's rows are split, as the model's own."""
    specs = {name: P() for name in ("embed_b", "select", "head_a", "embed_scale")}
    specs |= {name: P(None, TP) for name in ("embed_a", "full_embed", "full_head", "head_scale", "head_bias")}
    return VocabBanks(**specs, head_b=P(None, None, TP))  # pyright: ignore[reportArgumentType]


def init_vocab_banks(shapes: VocabBanks, dtype: str) -> VocabBanks:
    """Return empty banks of `vocab_bank_shapes`."""
    names = VocabBanks.__dataclass_fields__
    return VocabBanks(
        **{name: jnp.zeros(getattr(shapes, name), jnp.float32 if name in WIDE else dtype) for name in names}
    )
