"""Starts processes that compile programs, deals the work out to them, and ends them; see `compile_worker.py`."""

import contextlib
import logging
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from qwen2_jax.engine.program_facts import ProgramFacts
from qwen2_jax.engine.program_specs import ProgramKey, families

logger = logging.getLogger(__name__)

# With -P, the working directory is no place to import from unless it is one for this process.
_PROGRAM = ("-P", "-m", "qwen2_jax.engine.compile_worker")
_FEWEST_CORES = 8
_FEWEST_PROGRAMS = 4
"""With fewer programs to compile, threads of this process are done before another process has started to help."""
_HOST_BYTES = 3 << 30
"""Host memory that a worker may take."""
_DEVICE_BYTES = 600 << 20
"""What a worker takes on a GPU: the context of CUDA and the libraries' handles."""
_AUTOTUNING_BYTES = 9 << 28
"""What it takes besides, and keeps: the operands of the products that cuBLAS is timed on, up to a vocabulary's."""


def choose_workers(*, platform: str, cores: int, host_bytes: int, device_bytes: int | None) -> int:
    """Return how many workers to start where the user does not say; fewer than two are none.

    `host_bytes` is the free memory of the host, `device_bytes` that of a GPU which JAX's share of it leaves, or None
    where that is not known. This process has a context on the GPU too.
    """
    if platform != "gpu" or cores < _FEWEST_CORES or device_bytes is None:
        return 0
    count = min(cores // 2, host_bytes // _HOST_BYTES, fitting_workers(device_bytes))
    return count if count >= 2 else 0


def fitting_workers(device_bytes: int) -> int:
    """Return how many workers fit into `device_bytes` of a GPU beside this process."""
    return max(0, (device_bytes - _DEVICE_BYTES) // (_DEVICE_BYTES + _AUTOTUNING_BYTES))


_Settled = queue.SimpleQueue[tuple[ProgramKey, bool] | None]
"""Programs, and whether they are kept; None when a worker has no more."""


class CompilePool:
    """Worker processes, from `__enter__` to `__exit__`; what they compile goes into an `ExecutableCache`."""

    def __init__(self, count: int) -> None:
        """Start `count` processes; they get ready while this one does other things."""
        self._scratch = tempfile.TemporaryDirectory(prefix="qwen2_jax-")
        self.scratch = Path(self._scratch.name)
        """A folder for programs that are not kept: it lives as long as the pool."""
        self._workers = [_Worker(number) for number in range(count)]
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "CompilePool":
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes, whatever they are doing."""
        self._end_workers()
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.close()
        self._scratch.cleanup()

    def compile(self, facts: ProgramFacts, directory: Path, keys: Sequence[ProgramKey]) -> Iterator[ProgramKey]:
        """Have programs compiled and kept in the cache of `directory`; yield each key when its program is settled.

        That is: kept, or not to be had from a worker, of which the log then warns. Those come last, when the workers
        have ended: what a program lacked may be the GPU's memory that they held. Programs of a family stay in one
        process: they share kernels, which each process compiles once. Where there are few, they are all yielded at
        once, and nothing is compiled.
        """
        if len(keys) < _FEWEST_PROGRAMS:
            yield from keys
            return
        waiting: queue.SimpleQueue[list[ProgramKey]] = queue.SimpleQueue()
        for family in families(keys):
            waiting.put(family)
        settled: _Settled = queue.SimpleQueue()
        threads = [
            threading.Thread(target=worker.serve, args=(facts, directory, waiting, settled), daemon=True)
            for worker in self._workers
        ]
        self._threads += threads
        for thread in threads:
            thread.start()
        working, left = len(threads), list[ProgramKey]()
        while working:
            match settled.get():
                case None:
                    working -= 1
                case key, True:
                    yield key
                case key, False:
                    left.append(key)
        while not waiting.empty():  # no worker lived to take them
            left += waiting.get()
        if left:
            self._end_workers()
        yield from left

    def _end_workers(self) -> None:
        for worker in self._workers:
            worker.end()


class _Worker:
    """One process, and what it has been told."""

    def __init__(self, number: int) -> None:
        self.name = f"compile worker {number}"
        self._ended = False
        self._process = subprocess.Popen(
            [sys.executable, *_PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            process_group=0,  # Ctrl-C is for this process, which ends the workers
        )
        with contextlib.suppress(BrokenPipeError):  # it is gone already: `serve` finds out
            # Not from JAX's own cache: what that gives cannot be kept (see `compilation.compile_programs`).
            self._send({**jax.config.values, "jax_enable_compilation_cache": False})

    def serve(
        self,
        facts: ProgramFacts,
        directory: Path,
        waiting: "queue.SimpleQueue[list[ProgramKey]]",
        settled: _Settled,
    ) -> None:
        """Pass groups on to the process until there are none, and put into `settled` each key, and None at the end.

        A process that could not compile a program is ended, and others get what it had: most likely there is no memory
        for it beside them.
        """
        pending: set[ProgramKey] = set()
        try:
            while True:
                # The next group is there before the last program of this one is done: one is lowered, one compiled.
                while len(pending) < 2 and not waiting.empty():
                    group = _next(waiting)
                    pending |= set(group)
                    self._send((facts, directory, group))
                if not pending:
                    return
                key, error = self._receive()
                pending.discard(key)
                settled.put((key, error is None))
                if error is not None:
                    logger.warning("%s could not compile %s and is ended; this process will: %s", self.name, key, error)
                    self.end()
                    if pending:
                        waiting.put([*pending])
                        pending.clear()
                    return
        except (EOFError, OSError, pickle.UnpicklingError):
            if not self._ended:
                status = self._process.wait()
                logger.warning("%s has ended, status %s; this process compiles its programs", self.name, status)
        finally:
            for key in pending:
                settled.put((key, False))
            settled.put(None)

    def end(self) -> None:
        """End the process at once: it has nothing to tidy up."""
        self._ended = True
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Close the pipes, which nobody uses any more."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # of what was still to be sent
            self._process.stdin.close()
        self._process.stdout.close()

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        pickle.dump(message, self._process.stdin)
        self._process.stdin.flush()

    def _receive(self) -> tuple[ProgramKey, str | None]:
        assert self._process.stdout is not None
        return pickle.load(self._process.stdout)


def _next(waiting: "queue.SimpleQueue[list[ProgramKey]]") -> list[ProgramKey]:
    """Return the next group, or an empty one where another worker was faster."""
    try:
        return waiting.get_nowait()
    except queue.Empty:
        return []


def _environment() -> dict[str, str]:
    """Return a worker's environment: this one's, with the same places to import from and little of a GPU's memory."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        # Nothing is reserved. The limit is that of this process: by it the compiler decides what to compute twice.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
