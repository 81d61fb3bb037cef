"""Settings of the whole suite, made before any test imports jax, and the order in which the tests run."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

CACHE = Path(__file__).parent.parent / ".cache"

if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    # Without compiled modules, each process that a test starts takes 6 s to import JAX instead of 2 s.
    os.environ["PYTHONPYCACHEPREFIX"] = str(CACHE / "pycache")
    sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ["PYTHONPYCACHEPREFIX"]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Four devices for tensor parallelism. The rest is for compilation, which takes longer than what it compiles: less
    # optimised machine code, and fused loops written as LLVM's code at once instead of through MLIR's dialects.
    _XLA_FLAGS = (
        "--xla_force_host_platform_device_count=4",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    )
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_XLA_FLAGS])
else:
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # a GPU multiplies float32 in TF32 otherwise
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# JAX writes a file in place, so that another process could read half of it: each of pytest-xdist's has its own.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE / "jax" / os.environ.get("PYTEST_XDIST_WORKER", "main"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# The machine may be busy: only what an example does is tested, not how long it takes.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

# Cheap packages first, so that a mistake shows early; what is not listed runs after them, and `slow` tests last.
_FOLDERS = ("tests", "config", "text", "cache", "engine")


def _rank(item: pytest.Item) -> tuple[bool, int]:
    folder = item.path.parent.name
    place = _FOLDERS.index(folder) if folder in _FOLDERS else len(_FOLDERS)
    return item.get_closest_marker("slow") is not None, place


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run milliseconds before seconds: by folder, then everything marked `slow`."""
    items.sort(key=_rank)
