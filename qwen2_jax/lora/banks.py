"""The device's banks of adapters: their allocation and the programs that write an adapter into them."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from qwen2_jax.config import ModelConfig
from qwen2_jax.lora.pages import Page, Vectors
from qwen2_jax.models.adapters import (
    PROJECTIONS,
    LayerBanks,
    ProjectionBanks,
    bank_specs,
    init_banks,
)
from qwen2_jax.parallel import TP, out_sharding
from qwen2_jax.xla_options import compiler_options

Layers = tuple[LayerBanks, ...]
Placed = dict[str, Any]


class DeviceBanks:
    """All layers' banks, and the compiled programs that change them. Writes run behind the steps launched before."""

    def __init__(
        self,
        config: ModelConfig,
        graphdef: nnx.GraphDef,
        params: dict[str, Any],
        mesh: Mesh,
        dtype: str,
        *,
        num_pages: int,
        num_vectors: int,
        max_pages: int,
    ) -> None:
        """Allocate `num_pages` pages and `num_vectors` rows of vectors; an adapter has at most `max_pages`."""
        self._mesh, self._max_pages = mesh, max_pages
        layers = nnx.merge(graphdef, params).model.layers
        self._weights = [
            {
                "qkv": layer.self_attn.qkv_proj.kernel[...],
                "bias": layer.self_attn.qkv_proj.bias[...],
                "o": layer.self_attn.o_proj.kernel[...],
                "gate_up": layer.mlp.gate_up_proj.kernel[...],
                "down": layer.mlp.down_proj.kernel[...],
            }
            for layer in layers
        ]
        self._layers = [self._index(layer) for layer in range(config.num_hidden_layers)]
        tp = mesh.shape[TP]
        self._specs = bank_specs()
        layer = jax.tree.map(partial(NamedSharding, mesh), self._specs, is_leaf=lambda leaf: isinstance(leaf, P))
        shardings = tuple(layer for _ in range(config.num_hidden_layers))
        sizes = {"num_pages": num_pages, "num_vectors": num_vectors}
        with jax.set_mesh(mesh):
            self.banks: Layers = jax.jit(partial(init_banks, config, tp, dtype, **sizes), out_shardings=shardings)()
        self._num_layers = config.num_hidden_layers

    def compile(self) -> None:
        """Compile the writing programs, of one layer each: all layers are alike.

        None is a CUDA graph: its buffers would be others at each launch, and the host would wait for the steps before.
        """
        layer = jax.tree.map(_spec, self.banks[0])
        index, shardings = self._struct((), jnp.int32, P()), jax.tree.map(lambda leaf: leaf.sharding, layer)
        pages = self._struct((self._max_pages,), jnp.int32, P())
        options = compiler_options(self._mesh)
        with jax.set_mesh(self._mesh), jax.default_matmul_precision("highest"):
            write_page = jax.jit(_write_page, donate_argnums=0, out_shardings=shardings)
            self._write_page = write_page.lower(layer, index, index, self._page_structs()).compile(options)
            write = jax.jit(_write_vectors, donate_argnums=0, out_shardings=shardings)
            weights = jax.tree.map(_spec, self._weights[0])
            lowered = write.lower(layer, weights, pages, index, index, self._vector_structs())
            self._write_vectors = lowered.compile(options)

    @property
    def programs(self) -> list[jax.stages.Compiled]:
        """The compiled programs."""
        return [self._write_page, self._write_vectors]

    def place_page(self, page: Page) -> Placed:
        """Start to copy a page to the devices; nothing waits for it until it is written."""
        given = {name: (factors.a, factors.b, factors.scaling) for name, factors in page.factors.items()}
        return jax.tree.map(_put, given, self._page_structs())

    def place_vectors(self, vectors: Vectors) -> Placed:
        """Start to copy vectors to the devices."""
        given = {name: getattr(vectors, name) for name in ("bias", "magnitude", "replaced_bias")}
        return jax.tree.map(_put, given, self._vector_structs())

    def write_page(self, page: int, placed: Placed) -> None:
        """Write page `page`."""
        place = self._index(page)
        self.banks = tuple(
            self._write_page(bank, place, layer, placed) for bank, layer in zip(self.banks, self._layers, strict=True)
        )

    def write_vectors(self, pages: list[int], row: int, placed: Placed) -> None:
        """Write row `row` of vectors of the adapter in `pages`, whose second factors get their magnitudes."""
        listed = np.full(self._max_pages, -1, np.int32)
        listed[: len(pages)] = pages
        numbers = jax.device_put(listed, NamedSharding(self._mesh, P())), self._index(row)
        self.banks = tuple(
            self._write_vectors(bank, weights, *numbers, layer, placed)
            for bank, weights, layer in zip(self.banks, self._weights, self._layers, strict=True)
        )

    def _page_structs(self) -> dict[str, tuple[jax.ShapeDtypeStruct, ...]]:
        """By projection a page's two factors and their scaling, all layers stacked; see `pages.Factors`."""

        def of(name: str) -> tuple[jax.ShapeDtypeStruct, ...]:
            a, b = self._stacked(name, "a"), self._stacked(name, "b")
            layers, ranks, *out = b.shape
            spec = b.sharding.spec
            outputs_first = P(spec[0], *spec[2:], *[None] * (len(b.shape) - len(spec)), None)
            scaling = {"qkv": (1, out[1] if name == "qkv" else 1, 1, 1), "gate_up": (2, 1, 1)}.get(name, (1, 1))
            transposed = self._struct((layers, *out, ranks), b.dtype, outputs_first if len(spec) > 2 else P())
            return a, transposed, self._struct((layers, *scaling), jnp.float32, P())

        return {name: of(name) for name in PROJECTIONS}

    def _vector_structs(self) -> dict[str, Any]:
        vectors = {name: self._stacked(name, "bias") for name in PROJECTIONS}
        return {"bias": vectors, "magnitude": vectors, "replaced_bias": vectors["qkv"]}

    def _stacked(self, name: str, kind: str) -> jax.ShapeDtypeStruct:
        """One row of a bank for every layer."""
        bank = getattr(getattr(self.banks[0], name), kind)
        spec = getattr(getattr(self._specs, name), kind)
        return self._struct((self._num_layers, *bank.shape[1:]), bank.dtype, P(None, *spec[1:]))

    def _struct(self, shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self._mesh, spec))

    def _index(self, value: int) -> Array:
        return jax.device_put(np.int32(value), NamedSharding(self._mesh, P()))


def _spec(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _put(array: np.ndarray, struct: jax.ShapeDtypeStruct) -> Array:
    return jax.device_put(array, struct.sharding)


def _write_page(bank: LayerBanks, page: Int[Array, ""], layer: Int[Array, ""], placed: Placed) -> LayerBanks:
    def write(name: str) -> ProjectionBanks:
        old: ProjectionBanks = getattr(bank, name)
        a, b, scaling = (jax.lax.dynamic_index_in_dim(part, layer, keepdims=False) for part in placed[name])
        b = jnp.moveaxis(b.astype(jnp.float32) * scaling, -1, 0)
        return replace(old, a=_set_row(old.a, page, a), b=_set_row(old.b, page, b))

    return LayerBanks(**{name: write(name) for name in PROJECTIONS})


def _write_vectors(
    bank: LayerBanks,
    weights: dict[str, Array],
    pages: Int[Array, " M"],
    row: Int[Array, ""],
    layer: Int[Array, ""],
    placed: Placed,
) -> LayerBanks:
    def of_layer(part: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(part, layer, keepdims=False)

    def write(name: str) -> ProjectionBanks:
        old: ProjectionBanks = getattr(bank, name)
        bias, magnitude = (of_layer(placed[kind][name]) for kind in ("bias", "magnitude"))
        if name == "qkv":
            own, other = weights["bias"].astype(jnp.float32), of_layer(placed["replaced_bias"])
            bias = bias + jnp.where(jnp.isnan(other), 0.0, other - own)
        scale = jnp.where(jnp.isnan(magnitude), 1.0, magnitude / _row_norms(weights[name], old, pages, name))
        b = old.b
        for index in range(pages.shape[0]):
            page = jnp.maximum(pages[index], 0)
            before = jax.lax.dynamic_index_in_dim(b, page, keepdims=False)
            after = (before.astype(jnp.float32) * scale[None]).astype(b.dtype)
            b = _set_row(b, page, jnp.where(pages[index] < 0, before, after))
        return replace(old, b=b, bias=_set_row(old.bias, row, bias), scale=_set_row(old.scale, row, scale))

    return LayerBanks(**{name: write(name) for name in PROJECTIONS})


def _row_norms(
    kernel: Float[Array, "..."], bank: ProjectionBanks, pages: Int[Array, " M"], name: str
) -> Float[Array, " *out"]:
    """Return the norms of the rows of W + B A, over the inputs, without building that matrix.

    |w + A^T b|^2 = |w|^2 + 2 b . (A w) + b . (A A^T) b, for each row w of W with its row b of B.
    """
    present = (pages >= 0).astype(jnp.float32)
    index = jnp.maximum(pages, 0)
    a = bank.a[index].astype(jnp.float32) * present.reshape(-1, *[1] * (bank.a.ndim - 1))
    b = bank.b[index].astype(jnp.float32) * present.reshape(-1, *[1] * (bank.b.ndim - 1))
    a = jnp.moveaxis(a, 1, 0).reshape(a.shape[1], -1, *a.shape[3:])  # [C, M * R, *in]
    b = b.reshape(-1, *b.shape[2:])  # [M * R, *out]
    w = kernel.astype(jnp.float32)
    if name in ("o", "down"):
        w, a = w.reshape(w.shape[0], -1), a[0].reshape(a.shape[1], -1)
        return row_norms(w, a, b, None)
    if name == "qkv":
        slots = jnp.array([0] * (w.shape[1] - 2) + [1, 2])
        a = a[slots]
        product, gram = jnp.einsum("kshd,srd->rksh", w, a), jnp.einsum("srd,sqd->srq", a, a)
        return jnp.sqrt((w * w).sum(-1) + 2 * (b * product).sum(0) + (b * jnp.einsum("srq,qksh->rksh", gram, b)).sum(0))
    product, gram = jnp.einsum("cfd,crd->rcf", w, a), jnp.einsum("crd,cqd->crq", a, a)
    return jnp.sqrt((w * w).sum(-1) + 2 * (b * product).sum(0) + (b * jnp.einsum("crq,qcf->rcf", gram, b)).sum(0))


def row_norms(
    w: Float[Array, "N K"], a: Float[Array, "R K"], b: Float[Array, "R N"], axis: str | None
) -> Float[Array, " N"]:
    """Return the norms of the rows of W + B A; float32. `axis` is what N is split over."""
    square = jnp.einsum("di,di->d", w, w, out_sharding=out_sharding(axis))
    product = jnp.einsum("di,ri->rd", w, a, out_sharding=out_sharding(None, axis))
    gram = jnp.einsum("ri,qi->rq", a, a, out_sharding=out_sharding(None, None))
    return jnp.sqrt(square + 2 * (b * product).sum(0) + (b * jnp.einsum("rq,qd->rd", gram, b)).sum(0))


def _set_row(bank: Array, row: Int[Array, ""], value: Array) -> Array:
    """Overwrite one row of a bank, in place where it is donated."""
    return jax.lax.dynamic_update_index_in_dim(bank, value.astype(bank.dtype), row, 0)
