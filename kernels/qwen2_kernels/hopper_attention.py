"""The attention kernel for NVIDIA Hopper that `flash_attention.mosaic` and `paged_attention.mosaic` share.

Its design is FlashAttention-3's (Shah et al. 2024), in Pallas Mosaic GPU. A program of the grid runs a warpgroup that
copies tiles of keys and values to shared memory with TMA, and two or three that each attend with 64 queries: QK^T and
PV on the tensor cores (wgmma), between them an online softmax in base 2. Consumers take turns at issuing products, so
that one's softmax runs beside another's products; each also issues the next QK^T together with the last PV.

What is attended lies in a table of tiles (`make_tiles`): up to 64 * consumers queries of one row, and the blocks of
keys they see. Programs are as many as the GPU has SMs; each works off tiles of falling cost.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

ROWS = 64
"""Queries of a consumer: the height of a wgmma."""
ALIGNMENT = 8
"""TMA reads and writes the tiles of shared memory in groups of 8 tokens: tiles start at multiples of it."""
NOTHING = -1e30
"""The maximum of no logits. Finite, so that exp2(-inf - NOTHING) is 0 and exp2(NOTHING - NOTHING) is no NaN."""
_TURN = 5  # The first free hardware barrier: 0 is a block's, and each of up to four warpgroups has its own.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel is laid out on the GPU."""

    consumers: int = 2
    """Warpgroups that attend, of 64 queries each."""
    kv_tile: int = 128
    """Keys in one step of the softmax."""
    stages: int = 2
    """Blocks of keys and values in shared memory."""
    programs: int | None = 132
    """Programs of the grid, each of which works off many tiles; None gives each tile and head its own."""
    qk_first: bool = True
    """Issue the next block's QK^T before the last block's PV, not after it."""
    take_turns: bool = True
    """Let one consumer at a time issue products."""

    @property
    def query_tile(self) -> int:
        """Queries of a program at a time."""
        return ROWS * self.consumers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys a query sees, and where values may be anything."""

    causal: bool
    window: int | None
    bounded: bool
    """Keys of a tile's first block may lie before `Tile.key_low`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """A row of the table of tiles. Positions count keys: of all prompts together, or of one row's pages."""

    row: Array
    query_start: Array
    """The first query's token, a multiple of 8; it may lie before the row's first."""
    store_start: Array
    store_stop: Array
    """The tokens whose results are stored."""
    position: Array
    """The first query's position."""
    key_start: Array
    """Where the first block starts."""
    key_low: Array
    key_stop: Array
    """The positions that any query of the tile sees."""
    clean_start: Array
    clean_stop: Array
    """Values at other positions may be NaN."""


Loader = Callable[..., None]
_FIELDS = dataclasses.fields(Tile)


def _turn(action: str, index: Array) -> None:
    """Synchronise on hardware barrier `index` with one other warpgroup, or (`arrive`) only let that one pass."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def emit(_: Any, barrier: Any) -> None:
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [barrier.registers[()]], f"bar.{action} $0, 256;", "r", has_side_effects=True)

    emit(index)


def _store_rows(out: Any, values: Array, token: Array, start: Array, stop: Array, column: Array) -> None:
    """Store rows of `values`, of tokens `token`, `token` + 1, ..., that lie within [start, stop), from registers."""
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, splat, splat, splat, splat))
    def emit(_: Any, out: Any, values: Any, *scalars: Any) -> None:
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        token, start, stop, column = (scalar.registers[()] for scalar in scalars)
        stride = mgpu.c(ir.MemRefType(out.type).get_strides_and_offset()[0][0], i64)
        base = mgpu.utils.memref_ptr(out)
        indices = values.layout.thread_idxs(values.shape)
        for register, (row, col) in zip(values.registers.flat, indices, strict=True):
            at = arith.addi(token, arith.index_cast(i32, row))
            inside = arith.andi(
                arith.cmpi(arith.CmpIPredicate.sge, at, start), arith.cmpi(arith.CmpIPredicate.slt, at, stop)
            )
            offset = arith.muli(arith.extsi(i64, at), stride)
            offset = arith.addi(offset, arith.extsi(i64, arith.addi(column, arith.index_cast(i32, col))))
            pointer = mgpu.utils.getelementptr(base, [offset], values.mlir_dtype)
            ptx = "{ .reg .pred p; setp.ne.b32 p, $0, 0; @p st.global.b32 [$1], $2; }"
            operands = [arith.extui(i32, inside), pointer, mgpu.utils.bitcast(register, i32)]
            llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, ptx, "r,l,r", has_side_effects=True)

    emit(out, values, token, start, stop, column)


def _broadcast(rows: Array, shape: tuple[int, ...]) -> Array:
    return lax.broadcast_in_dim(rows, shape, (0,))


def attend(
    q: Array,
    k: Array,
    v: Array,
    tiles: tuple[Array, Array],
    *indices: Array,
    loader: Loader,
    copies: int = 1,
    scale: float,
    out_scale: float = 1.0,
    mask: Mask,
    config: Config,
) -> Array:
    """Run the kernel.

    Args:
        q: queries [T, N, H]; T is a multiple of 8, H of 64.
        k, v: keys and values [S, K, H]; query head n reads head n // (N / K).
        tiles: what `make_tiles` returns.
        indices: what else `loader` reads.
        loader: `loader((k or v, *indices), smem, barrier, position, tile, head)` starts copying the keys or values from
            `position` on to shared memory, in `copies` copies that arrive at `barrier`.
        scale, out_scale: what logits and results are multiplied by.

    Returns:
        [T, N, H] in `q`'s dtype; tokens of no tile are not written.
    """
    heads, head_dim = q.shape[1:]
    transforms = (plgpu.TilingTransform((ALIGNMENT, 64)), plgpu.SwizzleTransform(128))
    rows = plgpu.SMEM((config.query_tile, head_dim), q.dtype, transforms=transforms)
    blocks = plgpu.SMEM((config.stages, config.kv_tile, head_dim), q.dtype, transforms=transforms)
    full = plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages)
    empty = plgpu.Barrier(num_arrivals=config.consumers, num_barriers=config.stages)
    body = functools.partial(
        _program, loader=loader, scale=scale, out_scale=out_scale, mask=mask, config=config, group=heads // k.shape[1]
    )
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(tiles[0].shape[0] * heads if config.programs is None else config.programs,),
        grid_names=("program",),
        num_threads=config.consumers + 1,
        thread_name="warpgroup",
        kernel_name="hopper_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        scratch_types=dict(
            q_smem=rows,
            o_smem=rows,
            k_smem=blocks,
            v_smem=blocks,
            q_full=plgpu.Barrier(),
            q_empty=plgpu.Barrier(num_arrivals=config.consumers),
            k_full=full,
            k_empty=empty,
            v_full=full,
            v_empty=empty,
        ),
    )
    return kernel(q, k, v, *tiles, *indices)


def _program(
    q_gmem: Any,
    k_gmem: Any,
    v_gmem: Any,
    tiles_gmem: Any,
    num_tiles_gmem: Any,
    *rest: Any,
    loader: Loader,
    scale: float,
    out_scale: float,
    mask: Mask,
    config: Config,
    group: int,
    q_smem: Any,
    o_smem: Any,
    k_smem: Any,
    v_smem: Any,
    q_full: Any,
    q_empty: Any,
    k_full: Any,
    k_empty: Any,
    v_full: Any,
    v_empty: Any,
) -> None:
    """What one program does. The last of `rest` is the result, the others are the loader's indices."""
    *indices, out_gmem = rest
    heads, head_dim = q_gmem.shape[1:]
    stages, kv_tile = config.stages, config.kv_tile
    warpgroup = lax.axis_index("warpgroup")
    program, programs = lax.axis_index("program"), lax.axis_size("program")

    def for_each_tile(body: Callable[[Tile, Array, Array, Array], None]) -> None:
        """Call `body(tile, head, blocks, blocks before)` for this program's tiles.

        They are dealt out back and forth: costs fall along the table, so that all programs get nearly the same.
        """
        items = num_tiles_gmem[0] * heads

        def place(turn: Array) -> Array:
            return jnp.where(lax.rem(turn, jnp.int32(2)) == 0, program, programs - 1 - program)

        def deal(turn: Array, before: Array) -> Array:
            item = turn * programs + place(turn)
            index, head = lax.div(item, jnp.int32(heads)), lax.rem(item, jnp.int32(heads))
            tile = Tile(**{field.name: tiles_gmem[index, column] for column, field in enumerate(_FIELDS)})
            blocks = lax.div(tile.key_stop - tile.key_start + (kv_tile - 1), jnp.int32(kv_tile))
            body(tile, head, blocks, before)
            return before + blocks

        full, left = lax.div(items, jnp.int32(programs)), lax.rem(items, jnp.int32(programs))
        lax.fori_loop(0, full + (place(full) < left).astype(jnp.int32), deal, jnp.int32(0))

    def slot_of(step: Array) -> Array:
        return lax.rem(step, jnp.int32(stages))

    def position_of(tile: Tile, blocks: Array, index: Array) -> Array:
        """Blocks are visited from the last to the first: what masks hide lies mostly in the last."""
        return tile.key_start + (blocks - 1 - index) * kv_tile

    @pl.when(warpgroup == config.consumers)
    def _produce() -> None:
        plgpu.set_max_registers(24 if config.consumers == 2 else 32, action="decrease")

        def load(tile: Tile, head: Array, blocks: Array, before: Array) -> None:
            @pl.when(blocks > 0)
            def _queries() -> None:
                pl.when(before > 0)(lambda: plgpu.barrier_wait(q_empty))
                source = pl.ds(pl.multiple_of(tile.query_start, ALIGNMENT), config.query_tile)
                plgpu.copy_gmem_to_smem(q_gmem.at[source, head], q_smem, q_full)

            def load_block(index: Array, _: None) -> None:
                step = before + index
                slot, position = slot_of(step), position_of(tile, blocks, index)
                for gmem, smem, full, empty in (
                    (k_gmem, k_smem, k_full, k_empty),
                    (v_gmem, v_smem, v_full, v_empty),
                ):
                    pl.when(step >= stages)(functools.partial(plgpu.barrier_wait, empty.at[slot]))
                    loader(
                        (gmem, *indices), smem.at[slot], full.at[slot], position, tile, lax.div(head, jnp.int32(group))
                    )

            lax.fori_loop(0, blocks, load_block, None)

        for_each_tile(load)

    @pl.when(warpgroup < config.consumers)
    def _consume() -> None:
        plgpu.set_max_registers(240 if config.consumers == 2 else 160, action="increase")
        first_row = warpgroup * ROWS
        log2_scale = scale * math.log2(math.e)
        next_consumer = lax.rem(warpgroup + 1, jnp.int32(config.consumers))
        wait_turn = functools.partial(_turn, "sync", _TURN + warpgroup) if config.take_turns else lambda: None
        pass_turn = functools.partial(_turn, "arrive", _TURN + next_consumer) if config.take_turns else lambda: None
        pl.when(warpgroup == config.consumers - 1)(pass_turn)

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
                    smem = v_smem.at[slot, pl.ds(part, ROWS)]
                    at = plgpu.broadcasted_iota(jnp.int32, (ROWS, head_dim), 0, layout=plgpu.Layout.WGMMA)
                    at += position + part
                    known = (at >= tile.clean_start) & (at < tile.clean_stop)
                    smem[...] = jnp.where(known, smem[...], jnp.zeros((), v_smem.dtype))
                plgpu.commit_smem()

        def softmax(s: Array, maximum: Array) -> tuple[Array, Array, Array]:
            """The new maximum, in base 2 and scaled, the weights' sum and the weights."""
            maximum = jnp.maximum(maximum, s.max(axis=1) * log2_scale)
            p = jnp.exp2(s * log2_scale - _broadcast(maximum, s.shape))
            return maximum, p.sum(axis=1), p

        def multiply_qk(s_ref: Any, slot: Array) -> None:
            plgpu.wgmma(s_ref, q_smem.at[pl.ds(first_row, ROWS)], k_smem.at[slot].transpose((1, 0)))

        def attend_tile(tile: Tile, blocks: Array, before: Array) -> tuple[Array, Array]:
            """The weighted values [ROWS, H] and the sums of weights."""

            def first_qk(s_ref: Any) -> Array:
                multiply_qk(s_ref, slot_of(before))
                return s_ref[...]

            def step(index: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                slot, last = slot_of(before + index), slot_of(before + index - 1)
                acc, p, maximum, total = carry
                plgpu.barrier_wait(k_full.at[slot])
                clean(tile, position_of(tile, blocks, index - 1), last)

                def products(refs: tuple[Any, ...]) -> None:
                    acc_ref, s_ref, weights_ref, maximum_ref, sum_ref = refs
                    wait_turn()
                    if config.qk_first:
                        multiply_qk(s_ref, slot)
                    plgpu.wgmma(acc_ref, p, v_smem.at[last])
                    if not config.qk_first:
                        multiply_qk(s_ref, slot)
                    pass_turn()
                    s = lax.optimization_barrier(
                        plgpu.wgmma_accumulator_load(s_ref, wait_n=1 if config.qk_first else 0)
                    )
                    plgpu.barrier_arrive(k_empty.at[slot])
                    s = hide(tile, position_of(tile, blocks, index), s)
                    softmaxed = lax.optimization_barrier(softmax(s, maximum))
                    maximum_ref[...], sum_ref[...], weights_ref[...] = softmaxed
                    # ptxas would wait for the products before the softmax, were the two not parted by a branch.
                    plgpu.barrier_wait(v_full.at[slot])

                blank = zeros((ROWS, kv_tile))
                refs = (plgpu.ACC.init(acc), plgpu.ACC.init(blank), blank, maximum, total)
                acc, _, weights, new_maximum, new_sum = pl.run_state(products)(refs)
                # The products read p's registers until here: the new weights may not overwrite them earlier.
                acc, weights = lax.optimization_barrier((acc, weights))
                plgpu.barrier_arrive(v_empty.at[last])
                decay = jnp.exp2(maximum - new_maximum)
                acc = acc * _broadcast(decay, acc.shape)
                return acc, weights.astype(p.dtype), new_maximum, total * decay + new_sum

            plgpu.barrier_wait(q_full)
            plgpu.barrier_wait(k_full.at[slot_of(before)])
            s = pl.run_scoped(first_qk, plgpu.ACC((ROWS, kv_tile)))
            plgpu.barrier_arrive(k_empty.at[slot_of(before)])
            nothing = plgpu.layout_cast(jnp.full((ROWS,), NOTHING, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
            maximum, total, weights = softmax(hide(tile, position_of(tile, blocks, jnp.int32(0)), s), nothing)
            plgpu.barrier_wait(v_full.at[slot_of(before)])
            carry = (zeros((ROWS, head_dim)), weights.astype(q_smem.dtype), maximum, total)
            acc, p, _, total = lax.fori_loop(1, blocks, step, carry)
            plgpu.barrier_arrive(q_empty)
            last = slot_of(before + blocks - 1)
            clean(tile, tile.key_start, last)
            acc = pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, p, v_smem.at[last]))(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(v_empty.at[last])
            return acc, total

        def store(tile: Tile, head: Array, result: Array) -> None:
            token = tile.query_start + first_row
            whole = (token >= tile.store_start) & (token + ROWS <= tile.store_stop)

            @pl.when(whole)
            def _whole() -> None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
                smem = o_smem.at[pl.ds(first_row, ROWS)]
                smem[...] = result
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(smem, out_gmem.at[pl.ds(pl.multiple_of(token, ALIGNMENT), ROWS), head])

            @pl.when(jnp.logical_not(whole))
            def _part() -> None:
                _store_rows(out_gmem, result, token, tile.store_start, tile.store_stop, head * head_dim)

        def consume(tile: Tile, head: Array, blocks: Array, before: Array) -> None:
            ones = plgpu.layout_cast(jnp.ones((ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
            acc, total = lax.cond(
                blocks > 0,
                lambda: attend_tile(tile, blocks, before),
                lambda: (zeros((ROWS, head_dim)), ones),
            )
            store(tile, head, (acc * _broadcast(out_scale / total, acc.shape)).astype(out_gmem.dtype))

        for_each_tile(consume)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def zeros(shape: tuple[int, int]) -> Array:
    """Zeros in registers, laid out as wgmma's accumulators."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def check(q: Array, k: Array, v: Array) -> None:
    """Raise NotImplementedError for what the kernel does not do."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise NotImplementedError(f"mosaic: bfloat16 or float16 throughout, not {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[-1] not in (64, 128):
        raise NotImplementedError(f"mosaic: head dimensions 64 and 128, not {q.shape[-1]}")
    if q.shape[0] % ALIGNMENT:
        raise NotImplementedError(f"mosaic: a number of tokens that {ALIGNMENT} divides, not {q.shape[0]}")


def make_tiles(
    query_start_loc: Array,
    tokens: int,
    *,
    positions: Array,
    key_low: Array,
    key_stop: Array,
    clean_start: Array,
    clean_stop: Array,
    mask: Mask,
    config: Config,
    skip_single: bool = False,
) -> tuple[Array, Array]:
    """Cut rows into tiles, and what lies behind the last row into tiles that are zeroed.

    Args:
        query_start_loc: [R+1], where each row's queries start, and the end.
        tokens: T.
        positions: [R], the position of each row's first query.
        key_low, key_stop: [R], each row's keys.
        clean_start, clean_stop: [R], where each row's values are sure not to be NaN.
        skip_single: leave out rows of one query.

    Returns:
        The table of tiles by falling cost, int32 [tiles, fields of `Tile`], and the number of real ones, [1].
    """
    query_tile, kv_tile = config.query_tile, config.kv_tile
    starts = query_start_loc.astype(jnp.int32)
    end = starts[-1:]
    lens = jnp.append(jnp.diff(starts), tokens - end)
    rows = lens.shape[0]
    origins = starts // ALIGNMENT * ALIGNMENT
    counts = jnp.where(lens > 0, -(-(starts + lens - origins) // query_tile), 0)
    if skip_single:
        counts = counts.at[:-1].set(jnp.where(lens[:-1] == 1, 0, counts[:-1]))
    ends = jnp.cumsum(counts)
    index = jnp.arange((tokens + rows * (query_tile + ALIGNMENT - 2)) // query_tile + 1, dtype=jnp.int32)
    row = jnp.minimum((ends[None, :] <= index[:, None]).sum(axis=1, dtype=jnp.int32), rows - 1)
    query_start = origins[row] + (index - (ends - counts)[row]) * query_tile
    store_start = jnp.maximum(query_start, starts[row])
    store_stop = jnp.minimum(query_start + query_tile, starts[row] + lens[row])
    # The tokens behind the last row see no key.
    position, low, stop, clean_start, clean_stop = (
        jnp.append(array, 0)[row] for array in (positions, key_low, key_stop, clean_start, clean_stop)
    )
    position = position - starts[row]
    if mask.causal:
        stop = jnp.minimum(stop, position + store_stop)
    block = low // ALIGNMENT * ALIGNMENT
    if mask.window is not None:
        low = jnp.maximum(low, position + store_start - mask.window + 1)
        block += jnp.maximum(low - block, 0) // kv_tile * kv_tile
    stop = jnp.where(stop > low, stop, block)
    tile = Tile(
        row=row,
        query_start=query_start,
        store_start=store_start,
        store_stop=store_stop,
        position=position + query_start,
        key_start=block,
        key_low=low,
        key_stop=stop,
        clean_start=clean_start,
        clean_stop=clean_stop,
    )
    cost = jnp.where(index < ends[-1], (stop - block + kv_tile - 1) // kv_tile, -1)
    table = jnp.stack([getattr(tile, field.name) for field in _FIELDS], axis=1)
    return table[jnp.argsort(cost, descending=True)], ends[-1:]
