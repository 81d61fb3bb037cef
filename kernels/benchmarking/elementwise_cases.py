"""`rms_norm` and `write_kv` as a step calls them."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from qwen2_kernels import rms_norm, write_kv
from qwen2_kernels.rms_norm.api import IMPLEMENTATIONS as RMS_NORM
from qwen2_kernels.specs import DECODE_TOKENS, PREFILL_TOKENS
from qwen2_kernels.write_kv.api import IMPLEMENTATIONS as WRITE_KV

from benchmarking.case import Case, Selection, after, noise, num_arrays, num_calls

BLOCK_SIZE = 64
HEADLINES = {1, 128, 8192}
TOKENS = DECODE_TOKENS + PREFILL_TOKENS


def rms_norm_cases(selection: Selection) -> Iterator[Case]:
    """The sum with the residual stream and its norm."""
    size = selection.geometry.hidden_size
    for tokens in () if selection.tune else TOKENS:
        num_bytes = 2 * (4 * tokens + 1) * size
        arrays = num_arrays(num_bytes, most=16)
        calls = num_calls(num_bytes, least=arrays)

        def make(seed: Array, tokens: int = tokens, arrays: int = arrays, calls: int = calls) -> tuple[Any, ...]:
            results = [tuple(jnp.zeros((tokens, size), jnp.bfloat16) for _ in range(2)) for _ in range(calls)]
            pairs = [tuple(noise(seed, 2 * i + j, (tokens, size)) for j in range(2)) for i in range(arrays)]
            return results, noise(seed, 2 * arrays, (size,)), pairs

        for implementation in RMS_NORM.keys() - {"reference"}:
            yield Case(
                op="rms_norm",
                implementation=implementation,
                geometry=selection.name,
                dtype="bfloat16",
                shape=f"{tokens} tokens",
                make=make,
                function=partial(_normalise, partial(rms_norm, eps=1e-6, implementation=implementation)),
                calls=calls,
                num_bytes=num_bytes,
                headline=tokens in HEADLINES,
            )


def _normalise(run: Any, results: list[Any], weight: Array, pairs: list[Any]) -> tuple[list[Any]]:
    outputs: list[Any] = []
    for index in range(len(results)):
        x, residual = pairs[index % len(pairs)]
        if outputs:
            x, outputs[-1] = after(x, outputs[-1])
        outputs.append(run(x, weight, residual))
    return (outputs,)


def write_kv_cases(selection: Selection) -> Iterator[Case]:
    """The bias, rotation and one step's write, in place."""
    geometry = selection.geometry
    kv_heads, group, head_dim = geometry.num_key_value_heads, geometry.group, geometry.head_dim
    for dtype in () if selection.tune else selection.dtypes:
        itemsize = jnp.dtype(dtype).itemsize
        for tokens in TOKENS:
            num_bytes = tokens * (kv_heads * head_dim * 2 * (2 * group + 2 + itemsize) + 4 * head_dim + 4)
            arrays = num_arrays(num_bytes, least=2, most=8)
            calls = num_calls(num_bytes, least=arrays)

            def make(
                seed: Array, tokens: int = tokens, arrays: int = arrays, calls: int = calls, dtype: str = dtype
            ) -> tuple[Any, ...]:
                blocks = -(-tokens // BLOCK_SIZE) + 1
                pool = (blocks, BLOCK_SIZE, kv_heads, head_dim)
                pools = [tuple(noise(seed, 2 * i + j, pool, dtype) for j in range(2)) for i in range(arrays)]
                queries = [jnp.zeros((tokens, kv_heads, group, head_dim), jnp.bfloat16) for _ in range(calls)]
                qkv = [noise(seed, 100 + i, (tokens, kv_heads, group + 2, head_dim)) for i in range(arrays)]
                angles = noise(seed, 99, (tokens, head_dim // 2), jnp.float32)
                bias = noise(seed, 98, (kv_heads, group + 2, head_dim))
                return pools, queries, qkv, bias, angles, jnp.arange(tokens, dtype=jnp.int32) + BLOCK_SIZE

            for implementation in WRITE_KV.keys() - {"reference"}:
                yield Case(
                    op="write_kv",
                    implementation=implementation,
                    geometry=selection.name,
                    dtype=dtype,
                    shape=f"{tokens} tokens",
                    make=make,
                    function=partial(_write, partial(write_kv, implementation=implementation)),
                    calls=calls,
                    num_bytes=num_bytes,
                    headline=tokens in HEADLINES,
                )


def _write(
    run: Any, pools: list[Any], queries: list[Array], qkv: list[Array], bias: Array, angles: Array, slots: Array
) -> tuple[list[Any], list[Array]]:
    outputs: list[Array] = []
    pools = list(pools)
    for index in range(len(queries)):
        i = index % len(pools)
        heads = qkv[i]
        if outputs:
            heads, outputs[-1] = after(heads, outputs[-1])
        query, *pools[i] = run(heads, angles, angles, *pools[i], slots, bias=bias)
        outputs.append(query)
    return [tuple(pair) for pair in pools], outputs
