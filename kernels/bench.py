"""Times the kernels: op x implementation x shape, in microseconds and as a share of what the GPU can do.

    python kernels/bench.py                     every op at the shapes of the 0.5B and the 7B model
    python kernels/bench.py --geometry 7b --ops linear,rms_norm --out rows.json
    python kernels/bench.py --tune              tries tile sizes and writes qwen2_kernels/tuned/<gpu>.json

A call is timed in a chain of calls in one program, which runs as a CUDA graph; the chain goes through so many weights
or pools that the second-level cache holds none of them when it comes back. The time is the median of several runs over
the calls. The limits are measured in the same run; `share` is that of the limit that binds the call: the bytes that it
needs over the bandwidth, or its operations over the rate of a large matrix product.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from benchmarking.attention_cases import flash_attention_cases, paged_attention_cases
from benchmarking.case import Case, Selection
from benchmarking.elementwise_cases import rms_norm_cases, write_kv_cases
from benchmarking.linear_cases import linear_cases, norm_linear_cases
from benchmarking.lora_cases import lora_cases
from benchmarking.record import write_record
from benchmarking.sampling_cases import gumbel_cases, rank_cases, threshold_cases, top_cases
from benchmarking.timing import measure_limits, run_cases
from qwen2_kernels import tuning
from qwen2_kernels.specs import QWEN2_5

OPS: dict[str, Callable[[Selection], Iterator[Case]]] = {
    "linear": linear_cases,
    "norm_linear": norm_linear_cases,
    "rms_norm": rms_norm_cases,
    "write_kv": write_kv_cases,
    "paged_attention": paged_attention_cases,
    "flash_attention": flash_attention_cases,
    "lora": lora_cases,
    "thresholds": threshold_cases,
    "gumbel_argmax": gumbel_cases,
    "token_ranks": rank_cases,
    "top_logits": top_cases,
}


def main() -> None:
    """Parse the command line and print a table, one row per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="0.5b,7b", help=f"comma-separated, of {', '.join(QWEN2_5)}")
    parser.add_argument("--ops", default=",".join(OPS), help=f"comma-separated, of {', '.join(OPS)}")
    parser.add_argument("--dtypes", default="bfloat16,float8_e4m3fn", help="of the pools, comma-separated")
    parser.add_argument("--headline", action="store_true", help="only the few shapes that tell how an op does")
    parser.add_argument("--tune", action="store_true", help="try tile sizes and write the best")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    arguments = parser.parse_args()
    geometries, ops = arguments.geometry.split(","), arguments.ops.split(",")
    for name, known in (*((name, QWEN2_5) for name in geometries), *((name, OPS) for name in ops)):
        if name not in known:
            parser.error(f"{name!r} is not one of {', '.join(known)}")

    chosen = partial(Selection, dtypes=tuple(arguments.dtypes.split(",")), tune=arguments.tune)
    cases = select_cases(ops, [chosen(name=name, geometry=QWEN2_5[name]) for name in geometries])
    cases = [case for case in cases if case.headline or not arguments.headline]
    limits = measure_limits()
    kind = jax.devices()[0].device_kind
    print(f"{kind}: read {limits.bandwidth / 1e12:.2f} TB/s, matmul {limits.flops / 1e12:.0f} TFLOP/s", flush=True)
    rows = []
    for row in run_cases(cases, limits):
        rows.append(row)
        print(format_row(row), flush=True)
    if arguments.out:
        facts = {"limits": {"GB/s": round(limits.bandwidth / 1e9), "TFLOP/s": round(limits.flops / 1e12, 1)}}
        write_record(arguments.out, rows, **facts)
    if arguments.tune:
        print("written:", write_tuned(cases, rows))


def select_cases(ops: Sequence[str], selections: Sequence[Selection]) -> list[Case]:
    """Return the cases of `ops`, in the order of `OPS`, and of each geometry."""
    return [case for op in OPS if op in ops for selection in selections for case in OPS[op](selection)]


def format_row(row: dict[str, Any]) -> str:
    """Return one line of the table."""
    names = f"{row['op']:22} {row['geometry']:4} {row['dtype']:13} {row['shape']:22} {row['implementation']:9}"
    config = " ".join(f"{name}={value}" for name, value in row.get("config", {}).items())
    for reason in ("unsupported", "error"):
        if reason in row:
            return f"{names} {reason}: {' '.join(row[reason].split())[:150]} {config}".rstrip()
    flops = f"{row['TFLOP/s']:6.1f} TFLOP/s" if "TFLOP/s" in row else " " * 14
    return f"{names} {row['us']:9.2f} us {row['GB/s']:7.1f} GB/s {flops} {row['share']:4.0%} {config}".rstrip()


def write_tuned(cases: list[Case], rows: list[dict[str, Any]]) -> Path:
    """Merge the fastest configuration of each key into the GPU's file."""
    path = Path(__file__).parent / "qwen2_kernels" / "tuned" / f"{tuning.slug(tuning.device_kind())}.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for case, row in zip(cases, rows, strict=True):
        place = (case.op, case.key)
        if "us" in row and (place not in best or row["us"] < best[place]["us"]):
            best[place] = row
    for (op, key), row in best.items():
        table.setdefault(op, {})[key] = row["config"]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    return path


if __name__ == "__main__":
    main()
