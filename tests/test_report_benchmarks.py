"""The documentation's tables and plots: that the committed ones are those of the records, and what they show."""

import re
from pathlib import Path
from typing import Any

import pytest

from scripts import benchmark_plots, benchmark_tables, report_benchmarks

HEAD = {
    "hardware": "H100",
    "date": "2026-01-02",
    "commit": "abc",
    "command": "python run.py",
    "versions": {"jax": "1", "python": "3"},
}


def kernel_row(op: str, implementation: str, shape: str, dtype: str = "bfloat16", **result: Any) -> dict[str, Any]:
    row = {"op": op, "implementation": implementation, "shape": shape, "dtype": dtype}
    return row | {"GB/s": 2000.4, "limit": "bandwidth"} | result


KERNELS = HEAD | {
    "rows": [
        kernel_row("linear", "xla", "qkv, 8 tokens", us=9.0, share=0.5),
        kernel_row("linear", "mosaic", "qkv, 8 tokens", us=6.04, share=0.746),
        kernel_row("linear", "triton", "qkv, 8 tokens", error="broken"),
        kernel_row("linear", "triton", "qkv, 1 tokens", us=5.0, share=0.9),
        kernel_row("linear", "mosaic", "qkv, 1 tokens", unsupported="one token"),
        kernel_row("rms_norm", "triton", "8192 tokens", us=80.0, share=0.8),
        kernel_row("paged_attention_decode", "triton", "8 x 1024", us=20.0, share=0.6),
        kernel_row("paged_attention_decode", "triton", "32 x 2048", us=90.0, share=0.9),
        kernel_row("paged_attention_decode", "triton", "32 x 2048", "float8_e4m3fn", us=50.0, share=0.8),
        kernel_row("flash_attention", "mosaic", "1 x 8192", **{"us": 99.0, "share": 0.77, "limit": "matmul"})
        | {"TFLOP/s": 590.2},
        kernel_row("write_kv", "triton", "1 tokens", error="broken"),
    ]
}
YARDSTICK = HEAD | {
    "rows": [
        {"startup_s": 50.0},
        {"adapters_used": 0, "decode_batch": 32, "step_ms": 5.0, "decode_tok_s": 6400.0},
        {"adapters_used": 0, "decode_batch": 64, "step_ms": 6.0, "decode_tok_s": 10666.7},
        {"adapters_used": 0, "mixed_requests": 512, "seconds": 10.0, "output_tok_s": 9000.0, "total_tok_s": 30000.0},
    ]
}
ADAPTERS = HEAD | {
    "note": "a part of it",
    "rows": [
        {"startup_s": 60.0},
        {"adapters_used": 0, "decode_batch": 32, "step_ms": 5.05, "decode_tok_s": 6336.6},
        {"adapters_used": 8, "decode_batch": 32, "step_ms": 6.0, "decode_tok_s": 5333.3},
        {"adapters_used": 32, "mixed_requests": 512, "seconds": 9.0, "output_tok_s": 8000.0, "total_tok_s": 25000.0},
    ],
}
CURVE = HEAD | {
    "geometry": "0.5b",
    "rows_per_batch": 256,
    "rows": [
        *({"kind": "batch", "adapters": n, "step_ms": 4.0 + n, "tokens/s": 64e3 / (4 + n)} for n in (0, 1, 256)),
        {"kind": "registered", "turn": "first", "adapters": 1, "distinct": 1, "tokens/s": 9e3, "loads": 1},
        {"kind": "registered", "turn": "again", "adapters": 500, "distinct": 200, "tokens/s": 8e3, "loads": 317},
    ],
}
FIRST_TOKEN = {"new": 150.0, "resident": 40.0, "loading": 110.04, "wait": 30.0, "find": 80.0}
LOADING = HEAD | {
    "geometry": "7b",
    "adapter_mb": 80.7,
    "rows": [
        {"kind": "first token", "files": "in memory", "adapters": 8}
        | {f"{name}_ms": ms for name, ms in FIRST_TOKEN.items()}
        | {f"{name}_max_ms": 2 * ms for name, ms in FIRST_TOKEN.items()},
        {
            "kind": "decode",
            "source": "files",
            "rate": 10.0,
            "rows": 32,
            "loads_per_s": 9.96,
            "step_ms": 7.4,
            "step_p95_ms": 8.5,
        }
        | {"step_ratio": 1.02, "step_p95_ratio": 1.1},
    ],
}
RECORDS: dict[str, Any] = {
    "kernels_7b": KERNELS,
    "kernels_0.5b": KERNELS,
    "yardstick_7b": YARDSTICK,
    "adapters_7b": ADAPTERS,
    "adapter_curve": CURVE,
    "adapter_loading_7b": LOADING,
}


def lines(text: str) -> dict[str, list[str]]:
    """Return the cells of each row of a table by its first cell."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in rows}


def test_committed_tables_and_plots_are_up_to_date() -> None:
    assert report_benchmarks.outdated() == []


def test_every_table_and_plot_has_a_place() -> None:
    found = [
        match for path in report_benchmarks.DOCUMENTS for match in re.findall("<!-- (.*): (.*) -->", path.read_text())
    ]
    assert sorted(name for kind, name in found if kind == "table") == sorted(
        benchmark_tables.make_tables(lambda _: None, "")
    )
    assert sorted(name for kind, name in found if kind == "plot") == sorted(benchmark_plots.PLOTS)


def test_measurements_stand_beside_the_floor_vllm_and_the_goal() -> None:
    text = benchmark_tables.make_tables(RECORDS.get, "here")["yardstick-7b"]
    assert text.startswith("H100, 2026-01-02, commit abc, jax 1; `python run.py` ([JSON](here/yardstick_7b.json))\n\n|")
    rows = lines(text)
    assert rows["decode step, batch 32 (ms)"] == ["4.86", "6.66", "5.70", "5.00", "0.75"]
    assert rows["mixed, 512 requests (output tokens/s)"] == ["-", "6,926", "9,000", "9,000", "1.30"]
    assert "start to ready, cached (s)" not in rows


def test_adapters_stand_beside_the_goal_and_the_engine_without_them() -> None:
    text = benchmark_tables.make_tables(RECORDS.get, "here")["adapters-7b"]
    assert "([JSON](here/adapters_7b.json)); a part of it\n" in text
    rows = lines(text)
    assert rows["decode step, batch 32, 8 adapters (ms)"] == ["5.07", "10.91", "6.50", "6.00", "0.55", "5.05"]
    assert rows["decode step, batch 1, 1 adapter (ms)"] == ["4.55", "8.04", "5.60", "-", "-", "-"]
    mixed = rows["mixed, 512 requests, 32 adapters (output tokens/s)"]
    assert mixed == ["-", "3,435", "8,000", "8,000", "2.33", "-"]


def test_room_that_is_not_used_is_compared_with_none() -> None:
    text = benchmark_tables.make_tables(RECORDS.get, "here")["adapters-idle"]
    assert text.startswith("7B: H100, 2026-01-02, commit abc, and H100, 2026-01-02, commit abc\n")
    rows = lines(text)
    assert rows.pop("7B, decode step, batch 32 (ms)") == ["5.00", "5.05", "1.01", "1.01"]
    assert rows.keys() == {"measurement", "---"}


def test_loading_shows_what_the_first_request_and_the_others_pay() -> None:
    rows = lines(benchmark_tables.make_tables(RECORDS.get, "here")["adapter-loading"])
    assert rows["files in memory"] == ["150.0", "40.0", "110.0", "220.1", "80.0", "30.0", "150"]
    assert rows["32 rows, files, 10 a second"] == ["10.0", "7.40", "8.50", "1.02", "1.10", "1.05"]


def test_kernels_stand_beside_other_implementations() -> None:
    text = benchmark_tables.make_tables(RECORDS.get, "here")["kernels-7b"]
    assert "| linear | qkv, 8 tokens | bfloat16 | mosaic | 6.0 | 2,000 GB/s | 75% | xla 9.0, triton failed |\n" in text
    assert "| linear | qkv, 1 token | bfloat16 | triton | 5.0 | 2,000 GB/s | 90% | - |\n" in text
    assert "| flash_attention | 1 x 8192 | bfloat16 | mosaic | 99.0 | 590 TFLOP/s | 77% | - |\n" in text
    assert "write_kv" not in text


def test_ops_have_a_table_by_tokens_or_by_step() -> None:
    tables = benchmark_tables.make_tables(RECORDS.get, "here")
    assert tables["linear"].startswith("H100, 2026-01-02, commit abc ([7B](here/kernels_7b.json), [0.5B](")
    rows = lines(tables["linear"])
    assert rows["shape"] == ["1 token", "8 tokens"]
    assert rows["7B geometry, qkv"] == ["90% (5.0 us, triton)", "75% (6.0 us, mosaic)"]
    assert lines(tables["rms_norm"])["0.5B geometry"] == ["80% (80.0 us, triton)"]
    rows = lines(tables["paged_attention"])
    assert rows["shape"] == ["7B geometry", "0.5B geometry"]
    assert rows["decode, 32 x 2048, float8_e4m3fn"] == ["80% (50.0 us, triton)"] * 2
    assert tables["norm_linear"] == tables["write_kv"] == ""


def test_accuracy_shows_both_engines() -> None:
    errors = {"mean": 0.01, "mean_largest": 0.1, "largest": 0.3}
    row = {"model": "m", "tokens": "new", "count": 1480, "qwen2_jax": errors, "transformers": errors | {"mean": 0.02}}
    text = benchmark_tables.make_tables({"accuracy": HEAD | {"rows": [row]}}.get, "here")["accuracy"]
    assert lines(text)["m, 1,480 new tokens"] == ["0.01", "0.02", "0.1", "0.1", "0.3", "0.3"]


def test_documents_are_filled_between_markers() -> None:
    text = "before\n<!-- table: rms_norm -->\nold\n<!-- end -->\nbetween\n<!-- plot: step_time -->\n<!-- end -->\n"
    filled = report_benchmarks.fill(text, RECORDS.get, "here")
    assert "old" not in filled and "80% (80.0 us, triton)" in filled and "](here/step_time.svg)" in filled
    assert report_benchmarks.fill(filled, RECORDS.get, "here") == filled
    without = report_benchmarks.fill(filled, lambda _: None, "here")
    assert without == text.replace("old\n", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: missing -->\n<!-- end -->\n", "there is no table 'missing'; use one of xla"),
        ("<!-- plot: missing -->\n<!-- end -->\n", "there is no plot 'missing'; use one of step_time"),
        ("<!-- table: cpu -->\n<!-- table: xla -->\n<!-- end -->\n", "needs one <!-- end -->"),
    ],
)
def test_markers_that_mean_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        report_benchmarks.fill(text, RECORDS.get, "here")


@pytest.mark.slow
def test_plots_are_the_same_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        benchmark_plots.write_plots(RECORDS.get, tmp_path / name)
    plots = sorted((tmp_path / "one").iterdir())
    assert [path.stem for path in plots] == sorted(benchmark_plots.PLOTS)
    for path in plots:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert "vLLM" in (tmp_path / "one" / "step_time.svg").read_text()
    assert "32 x 2048" in (tmp_path / "one" / "attention_time.svg").read_text()
    assert "317 loads" in (tmp_path / "one" / "adapters_registered.svg").read_text()


def test_plots_need_what_they_show() -> None:
    assert benchmark_plots.available(lambda _: None) == []
    linear = HEAD | {"rows": [row for row in KERNELS["rows"] if row["op"] == "linear"]}
    assert benchmark_plots.available({"kernels_7b": linear}.get) == ["kernel_shares"]
