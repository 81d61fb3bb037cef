"""The scripts without a GPU: what they time, what they count as a failure, when they stop, and what the demo shows."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarking.record import make_record, write_record
from qwen2_kernels.specs import QWEN2_5

from qwen2_jax import SamplingParams
from qwen2_jax.config import ModelConfig
from qwen2_jax.lora.files import WEIGHTS
from qwen2_jax.lora.reader import read_adapter
from qwen2_jax.models.hub import resolve
from qwen2_jax.models.weights import open_checkpoint
from scripts import accuracy, check_golden, demo, sampling_time, workload, yardstick
from scripts.command_runner import Result, Runner
from scripts.gpu_check import BUDGETS, OTHER_PARTS, PARTS, TOGETHER, read_report

ROWS = [
    {"engine": "qwen2_jax", "geometry": "7b", "adapters": 8, "startup_s": 50.0},
    {"adapters_used": 0, "decode_batch": 32, "step_ms": 5.0, "decode_tok_s": 6400.0},
    {"adapters_used": 8, "decode_batch": 32, "step_ms": 6.0, "decode_tok_s": 5333.3},
    {"adapters_used": 0, "prefill_batch": 1, "length": 2048, "seconds": 0.0456, "prompt_tok_s": 44912.3},
    {"adapters_used": 0, "prefill_batch": 16, "length": 2048, "seconds": 0.7, "prompt_tok_s": 46811.4},
    {"adapters_used": 0, "mixed_requests": 512, "seconds": 10.0, "output_tok_s": 7300.0, "total_tok_s": 30000.0},
    {"engine": "qwen2_jax", "geometry": "7b", "startup_s": 9.0, "cached": True},
]


def test_records_name_what_they_were_measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(Path(workload.__file__)), "--geometry", "7b"])
    write_record(tmp_path / "new" / "rows.json", ROWS, limits={"GB/s": 1})
    record = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert record == make_record(ROWS, limits={"GB/s": 1})
    assert record["command"] == "python scripts/workload.py --geometry 7b"
    assert set(record) >= {"hardware", "date", "commit", "versions"} and "jax" in record["versions"]
    write_record(tmp_path / "none.json", [])
    assert json.loads((tmp_path / "none.json").read_text())["rows"] == []


@pytest.mark.parametrize("name", workload.GEOMETRIES)
def test_the_workload_has_the_geometries_of_the_kernels(name: str) -> None:
    assert {key: getattr(QWEN2_5[name], key) for key in workload.GEOMETRIES[name]} == workload.GEOMETRIES[name]


def test_the_workload_reports_every_measurement() -> None:
    calls: list[tuple[int, int]] = []
    rows: list[dict[str, Any]] = []

    def run(lengths: Any, new_tokens: Any, used: int) -> float:
        calls.append((len(lengths), used))
        return 0.1 + 0.01 * max(new_tokens) + 1e-5 * sum(lengths)

    def report(**row: Any) -> None:
        rows.append(row)

    workload.measure_decode(run, report, [4], 512, 2)
    workload.measure_prefill(run, report, 2)
    workload.measure_mixed(run, report, 2)
    assert rows[0] == {"adapters_used": 2, "decode_batch": 4, "step_ms": 10.0, "decode_tok_s": 400.0}
    assert [(row["prefill_batch"], row["length"]) for row in rows[1:4]] == [(1, 2048), (16, 2048), (1, 8000)]
    assert calls[-1] == (512, 2) and rows[4]["output_tok_s"] < rows[4]["total_tok_s"]


def test_metrics_are_read_from_rows() -> None:
    assert yardstick.metrics(ROWS) == {
        "decode step, batch 32 (ms)": 5.0,
        "prefill 16 x 2048 (prompt tokens/s)": 46811.4,
        "time to first token, 1 x 2048 (ms)": 45.6,
        "mixed, 512 requests (output tokens/s)": 7300.0,
        "start to ready, nothing cached (s)": 50.0,
        "start to ready, cached (s)": 9.0,
    }
    assert yardstick.metrics(ROWS, 8)["decode step, batch 32 (ms)"] == 6.0


def test_tables_show_vllm_limits_and_goals() -> None:
    lines = {line[0]: tuple(line[1:]) for line in yardstick.table("7b", yardstick.metrics(ROWS))}
    assert lines["decode step, batch 32 (ms)"] == ("5.00", "6.66", "4.86", "5.70", "yes")
    assert lines["prefill 16 x 2048 (prompt tokens/s)"] == ("46,811", "46,688", "58,000", "50,000", "no")
    assert lines["start to ready, cached (s)"] == ("9.0", "-", "-", "15.0", "yes")


@pytest.mark.parametrize("geometry", ["7b", "0.5b"])
def test_every_goal_is_measured(geometry: str) -> None:
    measured = yardstick.metrics(yardstick.read_rows(f"yardstick_{geometry}.json"))
    assert yardstick.goals(geometry).keys() <= measured.keys() | {yardstick.SECOND_START}


def test_accuracy_is_checked_against_transformers() -> None:
    good = {"mean": 0.011, "mean_largest": 0.1, "largest": 0.3}
    row = {"model": "m", "tokens": "new", "count": 9, "transformers": {"mean": 0.01, "mean_largest": 0.1}}
    assert accuracy.failures([row | {"qwen2_jax": good}], 1.1) == []
    for name, value in (("mean", 0.0111), ("mean_largest", 0.12), ("mean", float("nan"))):
        [failure] = accuracy.failures([row | {"qwen2_jax": good | {name: value}}], 1.1)
        assert failure.startswith(f"m, new tokens: {name.replace('_', ' ')} error {value} is more than 1.1 x")


def test_golden_data_binds_float32_only() -> None:
    good = {"case": "c", "dtype": "float32", "greedy_equal": 4, "prompts": 4, "largest_error": 1e-5}
    bad = [good | {"greedy_equal": 3}, good | {"largest_error": 2e-4}, good | {"largest_error": float("nan")}]
    assert check_golden.failures([good, good | {"dtype": "bfloat16", "greedy_equal": 1}]) == []
    assert len(check_golden.failures(bad)) == 3


def test_all_parts_end_within_ten_minutes() -> None:
    together = max(BUDGETS[name] for name in TOGETHER)
    assert together + sum(BUDGETS[name] for name in PARTS if name not in TOGETHER) < 600
    assert set(TOGETHER) < set(PARTS) and {*PARTS, *OTHER_PARTS} == BUDGETS.keys()


def test_a_suite_is_counted_by_file(tmp_path: Path) -> None:
    cases = {
        "tests.kernels.test_b": ["", "<skipped/>", "<failure/>"],
        "tests.kernels.test_a": ["", ""],
    }
    lines = [
        f'<testcase classname="{name}" name="test[{index}]" time="1.5">{outcome}</testcase>'
        for name, outcomes in cases.items()
        for index, outcome in enumerate(outcomes)
    ]
    report = tmp_path / "suite.xml"
    report.write_text(f"<testsuites><testsuite>{''.join(lines)}</testsuite></testsuites>")
    result = Result(failures=["suite: exit status 1"], seconds=9, output="")
    rows, failed = read_report(report, result)
    assert [(row["file"], row["passed"], row["failed"], row["skipped"], row["seconds"]) for row in rows] == [
        ("test_a", 2, 0, 0, 3.0),
        ("test_b", 1, 1, 1, 4.5),
    ]
    assert failed == ["tests.kernels.test_b::test[2]"]
    assert read_report(report, result) == ([], ["suite: exit status 1"])


def test_commands_are_logged_and_their_last_words_reported(tmp_path: Path) -> None:
    runner = Runner(tmp_path, 60)
    assert runner.python("good", "-c", "print('fine')").failures == []
    assert (tmp_path / "good.log").read_text() == "fine\n"
    [failure] = runner.python("bad", "-c", "raise SystemExit('no GPU')").failures
    assert failure.startswith("bad: exit status 1: no GPU")


def test_commands_stop_with_their_part(tmp_path: Path) -> None:
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    result = Runner(tmp_path, 1).python("slow", "-c", program)
    assert result.seconds < 30 and result.failures[0].startswith("slow: stopped, its time was over")


def test_a_signal_stops_commands_too(tmp_path: Path) -> None:
    """They have groups of their own, which no key of the terminal reaches."""
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    program = (
        "import signal, sys; from pathlib import Path; from scripts.command_runner import Runner, stop_all; "
        f"signal.signal(signal.SIGTERM, stop_all); Runner(Path({str(tmp_path)!r}), 60).python('child', '-c', {child!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    log = tmp_path / "child.log"
    wait_for(lambda: log.exists() and log.read_text().endswith("\n"))
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    wait_for(lambda: not is_running(int(log.read_text())))


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether a process is there that has not ended; one that nobody has waited for is a zombie."""
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("kind", sampling_time.KINDS)
def test_a_steps_time_leaves_the_prompts_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, clock = list[Any](), [0.0]

    class Engine:
        def generate(self, prompts: list[Any], params: SamplingParams, **_: Any) -> None:
            asked.append((len(prompts), params))
            assert params.max_tokens is not None
            clock[0] += 0.5 + 0.003 * params.max_tokens

    monkeypatch.setattr(sampling_time.time, "perf_counter", lambda: clock[0])
    row = sampling_time.measure(Engine(), np.random.default_rng(0), 4, kind)  # pyright: ignore[reportArgumentType]
    assert row == {"decode_batch": 4, "sampling": kind, "step_ms": 3.0}
    assert {count for count, _ in asked} == {4}
    assert all(params.temperature == sampling_time.KINDS[kind]["temperature"] for _, params in asked)


def test_the_demo_shows_answers_side_by_side() -> None:
    answers = {
        "base": "The capital is Paris.",
        "pirate": "Arr, 'tis Paris, ye scurvy dog!",
        "json": "{}",
        "one-word": "",
    }
    lines = demo.columns(answers, 61).splitlines()
    assert max(map(len, lines)) <= 61
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert cells[0] == list(answers)
    assert [" ".join(column).strip() for column in zip(*cells[2:], strict=True)] == list(answers.values())
    assert len(demo.columns(answers, 1).splitlines()[0]) > 1


@pytest.mark.parametrize("name", demo.NAMES)
def test_the_adapters_of_the_demo_are_small_and_fit_its_model(name: str) -> None:
    assert (demo.ADAPTERS / name / WEIGHTS).stat().st_size <= 2_000_000
    base = ModelConfig.from_hf(open_checkpoint(resolve("smollm2")).config)
    adapter = read_adapter(demo.ADAPTERS / name, base)
    assert {layer for layer, _ in adapter.linear} == set(range(base.num_hidden_layers))
    assert 0 < adapter.max_rank <= demo.MAX_RANK
