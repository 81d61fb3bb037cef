"""Runs commands of this repository for `gpu_check.py`, each for a time and with a log."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from benchmarking.record import ROOT


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a command did."""

    failures: list[str]
    seconds: float
    output: str


RUNNING = set[int]()
"""Process groups of the commands that run, to be stopped with this script: no key of the terminal reaches them."""


def stop_all(signum: int, _frame: object) -> NoReturn:
    """Handle a signal that stops this script."""
    for group in list(RUNNING):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(group, signal.SIGKILL)
    os._exit(128 + signum)


class Runner:
    """Runs commands of this repository until the part's time is over."""

    def __init__(self, out: Path, budget: float) -> None:
        self._out, self._end = out, time.monotonic() + budget

    def python(self, name: str, *arguments: str | Path, env: Mapping[str, str] | None = None) -> Result:
        """Run Python with `arguments`; what it prints goes to `name`.log."""
        start = time.monotonic()
        environment = os.environ | {"PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1"} | dict(env or {})
        path = self._out / f"{name}.log"
        with path.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            # Workers of its own go with it.
            timer = threading.Timer(max(self._end - start, 0), os.killpg, (process.pid, signal.SIGKILL))
            timer.start()
            RUNNING.add(process.pid)
            code = process.wait()
            RUNNING.remove(process.pid)
            timer.cancel()
        output = path.read_text(errors="replace")
        failures = [] if code == 0 else [f"{name}: {self._reason(code, output)} (see {path})"]
        return Result(failures=failures, seconds=time.monotonic() - start, output=output)

    def _reason(self, code: int, output: str) -> str:
        if code == -signal.SIGKILL and time.monotonic() >= self._end:
            return "stopped, its time was over"
        lines = output.strip().splitlines() or ["no output"]
        return f"exit status {code}: {lines[-1][:300]}"


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
