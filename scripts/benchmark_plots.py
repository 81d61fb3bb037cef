"""The plots of docs/benchmarks, as SVG files whose bytes depend on the records and on matplotlib's version alone."""

from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from scripts import yardstick
from scripts.benchmark_tables import GEOMETRIES, Read, Record, Row, fastest

OURS, VLLM, FLOOR, OTHER = "#1f5fbf", "#c4650a", "#707070", "#7a3b9e"
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "qwen2_jax",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
PLOTS = {
    "step_time": "Decode step time against the batch: qwen2_jax, vLLM and the floor",
    "attention_time": "Time of decode attention against the tokens of context",
    "kernel_shares": "Share of the limit that the fastest kernels reach, by tokens",
    "attention_shares": "Share of the limit that the fastest attention kernels reach, by step",
    "adapters_distinct": "Decoding speed against the distinct adapters of a batch",
    "adapters_registered": "Speed against the adapters that requests are drawn from",
}
"""The plots by name, with what they show."""
NEEDED_OPS = {
    "attention_time": "paged_attention_decode",
    "kernel_shares": "linear",
    "attention_shares": "paged_attention_decode",
}
"""The plots made from records of kernels, and the op that a record must have for them."""
CURVES = {"adapters_distinct": "batch", "adapters_registered": "registered"}
"""The plots made from the record of `adapter_curve.py`, and the kind of its rows that they show."""


def available(read: Read) -> list[str]:
    """Return the plots that the records are there for."""
    return [name for name in PLOTS if _records(read, name)]


def write_plots(read: Read, folder: Path) -> None:
    """Draw what is available; needs matplotlib, from the dev extra."""
    import matplotlib

    matplotlib.use("svg")
    draw = {
        "step_time": _step_time,
        "attention_time": _attention_time,
        "kernel_shares": _kernel_shares,
        "attention_shares": _attention_shares,
        "adapters_distinct": _adapters_distinct,
        "adapters_registered": _adapters_registered,
    }
    with matplotlib.rc_context(STYLE):
        for name in available(read):
            figure = draw[name](_records(read, name))
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


def _records(read: Read, plot: str) -> dict[str, Record]:
    """Return the records that a plot is made from, by geometry."""
    if plot in CURVES:
        curve = read("adapter_curve")
        return {} if curve is None else {curve["geometry"]: curve}
    kind = "kernels" if plot in NEEDED_OPS else "yardstick"
    found = {name: record for name in GEOMETRIES if (record := read(f"{kind}_{name}")) is not None}
    if plot not in NEEDED_OPS:
        return found
    return {name: record for name, record in found.items() if any(_is_of(plot, row) for row in _best(record))}


def _is_of(plot: str, row: Row) -> bool:
    return row["op"] == NEEDED_OPS[plot]


def _figure(rows: int, columns: int, height: float, width: float = 4.8) -> tuple[Any, Any]:
    """Return a figure and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _ticks(axes: Any, values: list[int], label: str) -> None:
    """Scale x by powers of two, with a tick at each of `values`."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.set_xlabel(label)


def _steps(figures: Mapping[str, float]) -> dict[int, float]:
    """Return milliseconds by batch."""
    start = "decode step, batch "
    return {int(name.removeprefix(start).split()[0]): x for name, x in figures.items() if name.startswith(start)}


def _step_time(records: dict[str, Record]) -> Any:
    figure, grid = _figure(1, len(records), 3.4)
    for axes, (name, record) in zip(grid[0], records.items(), strict=True):
        floor = {metric: row["limit"] for metric, row in yardstick.goals(name).items() if "limit" in row}
        ours = _steps(yardstick.metrics(record["rows"]))
        lines = (
            ("qwen2_jax", OURS, "o-", ours),
            ("vLLM", VLLM, "s-", _steps(yardstick.vllm_metrics(name))),
            ("floor", FLOOR, "--", _steps(floor)),
        )
        for label, color, style, steps in lines:
            axes.plot(list(steps), list(steps.values()), style, color=color, label=label, markersize=4)
        _ticks(axes, sorted(ours), "batch")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("decode step (ms)")
        axes.set_title(f"{name.upper()} geometry")
        axes.legend(loc="upper left")
    return figure


def _adapters_distinct(records: dict[str, Record]) -> Any:
    figure, grid = _figure(1, len(records), 3.4, width=6)
    for axes, (name, record) in zip(grid[0], records.items(), strict=True):
        rates = {row["adapters"]: row["tokens/s"] for row in record["rows"] if row["kind"] == "batch"}
        counts = [count for count in rates if count]
        axes.plot(counts, [rates[count] for count in counts], "o-", color=OURS, label="with adapters", markersize=4)
        axes.axhline(rates[0], linestyle="--", color=FLOOR, label="without")
        _ticks(axes, counts, f"distinct adapters of {record['rows_per_batch']} rows")
        _finish_curve(axes, name)
    return figure


def _adapters_registered(records: dict[str, Record]) -> Any:
    figure, grid = _figure(1, len(records), 3.4, width=6)
    for axes, (name, record) in zip(grid[0], records.items(), strict=True):
        all_rows = [row for row in record["rows"] if row["kind"] == "registered"]
        for turn, label, style in (("first", "asked for the first time", "o--"), ("again", "known", "o-")):
            rows = [row for row in all_rows if row["turn"] == turn]
            if rows:
                counts, rates = ([row[name] for row in rows] for name in ("adapters", "tokens/s"))
                axes.plot(counts, rates, style, color=OURS, label=label, markersize=4)
            for row in rows:
                text, place = f"{row['loads']} loads", (row["adapters"], row["tokens/s"])
                axes.annotate(text, place, (0, 6), textcoords="offset points", ha="center", fontsize=7)
        _ticks(axes, sorted({row["adapters"] for row in all_rows}), "registered adapters")
        _finish_curve(axes, name)
    return figure


def _finish_curve(axes: Any, geometry: str) -> None:
    axes.margins(x=0.08, y=0.15)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("output tokens/s")
    axes.set_title(f"{geometry.upper()} geometry")
    axes.legend(loc="lower left")


def _attention_time(records: dict[str, Record]) -> Any:
    figure, grid = _figure(1, len(records), 3.6)
    for axes, (name, record) in zip(grid[0], records.items(), strict=True):
        series: dict[str, list[tuple[int, float, float, str]]] = {}
        for row in _best(record):
            if row["op"] == "paged_attention_decode":
                rows, context = (int(part) for part in row["shape"].split(" x "))
                floor = row["us"] * row["share"]
                series.setdefault(row["dtype"], []).append((rows * context, row["us"], floor, row["shape"]))
        for (dtype, points), color in zip(series.items(), (OURS, OTHER), strict=False):
            points.sort()
            tokens, times, floors, shapes = zip(*points, strict=True)
            axes.plot(tokens, times, "o-", color=color, label=dtype, markersize=4)
            axes.plot(tokens, floors, "--", color=color, alpha=0.6, label=f"{dtype}, bytes over bandwidth")
            for x, y, shape in zip(tokens, times, shapes, strict=True) if color == OURS else ():
                axes.annotate(shape, (x, y), (-4, 5), textcoords="offset points", ha="right", fontsize=7)
        axes.set_yscale("log")
        totals = {total for points in series.values() for total, *_ in points}
        powers = [2**power for power in range(8, 24) if min(totals) <= 2**power <= max(totals)]
        _ticks(axes, powers, "tokens of context, all rows together (rows x context)")
        axes.margins(x=0.12, y=0.1)
        axes.set_ylabel("one layer's decode attention (us)")
        axes.set_title(f"{name.upper()} geometry")
        axes.legend(loc="lower right")
    return figure


def _best(record: Record) -> Iterator[Row]:
    return (best for best, _ in fastest(record["rows"]).values())


def _kernel_shares(records: dict[str, Record]) -> Any:
    """Draw the ops whose work is a matter of tokens, a line for each."""
    figure, grid = _figure(1, len(records), 4)
    for axes, (name, record) in zip(grid[0], records.items(), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in _best(record):
            if row["shape"].endswith(" tokens") and row["dtype"] == "bfloat16":
                part, _, tokens = row["shape"].rpartition(", ")
                lines.setdefault(f"{row['op']} {part}".strip(), []).append((int(tokens.split()[0]), row["share"]))
        for (label, points), marker in zip(lines.items(), cycle("osv^D<>Px"), strict=False):
            axes.plot(*zip(*sorted(points), strict=True), marker=marker, label=label, markersize=4, linewidth=1)
        _ticks(axes, sorted({tokens for points in lines.values() for tokens, _ in points}), "tokens")
        axes.tick_params(axis="x", labelsize=7)
        axes.set_ylim(0, 1.05)
        axes.set_ylabel("share of the limit")
        axes.set_title(f"{name.upper()} geometry")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return figure


def _attention_shares(records: dict[str, Record]) -> Any:
    """Draw the steps of attention, a bar for each geometry."""
    shares = {name: _attention(record) for name, record in records.items()}
    steps = list(dict.fromkeys(step for found in shares.values() for step in found))
    figure, grid = _figure(1, 1, 1.2 + 0.24 * len(steps), width=7.5)
    [[axes]] = grid
    height = 0.8 / len(shares)
    for index, ((name, found), color) in enumerate(zip(shares.items(), (OURS, OTHER), strict=False)):
        places = [steps.index(step) + index * height for step in found]
        axes.barh(
            places, list(found.values()), height=height, align="edge", color=color, label=f"{name.upper()} geometry"
        )
    axes.set_yticks([place + 0.4 for place in range(len(steps))], steps, fontsize=7)
    axes.set_ylim(len(steps), 0)
    axes.set_xlim(0, 1)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("share of the limit")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def _attention(record: Record) -> dict[str, float]:
    """Return the shares of the steps of attention, with names that tell them apart."""
    short = {"paged_attention_decode": "decode", "paged_attention_ragged": "paged prefill", "flash_attention": "flash"}
    dtypes = {"bfloat16": "", "float8_e4m3fn": ", e4m3"}
    return {
        f"{short[row['op']]} {row['shape']}{dtypes.get(row['dtype'], f', {row["dtype"]}')}": row["share"]
        for row in _best(record)
        if row["op"] in short
    }
