"""XLA's compiler for an NVIDIA H100 that need not be here: JAX's CUDA plugin compiles for a description of a GPU.

The plugin comes with `jax[cuda13]`; `make .venv/gpu-compiler.stamp` puts it into a folder of its own, because JAX would
look for a GPU wherever it is installed. Triton's wheel has the assembler and the library that the plugin needs.
"""

import atexit
import os
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

PLUGIN = Path(__file__).parent.parent / ".venv" / "gpu-compiler"

H100 = """
    gpu_device_info {
        name: "NVIDIA H100 80GB HBM3"
        cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
        core_count: 132
        clock_rate_ghz: 1.98
        device_memory_size: 84942979072
        memory_bandwidth: 3352320000000
        l2_cache_size: 52428800
        fpus_per_core: 128
        shared_memory_per_core: 233472
        shared_memory_per_block: 49152
        shared_memory_per_block_optin: 232448
        registers_per_core_limit: 65536
        registers_per_block_limit: 65536
        threads_per_warp: 32
        threads_per_block_limit: 1024
        threads_per_core_limit: 2048
        thread_dim_limit_x: 1024
        thread_dim_limit_y: 1024
        thread_dim_limit_z: 64
        block_dim_limit_x: 2147483647
        block_dim_limit_y: 65535
        block_dim_limit_z: 65535
        device_vendor: "NVIDIA Corporation"
        device_address_bits: 64
        driver_version: "13.0.0"
        runtime_version: "13.0.0"
        compile_time_toolkit_version: "13.0.0"
        dnn_version: "9.10.0"
    }
    platform_name: "CUDA"
    dnn_version_info { major: 9 minor: 10 }
    runtime_version { major: 13 }
    device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""As text of XLA's `GpuTargetConfigProto`: limits of compute capability 9.0, sizes of the SXM module."""


def is_here() -> bool:
    """Whether the plugin is installed, beside this environment or in it."""
    return any((Path(path) / "jax_plugins" / "xla_cuda13").is_dir() for path in (PLUGIN, *sys.path))


def prepare(dump: Path | None = None) -> None:
    """Set this process up to compile: before it imports JAX, which it lets see no GPU.

    XLA writes what it makes of each program into the folder `dump`, if there is one.
    """
    if "jax" in sys.modules:
        raise RuntimeError("prepare() comes before JAX is imported")
    sys.path.append(str(PLUGIN))
    os.environ["JAX_PLATFORMS"] = "cpu"
    # No products are timed, for there is nothing to run them on.
    flags = f"--xla_gpu_cuda_data_dir={_toolkit()} --xla_gpu_autotune_level=0"
    flags += "" if dump is None else f" --xla_dump_to={dump} --xla_dump_hlo_as_text"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"


def make_mesh(size: int = 1) -> Any:
    """Return a mesh of `size` H100s of one host, as `qwen2_jax.parallel.make_mesh` does of GPUs that are here."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import AxisType

    topology = topologies.get_topology_desc("h100", "cuda", topology=f"1x1x{size}", target_config=H100)
    return jax.make_mesh((size,), ("tp",), axis_types=(AxisType.Explicit,), devices=topology.devices)


def _toolkit() -> Path:
    """Lay out what Triton's wheel has of CUDA as XLA looks for it, until this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="qwen2_jax-cuda-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    nvidia = Path(str(files("triton"))) / "backends" / "nvidia"
    links = {"bin/ptxas": "bin/ptxas", "nvvm/libdevice/libdevice.10.bc": "lib/libdevice.10.bc"}
    for name, target in links.items():
        link = folder / name
        link.parent.mkdir(parents=True)
        link.symlink_to(nvidia / target)
    return folder
