"""What one program of the attention kernel for NVIDIA Hopper does: see `hopper_attention`.

Pallas Mosaic GPU inserts no barriers here: each buffer in shared memory has a `full` barrier, at which TMA's copies
arrive, and an `empty` one, at which the warpgroups that have read it do.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen2_kernels.hopper_config import ALIGNMENT, ROWS, Config, Mask
from qwen2_kernels.hopper_inline import store_rows, take_turns
from qwen2_kernels.hopper_tiles import TILE_FIELDS, Tile

Locate = Callable[..., tuple[Array, ...]]
"""Returns where a block's parts lie: see `hopper_attention.attend`."""
ForEachTile = Callable[[Callable[[Tile, Array, Array, Array, Array], None]], None]
NOTHING = -1e30
"""The maximum of no logits. Finite, so that exp2(-inf - NOTHING) is 0 and exp2(NOTHING - NOTHING) is no NaN."""
TURN = 5
"""The first free hardware barrier: 0 is a block's, and each of up to four warpgroups has its own."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A program's buffers in shared memory and their barriers."""

    q: Any
    out: Any
    k: Any
    v: Any
    q_full: Any
    q_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any


def program(
    q_gmem: Any,
    k_gmem: Any,
    v_gmem: Any,
    tiles_gmem: Any,
    num_tiles_gmem: Any,
    *rest: Any,
    locate: Locate,
    scale: float,
    out_scale: float,
    mask: Mask,
    config: Config,
    group: int,
    **scratch: Any,
) -> None:
    """Run one program. The last of `rest` is the result, the others are what `locate` reads."""
    *indices, out_gmem = rest
    shared = Shared(**scratch)
    warpgroup = lax.axis_index("warpgroup")
    for_each_tile = functools.partial(_for_each_tile, tiles_gmem, num_tiles_gmem, q_gmem.shape[1], config)

    @pl.when(warpgroup == config.consumers)
    def _producer() -> None:
        plgpu.set_max_registers(24 if config.consumers == 2 else 32, action="decrease")
        _produce((q_gmem, k_gmem, v_gmem), shared, for_each_tile, lambda *at: locate(*at, *indices), config, group)

    @pl.when(warpgroup < config.consumers)
    def _consumer() -> None:
        plgpu.set_max_registers(240 if config.consumers == 2 else 160, action="increase")
        _consume_kernel(out_gmem, shared, for_each_tile, warpgroup, scale, out_scale, mask, config)


def _for_each_tile(
    tiles: Any, num_tiles: Any, heads: int, config: Config, body: Callable[[Tile, Array, Array, Array, Array], None]
) -> None:
    """Call `body(tile, head, turn, blocks, blocks before)` for this program's tiles.

    They are dealt out back and forth: costs fall along the table, so that all programs get nearly the same. Tiles
    without blocks come last.
    """
    index, programs = lax.axis_index("program"), lax.axis_size("program")
    items = num_tiles[0] * heads

    def place(turn: Array) -> Array:
        return jnp.where(lax.rem(turn, jnp.int32(2)) == 0, index, programs - 1 - index)

    def deal(turn: Array, before: Array) -> Array:
        item = turn * programs + place(turn)
        row, head = lax.div(item, jnp.int32(heads)), lax.rem(item, jnp.int32(heads))
        tile = Tile(**{name: tiles[row, column] for column, name in enumerate(TILE_FIELDS)})
        blocks = lax.div(tile.key_stop - tile.key_start + (config.kv_tile - 1), jnp.int32(config.kv_tile))
        body(tile, head, turn, blocks, before)
        return before + blocks

    full, left = lax.div(items, jnp.int32(programs)), lax.rem(items, jnp.int32(programs))
    lax.fori_loop(0, full + (place(full) < left).astype(jnp.int32), deal, jnp.int32(0))


def _position(config: Config, tile: Tile, blocks: Array, index: Array) -> Array:
    """The first key of a tile's block `index`. The last comes first: what masks hide lies mostly there."""
    return tile.key_start + (blocks - 1 - index) * config.kv_tile


def _produce(
    gmem: tuple[Any, Any, Any],
    shared: Shared,
    for_each_tile: ForEachTile,
    locate: Locate,
    config: Config,
    group: int,
) -> None:
    """Copy queries, keys and values to shared memory, as soon as there is room."""
    q_gmem, k_gmem, v_gmem = gmem

    def load(tile: Tile, head: Array, turn: Array, blocks: Array, before: Array) -> None:
        kv_head = lax.div(head, jnp.int32(group))

        @pl.when(blocks > 0)
        def _queries() -> None:
            buffer = lax.rem(turn, jnp.int32(config.query_buffers))
            pl.when(turn >= config.query_buffers)(lambda: plgpu.barrier_wait(shared.q_empty.at[buffer]))
            source = pl.ds(pl.multiple_of(tile.query_start, ALIGNMENT), config.query_tile)
            plgpu.copy_gmem_to_smem(q_gmem.at[source, head], shared.q.at[buffer], shared.q_full.at[buffer])

        def load_block(index: Array, _: None) -> None:
            step = before + index
            slot = lax.rem(step, jnp.int32(config.stages))
            parts = locate(tile, _position(config, tile, blocks, index))  # before waiting: it may read a table
            size = config.kv_tile // len(parts)
            for source, smem, full, empty in (
                (k_gmem, shared.k, shared.k_full, shared.k_empty),
                (v_gmem, shared.v, shared.v_full, shared.v_empty),
            ):
                pl.when(step >= config.stages)(functools.partial(plgpu.barrier_wait, empty.at[slot]))
                for part, start in enumerate(parts):
                    rows = pl.ds(pl.multiple_of(start, ALIGNMENT), size)
                    target = smem.at[slot, pl.ds(part * size, size)]
                    plgpu.copy_gmem_to_smem(source.at[rows, kv_head], target, full.at[slot])

        lax.fori_loop(0, blocks, load_block, None)

    for_each_tile(load)


def _consume_kernel(
    out_gmem: Any,
    shared: Shared,
    for_each_tile: ForEachTile,
    warpgroup: Array,
    scale: float,
    out_scale: float,
    mask: Mask,
    config: Config,
) -> None:
    """Attend with 64 queries of each tile."""
    kv_tile, head_dim = config.kv_tile, out_gmem.shape[2]
    first_row = warpgroup * ROWS
    log2_scale = scale * math.log2(math.e)
    next_consumer = lax.rem(warpgroup + 1, jnp.int32(config.consumers))
    wait_turn = functools.partial(take_turns, "sync", TURN + warpgroup) if config.take_turns else lambda: None
    pass_turn = functools.partial(take_turns, "arrive", TURN + next_consumer) if config.take_turns else lambda: None
    pl.when(warpgroup == config.consumers - 1)(pass_turn)
    position_of = functools.partial(_position, config)

    def slot_of(step: Array) -> Array:
        return lax.rem(step, jnp.int32(config.stages))

    def hide(tile: Tile, position: Array, s: Array) -> Array:
        """Set the logits of keys that a query does not see to -inf, in blocks that have such keys."""
        ahead = position - tile.position - first_row
        partly = ahead + kv_tile > 1 if mask.causal else position + kv_tile > tile.key_stop
        if mask.bounded:
            partly |= position < tile.key_low
        if mask.window is not None:
            partly |= ahead < ROWS - mask.window

        def apply(s: Array) -> Array:
            row, column = (
                plgpu.broadcasted_iota(jnp.int32, s.shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
            )
            seen = column - row <= -ahead if mask.causal else column < tile.key_stop - position
            if mask.bounded:
                seen &= column >= tile.key_low - position
            if mask.window is not None:
                seen &= column - row > -ahead - mask.window
            return jnp.where(seen, s, -jnp.inf)

        return lax.cond(partly, apply, lambda s: s, s)

    def clean(tile: Tile, position: Array, slot: Array) -> None:
        """Zero the values that may be NaN, which a weight of 0 would not hide."""

        @pl.when((position < tile.clean_start) | (position + kv_tile > tile.clean_stop))
        def _zero() -> None:
            for part in range(0, kv_tile, ROWS):
                smem = shared.v.at[slot, pl.ds(part, ROWS)]
                at = plgpu.broadcasted_iota(jnp.int32, (ROWS, head_dim), 0, layout=plgpu.Layout.WGMMA)
                at += position + part
                known = (at >= tile.clean_start) & (at < tile.clean_stop)
                smem[...] = jnp.where(known, smem[...], jnp.zeros((), shared.v.dtype))
            plgpu.commit_smem()

    def softmax(s: Array, maximum: Array) -> tuple[Array, Array, Array]:
        """The new maximum, in base 2 and scaled, the weights' sum and the weights."""
        maximum = jnp.maximum(maximum, s.max(axis=1) * log2_scale)
        p = jnp.exp2(s * log2_scale - _broadcast(maximum, s.shape))
        return maximum, p.sum(axis=1), p

    def attend_tile(tile: Tile, buffer: Array, blocks: Array, before: Array) -> tuple[Array, Array]:
        """The weighted values [ROWS, H] and the sums of weights."""

        def multiply_qk(s_ref: Any, slot: Array) -> None:
            plgpu.wgmma(s_ref, shared.q.at[buffer, pl.ds(first_row, ROWS)], shared.k.at[slot].transpose((1, 0)))

        def first_qk(s_ref: Any) -> Array:
            multiply_qk(s_ref, slot_of(before))
            return s_ref[...]

        def step(index: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            slot, last = slot_of(before + index), slot_of(before + index - 1)
            acc, p, maximum, total = carry
            plgpu.barrier_wait(shared.k_full.at[slot])
            clean(tile, position_of(tile, blocks, index - 1), last)

            def products(refs: tuple[Any, ...]) -> None:
                acc_ref, s_ref, weights_ref, maximum_ref, sum_ref = refs
                wait_turn()
                if config.qk_first:
                    multiply_qk(s_ref, slot)
                plgpu.wgmma(acc_ref, p, shared.v.at[last])
                if not config.qk_first:
                    multiply_qk(s_ref, slot)
                pass_turn()
                s = lax.optimization_barrier(plgpu.wgmma_accumulator_load(s_ref, wait_n=1 if config.qk_first else 0))
                plgpu.barrier_arrive(shared.k_empty.at[slot])
                s = hide(tile, position_of(tile, blocks, index), s)
                softmaxed = lax.optimization_barrier(softmax(s, maximum))
                maximum_ref[...], sum_ref[...], weights_ref[...] = softmaxed
                # ptxas would wait for the products before the softmax, were the two not parted by a branch.
                plgpu.barrier_wait(shared.v_full.at[slot])

            blank = _zeros((ROWS, kv_tile))
            accumulators = (plgpu.WGMMAAccumulatorRef.init(acc), plgpu.WGMMAAccumulatorRef.init(blank))
            acc, _, weights, new_maximum, new_sum = pl.run_state(products)((*accumulators, blank, maximum, total))
            # The products read p's registers until here: the new weights may not overwrite them earlier.
            acc, weights = lax.optimization_barrier((acc, weights))
            plgpu.barrier_arrive(shared.v_empty.at[last])
            decay = jnp.exp2(maximum - new_maximum)
            acc = acc * _broadcast(decay, acc.shape)
            return acc, weights.astype(p.dtype), new_maximum, total * decay + new_sum

        plgpu.barrier_wait(shared.q_full.at[buffer])
        plgpu.barrier_wait(shared.k_full.at[slot_of(before)])
        s = pl.run_scoped(first_qk, plgpu.WGMMAAccumulatorRef((ROWS, kv_tile)))
        plgpu.barrier_arrive(shared.k_empty.at[slot_of(before)])
        nothing = plgpu.layout_cast(jnp.full((ROWS,), NOTHING, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        maximum, total, weights = softmax(hide(tile, position_of(tile, blocks, jnp.int32(0)), s), nothing)
        plgpu.barrier_wait(shared.v_full.at[slot_of(before)])
        carry = (_zeros((ROWS, head_dim)), weights.astype(shared.q.dtype), maximum, total)
        acc, p, _, total = lax.fori_loop(1, blocks, step, carry)
        plgpu.barrier_arrive(shared.q_empty.at[buffer])
        last = slot_of(before + blocks - 1)
        clean(tile, tile.key_start, last)
        last_pv: Any = pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, p, shared.v.at[last]))
        acc = last_pv(plgpu.WGMMAAccumulatorRef.init(acc))
        plgpu.barrier_arrive(shared.v_empty.at[last])
        return acc, total

    def store(tile: Tile, head: Array, result: Array) -> None:
        token = tile.query_start + first_row
        whole = (token >= tile.store_start) & (token + ROWS <= tile.store_stop)

        @pl.when(whole)
        def _whole() -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
            smem = shared.out.at[pl.ds(first_row, ROWS)]
            smem[...] = result
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem, out_gmem.at[pl.ds(pl.multiple_of(token, ALIGNMENT), ROWS), head])

        @pl.when(jnp.logical_not(whole))
        def _part() -> None:
            store_rows(out_gmem, result, token, tile.store_start, tile.store_stop, head * head_dim)

    def consume(tile: Tile, head: Array, turn: Array, blocks: Array, before: Array) -> None:
        ones = plgpu.layout_cast(jnp.ones((ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        acc, total = lax.cond(
            blocks > 0,
            lambda: attend_tile(tile, lax.rem(turn, jnp.int32(config.query_buffers)), blocks, before),
            lambda: (_zeros((ROWS, head_dim)), ones),
        )
        store(tile, head, (acc * _broadcast(out_scale / total, acc.shape)).astype(out_gmem.dtype))

    for_each_tile(consume)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _zeros(shape: tuple[int, int]) -> Array:
    """Zeros in registers, laid out as wgmma's accumulators."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _broadcast(rows: Array, shape: tuple[int, ...]) -> Array:
    return lax.broadcast_in_dim(rows, shape, (0,))
