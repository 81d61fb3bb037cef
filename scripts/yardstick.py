"""What the rows of `workload.py` say, by metric: beside vLLM's, the limits of the machine and the goals.

A metric's name ends in its unit: milliseconds and seconds should be few, tokens a second many.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent.parent / "docs" / "benchmarks"
FIRST_START = "start to ready, nothing cached (s)"
SECOND_START = "start to ready, cached (s)"
ADAPTERS = 32
"""Adapters that an engine has room for where 1, 8 and all of them are used."""
IDLE_GOAL = 1.01
"""Of what a call without adapters takes in an engine that has room for some, against one that has none."""
LOADING_GOAL_MS = 150
"""Milliseconds that an adapter of 7B costs its first request, from files in the page cache."""
STREAMING_GOAL = 1.05
"""Of a decode step's time while other adapters come, against its time alone."""
Row = Mapping[str, Any]


def metrics(rows: Iterable[Row], used: int = 0) -> dict[str, float]:
    """Return the figures of one run with `used` adapters in use; how it started counts for any number of them."""
    found: dict[str, float] = {}
    for row in rows:
        if "startup_s" in row:
            found[SECOND_START if row.get("cached") else FIRST_START] = row["startup_s"]
        elif row["adapters_used"] != used:
            continue
        elif "decode_batch" in row:
            found[f"decode step, batch {row['decode_batch']} (ms)"] = row["step_ms"]
        elif "mixed_requests" in row:
            found[f"mixed, {row['mixed_requests']} requests (output tokens/s)"] = row["output_tok_s"]
        elif row["prefill_batch"] == 1 and row["length"] == 2048:
            found["time to first token, 1 x 2048 (ms)"] = round(row["seconds"] * 1e3, 1)
        else:
            found[f"prefill {row['prefill_batch']} x {row['length']} (prompt tokens/s)"] = row["prompt_tok_s"]
    order = ("decode", "prefill", "time", "mixed", "start")
    return dict(sorted(found.items(), key=lambda item: order.index(item[0].split()[0].rstrip(","))))


def read_rows(name: str) -> list[Row]:
    """Return the rows of a file of docs/benchmarks."""
    return json.loads((BENCHMARKS / name).read_text())["rows"]


def vllm_metrics(geometry: str, adapters: int = 0, used: int = 0) -> dict[str, float]:
    """Return vLLM's figures."""
    rows = read_rows("vllm_h100.json")
    return metrics([row for row in rows if (row["geometry"], row["adapters"]) == (geometry, adapters)], used)


def goals(geometry: str, used: int = 0) -> dict[str, Row]:
    """Return the limit (where one is known) and the goal of each metric, with `used` adapters in use."""
    rows = [row for row in read_rows("goals.json") if row["geometry"] == geometry]
    return {row["metric"]: row for row in rows if row.get("adapters", 0) == used}


def is_met(metric: str, value: float, goal: float) -> bool:
    """Whether a figure is as good as the goal."""
    return value >= goal if "tokens/s" in metric else value <= goal


def table(geometry: str, found: Mapping[str, float], used: int = 0) -> list[Sequence[str]]:
    """Return a header and a row for each figure: ours, vLLM's, the limit, the goal and whether it is met."""
    vllm, wanted = vllm_metrics(geometry, ADAPTERS if used else 0, used), goals(geometry, used)
    lines: list[Sequence[str]] = [(f"{geometry.upper()} geometry", "qwen2_jax", "vLLM", "limit", "goal", "met")]
    for metric, value in found.items():
        row = wanted.get(metric, {})
        goal = row.get("goal")
        met = "" if goal is None else "yes" if is_met(metric, value, goal) else "no"
        figures = (value, vllm.get(metric), row.get("limit"), goal)
        lines.append((metric, *(format_figure(metric, figure) for figure in figures), met))
    return lines


def with_adapters(metric: str, used: int) -> str:
    """Return a metric's name with the number of adapters."""
    return metric.replace(" (", f", {used} adapter{'s' * (used != 1)} (", 1)


def format_figure(metric: str, figure: float | None) -> str:
    """Return a figure as tables show it; a dash where there is none."""
    if figure is None:
        return "-"
    if "tokens/s" in metric:
        return f"{figure:,.0f}"
    return f"{figure:.1f}" if metric.startswith(("start", "time")) else f"{figure:.2f}"


def format_text(lines: Sequence[Sequence[str]]) -> str:
    """Return the table for a terminal."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
