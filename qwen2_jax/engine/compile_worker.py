"""A process that compiles programs for another one: `python -m qwen2_jax.engine.compile_worker`.

Tracing and lowering are Python, and Mosaic compiles one kernel of a process at a time: threads do not speed them up,
processes do. `compile_pool.py` starts some of these and talks to them in pickles. On stdin come a dict of JAX's
options, then shares of work: the facts that programs are made from, the folder to keep them in, and keys. On stdout
goes a pair for each key: the key, and what went wrong or None. The end of stdin ends the process, whatever it is doing.
"""

import os
import pickle
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import jax

from qwen2_jax.engine.compilation import ProgramSpec, compile_program
from qwen2_jax.engine.executable_cache import ExecutableCache
from qwen2_jax.engine.model_loader import abstract_model
from qwen2_jax.engine.program_facts import ProgramFacts, make_programs
from qwen2_jax.engine.program_specs import ProgramKey
from qwen2_jax.parallel import make_mesh

_THREADS = 4
"""One lowers while the others compile."""


class CompileWorker:
    """Compiles what it is told, in threads, and replies in the order in which programs are done."""

    def __init__(self, replies: BinaryIO) -> None:
        """Write to `replies`."""
        self._replies, self._lock = replies, threading.Lock()
        self._threads = ThreadPoolExecutor(max_workers=_THREADS)
        self._task: tuple[ProgramFacts, Path] | None = None

    def work(self, facts: ProgramFacts, directory: Path, keys: list[ProgramKey]) -> None:
        """Start to compile the programs `keys` of those that `facts` describe; they are kept in `directory`."""
        if (facts, directory) != self._task:
            self._mesh = make_mesh(facts.config.config.tensor_parallel_size)
            graphdef, params = abstract_model(facts.model, self._mesh, facts.dtype)
            programs = make_programs(facts.model, facts.config, facts.dtype, graphdef)
            self._specs = facts.table(self._mesh, programs, params).specs()
            self._cache = ExecutableCache(directory, self._mesh, facts)
            self._task = facts, directory
        for key in keys:
            self._threads.submit(self._compile, key, self._specs[key], self._cache)

    def _compile(self, key: ProgramKey, spec: ProgramSpec, cache: ExecutableCache) -> None:
        error = None
        try:
            cache.save(repr(key), compile_program(spec, self._mesh))
        except Exception as raised:  # of any kind: the other process compiles this program itself, and raises it there
            error = f"{type(raised).__name__}: {raised}"
        with self._lock:
            pickle.dump((key, error), self._replies)
            self._replies.flush()


def main() -> None:
    """Serve the process at the other end of stdin and stdout until it is gone."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not end up among the replies
    _adopt_options(pickle.load(sys.stdin.buffer))
    jax.devices()  # takes seconds on a GPU, while the other process still reads weights
    worker = CompileWorker(replies)
    while True:
        try:
            share = pickle.load(sys.stdin.buffer)
        except EOFError:
            os._exit(0)  # without waiting for threads that compile
        worker.work(*share)


def _adopt_options(options: Mapping[str, Any]) -> None:
    """Set JAX's options as they are in the other process, which may have set them in its program."""
    for name, value in options.items():
        if jax.config.values[name] != value:
            jax.config.update(name, value)


if __name__ == "__main__":
    main()
