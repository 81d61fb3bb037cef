"""Compiles the device programs ahead of time, in parallel, and counts what is compiled after that."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm.auto import tqdm

from qwen2_jax.engine.executable_cache import ExecutableCache
from qwen2_jax.engine.step_inputs import Layout
from qwen2_jax.xla_options import Options, compiler_options, gpu_options, is_gpu

_CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True, kw_only=True)
class ProgramSpec:
    """One program to compile: a function, the abstract arguments, which of them it takes over, and its results."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    inputs: Layout | None = None
    """What the one argument that comes from the host is packed from; None where it is not packed."""
    donated: tuple[int, ...] = ()
    out_shardings: Any
    matmul_precision: str | None = None
    """`jax.default_matmul_precision`; None lets a GPU multiply float32 in TF32."""
    as_graph: bool = False
    """Whether a GPU gets the program's kernels as CUDA graphs. That saves the host a launch for each, but a graph whose
    buffers have moved is brought up to date first, while the device waits: for calls whose kernels are short."""
    has_loop_in_graph: bool = False
    """Whether the program's loop is a node of the graph. Otherwise the host starts a graph for each turn, and waits for
    the one before it where the device decides how many there are."""
    is_concurrent: bool = False
    """Whether kernels of a graph that do not need one another run beside one another."""


_LOWERING = threading.Lock()
"""Lowering is Python, which runs in one thread at a time anyway; beside one another, threads would each compile the
Triton kernels that programs share, for jax-triton's cache knows only those that are done."""


def compile_program(spec: ProgramSpec, mesh: Mesh, other: Options | None = None) -> jax.stages.Compiled:
    """Compile one program under `mesh`; `other` are options of XLA's for a GPU in place of those it would get."""
    with jax.set_mesh(mesh), jax.default_matmul_precision(spec.matmul_precision):
        jitted = jax.jit(spec.function, donate_argnums=spec.donated, out_shardings=spec.out_shardings)
        with _LOWERING:
            lowered = jitted.lower(*spec.arguments)
        options = compiler_options(
            mesh, as_graph=spec.as_graph, has_loop=spec.has_loop_in_graph, is_concurrent=spec.is_concurrent
        )
        return lowered.compile(options if options is None else options | (other or {}))


def compile_programs[K](
    specs: Mapping[K, ProgramSpec],
    mesh: Mesh,
    cache: ExecutableCache | None,
    *,
    use_tqdm: bool,
    lowered: Callable[[list[K]], Iterable[tuple[K, ProgramSpec]]] | None = None,
) -> dict[K, jax.stages.Compiled]:
    """Load from `cache` or compile all of `specs`, in as many threads as there are cores, with a progress bar.

    `lowered` is for programs that the cache lacks: it yields each with the spec to compile, which other processes may
    have lowered.

    What JAX's own cache gave is not kept a second time: such a program, serialised again, may load and then not run.
    """
    if is_gpu(mesh):
        gpu_options(mesh)  # which compiles: what JAX's cache gives it is not to be taken for one of the programs
    from_jax = threading.local()

    def note_hit(event: str, **_: Any) -> None:
        if event == _CACHE_HIT_EVENT:
            from_jax.hit = True

    def load_or_compile(key: K, spec: ProgramSpec) -> jax.stages.Compiled:
        if cache is None:
            return compile_program(spec, mesh)
        found = cache.load(repr(key))
        if found is not None:
            return found
        from_jax.hit = False
        program = compile_program(spec, mesh)
        if not from_jax.hit:
            cache.save(repr(key), program)
        return program

    def in_turn() -> Iterator[tuple[K, ProgramSpec]]:
        missing = {key: spec for key, spec in specs.items() if cache is None or repr(key) not in cache}
        yield from ((key, spec) for key, spec in specs.items() if key not in missing)
        yield from missing.items() if lowered is None or not missing else lowered([*missing])

    futures: dict[K, Future[jax.stages.Compiled]] = {}
    jax.monitoring.register_event_listener(note_hit)
    try:
        with (
            ThreadPoolExecutor(max_workers=os.cpu_count()) as threads,
            tqdm(total=len(specs), desc="Compiling", unit="program", disable=not use_tqdm) as progress,
        ):
            for key, spec in in_turn():
                futures[key] = threads.submit(load_or_compile, key, spec)
                futures[key].add_done_callback(lambda _: progress.update())
            return {key: futures[key].result() for key in specs}
    finally:
        jax.monitoring.unregister_event_listener(note_hit)


def use_persistent_cache() -> Path:
    """Keep compiled programs on disk, in JAX's configured cache or else in the user's folder; return the place."""
    if jax.config.jax_compilation_cache_dir is None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(base / "qwen2_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return Path(str(jax.config.jax_compilation_cache_dir))


class CompilationCounter:
    """Counts compilations that happen while a thread is inside `watch`."""

    def __init__(self) -> None:
        self.count = 0
        self._watching = threading.local()
        self._watching.active = False
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count this thread's compilations until the end of the block."""
        self._watching.active = True
        try:
            yield
        finally:
            self._watching.active = False

    def close(self) -> None:
        """Stop counting."""
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILE_EVENT and self._watching.__dict__.get("active", False):
            self.count += 1
