"""`lora_delta` and `lora_gated` in Triton: a launch for the first products, one for the second and what follows."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qwen2_kernels.launch import triton_call
from qwen2_kernels.lora.batch import GATE_UP_PROJECTION, RANKS, LoRABatch, LoRAProjection
from qwen2_kernels.lora.config import DOT, Config, ExpandConfig, ShrinkConfig, default_config
from qwen2_kernels.lora.triton_expand import expand_dot_kernel, expand_vector_kernel
from qwen2_kernels.lora.triton_gated import gated_dot_kernel, gated_vector_kernel
from qwen2_kernels.lora.triton_shrink import shrink_dot_kernel, shrink_vector_kernel

MOST_PAGES = 4
"""Pages that the expand kernels multiply by at once."""


def lora_delta_triton(
    x: Array,
    a_bank: Array,
    b_bank: Array,
    bias_bank: Array | None,
    batch: LoRABatch,
    *,
    projection: LoRAProjection,
    config: Config | None = None,
) -> Array:
    """See `api.lora_delta`.

    Raises:
        NotImplementedError: dtypes other than bfloat16 and float32, or banks' that are not `x`'s.
    """
    _check_dtypes(x, a_bank, b_bank)
    tokens, columns = x.shape[0], b_bank.shape[2]
    config = config or default_config(tokens, x.shape[1], columns, batch.tile, is_gated=False)
    ranks = shrink(x, a_bank, batch, projection, config.shrink)
    group, width = projection.heads or (0, columns)
    heads = 1 if group == 0 else columns // (width * (group + 2))
    expand = replace(config.expand, block_n=min(config.expand.block_n, _power_of_two(width)))
    tiles = -(-width // expand.block_n) * heads
    programs = sum(-(-tiles * blocks // expand.num_tiles) for blocks in ((group, 1, 1) if group else (1,)))
    return triton_call(
        ranks,
        b_bank,
        # A bias that is not there is never read: `ranks` stands in for it.
        ranks if bias_bank is None else bias_bank,
        *_segment_tables(batch),
        kernel=expand_dot_kernel if expand.kind == DOT else expand_vector_kernel,
        out_type=jax.ShapeDtypeStruct((tokens, columns), x.dtype),
        N=columns,
        HEADS=heads,
        GROUP=group,
        WIDTH=width,
        SLICES=len(projection.modules),
        FIRST_MODULE=projection.modules[0],
        HAS_BIAS=bias_bank is not None,
        **_expand_options(expand, batch, programs, ranks.shape[2]),
    )


def lora_gated_triton(
    x: Array,
    base: Array,
    a_bank: Array,
    b_bank: Array,
    bias_bank: Array | None,
    scale_bank: Array | None,
    batch: LoRABatch,
    *,
    activation: str,
    config: Config | None = None,
) -> Array:
    """See `api.lora_gated`.

    Raises:
        NotImplementedError: dtypes other than bfloat16 and float32, or banks' that are not `x`'s.
    """
    _check_dtypes(x, a_bank, b_bank)
    tokens, columns = x.shape[0], b_bank.shape[3]
    config = config or default_config(tokens, x.shape[1], columns, batch.tile, is_gated=True)
    ranks = shrink(x, a_bank, batch, GATE_UP_PROJECTION, config.shrink)
    expand = replace(config.expand, block_n=min(config.expand.block_n, _power_of_two(columns)))
    programs = -(-columns // (expand.block_n * expand.num_tiles))
    return triton_call(
        ranks,
        base,
        b_bank,
        # A bank that is not there is never read: `ranks` stands in for it.
        *(ranks if bank is None else bank for bank in (bias_bank, scale_bank)),
        *_segment_tables(batch),
        kernel=gated_dot_kernel if expand.kind == DOT else gated_vector_kernel,
        out_type=jax.ShapeDtypeStruct((tokens, columns), x.dtype),
        F=columns,
        FIRST_MODULE=GATE_UP_PROJECTION.modules[0],
        HAS_BIAS=bias_bank is not None,
        HAS_SCALE=scale_bank is not None,
        ACTIVATION=activation,
        **_expand_options(expand, batch, programs, ranks.shape[2]),
    )


def shrink(x: Array, a_bank: Array, batch: LoRABatch, projection: LoRAProjection, config: ShrinkConfig) -> Array:
    """Return the first products [rows, C, splits, RANKS], of which only rows in use are written."""
    size, slices = x.shape[1], len(projection.modules)
    config = replace(config, block_k=min(config.block_k, max(_power_of_two(size), 16)))
    splits = -(-size // (config.block_k * config.num_blocks))
    parts = 1 if config.all_slices else slices
    programs = len(batch.item_pages) * parts * splits
    rows = x.shape[0] * batch.max_pages
    options: dict[str, Any] = {
        "K": size,
        "SLICES": slices,
        "FIRST_MODULE": projection.modules[0],
        "SPLITS": splits,
        "LOOP": programs > config.max_programs,
        "BLOCK_K": config.block_k,
    }
    if config.kind == DOT:
        block_r = _power_of_two(slices // parts * RANKS)
        options |= {
            "NUM_BLOCKS": config.num_blocks,
            "TILE": _power_of_two(max(batch.tile, 16)),
            "PARTS": parts,
            "BLOCK_R": block_r,
        }
        options |= {"STAGES": config.num_stages}
    return triton_call(
        x,
        a_bank,
        batch.token_order,
        batch.item_starts,
        batch.item_counts,
        batch.item_rows,
        batch.item_pages,
        batch.item_modules,
        batch.item_weights,
        batch.num_items,
        kernel=shrink_dot_kernel if config.kind == DOT else shrink_vector_kernel,
        out_type=jax.ShapeDtypeStruct((rows, slices, splits, RANKS), jnp.float32),
        grid=(min(programs, config.max_programs),),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )


def _segment_tables(batch: LoRABatch) -> tuple[Array, ...]:
    return (
        batch.token_order,
        batch.segment_starts,
        batch.segment_items,
        batch.segment_vectors,
        batch.segment_pages,
        batch.segment_modules,
        batch.item_pages,
        batch.item_modules,
        batch.num_segments,
    )


def _expand_options(config: ExpandConfig, batch: LoRABatch, programs: int, splits: int) -> dict[str, Any]:
    work = len(batch.segment_vectors) * programs
    options = {
        "grid": (min(work, config.max_programs),),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "MAX_PAGES": batch.max_pages,
        "SPLITS": splits,
        "PROGRAMS": programs,
        "LOOP": work > config.max_programs,
        "BLOCK_N": config.block_n,
    }
    if config.kind != DOT:
        return options | {"BLOCK_S": _power_of_two(splits)}
    pages = min(_power_of_two(batch.max_pages), MOST_PAGES)
    return options | {
        "TILE": _power_of_two(max(batch.tile, 16)),
        "TILES": config.num_tiles,
        "PAGES": pages,
        "STAGES": config.num_stages,
    }


def _power_of_two(size: int) -> int:
    """Return the smallest one that is not below `size`."""
    return 1 << (size - 1).bit_length()


def _check_dtypes(x: Array, a_bank: Array, b_bank: Array) -> None:
    if not x.dtype == a_bank.dtype == b_bank.dtype or x.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(
            f"lora: 'triton' multiplies bfloat16 or float32, not x {x.dtype} with {a_bank.dtype} and {b_bank.dtype}"
        )
