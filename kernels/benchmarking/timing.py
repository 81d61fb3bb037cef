"""Compiles cases in threads and times them one after another, beside the limits of the GPU."""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarking.case import Case, noise

SAMPLES = 9
SAMPLE_SECONDS = 0.01
"""How long a sample takes at least: as many chains as fit, launched without waiting."""
MATMUL_SIZE = 8192
READ_BYTES = 4 << 30
XLA_OPTIONS: dict[str, bool | int | str] = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 1}
"""As the engine compiles: XLA's products are cuBLAS's, the fastest of its candidates."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the GPU did in this run."""

    bandwidth: float
    """Bytes read in a second, by a maximum over 4 GiB."""
    flops: float
    """Operations in a second, by a bfloat16 product of two random 8192 x 8192 matrices."""


def measure_limits() -> Limits:
    """Time what bounds every kernel."""

    def make(seed: Array) -> tuple[Array, Array]:
        return noise(seed, 0, (READ_BYTES // 2,)), noise(seed, 1, (MATMUL_SIZE, MATMUL_SIZE))

    data, square = jax.jit(make)(jnp.uint32(0))
    read = jax.jit(jnp.max).lower(data).compile()
    multiply = jax.jit(lambda x: x @ x).lower(square).compile()
    return Limits(
        bandwidth=READ_BYTES / median_seconds(lambda: read(data)),
        flops=2 * MATMUL_SIZE**3 / median_seconds(lambda: multiply(square)),
    )


def run_cases(cases: Iterable[Case], limits: Limits) -> Iterator[dict[str, Any]]:
    """Yield a row for each case: its time and share of a limit, or `unsupported` or `error` with the reason.

    Everything is compiled before the first case is timed: compiling tries out programs on the GPU, too.
    """
    cases = list(cases)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        # The implementations of a shape have their arrays in common.
        makes = {make: threads.submit(_compile_make, make) for make in dict.fromkeys(case.make for case in cases)}
        programs = [threads.submit(compile_function, case) for case in cases]
    for case, program in zip(cases, programs, strict=True):
        row = {name: getattr(case, name) for name in ("op", "implementation", "geometry", "dtype", "shape")}
        if case.config is not None:
            row["config"] = asdict(case.config)
        try:
            row |= rates(case, time_case(makes[case.make].result(), program.result()) / case.calls, limits)
        except NotImplementedError as error:
            row["unsupported"] = str(error)
        except Exception as error:  # whatever a compiler, a launch or an allocation raises is this case's result
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        yield row


def _compile_make(make: Callable[..., Any]) -> jax.stages.Compiled:
    """Compile what makes a case's arrays."""
    return jax.jit(make).lower(jax.ShapeDtypeStruct((), jnp.uint32)).compile()


def compile_function(case: Case) -> jax.stages.Compiled:
    """Compile what runs on a case's arrays; those that it returns anew are donated."""
    abstract = jax.eval_shape(case.make, jax.ShapeDtypeStruct((), jnp.uint32))
    donated = tuple(range(len(jax.eval_shape(case.function, *abstract))))
    # An array that is only there to give its memory to a result is kept as an argument.
    function = jax.jit(case.function, donate_argnums=donated, keep_unused=True).lower(*abstract)
    return function.compile(XLA_OPTIONS if jax.default_backend() == "gpu" else {})


def time_case(make: jax.stages.Compiled, function: jax.stages.Compiled) -> float:
    """Return the seconds of one chain."""
    arrays = make(jnp.uint32(0))

    def run() -> Any:
        nonlocal arrays
        results = function(*arrays)
        arrays = (*results, *arrays[len(results) :])
        return results

    return median_seconds(run)


def median_seconds(run: Callable[[], Any]) -> float:
    """Return the seconds that one call of `run` takes when calls follow one another."""
    for _ in range(3):  # CUDA graphs are recorded, and clocks rise
        jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    calls = max(1, round(SAMPLE_SECONDS / (time.perf_counter() - start)))
    times = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        for _ in range(calls - 1):
            run()
        jax.block_until_ready(run())
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def rates(case: Case, seconds: float, limits: Limits) -> dict[str, float | str]:
    """Return a call's time, what it reads and computes in a second, and its share of the limit that binds it."""
    shares = {
        "bandwidth": case.num_bytes / seconds / limits.bandwidth,
        "matmul": case.flops / seconds / limits.flops,
    }
    limit = max(shares, key=lambda name: shares[name])
    row: dict[str, float | str] = {"us": round(seconds * 1e6, 2), "GB/s": round(case.num_bytes / seconds / 1e9, 1)}
    if case.flops:
        row["TFLOP/s"] = round(case.flops / seconds / 1e12, 1)
    return row | {"limit": limit, "share": round(shares[limit], 4)}
