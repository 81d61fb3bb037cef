"""Measure what an adapter costs that the engine has not seen, and what others pay while adapters stream in.

    python scripts/adapter_loading.py --geometry 7b --out adapter_loading_7b.json

Weights are random; each adapter (rank 16, all seven projections) has files of its own.

- first token: from the request to the first token of a prompt of 512 tokens, with an adapter that is new and with the
  same one when it is there; the difference is what loading costs. `wait_ms` of it is the copy to the device, the rest
  (`find_ms`) reading, hashing and laying out. Once the files are in the host's page cache, once they come from the
  disk: `in_page_cache` is the share that the system kept there in spite of being told to let go (a tmpfs keeps all).
- decode: the time of a step of `--rows` rows with 8 adapters, alone and while other adapters come one after another:
  from their files, each forgotten after it came, or from host memory, the least recently used leaving the device; some
  a second, and as fast as they go. `--max-loras` adapters take turns for the places that the 8 leave, and all of them
  fit in host memory; where none has to come, the script ends with an error.
"""

import argparse
import asyncio
import ctypes
import itertools
import json
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from benchmarking.record import write_record

from qwen2_jax import LLM, LoRARequest
from qwen2_jax.sampling_params import RequestOutputKind
from scripts.adapters_workload import WEIGHTS, draw_prompts, generate, greedy, load_workload, start_engine
from scripts.adapters_workload import write_separate_adapters as write_adapters

RUNNING = 8
"""Adapters that decoding rows use."""
PROMPT, SHORT_PROMPT = 512, 64
UNSTEADY = 8
"""Outputs of a stream before all rows run."""
RATE = 10.0
"""Adapters that come a second, where it is not as many as can."""


def first_token(llm: LLM, rng: np.random.Generator, request: LoRARequest) -> float:
    """Return the seconds from a request to its first token."""
    prompts = draw_prompts(rng, 1, PROMPT)
    start = time.perf_counter()
    generate(llm, prompts, [request], 1)
    return time.perf_counter() - start


def measure_first_token(llm: LLM, requests: Sequence[LoRARequest], *, from_disk: bool) -> dict[str, Any]:
    """Time the first request of each adapter, and its next ones."""
    rng = np.random.default_rng(0)
    kept: list[float] = []
    found: dict[str, list[float]] = {name: [] for name in ("new", "resident", "loading", "wait", "find")}
    for request in requests:
        if from_disk:
            kept.append(drop_from_page_cache(Path(request.lora_path) / WEIGHTS))
        waited = llm.lora_stats().wait_seconds
        new = first_token(llm, rng, request)
        wait = llm.lora_stats().wait_seconds - waited
        resident = float(np.median([first_token(llm, rng, request) for _ in range(3)]))
        for name, seconds in zip(found, (new, resident, new - resident, wait, new - resident - wait), strict=True):
            found[name].append(seconds)
    row: dict[str, Any] = {"kind": "first token", "files": "on disk" if from_disk else "in memory"}
    row |= {"adapters": len(requests)} | ({"in_page_cache": float(np.mean(kept))} if from_disk else {})
    for name, seconds in found.items():
        row |= {f"{name}_ms": milliseconds(np.median(seconds)), f"{name}_max_ms": milliseconds(max(seconds))}
    return row


def drop_from_page_cache(path: Path) -> float:
    """Let the system forget a file's content; return the share that it kept.

    Raises:
        OSError: the system does not say what it kept.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mapped = np.memmap(path, np.uint8, mode="r")
    kept = np.empty(-(-mapped.size // mmap.PAGESIZE), np.uint8)
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    if mincore(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(mapped.size), ctypes.c_void_p(kept.ctypes.data)):
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return float((kept & 1).mean())


class Stream:
    """Brings adapters to the device one after another, in a thread of its own, until it is left."""

    def __init__(self, llm: LLM, requests: Sequence[LoRARequest], *, rate: float | None, from_files: bool) -> None:
        """Bring at most `rate` adapters a second; `from_files` forgets each again, so that it is read anew."""
        self._llm, self._requests, self._rate, self._from_files = llm, requests, rate, from_files
        self._end = threading.Event()
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> "Stream":
        self._future = self._thread.submit(self._run)
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._future.result()

    def _run(self) -> None:
        for request in itertools.cycle(self._requests):
            start = time.perf_counter()
            self._llm.load_lora(request)
            if self._from_files:
                self._llm.unload_lora(request.lora_name)
            rest = 0.0 if self._rate is None else start + 1 / self._rate - time.perf_counter()
            if self._end.wait(max(rest, 0)):
                return


def time_steps(llm: LLM, running: Sequence[LoRARequest], rows: int, new_tokens: int) -> list[float]:
    """Return the seconds a step, of each decode call of `rows` rows: from the outputs of one that is streamed."""
    prompts = draw_prompts(np.random.default_rng(0), rows, SHORT_PROMPT)
    outputs: list[tuple[float, int]] = []
    started = threading.Event()

    async def watch() -> None:
        params = greedy(new_tokens, output_kind=RequestOutputKind.DELTA)
        async for output in llm.stream(prompts[0], params, lora_request=running[0]):
            outputs.append((time.perf_counter(), len(output.outputs[0].token_ids)))
            started.set()

    def stream() -> None:
        try:
            asyncio.run(watch())
        finally:
            started.set()

    with ThreadPoolExecutor(1) as threads:
        streamed = threads.submit(stream)
        started.wait()
        # The first row ends first: as long as it streams, all of them run.
        generate(llm, prompts[1:], [running[row % len(running)] for row in range(1, rows)], new_tokens)
        streamed.result()
    steady = itertools.pairwise(outputs[UNSTEADY:])
    return [(end - start) / count for (start, _), (end, count) in steady if count]


def measure_decode(
    llm: LLM,
    running: Sequence[LoRARequest],
    others: Sequence[LoRARequest],
    rows: int,
    new_tokens: int,
    source: str,
    rate: float | None,
) -> dict[str, Any]:
    """Time steps while `others` come from `source`: "none", "files" or "host memory".

    Raises:
        RuntimeError: none would come from host memory, or none came.
    """
    if source == "files":
        known = {adapter.name for adapter in llm.list_loras()}
        for name in known & {request.lora_name for request in others}:
            llm.unload_lora(name)
    elif source == "host memory":
        for request in others:
            llm.load_lora(request)
        check_stream(llm, len(running) + len(others))
    others_come = Stream(llm, others, rate=rate, from_files=source == "files") if source != "none" else nullcontext()
    before, start = llm.lora_stats().num_loads, time.perf_counter()
    with others_come:
        steps = time_steps(llm, running, rows, new_tokens)
        loads, seconds = llm.lora_stats().num_loads - before, time.perf_counter() - start
    if source != "none" and not loads:
        raise RuntimeError(
            f"no adapter came from {source} within the {seconds:.1f} s of {new_tokens} tokens; use more --new-tokens"
        )
    row: dict[str, Any] = {"kind": "decode", "source": source, "rate": rate, "rows": rows, "steps": len(steps)}
    row |= {"loads_per_s": round(loads / seconds, 2)}
    return row | {"step_ms": milliseconds(np.median(steps)), "step_p95_ms": milliseconds(np.percentile(steps, 95))}


def check_stream(llm: LLM, count: int) -> None:
    """Raise `RuntimeError` unless `count` adapters are in host memory, more than there are on the device."""
    stats = llm.lora_stats()
    if stats.num_on_host < count:
        raise RuntimeError(
            f"{stats.num_on_host} of {count} adapters are in host memory, so that the others come from their files; "
            f"start the engine with max_cpu_loras={count}"
        )
    if stats.num_resident >= count:
        raise RuntimeError(
            f"all {count} adapters are on the device, so that none comes from host memory; start the engine with "
            f"max_loras={count - 1} or less"
        )


def milliseconds(seconds: Any) -> float:
    """Return seconds as milliseconds, to a microsecond."""
    return round(float(seconds) * 1e3, 3)


def measure(llm: LLM, requests: Sequence[LoRARequest], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return and print all rows."""
    running, others = requests[:RUNNING], requests[RUNNING:]
    count, rows = arguments.adapters, []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    for request in others[-2:]:  # what only a first adapter pays for
        first_token(llm, np.random.default_rng(0), request)
    report(measure_first_token(llm, others[:count], from_disk=False))
    report(measure_first_token(llm, others[count : 2 * count], from_disk=True))
    for request in running:
        llm.load_lora(request, pin=True)
    sizes = (arguments.rows, arguments.new_tokens)
    time_steps(llm, running, arguments.rows, min(64, arguments.new_tokens))
    series = (("none", None), ("files", RATE), ("files", None), ("host memory", RATE), ("host memory", None))
    for source, rate in (*series, ("none", None)):
        report(measure_decode(llm, running, others, *sizes, source, rate))
    quiet = [row for row in rows if row.get("source") == "none"]
    for row in rows:
        if row["kind"] == "decode":
            for name in ("step", "step_p95"):
                alone = np.mean([other[f"{name}_ms"] for other in quiet])
                row[f"{name}_ratio"] = round(row[f"{name}_ms"] / float(alone), 4)
    return rows


def main() -> None:
    """Measure both and write a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, default=Path(__file__).parent / "workload.py")
    parser.add_argument("--geometry", default="7b")
    parser.add_argument("--rows", type=int, default=32, help="rows that decode")
    parser.add_argument("--new-tokens", type=int, default=1024, help="of each row")
    parser.add_argument("--adapters", type=int, default=8, help="new adapters of each measurement of a first token")
    parser.add_argument("--max-loras", type=int, default=32, help="adapters that fit on the device: 81 MB each for 7B")
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to be measured; None: the system's own")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.max_loras < max(RUNNING, 2 * arguments.adapters) + 2:
        parser.error(f"--max-loras {arguments.max_loras}: use {max(RUNNING, 2 * arguments.adapters) + 2} or more")
    workload = load_workload(arguments.workload)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        count = RUNNING + arguments.max_loras
        requests = write_adapters(Path(folder), workload, arguments.geometry, count)
        size = sum(path.stat().st_size for path in Path(requests[0].lora_path).iterdir())
        llm = start_engine(
            workload,
            arguments.geometry,
            Path(folder),
            max_model_len=2048,
            max_num_seqs=arguments.rows,
            max_loras=arguments.max_loras,
            max_cpu_loras=count,
        )
        rows = measure(llm, requests, arguments)
        llm.shutdown()
    write_record(arguments.out, rows, geometry=arguments.geometry, adapter_mb=round(size / 1e6, 1))


if __name__ == "__main__":
    main()
