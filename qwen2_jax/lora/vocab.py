"""Adapters of the embeddings and the head: their pages and matrices on the host, and their banks on the devices."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import AdapterError
from qwen2_jax.lora.adapter import Adapter, LowRank, TokenRows
from qwen2_jax.models.adapters import RANKS
from qwen2_jax.models.vocab_adapters import VocabBanks, init_vocab_banks, vocab_bank_shapes, vocab_bank_specs
from qwen2_jax.parallel import TP

PAGED = ("embed_a", "embed_b", "select", "head_a", "head_b")
FULL = ("full_embed", "full_head")
MODULES = {"embed_tokens": 1, "lm_head": 2}
"""The bits of a page's modules."""

Rows = Callable[[str, np.ndarray], np.ndarray]
"""Returns rows of the model's own embedding ("embed_tokens") or head ("lm_head"), by token id."""


@dataclass(frozen=True, kw_only=True)
class VocabPage:
    """One page: what the banks of `PAGED` take."""

    arrays: dict[str, np.ndarray]
    modules: int


@dataclass(frozen=True, kw_only=True)
class VocabCopy:
    """What an adapter changes in the embeddings and the head."""

    pages: list[VocabPage]
    full: dict[str, np.ndarray]
    """Whole matrices, by the name of their bank."""


def vocab_ranks(adapter: Adapter) -> int:
    """Return the largest rank of an adapter's updates of embeddings and head; a replaced token is a rank."""
    tokens = (adapter.embed_token_rows, adapter.lm_head_token_rows)
    ranks = [update.rank for update in (adapter.embed_tokens, adapter.lm_head) if update is not None]
    return max([*ranks, *(len(rows.token_ids) for rows in tokens if rows is not None)], default=0)


class VocabLayout:
    """Lays such adapters out for one model on one mesh."""

    def __init__(self, config: ModelConfig, tp: int, dtype: npt.DTypeLike, *, max_pages: int, rows: Rows) -> None:
        """`rows` gives the model's own rows, from which replaced ones differ; an adapter has at most `max_pages`."""
        shapes = vocab_bank_shapes(config, tp, num_pages=1, num_full=1, max_pages=max_pages)
        self._shapes = {name: getattr(shapes, name)[1:] for name in (*PAGED, *FULL)}
        self._size, self._vocab, self._dtype, self._rows = config.hidden_size, config.vocab_size, np.dtype(dtype), rows

    def copy(self, name: str, adapter: Adapter) -> VocabCopy | None:
        """Return what the adapter called `name` changes, or None; `AdapterError` for what is not served."""
        for module, update in (("embed_tokens", adapter.embed_tokens), ("lm_head", adapter.lm_head)):
            if update is not None and (update.magnitude is not None or update.bias is not None):
                kind = "use_dora" if update.magnitude is not None else "lora_bias"
                raise AdapterError(
                    f"adapter {name!r} has {kind} on {module}, which is served for the layers' modules only"
                )
        given = {"full_embed": adapter.full_embed_tokens, "full_head": adapter.full_lm_head}
        full = {bank: self._padded(matrix) for bank, matrix in given.items() if matrix is not None}
        embed, head = self._embedding(adapter), self._head(adapter)
        ranks = max((len(a) for a, _ in (embed, head) if a is not None), default=0)
        if not ranks and not full:
            return None
        return VocabCopy(pages=[self._page(embed, head, start) for start in range(0, ranks, RANKS)], full=full)

    def _embedding(self, adapter: Adapter) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Return the embedding's factors [r, V] and [D, r]."""
        if adapter.embed_token_rows is not None:
            picks, change = self._replaced("embed_tokens", adapter.embed_token_rows)
            return picks, change.T
        return _scaled(adapter.embed_tokens)

    def _head(self, adapter: Adapter) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Return the head's factors [r, D] and [V, r]."""
        if adapter.lm_head_token_rows is not None:
            picks, change = self._replaced("lm_head", adapter.lm_head_token_rows)
            return change, picks.T
        return _scaled(adapter.lm_head)

    def _replaced(self, module: str, rows: TokenRows) -> tuple[np.ndarray, np.ndarray]:
        """Return which tokens are replaced, [n, V], and the changes of their rows, [n, D]."""
        picks = np.zeros((len(rows.token_ids), self._vocab), np.float32)
        picks[np.arange(len(picks)), rows.token_ids] = 1
        own = self._rows(module, rows.token_ids).astype(np.float32)
        return picks, rows.rows.astype(np.float32) - own

    def _page(self, embed: tuple[Any, Any], head: tuple[Any, Any], start: int) -> VocabPage:
        arrays = {name: np.zeros(self._shapes[name], self._dtype) for name in PAGED}
        stop, modules = start + RANKS, 0
        if embed[0] is not None and len(embed[0]) > start:
            a, b = embed[0][start:stop], embed[1][:, start:stop]
            arrays["embed_a"][: self._vocab, : len(a)] = a.T
            arrays["embed_b"][: len(a)] = b.T
            modules |= MODULES["embed_tokens"]
        if head[0] is not None and len(head[0]) > start:
            a, b = head[0][start:stop], head[1][:, start:stop]
            arrays["head_a"][0, : len(a)] = a
            arrays["head_b"][: len(a), : self._vocab] = b.T
            modules |= MODULES["lm_head"]
        arrays["select"][0, np.arange(RANKS), start + np.arange(RANKS)] = 1
        return VocabPage(arrays=arrays, modules=modules)

    def _padded(self, matrix: np.ndarray) -> np.ndarray:
        out = np.zeros(self._shapes["full_head"], self._dtype)
        out[: self._vocab] = matrix
        return out


class DeviceVocabBanks:
    """The banks on the devices, and the compiled programs that change them."""

    def __init__(
        self, config: ModelConfig, mesh: Mesh, dtype: str, *, num_pages: int, num_full: int, max_pages: int
    ) -> None:
        """Allocate `num_pages` pages and `num_full` whole matrices each of embeddings and heads."""
        self._mesh, self._specs = mesh, vocab_bank_specs()
        sizes = {"num_pages": num_pages, "num_full": num_full, "max_pages": max_pages}
        shapes = vocab_bank_shapes(config, mesh.shape[TP], **sizes)
        shardings = jax.tree.map(partial(NamedSharding, mesh), self._specs, is_leaf=lambda leaf: isinstance(leaf, P))
        with jax.set_mesh(mesh):
            self.banks: VocabBanks = jax.jit(partial(init_vocab_banks, shapes, dtype), out_shardings=shardings)()

    def compile(self) -> None:
        """Compile the writing programs."""
        index = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(self._mesh, P()))
        self._write = {}
        with jax.set_mesh(self._mesh):
            for name in (*PAGED, *FULL):
                bank = getattr(self.banks, name)
                row = jax.ShapeDtypeStruct(bank.shape[1:], bank.dtype, sharding=self._row_sharding(name))
                write = jax.jit(_set_row, donate_argnums=0, out_shardings=bank.sharding)
                self._write[name] = write.lower(bank, index, row).compile() if bank.shape[0] else None

    def place(self, arrays: dict[str, np.ndarray]) -> dict[str, Array]:
        """Start to copy rows of the banks, by their names, to the devices."""
        return {name: jax.device_put(array, self._row_sharding(name)) for name, array in arrays.items()}

    def write(self, row: int, placed: dict[str, Array]) -> None:
        """Write row `row` of the banks that `placed` names."""
        index = jax.device_put(np.int32(row), NamedSharding(self._mesh, P()))
        changed = {name: self._write[name](getattr(self.banks, name), index, value) for name, value in placed.items()}
        kept = {name: getattr(self.banks, name) for name in (*PAGED, *FULL)}
        self.banks = VocabBanks(**(kept | changed))

    def _row_sharding(self, name: str) -> NamedSharding:
        return NamedSharding(self._mesh, P(*getattr(self._specs, name)[1:]))


def _scaled(update: LowRank | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    if update is None:
        return None, None
    return update.a, update.b.astype(np.float32) * np.float32(update.scaling)


def _set_row(bank: Array, row: Int[Array, ""], value: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(bank, value, row, 0)
