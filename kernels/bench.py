"""Times the kernels: op x implementation x shape, in microseconds and as a share of what the GPU can do.

    python kernels/bench.py                     every op at the 7B shapes
    python kernels/bench.py --geometry 0.5b --ops paged_attention
    python kernels/bench.py --tune              tries tile sizes and writes qwen2_kernels/tuned/<gpu>.json

Each op runs as a chain over the layers of a model, in one program, on pools that together exceed the L2 cache; the time
is the median of several runs of the chain over its length. The limits are measured in the same run: a sum over 4 GB for
the bandwidth, a matmul of 8192 cubed for the tensor cores.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from qwen2_kernels import paged_attention, tuning, write_kv
from qwen2_kernels.paged_attention.api import IMPLEMENTATIONS as ATTENTION
from qwen2_kernels.specs import DECODE_BENCHES, PREFILL_BENCHES, QWEN2_5, Geometry, Row
from qwen2_kernels.write_kv.api import IMPLEMENTATIONS as WRITE_KV

BLOCK_SIZE = 64
CHAIN = 12
"""Layers in a chain."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to time: `function` takes the arrays of `make` and returns arrays to donate to its next call."""

    op: str
    implementation: str
    shape: str
    make: Callable[[], tuple[Any, ...]]
    function: Callable[..., Any]
    num_bytes: float = 0
    flops: float = 0
    chain: int = CHAIN
    key: str = ""
    """Where the tuned configuration belongs, and which one this is."""
    config: Any = None


def main() -> None:
    """Parse the command line and print a table, one row per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="7b", choices=QWEN2_5)
    parser.add_argument("--ops", default="write_kv,paged_attention", help="comma-separated")
    parser.add_argument("--dtypes", default="bfloat16,float8_e4m3fn", help="of the pools, comma-separated")
    parser.add_argument("--tune", action="store_true", help="try tile sizes and write the best")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    arguments = parser.parse_args()

    limits = measure_limits()
    print(
        f"{jax.devices()[0].device_kind}: {limits['bandwidth'] / 1e12:.2f} TB/s, {limits['flops'] / 1e12:.0f} TFLOP/s"
    )
    geometry = QWEN2_5[arguments.geometry]
    cases = []
    for op, dtype in product(arguments.ops.split(","), arguments.dtypes.split(",")):
        cases += OPS[op](geometry, jnp.dtype(dtype), tune=arguments.tune)
    rows = list(run_cases(cases, limits))
    if arguments.tune:
        print("written:", write_tuned(rows))
    if arguments.out:
        arguments.out.write_text(json.dumps([row for row, _ in rows], indent=1))


def measure_limits() -> dict[str, float]:
    """Return the bandwidth in bytes and the matmul rate in operations a second."""
    data = jnp.ones(2**31, jnp.bfloat16)
    square = jnp.ones((8192, 8192), jnp.bfloat16)
    read = median_time(jax.jit(lambda x: jnp.max(x)).lower(data).compile(), (data,), donated=False)
    multiply = median_time(jax.jit(lambda x: x @ x).lower(square).compile(), (square,), donated=False)
    return {"bandwidth": data.nbytes / read, "flops": 2 * 8192**3 / multiply}


def run_cases(cases: list[Case], limits: dict[str, float]) -> Iterator[tuple[dict[str, Any], Case]]:
    """Compile every case in threads, then time one after another; a case that fails is reported and left out."""
    with ThreadPoolExecutor() as threads:
        compiled = [threads.submit(compile_case, case) for case in cases]
        for case, future in zip(cases, compiled, strict=True):
            row = {"op": case.op, "implementation": case.implementation, "shape": case.shape, "key": case.key}
            try:
                seconds = median_time(future.result(), case.make()) / case.chain
            except Exception as error:  # a configuration that does not fit is a result, too
                print(
                    f"{case.op} {case.implementation} {case.shape} {case.config or ''}: {str(error)[:200]!r}",
                    flush=True,
                )
                continue
            row |= {"us": seconds * 1e6, "config": asdict(case.config) if case.config else None}
            if case.num_bytes:
                row |= {
                    "TB/s": case.num_bytes / seconds / 1e12,
                    "share": case.num_bytes / seconds / limits["bandwidth"],
                }
            if case.flops:
                row |= {"TFLOP/s": case.flops / seconds / 1e12, "share": case.flops / seconds / limits["flops"]}
            print(format_row(row), flush=True)
            yield row, case


def compile_case(case: Case) -> jax.stages.Compiled:
    """Compile the chain, with everything that it returns donated."""
    abstract = jax.eval_shape(case.make)
    donated = tuple(range(len(jax.eval_shape(case.function, *abstract))))
    return jax.jit(case.function, donate_argnums=donated).lower(*abstract).compile()


def median_time(compiled: Callable[..., Any], arrays: tuple[Any, ...], *, donated: bool = True) -> float:
    """Return the seconds that one call takes when calls follow one another."""
    times, results = [], arrays
    for repeat in range(5):
        calls = 1 if repeat == 0 else 8
        jax.block_until_ready(arrays)
        start = time.perf_counter()
        for _ in range(calls):
            results = compiled(*arrays)
            arrays = (*results, *arrays[len(results) :]) if donated else arrays
        jax.block_until_ready(results)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times[1:])


def format_row(row: dict[str, Any]) -> str:
    """Return one line of the table."""
    rate = next((f"{row[unit]:8.2f} {unit}" for unit in ("TB/s", "TFLOP/s") if unit in row), "")
    config = "" if row["config"] is None else " " + " ".join(f"{k}={v}" for k, v in row["config"].items())
    share = f"{row.get('share', 0):4.0%}"
    return f"{row['op']:22} {row['implementation']:9} {row['shape']:34} {row['us']:9.1f} us {rate} {share}{config}"


def write_tuned(rows: list[tuple[dict[str, Any], Case]]) -> Path:
    """Merge the fastest configuration of each key into the GPU's file."""
    path = Path(__file__).parent / "qwen2_kernels" / "tuned" / f"{tuning.slug(tuning.device_kind())}.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row, case in rows:
        if case.key and row["us"] < best.get((case.op, case.key), {"us": float("inf")})["us"]:
            best[case.op, case.key] = row
    for (op, key), row in best.items():
        table.setdefault(op, {})[key] = row["config"]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    return path


def make_pools(geometry: Geometry, dtype: Any, blocks: int) -> list[tuple[Array, Array]]:
    """Draw a pair of pools for each layer of the chain."""
    shape = (blocks, BLOCK_SIZE, geometry.num_key_value_heads, geometry.head_dim)
    key = jax.random.key(0)
    pool = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16).astype(dtype))
    return [(pool(jax.random.fold_in(key, 2 * i)), pool(jax.random.fold_in(key, 2 * i + 1))) for i in range(CHAIN)]


def make_tables(rows: tuple[Row, ...]) -> tuple[int, Array, Array, Array]:
    """Return the number of blocks, block tables in random order, contexts, and where each row's queries start."""
    width = -(-max(length for _, length in rows) // BLOCK_SIZE)
    needed = [-(-length // BLOCK_SIZE) for _, length in rows]
    order = np.random.default_rng(0).permutation(np.arange(1, sum(needed) + 1, dtype=np.int32))
    tables, start = np.zeros((len(rows), width), np.int32), 0
    for row, blocks in enumerate(needed):
        tables[row, :blocks] = order[start : start + blocks]
        start += blocks
    starts = np.cumsum([0, *(queries for queries, _ in rows)]).astype(np.int32)
    lengths = np.array([length for _, length in rows], np.int32)
    return start + 1, jnp.asarray(tables), jnp.asarray(lengths), jnp.asarray(starts)


def write_kv_cases(geometry: Geometry, dtype: Any, *, tune: bool) -> Iterator[Case]:
    """One step's write, in place."""
    kv_heads, group, head_dim = geometry.num_key_value_heads, geometry.group, geometry.head_dim
    for tokens, implementation in product((1, 32, 256, 2048, 8192), WRITE_KV.keys() - {"reference"}):

        def make(tokens: int = tokens) -> tuple[Any, ...]:
            qkv = jnp.ones((tokens, kv_heads, group + 2, head_dim), jnp.bfloat16)
            angles = jnp.ones((tokens, head_dim // 2))
            return make_pools(geometry, dtype, 160), qkv, angles, jnp.arange(tokens, dtype=jnp.int32) + BLOCK_SIZE

        def function(
            pools: Any, qkv: Array, angles: Array, slots: Array, implementation: str = implementation
        ) -> tuple[Any]:
            return ([write_kv(qkv, angles, angles, k, v, slots, implementation=implementation)[1:] for k, v in pools],)

        size = tokens * kv_heads * head_dim * ((2 * group + 2) * 2 + 2 * jnp.dtype(dtype).itemsize)
        yield Case(
            op="write_kv",
            implementation=implementation,
            shape=f"{tokens} tokens, {jnp.dtype(dtype).name}",
            make=make,
            function=function,
            num_bytes=size,
        )


def attention_cases(geometry: Geometry, dtype: Any, *, tune: bool) -> Iterator[Case]:
    """Decode steps, whose limit is the bandwidth, and steps with prefills, whose limit are the tensor cores."""
    named = {f"{rows} x {context}": ((1, context),) * rows for rows, context in DECODE_BENCHES}
    for shape, rows in (named | PREFILL_BENCHES).items():
        is_decode = all(queries == 1 for queries, _ in rows)
        kv_bytes = sum(length for _, length in rows) * 2 * geometry.num_key_value_heads * geometry.head_dim
        pairs = sum(queries * length - queries * (queries - 1) / 2 for queries, length in rows)
        options: dict[str, Any] = dict(
            op="paged_attention_decode" if is_decode else "paged_attention_ragged",
            shape=f"{shape}, {jnp.dtype(dtype).name}",
            make=partial(make_attention, geometry, dtype, rows),
            num_bytes=kv_bytes * jnp.dtype(dtype).itemsize if is_decode else 0,
            flops=0 if is_decode else 4 * pairs * geometry.num_attention_heads * geometry.head_dim,
        )
        run = partial(paged_attention, scale=geometry.head_dim**-0.5)
        if tune:
            yield from tuned_attention_cases(geometry, dtype, rows, options)
            continue
        for name in ATTENTION.keys() - {"reference"} - ({"xla"} if len(rows) > 32 and is_decode else set()):
            yield Case(
                implementation=name, function=partial(attend, partial(run, implementation=name), is_decode), **options
            )


def make_attention(geometry: Geometry, dtype: Any, rows: tuple[Row, ...]) -> tuple[Any, ...]:
    """Return queries, pools, and where each row's tokens are."""
    blocks, tables, lengths, starts = make_tables(rows)
    tokens = sum(queries for queries, _ in rows)
    shape = (tokens, geometry.num_key_value_heads, geometry.group, geometry.head_dim)
    q = jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)
    return q, make_pools(geometry, dtype, blocks), tables, lengths, starts


def attend(
    run: Callable[..., Array], is_decode: bool, q: Array, pools: Any, tables: Array, lengths: Array, starts: Array
) -> tuple[Array]:
    """Attend layer after layer, each with the last one's output as its queries."""
    for k, v in pools:
        q = run(q, k, v, tables, lengths, None if is_decode else starts)
    return (q,)


def tuned_attention_cases(
    geometry: Geometry, dtype: Any, rows: tuple[Row, ...], options: dict[str, Any]
) -> Iterator[Case]:
    """Every configuration worth trying for one shape."""
    from qwen2_kernels.paged_attention.triton_decode import DecodeConfig, decode_attention
    from qwen2_kernels.paged_attention.triton_ragged import RaggedConfig, ragged_attention

    scales = {"scale": geometry.head_dim**-0.5, "window": None, "k_scale": 1.0, "v_scale": 1.0}
    name, is_decode = jnp.dtype(dtype).name, options["num_bytes"] > 0
    key = f"{name}-{geometry.head_dim}-{geometry.group}"
    if is_decode:
        pairs = len(rows) * geometry.num_key_value_heads
        splits = (1, 2) if pairs >= 400 else (3, 4, 6) if pairs >= 100 else (8, 16) if pairs >= 32 else (32, 64)
        for block_n, (warps, stages), split in product(
            (32, 64, 128) if pairs < 16 else (32, 64), ((2, 4), (4, 4), (8, 3), (2, 6), (4, 6)), splits
        ):
            chunk = 1024 if pairs >= 400 else 256 if pairs >= 100 else 128
            config = DecodeConfig(
                block_n=block_n, num_warps=warps, num_stages=stages, num_splits=split, min_chunk=chunk
            )
            run = partial(decode_attention, out=None, **scales, config=config)
            function = partial(attend, run, True)
            yield Case(implementation="triton", function=function, key=f"{key}-{pairs}", config=config, **options)
    elif options["shape"].startswith("4 x 2048"):
        for block_m, block_n, warps, stages in product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
            config = RaggedConfig(block_m=block_m, block_n=block_n, num_warps=warps, num_stages=stages)
            run = partial(ragged_attention, causal=True, skip_single=True, **scales, config=config)
            function = partial(attend, run, False)
            yield Case(implementation="triton", function=function, key=key, config=config, **options)


OPS: dict[str, Callable[..., Iterator[Case]]] = {"write_kv": write_kv_cases, "paged_attention": attention_cases}

if __name__ == "__main__":
    main()
