"""Starts processes that lower programs, deals the work out to them, and ends them; see `lowering_worker.py`."""

import contextlib
import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh

from qwen2_jax.engine.program_facts import ProgramFacts
from qwen2_jax.engine.program_specs import ProgramKey, families

logger = logging.getLogger(__name__)

# With -P, the working directory is no place to import from unless it is one for this process.
_PROGRAM = ("-P", "-m", "qwen2_jax.engine.lowering_worker")
_FEWEST_CORES = 4
_FEWEST_PROGRAMS = 4
"""With fewer programs to lower, this process is done before another one has started to help."""
_HOST_BYTES = 1 << 30
"""Host memory that a worker may take."""
_LONGEST_SECONDS = 300.0
"""A worker that gives no program for so long hangs and is ended; one of 28 layers takes a worker some seconds."""
_MOST_WORKERS = 12
"""More would have nothing to do: so many families have the programs of a start."""
_OPTIONS = {
    "jax_platforms": "cpu",
    "jax_enable_compilation_cache": False,
    "jax_export_ignore_forward_compatibility": True,
}
"""JAX's options that workers do not share with this process: they touch no GPU, compile nothing worth keeping, and
write for no other version of JAX."""


def choose_workers(*, platform: str, cores: int, host_bytes: int) -> int:
    """Return how many workers to start where the user does not say; `host_bytes` is the host's free memory."""
    if platform != "gpu" or cores < _FEWEST_CORES:
        return 0
    return min(cores // 2, host_bytes // _HOST_BYTES, _MOST_WORKERS)


_Settled = queue.SimpleQueue[tuple[ProgramKey, bytes | None] | None]
"""Programs, and what they are lowered to, None if a worker could not; None when a worker has no more."""


class LoweringPool:
    """Worker processes, from `__enter__` to `__exit__`."""

    def __init__(self, count: int, *, at_once: bool = True) -> None:
        """Start `count` processes, which get ready while this one does other things; or else when they are needed."""
        self._count = count
        self._workers: list[_Worker] = []
        self._threads: list[threading.Thread] = []
        if at_once:
            self._start()

    def __enter__(self) -> "LoweringPool":
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes, whatever they are doing."""
        for worker in self._workers:
            worker.end()
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.close()

    def lower(
        self, facts: ProgramFacts, mesh: AbstractMesh, keys: Sequence[ProgramKey]
    ) -> Iterator[tuple[ProgramKey, bytes | None]]:
        """Have programs lowered for the devices of `mesh`; yield each with what `export_program` makes of it.

        Without that is what no worker could lower, of which the log warns. Programs of a family stay in one process:
        they share kernels, which each process lowers once. Where there are few, all are yielded at once, without.
        """
        if len(keys) < _FEWEST_PROGRAMS:
            yield from ((key, None) for key in keys)
            return
        self._start()
        waiting: queue.SimpleQueue[list[ProgramKey]] = queue.SimpleQueue()
        for family in families(keys):
            waiting.put(family)
        settled: _Settled = queue.SimpleQueue()
        threads = [
            threading.Thread(target=worker.serve, args=(facts, mesh, waiting, settled), daemon=True)
            for worker in self._workers
        ]
        self._threads += threads
        for thread in threads:
            thread.start()
        working = len(threads)
        while working:
            if (program := settled.get()) is None:
                working -= 1
            else:
                yield program
        while group := _next(waiting):  # no worker lived to take them
            yield from ((key, None) for key in group)

    def _start(self) -> None:
        if not self._workers:
            self._workers = [_Worker(number) for number in range(self._count)]


class _Worker:
    """One process, and what it has been told."""

    def __init__(self, number: int) -> None:
        self.name = f"lowering worker {number}"
        self._ended = False
        self._process = subprocess.Popen(
            [sys.executable, *_PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            process_group=0,  # Ctrl-C is for this process, which ends the workers
        )
        with contextlib.suppress(BrokenPipeError):  # it is gone already: `serve` finds out
            self._send(jax.config.values | _OPTIONS)

    def serve(
        self, facts: ProgramFacts, mesh: AbstractMesh, waiting: queue.SimpleQueue[list[ProgramKey]], settled: _Settled
    ) -> None:
        """Pass groups on to the process until there are none; put into `settled` each program, and None at the end."""
        pending: set[ProgramKey] = set()
        try:
            while group := _next(waiting):
                pending |= set(group)
                self._send((facts, mesh, group))
                while pending:
                    key, program, error = self._receive()
                    pending.discard(key)
                    settled.put((key, program))
                    if error is not None:
                        logger.warning("%s could not lower %s; this process will: %s", self.name, key, error)
        except (EOFError, OSError, pickle.UnpicklingError):
            if not self._ended:
                status = self._process.wait()
                logger.warning("%s has ended, status %s; this process lowers its programs", self.name, status)
        finally:
            for key in pending:
                settled.put((key, None))
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

    def _give_up(self) -> None:
        logger.warning("%s has given no program for %g seconds and is ended", self.name, _LONGEST_SECONDS)
        self._process.kill()

    def _receive(self) -> tuple[ProgramKey, bytes | None, str | None]:
        assert self._process.stdout is not None
        limit = threading.Timer(_LONGEST_SECONDS, self._give_up)
        limit.daemon = True
        limit.start()
        try:
            return pickle.load(self._process.stdout)
        finally:
            limit.cancel()


def _next(waiting: queue.SimpleQueue[list[ProgramKey]]) -> list[ProgramKey]:
    """Return the next group, or an empty one where there is none."""
    try:
        return waiting.get_nowait()
    except queue.Empty:
        return []


def _environment() -> dict[str, str]:
    """Return a worker's environment: this one's, with the same places to import from, and no GPU."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "JAX_PLATFORMS": "cpu",
    }
