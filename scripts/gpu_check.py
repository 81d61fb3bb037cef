"""Check this project on a host with one GPU: correctness, accuracy, the kernels' speed, the engine's.

    PYTHONPATH=.:kernels python scripts/gpu_check.py --out results

Parts, each of which can be asked for alone with `--part`:

- suite: the kernels against their references on the GPU, `tests/kernels/test_*on_gpu.py`.
- accuracy: log-probabilities in bfloat16 beside transformers', and greedy tokens in float32 beside golden ones.
- kernels-7b: the shapes of `kernels/bench.py` that tell how each op does.
- yardstick-7b, yardstick-0.5b: `workload.py`, beside vLLM and the goals, and a second start from a warm cache.

These five are "all". The others run only when they are asked for, each longer than what is left of ten minutes:

- kernels-0.5b: the same for that model; up to 200 s.
- adapters-7b, adapters-0.5b: `workload.py` with 32 adapters, beside vLLM and the goals; up to 420 and 200 s.
- adapter-curve: `adapter_curve.py` for 0.5B; up to 420 s.
- adapter-loading: `adapter_loading.py` for 7B; up to 300 s.
- concurrency: `check_concurrency.py` for 7B; up to 300 s.
- sampling: `sampling_time.py` for 0.5B; up to 150 s.
- start: `start_time.py` for 7B, without and with adapters; up to 500 s.

It needs no network. Each part has a budget and is stopped when that is spent: those of "all" are less than ten minutes
together, meant for an H100 with 16 cores. It prints tables, writes a JSON file and logs for each part, and exits with 1
if a check failed, naming it. A goal that is missed is shown, and is no failure.
"""

import argparse
import json
import os
import signal
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarking.record import ROOT, write_record

from scripts.command_runner import Result, Runner, stop_all
from scripts.yardstick import ADAPTERS, format_text, metrics, table, with_adapters

SHARES_GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3"}
"""For processes that run beside others."""
UNTUNED = {"XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"}
"""For processes whose products need not be fast: trying candidates out takes longer than the tests do."""
MOST_TEST_PROCESSES = 12
"""A context on the GPU takes half a gigabyte, and their tests' arrays come on top."""
GEOMETRIES = ("7b", "0.5b")
PARTS = ("suite", "accuracy", "kernels-7b", *(f"yardstick-{geometry}" for geometry in GEOMETRIES))
"""Those that run when none is named."""
OTHER_PARTS = (
    "kernels-0.5b",
    *(f"adapters-{geometry}" for geometry in GEOMETRIES),
    "adapter-curve",
    "adapter-loading",
    "concurrency",
    "sampling",
    "start",
)
"""Those that run only when they are named."""
TOGETHER = ("suite", "accuracy")
"""Parts that run beside each other: what the others time runs alone."""
BUDGETS = {
    "suite": 140,
    "accuracy": 140,
    "kernels-7b": 200,
    "yardstick-7b": 150,
    "yardstick-0.5b": 100,
    "kernels-0.5b": 200,
    "adapters-7b": 420,
    "adapters-0.5b": 200,
    "adapter-curve": 420,
    "adapter-loading": 300,
    "concurrency": 300,
    "sampling": 150,
    "start": 500,
}
"""Seconds."""


def check_suite(out: Path, budget: float) -> list[str]:
    """Run the tests that need a GPU in many processes, since most of their time is compilation; count them by file."""
    report = out / "suite.xml"
    files = sorted((ROOT / "tests" / "kernels").glob("test_*on_gpu.py"))
    result = Runner(out, budget).python(
        "suite",
        *("-m", "pytest", *files, "-p", "no:cacheprovider", f"--junitxml={report}"),
        *("--numprocesses", str(min(os.cpu_count() or 1, MOST_TEST_PROCESSES)), "--dist", "loadgroup"),
        *("-o", "minversion=8.0", "-o", "filterwarnings=default"),
        env=SHARES_GPU | UNTUNED | {"JAX_PLATFORMS": "cuda,cpu"},
    )
    rows, failed = read_report(report, result)
    write_record(out / "suite.json", rows)
    lines: list[Sequence[str]] = [("suite", "passed", "failed", "skipped", "s")]
    lines += [[str(row[name]) for name in ("file", "passed", "failed", "skipped", "seconds")] for row in rows]
    print(format_text(lines), flush=True)
    return failed


def read_report(report: Path, result: Result) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the counts of pytest's report for each file, and what failed; without one, that is what pytest said."""
    if not report.exists():
        return [], result.failures
    rows: dict[str, dict[str, Any]] = {}
    failed = []
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("classname", "").rpartition(".")[2]
        row = rows.setdefault(file, {"file": file, "passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0})
        outcome = "passed"
        if case.find("failure") is not None or case.find("error") is not None:
            outcome = "failed"
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            outcome = "skipped"
        row[outcome] += 1
        row["seconds"] = round(row["seconds"] + float(case.get("time", 0)), 1)
    report.unlink()
    return sorted(rows.values(), key=lambda row: row["file"]), failed or result.failures


def check_accuracy(out: Path, budget: float) -> list[str]:
    """Compare with transformers and with golden data, at the same time."""
    runner = Runner(out, budget)
    commands = {
        "accuracy": ("scripts/accuracy.py", "--out", out / "accuracy.json"),
        "golden": ("scripts/check_golden.py", "--dtypes", "float32", "--out", out / "golden.json"),
    }
    with ThreadPoolExecutor(len(commands)) as threads:
        results = list(threads.map(lambda item: runner.python(item[0], *item[1], env=SHARES_GPU), commands.items()))
    failed = []
    for (name, _), result in zip(commands.items(), results, strict=True):
        path = out / f"{name}.json"
        known = json.loads(path.read_text())["failures"] if path.exists() else []
        failed += known or result.failures
        print(result.output.rstrip(), flush=True)
    return failed


def check_kernels(geometry: str, out: Path, budget: float) -> list[str]:
    """Time the ops; a case that fails is a failure, one that an implementation does not support is none."""
    path = out / f"kernels_{geometry}.json"
    options = ("--headline", "--geometry", geometry, "--out", path)
    result = Runner(out, budget).python(path.stem, "kernels/bench.py", *options)
    print(result.output.rstrip(), flush=True)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    names = ("op", "implementation", "geometry", "dtype", "shape")
    errors = [f"{' '.join(row[name] for name in names)}: {row['error']}" for row in rows if "error" in row]
    return result.failures + errors


def check_yardstick(geometry: str, workload: Path, out: Path, budget: float) -> list[str]:
    """Run the workload from nothing cached, and start once more from what that left."""
    runner, rows = Runner(out, budget), []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {"XDG_CACHE_HOME": folder, "JAX_COMPILATION_CACHE_DIR": f"{folder}/jax"}
        for name, extra in (("", ()), ("_second_start", ("--skip", "decode,prefill,mixed"))):
            arguments = ("--engine", "qwen2_jax", "--geometry", geometry, "--out", f"{folder}/rows.json", *extra)
            result = runner.python(f"yardstick_{geometry}{name}", workload, *arguments, env=environment)
            found = _json_lines(result.output)
            rows += [row | {"cached": True} for row in found[:1]] if extra else found
            failed += result.failures
            if result.failures:
                break
    write_record(out / f"yardstick_{geometry}.json", rows)
    print(format_text(table(geometry, metrics(rows))), flush=True)
    return failed


def check_adapters(geometry: str, workload: Path, out: Path, budget: float) -> list[str]:
    """Run the workload with adapters; what was measured when the time was over is kept."""
    name = f"adapters_{geometry}"
    options = ("--adapters", str(ADAPTERS), "--batches", "1,8,32,128", "--out", out / f"{name}_rows.json")
    result = Runner(out, budget).python(name, workload, "--engine", "qwen2_jax", "--geometry", geometry, *options)
    rows = _json_lines(result.output)
    write_record(out / f"{name}.json", rows)
    for used in (0, 1, 8, ADAPTERS):
        header, *lines = table(geometry, metrics(rows, used), used)
        lines = [(with_adapters(metric, used), *cells) for metric, *cells in lines if not metric.startswith("start")]
        print(format_text([header, *lines]), flush=True)
    return result.failures


def check_script(script: str, record: str, options: Sequence[str | Path], out: Path, budget: float) -> list[str]:
    """Run a script of measurements that writes a record of its own, and show its rows."""
    result = Runner(out, budget).python(record, f"scripts/{script}.py", *options, "--out", out / f"{record}.json")
    print("\n".join(map(json.dumps, _json_lines(result.output))), flush=True)
    return result.failures


def check_start(geometry: str, out: Path, budget: float) -> list[str]:
    """Start engines without and with room for adapters, by number of lowering workers, and show the seconds."""
    runner, failed = Runner(out, budget), list[str]()
    for adapters in (0, ADAPTERS):
        name = f"start_{geometry}_{adapters}_adapters"
        options = ("--geometry", geometry, "--adapters", str(adapters), "--out", out / f"{name}.json")
        result = runner.python(name, "scripts/start_time.py", *options)
        print("\n".join(map(json.dumps, _json_lines(result.output))), flush=True)
        failed += result.failures
    return failed


def _json_lines(output: str) -> list[dict[str, Any]]:
    """Return the rows that a script has printed, one a line."""
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"')]


def main() -> None:
    """Run the parts and say what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON files and logs")
    parser.add_argument("--part", choices=[*PARTS, *OTHER_PARTS, "all"], default="all")
    parser.add_argument("--workload", type=Path, default=Path(__file__).parent / "workload.py")
    arguments = parser.parse_args()
    out, workload = arguments.out.resolve(), arguments.workload.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop_all)

    def yardstick(geometry: str, budget: float) -> list[str]:
        return check_yardstick(geometry, workload, out, budget)

    def adapters(geometry: str, budget: float) -> list[str]:
        return check_adapters(geometry, workload, out, budget)

    def kernels(geometry: str, budget: float) -> list[str]:
        return check_kernels(geometry, out, budget)

    def script(name: str, record: str, geometry: str, *options: str | Path) -> Callable[[float], list[str]]:
        return partial(check_script, name, record, ("--geometry", geometry, *options), out)

    checks: dict[str, Callable[[float], list[str]]] = {
        "suite": partial(check_suite, out),
        "accuracy": partial(check_accuracy, out),
        **{f"kernels-{geometry}": partial(kernels, geometry) for geometry in GEOMETRIES},
        **{f"yardstick-{geometry}": partial(yardstick, geometry) for geometry in GEOMETRIES},
        **{f"adapters-{geometry}": partial(adapters, geometry) for geometry in GEOMETRIES},
        "adapter-curve": script("adapter_curve", "adapter_curve", "0.5b", "--workload", workload),
        "adapter-loading": script("adapter_loading", "adapter_loading_7b", "7b", "--workload", workload),
        "concurrency": script("check_concurrency", "concurrency_7b", "7b"),
        "sampling": script("sampling_time", "sampling_0.5b", "0.5b"),
        "start": partial(check_start, "7b", out),
    }
    alone = [[name] for name in PARTS if name not in TOGETHER]
    groups = [list(TOGETHER), *alone] if arguments.part == "all" else [[arguments.part]]

    def run(name: str) -> list[str]:
        return checks[name](BUDGETS[name])

    failed: list[str] = []
    for group in groups:
        start = time.monotonic()
        with ThreadPoolExecutor(len(group)) as threads:
            failed += [failure for found in threads.map(run, group) for failure in found]
        print(f"--- {' and '.join(group)}: {time.monotonic() - start:.0f} s\n", flush=True)
    if failed:
        raise SystemExit("failed:\n  " + "\n  ".join(failed))
    print("all checks passed")


if __name__ == "__main__":
    main()
