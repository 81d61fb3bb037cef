"""A gated projection with its adapters in one kernel on Hopper: `linear`'s, which adds the adapters' second products.

What Triton's shrink kernel leaves of the first products is put together for tiles of tokens: for each entry of the
step's tables a matrix of its window's tokens, zeros where they do not add the page. Behind the model's own kernel, a
program multiplies them by its columns of the pages of its window, one after another, on the tensor cores.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen2_kernels.launch import triton_call
from qwen2_kernels.linear.mosaic import check, make_kernel, swizzled
from qwen2_kernels.linear.mosaic_config import ALIGNMENT, MosaicConfig
from qwen2_kernels.linear.mosaic_program import Item, Plan, program
from qwen2_kernels.lora.batch import GATE_UP_PROJECTION, RANKS, LoRABatch
from qwen2_kernels.lora.config import default_config as default_lora_config
from qwen2_kernels.lora.triton_lora import shrink
from qwen2_kernels.lora.triton_window import window_ranks_kernel
from qwen2_kernels.lowering import lowered_once

PARTS = 2
"""Gate and up."""
PAGE_STAGES = 2
"""Pages in shared memory."""


def lora_linear_gated_mosaic(
    x: Array,
    kernel: Array,
    a_bank: Array,
    b_bank: Array,
    batch: LoRABatch,
    num_tokens: Array | None = None,
    *,
    activation: str,
    config: MosaicConfig | None = None,
) -> Array:
    """See `linear_gated.lora_linear_gated`, which checks what this takes."""
    del activation  # silu is the only one
    tiles = default_lora_config(x.shape[0], x.shape[1], kernel.shape[1], batch.tile, is_gated=True)
    ranks = shrink(x, a_bank, batch, GATE_UP_PROJECTION, tiles.shrink)
    config = config or default_gated_config()
    ranks = window_ranks(ranks, batch, x.dtype)
    assert batch.entry_items is not None
    pages = batch.item_pages[batch.entry_items]
    return add_and_gate(x, kernel, ranks, b_bank, pages, batch.window_entries, num_tokens, config=config)


def default_gated_config() -> MosaicConfig:
    """Return tiles that suit an H100 for many tokens, and that leave room for the adapters' in shared memory."""
    return MosaicConfig(block_n=144, consumers=2, stages=3, cluster=2, share="weights", piece_bytes=32)


def shared_memory(config: MosaicConfig) -> int:
    """Return the bytes of shared memory that a program needs."""
    page = PARTS * (config.token_tile + config.block_n) * RANKS * 2
    return config.shared_memory(config.token_tile, gated=True, out_bytes=2) + PAGE_STAGES * page


def window_ranks(ranks: Array, batch: LoRABatch, dtype: jnp.dtype) -> Array:
    """Return the first products of each entry's window [E * 2 * window, RANKS], of what `shrink` returns."""
    assert batch.window is not None and batch.entry_items is not None and batch.window_entries is not None
    entries = len(batch.entry_items)
    block = min(batch.window, 32)
    return triton_call(
        ranks,
        batch.token_order,
        batch.token_places,
        batch.segment_starts,
        batch.segment_items,
        batch.item_segments,
        batch.item_modules,
        batch.entry_items,
        batch.entry_tokens,
        batch.window_entries,
        kernel=window_ranks_kernel,
        out_type=jax.ShapeDtypeStruct((entries * PARTS * batch.window, RANKS), dtype),
        grid=(entries, batch.window // block),
        num_warps=4,
        num_stages=1,
        WINDOWS=len(batch.window_entries) - 1,
        SLICES=PARTS,
        FIRST_MODULE=GATE_UP_PROJECTION.modules[0],
        MAX_PAGES=batch.max_pages,
        SPLITS=ranks.shape[2],
        TILE=batch.tile,
        WINDOW=batch.window,
        BLOCK_T=block,
    )


@functools.partial(jax.jit, static_argnames=("config",))
def add_and_gate(
    x: Array,
    kernel: Array,
    ranks: Array,
    b_bank: Array,
    pages: Array,
    windows: Array,
    num_tokens: Array | None,
    *,
    config: MosaicConfig,
) -> Array:
    """Return [T, F] of x [T, D], kernel [2, F, D], `window_ranks` and the tables' pages and windows.

    Tokens behind the first `num_tokens` are left out where they fill tiles; None means all.
    """
    tokens = x.shape[0]
    x = jnp.pad(x, ((0, -tokens % ALIGNMENT), (0, 0)))
    plan = Plan(config=config, tokens=x.shape[0], out_features=kernel.shape[1], in_features=x.shape[1], gated=True)
    check(plan, x.dtype)
    counted = jnp.full(1, tokens, jnp.int32) if num_tokens is None else num_tokens[None]
    return _launch(x, kernel, ranks, b_bank, pages, windows, counted, plan=plan)[:tokens]


@functools.partial(lowered_once, static_argnames=("plan",))
def _launch(x: Array, *arrays: Array, plan: Plan) -> Array:
    config, layout = plan.config, swizzled(RANKS, x.dtype)
    launch = make_kernel(
        plan,
        jax.ShapeDtypeStruct((x.shape[0], plan.out_features), x.dtype),
        functools.partial(_program, plan=plan),
        ranks=plgpu.SMEM((PAGE_STAGES, PARTS, config.token_tile, RANKS), x.dtype, transforms=layout),
        factors=plgpu.SMEM((PAGE_STAGES, PARTS, RANKS, config.block_n), x.dtype, transforms=layout),
        page_full=plgpu.Barrier(num_arrivals=2 * PARTS, num_barriers=PAGE_STAGES),
        page_empty=plgpu.Barrier(num_arrivals=config.consumers, num_barriers=PAGE_STAGES),
    )
    return launch(x, *arrays)


def _program(
    x_gmem: Any,
    kernel_gmem: Any,
    ranks_gmem: Any,
    b_gmem: Any,
    pages_gmem: Any,
    windows_gmem: Any,
    num_tokens_gmem: Any,
    out_gmem: Any,
    *,
    plan: Plan,
    ranks: Any,
    factors: Any,
    page_full: Any,
    page_empty: Any,
    **scratch: Any,
) -> None:
    pages = _Pages(
        plan=plan,
        ranks_gmem=ranks_gmem,
        b_gmem=b_gmem,
        pages_gmem=pages_gmem,
        windows_gmem=windows_gmem,
        ranks=ranks,
        factors=factors,
        full=page_full,
        empty=page_empty,
    )
    program(x_gmem, kernel_gmem, out_gmem, plan=plan, num_tokens_gmem=num_tokens_gmem, addend=pages, **scratch)


@dataclass(frozen=True, kw_only=True)
class _Pages:
    """The adapters' pages as an addend: see `mosaic_program.Addend`."""

    plan: Plan
    ranks_gmem: Any
    """[E * 2 * window, RANKS]"""
    b_gmem: Any
    """[P, RANKS, 2, F]"""
    pages_gmem: Any
    """[E]"""
    windows_gmem: Any
    """[W + 1]"""
    ranks: Any
    """In shared memory [stages, 2, tokens, RANKS]"""
    factors: Any
    """In shared memory [stages, 2, RANKS, block_n]"""
    full: Any
    empty: Any

    def prepare(self) -> None:
        """Let the first pages come."""
        for slot in range(PAGE_STAGES):
            plgpu.barrier_arrive(self.empty.at[slot])

    def load(self, item: Item) -> None:
        """Copy the ranks and factors of the window's entries, one after another."""
        tokens, columns = self.plan.config.token_tile, self.plan.config.block_n

        def load_page(index: Array, _: None) -> None:
            page, slot = self.pages_gmem[index], self._slot(index)
            plgpu.barrier_wait(self.empty.at[slot])
            full = self.full.at[slot]
            features = pl.ds(pl.multiple_of(item.feature, ALIGNMENT), columns)
            for part in range(PARTS):
                rows = pl.ds(pl.multiple_of((index * PARTS + part) * tokens, tokens), tokens)
                plgpu.copy_gmem_to_smem(self.ranks_gmem.at[rows], self.ranks.at[slot, part], full)
                plgpu.copy_gmem_to_smem(self.b_gmem.at[page, :, part, features], self.factors.at[slot, part], full)

        lax.fori_loop(*self._entries(item), load_page, None)

    def multiply(self, item: Item, sums: Sequence[Any], first_row: Array) -> None:
        """Add the products of ranks and factors to the sums."""
        config = self.plan.config
        columns = [pl.ds(part * config.block_n, config.block_n) for part in range(PARTS)]
        targets = sums if len(sums) == PARTS else [sums[0].at[:, some] for some in columns]

        def multiply_page(index: Array, _: None) -> None:
            slot = self._slot(index)
            plgpu.barrier_wait(self.full.at[slot])
            for part, target in enumerate(targets):
                ranks = self.ranks.at[slot, part, pl.ds(first_row, config.rows)]
                plgpu.wgmma(target, ranks, self.factors.at[slot, part])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(self.empty.at[slot])

        lax.fori_loop(*self._entries(item), multiply_page, None)

    def finish(self) -> None:
        """Wait until the last pages have been read."""
        for slot in range(PAGE_STAGES):
            plgpu.barrier_wait(self.empty.at[slot])

    def _slot(self, entry: Array) -> Array:
        return lax.rem(entry, jnp.int32(PAGE_STAGES))

    def _entries(self, item: Item) -> tuple[Array, Array]:
        """Return the first entry of a tile's window and the one behind its last; a tile of padding has none."""
        last = self.windows_gmem.shape[0] - 1
        window = lax.div(item.token, jnp.int32(self.plan.config.token_tile))
        first, end = (self.windows_gmem[jnp.minimum(index, last)] for index in (window, window + 1))
        return first, end
