"""Measure tokens/s against the number of distinct adapters in a batch, and against how many are registered.

    python scripts/adapter_curve.py --workload workload.py --geometry 0.5b --out adapters.json

Weights are random. The adapters share one file of weights (rank 16, all seven projections) and differ in `lora_alpha`,
so that each is another adapter with places of its own. "batch": decode steps of `--rows` rows with that many distinct
adapters. "registered": requests whose adapters are drawn by Zipf's law from that many, of which the device holds
`--max-loras` and the host `--max-cpu-loras`; the rest is read from disk again. Each number twice: "first", with
adapters that nobody has asked for yet, all of which `generate` reads and checks before it starts, and "again", drawn
anew, when most of them are known.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmarking.record import write_record

from qwen2_jax import LLM, LoRARequest
from scripts.adapters_workload import draw_prompts, generate, load_workload, start_engine, write_linked_adapters

DISTINCT = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
REGISTERED = (1, 8, 64, 500, 2000)
REQUESTS, NEW_TOKENS, ZIPF = 2048, 64, 1.1
TURNS = ("first", "again")
PROMPT, STEPS, SAMPLES = 64, 256, 3
"""With fewer steps, what the host takes now and then for a batch's start hides a step's time."""


def run(llm: LLM, adapters: list[LoRARequest | None], new_tokens: int) -> float:
    """Generate one row per entry of `adapters`; return the seconds that it takes."""
    prompts = draw_prompts(np.random.default_rng(0), len(adapters), PROMPT)
    start = time.perf_counter()
    generate(llm, prompts, adapters, new_tokens)
    return time.perf_counter() - start


def measure_batch(llm: LLM, requests: list[LoRARequest], distinct: int, rows: int) -> dict[str, Any]:
    """Time decode steps of `rows` rows with `distinct` adapters."""
    adapters = [requests[row % distinct] if distinct else None for row in range(rows)]
    run(llm, adapters, 2)
    short, long = (min(run(llm, adapters, steps) for _ in range(SAMPLES)) for steps in (8, 8 + STEPS))
    step = (long - short) / STEPS
    return {"kind": "batch", "adapters": distinct, "step_ms": round(step * 1e3, 3), "tokens/s": round(rows / step, 1)}


def measure_registered(llm: LLM, requests: list[LoRARequest], registered: int, turn: str) -> dict[str, Any]:
    """Serve requests whose adapters are drawn by Zipf's law from the first `registered`; `turn` is one of `TURNS`."""
    rng = np.random.default_rng((registered, TURNS.index(turn)))
    shares = 1 / np.arange(1, registered + 1) ** ZIPF
    drawn = rng.choice(registered, REQUESTS, p=shares / shares.sum())
    before = llm.lora_stats()
    seconds = run(llm, [requests[index] for index in drawn], NEW_TOKENS)
    after = llm.lora_stats()
    row = {"kind": "registered", "turn": turn, "adapters": registered, "distinct": len(set(drawn.tolist()))}
    rate = round(REQUESTS * NEW_TOKENS / seconds, 1)
    return row | {
        "tokens/s": rate,
        "loads": after.num_loads - before.num_loads,
        "evictions": after.num_evictions - before.num_evictions,
    }


def main() -> None:
    """Measure both curves and write a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, default=Path(__file__).parent / "workload.py")
    parser.add_argument("--geometry", default="0.5b")
    parser.add_argument("--rows", type=int, default=256, help="rows of a batch")
    parser.add_argument("--max-loras", type=int, default=256)
    parser.add_argument("--max-cpu-loras", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    workload = load_workload(arguments.workload)
    with tempfile.TemporaryDirectory() as folder:
        requests = write_linked_adapters(Path(folder), workload, arguments.geometry, max(REGISTERED))
        llm = start_engine(
            workload,
            arguments.geometry,
            Path(folder),
            max_model_len=1024,
            max_num_seqs=arguments.rows,
            max_loras=arguments.max_loras,
            max_cpu_loras=arguments.max_cpu_loras,
        )
        rows: list[dict[str, Any]] = []

        def report(row: dict[str, Any]) -> None:
            rows.append(row)
            print(json.dumps(row), flush=True)
            write_record(arguments.out, rows, geometry=arguments.geometry, rows_per_batch=arguments.rows)

        for distinct in (count for count in DISTINCT if count <= min(arguments.rows, arguments.max_loras)):
            report(measure_batch(llm, requests, distinct, arguments.rows))
        for registered, turn in itertools.product(REGISTERED, TURNS):
            report(measure_registered(llm, requests, registered, turn))
        llm.shutdown()


if __name__ == "__main__":
    main()
