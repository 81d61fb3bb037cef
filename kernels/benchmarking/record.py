"""What belongs beside every measurement: hardware, versions, date, commit and command. Needs no jax."""

import json
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-triton", "triton", "torch", "transformers", "vllm")


def make_record(rows: list[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    """Return `rows` with `facts` and what tells this run from others; what is not known is `"unknown"`."""
    return {
        "hardware": hardware(),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "command": command(),
        "versions": versions(),
        **facts,
        "rows": rows,
    }


def write_record(path: Path, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Write `make_record`'s result as JSON, one row a line."""
    record = make_record(rows, **facts)
    head = json.dumps({name: value for name, value in record.items() if name != "rows"}, indent=1)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n' if rows else f'{head[:-2]},\n "rows": []\n}}\n')


def hardware() -> str:
    """Return the names of the GPUs, or of the processor where there is none."""
    names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    if names:
        return names[0] if len(names) == 1 else f"{len(names)} x {names[0]}"
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return f"{len(models)} x {models[0].partition(':')[2].strip()}" if models else "unknown"


def commit() -> str:
    """Return the commit that is checked out, with a `+` where files differ from it."""
    found = _output("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    changed = bool(found) and bool(_output("git", "-C", str(ROOT), "status", "--porcelain"))
    return found + "+" * changed if found else "unknown"


def command() -> str:
    """Return the command line of this process, its script relative to the repository."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", str(name), *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that measurements depend on, and Python's."""
    found = {"python": sys.version.split()[0]}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _output(*arguments: str) -> str:
    """Return what a command prints, or nothing where it is not there or fails."""
    try:
        return subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
