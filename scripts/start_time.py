"""Measure how long an engine takes to start: with nothing kept, by number of lowering workers, and from what that left.

    python scripts/start_time.py --geometry 7b --workers 0,8 --out start.json
    python scripts/start_time.py --geometry 7b --adapters 32 --workers 0,8 --out start_adapters.json

Each start is a process of its own, with random weights and caches in a folder of its own; the last one starts again
from the caches of the one before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarking.record import write_record

from scripts.workload import GEOMETRIES, write_model


def start(model: Path, adapters: int, workers: int) -> None:
    """Start an engine as the workload does, and print the seconds that it took."""
    from qwen2_jax import LLM

    options: dict[str, Any] = {"max_model_len": 8192, "max_num_seqs": 256, "enable_prefix_caching": False}
    if adapters:
        options |= {"enable_lora": True, "max_loras": adapters, "max_lora_rank": 16, "max_cpu_loras": adapters}
    begin = time.perf_counter()
    llm = LLM(
        str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        use_tqdm_on_load=False,
        lowering_workers=workers,
        **options,
    )
    print(json.dumps({"seconds": round(time.perf_counter() - begin, 1)}), flush=True)
    llm.shutdown()


def measure(model: Path, adapters: int, workers: int, cache: Path) -> dict[str, Any]:
    """Start an engine in another process, which keeps what it compiles in `cache`."""
    kept = cache.exists()
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_COMPILATION_CACHE_DIR": str(cache / "jax")}
    command = [sys.executable, __file__, "--start", str(model), "--adapters", str(adapters), "--workers", str(workers)]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    [row] = [json.loads(line) for line in output.splitlines() if line.startswith('{"seconds')]
    return {"adapters": adapters, "lowering_workers": workers, "cached": kept} | row


def main() -> None:
    """Measure each number of workers and write a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="7b")
    parser.add_argument("--adapters", type=int, default=0, help="room for so many of rank 16")
    parser.add_argument("--workers", default="0,8", help="numbers of lowering workers, separated by commas")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)  # what a process of its own is told
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.workers.split(",")]
    if arguments.start is not None:
        start(arguments.start, arguments.adapters, counts[0])
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model, arguments.geometry)
        for index, count in enumerate([*counts, counts[-1]]):
            cache = Path(folder) / f"cache{min(index, len(counts) - 1)}"
            rows.append(measure(model, arguments.adapters, count, cache))
            print(json.dumps(rows[-1]), flush=True)
            if arguments.out is not None:
                write_record(arguments.out, rows, geometry=arguments.geometry)


if __name__ == "__main__":
    main()
