"""Lower and compile an engine's programs for an H100 that need not be here, and say what XLA makes of them.

    python scripts/gpu_programs.py --geometry 7b --only decode_greedy:8,prefill:2048
    python scripts/gpu_programs.py --geometry 7b --adapters --lower-only --workers 2

Prints a JSON object a line: for each program the seconds of lowering and compiling, how often its step launches
kernels of each origin and runs XLA's own operations (`optimised_hlo.OptimisedHlo.kinds`), what the host starts for a
step and for a call (`commands`: a CUDA graph is one, a "command buffer"), the most that one of XLA's operations writes,
and XLA's account of memory. `--lower-only` needs no compiler; then the last line has the seconds in all and how many
modules of Mosaic's there are.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts import gpu_compiler
from scripts.workload import FAMILY, GEOMETRIES

PAGES = 33
"""Room for 32 adapters of rank 16, and the page that stays empty."""


def programs_of(arguments: argparse.Namespace, mesh: Any) -> tuple[Any, dict[Any, Any]]:
    """Return what an engine's programs are made from, and the programs, for the devices of `mesh`."""
    from qwen2_jax.config import EngineConfig, ModelConfig
    from qwen2_jax.engine.lowering_worker import abstract_programs
    from qwen2_jax.engine.program_facts import ProgramFacts
    from qwen2_jax.lora.sizes import LoRASizes

    sizes = GEOMETRIES[arguments.geometry]
    layers = sizes["num_hidden_layers"] if arguments.layers is None else arguments.layers
    model = ModelConfig.from_hf(FAMILY | sizes | {"num_hidden_layers": layers, "max_window_layers": layers})
    options = {"max_model_len": arguments.max_model_len, "tensor_parallel_size": arguments.tensor_parallel_size}
    lora = LoRASizes(
        num_pages=PAGES,
        num_vectors=PAGES,
        max_pages=1,
        max_rank=16,
        max_on_host=PAGES,
        num_vocab_pages=PAGES * arguments.vocab_adapters,
        num_vocab_vectors=PAGES * arguments.vocab_adapters,
        num_full_vocab=2 * arguments.vocab_adapters,
    )
    config = EngineConfig(**options).resolve(model, "gpu", skips_padding=True)
    facts = ProgramFacts(
        model=model, dtype="bfloat16", config=config, num_blocks=2000, lora=lora if arguments.adapters else None
    )
    programs = abstract_programs(facts, mesh)
    if not arguments.only:
        return facts, programs
    named = {f"{name}:{bucket}": (name, bucket) for name, bucket in programs}
    wanted = arguments.only.split(",")
    if unknown := [name for name in wanted if name not in named]:
        raise SystemExit(f"there is no program {', '.join(unknown)}; there are {', '.join(named)}")
    return facts, {named[name]: programs[named[name]] for name in wanted}


def compile_all(programs: dict[Any, Any], mesh: Any, dump: Path) -> Iterator[dict[str, Any]]:
    """Compile programs one after another and describe each; XLA writes into `dump`."""
    from qwen2_jax.engine.compilation import compile_program
    from scripts.optimised_hlo import OptimisedHlo, call_commands, step_commands

    for (name, bucket), spec in programs.items():
        start = time.perf_counter()
        compiled = compile_program(spec, mesh)
        seconds = time.perf_counter() - start
        text, memory = compiled.as_text(), compiled.memory_analysis()
        assert text is not None and memory is not None
        hlo = OptimisedHlo(text)
        step = hlo.step()
        copied = hlo.copied()
        thunks = _read_thunks(dump)
        largest = max(copied, key=lambda text: copied[text], default="")
        yield {
            "program": name,
            "bucket": bucket,
            "seconds": round(seconds, 1),
            "step": dict(hlo.kinds(step)),
            "around": {} if step == hlo.entry else dict(hlo.kinds(hlo.entry)),
            "commands": dict(step_commands(thunks)),
            "call_commands": dict(call_commands(thunks)),
            "largest_copy_bytes": copied.get(largest, 0),
            "largest_copy": largest,
            "temporary_bytes": memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
            "aliased_bytes": memory.alias_size_in_bytes,
        }


def _read_thunks(dump: Path) -> str:
    """Return what the host starts in the program that was compiled last, and forget it."""
    # Where passes have changed nothing, there is the first list alone.
    path = max(dump.glob("*.thunk_sequence*.txt"), key=lambda path: len(path.name))
    text = path.read_text()
    for written in dump.iterdir():
        written.unlink()
    return text


def lower_all(facts: Any, programs: dict[Any, Any], mesh: Any, workers: int) -> dict[str, Any]:
    """Trace and lower programs, here or in `workers` processes that this one takes them from."""
    import jax
    from jax.experimental.mosaic.gpu import core as mosaic

    from qwen2_jax.engine.lowered_programs import import_program
    from qwen2_jax.engine.lowering_pool import LoweringPool

    def lower(spec: Any) -> None:
        with jax.sharding.use_abstract_mesh(mesh):
            program = jax.jit(spec.function, donate_argnums=spec.donated)
            program.trace(*spec.arguments).lower(lowering_platforms=("cuda",))

    start = time.perf_counter()
    if not workers:
        for spec in programs.values():
            lower(spec)
    else:
        with LoweringPool(workers) as pool:
            for key, data in pool.lower(facts, mesh, [*programs]):
                lower(programs[key] if data is None else import_program(data, programs[key]))
    row = {"programs": len(programs), "workers": workers, "seconds": round(time.perf_counter() - start, 1)}
    return row if workers else row | {"mosaic_modules": len(mosaic.KNOWN_KERNELS)}


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="7b")
    parser.add_argument("--layers", type=int, help="instead of the geometry's")
    parser.add_argument("--adapters", action="store_true", help="with room for 32 adapters of rank 16")
    parser.add_argument(
        "--vocab-adapters", action="store_true", help="and of the embeddings and the head, two whole ones"
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--only", help="programs, NAME:BUCKET, separated by commas")
    parser.add_argument("--lower-only", action="store_true", help="do not compile")
    parser.add_argument("--workers", type=int, default=0, help="processes that lower, with --lower-only")
    arguments = parser.parse_args()
    if arguments.workers and not arguments.lower_only:
        parser.error(f"--workers {arguments.workers} is for --lower-only")
    if arguments.vocab_adapters and not arguments.adapters:
        parser.error("--vocab-adapters is for --adapters")
    if not arguments.lower_only and not gpu_compiler.is_here():
        raise SystemExit("the compiler is not installed: make .venv/gpu-compiler.stamp")
    if arguments.lower_only:
        gpu_compiler.prepare()
        from jax.sharding import AbstractDevice, AbstractMesh, AxisType

        device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
        size = (arguments.tensor_parallel_size,)
        mesh = AbstractMesh(size, ("tp",), axis_types=(AxisType.Explicit,), abstract_device=device)
        print(json.dumps(lower_all(*programs_of(arguments, mesh), mesh, arguments.workers)), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        gpu_compiler.prepare(Path(folder))
        mesh = gpu_compiler.make_mesh(arguments.tensor_parallel_size)
        for row in compile_all(programs_of(arguments, mesh)[1], mesh, Path(folder)):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
