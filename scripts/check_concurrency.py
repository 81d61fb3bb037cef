"""Show that decode programs whose kernels run beside one another compute what they compute one after another.

    python scripts/check_concurrency.py --geometry 7b --out concurrency_7b.json

Greedy calls with adapters and few rows are CUDA graphs that XLA schedules concurrently
(`program_specs.ProgramSpec.is_concurrent`). This compiles each of them a second time without that, runs each call of
several workloads as both, from copies of the same cache and state, and compares all bits of what they return: the
cache, the state and the samples. The serial program runs twice: what it would itself return otherwise is counted
apart. Prints a JSON object a line, for each workload, and exits with 1 if a bit differs.

Weights are random. Matrix products are not autotuned, so that both programs have the same ones; on a CPU, which has no
graphs, both are the same program.
"""

import argparse
import functools
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarking.record import write_record
from jax import Array

from qwen2_jax import LLM
from qwen2_jax.engine.compilation import compile_program
from qwen2_jax.engine.model_runner import ModelRunner
from qwen2_jax.xla_options import Options
from scripts import workload
from scripts.adapters_workload import draw_prompts, generate, start_engine, write_separate_adapters

Program = Callable[..., Any]
UNTUNED: Options = {"xla_gpu_autotune_level": 0}
ADAPTERS, ROWS = 32, 32
WORKLOADS = ((1, 1), (5, 2), (8, 8), (32, 3), (32, 32))
"""Rows and the adapters that they take turns with; every fourth row of several has none."""
PROMPT, NEW_TOKENS = 200, 65


@jax.jit
def count_different(one: Any, other: Any) -> Array:
    """Return how many elements of two trees of arrays differ in any bit."""

    def bits(array: Array) -> Array:
        whole = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
        return array.astype(whole) if array.dtype == bool else jax.lax.bitcast_convert_type(array, whole)

    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return sum(((bits(a) != bits(b)).sum(dtype=jnp.int32) for a, b in pairs), jnp.int32(0))


class Twins:
    """Stands in for the concurrent programs of a runner, and runs each call serially too."""

    def __init__(self, runner: ModelRunner) -> None:
        """Compile the programs both ways, and take their places."""
        self.counts: Counter[str] = Counter()
        for key, spec in runner.specs().items():
            if spec.is_concurrent:
                mesh = jax.tree.leaves(spec.arguments)[0].sharding.mesh
                concurrent, serial = (
                    compile_program(replace(spec, is_concurrent=flag), mesh, UNTUNED) for flag in (True, False)
                )
                twins: Any = functools.partial(self.run, concurrent, serial)
                runner._compiled[key] = twins

    def run(self, run_concurrent: Program, run_serial: Program, params: Any, cache: Any, state: Any, *rest: Any) -> Any:
        """Run a call three times, count what differs, and return the serial result; cache and state are donated."""
        concurrent, repeated = (
            run(params, *jax.tree.map(jnp.copy, (cache, state)), *rest) for run in (run_concurrent, run_serial)
        )
        serial = run_serial(params, cache, state, *rest)
        self.counts["calls"] += 1
        self.counts["different"] += int(count_different(concurrent, serial))
        self.counts["different_serial"] += int(count_different(repeated, serial))
        return serial


def check(llm: LLM, twins: Twins, requests: list[Any], rows: int, adapters: int) -> dict[str, Any]:
    """Run one workload and return a row of the record."""
    twins.counts.clear()
    prompts = draw_prompts(np.random.default_rng(rows), rows, PROMPT)
    chosen = [None if row % 4 == 3 else requests[row % adapters] for row in range(rows)]
    generate(llm, prompts, chosen, NEW_TOKENS)
    if not twins.counts["calls"]:
        raise RuntimeError(f"{rows} rows ran in no program that is scheduled concurrently")
    counts = {name: twins.counts[name] for name in ("calls", "different", "different_serial")}
    return {"rows": rows, "adapters": adapters, **counts}


def main() -> None:
    """Compare and write a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=workload.GEOMETRIES, default="7b")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        requests = write_separate_adapters(Path(folder), workload, arguments.geometry, ADAPTERS)
        llm = start_engine(
            workload,
            arguments.geometry,
            Path(folder),
            max_model_len=1024,
            max_num_seqs=ROWS,
            max_loras=ADAPTERS,
            kv_cache_memory_bytes=2 << 30,
        )
        twins = llm._engine.call(lambda engine: Twins(engine.runner))
        for rows, adapters in WORKLOADS:
            found.append(check(llm, twins, requests, rows, adapters))
            print(json.dumps(found[-1]), flush=True)
            write_record(arguments.out, found, geometry=arguments.geometry)
        llm.shutdown()
    if wrong := [row for row in found if row["different"] or row["different_serial"]]:
        raise SystemExit(f"results differ: {wrong}")


if __name__ == "__main__":
    main()
