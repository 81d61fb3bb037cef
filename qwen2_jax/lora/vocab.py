"""Adapters of the embeddings and the head: their pages and matrices on the host, and their banks on the devices."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from qwen2_jax.config import ModelConfig
from qwen2_jax.lora.adapter import Adapter, LowRank, TokenRows
from qwen2_jax.lora.banks import row_norms
from qwen2_jax.models.adapters import RANKS
from qwen2_jax.models.vocab_adapters import VocabBanks, init_vocab_banks, vocab_bank_shapes, vocab_bank_specs
from qwen2_jax.parallel import TP
from qwen2_jax.xla_options import compiler_options

PAGED = ("embed_a", "embed_b", "select", "head_a", "head_b")
FULL = ("full_embed", "full_head")
VECTORS = ("embed_scale", "head_scale", "head_bias")
MODULES = {"embed_tokens": 1, "lm_head": 2}
"""The bits of a page's modules."""

_ROWS = 64
"""Rows of the model's tables that are read at a time."""
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
    vectors: dict[str, np.ndarray] | None
    """Float32, the magnitudes of both (NaN where there is none) and the head's bias; None without any."""


def vocab_ranks(adapter: Adapter) -> int:
    """Return the largest rank of an adapter's updates of embeddings and head; a replaced token is a rank."""
    tokens = (adapter.embed_token_rows, adapter.lm_head_token_rows)
    ranks = [update.rank for update in (adapter.embed_tokens, adapter.lm_head) if update is not None]
    return max([*ranks, *(len(rows.token_ids) for rows in tokens if rows is not None)], default=0)


class VocabLayout:
    """Lays such adapters out for one model on one mesh."""

    def __init__(self, config: ModelConfig, tp: int, dtype: npt.DTypeLike, *, max_pages: int, rows: Rows) -> None:
        """`rows` gives the model's own rows, from which replaced ones differ; an adapter has at most `max_pages`."""
        shapes = vocab_bank_shapes(config, tp, num_pages=1, num_full=1, num_vectors=1, max_pages=max_pages)
        self._shapes = {name: getattr(shapes, name)[1:] for name in (*PAGED, *FULL, *VECTORS)}
        self._vocab, self._dtype, self._rows = config.vocab_size, np.dtype(dtype), rows

    def copy(self, adapter: Adapter) -> VocabCopy | None:
        """Return what an adapter changes, or None."""
        given = {"full_embed": adapter.full_embed_tokens, "full_head": adapter.full_lm_head}
        full = {bank: self._padded(matrix) for bank, matrix in given.items() if matrix is not None}
        embed, head = self._embedding(adapter), self._head(adapter)
        ranks = max((len(a) for a, _ in (embed, head) if a is not None), default=0)
        if not ranks and not full:
            return None
        pages = [self._page(embed, head, start) for start in range(0, ranks, RANKS)]
        return VocabCopy(pages=pages, full=full, vectors=self._vectors(adapter))

    def _vectors(self, adapter: Adapter) -> dict[str, np.ndarray] | None:
        embed, head = adapter.embed_tokens, adapter.lm_head
        given = {
            "embed_scale": None if embed is None else embed.magnitude,
            "head_scale": None if head is None else head.magnitude,
            "head_bias": None if head is None or head.bias is None else head.bias.astype(np.float32) * head.scaling,
        }
        if all(vector is None for vector in given.values()):
            return None
        out = {name: np.full(self._shapes[name], np.nan, np.float32) for name in VECTORS}
        out["head_bias"][:] = 0
        for name, vector in given.items():
            if vector is not None:
                out[name][: len(vector)] = vector
        return out

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
        self,
        config: ModelConfig,
        params: dict[str, Any],
        mesh: Mesh,
        dtype: str,
        *,
        num_pages: int,
        num_full: int,
        num_vectors: int,
        max_pages: int,
    ) -> None:
        """Allocate pages, whole matrices of both kinds and rows of vectors; `params` are the model's weights."""
        self._mesh, self._specs, self._max_pages = mesh, vocab_bank_specs(), max_pages
        self._embedding = params["model"]["embed_tokens"]["embedding"]
        self._head = params["lm_head"]["embedding"] if config.has_lm_head else self._embedding
        sizes = {"num_pages": num_pages, "num_full": num_full, "num_vectors": num_vectors, "max_pages": max_pages}
        shapes = vocab_bank_shapes(config, mesh.shape[TP], **sizes)
        shardings = jax.tree.map(partial(NamedSharding, mesh), self._specs, is_leaf=lambda leaf: isinstance(leaf, P))
        with jax.set_mesh(mesh):
            self.banks: VocabBanks = jax.jit(partial(init_vocab_banks, shapes, dtype), out_shardings=shardings)()

    def compile(self) -> None:
        """Compile the writing programs; as `DeviceBanks.compile` says, none is a CUDA graph."""
        options = compiler_options(self._mesh)
        banks = {name: getattr(self.banks, name) for name in (*PAGED, *FULL)}
        index = self._struct((), jnp.int32, P())
        self._write = {}
        with jax.set_mesh(self._mesh):
            ids, read = self._struct((_ROWS,), jnp.int32, P()), jax.jit(_read_rows, out_shardings=index.sharding)
            self._read = {
                name: read.lower(table, ids).compile(options)
                for name, table in (("embed_tokens", self._embedding), ("lm_head", self._head))
            }
        with jax.set_mesh(self._mesh), jax.default_matmul_precision("highest"):
            for name, bank in banks.items():
                row = jax.ShapeDtypeStruct(bank.shape[1:], bank.dtype, sharding=self._row_sharding(name))
                write = jax.jit(_set_row, donate_argnums=0, out_shardings=bank.sharding)
                self._write[name] = write.lower(bank, index, row).compile(options) if bank.shape[0] else None
            self._write_vectors: jax.stages.Compiled | None = None
            if not self.banks.head_bias.shape[0]:
                return
            shardings = jax.tree.map(lambda leaf: leaf.sharding, self.banks)
            write_vectors = jax.jit(_write_vectors, donate_argnums=0, out_shardings=shardings)
            pages = self._struct((self._max_pages,), jnp.int32, P())
            vectors = {
                name: self._struct(getattr(self.banks, name).shape[1:], jnp.float32, self._row_sharding(name).spec)
                for name in VECTORS
            }
            weights = (self._embedding, self._head)
            lowered = write_vectors.lower(self.banks, *weights, pages, index, vectors)
            self._write_vectors = lowered.compile(options)

    @property
    def programs(self) -> list[jax.stages.Compiled]:
        """The compiled programs."""
        written = [program for program in self._write.values() if program is not None]
        return [*self._read.values(), *written, *([] if self._write_vectors is None else [self._write_vectors])]

    def read_rows(self, module: str, token_ids: np.ndarray) -> np.ndarray:
        """Return rows of the model's own embedding ("embed_tokens") or head ("lm_head"), by token id; any thread."""
        table = self._head if module == "lm_head" else self._embedding
        padded = np.zeros(-(-len(token_ids) // _ROWS) * _ROWS, np.int32)
        padded[: len(token_ids)] = token_ids
        parts = [self._read[module](table, self._on_device(part)) for part in padded.reshape(-1, _ROWS)]
        return np.concatenate([np.asarray(part) for part in parts])[: len(token_ids)]

    def place(self, arrays: dict[str, np.ndarray]) -> dict[str, Array]:
        """Start to copy rows of the banks, by their names, to the devices."""
        return {name: jax.device_put(array, self._row_sharding(name)) for name, array in arrays.items()}

    def write(self, row: int, placed: dict[str, Array]) -> None:
        """Write row `row` of the banks of `PAGED` or `FULL` that `placed` names."""
        index = self._on_device(np.int32(row))
        changed = {name: self._write[name](getattr(self.banks, name), index, value) for name, value in placed.items()}
        self.banks = replace(self.banks, **changed)

    def write_vectors(self, pages: list[int], row: int, placed: dict[str, Array]) -> None:
        """Write row `row` of vectors of the adapter in `pages`, whose second factors get their magnitudes."""
        listed = np.full(self._max_pages, -1, np.int32)
        listed[: len(pages)] = pages
        numbers = (self._on_device(listed), self._on_device(np.int32(row)))
        assert self._write_vectors is not None
        self.banks = self._write_vectors(self.banks, self._embedding, self._head, *numbers, placed)

    def _on_device(self, value: Any) -> Array:
        return jax.device_put(value, NamedSharding(self._mesh, P()))

    def _struct(self, shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self._mesh, spec))

    def _row_sharding(self, name: str) -> NamedSharding:
        return NamedSharding(self._mesh, P(*getattr(self._specs, name)[1:]))


def _read_rows(table: Float[Array, "V D"], token_ids: Int[Array, " R"]) -> Float[Array, "R D"]:
    return table.at[token_ids].get(out_sharding=P(None, None))


def _write_vectors(
    banks: VocabBanks,
    embedding: Float[Array, "V D"],
    head: Float[Array, "V D"],
    pages: Int[Array, " M"],
    row: Int[Array, ""],
    placed: dict[str, Array],
) -> VocabBanks:
    embed_a = jnp.swapaxes(banks.embed_a[jnp.maximum(pages, 0)], 1, 2)  # [M, R, V]
    embed_scale = _magnitude(placed["embed_scale"], embedding.T, embed_a, banks.embed_b, pages, None)
    head_a = banks.head_a[jnp.maximum(pages, 0), 0]
    head_scale = _magnitude(placed["head_scale"], head, head_a, banks.head_b, pages, TP)
    return replace(
        banks,
        embed_b=_multiplied(banks.embed_b, pages, embed_scale),
        head_b=_multiplied(banks.head_b, pages, head_scale),
        embed_scale=_set_row(banks.embed_scale, row, embed_scale),
        head_scale=_set_row(banks.head_scale, row, head_scale),
        head_bias=_set_row(banks.head_bias, row, placed["head_bias"]),
    )


def _magnitude(
    magnitude: Float[Array, " N"],
    weight: Float[Array, "N K"],
    a: Float[Array, "M R K"],
    b_bank: Float[Array, "P R N"],
    pages: Int[Array, " M"],
    axis: str | None,
) -> Float[Array, " N"]:
    """Return the magnitude over the norm of W + B A's rows, split over `axis`; 1 where there is none."""
    present = (pages >= 0).astype(jnp.float32)[:, None, None]
    a = (a.astype(jnp.float32) * present).reshape(-1, a.shape[-1])
    b = (b_bank[jnp.maximum(pages, 0)].astype(jnp.float32) * present).reshape(-1, b_bank.shape[-1])
    norms = row_norms(weight.astype(jnp.float32), a, b, axis)
    return jnp.where(jnp.isnan(magnitude), 1.0, magnitude / norms)


def _multiplied(bank: Float[Array, "P R N"], pages: Int[Array, " M"], scale: Float[Array, " N"]) -> Array:
    """Return the bank with its pages' columns multiplied by `scale`."""
    for index in range(pages.shape[0]):
        page = jnp.maximum(pages[index], 0)
        old = jax.lax.dynamic_index_in_dim(bank, page, keepdims=False)
        new = (old.astype(jnp.float32) * scale[None]).astype(bank.dtype)
        bank = _set_row(bank, page, jnp.where(pages[index] < 0, old, new))
    return bank


def _scaled(update: LowRank | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    if update is None:
        return None, None
    return update.a, update.b.astype(np.float32) * np.float32(update.scaling)


def _set_row(bank: Array, row: Int[Array, ""], value: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(bank, value.astype(bank.dtype), row, 0)
