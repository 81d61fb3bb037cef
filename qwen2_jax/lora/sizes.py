"""How much room adapters have on the devices, and the tables of a step for it."""

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from jax.sharding import PartitionSpec as P

from qwen2_jax.config import LoRAConfig, ModelConfig
from qwen2_jax.errors import CapacityError
from qwen2_jax.models.adapters import PROJECTIONS, TableSizes, bank_shapes, bank_specs, table_sizes
from qwen2_jax.models.vocab_adapters import WIDE, VocabBanks, vocab_bank_shapes, vocab_bank_specs
from qwen2_jax.parallel import TP

logger = logging.getLogger(__name__)

_MEMORY_SHARE = 0.1
_MOST, _ON_CPU = 64, 8


@dataclass(frozen=True, kw_only=True)
class LoRASizes:
    """The banks' sizes and what a step may use of them."""

    num_pages: int
    num_vectors: int
    """Rows of biases and magnitudes: adapters with such that fit at a time."""
    max_pages: int
    max_rank: int
    max_on_host: int
    """Adapters in host memory, at most."""
    num_vocab_pages: int
    num_vocab_vectors: int
    num_full_vocab: int

    @property
    def has_vocab(self) -> bool:
        """Whether adapters may change embeddings or head."""
        return self.num_vocab_pages + self.num_full_vocab > 0

    @property
    def places(self) -> dict[str, int]:
        """What there is on the devices, by kind."""
        return {
            "pages": self.num_pages,
            "vectors": self.num_vectors,
            "vocab_pages": self.num_vocab_pages,
            "vocab_vectors": self.num_vocab_vectors,
            "full_embed": self.num_full_vocab,
            "full_head": self.num_full_vocab,
        }

    @classmethod
    def of(cls, options: LoRAConfig, model: ModelConfig, dtype: str, tp: int) -> "LoRASizes":
        """Return the sizes that `options` ask for; the log says what they take on each device."""
        each = options.max_pages * _page_bytes(model, dtype, tp)
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        fitting = _ON_CPU if limit is None else min(max(int(_MEMORY_SHARE * limit) // each, 1), _MOST)
        count = options.max_loras or fitting
        sizes = cls(
            num_pages=count * options.max_pages,
            num_vectors=count,
            max_pages=options.max_pages,
            max_rank=options.max_lora_rank,
            num_vocab_pages=options.max_vocab_loras * options.max_pages,
            num_vocab_vectors=options.max_vocab_loras,
            num_full_vocab=options.max_full_vocab,
            max_on_host=options.max_cpu_loras or 4 * count * options.max_pages,
        )
        needed, free = (
            sizes.bank_bytes(model, dtype, tp),
            psutil.virtual_memory().available if limit is None else _free_bytes(),
        )
        if needed > free:
            raise CapacityError(
                f"room for {count} adapters of rank {options.max_lora_rank}, {options.max_vocab_loras} of embeddings "
                f"or head and {options.max_full_vocab} whole ones takes {needed / 2**30:.2f} GiB on each device, and "
                f"{free / 2**30:.2f} are free; lower max_loras, max_lora_rank, max_vocab_loras or max_full_vocab"
            )
        logger.info(
            "adapters: room for %d of rank %d, %.2f GiB on each device, %d on the host",
            count, options.max_lora_rank, needed / 2**30, sizes.max_on_host,
        )  # fmt: skip
        return sizes

    def bank_bytes(self, model: ModelConfig, dtype: str, tp: int) -> int:
        """Return the bytes that all banks take on each device."""
        size = jnp.dtype(dtype).itemsize
        shapes, specs = bank_shapes(model, tp, num_pages=self.num_pages, num_vectors=self.num_vectors), bank_specs()
        layer = sum(
            _shard(getattr(getattr(shapes, name), kind), getattr(getattr(specs, name), kind), tp) * width
            for name in PROJECTIONS
            for kind, width in (("a", size), ("b", size), ("bias", 4), ("scale", 4))
        )
        vocab_sizes = {"num_pages": self.num_vocab_pages, "num_full": self.num_full_vocab}
        vocab = vocab_bank_shapes(
            model, tp, **vocab_sizes, num_vectors=self.num_vocab_vectors, max_pages=self.max_pages
        )
        vocab_specs = vocab_bank_specs()
        names = VocabBanks.__dataclass_fields__ if self.has_vocab else ()
        return model.num_hidden_layers * layer + sum(
            _shard(getattr(vocab, name), getattr(vocab_specs, name), tp) * (4 if name in WIDE else size)
            for name in names
        )

    def staging_bytes(self, model: ModelConfig, dtype: str, tp: int, copies: int) -> int:
        """Return the bytes on each device of so many of the largest adapters, beside their places."""
        each = {
            "num_pages": copies * self.max_pages,
            "num_vectors": copies,
            "num_vocab_pages": copies * min(self.num_vocab_pages, self.max_pages),
            "num_vocab_vectors": copies * min(self.num_vocab_vectors, 1),
            "num_full_vocab": min(copies, self.num_full_vocab),
        }
        return replace(self, **each).bank_bytes(model, dtype, tp)

    def tables(self, tokens: int, rows: int) -> TableSizes:
        """Return the sizes of the tables of a program for `tokens` tokens in `rows` rows."""
        # An adapter of the layers has a page, or a row of vectors and none.
        return self._tables(tokens, rows, self.num_pages + self.num_vectors, self.num_pages)

    def vocab_tables(self, tokens: int, rows: int) -> TableSizes | None:
        """Return the sizes of those of what changes embeddings and head; None without room for that."""
        pages = max(self.num_vocab_pages, 1)
        return self._tables(tokens, rows, pages, pages) if self.has_vocab else None

    def _tables(self, tokens: int, rows: int, max_groups: int, num_pages: int) -> TableSizes:
        # Rows lie one behind another, and the padding behind them.
        return table_sizes(
            tokens,
            max_groups=min(rows, max_groups),
            max_pages=self.max_pages,
            num_pages=num_pages,
            max_runs=rows + 1,
        )


def _page_bytes(model: ModelConfig, dtype: str, tp: int) -> int:
    """Return the bytes of a page on each device, all layers."""
    shapes, specs = bank_shapes(model, tp, num_pages=1, num_vectors=1), bank_specs()
    total = sum(
        _shard(getattr(getattr(shapes, name), kind), getattr(getattr(specs, name), kind), tp)
        for name in PROJECTIONS
        for kind in ("a", "b")
    )
    return model.num_hidden_layers * total * jnp.dtype(dtype).itemsize


def _shard(shape: Any, spec: P, tp: int) -> int:
    """Return the elements of an array of `shape` that each device has."""
    return math.prod(shape) // (tp if TP in spec else 1)


def _free_bytes() -> int:
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"]
