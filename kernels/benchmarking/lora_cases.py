"""`lora_delta` and `lora_gated` as a step with many adapters calls them, for each of a model's projections."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from qwen2_kernels import LoRABatch, lora_delta, lora_gated
from qwen2_kernels.lora.api import DELTA_IMPLEMENTATIONS
from qwen2_kernels.lora.batch import DOWN_PROJECTION, O_PROJECTION, RANKS, qkv_projection
from qwen2_kernels.lora.segments import PageUse, TokenGroup, build_lora_tables, table_sizes
from qwen2_kernels.specs import LORA_BENCHES, Geometry, LoRABench

from benchmarking.case import Case, Selection, after, noise, num_arrays, num_calls

HEADLINES = {(32, 32, 16), (128, 32, 16), (1, 1, 16), (8192, 1, 16)}
ALL_MODULES = 0b1111111
Run = Callable[..., Any]


def lora_cases(selection: Selection) -> Iterator[Case]:
    """Every implementation at every mixture of tokens and adapters."""
    for name in () if selection.tune else ("qkv", "o", "gate_up", "down"):
        for bench in LORA_BENCHES:
            for implementation in DELTA_IMPLEMENTATIONS.keys() - {"reference"}:
                yield lora_case(selection.name, selection.geometry, name, bench, implementation)


def lora_case(
    geometry_name: str, geometry: Geometry, name: str, bench: LoRABench, implementation: str, **options: Any
) -> Case:
    """Return a chain of calls for one projection, each with pages of its own; `options` are the op's."""
    *columns, size = geometry.projections[name]
    is_gated, outputs = name == "gate_up", columns[-1]
    num_slices = {"qkv": 3, "gate_up": 2}.get(name, 1)
    pages_used = bench.adapters * -(-bench.rank // RANKS)
    weights = 2 * pages_used * RANKS * (num_slices * size + int(np.prod(columns)))
    activations = 2 * bench.tokens * (size + outputs + is_gated * 2 * outputs)
    arrays = num_arrays(weights + activations, least=2)
    calls = num_calls(weights + activations, least=2)

    def make(seed: Array) -> tuple[Any, ...]:
        results = [jnp.zeros((bench.tokens, outputs), jnp.bfloat16) for _ in range(calls)]
        tokens = noise(seed, 0, (bench.tokens, size))
        base = (noise(seed, 1, (bench.tokens, *columns)),) if is_gated else ()
        a_bank = noise(seed, 2, (pages_used * arrays, num_slices, RANKS, size))
        b_bank = noise(seed, 3, (pages_used * arrays, RANKS, *columns))
        batch = make_batch(bench)
        pages = [batch.item_pages + pages_used * index for index in range(arrays)]
        return results, tokens, base, a_bank, b_bank, batch, pages

    if is_gated:
        run: Run = partial(lora_gated, activation="silu")
    else:
        qkv = qkv_projection(geometry.group, geometry.head_dim)
        run = partial(lora_delta, projection={"qkv": qkv, "o": O_PROJECTION, "down": DOWN_PROJECTION}[name])
    return Case(
        op="lora",
        implementation=implementation,
        geometry=geometry_name,
        dtype="bfloat16",
        shape=f"{name}, {bench.tokens}/{bench.adapters}" + f", rank {bench.rank}" * (bench.rank != RANKS),
        make=make,
        function=partial(_add, partial(run, implementation=implementation, **options)),
        calls=calls,
        num_bytes=weights + activations,
        headline=implementation == "triton" and (bench.tokens, bench.adapters, bench.rank) in HEADLINES,
        config=options.get("config"),
    )


def make_batch(bench: LoRABench) -> LoRABatch:
    """Return the tables of a step whose tokens are spread evenly over the adapters, adapter i in the i-th pages."""
    per_adapter = -(-bench.rank // RANKS)
    groups = [
        TokenGroup(pages=tuple(PageUse(page=i * per_adapter + j, modules=ALL_MODULES) for j in range(per_adapter)))
        for i in range(bench.adapters)
    ]
    sizes = table_sizes(bench.tokens, max_groups=bench.adapters, max_pages=per_adapter, tile=bench.tile)
    tables = build_lora_tables(np.arange(bench.tokens) * bench.adapters // bench.tokens, groups, sizes)
    arrays = {name: jnp.asarray(table) for name, table in tables.items()}
    make: Any = LoRABatch
    return make(**arrays, tile=sizes.tile, window=sizes.window, max_pages=sizes.max_pages)


def _add(
    run: Run, results: list[Array], x: Array, base: tuple[Array, ...], a_bank: Array, b_bank: Array, *rest: Any
) -> tuple[list[Array]]:
    """Multiply the same tokens by pages after pages, each when the last call is done."""
    batch, pages = rest
    outputs: list[Any] = []
    for index in range(len(results)):
        if outputs:
            x, outputs[-1] = after(x, outputs[-1])
        outputs.append(run(x, *base, a_bank, b_bank, replace(batch, item_pages=pages[index % len(pages)])))
    return (outputs,)
