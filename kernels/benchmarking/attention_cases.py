"""`paged_attention` and `flash_attention` as a layer calls them: decode steps, and steps with prefills."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from qwen2_kernels import flash_attention, paged_attention
from qwen2_kernels.flash_attention.api import IMPLEMENTATIONS as FLASH
from qwen2_kernels.paged_attention.api import IMPLEMENTATIONS as PAGED
from qwen2_kernels.specs import DECODE_BENCHES, PREFILL_BENCHES, Row

from benchmarking.case import Case, Selection, noise, num_arrays, num_calls

BLOCK_SIZE = 64
DECODE_BLOCKS = 128
"""Columns of a decode step's tables at least: an engine of 8192 tokens has so many, whatever a row's context is."""
MAX_XLA_ROWS = 32
"""Rows up to which XLA's decode attention is timed, and the only rows that it is timed for."""
MAX_REFERENCE_TOKENS = 1024
"""Tokens up to which `flash_attention`'s reference is timed: its mask is dense."""
HEADLINES = {"32 x 2048", "128 x 1024", "1 x 8192", "16 x 2048", "2048 after 6144", "128 decodes, 1 x 2048"}
TUNED_PREFILL = "4 x 2048"
"""The step that tiles for prefills are tuned on."""


def paged_attention_cases(selection: Selection) -> Iterator[Case]:
    """Decode steps and steps with prefills, over pools whose blocks lie in random order."""
    decodes = {f"{rows} x {context}": ((1, context),) * rows for rows, context in DECODE_BENCHES}
    for dtype, (shape, rows) in product(selection.dtypes, (decodes | PREFILL_BENCHES).items()):
        is_decode = shape in decodes
        shared = _shared(selection, dtype, shape, rows, is_decode=is_decode)
        if selection.tune:
            yield from _tuning_cases(selection, dtype, shape, rows, shared, is_decode=is_decode)
            continue
        slow = {"reference"} if is_decode and len(rows) <= MAX_XLA_ROWS else {"reference", "xla"}
        run = partial(paged_attention, scale=selection.geometry.head_dim**-0.5)
        for name in PAGED.keys() - slow:
            function = partial(_attend, partial(run, implementation=name), is_decode)
            yield Case(implementation=name, function=function, **shared)


def _shared(selection: Selection, dtype: str, shape: str, rows: tuple[Row, ...], *, is_decode: bool) -> dict[str, Any]:
    """What the cases of one step have in common."""
    geometry = selection.geometry
    heads, kv_heads, head_dim = geometry.num_attention_heads, geometry.num_key_value_heads, geometry.head_dim
    tokens = sum(queries for queries, _ in rows)
    kv_bytes = sum(length for _, length in rows) * 2 * kv_heads * head_dim * jnp.dtype(dtype).itemsize
    num_bytes = kv_bytes + 2 * 2 * tokens * heads * head_dim
    flops = 4 * _pairs(rows) * heads * head_dim
    arrays = num_arrays(kv_bytes, least=4, most=48)
    return dict(
        op="paged_attention_decode" if is_decode else "paged_attention_ragged",
        geometry=selection.name,
        dtype=dtype,
        shape=shape,
        make=partial(_make_paged, selection, dtype, rows, arrays),
        calls=arrays,
        num_bytes=num_bytes,
        flops=flops,
        headline=shape in HEADLINES,
    )


def _pairs(rows: tuple[Row, ...]) -> float:
    """Queries times the keys that each sees."""
    return sum(queries * length - queries * (queries - 1) / 2 for queries, length in rows)


def _make_paged(selection: Selection, dtype: str, rows: tuple[Row, ...], arrays: int, seed: Array) -> tuple[Any, ...]:
    """Return queries, pairs of pools, and where each row's tokens are."""
    geometry = selection.geometry
    needed = [-(-length // BLOCK_SIZE) for _, length in rows]
    order = np.random.default_rng(0).permutation(np.arange(1, sum(needed) + 1, dtype=np.int32))
    is_decode = all(queries == 1 for queries, _ in rows)
    tables, start = np.zeros((len(rows), max(max(needed), DECODE_BLOCKS * is_decode)), np.int32), 0
    for row, blocks in enumerate(needed):
        tables[row, :blocks] = order[start : start + blocks]
        start += blocks
    starts = np.cumsum([0, *(queries for queries, _ in rows)], dtype=np.int32)
    lengths = np.array([length for _, length in rows], np.int32)
    pool = (start + 1, BLOCK_SIZE, geometry.num_key_value_heads, geometry.head_dim)
    pools = [tuple(noise(seed, 2 * i + j, pool, dtype) for j in range(2)) for i in range(arrays)]
    q = noise(seed, 2 * arrays, (int(starts[-1]), geometry.num_key_value_heads, geometry.group, geometry.head_dim))
    return q, pools, jnp.asarray(tables), jnp.asarray(lengths), jnp.asarray(starts)


def _attend(
    run: Callable[..., Array], is_decode: bool, q: Array, pools: Any, tables: Array, lengths: Array, starts: Array
) -> tuple[Array]:
    """Attend layer after layer, each with the last one's output as its queries."""
    for k, v in pools:
        q = run(q, k, v, tables, lengths, None if is_decode else starts)
    return (q,)


def _tuning_cases(
    selection: Selection, dtype: str, shape: str, rows: tuple[Row, ...], shared: dict[str, Any], *, is_decode: bool
) -> Iterator[Case]:
    """Every configuration worth trying for one step."""
    from qwen2_kernels.paged_attention.triton_attention import decode_config
    from qwen2_kernels.paged_attention.triton_decode import decode_attention
    from qwen2_kernels.paged_attention.triton_ragged import RaggedConfig, ragged_attention

    geometry = selection.geometry
    scales = {"scale": geometry.head_dim**-0.5, "window": None, "k_scale": 1.0, "v_scale": 1.0}
    key = f"{dtype}-{geometry.head_dim}-{geometry.group}"
    if is_decode:
        q, pools, tables, *_ = jax.eval_shape(shared["make"], jax.ShapeDtypeStruct((), jnp.uint32))
        default, pairs = decode_config(q, pools[0][0], tables), len(rows) * geometry.num_key_value_heads
        chunks = (default.min_chunk,) if default.num_splits == 1 else (64, 128, 256)
        for block_n, (warps, stages), chunk in product((32, 64, 128), ((2, 3), (4, 2), (4, 3), (4, 4), (8, 2)), chunks):
            config = replace(default, block_n=block_n, num_warps=warps, num_stages=stages, min_chunk=chunk)
            run = partial(decode_attention, out=None, **scales, config=config)
            function = partial(_attend, run, True)
            yield Case(implementation="triton", function=function, key=f"{key}-{pairs}", config=config, **shared)
    elif shape == TUNED_PREFILL:
        for block_m, block_n, warps, stages in product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
            config = RaggedConfig(block_m=block_m, block_n=block_n, num_warps=warps, num_stages=stages)
            run = partial(ragged_attention, causal=True, skip_single=True, **scales, config=config)
            function = partial(_attend, run, False)
            yield Case(implementation="triton", function=function, key=key, config=config, **shared)


def flash_attention_cases(selection: Selection) -> Iterator[Case]:
    """Steps that are whole prompts."""
    geometry = selection.geometry
    heads, kv_heads, head_dim = geometry.num_attention_heads, geometry.num_key_value_heads, geometry.head_dim
    fresh = {shape: rows for shape, rows in PREFILL_BENCHES.items() if all(queries == n for queries, n in rows)}
    for shape, rows in {} if selection.tune else fresh.items():
        tokens = sum(length for _, length in rows)
        num_bytes = 2 * 2 * tokens * (heads + kv_heads) * head_dim
        flops = 4 * _pairs(rows) * heads * head_dim
        calls = num_calls(num_bytes, flops, most=16)

        def make(
            seed: Array, rows: tuple[Row, ...] = rows, tokens: int = tokens, calls: int = calls
        ) -> tuple[Any, ...]:
            shape = (tokens, kv_heads, head_dim)
            pairs = [tuple(noise(seed, 2 * i + j, shape) for j in range(2)) for i in range(calls)]
            q = noise(seed, 2 * calls, (tokens, kv_heads, geometry.group, head_dim))
            return q, pairs, jnp.cumsum(jnp.asarray([0, *(length for _, length in rows)], jnp.int32))

        for name in FLASH.keys() - ({"reference"} if tokens > MAX_REFERENCE_TOKENS else set()):
            yield Case(
                op="flash_attention",
                implementation=name,
                geometry=selection.name,
                dtype="bfloat16",
                shape=shape,
                make=make,
                function=partial(_attend_fresh, partial(flash_attention, scale=head_dim**-0.5, implementation=name)),
                calls=calls,
                num_bytes=num_bytes,
                flops=flops,
                headline=shape in HEADLINES,
            )


def _attend_fresh(run: Callable[..., Array], q: Array, pairs: Any, starts: Array) -> tuple[Array]:
    for k, v in pairs:
        q = run(q, k, v, starts)
    return (q,)
