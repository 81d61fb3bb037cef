"""The tables of docs/benchmarks.md and kernels/README.md, in Markdown, from the records of docs/benchmarks.

A record that is not there, and what it does not hold, gives no table or no row.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from scripts import yardstick

GEOMETRIES = ("7b", "0.5b")
OPS = ("linear", "norm_linear", "rms_norm", "write_kv", "paged_attention", "flash_attention", "lora")
Row = Mapping[str, Any]
Record = Mapping[str, Any]
Read = Callable[[str], Record | None]
"""Returns the record of a file of docs/benchmarks by its name without `.json`, or None where there is none."""


def read_record(name: str) -> Record | None:
    """Return a record of docs/benchmarks."""
    path = yardstick.BENCHMARKS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def make_tables(read: Read, link: str) -> dict[str, str]:
    """Return every table by name, an empty text where its record is missing; `link` leads to docs/benchmarks."""
    link_to = partial(_source, link)
    kernels = {name: read(f"kernels_{name}") for name in GEOMETRIES}
    found = {name: record for name, record in kernels.items() if record is not None}
    tables = {"xla": xla_table(read("xla_h100"), link_to), "cpu": cpu_table(read("cpu_smollm2"))}
    tables["accuracy"] = accuracy_table(read("accuracy"), link_to)
    for name in GEOMETRIES:
        tables[f"yardstick-{name}"] = yardstick_table(name, read(f"yardstick_{name}"), link_to)
        tables[f"adapters-{name}"] = adapters_table(name, read(f"adapters_{name}"), link_to)
        tables[f"kernels-{name}"] = kernels_table(name, kernels[name], link_to)
    tables["adapters-idle"] = idle_table(read)
    tables["adapter-loading"] = loading_table(read, link_to)
    return tables | {op: op_table(op, found, link) for op in OPS}


def markdown(lines: Sequence[Sequence[str]], names: int = 1) -> str:
    """Return a table whose first line is its header; behind the first `names` columns are figures, at the right."""
    header, *rows = lines
    rule = ["---" if index < names else "---:" for index in range(len(header))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *rows))


def _source(link: str, name: str, record: Record) -> str:
    """Say where a record comes from."""
    versions = [f"{key} {record['versions'][key]}" for key in ("jax", "triton") if key in record["versions"]]
    known = ", ".join([_run(record), *versions])
    note = f"; {record['note']}" if "note" in record else ""
    return f"{known}; `{record['command']}` ([JSON]({link}/{name}.json)){note}"


def _run(record: Record) -> str:
    return f"{record['hardware']}, {record['date']}, commit {record['commit']}"


Source = Callable[[str, Record], str]
"""Says where a record comes from, given the name of its file."""


def yardstick_table(geometry: str, record: Record | None, source: Source) -> str:
    """Return one row for each measurement: the floor, vLLM's figure, the goal, ours, and ours over vLLM's."""
    if record is None:
        return ""
    lines: list[Sequence[str]] = [
        (f"{geometry.upper()} geometry", "floor", "vLLM", "goal", "measured", "measured / vLLM")
    ]
    vllm, wanted = yardstick.vllm_metrics(geometry), yardstick.goals(geometry)
    for metric, value in yardstick.metrics(record["rows"]).items():
        row = wanted.get(metric, {})
        figures = (row.get("limit"), vllm.get(metric), row.get("goal"), value)
        ratio = f"{value / vllm[metric]:.2f}" if metric in vllm else "-"
        lines.append((metric, *(yardstick.format_figure(metric, figure) for figure in figures), ratio))
    return f"{source(f'yardstick_{geometry}', record)}\n\n{markdown(lines)}"


def adapters_table(geometry: str, record: Record | None, source: Source) -> str:
    """Return one row for each goal of adapters, beside the same engine's figure while none is used."""
    if record is None:
        return ""
    header = f"{geometry.upper()} geometry, 16 ranks on all seven projections"
    lines: list[Sequence[str]] = [
        (header, "floor", "vLLM", "goal", "measured", "measured / vLLM", "measured, none used")
    ]
    none_used = yardstick.metrics(record["rows"])
    for used in (1, 8, yardstick.ADAPTERS):
        found, vllm = (
            yardstick.metrics(record["rows"], used),
            yardstick.vllm_metrics(geometry, yardstick.ADAPTERS, used),
        )
        for metric, row in yardstick.goals(geometry, used).items():
            value = found.get(metric)
            ratio = "-" if value is None or metric not in vllm else f"{value / vllm[metric]:.2f}"
            figures = [row.get("limit"), vllm.get(metric), row["goal"], value]
            cells = [yardstick.format_figure(metric, figure) for figure in [*figures, none_used.get(metric)]]
            lines.append((yardstick.with_adapters(metric, used), *cells[:-1], ratio, cells[-1]))
    return f"{source(f'adapters_{geometry}', record)}\n\n{markdown(lines)}"


def idle_table(read: Read) -> str:
    """Return what room for adapters costs that nobody uses: the same measurements with and without it."""
    lines: list[Sequence[str]] = [("measurement", "without room", "with room", "with / without", "goal")]
    sources = []
    for name in GEOMETRIES:
        without, room = read(f"yardstick_{name}"), read(f"adapters_{name}")
        if without is None or room is None:
            continue
        sources += [f"{name.upper()}: {_run(without)}, and {_run(room)}"]
        before = yardstick.metrics(without["rows"])
        for metric, value in yardstick.metrics(room["rows"]).items():
            if metric in before and not metric.startswith("start"):
                goal = 1 / yardstick.IDLE_GOAL if "tokens/s" in metric else yardstick.IDLE_GOAL
                figures = (yardstick.format_figure(metric, figure) for figure in (before[metric], value))
                lines.append((f"{name.upper()}, {metric}", *figures, f"{value / before[metric]:.2f}", f"{goal:.2f}"))
    return f"{'; '.join(sources)}\n\n{markdown(lines)}" if sources else ""


def loading_table(read: Read, source: Source) -> str:
    """Return what an adapter costs that is new, and what others pay while adapters come."""
    parts = []
    for name in GEOMETRIES:
        record = read(f"adapter_loading_{name}")
        if record is None:
            continue
        title = f"{name.upper()} geometry, {record['adapter_mb']} MB an adapter"
        first: list[Sequence[str]] = [
            (f"{title}: first token (ms)", "new", "resident", "loading", "largest", "reading", "copy", "goal")
        ]
        steps: list[Sequence[str]] = [
            (
                f"{title}: decode while adapters come from",
                "loads/s",
                "step (ms)",
                "95 % (ms)",
                "ratio",
                "ratio of 95 %",
                "goal",
            )
        ]
        for row in record["rows"]:
            if row["kind"] == "first token":
                names = ("new", "resident", "loading", "loading_max", "find", "wait")
                goal = str(yardstick.LOADING_GOAL_MS) if (name, row["files"]) == ("7b", "in memory") else "-"
                first.append((f"files {row['files']}", *(f"{row[f'{key}_ms']:.1f}" for key in names), goal))
            else:
                figures = (row[key] for key in ("step_ms", "step_p95_ms", "step_ratio", "step_p95_ratio"))
                goal = "-" if row["source"] == "none" else f"{yardstick.STREAMING_GOAL:.2f}"
                label = row["source"] if row["rate"] is None else f"{row['source']}, {row['rate']:g} a second"
                rate = f"{row['loads_per_s']:.1f}"
                steps.append((f"{row['rows']} rows, {label}", rate, *(f"{x:.2f}" for x in figures), goal))
        parts.append(f"{source(f'adapter_loading_{name}', record)}\n\n{markdown(first)}\n{markdown(steps)}")
    return "\n".join(parts)


def xla_table(record: Record | None, source: Source) -> str:
    """Return the figures of the runs in which every op went through XLA alone, a column for each geometry."""
    if record is None:
        return ""
    columns = {name: yardstick.metrics(row for row in record["rows"] if row["geometry"] == name) for name in GEOMETRIES}
    lines = [("measurement", *(f"{name.upper()} geometry" for name in columns))]
    for metric in next(iter(columns.values())):
        figures = (found.get(metric) for found in columns.values())
        lines.append((metric, *(yardstick.format_figure(metric, figure) for figure in figures)))
    return f"{source('xla_h100', record)}\n\n{markdown(lines)}"


def accuracy_table(record: Record | None, source: Source) -> str:
    """Return both engines' errors, by model and kind of token."""
    if record is None:
        return ""
    header = ["model, tokens"]
    errors = {"mean": "mean error", "mean_largest": "mean of each sequence's largest", "largest": "largest"}
    header += [f"{label}: {engine}" for label in errors.values() for engine in ("qwen2_jax", "transformers")]
    lines = [header]
    for row in record["rows"]:
        figures = [f"{row[engine][name]:.4g}" for name in errors for engine in ("qwen2_jax", "transformers")]
        lines.append([f"{row['model']}, {row['count']:,} {row['tokens']} tokens", *figures])
    return f"{source('accuracy', record)}\n\n{markdown(lines)}"


def cpu_table(record: Record | None) -> str:
    """Return decoding speeds on a CPU, and how they compare with transformers' for one request."""
    if record is None:
        return ""
    base = record["results"].get("transformers", {}).get("tokens_per_second", {}).get("1")
    lines = [("engine", "requests", "decode, tokens/s", "ratio")]
    for engine, result in record["results"].items():
        for requests, rate in result["tokens_per_second"].items():
            ratio = "-" if base is None else f"{rate / base:.2f}"
            lines.append((engine, requests, f"{rate:.1f}", ratio))
    return markdown(lines)


def fastest(rows: Iterable[Row]) -> dict[tuple[str, str, str], tuple[Row, list[Row]]]:
    """Return the fastest row of each (op, shape, dtype) that was timed, and the others, in the rows' order."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["shape"], row["dtype"]), []).append(row)
    found = {}
    for key, group in groups.items():
        timed = sorted((row for row in group if "us" in row), key=lambda row: row["us"])
        if timed:
            found[key] = timed[0], [*timed[1:], *(row for row in group if "error" in row)]
    return found


def kernels_table(geometry: str, record: Record | None, source: Source) -> str:
    """Return one row for each shape of each op: its fastest implementation beside the others."""
    if record is None:
        return ""
    lines = [
        (f"op, {geometry.upper()} geometry", "shape", "dtype", "fastest", "us", "rate", "share of limit", "others (us)")
    ]
    for (op, shape, dtype), (best, others) in fastest(record["rows"]).items():
        rate = f"{best['GB/s']:,.0f} GB/s" if best["limit"] == "bandwidth" else f"{best['TFLOP/s']:.0f} TFLOP/s"
        rest = ", ".join(f"{row['implementation']} {_time(row)}" for row in others) or "-"
        lines.append(
            (op, _singular(shape), dtype, best["implementation"], f"{best['us']:.1f}", rate, _share(best), rest)
        )
    return f"{source(f'kernels_{geometry}', record)}\n\n{markdown(lines, names=4)}"


def _time(row: Row) -> str:
    return f"{row['us']:.1f}" if "us" in row else "failed"


def _share(row: Row) -> str:
    return f"{row['share']:.0%}"


def _singular(shape: str) -> str:
    return re.sub(r"\b1 tokens$", "1 token", shape)


def op_table(op: str, records: Mapping[str, Record], link: str) -> str:
    """Return the shares of the limit that an op's fastest implementations reach.

    What is a matter of tokens has a column for each number of them, and attention one for each geometry.
    """
    cells: dict[str, dict[str, str]] = {}
    columns: list[str] = []
    for name, record in records.items():
        for (found, shape, dtype), (best, _) in fastest(record["rows"]).items():
            if not found.startswith(op):
                continue
            kind = found.removeprefix(op).strip("_")
            part, _, tokens = shape.rpartition(", ") if shape.endswith(" tokens") else (shape, "", "")
            column = _singular(tokens) or f"{name.upper()} geometry"
            labels = [f"{name.upper()} geometry"] * bool(tokens) + [kind, part]
            labels += [dtype] * (op in ("write_kv", "paged_attention"))
            columns += [column] * (column not in columns)
            cell = f"{_share(best)} ({best['us']:.1f} us, {best['implementation']})"
            cells.setdefault(", ".join(filter(None, labels)), {})[column] = cell
    if not cells:
        return ""
    columns.sort(key=lambda column: int(column.split()[0]) if "token" in column else 0)
    lines = [["shape", *columns], *([label, *(row.get(name, "-") for name in columns)] for label, row in cells.items())]
    runs: dict[str, list[str]] = {}
    for name, record in records.items():
        runs.setdefault(_run(record), []).append(f"[{name.upper()}]({link}/kernels_{name}.json)")
    sources = "; ".join(f"{run} ({', '.join(links)})" for run, links in runs.items())
    return f"{sources}\n\n{markdown(lines)}"
