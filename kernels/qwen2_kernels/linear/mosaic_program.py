"""What one program of the Hopper kernel of `linear` does: see `mosaic`.

Pallas Mosaic GPU inserts no barriers here. A stage of the ring in shared memory has a `full` barrier, at which TMA's
copies arrive, and an `empty` one, at which the warpgroups that have read it do; with a cluster, those of all its
programs, because each of them writes a part of what the others read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen2_kernels.linear.mosaic_config import ALIGNMENT, MAX_COLUMNS, MosaicConfig


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The work of a launch: tiles of tokens, of output features and of K, dealt out to clusters of programs."""

    config: MosaicConfig
    tokens: int
    """T, a multiple of 8 if it is more than 8."""
    out_features: int
    in_features: int
    gated: bool

    @property
    def clusters(self) -> int:
        """Clusters of the grid."""
        return min(self.items, self.config.programs // self.config.cluster)

    @property
    def ranks(self) -> tuple[int, int]:
        """Programs of a cluster that are side by side on T and on N."""
        return (1, self.config.cluster) if self.config.share == "tokens" else (self.config.cluster, 1)

    @property
    def tiles_t(self) -> int:
        """Tiles of tokens, or clusters' tiles."""
        return -(-self.tokens // (self.config.token_tile * self.ranks[0]))

    @property
    def tiles_n(self) -> int:
        """Tiles of output features, or clusters' tiles."""
        return -(-self.out_features // (self.config.block_n * self.ranks[1]))

    def tiles_of(self, tokens: Array) -> Array:
        """Return how many of the tiles of tokens hold the first `tokens`."""
        tile = self.config.token_tile * self.ranks[0]
        return jnp.minimum(lax.div(tokens + (tile - 1), jnp.int32(tile)), self.tiles_t)

    @property
    def items(self) -> int:
        """Pieces of work, each a cluster's."""
        return self.tiles_t * self.tiles_n * self.config.split_k

    @property
    def steps(self) -> int:
        """Tiles of K in a piece of work. Behind K's end, they are zeros."""
        return -(-self.in_features // (self.config.block_k * self.config.split_k))

    @property
    def copied_tokens(self) -> int:
        """Tokens of a tile that are copied; the others' sums are not used."""
        return self.config.copied_tokens(self.tokens)

    @property
    def parts(self) -> tuple[int, int]:
        """How many products a step takes, and how many rows of the kernel each has: gate and up are one if it fits."""
        columns = self.config.block_n * (1 + self.gated)
        return (1, columns) if columns <= MAX_COLUMNS else (2, columns // 2)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A program's buffers in shared memory and their barriers."""

    x: Any
    """[rows, block_k], a stage's tokens behind those of the stage before: see `MosaicConfig.token_rows`"""
    weights: Any
    """[stages, block_n, block_k]; gate above up"""
    out: Any
    """[2, tokens, columns]"""
    full: Any
    empty: Any


@dataclass(frozen=True, kw_only=True)
class Item:
    """A tile of the output and its share of K."""

    token: Array
    feature: Array
    split: Array
    turn: Array
    """Pieces of work that the program has done before."""


class Addend(Protocol):
    """What is multiplied besides x and the kernel, and added to the same sums, tile by tile."""

    def prepare(self) -> None:
        """Called once by each warpgroup that multiplies."""

    def load(self, item: Item) -> None:
        """Copy what a tile takes to shared memory; behind its part of the kernel."""

    def multiply(self, item: Item, sums: Sequence[Any], first_row: Array) -> None:
        """Add to the sums [rows, columns] of each part, and wait for it."""

    def finish(self) -> None:
        """Called by the warpgroup that copies when all has been asked for: wait until all has been read."""


def program(
    x_gmem: Any,
    kernel_gmem: Any,
    out_gmem: Any,
    *,
    plan: Plan,
    num_tokens_gmem: Any = None,
    addend: Addend | None = None,
    **scratch: Any,
) -> None:
    """Run one program: x [T, K], kernel [N, K] or [2, N, K], out [T, N] or [split_k, T, N].

    With `num_tokens_gmem` [1], tiles of tokens behind the first so many are left out.
    """
    shared = Shared(**scratch)
    tiles_t = plan.tiles_t if num_tokens_gmem is None else plan.tiles_of(num_tokens_gmem[0])
    consumers = plan.config.consumers
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == consumers)
    def _producer() -> None:
        if consumers > 1:
            plgpu.set_max_registers(40 if consumers == 2 else 32, action="decrease")
        total = _produce(x_gmem, kernel_gmem, shared, plan, tiles_t, addend)
        # Nobody arrives at the barriers of a program that is gone.
        lax.fori_loop(0, plan.config.stages, lambda index, _: _wait_empty(shared, plan, total + index), None)
        if addend is not None:
            addend.finish()

    @pl.when(warpgroup < consumers)
    def _consumer() -> None:
        if consumers > 1:
            plgpu.set_max_registers(232 if consumers == 2 else 160, action="increase")
        if addend is not None:
            addend.prepare()
        _consume(out_gmem, shared, plan, tiles_t, warpgroup, addend)


def _for_each_item(plan: Plan, tiles_t: Array | int, body: Any) -> Array:
    """Call `body(item)` for this cluster's pieces of work and return the steps that they take."""
    cluster = lax.axis_index("program")
    rank = lax.axis_index("cluster") if plan.config.cluster > 1 else 0
    if isinstance(tiles_t, int):
        full, left = divmod(plan.items, plan.clusters)
        turns = jnp.int32(full) if left == 0 else full + (cluster < left).astype(jnp.int32)
    else:
        items = tiles_t * (plan.tiles_n * plan.config.split_k)
        turns, _ = _divide(items + (plan.clusters - 1) - cluster, plan.clusters)

    lax.fori_loop(0, turns, lambda turn, _: body(_deal(plan, tiles_t, cluster, rank, turn)), None)
    return turns * plan.steps


def _deal(plan: Plan, tiles_t: Array | int, cluster: Array, rank: Array | int, turn: Array) -> Item:
    """Return what a cluster's program `rank` works at in its `turn`."""
    split, rest = _divide(cluster + turn * plan.clusters, tiles_t * plan.tiles_n)
    # Tiles of the same rows of the kernel run side by side, so that the cache serves all but one of them, as do those
    # of the same tokens soon after.
    group, rest = _divide(rest, plan.config.group * plan.tiles_n)
    first = group * plan.config.group
    tile_n, tile_t = _divide(rest, jnp.minimum(tiles_t - first, plan.config.group))
    ranks_t, ranks_n = plan.ranks
    token = ((first + tile_t) * ranks_t + (rank if ranks_t > 1 else 0)) * plan.config.token_tile
    feature = (tile_n * ranks_n + (rank if ranks_n > 1 else 0)) * plan.config.block_n
    return Item(token=token, feature=feature, split=split, turn=turn)


def _divide(value: Array, divisor: Array | int) -> tuple[Array, Array]:
    divisor = jnp.int32(divisor)
    return lax.div(value, divisor), lax.rem(value, divisor)


def _wait_empty(shared: Shared, plan: Plan, step: Array) -> None:
    """Wait until the stage that `step` needs has been read."""
    slot = lax.rem(step, jnp.int32(plan.config.stages))
    pl.when(step >= plan.config.stages)(lambda: plgpu.barrier_wait(shared.empty.at[slot]))


def _rows(plan: Plan, slot: Array, count: int, first: Array | int = 0) -> Any:
    """Return `count` rows of a stage's tokens from the `first` on."""
    return pl.ds(pl.multiple_of(slot * plan.copied_tokens + first, ALIGNMENT), count)


def _weights(kernel_gmem: Any, plan: Plan, item: Item, index: Array | int) -> list[Any]:
    """Return an item's tile of the kernel in its step `index`; gate and up apart."""
    features = pl.ds(pl.multiple_of(item.feature, ALIGNMENT), plan.config.block_n)
    columns = pl.ds(pl.multiple_of((item.split * plan.steps + index) * plan.config.block_k, 64), plan.config.block_k)
    sources = [kernel_gmem.at[part] for part in range(2)] if plan.gated else [kernel_gmem]
    return [source.at[features, columns] for source in sources]


def _produce(
    x_gmem: Any, kernel_gmem: Any, shared: Shared, plan: Plan, tiles_t: Array | int, addend: Addend | None
) -> Array:
    """Copy tiles of the kernel and of the tokens to shared memory as soon as there is room; return their number."""
    config = plan.config
    shared_by = [("cluster" if ranks > 1 else None) for ranks in plan.ranks]  # of the kernel, of the tokens

    def load(item: Item) -> None:
        tokens = pl.ds(pl.multiple_of(item.token, ALIGNMENT), plan.copied_tokens)
        before = item.turn * plan.steps

        def load_step(index: Array, _: None) -> None:
            step = before + index
            slot = lax.rem(step, jnp.int32(config.stages))
            columns = pl.ds(pl.multiple_of((item.split * plan.steps + index) * config.block_k, 64), config.block_k)
            _wait_empty(shared, plan, step)
            full = shared.full.at[slot]
            for part, tile in enumerate(_weights(kernel_gmem, plan, item, index)):
                target = shared.weights.at[slot, pl.ds(part * config.block_n, config.block_n)]
                plgpu.copy_gmem_to_smem(tile, target, full, collective_axes=shared_by[0])
            rows = _rows(plan, slot, plan.copied_tokens)
            plgpu.copy_gmem_to_smem(x_gmem.at[tokens, columns], shared.x.at[rows], full, collective_axes=shared_by[1])

        lax.fori_loop(0, plan.steps, load_step, None)
        if addend is not None:
            addend.load(item)

    return _for_each_item(plan, tiles_t, load)


def _consume(
    out_gmem: Any, shared: Shared, plan: Plan, tiles_t: Array | int, warpgroup: Array, addend: Addend | None
) -> None:
    """Multiply the tokens of one warpgroup."""
    config = plan.config
    first_row = warpgroup * config.rows
    parts, columns = plan.parts

    def slot_of(step: Array) -> Array:
        return lax.rem(step, jnp.int32(config.stages))

    def multiply(item: Item) -> list[Array]:
        before = item.turn * plan.steps

        def scope(*sums: Any) -> list[Array]:
            def step(index: Array, _: None) -> None:
                slot = slot_of(before + index)
                plgpu.barrier_wait(shared.full.at[slot])
                x = shared.x.at[_rows(plan, slot, config.rows, first_row)]
                for part, acc in enumerate(sums):
                    weights = shared.weights.at[slot, pl.ds(part * columns, columns)]
                    plgpu.wgmma(acc, x, weights.transpose((1, 0)))
                plgpu.wgmma_wait(parts)  # for the products of the step before
                last = slot_of(before + jnp.maximum(index - 1, 0))
                plgpu.barrier_arrive(shared.empty.at[last], predicate=index > 0)

            lax.fori_loop(0, plan.steps, step, None)
            if addend is not None:
                addend.multiply(item, sums, first_row)
            return [acc[...] for acc in sums]

        results = pl.run_scoped(scope, *[plgpu.WGMMAAccumulatorRef((config.rows, columns))] * parts)
        plgpu.barrier_arrive(shared.empty.at[slot_of(before + plan.steps - 1)])
        return results

    def finish(item: Item) -> None:
        results = multiply(item)
        if plan.gated:
            gate, up = results if parts == 2 else (results[0][:, : config.block_n], results[0][:, config.block_n :])
            # The reciprocal of a root costs less than that of a number: sigmoid(gate) is its square.
            root = lax.rsqrt(1 + jnp.exp(-gate))
            results = [gate * up * root * root]
        _store(results[0].astype(out_gmem.dtype), out_gmem, shared, item, first_row, config)

    _for_each_item(plan, tiles_t, finish)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store(result: Array, out_gmem: Any, shared: Shared, item: Item, first_row: Array, config: MosaicConfig) -> None:
    """Store a tile's sums in pieces of some columns; TMA leaves out what lies behind the array's ends."""
    target = out_gmem.at[item.split] if len(out_gmem.shape) == 3 else out_gmem
    width = shared.out.shape[2]
    rows = pl.ds(pl.multiple_of(item.token + first_row, ALIGNMENT), config.rows)
    pieces = config.block_n // width
    for piece in range(pieces):
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # for the piece before the last, which has the same buffer
        buffer = piece % 2 if pieces % 2 == 0 else lax.rem(item.turn + piece, jnp.int32(2))
        smem = shared.out.at[buffer, pl.ds(first_row, config.rows)]
        smem[...] = result[:, piece * width : (piece + 1) * width]
        plgpu.commit_smem()
        columns = pl.ds(pl.multiple_of(item.feature + piece * width, ALIGNMENT), width)
        plgpu.copy_smem_to_gmem(smem, target.at[rows, columns])
